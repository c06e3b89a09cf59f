//! The trace context that an instrumented thread publishes (OTEP 4947): a thread-local variable of a known
//! name points to a record.

use core::ffi::c_void;

use agent_ebpf::sample::TraceContext;
use aya_ebpf::helpers::{bpf_get_current_task, bpf_probe_read_user};

use crate::{lifecycle::field, maps::TASK_FSBASE};

/// Start of the record.
#[repr(C)]
struct Record {
    trace: [u8; 16],
    span: [u8; 8],
    /// 1 when the ids may be used.
    valid: u8,
    flags: u8,
    attributes_size: u16,
}

/// The ids that the current thread publishes, or zeros. `offset`: see
/// [`agent_ebpf::table::Space::trace_offset`].
#[inline(always)]
pub fn of_current_thread(offset: i32) -> TraceContext {
    read(offset).unwrap_or_default()
}

#[inline(always)]
fn read(offset: i32) -> Option<TraceContext> {
    if offset == 0 {
        return None;
    }
    // SAFETY: the current task; user addresses are checked by the helper.
    let record: Record = unsafe {
        let thread: u64 = field(bpf_get_current_task() as *const c_void, TASK_FSBASE.load())?;
        let variable = thread.wrapping_add_signed(i64::from(offset));
        let record = bpf_probe_read_user(variable as *const u64).ok()?;
        if record == 0 {
            return None;
        }
        bpf_probe_read_user(record as *const Record).ok()?
    };
    (record.valid == 1).then_some(TraceContext {
        trace: record.trace,
        span: record.span,
    })
}
