//! What a service tells of itself, received by a real OTLP server, and what happens when there is
//! none.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;
#[path = "common/otlp.rs"]
mod otlp;

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Command;

use axum::body::Bytes;
use axum::http::Request;
use common::{Watched, get, product, scratch};
use http_body_util::Full;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use nix::sys::signal::Signal;
use otlp::{Receiver, Span};
use serde_json::{Value, json};

/// A service whose log lines can be read afterwards.
struct Service {
    service: Watched,
    lines: PathBuf,
    /// The name of its database: each test has one of its own.
    database: String,
}

impl Service {
    /// Starts `command` so that it sends its telemetry soon, to where its variables say.
    async fn start(mut command: Command, url: &str, variables: &[(&str, &str)]) -> Self {
        let (_, database) = url.rsplit_once('/').unwrap();
        let lines = scratch("lines");
        command
            .stderr(File::create(&lines).unwrap())
            .env("OTEL_BSP_SCHEDULE_DELAY", "100")
            .env("OTEL_BLRP_SCHEDULE_DELAY", "100")
            .env("OTEL_METRIC_EXPORT_INTERVAL", "200")
            .envs(variables.iter().copied());
        let start = move || Watched::start(&mut command, "listening on ");
        let service = tokio::task::spawn_blocking(start).await.unwrap();
        Self {
            service,
            lines,
            database: database.to_owned(),
        }
    }

    async fn product(variables: &[(&str, &str)]) -> Self {
        let url = common::database().await;
        Self::start(product(&url), &url, variables).await
    }

    fn at(&self, path: &str) -> String {
        format!("{}{path}", self.service.announced)
    }

    fn lines(&self) -> String {
        fs::read_to_string(&self.lines).unwrap()
    }

    /// Lines that hold `text`.
    fn count(&self, text: &str) -> usize {
        self.lines().lines().filter(|l| l.contains(text)).count()
    }

    /// Ends it as a user does, and gives all its lines.
    async fn stop(mut self) -> String {
        self.service.signal(Signal::SIGTERM);
        let ended = move || {
            let status = self.service.wait();
            assert!(status.success(), "{status}");
            let lines = self.lines();
            fs::remove_file(&self.lines).unwrap();
            lines
        };
        tokio::task::spawn_blocking(ended).await.unwrap()
    }
}

/// The spans of requests and statements of a trace that have arrived, when there are at least
/// `count`. On a busy machine waiting for a connection may be a span as well.
async fn spans(receiver: &Receiver, trace: &str, count: usize) -> Vec<Span> {
    receiver
        .wait(&format!("{count} spans of {trace}"), |received| {
            let all = received.spans.iter();
            let is_it = |span: &&Span| span.trace == trace && span.kind != 1;
            let found: Vec<_> = all.filter(is_it).cloned().collect();
            (found.len() >= count).then_some(found)
        })
        .await
}

/// A trace that this test began, as a header tells it.
const CALLER: &str = "b7ad6b7169203331";

fn traceparent(trace: &str) -> [(&'static str, String); 1] {
    [("traceparent", format!("00-{trace}-{CALLER}-01"))]
}

/// A request and its statement are two spans of the caller's trace, named and described by the
/// conventions, old names beside the new ones, and without what was searched for.
#[tokio::test(flavor = "multi_thread")]
async fn a_search_is_two_spans() {
    let receiver = Receiver::grpc().await;
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", &*receiver.endpoint);
    let service = Service::product(&[endpoint]).await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let uri = service.at("/products/search?q=wireless&limit=3");
    let found = common::send_with("GET", &uri, &traceparent(trace)).await;
    assert_eq!(found.unwrap().status, 200);

    let spans = spans(&receiver, trace, 2).await;
    let server = spans.iter().find(|span| span.kind == 2).unwrap();
    assert_eq!(server.name, "GET /products/search");
    assert_eq!(server.parent, CALLER);
    assert_eq!(server.status, 0);
    assert_eq!(server.attributes["http.request.method"], "GET");
    assert_eq!(server.attributes["http.route"], "/products/search");
    assert_eq!(server.attributes["http.response.status_code"], 200);
    assert_eq!(server.attributes["url.path"], "/products/search");
    assert_eq!(server.attributes["server.address"], "127.0.0.1");

    let client = spans.iter().find(|span| span.kind == 3).unwrap();
    let database = &*service.database;
    assert_eq!(client.name, format!("SELECT {database}.products"));
    assert_eq!(client.parent, server.id);
    assert_eq!(client.service, "product-service");
    assert!(client.milliseconds <= server.milliseconds);
    let attributes = &client.attributes;
    for (stable, old, value) in [
        ("db.system.name", "db.system", json!("postgresql")),
        ("db.namespace", "db.name", json!(database)),
        ("db.operation.name", "db.operation", json!("SELECT")),
        ("db.collection.name", "db.sql.table", json!("products")),
        ("server.address", "net.peer.name", json!("127.0.0.1")),
    ] {
        assert_eq!((&attributes[stable], &attributes[old]), (&value, &value));
    }
    assert_eq!(attributes["server.port"], attributes["net.peer.port"]);
    let text = attributes["db.query.text"].as_str().unwrap();
    assert!(text.contains("ILIKE '%' || $1 || '%'"), "{text}");
    assert_eq!(attributes["db.statement"], text);
    let percent = attributes["db.connection_pool.utilization_percent"].as_f64();
    assert!(percent > Some(0.0) && percent <= Some(100.0), "{client:?}");
    assert!(attributes["db.connection_pool.active"].as_i64() >= Some(1));
    assert!(attributes["db.active_queries"].as_i64() >= Some(1));
    let measured = attributes["db.query.duration_ms"].as_f64().unwrap();
    assert!((measured - client.milliseconds).abs() < 5.0, "{client:?}");
    assert!(!attributes.contains_key("error.type"));

    let all = format!("{:?}", receiver.received().spans);
    assert!(!all.contains("wireless"), "what was searched for is told");
    let resource = &receiver.received().resources["product-service"];
    assert_eq!(resource["process.pid"], service.service.child.id());
    assert_eq!(resource["telemetry.sdk.language"], "rust");
}

/// Posts `body` and expects that it is done.
async fn post(uri: &str, body: Value) {
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let request = Request::post(uri).header("content-type", "application/json");
    let request = request.body(Full::from(body.to_string())).unwrap();
    let answer = client.request(request).await.unwrap();
    assert_eq!(answer.status(), 200, "{uri}");
}

/// A statement that PostgreSQL cancels is a failed span with its SQLSTATE, and a warning in the same
/// trace with the scene's fields; what simulates that is logged with fields of its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_statement_is_told() {
    let receiver = Receiver::grpc().await;
    let url = common::database().await;
    let mut command = product(&url);
    command.arg("--demo");
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", &*receiver.endpoint);
    let service = Service::start(command, &url, &[endpoint]).await;
    let slow = json!({ "delay_ms": 4000 });
    post(&service.at("/demo/enable-slow-queries"), slow).await;
    let trace = "44444444444444444444444444444444";
    let uri = service.at("/products/search?q=wireless");
    let answer = common::send_with("GET", &uri, &traceparent(trace)).await;
    assert_eq!(answer.unwrap().problem(503), "statement_timeout");

    let spans = spans(&receiver, trace, 2).await;
    let server = spans.iter().find(|span| span.kind == 2).unwrap();
    assert_eq!(
        (server.status, &server.attributes["error.type"]),
        (2, &json!("503"))
    );
    let client = spans.iter().find(|span| span.kind == 3).unwrap();
    assert_eq!(client.status, 2);
    assert_eq!(client.attributes["error.type"], "57014");
    assert_eq!(client.attributes["db.response.status_code"], "57014");
    assert_eq!(client.attributes["simulation.delay_ms"], 4000);
    assert!(client.milliseconds >= 3200.0, "{client:?}");

    let log = receiver
        .wait("a warning of that trace", |received| {
            let mut logs = received.logs.iter();
            logs.find(|log| log.trace == trace).cloned()
        })
        .await;
    assert_eq!((&*log.severity, &*log.service), ("WARN", "product-service"));
    assert_eq!(log.span, server.id);
    assert_eq!(log.attributes["code"], "statement_timeout");
    assert_eq!(log.attributes["pool_max"], 15);
    assert!(log.attributes["connections_held"].as_i64() >= Some(1));
    assert!(log.attributes["utilization_percent"].as_f64() > Some(0.0));
    assert!(log.attributes["error"].is_string());
    assert!(service.count(&format!("trace_id={trace}")) >= 1);

    let simulated = receiver
        .wait("what is simulated", |received| {
            let mut logs = received.logs.iter();
            logs.find(|log| log.attributes.contains_key("simulation_type"))
                .cloned()
        })
        .await;
    let field = |name: &str| &simulated.attributes[name];
    assert_eq!(field("simulation_type"), "slow_queries");
    assert_eq!(field("action"), "enabled");
    assert_eq!(field("delay_ms"), 4000);
    assert_eq!(
        (field("target_p95"), field("target_p99")),
        (&json!(2800), &json!(3200))
    );

    let uri = service.at(&format!("/debug/logs?trace_id={trace}&level=warn"));
    let remembered = get(&uri).await.json();
    assert_eq!(remembered.as_array().unwrap().len(), 1, "{remembered}");
    assert_eq!(remembered[0]["fields"]["code"], "statement_timeout");
    assert_eq!(remembered[0]["message"], log.body);
    let failed = |received: &otlp::Received| {
        let mut points = received.points.iter();
        let is_it = |point: &&otlp::Point| {
            point.name == "db.client.operation.duration"
                && point.attributes.get("db.response.status_code") == Some(&json!("57014"))
        };
        points.find(is_it).map(|point| point.value)
    };
    assert_eq!(receiver.wait("its duration", failed).await, 1.0);
}

/// One trace from the gateway through a service to the database, each part under the one before.
#[tokio::test(flavor = "multi_thread")]
async fn a_trace_goes_through_the_shop() {
    let receiver = Receiver::grpc().await;
    let url = common::database().await;
    let mut command = common::program("all");
    command
        .args(["--with-parent", "--port", "0", "--products", "500"])
        .env("DATABASE_URL", &url);
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", &*receiver.endpoint);
    let shop = Service::start(command, &url, &[endpoint]).await;
    for (number, path, route, table) in [
        (
            1,
            "products/search?q=wireless",
            "products/search",
            "products",
        ),
        (
            2,
            "orders/popular-products?q=wireless",
            "orders/popular-products",
            "products",
        ),
        (3, "inventory/check/1", "inventory/check/{id}", "stock"),
    ] {
        let trace = format!("{number:032x}");
        let uri = shop.at(&format!("/api/{path}"));
        let answer = common::send_with("GET", &uri, &traceparent(&trace)).await;
        assert_eq!(answer.unwrap().status, 200, "{path}");
        let spans = spans(&receiver, &trace, 4).await;
        let mut parent = CALLER.to_owned();
        for (kind, name) in [
            (2, format!("GET /api/{route}")),
            (3, format!("GET /{route}")),
            (2, format!("GET /{route}")),
            (3, format!("SELECT {}.{table}", shop.database)),
        ] {
            let span = spans.iter().find(|span| span.parent == parent);
            let span = span.unwrap_or_else(|| panic!("nothing under {parent}: {spans:#?}"));
            assert_eq!((span.kind, &span.name), (kind, &name));
            parent.clone_from(&span.id);
        }
        let merged = get(&shop.at(&format!("/api/traces/{trace}"))).await.json();
        let merged = merged["spans"].as_array().unwrap();
        let known = merged.iter().filter(|span| span["kind"] != "internal");
        assert_eq!(known.count(), 4, "{merged:?}");
    }
    // The page's questions about the shop's state are no traces, at the gateway nor behind it.
    assert_eq!(get(&shop.at("/api/status")).await.status, 200);
    let last = format!("{:032x}", 4);
    let uri = shop.at("/api/products/1");
    common::send_with("GET", &uri, &traceparent(&last))
        .await
        .unwrap();
    spans(&receiver, &last, 4).await;
    let probes: Vec<_> = {
        let received = receiver.received();
        let all = received.spans.iter();
        let is_probe = |span: &&Span| span.name.contains("health") || span.name.contains("status");
        all.filter(is_probe).cloned().collect()
    };
    assert!(probes.is_empty(), "{probes:#?}");
    let services: Vec<_> = receiver.received().resources.keys().cloned().collect();
    assert_eq!(
        services,
        [
            "api-gateway",
            "inventory-service",
            "order-service",
            "product-service"
        ]
    );
    let listed = get(&shop.at("/api/traces?limit=50")).await.json();
    let listed = listed.as_array().unwrap();
    let searched = listed
        .iter()
        .find(|t| t["root"] == "GET /api/products/search");
    assert!(searched.unwrap()["spans"].as_u64() >= Some(4));
}

/// Metrics have the conventions' names and units, and buckets where a storm's statements lie.
#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_those_of_the_conventions() {
    let receiver = Receiver::grpc().await;
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", &*receiver.endpoint);
    let service = Service::product(&[endpoint]).await;
    for _ in 0..3 {
        get(&service.at("/products/1")).await;
    }
    let (operation, request) = receiver
        .wait("three statements and requests", |received| {
            let last = |name: &str, key: &str, value: &str| {
                let mut points = received.points.iter().rev();
                points
                    .find(|p| p.name == name && p.attributes.get(key) == Some(&value.into()))
                    .filter(|point| point.value >= 3.0)
                    .cloned()
            };
            Some((
                last(
                    "db.client.operation.duration",
                    "db.collection.name",
                    "products",
                )?,
                last(
                    "http.server.request.duration",
                    "http.route",
                    "/products/{id}",
                )?,
            ))
        })
        .await;
    assert_eq!((operation.kind, &*operation.unit), ("histogram", "s"));
    assert_eq!(
        operation.bounds,
        [
            0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 2.5, 3.0, 3.5, 5.0, 10.0
        ]
    );
    assert_eq!(operation.service, "product-service");
    assert_eq!(operation.attributes["db.system.name"], "postgresql");
    assert!(!operation.attributes.contains_key("db.query.text"));
    assert_eq!((request.kind, &*request.unit), ("histogram", "s"));
    assert_eq!(request.attributes["http.response.status_code"], 200);

    let received = receiver.received();
    for (name, kind, unit) in [
        ("http.server.active_requests", "sum", "{request}"),
        ("db.client.connection.count", "sum", "{connection}"),
        ("db.client.connection.max", "sum", "{connection}"),
        ("db.client.connection.pending_requests", "sum", "{request}"),
        ("db.client.connection.wait_time", "histogram", "s"),
        ("db.client.connection.use_time", "histogram", "s"),
        ("otel.sdk.exporter.span.exported", "counter", "{span}"),
    ] {
        let point = received.points.iter().find(|point| point.name == name);
        let point = point.unwrap_or_else(|| panic!("no {name}"));
        assert_eq!((point.kind, &*point.unit), (kind, unit), "{name}");
    }
    let of_pool = |name: &str, state: Option<&str>| {
        let mut points = received.points.iter().rev();
        let point = points.find(|point| {
            point.name == name
                && point
                    .attributes
                    .get("db.client.connection.state")
                    .and_then(Value::as_str)
                    == state
        });
        let point = point.unwrap();
        assert_eq!(
            point.attributes["db.client.connection.pool.name"],
            service.database
        );
        point.value
    };
    assert_eq!(of_pool("db.client.connection.max", None), 15.0);
    assert!(of_pool("db.client.connection.count", Some("idle")) >= 1.0);
    assert!(of_pool("db.client.connection.count", Some("used")) <= 15.0);
}

/// With `database` the old names are left out, and the scene's own stay.
#[tokio::test(flavor = "multi_thread")]
async fn old_names_can_be_left_out() {
    let receiver = Receiver::grpc().await;
    let service = Service::product(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint),
        ("OTEL_SEMCONV_STABILITY_OPT_IN", "database"),
        ("OTEL_SERVICE_NAME", "renamed"),
    ])
    .await;
    get(&service.at("/products/1")).await;
    let span = receiver
        .wait("a statement", |received| {
            let mut all = received.spans.iter();
            all.find(|span| span.kind == 3).cloned()
        })
        .await;
    for old in ["db.system", "db.name", "db.statement", "net.peer.name"] {
        assert!(!span.attributes.contains_key(old), "{old}");
    }
    assert_eq!(span.attributes["db.namespace"], service.database);
    assert!(span.attributes.contains_key("db.connection_pool.active"));
    assert_eq!(span.service, "renamed");
}

/// By HTTP everything arrives as well.
#[tokio::test(flavor = "multi_thread")]
async fn http_is_an_option() {
    let receiver = Receiver::http().await;
    let service = Service::product(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
    ])
    .await;
    let trace = "11111111111111111111111111111111";
    let uri = service.at("/products/1");
    common::send_with("GET", &uri, &traceparent(trace))
        .await
        .unwrap();
    spans(&receiver, trace, 2).await;
    receiver
        .wait("metrics and logs", |received| {
            (!received.points.is_empty() && !received.logs.is_empty()).then_some(())
        })
        .await;
    let lines = service.stop().await;
    assert!(lines.contains("http/protobuf"), "{lines}");
    assert!(!lines.contains("WARN"), "{lines}");
}

/// Without a place to send it to, a service works, says so once, and remembers.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_exported_without_an_endpoint() {
    let service = Service::product(&[]).await;
    let trace = "22222222222222222222222222222222";
    let uri = service.at("/products/search?q=wireless");
    let found = common::send_with("GET", &uri, &traceparent(trace)).await;
    assert_eq!(found.unwrap().status, 200);
    assert_eq!(service.count("telemetry is not exported"), 1);

    // Health is asked every second, and is no trace of anybody.
    get(&service.at("/health")).await;
    let listed = get(&service.at("/debug/traces?limit=5")).await.json();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    assert_eq!(listed[0]["trace_id"], trace);
    assert_eq!(listed[0]["root"], "GET /products/search");
    assert_eq!(listed[0]["error"], false);
    assert!(listed[0]["spans"].as_u64() >= Some(2));
    assert!(listed[0]["duration_ms"].as_f64() > Some(0.0));

    let whole = get(&service.at(&format!("/debug/traces/{trace}")))
        .await
        .json();
    let spans = whole["spans"].as_array().unwrap();
    assert_eq!(spans[0]["kind"], "server");
    assert_eq!(spans[0]["parent_span_id"], CALLER);
    let client = spans.iter().find(|span| span["kind"] == "client").unwrap();
    let database = &*service.database;
    assert_eq!(client["name"], format!("SELECT {database}.products"));
    assert_eq!(client["parent_span_id"], spans[0]["span_id"]);
    assert_eq!(client["service"], "product-service");
    assert_eq!(client["attributes"]["db.namespace"], database);

    for (path, status, code) in [
        ("/debug/traces?limit=0", 400, "limit_out_of_range"),
        ("/debug/traces/1", 400, "bad_trace_id"),
        (
            "/debug/traces/33333333333333333333333333333333",
            404,
            "no_such_trace",
        ),
        ("/debug/logs?level=loud", 400, "bad_level"),
    ] {
        assert_eq!(get(&service.at(path)).await.problem(status), code, "{path}");
    }
    let lines = service.stop().await;
    assert!(!lines.contains("telemetry was lost"), "{lines}");
}

/// The number behind `name=` in a line.
#[track_caller]
fn figure(line: &str, name: &str) -> u64 {
    let mut fields = line.split(' ').filter_map(|field| field.split_once('='));
    let (_, value) = fields.find(|(key, _)| *key == name).unwrap();
    value.parse().unwrap()
}

/// A receiver that is down: every request is answered, one warning a signal, and the end tells
/// how much was lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_is_down_costs_a_warning() {
    // A port that was free a moment ago: nobody listens.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let endpoint = format!("http://{port}");
    let service = Service::product(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint)]).await;
    for _ in 0..20 {
        assert_eq!(get(&service.at("/products/1")).await.status, 200);
    }
    common::eventually("a warning", || service.count("cannot be exported") >= 3);
    let lines = service.stop().await;
    for signal in ["spans", "log records", "metrics"] {
        let warning = format!("signal=\"{signal}\"");
        let is_warning = |line: &&str| line.contains("cannot be exported");
        let warnings = lines.lines().filter(is_warning);
        let count = warnings.filter(|line| line.contains(&warning)).count();
        assert_eq!(count, 1, "{signal}: {lines}");
    }
    let lost = lines.lines().find(|l| l.contains("telemetry was lost"));
    let lost = lost.unwrap();
    assert!(lost.contains("signal=\"spans\""), "{lines}");
    assert!(figure(lost, "lost") >= 40, "{lost}");
    assert_eq!(figure(lost, "delivered"), 0);
}

/// A receiver that takes connections and answers nothing: the queue fills, the rest is dropped and
/// counted, requests go on, and the service still ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_hangs_blocks_nobody() {
    let hanging = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", hanging.local_addr().unwrap());
    let service = Service::product(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "16"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "60000"),
    ])
    .await;
    for _ in 0..50 {
        assert_eq!(get(&service.at("/products/1")).await.status, 200);
    }
    let lines = service.stop().await;
    let lost = lines.lines().find(|l| l.contains("telemetry was lost"));
    let lost = lost.unwrap();
    assert!(lost.contains("signal=\"spans\""), "{lines}");
    assert!(figure(lost, "lost") >= 100, "{lost}");
    assert_eq!(figure(lost, "queue_full"), figure(lost, "lost") - 16);
    assert_eq!(figure(lost, "unsent"), 16);
}
