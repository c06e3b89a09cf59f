//! Reads memory of the current process. The BPF helpers check every address.

use core::ffi::c_void;

use aya_ebpf::helpers::{
    bpf_probe_read_user,
    generated::{self, bpf_probe_read_user_str},
};

/// Reads a value of user memory.
#[inline(always)]
pub fn read<T>(address: u64) -> Option<T> {
    // SAFETY: the helper checks the address, and callers use types made of integers, for which every value
    // is valid.
    unsafe { bpf_probe_read_user(address as *const T) }.ok()
}

/// Fills `words` from user memory. Returns false when not all of it can be read.
#[inline(always)]
pub fn read_words(address: u64, words: &mut [u64]) -> bool {
    // SAFETY: the helper checks the address and writes no more than the size given.
    unsafe {
        generated::bpf_probe_read_user(
            words.as_mut_ptr().cast(),
            size_of_val(words) as u32,
            address as *const c_void,
        ) == 0
    }
}

/// Reads a pointer variable. `None` if `variable` is 0 (the server does not export it), cannot be read, or
/// is null.
#[inline(always)]
pub fn follow(variable: u64) -> Option<u64> {
    if variable == 0 {
        return None;
    }
    read::<u64>(variable).filter(|pointer| *pointer != 0)
}

/// Reads a string up to and including its NUL, at most `N` bytes. Returns the number of bytes, or a
/// negative error, in which case the first byte is set to 0.
#[inline(always)]
pub fn read_string<const N: usize>(address: u64, to: &mut [u8; N]) -> i64 {
    // SAFETY: as above.
    unsafe { bpf_probe_read_user_str(to.as_mut_ptr().cast(), N as u32, address as *const c_void) }
}

/// Reads `bytes` bytes of user memory. Returns false when not all of them can be read.
///
/// # Safety
/// `to` must be valid for writes of this many bytes.
#[inline(always)]
pub unsafe fn read_bytes(address: u64, to: *mut u8, bytes: u32) -> bool {
    // SAFETY: guaranteed by the caller.
    unsafe { generated::bpf_probe_read_user(to.cast(), bytes, address as *const c_void) == 0 }
}
