//! Memory of the current process, which the helpers check.

use core::ffi::c_void;

use aya_ebpf::helpers::{
    bpf_probe_read_user,
    generated::{self, bpf_probe_read_user_str},
};

/// Reads a value of user memory.
#[inline(always)]
pub fn read<T>(address: u64) -> Option<T> {
    // SAFETY: the helper checks the address; `T` is made of integers here.
    unsafe { bpf_probe_read_user(address as *const T) }.ok()
}

/// Reads words of user memory.
#[inline(always)]
pub fn read_words(address: u64, words: &mut [u64]) -> bool {
    // SAFETY: the helper checks the address and writes only what was asked for.
    unsafe {
        generated::bpf_probe_read_user(
            words.as_mut_ptr().cast(),
            size_of_val(words) as u32,
            address as *const c_void,
        ) == 0
    }
}

/// Reads a pointer variable; `None` for one that is null, not there or cannot be read.
#[inline(always)]
pub fn follow(variable: u64) -> Option<u64> {
    if variable == 0 {
        return None;
    }
    read::<u64>(variable).filter(|pointer| *pointer != 0)
}

/// Reads a string, its NUL included; on failure the first byte is 0.
#[inline(always)]
pub fn read_string<const N: usize>(address: u64, to: &mut [u8; N]) -> i64 {
    // SAFETY: as above.
    unsafe { bpf_probe_read_user_str(to.as_mut_ptr().cast(), N as u32, address as *const c_void) }
}

/// Reads `bytes` bytes.
///
/// # Safety
/// They must fit behind `to`.
#[inline(always)]
pub unsafe fn read_bytes(address: u64, to: *mut u8, bytes: u32) -> bool {
    // SAFETY: as promised.
    unsafe { generated::bpf_probe_read_user(to.cast(), bytes, address as *const c_void) == 0 }
}
