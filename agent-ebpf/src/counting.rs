//! Updates of the counters. Each CPU has its own slots, so no atomic operations are needed.

use agent_ebpf::counters::Counter;

use crate::maps::COUNTS;

/// Adds `amount` to a counter of this CPU.
#[inline(always)]
pub fn add(counter: Counter, amount: u64) {
    if let Some(slot) = COUNTS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot belongs to this CPU, and a program that interrupts this one only updates other
        // counters.
        unsafe { *slot = (*slot).wrapping_add(amount) };
    }
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn one(counter: Counter) {
    add(counter, 1);
}
