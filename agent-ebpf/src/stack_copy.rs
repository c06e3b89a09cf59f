//! Copies of user stacks that the kernel program could not unwind to their end.

use agent_ebpf::{
    counters::Counter,
    limits::{MAX_STACK_COPY, STACK_CHUNK, STACK_COPIES_PER_SECOND},
    sample::{KIND_STACK_COPY, StackCopyHeader},
};
use aya_ebpf::{
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_NO_WAKEUP, BPF_RB_RING_SIZE},
    helpers::{bpf_get_smp_processor_id, bpf_loop, bpf_probe_read_user_buf},
};

use crate::{
    counting,
    maps::{RING, STACK_COPY},
    output,
    state::{CALLER, CpuClock, SLOTS, Walk},
    verifier::bounded,
    walk, words,
};

/// In nanoseconds.
const SECOND: u64 = 1_000_000_000;

/// Sends the registers at which the walk stopped and the stack above them, so that user space can continue
/// the walk. The last frame is removed from the sample, because user space starts with it again. Returns
/// whether the copy was sent.
#[inline(always)]
pub fn send<const SLOT: u32>(walk: &mut Walk, now: u64) -> bool {
    if !within_budget(&mut walk.clock, now) {
        counting::one(Counter::StackCopyBudget);
        return false;
    }
    // Copies at sends may use only half of the ring buffer: a program that the agent does not know yet may
    // send often, and must leave room for the samples.
    if SLOT == CALLER
        && RING.query(BPF_RB_AVAIL_DATA.into()) > RING.query(BPF_RB_RING_SIZE.into()) / 2
    {
        counting::one(Counter::StackCopyRingFull);
        return false;
    }
    let Some(copy) = STACK_COPY.get_ptr_mut(walk.record.header.cpu * SLOTS + SLOT) else {
        return false;
    };
    // SAFETY: see `sampling::tick`.
    let copy = unsafe { &mut *copy };
    copy.header.kind = KIND_STACK_COPY;
    copy.header.cpu = walk.record.header.cpu;
    copy.header.flags = walk::flags(walk);
    copy.header.time = now;
    words::copy(&mut copy.header.registers, &walk.cursor.regs);
    copy.header.stack_bytes = 0;
    // SAFETY: `copy_chunk` has the signature that the helper calls.
    unsafe {
        bpf_loop(
            (MAX_STACK_COPY / STACK_CHUNK) as u32,
            copy_chunk::<SLOT> as *mut core::ffi::c_void,
            core::ptr::null_mut(),
            0,
        )
    };
    let bytes = copy.header.stack_bytes as usize;
    if bytes > MAX_STACK_COPY {
        return false;
    }
    // No wakeup here: the sample that follows wakes the agent.
    if !output::send(copy, size_of::<StackCopyHeader>() + bytes, BPF_RB_NO_WAKEUP) {
        counting::one(Counter::StackCopyRingFull);
        return false;
    }
    counting::one(Counter::StackCopies);
    if walk.record.header.user_frames > 0 {
        walk.record.header.user_frames -= 1;
    }
    true
}

/// Copies one chunk of the user stack; a callback of `bpf_loop`. A page that was never written to cannot be
/// read here, because page faults are not handled in this context. `bpf_probe_read_user` fills its chunk
/// with zeros, which is right: such a page contains no return address. The copy ends with the last page
/// that could be read.
extern "C" fn copy_chunk<const SLOT: u32>(index: u32, _: *mut core::ffi::c_void) -> i64 {
    // SAFETY: the helper has no preconditions.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let Some(copy) = STACK_COPY.get_ptr_mut(cpu * SLOTS + SLOT) else {
        return 1;
    };
    // SAFETY: see `sampling::tick`.
    let copy = unsafe { &mut *copy };
    let Some(at) = bounded(index as usize * STACK_CHUNK, MAX_STACK_COPY - STACK_CHUNK) else {
        return 1;
    };
    // Chunks start at page boundaries, since a chunk has the size of a page.
    let sp = copy.header.registers.sp();
    let skew = sp % STACK_CHUNK as u64;
    let source = (sp - skew).wrapping_add(at as u64);
    // SAFETY: `at + STACK_CHUNK` lies within the buffer; the source is checked by the helper.
    let chunk =
        unsafe { core::slice::from_raw_parts_mut(copy.bytes.as_mut_ptr().add(at), STACK_CHUNK) };
    // SAFETY: as above.
    if unsafe { bpf_probe_read_user_buf(source as *const u8, chunk) }.is_ok() {
        copy.header.stack_bytes = (at + STACK_CHUNK) as u32;
    }
    0
}

/// Whether this CPU may send another stack copy in this second.
#[inline(always)]
fn within_budget(clock: &mut CpuClock, now: u64) -> bool {
    if now.wrapping_sub(clock.window) > SECOND {
        clock.window = now;
        clock.copies = 0;
    }
    clock.copies += 1;
    clock.copies <= u64::from(STACK_COPIES_PER_SECOND)
}
