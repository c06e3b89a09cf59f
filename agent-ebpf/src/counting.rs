//! Counters, one slot a CPU each: no atomics needed.

use agent_ebpf::counters::Counter;

use crate::maps::COUNTS;

/// Adds `amount` to a counter of this CPU.
#[inline(always)]
pub fn add(counter: Counter, amount: u64) {
    if let Some(slot) = COUNTS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot belongs to this CPU, and nothing interrupts this program on it but
        // programs that count other things.
        unsafe { *slot = (*slot).wrapping_add(amount) };
    }
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn one(counter: Counter) {
    add(counter, 1);
}
