//! What differs between processor architectures: registers, system calls, thread pointers.

#[cfg(bpf_target_arch = "x86_64")]
mod x86_64;

#[cfg(bpf_target_arch = "x86_64")]
pub use x86_64::*;
