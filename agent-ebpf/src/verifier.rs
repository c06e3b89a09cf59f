//! Forms of arithmetic that the verifier can follow.

/// `value` if it is at most `limit`, in a form that the verifier sees: the bound is checked on the very
/// register that is used. Without the black box the compiler proves the bound earlier, on another
/// register or on 32 of its bits, and drops it here.
#[inline(always)]
pub fn bounded(value: usize, limit: usize) -> Option<usize> {
    let value = core::hint::black_box(value);
    (value <= limit).then_some(value)
}

/// 1 where a number is less than another, and the distance below 2^63: without a branch, of which the verifier would
/// follow both sides to the program's end.
#[inline(always)]
pub fn is_less(one: u64, other: u64) -> u64 {
    core::hint::black_box(one.wrapping_sub(other)) >> 63
}

/// 1 where two numbers differ, without a branch as well.
#[inline(always)]
pub fn differ(one: u64, other: u64) -> u64 {
    let bits = core::hint::black_box(one ^ other);
    core::hint::black_box(bits | bits.wrapping_neg()) >> 63
}
