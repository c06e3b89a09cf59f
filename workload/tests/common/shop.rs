//! A whole shop of small processes, and requests to it.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test program uses a part of this, and a failure here is a failed test"
)]

use std::process::Command;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use crate::common::{self, Answer, Watched, get};

/// How many products these shops have.
pub const PRODUCTS: i64 = 500;

/// The services on the database, by the subcommands that run them.
pub const SERVICES: [&str; 3] = ["product", "order", "inventory"];

/// `workload NAME` on a free port, on the database at `url`.
pub fn service(name: &str, url: &str) -> Command {
    let mut command = common::program(name);
    command
        .args(["--with-parent", "--port", "0"])
        .args(["--products", &PRODUCTS.to_string()])
        .env("DATABASE_URL", url);
    command
}

/// Starts a command that says where it listens.
pub async fn start(mut command: Command) -> Watched {
    tokio::task::spawn_blocking(move || Watched::start(&mut command, "listening on "))
        .await
        .unwrap()
}

/// Starts one service with the demo's endpoints.
pub async fn start_demo(name: &str, url: &str) -> Watched {
    let mut command = service(name, url);
    command.arg("--demo");
    start(command).await
}

/// `workload gateway` in front of the services at these addresses.
pub fn gateway(product: &str, order: &str, inventory: &str) -> Command {
    let mut command = common::program("gateway");
    command
        .args(["--with-parent", "--port", "0", "--demo"])
        .args(["--product-url", product, "--order-url", order])
        .args(["--inventory-url", inventory]);
    command
}

/// The services and the gateway, on a database of their own.
pub struct Shop {
    pub url: String,
    pub product: Watched,
    pub order: Watched,
    pub inventory: Watched,
    pub gateway: Watched,
}

impl Shop {
    /// Opens a shop on a new database.
    pub async fn open() -> Self {
        let url = common::database().await;
        Self::open_on(&url).await
    }

    /// Opens a shop on the database at `url`: all services start at once.
    pub async fn open_on(url: &str) -> Self {
        let (product, order, inventory) = tokio::join!(
            start_demo("product", url),
            start_demo("order", url),
            start_demo("inventory", url)
        );
        let [p, o, i] = [&product, &order, &inventory].map(|service| service.announced.as_str());
        let gateway = start(gateway(p, o, i)).await;
        Self {
            url: url.to_owned(),
            product,
            order,
            inventory,
            gateway,
        }
    }

    /// A path of the gateway.
    pub fn at(&self, path: &str) -> String {
        format!("{}{path}", self.gateway.announced)
    }

    /// Gets a page of the gateway's that must answer.
    pub async fn get(&self, path: &str) -> Answer {
        get(&self.at(path)).await
    }

    /// Posts to the gateway.
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        post(&self.at(path), body).await
    }
}

/// Posts JSON to a page that must answer.
pub async fn post(uri: &str, body: &Value) -> Answer {
    post_text(uri, &body.to_string()).await
}

/// Posts something that calls itself JSON.
pub async fn post_text(uri: &str, body: &str) -> Answer {
    let request = Request::post(uri).header("content-type", "application/json");
    exchange(
        request
            .body(Full::new(Bytes::from(body.to_owned())))
            .unwrap(),
    )
    .await
}

/// Sends a request that must be answered.
pub async fn exchange(request: Request<Full<Bytes>>) -> Answer {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let response = client.request(request).await.unwrap();
    let kind = response.headers().get("content-type");
    let kind = kind.map_or("", |kind| kind.to_str().unwrap()).to_owned();
    let status = response.status();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    Answer { status, kind, body }
}

/// Asks `page` until what it says fulfils `condition`, within reason.
pub async fn until(page: &str, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let answer = get(page).await.json();
        if condition(&answer) {
            return answer;
        }
        assert!(Instant::now() < deadline, "not in time: {what}: {answer:#}");
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}
