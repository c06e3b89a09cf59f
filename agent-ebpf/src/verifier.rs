//! Arithmetic in forms that the kernel's BPF verifier can follow.

/// `value` if it is at most `limit`, else `None`. The black box forces the check onto the very register
/// that the caller then uses, so that the verifier knows its bound. Otherwise the compiler may have proved
/// the bound earlier, on another register or on the lower 32 bits, and would drop the check here.
#[inline(always)]
pub fn bounded(value: usize, limit: usize) -> Option<usize> {
    let value = core::hint::black_box(value);
    (value <= limit).then_some(value)
}

/// 1 if `one` is less than `other`, else 0; the two must differ by less than 2^63. It is computed without a
/// branch, because the verifier would follow both sides of a branch to the program's end.
#[inline(always)]
pub fn is_less(one: u64, other: u64) -> u64 {
    core::hint::black_box(one.wrapping_sub(other)) >> 63
}

/// 1 if two numbers differ, else 0; also without a branch.
#[inline(always)]
pub fn differ(one: u64, other: u64) -> u64 {
    let bits = core::hint::black_box(one ^ other);
    core::hint::black_box(bits | bits.wrapping_neg()) >> 63
}

/// `one` if `condition` is 1, `other` if it is 0; also without a branch. It multiplies, because recent
/// verifiers follow both values of a mask that is 0 or all ones (kernel/bpf/verifier.c,
/// `maybe_fork_scalars`).
#[inline(always)]
pub fn select(condition: u64, one: u64, other: u64) -> u64 {
    let difference = one.wrapping_sub(other);
    other.wrapping_add(difference.wrapping_mul(core::hint::black_box(condition)))
}
