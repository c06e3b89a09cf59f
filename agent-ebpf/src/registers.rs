//! The register file of the current task's user mode, wherever the tick fell.

use core::ffi::c_void;

use agent_ebpf::unwind::{Registers, reg};
use aya_ebpf::{
    bindings::pt_regs,
    helpers::{bpf_get_current_task_btf, bpf_task_pt_regs, generated::bpf_probe_read_kernel},
    programs::PerfEventContext,
};

use crate::walk::FRAMES;

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
            bpf_task_pt_regs(bpf_get_current_task_btf()) as *const c_void,
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
