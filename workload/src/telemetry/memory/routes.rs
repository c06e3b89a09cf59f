//! `GET /debug/traces`, `/debug/traces/{trace_id}` and `/debug/logs`: the memory over HTTP.

use axum::extract::{Path, Query};
use axum::http::Uri;
use axum::routing::get;
use axum::{Json, Router};
use opentelemetry::logs::Severity;
use opentelemetry::trace::TraceId;
use serde::Deserialize;

use super::{Line, Summary, Trace};
use crate::problem::Problem;

/// Traces in a list: more than a page shows.
const MAX_TRACES: usize = 500;
const DEFAULT_TRACES: usize = 20;

/// Lines in a list: all there are.
const MAX_LINES: usize = 2048;
const DEFAULT_LINES: usize = 100;

/// The routes; they need no state.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/debug/traces", get(traces))
        .route("/debug/traces/{trace_id}", get(trace))
        .route("/debug/logs", get(logs))
}

/// Which traces are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceQuery {
    /// At most this many.
    pub limit: usize,
}

/// Which log lines are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogQuery {
    /// Those of this trace.
    pub trace: Option<TraceId>,
    /// Those of this level and above.
    pub level: tracing::Level,
    /// The newest so many.
    pub limit: usize,
}

#[derive(Debug, Deserialize)]
struct RawTraceQuery {
    limit: Option<usize>,
}

#[derive(Debug, Deserialize)]
struct RawLogQuery {
    trace_id: Option<String>,
    level: Option<String>,
    limit: Option<usize>,
}

impl TraceQuery {
    /// Reads `?limit=N`.
    pub fn of(uri: &Uri) -> Result<Self, Problem> {
        let raw: RawTraceQuery = parse(uri)?;
        let limit = limit(raw.limit, DEFAULT_TRACES, MAX_TRACES)?;
        Ok(Self { limit })
    }
}

impl LogQuery {
    /// Reads `?trace_id=…&level=warn&limit=N`, each of them optional.
    pub fn of(uri: &Uri) -> Result<Self, Problem> {
        let raw: RawLogQuery = parse(uri)?;
        let trace = raw.trace_id.filter(|id| !id.is_empty());
        let level = raw.level.filter(|level| !level.is_empty());
        let level = level.as_deref().unwrap_or("trace");
        Ok(Self {
            trace: trace.as_deref().map(trace_id).transpose()?,
            level: level.parse().map_err(|_| {
                let detail = "level is one of trace, debug, info, warn and error";
                Problem::bad_request("bad_level", detail)
            })?,
            limit: limit(raw.limit, DEFAULT_LINES, MAX_LINES)?,
        })
    }

    pub(super) fn severity(&self) -> Severity {
        match self.level {
            tracing::Level::TRACE => Severity::Trace,
            tracing::Level::DEBUG => Severity::Debug,
            tracing::Level::INFO => Severity::Info,
            tracing::Level::WARN => Severity::Warn,
            tracing::Level::ERROR => Severity::Error,
        }
    }
}

fn parse<T: serde::de::DeserializeOwned>(uri: &Uri) -> Result<T, Problem> {
    let Query(raw) = Query::try_from_uri(uri)
        .map_err(|error| Problem::bad_request("bad_query", error.body_text()))?;
    Ok(raw)
}

fn limit(asked: Option<usize>, default: usize, most: usize) -> Result<usize, Problem> {
    let limit = asked.unwrap_or(default);
    if (1..=most).contains(&limit) {
        return Ok(limit);
    }
    let detail = format!("limit must lie between 1 and {most}");
    Err(Problem::bad_request("limit_out_of_range", detail))
}

/// A trace's id as it was typed.
pub fn trace_id(text: &str) -> Result<TraceId, Problem> {
    let id = TraceId::from_hex(text).ok().filter(|_| text.len() == 32);
    id.ok_or_else(|| {
        let detail = "a trace's id has 32 hexadecimal digits";
        Problem::bad_request("bad_trace_id", detail)
    })
}

async fn traces(uri: Uri) -> Result<Json<Vec<Summary>>, Problem> {
    let query = TraceQuery::of(&uri)?;
    Ok(Json(super::slowest(query.limit)))
}

async fn trace(Path(id): Path<String>) -> Result<Json<Trace>, Problem> {
    let trace = super::trace(trace_id(&id)?);
    trace.map(Json).ok_or_else(|| {
        let detail = format!("trace {id} is not remembered here");
        Problem::not_found("no_such_trace", detail)
    })
}

async fn logs(uri: Uri) -> Result<Json<Vec<Line>>, Problem> {
    Ok(Json(super::lines(&LogQuery::of(&uri)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(text: &str) -> Result<LogQuery, &'static str> {
        let uri = format!("http://shop/debug/logs?{text}").parse().unwrap();
        LogQuery::of(&uri).map_err(|problem| problem.code)
    }

    /// What a person may type is understood, or answered with what is wrong.
    #[test]
    fn queries_are_checked() {
        let all = query("").unwrap();
        assert_eq!((all.trace, all.level), (None, tracing::Level::TRACE));
        let id = "0af7651916cd43dd8448eb211c80319c";
        let one = query(&format!("trace_id={id}&level=WARN&limit=7")).unwrap();
        assert_eq!(one.trace.unwrap().to_string(), id);
        assert_eq!((one.level, one.limit), (tracing::Level::WARN, 7));
        assert_eq!(query("trace_id=&level=").unwrap(), all);
        assert_eq!(query("trace_id=1"), Err("bad_trace_id"));
        assert_eq!(query("trace_id=zz"), Err("bad_trace_id"));
        assert_eq!(query("level=loud"), Err("bad_level"));
        assert_eq!(query("limit=0"), Err("limit_out_of_range"));
        assert_eq!(query("limit=x"), Err("bad_query"));
    }
}
