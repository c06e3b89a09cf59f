//! Keeps the map of address spaces up to date at fork, exec and exit, without the delay of the agent. A
//! child has its parent's tables from its first instruction on. An exec changes the address space, so the
//! tables of the old program are no longer applied (see [`Space::mm`]). The entry is removed as well: the
//! kernel may reuse the address of a freed `mm`, and children of the new program must not inherit the
//! tables of the old one.

use agent_ebpf::{counters::Counter, postgres::StatusRevision, table::Space};
use aya_ebpf::programs::RawTracePointContext;
use aya_log_ebpf::warn;

use crate::{
    backend, counting,
    fields::{Pointer, SIGNAL_LIVE, TASK_MM, TASK_SIGNAL, TASK_TGID, field},
    filter,
    maps::{PROCESSES, TARGETS},
    task,
};

/// Lets a child process inherit its parent's tables, and its selection. New threads are ignored.
#[inline(always)]
pub fn fork(ctx: &RawTracePointContext, parent: Pointer, child: Pointer) {
    // SAFETY: both arguments are task_structs, and the offsets come from the kernel's own BTF.
    let fields = unsafe {
        (
            field::<u32>(parent, TASK_TGID.load()),
            field::<u32>(child, TASK_TGID.load()),
            field::<u64>(parent, TASK_MM.load()),
            field::<u64>(child, TASK_MM.load()),
        )
    };
    let (Some(parent), Some(child), Some(parent_mm), Some(mm)) = fields else {
        return;
    };
    if parent == child {
        return; // a thread
    }
    // SAFETY: the value is copied at once. Only an exec of the parent during its fork could tear it.
    let space = unsafe { PROCESSES.get(parent) }.copied();
    // The parent's entry may be that of the program before an exec, so its identity is compared. An entry
    // that was made before the parent was ever sampled has no identity (0).
    if let Some(space) = space.filter(|space| space.mm == parent_mm || space.mm == 0)
        && PROCESSES.insert(child, child_of(space, mm), 0).is_err()
    {
        counting::one(Counter::ProcessMapFull);
    }
    if filter::active() && TARGETS.get_ptr(parent).is_some() && TARGETS.insert(child, 1, 0).is_err()
    {
        warn!(
            ctx,
            "more selected processes than the map holds: pid {} is not recorded", child
        );
    }
}

#[inline(always)]
fn child_of(parent: Space, mm: u64) -> Space {
    Space {
        mm,
        revision: StatusRevision::default(),
        ..parent
    }
}

/// Removes the entry of the address space that a process had before it executed another program.
#[inline(always)]
pub fn exec(task: Pointer) {
    // SAFETY: the argument is a task_struct; the offset comes from the kernel's own BTF. A failed read
    // yields 0 rather than `None`: the compiler could compare the value before it checks that there is one,
    // and the verifier rejects reading an uninitialized register.
    let mm = unsafe { field::<u64>(task, TASK_MM.load()) }.unwrap_or(0);
    let pid = task::pid();
    // SAFETY: the value is copied at once.
    let Some(space) = unsafe { PROCESSES.get(pid) }.copied() else {
        return;
    };
    // The agent may already have replaced the entry by that of the new program.
    if mm == space.mm {
        return;
    }
    backend::ended(pid, space.server);
    let _ = PROCESSES.remove(pid);
}

/// Removes everything about a process when its last thread exits, because its pid may then be reused.
#[inline(always)]
pub fn exit(task: Pointer) {
    // SAFETY: the argument is a task_struct; the offsets come from the kernel's own BTF.
    // The kernel decrements `live` before this tracepoint (kernel/exit.c, `do_exit`).
    let live: Option<i32> = unsafe {
        field::<Pointer>(task, TASK_SIGNAL.load())
            .and_then(|signal| field(signal, SIGNAL_LIVE.load()))
    };
    if live.unwrap_or(0) > 0 {
        return;
    }
    let pid = task::pid();
    // SAFETY: the value is copied at once.
    let server = unsafe { PROCESSES.get(pid) }.map_or(0, |space| space.server);
    backend::ended(pid, server);
    let _ = PROCESSES.remove(pid);
    if filter::active() {
        let _ = TARGETS.remove(pid);
    }
}
