//! Processes as they come and go, without a delay: a child's tables are its parent's from its first
//! instruction. An exec changes the address space, and the tables of the old one are then not used (see
//! `Space::mm`); the entry is removed as well, because the kernel gives the address of a freed `mm` to another
//! one, and because the children of the new program must not inherit the tables of the old one.

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

/// The child inherits the parent's tables, and its selection.
#[inline(always)]
pub fn fork(ctx: &RawTracePointContext, parent: Pointer, child: Pointer) {
    // SAFETY: both arguments are task_structs, and the offset comes from the kernel's own BTF.
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
    // SAFETY: the value is copied at once; a torn one would need the parent to exec while it forks.
    let space = unsafe { PROCESSES.get(parent) }.copied();
    // The parent's entry may be of the program that it ran before an exec; one that was made without
    // a sample has no identity to compare.
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

/// Forgets the address space that a process had before it ran another program.
#[inline(always)]
pub fn exec(task: Pointer) {
    // SAFETY: the argument is a task_struct; the offset comes from the kernel's own BTF.
    // A value for the failure as well: the compiler may compare before it looks whether there is one, and the
    // verifier refuses a register that nothing was written to.
    let mm = unsafe { field::<u64>(task, TASK_MM.load()) }.unwrap_or(0);
    let pid = task::pid();
    // SAFETY: the value is copied at once.
    let Some(space) = unsafe { PROCESSES.get(pid) }.copied() else {
        return;
    };
    // The agent may have been quick, and the entry is of the new program already.
    if mm == space.mm {
        return;
    }
    backend::ended(pid, space.server);
    let _ = PROCESSES.remove(pid);
}

/// Forgets a process when its last thread ends, so that its pid can be used again.
#[inline(always)]
pub fn exit(task: Pointer) {
    // SAFETY: the argument is a task_struct; the offsets come from the kernel's own BTF. `live` is
    // counted down before this tracepoint (kernel/exit.c, do_exit).
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
