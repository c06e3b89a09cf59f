//! Which processes are sampled: decided here, not afterwards.

use aya_ebpf::helpers::bpf_get_current_comm;

use crate::maps::{FILTER, TARGET_NAMES, TARGETS};

/// Whether only selected processes are sampled.
#[inline(always)]
pub fn active() -> bool {
    FILTER.load() != 0
}

/// Whether the current task is selected: its process, or its thread's name.
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
