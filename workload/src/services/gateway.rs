//! api-gateway: the shop's API in front of the three services, with what concerns all of them:
//! state, the demo's buttons, traces and logs, pictures.
//!
//! It has no database of its own. A service's answer is handed through, its problems too; a
//! service that gives none is named.

mod demo;
mod flamegraphs;
mod observe;
mod pages;
mod proxy;
mod status;
mod storm;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::Response;

use super::common::{self, MAX_BODY};
use super::upstream::{self, Upstream, UpstreamError, client};
use crate::problem::Problem;
use crate::storm::Storms;
use crate::{profiling, telemetry};

/// The service's name, in its answers and its telemetry.
pub const NAME: &str = "api-gateway";

/// A service has its own limit, and then there is the way to it.
const TIME_LIMIT: Duration = upstream::TIMEOUT.saturating_add(Duration::from_secs(1));

const PAGES: &str = "/api/products/search?q=…, /api/orders/popular-products?q=…, \
                     /api/inventory/check/{id}, /api/status, /health or /flamegraphs";

/// The gateway. Clones are the same gateway.
#[derive(Debug, Clone)]
pub struct Gateway(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    product: Upstream,
    order: Upstream,
    inventory: Upstream,
    demo: bool,
    flamegraphs: PathBuf,
    storms: Storms,
}

/// What a gateway stands in front of.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the product service is: `http://host:port`.
    pub product_url: String,
    /// Where the order service is.
    pub order_url: String,
    /// Where the inventory service is.
    pub inventory_url: String,
    /// Whether the demo's endpoints answer.
    pub demo: bool,
    /// Where the pictures are that are shown.
    pub flamegraphs: PathBuf,
}

impl Gateway {
    /// A gateway; nobody is asked yet.
    pub fn new(options: Options) -> Result<Self, UpstreamError> {
        let client = client();
        let upstream = |name, url: &str| Upstream::new(name, url, client.clone());
        Ok(Self(Arc::new(Inner {
            product: upstream(super::product::NAME, &options.product_url)?,
            order: upstream(super::order::NAME, &options.order_url)?,
            inventory: upstream(super::inventory::NAME, &options.inventory_url)?,
            demo: options.demo,
            flamegraphs: options.flamegraphs,
            storms: Storms::default(),
        })))
    }

    /// The services, in the order of the story.
    pub fn upstreams(&self) -> [&Upstream; 3] {
        [&self.0.product, &self.0.order, &self.0.inventory]
    }

    /// The product service, which also knows the database.
    pub fn product(&self) -> &Upstream {
        &self.0.product
    }

    /// The order service.
    pub fn order(&self) -> &Upstream {
        &self.0.order
    }

    /// The inventory service.
    pub fn inventory(&self) -> &Upstream {
        &self.0.inventory
    }

    /// The storms that it has started.
    pub fn storms(&self) -> &Storms {
        &self.0.storms
    }

    /// Whether the demo's endpoints answer.
    pub fn is_demo(&self) -> bool {
        self.0.demo
    }
}

/// Ends a request that takes too long: whoever sends a body drop by drop.
async fn time_limit(path: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let path = path.as_ref().map_or("?", MatchedPath::as_str);
    common::within(TIME_LIMIT, path, request, next).await
}

/// The gateway's routes.
pub fn router(gateway: &Gateway) -> Router {
    Router::new()
        .merge(proxy::router())
        .merge(status::router())
        .merge(observe::router())
        .merge(flamegraphs::router())
        .merge(pages::router())
        .layer(middleware::from_fn(time_limit))
        .merge(demo::router())
        .merge(storm::router())
        .with_state(gateway.clone())
        .merge(profiling::router())
        .merge(telemetry::routes())
        .fallback(|| async { Problem::not_found("no_such_page", format!("try {PAGES}")) })
        .method_not_allowed_fallback(|| async {
            Problem::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "no_such_method",
                "this page does not answer that method",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(telemetry::http::serve))
}
