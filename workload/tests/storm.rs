//! The storm on a real PostgreSQL, through the gateway. The catalogue is small; what makes its
//! queries long is the simulation, which sleeps inside the statement. No test of speed.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::Request;
use common::{Answer, Watched, get, program};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::sync::{Mutex, MutexGuard};

/// Two shops would need more connections than the server has.
static ONE_SHOP: Mutex<()> = Mutex::const_new(());

/// Longer than any storm here.
const PATIENCE: Duration = Duration::from_secs(120);

const TRIGGER: &str = "/api/demo/trigger-database-scenario";

struct Shop {
    url: String,
    gateway: Watched,
    _alone: MutexGuard<'static, ()>,
}

impl Shop {
    async fn open(arguments: &[&str]) -> Self {
        let alone = ONE_SHOP.lock().await;
        let url = common::database().await;
        let mut command = program("all");
        command
            .args(["--with-parent", "--port", "0", "--products", "500"])
            .args(arguments)
            .env("DATABASE_URL", &url);
        let start = move || Watched::start(&mut command, "listening on ");
        let gateway = tokio::task::spawn_blocking(start).await.unwrap();
        Self {
            url,
            gateway,
            _alone: alone,
        }
    }

    fn at(&self, path: &str) -> String {
        format!("{}{path}", self.gateway.announced)
    }

    async fn post(&self, path: &str, body: Value) -> Answer {
        post(self.at(path), body).await
    }

    async fn get(&self, path: &str) -> Value {
        get(&self.at(path)).await.json()
    }

    /// Every reading statement sleeps from now on.
    async fn slow_down(&self, delay_ms: u32) {
        let body = json!({"delay_ms": delay_ms});
        let slow = self.post("/api/demo/enable-slow-queries", body).await;
        assert_eq!(slow.status, 200, "{:?}", slow.body);
    }

    /// Starts a storm that nobody waits for here.
    fn trigger(&self, rounds: u32) -> tokio::task::JoinHandle<Answer> {
        tokio::spawn(post(self.at(TRIGGER), json!({"rounds": rounds})))
    }

    /// Waits until the storm's progress is as wanted.
    async fn until(&self, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let progress = self.get("/api/demo/storm").await;
            if is_so(&progress) {
                return progress;
            }
            assert!(Instant::now() < deadline, "not in time: {what}: {progress}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn post(uri: String, body: Value) -> Answer {
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let request = Request::post(uri).header("content-type", "application/json");
    let request = request.body(Full::from(body.to_string())).unwrap();
    let exchange = async {
        let response = client.request(request).await.unwrap();
        let status = response.status();
        let kind = response.headers()["content-type"].to_str().unwrap();
        let kind = kind.to_owned();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        Answer { status, kind, body }
    };
    tokio::time::timeout(PATIENCE, exchange).await.unwrap()
}

/// Backends at work by the service they belong to, when it is 43 of them in all.
async fn backends_of_a_round(url: &str) -> [i64; 3] {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let counts: (i64, i64, i64) = sqlx::query_as(
            "SELECT count(*) FILTER (WHERE application_name = 'product-service'), \
                    count(*) FILTER (WHERE application_name = 'order-service'), \
                    count(*) FILTER (WHERE application_name = 'inventory-service') \
             FROM pg_stat_activity WHERE datname = current_database() \
               AND backend_type = 'client backend' AND state = 'active'",
        )
        .fetch_one(&mut connection)
        .await
        .unwrap();
        let counts = [counts.0, counts.1, counts.2];
        if counts.iter().sum::<i64>() >= 43 {
            return counts;
        }
        assert!(Instant::now() < deadline, "never 43: {counts:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// 43 backends work at once, 15, 15 and 13 of them; the report says so, and each query has a trace
/// of its own that goes down to its statement.
#[tokio::test]
async fn a_round_is_43_queries_at_once() {
    let shop = Shop::open(&["--demo"]).await;
    assert_eq!(shop.get("/api/status").await["storm"], Value::Null);
    assert_eq!(shop.get("/api/demo/storm").await["running"], false);
    shop.slow_down(1000).await;
    let storm = shop.trigger(1);
    assert_eq!(backends_of_a_round(&shop.url).await, [15, 15, 13]);

    let report = storm.await.unwrap();
    assert_eq!(report.status, 200, "{:?}", report.body);
    let report = report.json();
    for member in ["queries", "executed", "completed", "active_max"] {
        assert_eq!(report[member], 43, "{member}: {report}");
    }
    assert_eq!(report["failures"], json!({}));
    let utilization = report["pool_utilization_percent"].as_f64().unwrap();
    assert!((95.0..=100.0).contains(&utilization), "{utilization}");
    for member in [
        "p50_ms",
        "p95_ms",
        "p99_ms",
        "baseline_p95_ms",
        "single_query_ms",
    ] {
        assert!(
            report[member].as_f64().unwrap() >= 999.0,
            "{member}: {report}"
        );
    }
    let services = report["by_service"].as_array().unwrap();
    let queries: Vec<u64> = services
        .iter()
        .map(|service| service["queries"].as_u64().unwrap())
        .collect();
    assert_eq!(queries, [15, 15, 13]);

    let slowest = report["slowest"].as_array().unwrap();
    let ids: BTreeSet<&str> = slowest
        .iter()
        .map(|query| query["trace_id"].as_str().unwrap())
        .collect();
    assert_eq!(ids.len(), 20);
    for id in ids.iter().take(3) {
        let trace = shop.get(&format!("/api/traces/{id}")).await;
        let spans = trace["spans"].as_array().unwrap();
        let names = |name: &str| spans.iter().any(|span| span["name"] == name);
        assert!(names("storm query"), "{trace}");
        assert!(
            spans
                .iter()
                .any(|span| span["name"].as_str().unwrap().ends_with(".products")),
            "{trace}"
        );
    }

    let progress = shop.get("/api/demo/storm").await;
    assert_eq!(progress["report"], report);
    let samples = progress["samples"].as_array().unwrap();
    assert!(samples.iter().any(|sample| sample["active"] == 43));
    let brief = shop.get("/api/status").await["storm"].clone();
    assert_eq!(
        (&brief["running"], &brief["done"]),
        (&json!(false), &json!(43))
    );
}

/// What PostgreSQL cancels is a failure by that name, which was executed, and only P99 tells of it.
#[tokio::test]
async fn cancelled_statements_are_failures_of_their_own() {
    let shop = Shop::open(&["--demo"]).await;
    shop.slow_down(4000).await;
    let report = shop.trigger(1).await.unwrap().json();
    assert_eq!(report["failures"], json!({"statement_timeout": 43}));
    assert_eq!(
        (&report["executed"], &report["completed"]),
        (&json!(43), &json!(0))
    );
    assert_eq!(report["failed_percent"], 100.0);
    assert_eq!(report["p95_ms"], Value::Null);
    assert!(report["p99_ms"].as_f64().unwrap() >= 3190.0, "{report}");

    let id = report["slowest"][0]["trace_id"].as_str().unwrap();
    let trace = shop.get(&format!("/api/traces/{id}")).await;
    let spans = trace["spans"].as_array().unwrap();
    let is_cancelled = |span: &Value| span["attributes"]["db.response.status_code"] == "57014";
    assert!(spans.iter().any(is_cancelled), "{trace}");
}

/// With the pools held by others, most queries never get a connection: a failure of another cause,
/// which was not executed.
#[tokio::test]
async fn an_exhausted_pool_is_a_failure_of_its_own() {
    let shop = Shop::open(&["--demo"]).await;
    shop.slow_down(1500).await;
    let held = shop
        .post(
            "/api/demo/enable-pool-exhaustion",
            json!({"hold_seconds": 60}),
        )
        .await;
    assert_eq!(held.status, 200);
    let report = shop.trigger(1).await.unwrap().json();
    // One connection of each pool is left: at most three queries fit into the wait for it.
    let exhausted = report["failures"]["pool_exhausted"].as_u64().unwrap();
    assert!(exhausted >= 25, "{report}");
    let executed = report["executed"].as_u64().unwrap();
    assert_eq!(executed + exhausted, 43, "{report}");
    assert_eq!(report["pool_utilization_percent"], 100.0);
    let reset = shop.post("/api/demo/reset", json!({})).await;
    assert_eq!(reset.status, 200);
}

/// A second storm is refused while one runs; that one goes on when its client has gone, and tells
/// whoever asks what it did.
#[tokio::test]
async fn a_storm_outlives_its_client() {
    let shop = Shop::open(&["--demo"]).await;
    shop.slow_down(600).await;
    let client = shop.trigger(3);
    let running = shop.until("the storm runs", |it| it["round"] == 1).await;
    assert_eq!(
        (&running["running"], &running["rounds"]),
        (&json!(true), &json!(3))
    );
    assert_eq!(running["report"], Value::Null);
    assert_eq!(
        shop.post(TRIGGER, json!({})).await.problem(409),
        "storm_running"
    );
    client.abort();
    assert!(client.await.is_err_and(|error| error.is_cancelled()));

    let over = shop
        .until("the storm is over", |it| it["running"] == false)
        .await;
    assert_eq!(over["report"]["rounds"], 3);
    assert_eq!(over["report"]["queries"], 3 * 43);
    assert_eq!(over["report"]["failed"], 0, "{over}");
    // And the next one may begin.
    let again = shop.trigger(1).await.unwrap();
    assert_eq!(again.json()["rounds"], 1);
}

/// Wrong numbers of rounds are refused, and all of it where there is no demo.
#[tokio::test]
async fn who_may_have_a_storm() {
    let shop = Shop::open(&["--demo"]).await;
    for rounds in [0, 21] {
        let refused = shop.post(TRIGGER, json!({"rounds": rounds})).await;
        assert_eq!(refused.problem(400), "rounds_out_of_range");
    }
    let refused = shop.post(TRIGGER, json!({"round": 1})).await;
    assert_eq!(refused.problem(400), "bad_body");
    drop(shop);

    let shop = Shop::open(&[]).await;
    let refused = shop.post(TRIGGER, json!({})).await;
    assert_eq!(refused.problem(404), "demo_disabled");
    assert_eq!(
        get(&shop.at("/api/demo/storm")).await.problem(404),
        "demo_disabled"
    );
}
