//! The demo's buttons: what one service can do, done by all.

use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use serde::Serialize;
use serde_json::Value;

use super::{Gateway, Upstream};
use crate::problem::Problem;
use crate::services::demo::{INDEX_PATH, check_allowed};
use crate::services::upstream::{Answer, TIMEOUT};

/// An index of the largest catalogue on a busy machine.
const INDEX_PATIENCE: Duration = Duration::from_secs(300);

const RESET: &str = "/demo/reset";

pub fn router() -> Router<Gateway> {
    Router::new()
        .route(
            "/api/demo/enable-slow-queries",
            all("/demo/enable-slow-queries"),
        )
        .route(
            "/api/demo/enable-pool-exhaustion",
            all("/demo/enable-pool-exhaustion"),
        )
        .route("/api/demo/reset", all(RESET))
        .route("/api/demo/index", post(index))
}

/// What the services answered.
#[derive(Debug, Serialize)]
struct Done {
    services: Vec<Value>,
}

/// The same request to each service. Each is asked, also when another does not answer.
fn all(path: &'static str) -> axum::routing::MethodRouter<Gateway> {
    post(
        async move |State(gateway): State<Gateway>, headers: HeaderMap, body: Bytes| {
            check_allowed(gateway.is_demo(), &headers)?;
            if path == RESET {
                // First: its next round would begin again what the services end.
                gateway.storms().cancel();
            }
            let asked = gateway
                .upstreams()
                .map(|upstream| ask(upstream, path, body.clone(), TIMEOUT));
            let [product, order, inventory] = asked;
            let (product, order, inventory) = tokio::join!(product, order, inventory);
            let mut services = Vec::new();
            for answer in [product, order, inventory] {
                let answer = answer?;
                if !answer.status.is_success() {
                    return Ok::<Response, Problem>(answer.into_response());
                }
                services.push(serde_json::from_slice(&answer.body).unwrap_or_default());
            }
            Ok(Json(Done { services }).into_response())
        },
    )
}

async fn index(
    State(gateway): State<Gateway>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Answer, Problem> {
    check_allowed(gateway.is_demo(), &headers)?;
    ask(gateway.product(), INDEX_PATH, body, INDEX_PATIENCE).await
}

async fn ask(
    upstream: &Upstream,
    path: &'static str,
    body: Bytes,
    patience: Duration,
) -> Result<Answer, Problem> {
    let json = HeaderValue::from_static("application/json");
    let body = Some((json, body));
    upstream
        .call(path, Method::POST, path, body, patience)
        .await
}
