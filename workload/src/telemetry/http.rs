//! HTTP as OpenTelemetry describes it: a SERVER span for each request that is served, a CLIENT span
//! for each that is made, the trace context between them, and both durations.

mod client;
mod server;

use axum::http::{HeaderMap, Method};
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry_http::HeaderInjector;
use opentelemetry_sdk::propagation::TraceContextPropagator;

pub use client::call;
pub use server::serve;

/// Seconds; the conventions' own, and finer where a storm's requests lie.
const BUCKETS: [f64; 17] = [
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 2.5, 3.0, 3.5, 5.0, 7.5, 10.0,
];

/// `error.type` of a request that nobody waits for any more.
const ABANDONED: &str = "abandoned";

/// Writes the current trace context into an outgoing request's headers ([`call`] does it by itself).
pub fn inject(headers: &mut HeaderMap) {
    TraceContextPropagator::new().inject(&mut HeaderInjector(headers));
}

/// A method by its name; unknown ones share a name, or clients could make any number of series.
fn method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "_OTHER",
    }
}
