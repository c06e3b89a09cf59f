//! x86_64: the user-mode registers of the current task, the system calls that send, and the thread pointer.

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

/// The privilege level in the code segment selector (its two lowest bits): 3 in user mode.
const USER_MODE: u64 = 3;

/// Copies the registers of a `pt_regs` into [`Registers`].
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
    // SAFETY: the context is valid while the program runs.
    unsafe { (*ctx.ctx).regs.cs & USER_MODE == USER_MODE }
}

/// Fills `to` with the interrupted registers. To be called only if the tick interrupted user mode.
#[inline(always)]
pub fn from_context(ctx: &PerfEventContext, to: &mut Registers) {
    // SAFETY: as above. Each field is read by one load at a constant offset, as the verifier demands.
    unsafe { copy!(to, (*ctx.ctx).regs) };
}

/// Fills `to` with the user registers that were saved on entry to the kernel. `scratch` is used as a
/// buffer, because the stack of a BPF program is small. Returns false for a task without a user mode: the
/// saved registers of a kernel thread are zero (Linux, arch/x86/kernel/process.c, `copy_thread`).
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
    // SAFETY: the registers were just written there, and a map's value is aligned to eight bytes.
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

/// The file descriptor on which a system call sends, read at the entry of the system call
/// (`TP_PROTO(struct pt_regs *regs, long id)`). `None` if the system call is not one of those that send.
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

/// The first two bytes that the current system call sends. `None` if they cannot be read, or if the system
/// call is not one of those known here.
#[inline(always)]
pub fn first_bytes_sent() -> Option<[u8; 2]> {
    /// Offset of `msg_iov` in `struct user_msghdr`.
    const MSG_IOV: u64 = 16;
    // SAFETY: the helpers return pointers to the current task and its registers. The verifier lets programs
    // read them directly; a read at a bad address yields zero.
    let (number, argument) = unsafe {
        let registers = bpf_task_pt_regs(bpf_get_current_task_btf()) as *const pt_regs;
        ((*registers).orig_rax, (*registers).rsi)
    };
    match number {
        number::WRITE | number::SENDTO => user::read(argument),
        number::WRITEV => user::read(user::read(argument)?),
        number::SENDMSG => user::read(user::read(user::read(argument + MSG_IOV)?)?),
        // `connect` wakes a listening Unix socket and sends no bytes: these stand for no statement.
        number::CONNECT => Some([0; 2]),
        _ => None,
    }
}

/// The current task's thread pointer, relative to which thread-local variables are addressed.
#[inline(always)]
pub fn thread_pointer() -> Option<u64> {
    // SAFETY: the base is the current task, and the offset comes from the kernel's own BTF.
    unsafe { field(task::current(), TASK_FSBASE.load()) }
}
