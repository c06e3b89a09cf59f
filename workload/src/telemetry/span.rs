//! Spans of the services' own work.

use opentelemetry::context::FutureExt;
use opentelemetry::trace::{Link, SpanKind, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue};

use super::SCOPE;

/// Runs `work` in a trace of its own, named `name`, that is linked to the one it is started from;
/// gives the trace's id, in hexadecimal, and what `work` gave.
///
/// For work that is one of many, such as a query of a storm: in the trace of whoever asked for all
/// of them nobody would find the slowest.
pub async fn apart<T>(
    name: &'static str,
    attributes: Vec<KeyValue>,
    work: impl Future<Output = T>,
) -> (String, T) {
    let asked = Context::current().span().span_context().clone();
    let tracer = opentelemetry::global::tracer(SCOPE);
    let mut builder = tracer
        .span_builder(name)
        .with_kind(SpanKind::Internal)
        .with_attributes(attributes);
    if asked.is_valid() {
        builder = builder.with_links(vec![Link::with_context(asked)]);
    }
    let span = builder.start_with_context(&tracer, &Context::new());
    let context = Context::new().with_span(span);
    let id = context.span().span_context().trace_id().to_string();
    let result = work.with_context(context).await;
    (id, result)
}
