//! A tick of the sampling clock: account for it, take the stacks, send them.

use agent_ebpf::{
    counters::Counter,
    limits::{MAX_STACK_COPY, STACK_CHUNK, STACK_COPIES_PER_SECOND},
    sample::{KIND_SAMPLE, KIND_STACK_COPY, Outcome, StackCopyHeader},
};
use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, BPF_RB_RING_SIZE},
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_smp_processor_id, bpf_get_stack, bpf_ktime_get_ns,
        bpf_loop, bpf_probe_read_user_buf, bpf_ringbuf_output,
    },
    programs::PerfEventContext,
};

use crate::{
    backend, counting, filter,
    maps::{PERIOD_NS, RING, STACK_COPY, WALK},
    registers, trace,
    walk::{self, Clock, KERNEL_STACK_BYTES, Record, SLOTS, Walk, bounded},
    words,
};

const SECOND: u64 = 1_000_000_000;

/// A stack copy being built.
#[repr(C)]
pub struct StackCopy {
    header: StackCopyHeader,
    bytes: [u8; MAX_STACK_COPY],
}

/// One tick.
#[inline(always)]
pub fn tick(ctx: &PerfEventContext) {
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    counting::one(Counter::Ticks);
    let Some(walk) = WALK.get_ptr_mut(walk::SAMPLER) else {
        return;
    };
    // SAFETY: this CPU's only user of its slot is this program, which cannot interrupt itself.
    let walk = unsafe { &mut *walk };
    count_missed(&mut walk.clock, now);
    let ids = bpf_get_current_pid_tgid();
    let (pid, tid) = ((ids >> 32) as u32, ids as u32);
    if tid == 0 {
        return counting::one(Counter::Idle);
    }
    if filter::active() && !filter::selects_current(pid) {
        return counting::one(Counter::Filtered);
    }
    walk.record.header.kind = KIND_SAMPLE;
    walk.record.header.pid = pid;
    walk.record.header.tid = tid;
    // SAFETY: the helper has no preconditions.
    walk.record.header.cpu = unsafe { bpf_get_smp_processor_id() };
    walk.record.header.time = now;
    walk.record.header.mm = walk::current_mm();
    walk::name_of_current(&mut walk.record.header.comm);
    take_stacks(ctx, walk);
    if Outcome::is_continuable(walk::outcome(walk)) {
        walk.record.header.has_stack_copy = send_stack_copy::<{ walk::SAMPLER }>(walk, now) as u8;
    }
    trace::of_current_thread(walk.space.trace_offset, &mut walk.record.header.trace);
    if walk.space.server != 0 {
        backend::tell(&walk.space, &mut walk.record.header);
    }
    send_sample(walk);
    // SAFETY: the helper has no preconditions.
    let end = unsafe { bpf_ktime_get_ns() };
    counting::add(Counter::SampleNanos, end.wrapping_sub(now));
}

/// Counts the ticks that should have come between the last one and now.
#[inline(always)]
fn count_missed(clock: &mut Clock, now: u64) {
    let (last, period) = (clock.last_tick, PERIOD_NS.load());
    clock.last_tick = now;
    let gap = now.wrapping_sub(last);
    if last != 0 && period != 0 && gap > period + period / 2 {
        counting::add(Counter::MissedTicks, (gap + period / 2) / period - 1);
    }
}

/// Kernel stack if the tick fell into the kernel, then the user stack.
#[inline(always)]
fn take_stacks(ctx: &PerfEventContext, walk: &mut Walk) {
    walk.record.header.kernel_frames = 0;
    walk.record.header.user_frames = 0;
    walk.record.header.has_stack_copy = 0;
    walk.record.header.is_backend_unchanged = 0;
    walk.space.server = 0;
    walk.space.trace_offset = 0;
    walk.space.told.entry = 0;
    let has_user_stack = if registers::in_user_mode(ctx) {
        registers::from_context(ctx, &mut walk.cursor.regs);
        true
    } else {
        let has_user_mode =
            registers::from_kernel_entry(&mut walk.cursor.regs, &mut walk.record.frames);
        // SAFETY: the buffer is as large as the size says.
        let bytes = unsafe {
            bpf_get_stack(
                ctx.as_ptr(),
                walk.record.frames.as_mut_ptr().cast(),
                KERNEL_STACK_BYTES,
                0,
            )
        };
        if bytes > 0 {
            walk.record.header.kernel_frames = bytes as u32 / 8;
        }
        has_user_mode
    };
    // A task without an address space (a kernel thread, or one that has just given its own up on its
    // way out) has no user stack.
    if has_user_stack && walk.record.header.mm != 0 {
        walk::user_stack::<{ walk::SAMPLER }>(walk);
    } else {
        walk.record.header.outcome = Outcome::KernelOnly as u8;
    }
}

/// Sends the registers at which the walk stopped and the stack above them, for user space to go on.
/// The frame at which it stopped is taken out of the sample: user space names it again.
#[inline(always)]
pub fn send_stack_copy<const SLOT: u32>(walk: &mut Walk, now: u64) -> bool {
    if !within_budget(&mut walk.clock, now) {
        counting::one(Counter::StackCopyBudget);
        return false;
    }
    // A program that sends much before the agent knows it leaves half of the buffer to the samples.
    if SLOT == walk::CALLER
        && RING.query(BPF_RB_AVAIL_DATA.into()) > RING.query(BPF_RB_RING_SIZE.into()) / 2
    {
        counting::one(Counter::StackCopyRingFull);
        return false;
    }
    let Some(copy) = STACK_COPY.get_ptr_mut(walk.record.header.cpu * SLOTS + SLOT) else {
        return false;
    };
    // SAFETY: see `tick`.
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
    // The sample that follows wakes the agent.
    if !send(copy, size_of::<StackCopyHeader>() + bytes, BPF_RB_NO_WAKEUP) {
        counting::one(Counter::StackCopyRingFull);
        return false;
    }
    counting::one(Counter::StackCopies);
    if walk.record.header.user_frames > 0 {
        walk.record.header.user_frames -= 1;
    }
    true
}

/// Copies one chunk of the user stack. A page in which nothing was ever stored cannot be read here, and
/// comes out as zeros (bpf_probe_read_user clears what it cannot read): no caller is in it. The copy
/// ends with the last page that could be read.
extern "C" fn copy_chunk<const SLOT: u32>(index: u32, _: *mut core::ffi::c_void) -> i64 {
    // SAFETY: the helper has no preconditions.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    let Some(copy) = STACK_COPY.get_ptr_mut(cpu * SLOTS + SLOT) else {
        return 1;
    };
    // SAFETY: see `tick`.
    let copy = unsafe { &mut *copy };
    let Some(at) = bounded(index as usize * STACK_CHUNK, MAX_STACK_COPY - STACK_CHUNK) else {
        return 1;
    };
    // A chunk is a page.
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
fn within_budget(clock: &mut Clock, now: u64) -> bool {
    if now.wrapping_sub(clock.window) > SECOND {
        clock.window = now;
        clock.copies = 0;
    }
    clock.copies += 1;
    clock.copies <= u64::from(STACK_COPIES_PER_SECOND)
}

/// Sends the header and exactly the frames there are.
#[inline(always)]
fn send_sample(walk: &mut Walk) {
    let frames = (walk.record.header.kernel_frames + walk.record.header.user_frames) as usize;
    if frames > walk::FRAMES {
        return;
    }
    counting::add(Counter::UserFrames, walk.record.header.user_frames as u64);
    // The agent polls: waking it for each sample would cost more than the sample. But what the kernel
    // does not know it should learn before the next tick.
    let wakeup = if walk.record.header.has_stack_copy != 0 {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    };
    if send(&mut walk.record, Record::bytes(frames), wakeup) {
        counting::one(Counter::Sampled);
    } else {
        counting::one(Counter::RingFull);
        backend::forget(&walk.record.header);
    }
}

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
