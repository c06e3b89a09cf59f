//! The routes that every service on the database has around its own.

use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;

use super::common::{MAX_BODY, REQUEST_TIMEOUT, Service, within};
use super::demo::{self, INDEX_PATH};
use crate::db::{PoolHealth, QueryCounts};
use crate::live::Latency;
use crate::problem::Problem;
use crate::simulate::SimulationState;
use crate::{profiling, telemetry};

/// `own` routes with everything around them that each service has. `pages` says what there is
/// to who asks for something else.
pub fn router(service: &Service, own: Router<Service>, pages: &'static str) -> Router {
    own.route("/health", get(health))
        .merge(demo::router())
        .with_state(service.clone())
        .layer(middleware::from_fn(time_limit))
        .merge(profiling::router())
        .merge(telemetry::routes())
        .fallback(move || async move { no_such_page(pages) })
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(telemetry::http::serve))
}

/// What `GET /health` tells.
#[derive(Debug, Serialize)]
struct Health {
    status: &'static str,
    service: &'static str,
    pool: PoolHealth,
    queries: QueryCounts,
    latency: Latency,
    simulation: SimulationState,
    demo: bool,
}

/// Alive, and how full its pool is. Asks the database nothing: with an exhausted pool that
/// question would wait in the same queue.
async fn health(State(service): State<Service>) -> Json<Health> {
    let pool = service.pool();
    Json(Health {
        status: "ok",
        service: pool.service(),
        pool: pool.health(),
        queries: pool.queries(),
        latency: pool.live().latency(),
        simulation: service.simulation().state(),
        demo: service.simulation().is_enabled(),
    })
}

/// Ends a request that takes too long. Its future is dropped, and the connection given back.
async fn time_limit(path: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let path = path.as_ref().map_or("?", MatchedPath::as_str);
    if path == INDEX_PATH {
        // An index takes as long as it takes.
        return next.run(request).await;
    }
    within(REQUEST_TIMEOUT, path, request, next).await
}

fn no_such_page(pages: &str) -> Problem {
    Problem::not_found("no_such_page", format!("try {pages}"))
}

async fn no_such_method() -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "no_such_method",
        "this page does not answer that method",
    )
}
