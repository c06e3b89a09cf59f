//! Code that depends on the processor architecture: registers, system calls, the thread pointer.

#[cfg(bpf_target_arch = "x86_64")]
mod x86_64;

#[cfg(bpf_target_arch = "x86_64")]
pub use x86_64::*;
