//! The ring buffer to the agent.

use aya_ebpf::helpers::bpf_ringbuf_output;

use crate::{maps::RING, verifier::bounded};

/// Appends the first `bytes` of `record` to the ring buffer.
#[inline(always)]
pub fn send<T>(record: &mut T, bytes: usize, wakeup: u32) -> bool {
    let Some(bytes) = bounded(bytes, size_of::<T>()) else {
        return false;
    };
    // SAFETY: `bytes` lie within the record.
    unsafe {
        bpf_ringbuf_output(
            (&raw const RING).cast_mut().cast(),
            (&raw mut *record).cast(),
            bytes as u64,
            wakeup as u64,
        ) == 0
    }
}
