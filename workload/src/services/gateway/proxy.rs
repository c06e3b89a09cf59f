//! What the gateway hands on: the services' own paths, under `/api`.

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, Uri, header};
use axum::response::IntoResponse;
use axum::response::Response;
use axum::routing::{MethodRouter, get, post};

use super::{Gateway, Upstream};
use crate::problem::Problem;
use crate::services::upstream::TIMEOUT;

/// What precedes a service's own path.
const PREFIX: &str = "/api";

/// Picks the service that a path belongs to.
type Pick = fn(&Gateway) -> &Upstream;

/// The routes of the three services.
pub fn router() -> Router<Gateway> {
    let product: Pick = Gateway::product;
    let order: Pick = Gateway::order;
    let inventory: Pick = Gateway::inventory;
    Router::new()
        .route("/api/products", read(product, "/products"))
        .route("/api/products/search", read(product, "/products/search"))
        .route("/api/products/{id}", read(product, "/products/{id}"))
        .route("/api/orders", write(order, "/orders"))
        .route("/api/orders/history", read(order, "/orders/history"))
        .route(
            "/api/orders/popular-products",
            read(order, "/orders/popular-products"),
        )
        .route(
            "/api/inventory/check/{id}",
            read(inventory, "/inventory/check/{id}"),
        )
        .route(
            "/api/inventory/low-stock",
            read(inventory, "/inventory/low-stock"),
        )
        .route(
            "/api/inventory/reservations",
            write(inventory, "/inventory/reservations"),
        )
}

fn read(pick: Pick, template: &'static str) -> MethodRouter<Gateway> {
    get(async move |State(gateway): State<Gateway>, uri: Uri| {
        hand_on(pick(&gateway), template, Method::GET, &uri, None).await
    })
}

fn write(pick: Pick, template: &'static str) -> MethodRouter<Gateway> {
    post(
        async move |State(gateway): State<Gateway>, uri: Uri, headers: HeaderMap, body: Bytes| {
            let json = HeaderValue::from_static("application/json");
            let kind = headers.get(header::CONTENT_TYPE).cloned().unwrap_or(json);
            let body = Some((kind, body));
            hand_on(pick(&gateway), template, Method::POST, &uri, body).await
        },
    )
}

async fn hand_on(
    upstream: &Upstream,
    template: &'static str,
    method: Method,
    uri: &Uri,
    body: Option<(HeaderValue, Bytes)>,
) -> Result<Response, Problem> {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let path = path.strip_prefix(PREFIX).unwrap_or(path);
    let answer = upstream.call(template, method, path, body, TIMEOUT).await?;
    Ok(answer.into_response())
}
