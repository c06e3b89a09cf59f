//! What the services on the database have in common: health, the demo's endpoints, limits, and
//! the answers to what they do not know.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, MatchedPath, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use sqlx::PgPool;

use crate::db::{ACQUIRE_TIMEOUT, Pool, PoolHealth, QueryCounts, STATEMENT_TIMEOUT};
use crate::live::Latency;
use crate::problem::Problem;
use crate::simulate::{self, HeavyQuery, Simulation, SimulationState};
use crate::{profiling, telemetry};

/// A request may wait for a connection, then run a statement, and needs a moment of its own.
pub const REQUEST_TIMEOUT: Duration =
    ACQUIRE_TIMEOUT.saturating_add(STATEMENT_TIMEOUT.saturating_add(Duration::from_secs(1)));

/// The largest body of a request: an order of twenty lines is a hundredth of it.
pub const MAX_BODY: usize = 64 * 1024;

/// A service on the shop's database. Clones are the same service.
#[derive(Debug, Clone)]
pub struct Service(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pool: Pool,
    simulation: Simulation,
}

impl Service {
    /// The service that `pool` belongs to. `control` are connections beside the pool; `heavy` is
    /// the query that a simulated exhaustion runs; without `demo` nothing can be simulated.
    pub fn new(pool: Pool, control: PgPool, heavy: HeavyQuery, demo: bool) -> Self {
        let simulation = Simulation::new(pool.clone(), control, heavy, demo);
        Self(Arc::new(Inner { pool, simulation }))
    }

    /// Its connections.
    pub fn pool(&self) -> &Pool {
        &self.0.pool
    }

    /// What is simulated in it.
    pub fn simulation(&self) -> &Simulation {
        &self.0.simulation
    }

    /// Gives everything back: for the end of the process.
    pub async fn close(&self) {
        self.0.simulation.stop();
        self.0.pool.close().await;
        self.0.simulation.control().close().await;
    }

    /// `own` routes with everything around them that each service has. `pages` says what there is
    /// to who asks for something else.
    pub fn router(&self, own: Router<Self>, pages: &'static str) -> Router {
        own.route("/health", get(health))
            .merge(simulate::router())
            .with_state(self.clone())
            .layer(middleware::from_fn(time_limit))
            .merge(profiling::router())
            .merge(telemetry::routes())
            .fallback(move || async move { no_such_page(pages) })
            .method_not_allowed_fallback(no_such_method)
            .layer(DefaultBodyLimit::max(MAX_BODY))
            .layer(middleware::from_fn(telemetry::http::serve))
    }
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
    if path == simulate::INDEX_PATH {
        // An index takes as long as it takes.
        return next.run(request).await;
    }
    within(REQUEST_TIMEOUT, path, request, next).await
}

/// Serves a request in `limit`, or says that it could not.
pub async fn within(limit: Duration, path: &str, request: Request, next: Next) -> Response {
    let served = tokio::time::timeout(limit, next.run(request)).await;
    served.unwrap_or_else(|_| {
        tracing::warn!(path, "request timed out");
        Problem::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "request_timeout",
            "the request took too long; try again later",
        )
        .into_response()
    })
}

/// A query that can be read, or a problem.
pub fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, Problem> {
    let query = query.map_err(|error| Problem::bad_request("bad_query", error.body_text()))?;
    Ok(query.0)
}

/// A body that can be read, or a problem.
pub fn body<T>(body: Result<Json<T>, JsonRejection>) -> Result<T, Problem> {
    match body {
        Ok(Json(body)) => Ok(body),
        Err(error) => Err(Problem::new(error.status(), "bad_body", error.body_text())),
    }
}

/// A number in a path, or a problem that names the thing.
pub fn id(text: &str, thing: &str) -> Result<i64, Problem> {
    text.parse().map_err(|_| {
        let detail = format!("a {thing}'s id is a whole number, such as 42");
        Problem::bad_request("bad_id", detail)
    })
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
