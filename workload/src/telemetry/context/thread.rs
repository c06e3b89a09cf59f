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

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::context::FutureExt;
    use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    fn in_trace(id: u128) -> Context {
        let span = SpanContext::new(
            TraceId::from(id),
            SpanId::from(7),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        );
        Context::new().with_remote_span_context(span)
    }

    /// The trace that this thread publishes, read from the record as a profiler does.
    fn published() -> Option<[u8; 16]> {
        let context = SharedThreadContext::detach()?;
        let record: Arc<ThreadContext> = context.clone().into();
        // SAFETY: by OTEP 4947 a record begins with the 16 bytes of the trace's id; the crate
        // asserts that, and this reference keeps the record.
        let id = unsafe { *Arc::as_ptr(&record).cast::<[u8; 16]>() };
        let before = context.attach();
        assert!(before.is_none());
        Some(id)
    }

    /// A context inside another is left for the outer one, and the last leaves nothing behind.
    #[test]
    fn contexts_nest() {
        publish();
        assert_eq!(published(), None);
        {
            let _outer = in_trace(1).attach();
            assert_eq!(published(), Some(1_u128.to_be_bytes()));
            {
                let _inner = in_trace(2).attach();
                assert_eq!(published(), Some(2_u128.to_be_bytes()));
                let _none = Context::new().attach();
                assert_eq!(published(), None);
            }
            assert_eq!(published(), Some(1_u128.to_be_bytes()));
        }
        assert_eq!(published(), None);
    }

    /// Tasks that share threads and move between them publish their own trace after every wait,
    /// and a thread that is between two tasks, or ends, publishes none.
    #[test]
    fn a_task_takes_its_context_along() {
        publish();
        static SEEN: AtomicUsize = AtomicUsize::new(0);
        static LEFT: AtomicUsize = AtomicUsize::new(0);
        let look = || {
            SEEN.fetch_add(1, Relaxed);
            LEFT.fetch_add(usize::from(published().is_some()), Relaxed);
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .on_thread_park(look)
            .on_thread_stop(look)
            .build()
            .unwrap();
        let tasks = (1..=8_u128).map(|id| {
            let work = async move {
                for _ in 0..100 {
                    assert_eq!(published(), Some(id.to_be_bytes()));
                    tokio::task::yield_now().await;
                }
            };
            runtime.spawn(work.with_context(in_trace(id)))
        });
        let tasks: Vec<_> = tasks.collect();
        runtime.block_on(async {
            for task in tasks {
                task.await.unwrap();
            }
        });
        drop(runtime);
        assert!(SEEN.load(Relaxed) >= 2, "two threads have ended");
        assert_eq!(LEFT.load(Relaxed), 0);
    }
}
