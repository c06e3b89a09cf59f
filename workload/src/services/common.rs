//! What the services on the database have in common: health, the demo's endpoints, limits, and
//! the answers to what they do not know.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, Request};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sqlx::PgPool;

use crate::db::{ACQUIRE_TIMEOUT, Pool, STATEMENT_TIMEOUT};
use crate::problem::Problem;
use crate::simulate::{HeavyQuery, Simulation};

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
