//! Facts about the current task.

use core::ffi::c_void;

use agent_ebpf::table::Space;
use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_get_current_task, generated::bpf_get_current_comm,
};

use crate::{
    fields::{
        MM_ARG_START, PID_LEVEL, PID_NUMBERS, Pointer, SIGNAL_PIDS, TASK_FLAGS, TASK_IN_EXECVE,
        TASK_IN_EXECVE_MASK, TASK_MM, TASK_SIGNAL, TASK_START_TIME, field,
    },
    maps::PROCESSES,
};

/// `PF_EXITING` of `task_struct.flags` (Linux, include/linux/sched.h).
const PF_EXITING: u32 = 0x4;

/// The current task's `struct task_struct`.
#[inline(always)]
pub fn current() -> Pointer {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_get_current_task() as Pointer }
}

/// Its process id (the kernel's tgid), in the initial pid namespace.
#[inline(always)]
pub fn pid() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// Stores the name of its thread, padded with NULs.
#[inline(always)]
pub fn name(to: &mut [u8; 16]) {
    // SAFETY: the size is that of the buffer, and there is always a current task.
    unsafe { bpf_get_current_comm(to.as_mut_ptr().cast(), size_of_val(to) as u32) };
}

/// Identity of its address space (the address of its `mm_struct`, used only for comparison); 0 if it has
/// none.
#[inline(always)]
pub fn mm() -> u64 {
    // SAFETY: the base is the current task, and the offset comes from the kernel's own BTF.
    unsafe { field(current(), TASK_MM.load()).unwrap_or(0) }
}

/// Whether the task is exiting. Its address space may already be gone, so it may have no user stack any more.
#[inline(always)]
pub fn is_exiting() -> bool {
    // SAFETY: the base is the current task, and the offset comes from the kernel's own BTF.
    unsafe {
        let task = current();
        field::<u32>(task, TASK_FLAGS.load()).is_some_and(|flags| flags & PF_EXITING != 0)
    }
}

/// Whether the task is in the middle of `execve`. False on kernels without the field `in_execve`.
#[inline(always)]
pub fn is_in_execve() -> bool {
    // SAFETY: the base is the current task, and the offset comes from the kernel's own BTF.
    unsafe {
        let task = current();
        let bits = field::<u8>(task, TASK_IN_EXECVE.load()).unwrap_or(0);
        bits & TASK_IN_EXECVE_MASK.load() != 0
    }
}

/// The entry of its process in the map of address spaces.
#[inline(always)]
pub fn space() -> Option<&'static Space> {
    // SAFETY: callers read the value at once. If the entry is replaced meanwhile, they see a mix of two
    // entries of the same process.
    unsafe { PROCESSES.get(pid()) }
}

/// The process id of the current process in its own pid namespace. A server in a container identifies its
/// backends by these ids.
#[inline(always)]
pub fn own_pid() -> Option<u32> {
    /// `PIDTYPE_TGID` (include/linux/pid_types.h).
    const TGID: u32 = 1;
    /// Size of `struct upid`; its first member is the number.
    const UPID: u32 = 16;
    // SAFETY: each base is a kernel object of the type that the offset belongs to; a bad address makes the
    // read fail.
    unsafe {
        let signal: *const c_void = field(current(), TASK_SIGNAL.load())?;
        let pid: *const c_void = field(signal, SIGNAL_PIDS.load() + 8 * TGID)?;
        let level: u32 = field(pid, PID_LEVEL.load())?;
        field(
            pid,
            PID_NUMBERS.load().wrapping_add(level.wrapping_mul(UPID)),
        )
    }
}

/// When the task was started, nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub fn start_time() -> Option<u64> {
    // SAFETY: the base is the current task, and the offset comes from the kernel's own BTF.
    unsafe { field(current(), TASK_START_TIME.load()) }
}

/// User address of its process's arguments (`mm->arg_start`).
#[inline(always)]
pub fn arguments() -> Option<u64> {
    // SAFETY: the bases are the current task and its `mm`, and the offsets come from the kernel's own BTF.
    unsafe {
        let mm: Pointer = field(current(), TASK_MM.load())?;
        field(mm, MM_ARG_START.load())
    }
}
