//! The storm's queries as they are sent, and those before it.

use std::time::{Duration, Instant};

use axum::http::Method;
use opentelemetry::KeyValue;
use serde::Deserialize;
use tokio::task::JoinSet;

use super::Services;
use super::plan::{self, Ask};
use super::report::{self, Asked, COMPLETED};
use crate::services::upstream::{Answer, TIMEOUT, Upstream};
use crate::telemetry::span;

/// Visitors of the background who come at the same time.
const VISITORS: usize = 3;

/// What each of them asks: together enough for a 95th percentile, and over in a second.
const REQUESTS_OF_A_VISITOR: usize = 60;

/// A shop that needs longer for either is slow already; what was answered until then counts.
const LIMIT: Duration = Duration::from_secs(4);

/// The query alone is asked so often, and the median taken.
const SINGLE_QUERIES: usize = 3;

/// A cause of a failure longer than this is no code of ours.
const MAX_CODE: usize = 64;

/// How the shop was before a storm.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Before {
    pub baseline_p95_ms: Option<f64>,
    pub single_query_ms: Option<f64>,
}

/// Measures the background, and the storm's query alone.
pub(super) async fn before(services: &Services) -> Before {
    let mut background = JoinSet::new();
    for visitor in 0..VISITORS {
        background.spawn(visit(services.clone(), visitor));
    }
    let mut latencies = report::latencies();
    while let Some(visited) = background.join_next().await {
        for took in visited.unwrap_or_default() {
            report::record(&mut latencies, took);
        }
    }
    let mut single = report::latencies();
    let start = Instant::now();
    for number in (0..SINGLE_QUERIES).take_while(|_| start.elapsed() < LIMIT) {
        let (took, outcome) = timed(services, &plan::single(number)).await;
        if outcome == COMPLETED {
            report::record(&mut single, took);
        }
    }
    Before {
        baseline_p95_ms: report::quantile_ms(&latencies, 0.95),
        single_query_ms: report::quantile_ms(&single, 0.5),
    }
}

/// One visitor's requests, one after the other; how long the answered ones took.
async fn visit(services: Services, visitor: usize) -> Vec<Duration> {
    let start = Instant::now();
    let mut answered = Vec::new();
    for number in 0..REQUESTS_OF_A_VISITOR {
        if start.elapsed() > LIMIT {
            break;
        }
        let ask = plan::background(number * VISITORS + visitor);
        let (took, outcome) = timed(&services, &ask).await;
        if outcome == COMPLETED {
            answered.push(took);
        }
    }
    answered
}

/// Sends all queries of a round at once, each in a trace of its own, and waits for all answers.
pub(super) async fn ask_at_once(
    services: &Services,
    round: u32,
    note: impl Fn(&Asked),
) -> Vec<Asked> {
    let context = opentelemetry::Context::current();
    let mut queries = JoinSet::new();
    for ask in plan::round(round) {
        let query = query(services.clone(), ask, round);
        let context = context.clone();
        queries.spawn(opentelemetry::context::FutureExt::with_context(
            query, context,
        ));
    }
    let mut asked = Vec::with_capacity(plan::QUERIES_OF_A_ROUND);
    while let Some(query) = queries.join_next().await {
        match query {
            Ok(query) => {
                note(&query);
                asked.push(query);
            }
            // A query without an outcome would be missing in every sum.
            Err(error) => tracing::error!(%error, "a query of the storm was lost"),
        }
    }
    asked
}

async fn query(services: Services, ask: Ask, round: u32) -> Asked {
    let service = services[ask.service].name();
    let words = i64::try_from(ask.words).unwrap_or(i64::MAX);
    let attributes = vec![
        KeyValue::new("storm.round", i64::from(round) + 1),
        KeyValue::new("storm.words", words),
        KeyValue::new("peer.service", service),
    ];
    let work = timed(&services, &ask);
    let (trace_id, (took, outcome)) = span::apart("storm query", attributes, work).await;
    Asked {
        trace_id,
        service: service.to_owned(),
        ms: took.as_secs_f64() * 1e3,
        outcome,
    }
}

async fn timed(services: &Services, ask: &Ask) -> (Duration, String) {
    let service: &Upstream = &services[ask.service];
    let start = Instant::now();
    let call = service.call(ask.template, Method::GET, &ask.path, None, TIMEOUT);
    let outcome = match call.await {
        Ok(answer) => outcome(&answer),
        Err(problem) => problem.code.to_owned(),
    };
    (start.elapsed(), outcome)
}

/// The code of a service's problem.
#[derive(Debug, Deserialize)]
struct Told {
    code: String,
}

/// `completed`, or the cause of the failure.
pub(crate) fn outcome(answer: &Answer) -> String {
    if answer.status.is_success() {
        return COMPLETED.to_owned();
    }
    match serde_json::from_slice::<Told>(&answer.body) {
        Ok(told) if told.code.len() <= MAX_CODE => told.code,
        _ => format!("http_{}", answer.status.as_u16()),
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Bytes;
    use axum::http::StatusCode;

    use super::*;

    /// A failure is known by its problem's code, or by its status where it has none.
    #[test]
    fn failures_are_known_by_their_codes() {
        let told = |status, body: &'static str| {
            outcome(&Answer {
                status,
                kind: None,
                body: Bytes::from_static(body.as_bytes()),
            })
        };
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        assert_eq!(told(StatusCode::OK, "{}"), COMPLETED);
        let problem = r#"{"status": 503, "code": "statement_timeout"}"#;
        assert_eq!(told(unavailable, problem), "statement_timeout");
        assert_eq!(told(unavailable, "<html>"), "http_503");
        assert_eq!(told(StatusCode::NOT_FOUND, "{}"), "http_404");
    }
}
