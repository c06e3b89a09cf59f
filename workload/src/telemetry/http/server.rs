//! Requests that are served.

use std::sync::LazyLock;
use std::time::Instant;

use axum::extract::{MatchedPath, Request};
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use opentelemetry::context::FutureExt;
use opentelemetry::metrics::{Histogram, UpDownCounter};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{SpanKind, Status, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::HeaderExtractor;
use opentelemetry_sdk::propagation::TraceContextPropagator;

use super::{ABANDONED, BUCKETS, method};
use crate::telemetry::SCOPE;

/// Asked every second by machines and by pages that show what goes on. Traced only when the caller
/// traces, or they would bury the shop's own requests.
const PROBES: [&str; 7] = [
    "/health",
    "/debug/",
    "/api/status",
    "/api/traces",
    "/api/logs",
    "/api/demo/storm",
    "/assets/",
];

static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

struct Metrics {
    duration: Histogram<f64>,
    active: UpDownCounter<i64>,
}

impl Metrics {
    fn new() -> Self {
        let meter = opentelemetry::global::meter(SCOPE);
        Self {
            duration: meter
                .f64_histogram("http.server.request.duration")
                .with_unit("s")
                .with_description("Duration of HTTP server requests.")
                .with_boundaries(BUCKETS.to_vec())
                .build(),
            active: meter
                .i64_up_down_counter("http.server.active_requests")
                .with_unit("{request}")
                .with_description("Number of active HTTP server requests.")
                .build(),
        }
    }
}

/// Middleware (`axum::middleware::from_fn`): serves a request inside a SERVER span that continues
/// the caller's trace, and measures it.
pub async fn serve(path: Option<MatchedPath>, request: Request, next: Next) -> Response {
    let mut exchange = Exchange::begin(path.as_ref(), &request);
    let context = exchange.context.clone();
    let response = next.run(request).with_context(context).await;
    exchange.end(&response);
    response
}

/// A request that is being served. Dropped before its end, it tells that its client has gone.
struct Exchange {
    context: Context,
    started: Instant,
    /// What the metrics are told apart by.
    labels: Vec<KeyValue>,
    ended: bool,
}

impl Exchange {
    fn begin(path: Option<&MatchedPath>, request: &Request) -> Self {
        let method = method(request.method());
        let route = path.map(MatchedPath::as_str);
        let labels = vec![
            KeyValue::new("http.request.method", method),
            KeyValue::new("url.scheme", "http"),
        ];
        METRICS.active.add(1, &labels);
        Self {
            context: context_of(method, route, request),
            started: Instant::now(),
            labels: labels
                .into_iter()
                .chain(route.map(|route| KeyValue::new("http.route", route.to_owned())))
                .collect(),
            ended: false,
        }
    }

    fn end(&mut self, response: &Response) {
        let status = response.status();
        let code = KeyValue::new("http.response.status_code", i64::from(status.as_u16()));
        self.context.span().set_attribute(code.clone());
        self.labels.push(code);
        if status.is_server_error() {
            self.fail(status.as_str().to_owned());
        }
        self.close();
    }

    fn fail(&mut self, kind: String) {
        let kind = KeyValue::new("error.type", kind);
        let span = self.context.span();
        span.set_attribute(kind.clone());
        span.set_status(Status::error(""));
        self.labels.push(kind);
    }

    fn close(&mut self) {
        self.ended = true;
        self.context.span().end();
        // By the conventions the active ones know neither route nor outcome.
        METRICS.active.add(-1, &self.labels[..2]);
        METRICS
            .duration
            .record(self.started.elapsed().as_secs_f64(), &self.labels);
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.ended {
            self.fail(ABANDONED.to_owned());
            self.close();
        }
    }
}

/// The context with the request's span, or the caller's own for a probe.
fn context_of(method: &'static str, route: Option<&str>, request: &Request) -> Context {
    let parent = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &HeaderExtractor(request.headers()));
    let path = request.uri().path();
    let is_probe = PROBES.iter().any(|probe| path.starts_with(probe));
    if is_probe && !parent.span().span_context().is_sampled() {
        return parent;
    }
    let name = match route {
        Some(route) => format!("{method} {route}"),
        None => method.to_owned(),
    };
    let tracer = opentelemetry::global::tracer(SCOPE);
    let span = tracer
        .span_builder(name)
        .with_kind(SpanKind::Server)
        .with_attributes(attributes(method, route, request))
        .start_with_context(&tracer, &parent);
    parent.with_span(span)
}

/// By the conventions for HTTP servers. The query stays out: it holds what a visitor typed.
fn attributes(method: &'static str, route: Option<&str>, request: &Request) -> Vec<KeyValue> {
    let mut attributes = vec![
        KeyValue::new("http.request.method", method),
        KeyValue::new("url.scheme", "http"),
        KeyValue::new("url.path", request.uri().path().to_owned()),
    ];
    if let Some(route) = route {
        attributes.push(KeyValue::new("http.route", route.to_owned()));
    }
    let host = request.headers().get(header::HOST);
    if let Some(host) = host.and_then(|host| host.to_str().ok()?.parse().ok()) {
        let host: axum::http::uri::Authority = host;
        attributes.push(KeyValue::new("server.address", host.host().to_owned()));
        if let Some(port) = host.port_u16() {
            attributes.push(KeyValue::new("server.port", i64::from(port)));
        }
    }
    attributes
}
