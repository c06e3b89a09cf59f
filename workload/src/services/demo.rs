//! The demo's endpoints of a service: they switch a simulation on and end it.
//!
//! They are a way to take a service down, so they answer only where `--demo` was given, and not to a page from elsewhere in a
//! visitor's browser.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::routing::post;
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::common::Service;
use crate::db::POOL_MAX;
use crate::problem::Problem;
use crate::simulate::{HELD, Reset, SimulationState};

/// Where the index is made and dropped.
pub const INDEX_PATH: &str = "/demo/index";

/// The longest simulated sleep. From 3200 ms on every statement runs into its timeout.
const MAX_DELAY_MS: u32 = 10_000;

/// How long connections are held where the request does not say.
const HOLD_SECONDS: u32 = 30;

/// The longest that they are: the simulation ends by itself, whatever happens to who asked for it.
const MAX_HOLD_SECONDS: u32 = 120;

/// What the audience is told to expect, in the log beside what happens.
const TARGET_P95_MS: u32 = 2800;
const TARGET_P99_MS: u32 = 3200;

/// The demo's endpoints of a service.
pub fn router() -> Router<Service> {
    Router::new()
        .route("/demo/enable-slow-queries", post(enable_slow_queries))
        .route("/demo/enable-pool-exhaustion", post(enable_pool_exhaustion))
        .route("/demo/reset", post(reset))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SlowQueries {
    delay_ms: u32,
}

/// What was switched on.
#[derive(Debug, Serialize)]
struct Enabled {
    service: &'static str,
    simulation: SimulationState,
}

async fn enable_slow_queries(
    State(service): State<Service>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Enabled>, Problem> {
    check_allowed(service.simulation().is_enabled(), &headers)?;
    let SlowQueries { delay_ms } = options(&body)?;
    if !(1..=MAX_DELAY_MS).contains(&delay_ms) {
        let detail = format!("delay_ms lies between 1 and {MAX_DELAY_MS}; /demo/reset ends it");
        return Err(Problem::bad_request("delay_out_of_range", detail));
    }
    service.pool().slow_queries(delay_ms);
    tracing::warn!(
        simulation_type = "slow_queries",
        action = "enabled",
        delay_ms,
        target_p95 = TARGET_P95_MS,
        target_p99 = TARGET_P99_MS,
        "simulated: every reading statement sleeps first"
    );
    Ok(Json(Enabled::now(&service)))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PoolExhaustion {
    #[serde(default = "default_hold")]
    hold_seconds: u32,
}

fn default_hold() -> u32 {
    HOLD_SECONDS
}

async fn enable_pool_exhaustion(
    State(service): State<Service>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Enabled>, Problem> {
    check_allowed(service.simulation().is_enabled(), &headers)?;
    let PoolExhaustion { hold_seconds } = options(&body)?;
    if !(1..=MAX_HOLD_SECONDS).contains(&hold_seconds) {
        let detail = format!("hold_seconds lies between 1 and {MAX_HOLD_SECONDS}");
        return Err(Problem::bad_request("hold_out_of_range", detail));
    }
    let time = Duration::from_secs(u64::from(hold_seconds));
    service.simulation().exhaust(time);
    tracing::warn!(
        simulation_type = "pool_exhaustion",
        action = "enabled",
        connections_held = HELD,
        pool_max = POOL_MAX,
        utilization_percent = f64::from(HELD) * 100.0 / f64::from(POOL_MAX),
        hold_seconds,
        "simulated: connections are held, each with one heavy query after the other"
    );
    Ok(Json(Enabled::now(&service)))
}

async fn reset(State(service): State<Service>, headers: HeaderMap) -> Result<Json<Reset>, Problem> {
    check_allowed(service.simulation().is_enabled(), &headers)?;
    let reset = service.simulation().reset().await?;
    tracing::info!(
        simulation_type = "none",
        action = "reset",
        statements_cancelled = reset.statements_cancelled,
        backends_ended = reset.backends_ended,
        "nothing is simulated any more"
    );
    Ok(Json(reset))
}

impl Enabled {
    fn now(service: &Service) -> Self {
        Self {
            service: service.pool().service(),
            simulation: service.simulation().state(),
        }
    }
}

/// The options in a body; an empty one stands for none.
pub fn options<T: DeserializeOwned>(body: &Bytes) -> Result<T, Problem> {
    let text: &[u8] = if body.is_empty() { b"{}" } else { body };
    serde_json::from_slice(text)
        .map_err(|error| Problem::bad_request("bad_body", error.to_string()))
}

/// Refuses where there is no demo, and a page of another origin in somebody's browser.
pub fn check_allowed(enabled: bool, headers: &HeaderMap) -> Result<(), Problem> {
    if !enabled {
        let detail = "the demo's endpoints are off; start this service with --demo";
        return Err(Problem::not_found("demo_disabled", detail));
    }
    if is_cross_origin(headers) {
        return Err(Problem::new(
            StatusCode::FORBIDDEN,
            "cross_origin",
            "only the shop's own pages may do this",
        ));
    }
    Ok(())
}

/// Browsers say with each POST from which origin its page is; other clients say nothing.
fn is_cross_origin(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else {
        return false;
    };
    let origin = origin.to_str().ok().and_then(|o| o.parse::<Uri>().ok());
    let authority = origin.as_ref().and_then(|origin| origin.authority());
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok());
    authority.is_none() || authority.map(|a| a.as_str()) != host
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn headers(origin: Option<&'static str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("127.0.0.1:8010"));
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
        }
        headers
    }

    /// Without `--demo` nothing answers; with it, everybody but pages of other origins.
    #[test]
    fn who_may_simulate() {
        let code = |enabled, origin| {
            check_allowed(enabled, &headers(origin)).map_err(|problem| problem.code)
        };
        assert_eq!(code(false, None), Err("demo_disabled"));
        assert_eq!(code(true, None), Ok(()));
        assert_eq!(code(true, Some("http://127.0.0.1:8010")), Ok(()));
        for origin in ["http://evil.example", "http://127.0.0.1:8011", "null", "?"] {
            assert_eq!(code(true, Some(origin)), Err("cross_origin"), "{origin}");
        }
    }

    /// No body is as good as an empty object.
    #[test]
    fn a_body_may_be_missing() {
        let hold = |body: &'static str| {
            let body = Bytes::from_static(body.as_bytes());
            options::<PoolExhaustion>(&body).map(|options| options.hold_seconds)
        };
        assert_eq!(hold(""), Ok(HOLD_SECONDS));
        assert_eq!(hold("{\"hold_seconds\": 3}"), Ok(3));
        assert!(hold("{\"seconds\": 3}").is_err());
        assert!(hold("3").is_err());
    }
}
