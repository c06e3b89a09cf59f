//! Copies and clears values word by word.
//!
//! For more than a few bytes the compiler would call `memmove` or `memset`, which in a BPF program are
//! loops over single bytes: with warm caches they took half of a walk's time. It does not turn volatile
//! accesses into such calls.

/// Copies a value.
#[inline(always)]
pub fn copy<T: Copy>(to: &mut T, from: &T) {
    const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() == 8) };
    let (to, from) = (
        core::ptr::from_mut(to).cast::<u64>(),
        core::ptr::from_ref(from).cast::<u64>(),
    );
    let mut at = 0;
    while at < size_of::<T>() / 8 {
        // SAFETY: both values have the size and the alignment asserted above.
        unsafe { to.add(at).write_volatile(from.add(at).read_volatile()) };
        at += 1;
    }
}

/// Sets a value that consists of integers to zero.
#[inline(always)]
pub fn clear<T: Copy>(to: &mut T) {
    const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() == 8) };
    let to = core::ptr::from_mut(to).cast::<u64>();
    let mut at = 0;
    while at < size_of::<T>() / 8 {
        // SAFETY: as above.
        unsafe { to.add(at).write_volatile(0) };
        at += 1;
    }
}
