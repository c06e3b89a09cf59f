//! Recent log lines, the warnings apart from the many others.

use std::collections::VecDeque;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::InstrumentationScope;
use opentelemetry::logs::{AnyValue, Severity};
use opentelemetry::trace::{SpanId, TraceId};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{LogProcessor, SdkLogRecord};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::routes::LogQuery;
use super::{LINES, cut, lock};

/// Lines kept of each of two kinds, below a warning and from it on: every failure of a storm of 20
/// rounds, and less than a megabyte.
const MAX_LINES: usize = 1024;

/// Fields of one line: the shop's have fewer than ten.
const MAX_FIELDS: usize = 32;

/// A log line with its fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// When, in nanoseconds since 1970.
    pub time_unix_nano: u64,
    /// `TRACE`, `DEBUG`, `INFO`, `WARN` or `ERROR`.
    pub level: String,
    /// Who said it.
    pub service: String,
    /// What it says.
    pub message: String,
    /// The trace that it belongs to, in hexadecimal.
    pub trace_id: Option<String>,
    /// The span within it.
    pub span_id: Option<String>,
    /// What it says for programs.
    pub fields: Map<String, Value>,
}

/// Puts every log record into the memory.
#[derive(Debug)]
pub(in crate::telemetry) struct RememberLogs {
    /// The service that writes them.
    pub(in crate::telemetry) service: &'static str,
}

impl LogProcessor for RememberLogs {
    fn emit(&self, record: &mut SdkLogRecord, _scope: &InstrumentationScope) {
        let kept = Kept::of(record, self.service);
        lock(&LINES).add(kept);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// The lines that are remembered.
#[derive(Debug, Default)]
pub(super) struct Lines {
    quiet: VecDeque<Kept>,
    loud: VecDeque<Kept>,
}

#[derive(Debug, Clone)]
struct Kept {
    time: SystemTime,
    severity: Severity,
    service: &'static str,
    message: String,
    trace: Option<(TraceId, SpanId)>,
    fields: Vec<(String, Value)>,
}

impl Lines {
    fn add(&mut self, line: Kept) {
        let ring = if line.severity >= Severity::Warn {
            &mut self.loud
        } else {
            &mut self.quiet
        };
        if ring.len() >= MAX_LINES {
            ring.pop_front();
        }
        ring.push_back(line);
    }

    pub(super) fn newest(&self, query: &LogQuery) -> Vec<Line> {
        let least = query.severity();
        let all = self.quiet.iter().chain(&self.loud);
        let mut found: Vec<_> = all
            .filter(|line| line.severity >= least)
            .filter(|line| query.trace.is_none_or(|id| line.is_of(id)))
            .collect();
        found.sort_by_key(|line| line.time);
        let first = found.len().saturating_sub(query.limit);
        found[first..].iter().map(|line| line.line()).collect()
    }
}

impl Kept {
    fn of(record: &SdkLogRecord, service: &'static str) -> Self {
        let time = record.timestamp().or(record.observed_timestamp());
        let fields = record.attributes_iter().take(MAX_FIELDS);
        Self {
            time: time.unwrap_or(UNIX_EPOCH),
            severity: record.severity_number().unwrap_or(Severity::Info),
            service,
            message: record.body().map(text).unwrap_or_default(),
            trace: record
                .trace_context()
                .map(|trace| (trace.trace_id, trace.span_id)),
            fields: fields
                .map(|(key, value)| (key.to_string(), json(value)))
                .collect(),
        }
    }

    fn is_of(&self, id: TraceId) -> bool {
        self.trace.is_some_and(|(trace, _)| trace == id)
    }

    fn line(&self) -> Line {
        let since = self.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Line {
            time_unix_nano: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
            level: self.severity.name().to_owned(),
            service: self.service.to_owned(),
            message: self.message.clone(),
            trace_id: self.trace.map(|(trace, _)| trace.to_string()),
            span_id: self.trace.map(|(_, span)| span.to_string()),
            fields: self.fields.iter().cloned().collect(),
        }
    }
}

fn text(value: &AnyValue) -> String {
    match value {
        AnyValue::String(text) => cut(text.as_str()).to_owned(),
        other => json(other).to_string(),
    }
}

/// The bridge from tracing makes these; what else there is, is shown as it is written.
fn json(value: &AnyValue) -> Value {
    match value {
        AnyValue::Int(value) => (*value).into(),
        AnyValue::Double(value) => (*value).into(),
        AnyValue::Boolean(value) => (*value).into(),
        AnyValue::String(text) => cut(text.as_str()).into(),
        other => cut(&format!("{other:?}")).into(),
    }
}

/// The newest lines of several services, oldest first.
pub fn merge_lines(lists: impl IntoIterator<Item = Vec<Line>>, limit: usize) -> Vec<Line> {
    let mut all: Vec<_> = lists.into_iter().flatten().collect();
    all.sort_by_key(|line| line.time_unix_nano);
    let first = all.len().saturating_sub(limit);
    all.split_off(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(severity: Severity, number: u64, trace: u128) -> Kept {
        Kept {
            time: UNIX_EPOCH + Duration::from_secs(number),
            severity,
            service: "shop",
            message: format!("line {number}"),
            trace: Some((TraceId::from(trace), SpanId::from(1))),
            fields: vec![("n".to_owned(), number.into())],
        }
    }

    fn query(level: tracing::Level, limit: usize) -> LogQuery {
        LogQuery {
            trace: None,
            level,
            limit,
        }
    }

    /// Any number of lines that say that all is well leave the warnings where they are.
    #[test]
    fn warnings_outlive_chatter() {
        let mut lines = Lines::default();
        lines.add(line(Severity::Error, 1, 1));
        lines.add(line(Severity::Warn, 2, 2));
        for number in 3..5000 {
            lines.add(line(Severity::Info, number, 3));
        }
        assert_eq!(lines.quiet.len(), MAX_LINES);
        let all = lines.newest(&query(tracing::Level::TRACE, 5000));
        assert_eq!(all.len(), MAX_LINES + 2);
        assert_eq!(all[0].level, "ERROR");
        let loud = lines.newest(&query(tracing::Level::WARN, 5000));
        let messages: Vec<_> = loud.iter().map(|line| &*line.message).collect();
        assert_eq!(messages, ["line 1", "line 2"]);
        assert_eq!(loud[0].fields["n"], 1);
    }

    /// The newest are given, oldest first, and those of one trace alone when that is asked for.
    #[test]
    fn lines_are_asked_for() {
        let mut lines = Lines::default();
        for number in 1..=10 {
            lines.add(line(Severity::Info, number, u128::from(number % 2)));
        }
        let newest = lines.newest(&query(tracing::Level::INFO, 2));
        let messages: Vec<_> = newest.iter().map(|line| &*line.message).collect();
        assert_eq!(messages, ["line 9", "line 10"]);
        let odd = LogQuery {
            trace: Some(TraceId::from(1)),
            ..query(tracing::Level::INFO, 100)
        };
        assert_eq!(lines.newest(&odd).len(), 5);
        assert!(lines.newest(&query(tracing::Level::WARN, 9)).is_empty());
    }
}
