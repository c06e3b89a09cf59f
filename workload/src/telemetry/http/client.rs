//! Requests that are made.

use std::sync::LazyLock;
use std::time::Instant;

use axum::http::{Request, Response, StatusCode, Uri};
use opentelemetry::context::FutureExt;
use opentelemetry::metrics::Histogram;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{SpanKind, Status, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::HeaderInjector;
use opentelemetry_sdk::propagation::TraceContextPropagator;

use super::{ABANDONED, BUCKETS, method};
use crate::telemetry::SCOPE;

/// `error.type` of a request that got no answer.
const UNANSWERED: &str = "unanswered";

static DURATION: LazyLock<Histogram<f64>> = LazyLock::new(|| {
    opentelemetry::global::meter(SCOPE)
        .f64_histogram("http.client.request.duration")
        .with_unit("s")
        .with_description("Duration of HTTP client requests.")
        .with_boundaries(BUCKETS.to_vec())
        .build()
});

/// Sends `request` by `send`, inside a CLIENT span that the receiver's trace continues. The span is
/// named by the method and `template`, the path without what differs from request to request. What
/// is asked in no trace (a probe) begins none.
pub async fn call<B, R, E>(
    template: &'static str,
    mut request: Request<B>,
    send: impl AsyncFnOnce(Request<B>) -> Result<Response<R>, E>,
) -> Result<Response<R>, E> {
    let mut exchange = Exchange::begin(template, &request);
    let context = exchange.context.clone();
    TraceContextPropagator::new()
        .inject_context(&context, &mut HeaderInjector(request.headers_mut()));
    let answer = send(request).with_context(context).await;
    exchange.end(answer.as_ref().ok().map(Response::status));
    answer
}

/// A request under way. Dropped before its end, it tells that nobody waits for it any more.
struct Exchange {
    context: Context,
    started: Instant,
    labels: Vec<KeyValue>,
    ended: bool,
}

impl Exchange {
    fn begin<B>(template: &'static str, request: &Request<B>) -> Self {
        let method = method(request.method());
        let mut labels = vec![KeyValue::new("http.request.method", method)];
        labels.extend(address(request.uri()));
        let mut context = Context::current();
        if context.span().span_context().is_valid() {
            let mut attributes = labels.clone();
            attributes.push(KeyValue::new("url.full", without_query(request.uri())));
            attributes.push(KeyValue::new("url.template", template));
            let tracer = opentelemetry::global::tracer(SCOPE);
            let span = tracer
                .span_builder(format!("{method} {template}"))
                .with_kind(SpanKind::Client)
                .with_attributes(attributes)
                .start(&tracer);
            context = context.with_span(span);
        }
        Self {
            context,
            started: Instant::now(),
            labels,
            ended: false,
        }
    }

    fn end(&mut self, status: Option<StatusCode>) {
        if let Some(status) = status {
            let code = KeyValue::new("http.response.status_code", i64::from(status.as_u16()));
            self.context.span().set_attribute(code.clone());
            self.labels.push(code);
        }
        match status {
            None => self.fail(UNANSWERED.to_owned()),
            // To a client an answer that blames it is a failure as well.
            Some(status) if status.is_client_error() || status.is_server_error() => {
                self.fail(status.as_str().to_owned());
            }
            Some(_) => {}
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
        DURATION.record(self.started.elapsed().as_secs_f64(), &self.labels);
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

fn address(uri: &Uri) -> Vec<KeyValue> {
    let host = uri.host().unwrap_or_default().to_owned();
    let mut address = vec![KeyValue::new("server.address", host)];
    if let Some(port) = uri.port_u16() {
        address.push(KeyValue::new("server.port", i64::from(port)));
    }
    address
}

/// The query holds what a visitor typed.
fn without_query(uri: &Uri) -> String {
    let text = uri.to_string();
    match text.split_once('?') {
        Some((before, _)) => before.to_owned(),
        None => text,
    }
}
