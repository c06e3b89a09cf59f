//! Decides in the kernel which tasks are sampled, so that nothing is sent for the others.

use aya_ebpf::helpers::bpf_get_current_comm;

use crate::maps::{FILTER, TARGET_NAMES, TARGETS};

/// Whether only selected tasks are sampled.
#[inline(always)]
pub fn active() -> bool {
    FILTER.load() != 0
}

/// Whether the current task is selected, by its process (`pid`) or by its thread's name.
#[inline(always)]
pub fn selects_current(pid: u32) -> bool {
    if TARGETS.get_ptr(pid).is_some() {
        return true;
    }
    match bpf_get_current_comm() {
        Ok(name) => TARGET_NAMES.get_ptr(name).is_some(),
        Err(_) => false,
    }
}
