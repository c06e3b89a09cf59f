//! What a service remembers of its own recent spans and log lines, so that a storm's slowest
//! request can be looked at where no backend is.
//!
//! Bounded, and not fair on purpose: slow traces and warnings outlive the many that are neither.

mod logs;
mod routes;
mod spans;

use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use opentelemetry::Value;
use opentelemetry::trace::TraceId;

pub use logs::{Line, merge_lines};
pub use routes::{LogQuery, TraceQuery, router, trace_id};
pub use spans::{Span, Summary, Trace, merge_summaries, merge_traces};

pub(super) use logs::RememberLogs;
pub(super) use spans::RememberSpans;

use logs::Lines;
use spans::Traces;

/// One of each in a process, like the providers that fill it.
static TRACES: LazyLock<Mutex<Traces>> = LazyLock::new(Mutex::default);
static LINES: LazyLock<Mutex<Lines>> = LazyLock::new(Mutex::default);

/// The slowest traces that are remembered, slowest first.
pub fn slowest(limit: usize) -> Vec<Summary> {
    lock(&TRACES).slowest(limit)
}

/// A trace, as far as this process took part in it.
pub fn trace(id: TraceId) -> Option<Trace> {
    lock(&TRACES).trace(id)
}

/// The newest log lines that `query` asks for, oldest first.
pub fn lines(query: &LogQuery) -> Vec<Line> {
    lock(&LINES).newest(query)
}

/// What somebody left behind in a panic is still a memory.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The most bytes of one value: the longest text of a query fits.
const MAX_VALUE: usize = 1024;

/// A value as JSON.
fn json(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(value) => (*value).into(),
        Value::I64(value) => (*value).into(),
        Value::F64(value) => (*value).into(),
        other => cut(&other.as_str()).into(),
    }
}

/// At most [`MAX_VALUE`] bytes of `text`.
fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_VALUE)]
}
