//! The programs in the kernel: entry points of a few lines. What they do is in the modules beside
//! this file; what they share with the agent is in the library of this crate.
#![no_std]
#![no_main]
#![expect(
    missing_docs,
    reason = "the entry points' macros make undocumented functions"
)]

mod arch;
mod backend;
mod caller;
mod counting;
mod fields;
mod filter;
mod lifecycle;
mod maps;
mod output;
mod sampling;
mod sends;
mod socket;
mod stack_copy;
mod state;
mod task;
mod trace;
mod user;
mod verifier;
mod walk;
mod words;

use aya_ebpf::{
    macros::{kprobe, perf_event, raw_tracepoint},
    programs::{PerfEventContext, ProbeContext, RawTracePointContext},
};

/// A tick of the sampling clock on this CPU.
#[perf_event]
pub fn flamestorm_sample(ctx: PerfEventContext) -> u32 {
    sampling::tick(&ctx);
    0
}

/// A task was forked; runs in the parent. `TP_PROTO(task_struct *parent, task_struct *child)`.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub fn flamestorm_fork(ctx: RawTracePointContext) -> i32 {
    lifecycle::fork(&ctx, ctx.arg(0), ctx.arg(1));
    0
}

/// A task has begun to run another program; runs in it. `TP_PROTO(task_struct *task, …)`.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn flamestorm_exec(ctx: RawTracePointContext) -> i32 {
    lifecycle::exec(ctx.arg(0));
    0
}

/// A task is ending; runs in it. `TP_PROTO(task_struct *task, …)`.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn flamestorm_exit(ctx: RawTracePointContext) -> i32 {
    lifecycle::exit(ctx.arg(0));
    0
}

/// A TCP socket sends. `TP_PROTO(const struct sock *sk, …)`; since Linux 6.16.
#[raw_tracepoint(tracepoint = "tcp_sendmsg_locked")]
pub fn flamestorm_tcp(ctx: RawTracePointContext) -> i32 {
    let _ = caller::tcp(ctx.arg(0));
    0
}

/// A socket has been given something to read. `TP_PROTO(const struct sock *sk)`; since Linux 6.4.
#[raw_tracepoint(tracepoint = "sk_data_ready")]
pub fn flamestorm_unix(ctx: RawTracePointContext) -> i32 {
    let _ = caller::unix_received(ctx.arg(0));
    0
}

/// The function `tcp_sendmsg(struct sock *sk, …)`, where there is no tracepoint. A kprobe, because an
/// `fentry` program can be preempted, and meanwhile the kernel skips it for whoever else sends on this CPU.
#[kprobe(function = "tcp_sendmsg")]
pub fn flamestorm_tcp_call(ctx: ProbeContext) -> u32 {
    let _ = ctx.arg(0).and_then(caller::tcp);
    0
}

/// The function `unix_stream_sendmsg(struct socket *sock, …)`, where there is no tracepoint.
#[kprobe(function = "unix_stream_sendmsg")]
pub fn flamestorm_unix_call(ctx: ProbeContext) -> u32 {
    let _ = ctx.arg(0).and_then(caller::unix);
    0
}

/// A system call begins. `TP_PROTO(pt_regs *regs, long id)`.
#[raw_tracepoint(tracepoint = "sys_enter")]
pub fn flamestorm_send(ctx: RawTracePointContext) -> i32 {
    let _ = caller::system_call(&ctx);
    0
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

// `bpf_loop`, `bpf_task_pt_regs` and the ring buffer are for programs under a licence compatible
// with the kernel's.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
