//! `POST /api/demo/trigger-database-scenario` and `GET /api/demo/storm`: the story's first scene.

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Json, Router};
use opentelemetry::context::FutureExt;
use serde::Deserialize;

use super::{Gateway, Upstream};
use crate::problem::Problem;
use crate::services::demo::{check_allowed, options};
use crate::storm::{MAX_ROUNDS, Progress, Services, StormReport};

pub fn router() -> Router<Gateway> {
    Router::new()
        .route("/api/demo/trigger-database-scenario", post(trigger))
        .route("/api/demo/storm", get(progress))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    #[serde(default = "default_rounds")]
    rounds: u32,
}

fn default_rounds() -> u32 {
    1
}

/// Answers when the storm is over. Whoever does not wait finds the report by [`progress`].
async fn trigger(
    State(gateway): State<Gateway>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<StormReport>, Problem> {
    check_allowed(gateway.is_demo(), &headers)?;
    let Wanted { rounds } = options(&body)?;
    if !(1..=MAX_ROUNDS).contains(&rounds) {
        let detail = format!("rounds lies between 1 and {MAX_ROUNDS}");
        return Err(Problem::bad_request("rounds_out_of_range", detail));
    }
    let services: Services = gateway.upstreams().map(Upstream::clone);
    let storms = gateway.storms().clone();
    // A task of its own, or the storm would end in the middle when its client goes away.
    let storm = async move { storms.run(&services, rounds).await }.with_current_context();
    match tokio::spawn(storm).await {
        Ok(report) => report.map(Json),
        Err(error) => {
            tracing::error!(%error, "the storm broke off");
            let detail = "the storm broke off; the gateway's log says why";
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            Err(Problem::new(status, "storm_broke_off", detail))
        }
    }
}

async fn progress(State(gateway): State<Gateway>) -> Result<Json<Progress>, Problem> {
    check_allowed(gateway.is_demo(), &HeaderMap::new())?;
    Ok(Json(gateway.storms().progress()))
}
