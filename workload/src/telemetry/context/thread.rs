//! The thread context of OTEP 4947: the thread-local variable `otel_thread_ctx_v1` points to the
//! ids of the span that the thread works for.
//!
//! A request's future takes its context along from poll to poll, on whatever thread; each poll
//! enters and leaves it, and this observer is told. So a thread has no context between two polls,
//! and none when it ends.

use std::any::Any;
use std::sync::Arc;

use libdd_otel_thread_ctx::linux::{SharedThreadContext, ThreadContext};
use opentelemetry::Context;
use opentelemetry::context::{ContextObserver, GlobalContextObserver, ObserverContextView};
use opentelemetry::trace::TraceContextExt;

/// The record has room for the span that the process began with; nothing here knows it.
const NO_ROOT: [u8; 8] = [0; 8];

/// From now on threads publish the span that they work for.
pub(in crate::telemetry) fn publish() {
    GlobalContextObserver::set(Arc::new(Publisher));
}

struct Publisher;

/// A context's record, made once and shared by all threads that work in it.
struct Record(Arc<ThreadContext>);

impl ObserverContextView for Record {
    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl ContextObserver for Publisher {
    fn on_context_enter(&self, _from: &Context, to: &Context) {
        switch(to);
    }

    fn on_context_exit(&self, _from: &Context, to: &Context) {
        switch(to);
    }

    fn make_view(&self, context: &Context) -> Option<Arc<dyn ObserverContextView>> {
        let span = context.span();
        let span = span.span_context();
        span.is_valid().then(|| {
            let record = ThreadContext::new(
                span.trace_id().to_bytes(),
                span.span_id().to_bytes(),
                span.trace_flags().to_u8(),
                NO_ROOT,
                &[],
            );
            Arc::new(Record(Arc::new(record))) as Arc<dyn ObserverContextView>
        })
    }
}

/// Makes this thread publish `context`, or nothing when that has no span. What was published
/// before is dropped here.
fn switch(context: &Context) {
    let view = context.observer_view().as_ref();
    let record = view.and_then(|view| view.as_any().downcast_ref::<Record>());
    let _before = match record {
        Some(Record(record)) => SharedThreadContext::from(Arc::clone(record)).attach(),
        None => SharedThreadContext::detach(),
    };
}
