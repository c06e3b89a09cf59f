//! The ring buffer to the agent.

use aya_ebpf::helpers::bpf_ringbuf_output;

use crate::{maps::RING, verifier::bounded};

/// Appends the first `bytes` bytes of `record` to the ring buffer. `wakeup` is a flag of
/// `bpf_ringbuf_output` (`BPF_RB_NO_WAKEUP` or `BPF_RB_FORCE_WAKEUP`). Returns false when the buffer is
/// full, or when `bytes` is more than the size of `T`.
#[inline(always)]
pub fn send<T>(record: &mut T, bytes: usize, wakeup: u32) -> bool {
    let Some(bytes) = bounded(bytes, size_of::<T>()) else {
        return false;
    };
    // SAFETY: `bytes` is at most the record's size.
    unsafe {
        bpf_ringbuf_output(
            (&raw const RING).cast_mut().cast(),
            (&raw mut *record).cast(),
            bytes as u64,
            wakeup as u64,
        ) == 0
    }
}
