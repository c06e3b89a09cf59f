//! The entry points of the kernel programs. Their work is done in the modules next to this file; the types
//! and functions that they share with the agent are in the library of this crate.
#![no_std]
#![no_main]
#![expect(
    missing_docs,
    reason = "the macros of the entry points generate undocumented functions"
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

/// Runs at each tick of this CPU's sampling clock.
#[perf_event]
pub fn flamestorm_sample(ctx: PerfEventContext) -> u32 {
    sampling::tick(&ctx);
    0
}

/// Runs in the parent after a fork. `TP_PROTO(task_struct *parent, task_struct *child)`.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub fn flamestorm_fork(ctx: RawTracePointContext) -> i32 {
    lifecycle::fork(&ctx, ctx.arg(0), ctx.arg(1));
    0
}

/// Runs in a task that has just executed another program. `TP_PROTO(task_struct *task, …)`.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn flamestorm_exec(ctx: RawTracePointContext) -> i32 {
    lifecycle::exec(ctx.arg(0));
    0
}

/// Runs in a task that is exiting. `TP_PROTO(task_struct *task, …)`.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn flamestorm_exit(ctx: RawTracePointContext) -> i32 {
    lifecycle::exit(ctx.arg(0));
    0
}

/// Runs in the sending thread before a TCP socket sends. `TP_PROTO(const struct sock *sk, …)`; since Linux
/// 6.16.
#[raw_tracepoint(tracepoint = "tcp_sendmsg_locked")]
pub fn flamestorm_tcp(ctx: RawTracePointContext) -> i32 {
    let _ = caller::tcp(ctx.arg(0));
    0
}

/// Runs when data was put into the receive queue of the socket `sk`, before its reader is woken. For a Unix
/// socket it runs in the sending thread. `TP_PROTO(const struct sock *sk)`; since Linux 6.4.
#[raw_tracepoint(tracepoint = "sk_data_ready")]
pub fn flamestorm_unix(ctx: RawTracePointContext) -> i32 {
    let _ = caller::unix_received(ctx.arg(0));
    0
}

/// Runs at the entry of `tcp_sendmsg(struct sock *sk, …)`, on kernels without the tracepoint. It is a
/// kprobe because an `fentry` program can be preempted, and until it continues, the kernel skips it for
/// every other task on this CPU.
#[kprobe(function = "tcp_sendmsg")]
pub fn flamestorm_tcp_call(ctx: ProbeContext) -> u32 {
    let _ = ctx.arg(0).and_then(caller::tcp);
    0
}

/// Runs at the entry of `unix_stream_sendmsg(struct socket *sock, …)`, on kernels without the tracepoint.
#[kprobe(function = "unix_stream_sendmsg")]
pub fn flamestorm_unix_call(ctx: ProbeContext) -> u32 {
    let _ = ctx.arg(0).and_then(caller::unix);
    0
}

/// Runs at the entry of every system call. `TP_PROTO(pt_regs *regs, long id)`.
#[raw_tracepoint(tracepoint = "sys_enter")]
pub fn flamestorm_send(ctx: RawTracePointContext) -> i32 {
    let _ = caller::system_call(&ctx);
    0
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

// The kernel allows some of the helpers used here, such as `bpf_probe_read_user`, only to programs under a
// license compatible with the GPL.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
