//! Reads the trace context that an instrumented thread publishes (OTEP 4947): the thread-local variable
//! `otel_thread_ctx_v1` points to a record with the ids of the trace and the span.

use core::ffi::c_void;

use agent_ebpf::sample::TraceContext;
use aya_ebpf::helpers::{bpf_probe_read_user, generated};

use crate::{arch, words};

/// Offset of the record's validity byte. The record begins with the ids; they may be used when this byte is
/// 1.
const VALID: u64 = size_of::<TraceContext>() as u64;

/// Stores the ids that the current thread publishes, or zeros if it publishes none. `offset`: see
/// [`agent_ebpf::table::Space::trace_offset`].
#[inline(always)]
pub fn of_current_thread(offset: i32, to: &mut TraceContext) {
    if offset == 0 || read(offset, to).is_none() {
        words::clear(to);
    }
}

#[inline(always)]
fn read(offset: i32, to: &mut TraceContext) -> Option<()> {
    // SAFETY: the helpers check user addresses, and each destination has the size that is read.
    unsafe {
        let thread = arch::thread_pointer()?;
        let variable = thread.wrapping_add_signed(i64::from(offset));
        let record = bpf_probe_read_user(variable as *const u64).ok()?;
        if record == 0 || bpf_probe_read_user((record + VALID) as *const u8) != Ok(1) {
            return None;
        }
        let failed = generated::bpf_probe_read_user(
            core::ptr::from_mut(to).cast(),
            size_of::<TraceContext>() as u32,
            record as *const c_void,
        );
        (failed == 0).then_some(())
    }
}
