//! What all remember of a request: traces and logs of the gateway and of each service, merged.

use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::Uri;
use axum::routing::get;
use axum::{Json, Router};
use serde::de::DeserializeOwned;

use super::{Gateway, Upstream};
use crate::problem::Problem;
use crate::telemetry::memory::{
    self, Line, LogQuery, Summary, Trace, TraceQuery, merge_lines, merge_summaries, merge_traces,
};

/// A service that does not answer in this time is left out: what the others know is shown.
const PATIENCE: Duration = Duration::from_secs(3);

pub fn router() -> Router<Gateway> {
    Router::new()
        .route("/api/traces", get(traces))
        .route("/api/traces/{trace_id}", get(trace))
        .route("/api/logs", get(logs))
}

async fn traces(State(gateway): State<Gateway>, uri: Uri) -> Result<Json<Vec<Summary>>, Problem> {
    let query = TraceQuery::of(&uri)?;
    let path = format!("/debug/traces?limit={}", query.limit);
    let mut lists = everywhere(&gateway, "/debug/traces", &path).await;
    lists.push(memory::slowest(query.limit));
    Ok(Json(merge_summaries(lists, query.limit)))
}

async fn trace(
    State(gateway): State<Gateway>,
    Path(id): Path<String>,
) -> Result<Json<Trace>, Problem> {
    let trace = memory::trace_id(&id)?;
    let path = format!("/debug/traces/{trace}");
    let mut parts = everywhere(&gateway, "/debug/traces/{trace_id}", &path).await;
    parts.extend(memory::trace(trace));
    merge_traces(parts).map(Json).ok_or_else(|| {
        let detail = format!("nobody remembers trace {trace}");
        Problem::not_found("no_such_trace", detail)
    })
}

async fn logs(State(gateway): State<Gateway>, uri: Uri) -> Result<Json<Vec<Line>>, Problem> {
    let query = LogQuery::of(&uri)?;
    let path = match uri.query() {
        Some(query) => format!("/debug/logs?{query}"),
        None => "/debug/logs".to_owned(),
    };
    let mut lists = everywhere(&gateway, "/debug/logs", &path).await;
    lists.push(memory::lines(&query));
    Ok(Json(merge_lines(lists, query.limit)))
}

/// What each service that answers knows.
async fn everywhere<T: DeserializeOwned>(
    gateway: &Gateway,
    template: &'static str,
    path: &str,
) -> Vec<T> {
    let ask = |upstream: &Upstream| {
        let upstream = upstream.clone();
        async move { upstream.get(template, path, PATIENCE).await.ok() }
    };
    let [product, order, inventory] = gateway.upstreams().map(ask);
    let (product, order, inventory) = tokio::join!(product, order, inventory);
    [product, order, inventory].into_iter().flatten().collect()
}
