//! The real OpenTelemetry Collector takes what a service sends.
//!
//! It is built by `scripts/collector.sh` (Go, some minutes); where it was not, the test says so and
//! ends.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::recording::skipped;
use common::{Watched, eventually, get, product, scratch};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Where `scripts/collector.sh` puts it.
fn program() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/bin/otelcol")
}

/// A running Collector; it ends with this.
struct Collector {
    child: Child,
    directory: PathBuf,
    grpc: u16,
    http: u16,
}

impl Collector {
    fn start() -> Self {
        let directory = scratch("collector");
        fs::create_dir(&directory).unwrap();
        let (grpc, http) = (free_port(), free_port());
        let received = directory.join("received.jsonl");
        // JSON is YAML.
        let pipeline = serde_json::json!({ "receivers": ["otlp"], "exporters": ["file"] });
        let configuration = serde_json::json!({
            "receivers": { "otlp": { "protocols": {
                "grpc": { "endpoint": format!("127.0.0.1:{grpc}") },
                "http": { "endpoint": format!("127.0.0.1:{http}") },
            } } },
            "exporters": { "file": { "path": received, "flush_interval": "100ms" } },
            "service": {
                "telemetry": { "metrics": { "level": "none" } },
                "pipelines": { "traces": pipeline, "metrics": pipeline, "logs": pipeline },
            },
        });
        let file = directory.join("configuration.yaml");
        fs::write(&file, configuration.to_string()).unwrap();
        let child = Command::new(program())
            .arg("--config")
            .arg(&file)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let collector = Self {
            child,
            directory,
            grpc,
            http,
        };
        for port in [grpc, http] {
            eventually("the Collector listens", || {
                TcpStream::connect(("127.0.0.1", port)).is_ok()
            });
        }
        collector
    }

    /// What it has written, one message of OTLP a line.
    fn received(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.directory.join("received.jsonl")).unwrap_or_default();
        let lines = text.lines();
        lines
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// All objects below `key`s in what it has written.
    fn all(&self, key: &str) -> Vec<Value> {
        let mut found = Vec::new();
        for message in self.received() {
            collect(&message, key, &mut found);
        }
        found
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, Signal::SIGTERM).unwrap();
        common::wait(&mut self.child);
        fs::remove_dir_all(&self.directory).unwrap();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn collect(value: &Value, key: &str, found: &mut Vec<Value>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| collect(value, key, found)),
        Value::Object(members) => {
            for (name, member) in members {
                match member {
                    Value::Array(values) if name == key => found.extend_from_slice(values),
                    member => collect(member, key, found),
                }
            }
        }
        _ => {}
    }
}

/// The text of an attribute, in the Collector's JSON.
fn text<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    let attributes = object["attributes"].as_array()?;
    let found = attributes.iter().find(|pair| pair["key"] == key)?;
    found["value"]["stringValue"].as_str()
}

/// Traces, metrics and logs arrive by both protocols.
#[tokio::test(flavor = "multi_thread")]
async fn the_collector_understands() {
    if !program().exists() {
        return skipped("no Collector: scripts/collector.sh builds one");
    }
    for protocol in ["grpc", "http/protobuf"] {
        let collector = tokio::task::spawn_blocking(Collector::start).await.unwrap();
        let port = match protocol {
            "grpc" => collector.grpc,
            _ => collector.http,
        };
        let url = common::database().await;
        let mut command = product(&url);
        command
            .env(
                "OTEL_EXPORTER_OTLP_ENDPOINT",
                format!("http://127.0.0.1:{port}"),
            )
            .env("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
            .env("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip");
        let start = move || Watched::start(&mut command, "listening on ");
        let service = tokio::task::spawn_blocking(start).await.unwrap();
        let found = get(&format!("{}/products/search?q=wireless", service.announced)).await;
        assert_eq!(found.status, 200);
        // What is unsent is sent at the end.
        let mut service = service;
        service.signal(Signal::SIGTERM);
        tokio::task::spawn_blocking(move || assert!(service.wait().success()))
            .await
            .unwrap();

        eventually("all three signals", || {
            ["spans", "metrics", "logRecords"]
                .iter()
                .all(|signal| !collector.all(signal).is_empty())
        });
        let spans = collector.all("spans");
        let server = spans.iter().find(|s| s["name"] == "GET /products/search");
        let client = spans.iter().find(|s| text(s, "db.query.text").is_some());
        let (server, client) = (server.unwrap(), client.unwrap());
        assert_eq!(client["parentSpanId"], server["spanId"], "{protocol}");
        assert_eq!(client["kind"], 3, "{protocol}");
        assert_eq!(text(client, "db.system.name"), Some("postgresql"));
        let metrics = collector.all("metrics");
        let duration = |m: &&Value| m["name"] == "db.client.operation.duration";
        assert_eq!(metrics.iter().find(duration).unwrap()["unit"], "s");
        let resources = collector.all("resourceSpans");
        assert_eq!(
            text(&resources[0]["resource"], "service.name"),
            Some("product-service")
        );
    }
}
