//! Handles a tick of the sampling clock: counts it, takes the stacks, and sends the sample.

use agent_ebpf::{
    counters::Counter,
    sample::{KIND_SAMPLE, Outcome},
};
use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_smp_processor_id, bpf_get_stack, bpf_ktime_get_ns,
    },
    programs::PerfEventContext,
};

use crate::{
    arch, backend, counting, filter,
    maps::{PERIOD_NS, WALK},
    output, stack_copy,
    state::{CpuClock, FRAMES, SAMPLER, SampleRecord, Walk},
    task, trace,
    walk::{self, KERNEL_STACK_BYTES},
};

/// Handles one tick.
#[inline(always)]
pub fn tick(ctx: &PerfEventContext) {
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    counting::one(Counter::Ticks);
    let Some(walk) = WALK.get_ptr_mut(SAMPLER) else {
        return;
    };
    // SAFETY: only this program uses this CPU's slot, and it cannot interrupt itself.
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
    walk.record.header.mm = task::mm();
    task::name(&mut walk.record.header.comm);
    take_stacks(ctx, walk);
    if Outcome::is_continuable(walk::outcome(walk)) {
        walk.record.header.has_stack_copy = stack_copy::send::<{ SAMPLER }>(walk, now) as u8;
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

/// Counts the ticks that should have happened between the previous one and now.
#[inline(always)]
fn count_missed(clock: &mut CpuClock, now: u64) {
    let (last, period) = (clock.last_tick, PERIOD_NS.load());
    clock.last_tick = now;
    let gap = now.wrapping_sub(last);
    if last != 0 && period != 0 && gap > period + period / 2 {
        counting::add(Counter::MissedTicks, (gap + period / 2) / period - 1);
    }
}

/// Takes the kernel stack if the tick interrupted the kernel, and then the user stack.
#[inline(always)]
fn take_stacks(ctx: &PerfEventContext, walk: &mut Walk) {
    walk.record.header.kernel_frames = 0;
    walk.record.header.user_frames = 0;
    walk.record.header.has_stack_copy = 0;
    walk.record.header.is_backend_unchanged = 0;
    walk.space.server = 0;
    walk.space.trace_offset = 0;
    walk.space.revision.entry = 0;
    let has_user_stack = if arch::in_user_mode(ctx) {
        arch::from_context(ctx, &mut walk.cursor.regs);
        true
    } else {
        let has_user_mode = arch::from_kernel_entry(&mut walk.cursor.regs, &mut walk.record.frames);
        // SAFETY: the size given is at most that of the buffer.
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
    // A task without an address space has no user stack: it is a kernel thread, or is exiting and has
    // already released its address space.
    if has_user_stack && walk.record.header.mm != 0 {
        walk::user_stack::<{ SAMPLER }>(walk);
    } else {
        walk.record.header.outcome = Outcome::KernelOnly as u8;
    }
}

/// Sends the header and as many frames as there are.
#[inline(always)]
fn send_sample(walk: &mut Walk) {
    let frames = (walk.record.header.kernel_frames + walk.record.header.user_frames) as usize;
    if frames > FRAMES {
        return;
    }
    counting::add(Counter::UserFrames, walk.record.header.user_frames as u64);
    // The agent polls, because waking it for each sample would cost more than the sample itself. A stack
    // copy does wake it, so that it can give the kernel the missing tables before the next tick.
    let wakeup = if walk.record.header.has_stack_copy != 0 {
        BPF_RB_FORCE_WAKEUP
    } else {
        BPF_RB_NO_WAKEUP
    };
    if output::send(&mut walk.record, SampleRecord::bytes(frames), wakeup) {
        counting::one(Counter::Sampled);
    } else {
        counting::one(Counter::RingFull);
        backend::forget(&walk.record.header);
    }
}
