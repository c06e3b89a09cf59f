//! Recent traces, the slow ones for longer.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::trace::{SpanId, SpanKind, Status, TraceId};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanProcessor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{TRACES, json, lock};

/// Traces kept: a storm of 20 rounds has 300 in each service, and about a megabyte.
const MAX_TRACES: usize = 512;

/// The newest of them are kept however fast they were, to be found right after a click.
const NEWEST: usize = 128;

/// After this long a slow trace is worth no more than any other: a storm of this morning should
/// not hide the one of now.
const SLOW_FOR: Duration = Duration::from_secs(15 * 60);

/// Spans of one trace. A request of the shop has about five; one that starts a storm may have more.
const MAX_SPANS: usize = 128;

/// Attributes of one span: the shop's have about twenty.
const MAX_ATTRIBUTES: usize = 64;

/// A trace in a list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Its id, in hexadecimal.
    pub trace_id: String,
    /// The name of the span that it begins with here.
    pub root: String,
    /// When that was, in milliseconds since 1970.
    pub start_unix_ms: u64,
    /// From the first start to the last end.
    pub duration_ms: f64,
    /// Whether any span failed.
    pub error: bool,
    /// How many spans it has.
    pub spans: usize,
}

/// A trace with its spans, earliest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// Its id, in hexadecimal.
    pub trace_id: String,
    /// What happened in it.
    pub spans: Vec<Span>,
}

/// A span for people to look at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// Its id, in hexadecimal.
    pub span_id: String,
    /// The span that it is a part of, perhaps another service's.
    pub parent_span_id: Option<String>,
    /// What was done.
    pub name: String,
    /// `server`, `client` or `internal`.
    pub kind: String,
    /// Who did it.
    pub service: String,
    /// When it began, in nanoseconds since 1970.
    pub start_unix_nano: u64,
    /// How long it took.
    pub duration_ms: f64,
    /// `unset`, `ok` or `error`.
    pub status: String,
    /// What is known of it.
    pub attributes: Map<String, Value>,
}

/// Puts every span that ends into the memory.
#[derive(Debug)]
pub(in crate::telemetry) struct RememberSpans {
    /// The service whose spans they are.
    pub(in crate::telemetry) service: &'static str,
}

impl SpanProcessor for RememberSpans {
    fn on_start(&self, _span: &mut opentelemetry_sdk::trace::Span, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        lock(&TRACES).add(span, self.service, SystemTime::now());
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// The traces that are remembered.
#[derive(Debug, Default)]
pub(super) struct Traces {
    traces: HashMap<TraceId, Entry>,
    /// How many have been seen: the number of the next one.
    seen: u64,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    added: SystemTime,
    start: SystemTime,
    end: SystemTime,
    error: bool,
    /// All of them, also those beyond [`MAX_SPANS`].
    count: usize,
    spans: Vec<Kept>,
}

#[derive(Debug)]
struct Kept {
    id: SpanId,
    parent: SpanId,
    /// The first one here: its parent is nobody, or in another service.
    is_root: bool,
    name: String,
    kind: SpanKind,
    service: &'static str,
    start: SystemTime,
    duration: Duration,
    status: &'static str,
    attributes: Vec<KeyValue>,
}

impl Traces {
    fn add(&mut self, span: SpanData, service: &'static str, now: SystemTime) {
        let id = span.span_context.trace_id();
        if !self.traces.contains_key(&id) && self.traces.len() >= MAX_TRACES {
            self.forget_one(now);
        }
        let number = self.seen;
        let entry = self.traces.entry(id).or_insert_with(|| {
            self.seen += 1;
            Entry {
                number,
                added: now,
                start: span.start_time,
                end: span.end_time,
                error: false,
                count: 0,
                spans: Vec::new(),
            }
        });
        entry.add(span, service);
    }

    /// Forgets the fastest of those that are not among the newest.
    fn forget_one(&mut self, now: SystemTime) {
        let newest = self.seen.saturating_sub(NEWEST as u64);
        let old = self.traces.iter().filter(|(_, e)| e.number < newest);
        let worth = |entry: &Entry| {
            let age = now.duration_since(entry.added).unwrap_or_default();
            let duration = if age > SLOW_FOR {
                Duration::ZERO
            } else {
                entry.duration()
            };
            (duration, entry.number)
        };
        if let Some(id) = old.min_by_key(|(_, e)| worth(e)).map(|(id, _)| *id) {
            self.traces.remove(&id);
        }
    }

    pub(super) fn slowest(&self, limit: usize) -> Vec<Summary> {
        let mut all: Vec<_> = self.traces.iter().collect();
        all.sort_unstable_by_key(|(_, e)| std::cmp::Reverse((e.duration(), e.number)));
        all.truncate(limit);
        all.into_iter()
            .map(|(id, entry)| entry.summary(*id))
            .collect()
    }

    pub(super) fn trace(&self, id: TraceId) -> Option<Trace> {
        let entry = self.traces.get(&id)?;
        let mut spans: Vec<_> = entry.spans.iter().map(Kept::span).collect();
        spans.sort_by_key(|span| span.start_unix_nano);
        Some(Trace {
            trace_id: id.to_string(),
            spans,
        })
    }
}

impl Entry {
    fn add(&mut self, span: SpanData, service: &'static str) {
        self.start = self.start.min(span.start_time);
        self.end = self.end.max(span.end_time);
        self.error |= matches!(span.status, Status::Error { .. });
        self.count += 1;
        if self.spans.len() < MAX_SPANS {
            self.spans.push(Kept::of(span, service));
        }
    }

    fn duration(&self) -> Duration {
        self.end.duration_since(self.start).unwrap_or_default()
    }

    fn summary(&self, id: TraceId) -> Summary {
        let root = self.spans.iter().filter(|span| span.is_root);
        let root = root.min_by_key(|span| span.start).or(self.spans.first());
        Summary {
            trace_id: id.to_string(),
            root: root.map_or_else(String::new, |root| root.name.clone()),
            start_unix_ms: nanoseconds(self.start) / 1_000_000,
            duration_ms: milliseconds(self.duration()),
            error: self.error,
            spans: self.count,
        }
    }
}

impl Kept {
    fn of(span: SpanData, service: &'static str) -> Self {
        let mut attributes = span.attributes;
        attributes.truncate(MAX_ATTRIBUTES);
        Self {
            id: span.span_context.span_id(),
            parent: span.parent_span_id,
            is_root: span.parent_span_id == SpanId::INVALID || span.parent_span_is_remote,
            name: span.name.into_owned(),
            kind: span.span_kind,
            service,
            start: span.start_time,
            duration: span
                .end_time
                .duration_since(span.start_time)
                .unwrap_or_default(),
            status: match span.status {
                Status::Unset => "unset",
                Status::Ok => "ok",
                Status::Error { .. } => "error",
            },
            attributes,
        }
    }

    fn span(&self) -> Span {
        let attributes = self.attributes.iter();
        Span {
            span_id: self.id.to_string(),
            parent_span_id: (self.parent != SpanId::INVALID).then(|| self.parent.to_string()),
            name: self.name.clone(),
            kind: kind(&self.kind).to_owned(),
            service: self.service.to_owned(),
            start_unix_nano: nanoseconds(self.start),
            duration_ms: milliseconds(self.duration),
            status: self.status.to_owned(),
            attributes: attributes
                .map(|pair| (pair.key.to_string(), json(&pair.value)))
                .collect(),
        }
    }
}

fn kind(kind: &SpanKind) -> &'static str {
    match kind {
        SpanKind::Client => "client",
        SpanKind::Server => "server",
        SpanKind::Producer => "producer",
        SpanKind::Consumer => "consumer",
        SpanKind::Internal => "internal",
    }
}

fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The lists of several services as one, slowest first: a trace that several took part in begins
/// with the earliest of them.
pub fn merge_summaries(
    lists: impl IntoIterator<Item = Vec<Summary>>,
    limit: usize,
) -> Vec<Summary> {
    let mut merged: HashMap<String, Summary> = HashMap::new();
    for part in lists.into_iter().flatten() {
        match merged.get_mut(&part.trace_id) {
            None => {
                merged.insert(part.trace_id.clone(), part);
            }
            Some(known) => known.join(part),
        }
    }
    let mut all: Vec<_> = merged.into_values().collect();
    all.sort_by(|a, b| {
        b.duration_ms
            .total_cmp(&a.duration_ms)
            .then_with(|| a.trace_id.cmp(&b.trace_id))
    });
    all.truncate(limit);
    all
}

impl Summary {
    fn join(&mut self, part: Self) {
        // The one who called waited for the one who was called.
        if part.duration_ms > self.duration_ms {
            self.root = part.root;
            self.duration_ms = part.duration_ms;
        }
        self.start_unix_ms = self.start_unix_ms.min(part.start_unix_ms);
        self.error |= part.error;
        self.spans += part.spans;
    }
}

/// The parts of one trace as one; `None` when nobody knows it.
pub fn merge_traces(parts: impl IntoIterator<Item = Trace>) -> Option<Trace> {
    let mut whole = parts.into_iter().reduce(|mut whole, part| {
        whole.spans.extend(part.spans);
        whole
    })?;
    whole.spans.sort_by_key(|span| span.start_unix_nano);
    Some(whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::InstrumentationScope;
    use opentelemetry::trace::{SpanContext, TraceFlags, TraceState};
    use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};

    /// A span `span` of trace `trace`, under `parent`, from `start` on for `duration` milliseconds.
    fn span(trace: u128, span: u64, parent: u64, start: u64, duration: u64) -> SpanData {
        let ids = SpanContext::new(
            TraceId::from(trace),
            SpanId::from(span),
            TraceFlags::SAMPLED,
            false,
            TraceState::NONE,
        );
        let start_time = UNIX_EPOCH + Duration::from_millis(start);
        SpanData {
            span_context: ids,
            parent_span_id: SpanId::from(parent),
            parent_span_is_remote: false,
            span_kind: SpanKind::Server,
            name: format!("span {span}").into(),
            start_time,
            end_time: start_time + Duration::from_millis(duration),
            attributes: vec![
                KeyValue::new("n", 7),
                KeyValue::new("text", "a".repeat(5000)),
            ],
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::default(),
        }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// A trace is named after the span that nobody here is the parent of, whichever ends first.
    #[test]
    fn a_trace_is_put_together() {
        let mut traces = Traces::default();
        let mut failed = span(1, 3, 2, 120, 30);
        failed.status = Status::error("");
        traces.add(failed, "shop", at(1));
        traces.add(span(1, 2, 0, 100, 60), "shop", at(1));
        let all = traces.slowest(10);
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].root, "span 2");
        assert_eq!((all[0].start_unix_ms, all[0].spans), (100, 2));
        assert!((all[0].duration_ms - 60.0).abs() < 1e-6);
        assert!(all[0].error);

        let trace = traces.trace(TraceId::from(1)).unwrap();
        let ids: Vec<_> = trace.spans.iter().map(|span| &*span.span_id).collect();
        assert_eq!(ids, ["0000000000000002", "0000000000000003"]);
        assert_eq!(trace.spans[0].parent_span_id, None);
        assert_eq!(trace.spans[1].parent_span_id.as_deref(), Some(ids[0]));
        assert_eq!(trace.spans[1].status, "error");
        assert_eq!(trace.spans[0].attributes["n"], 7);
        let text = trace.spans[0].attributes["text"].as_str().unwrap();
        assert_eq!(text.len(), super::super::MAX_VALUE);
        assert_eq!(traces.trace(TraceId::from(2)), None);
    }

    /// Thousands of fast traces do not push out the slow ones of a storm; the newest are there as
    /// well, and there are never more than the bound.
    #[test]
    fn slow_traces_outlive_fast_ones() {
        let mut traces = Traces::default();
        for storm in 1..=300 {
            traces.add(span(storm, 1, 0, 0, 2500), "shop", at(10));
        }
        for fast in 1000..9000 {
            traces.add(span(fast, 1, 0, 0, 2), "shop", at(20));
        }
        assert_eq!(traces.traces.len(), MAX_TRACES);
        let slowest = traces.slowest(300);
        assert!(slowest.iter().all(|trace| trace.duration_ms > 2000.0));
        for newest in 9000 - NEWEST as u128..9000 {
            assert!(traces.trace(TraceId::from(newest)).is_some(), "{newest}");
        }
    }

    /// What was slow long ago makes room for what is slow now.
    #[test]
    fn an_old_storm_is_forgotten() {
        let mut traces = Traces::default();
        let full = MAX_TRACES as u128;
        for old in 1..=full {
            traces.add(span(old, 1, 0, 0, 9000), "shop", at(0));
        }
        let later = at(SLOW_FOR.as_secs() + 1);
        for new in 1..=full {
            traces.add(span(full + new, 1, 0, 0, 100), "shop", later);
        }
        assert_eq!(traces.traces.len(), MAX_TRACES);
        let slowest = traces.slowest(MAX_TRACES);
        let left = slowest.iter().filter(|trace| trace.duration_ms > 8000.0);
        assert_eq!(left.count(), 0);
    }

    /// A trace of very many spans is counted whole and kept in part.
    #[test]
    fn a_long_trace_is_bounded() {
        let mut traces = Traces::default();
        for id in 1..=1000 {
            traces.add(span(1, id, 0, id, 1), "shop", at(1));
        }
        assert_eq!(traces.slowest(1)[0].spans, 1000);
        assert_eq!(
            traces.trace(TraceId::from(1)).unwrap().spans.len(),
            MAX_SPANS
        );
    }

    /// What several services tell of a trace becomes one, named by the one that took longest.
    #[test]
    fn parts_are_merged() {
        let summary = |id: &str, root: &str, duration_ms, error| Summary {
            trace_id: id.to_owned(),
            root: root.to_owned(),
            start_unix_ms: 5,
            duration_ms,
            error,
            spans: 2,
        };
        let services = [
            vec![
                summary("a", "GET /x", 10.0, true),
                summary("b", "GET /y", 20.0, false),
            ],
            vec![summary("a", "GET /api/x", 12.0, false)],
        ];
        let merged = merge_summaries(services.clone(), 10);
        let told: Vec<_> = merged
            .iter()
            .map(|trace| (&*trace.root, trace.spans, trace.error))
            .collect();
        assert_eq!(told, [("GET /y", 2, false), ("GET /api/x", 4, true)]);
        assert_eq!(merge_summaries(services, 1).len(), 1);
    }
}
