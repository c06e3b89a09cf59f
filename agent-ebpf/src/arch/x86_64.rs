//! x86_64: the register file of the current task's user mode, its system calls, its thread pointer.

use agent_ebpf::unwind::{Registers, reg};
use aya_ebpf::{
    bindings::pt_regs,
    helpers::{bpf_get_current_task_btf, bpf_task_pt_regs, generated::bpf_probe_read_kernel},
    programs::{PerfEventContext, RawTracePointContext},
};

use crate::{
    fields::{Pointer, TASK_FSBASE, field},
    state::FRAMES,
    task, user,
};

/// The privilege level in the code segment selector: 3 in user mode.
const USER_MODE: u64 = 3;

/// Copies user registers out of a `pt_regs`.
macro_rules! copy {
    ($to:expr, $from:expr) => {{
        let to: &mut Registers = $to;
        to.gp[reg::RAX as usize] = $from.rax;
        to.gp[reg::RDX as usize] = $from.rdx;
        to.gp[reg::RCX as usize] = $from.rcx;
        to.gp[reg::RBX as usize] = $from.rbx;
        to.gp[reg::RSI as usize] = $from.rsi;
        to.gp[reg::RDI as usize] = $from.rdi;
        to.gp[reg::RBP as usize] = $from.rbp;
        to.gp[reg::RSP as usize] = $from.rsp;
        to.gp[reg::R8 as usize] = $from.r8;
        to.gp[reg::R9 as usize] = $from.r9;
        to.gp[reg::R10 as usize] = $from.r10;
        to.gp[reg::R11 as usize] = $from.r11;
        to.gp[reg::R12 as usize] = $from.r12;
        to.gp[reg::R13 as usize] = $from.r13;
        to.gp[reg::R14 as usize] = $from.r14;
        to.gp[reg::R15 as usize] = $from.r15;
        to.ip = $from.rip;
    }};
}

/// Whether the tick interrupted user mode.
#[inline(always)]
pub fn in_user_mode(ctx: &PerfEventContext) -> bool {
    // SAFETY: the context is valid for the program's run.
    unsafe { (*ctx.ctx).regs.cs & USER_MODE == USER_MODE }
}

/// Fills `to` with the interrupted registers. Only when the tick interrupted user mode.
#[inline(always)]
pub fn from_context(ctx: &PerfEventContext, to: &mut Registers) {
    // SAFETY: as above; each field is one load at a constant offset, as the verifier demands.
    unsafe { copy!(to, (*ctx.ctx).regs) };
}

/// Fills `to` with the registers that were saved on entry to the kernel; `scratch` takes them on the way,
/// because the programs' stack is small. False for a task without a user mode: a kernel thread's saved
/// registers are zero (Linux, arch/x86/kernel/process.c, copy_thread).
#[inline(always)]
pub fn from_kernel_entry(to: &mut Registers, scratch: &mut [u64; FRAMES]) -> bool {
    const { assert!(size_of::<pt_regs>() <= size_of::<[u64; FRAMES]>()) };
    // SAFETY: the helpers return pointers to the current task and its registers; the read is checked, and
    // the buffer is large enough.
    let failed = unsafe {
        bpf_probe_read_kernel(
            scratch.as_mut_ptr().cast(),
            size_of::<pt_regs>() as u32,
            bpf_task_pt_regs(bpf_get_current_task_btf()) as Pointer,
        )
    };
    if failed != 0 {
        return false;
    }
    // SAFETY: the registers were just written there; a map's value is aligned to eight.
    let saved = unsafe { &*scratch.as_ptr().cast::<pt_regs>() };
    copy!(to, saved);
    saved.cs & USER_MODE == USER_MODE
}

/// System calls that send on a socket, by number (arch/x86/entry/syscalls/syscall_64.tbl).
mod number {
    pub const WRITE: u64 = 1;
    pub const WRITEV: u64 = 20;
    pub const CONNECT: u64 = 42;
    pub const SENDTO: u64 = 44;
    pub const SENDMSG: u64 = 46;
}

#[inline(always)]
fn is_send(number: u64) -> bool {
    matches!(
        number,
        number::WRITE | number::WRITEV | number::SENDTO | number::SENDMSG
    )
}

/// The descriptor that a system call sends on, at its entry: `TP_PROTO(struct pt_regs *regs, long id)`. `None`: it is no
/// system call that sends.
#[inline(always)]
pub fn sends_on(ctx: &RawTracePointContext) -> Option<u32> {
    if !is_send(ctx.arg(1)) {
        return None;
    }
    let registers: Pointer = ctx.arg(0);
    // SAFETY: the first argument is the caller's registers.
    let descriptor: u64 = unsafe { field(registers, core::mem::offset_of!(pt_regs, rdi) as u32) }?;
    Some(descriptor as u32)
}

/// The first bytes that the current system call sends. `None`: it is another way to send.
#[inline(always)]
pub fn first_bytes_sent() -> Option<[u8; 2]> {
    /// Offset of `msg_iov` in `struct user_msghdr`.
    const MSG_IOV: u64 = 16;
    // SAFETY: the helpers return pointers to the current task and its registers, which the verifier lets programs
    // read without a helper; one that is bad reads as zero.
    let (number, argument) = unsafe {
        let registers = bpf_task_pt_regs(bpf_get_current_task_btf()) as *const pt_regs;
        ((*registers).orig_rax, (*registers).rsi)
    };
    match number {
        number::WRITE | number::SENDTO => user::read(argument),
        number::WRITEV => user::read(user::read(argument)?),
        number::SENDMSG => user::read(user::read(user::read(argument + MSG_IOV)?)?),
        // A new client wakes a listening socket.
        number::CONNECT => Some([0; 2]),
        _ => None,
    }
}

/// The current task's thread pointer, which thread-local variables are addressed by.
#[inline(always)]
pub fn thread_pointer() -> Option<u64> {
    // SAFETY: the current task, and an offset from the kernel's own BTF.
    unsafe { field(task::current(), TASK_FSBASE.load()) }
}
