//! How the shop is: the gateway's health with that of each service, and the page's status.

use std::time::Duration;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use serde_json::Value;

use super::{Gateway, NAME, Upstream};
use crate::storm::Brief;

/// A service that needs longer to say how it is, is not well.
const PATIENCE: Duration = Duration::from_secs(2);

/// A service behind the gateway.
#[derive(Debug, Serialize)]
pub struct ServiceStatus {
    name: &'static str,
    up: bool,
    url: String,
    /// What it says itself; `null` when it says nothing.
    health: Option<Value>,
}

/// What `GET /health` tells.
#[derive(Debug, Serialize)]
struct Health {
    status: &'static str,
    service: &'static str,
    services: Vec<ServiceStatus>,
    demo: bool,
}

/// What `GET /api/status` tells.
#[derive(Debug, Serialize)]
struct Status {
    services: Vec<ServiceStatus>,
    /// What the product service says of the database; `null` when nothing can be had.
    database: Option<Value>,
    /// The storm that runs, or the last one.
    storm: Option<Brief>,
    demo: bool,
}

pub fn router() -> Router<Gateway> {
    Router::new()
        .route("/health", get(health))
        .route("/api/status", get(status))
}

async fn health(State(gateway): State<Gateway>) -> Json<Health> {
    let services = services(&gateway).await;
    let is_whole = services.iter().all(|service| service.up);
    Json(Health {
        status: if is_whole { "ok" } else { "degraded" },
        service: NAME,
        services,
        demo: gateway.is_demo(),
    })
}

async fn status(State(gateway): State<Gateway>) -> Json<Status> {
    let path = "/debug/database";
    let database = gateway.product().get(path, path, PATIENCE);
    let (services, database) = tokio::join!(services(&gateway), database);
    Json(Status {
        services,
        database: database.ok(),
        storm: gateway.storms().brief(),
        demo: gateway.is_demo(),
    })
}

/// All services, asked at once.
async fn services(gateway: &Gateway) -> Vec<ServiceStatus> {
    let [product, order, inventory] = gateway.upstreams().map(ServiceStatus::of);
    let (product, order, inventory) = tokio::join!(product, order, inventory);
    vec![product, order, inventory]
}

impl ServiceStatus {
    async fn of(upstream: &Upstream) -> Self {
        let health: Option<Value> = upstream.get("/health", "/health", PATIENCE).await.ok();
        Self {
            name: upstream.name(),
            up: health.is_some(),
            url: upstream.url().to_owned(),
            health,
        }
    }
}
