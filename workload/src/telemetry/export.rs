//! OTLP exporters as the standard `OTEL_*` variables want them, and queues in front of them that
//! never make a request wait.
//!
//! The SDK's batch processors have threads of their own, in which no tokio runtime is entered; the
//! exporters need one. So each export is polled inside the exporters' runtime, and under a limit.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use opentelemetry::{Context, InstrumentationScope};
use opentelemetry_http::hyper::HyperClient;
use opentelemetry_otlp::tonic_types::transport::ClientTlsConfig;
use opentelemetry_otlp::{ExporterBuildError, WithHttpConfig, WithTonicConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::logs::{LogBatch, LogExporter, LogProcessor, SdkLogRecord};
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::{Span, SpanData, SpanExporter, SpanProcessor};
use tokio::runtime::Handle;

use super::loss::Account;

/// What an export may take when `OTEL_EXPORTER_OTLP_TIMEOUT` does not say.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The exporters' own limit does not count the time to connect.
const TO_CONNECT: Duration = Duration::from_secs(2);

/// Where a signal goes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Destination {
    /// The URL, as it was given.
    pub(super) endpoint: String,
    /// Whether by HTTP with protobuf instead of gRPC.
    pub(super) http: bool,
    timeout: Duration,
}

impl Destination {
    /// Where `signal` (`TRACES`, `METRICS`, `LOGS`) is to go; `None` when nowhere.
    pub(super) fn of(signal: &str) -> Option<Self> {
        Self::from_variables(signal, |name| {
            std::env::var(name).ok().filter(|value| !value.is_empty())
        })
    }

    fn from_variables(signal: &str, variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let disabled = variable("OTEL_SDK_DISABLED");
        if disabled.is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return None;
        }
        if variable(&format!("OTEL_{signal}_EXPORTER")).is_some_and(|value| value == "none") {
            return None;
        }
        let otlp = |what: &str| {
            variable(&format!("OTEL_EXPORTER_OTLP_{signal}_{what}"))
                .or_else(|| variable(&format!("OTEL_EXPORTER_OTLP_{what}")))
        };
        let timeout = otlp("TIMEOUT").and_then(|text| text.parse().ok());
        Some(Self {
            endpoint: otlp("ENDPOINT")?,
            http: otlp("PROTOCOL").is_some_and(|protocol| protocol.starts_with("http")),
            timeout: timeout.map_or(TIMEOUT, Duration::from_millis),
        })
    }

    /// The word for it in `OTEL_EXPORTER_OTLP_PROTOCOL`.
    pub(super) fn protocol(&self) -> &'static str {
        if self.http { "http/protobuf" } else { "grpc" }
    }

    /// An exporter of spans. Must be called inside the exporters' runtime.
    pub(super) fn spans(&self) -> Result<opentelemetry_otlp::SpanExporter, ExporterBuildError> {
        let builder = opentelemetry_otlp::SpanExporter::builder();
        if self.http {
            return builder.with_http().with_http_client(self.client()?).build();
        }
        builder.with_tonic().with_tls_config(tls()).build()
    }

    /// An exporter of log records. Must be called inside the exporters' runtime.
    pub(super) fn logs(&self) -> Result<opentelemetry_otlp::LogExporter, ExporterBuildError> {
        let builder = opentelemetry_otlp::LogExporter::builder();
        if self.http {
            return builder.with_http().with_http_client(self.client()?).build();
        }
        builder.with_tonic().with_tls_config(tls()).build()
    }

    /// An exporter of metrics. Must be called inside the exporters' runtime.
    pub(super) fn metrics(&self) -> Result<opentelemetry_otlp::MetricExporter, ExporterBuildError> {
        let builder = opentelemetry_otlp::MetricExporter::builder();
        if self.http {
            return builder.with_http().with_http_client(self.client()?).build();
        }
        builder.with_tonic().with_tls_config(tls()).build()
    }

    fn client(&self) -> Result<HyperClient<HttpsConnector<HttpConnector>>, ExporterBuildError> {
        let connector = HttpsConnectorBuilder::new()
            .with_native_roots()
            .map_err(|error| ExporterBuildError::InternalFailure(error.to_string()))?
            .https_or_http()
            .enable_http1()
            .build();
        Ok(HyperClient::new(connector, self.timeout, None))
    }
}

/// Trust in what the system trusts. Counts for `https` alone.
fn tls() -> ClientTlsConfig {
    ClientTlsConfig::new().with_native_roots()
}

/// An exporter whose outcomes are counted, polled inside the runtime that it needs.
#[derive(Debug)]
pub(super) struct Counted<E> {
    exporter: E,
    account: Arc<Account>,
    runtime: Handle,
    limit: Duration,
}

impl<E> Counted<E> {
    pub(super) fn new(
        exporter: E,
        account: Arc<Account>,
        runtime: Handle,
        destination: &Destination,
    ) -> Self {
        Self {
            exporter,
            account,
            runtime,
            limit: destination.timeout + TO_CONNECT,
        }
    }

    /// Runs an export of `count` things, and counts what becomes of them.
    async fn run(
        &self,
        count: usize,
        export: impl Future<Output = OTelSdkResult>,
    ) -> OTelSdkResult {
        let limited = {
            let _inside = self.runtime.enter();
            tokio::time::timeout(self.limit, export)
        };
        let mut limited = std::pin::pin!(limited);
        let outcome = std::future::poll_fn(|context| {
            let _inside = self.runtime.enter();
            limited.as_mut().poll(context)
        });
        let outcome = outcome
            .await
            .unwrap_or(Err(OTelSdkError::Timeout(self.limit)));
        self.account.settle(count, &outcome);
        outcome
    }
}

impl<E: SpanExporter> SpanExporter for Counted<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let count = batch.len();
        self.run(count, self.exporter.export(batch)).await
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: LogExporter> LogExporter for Counted<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let count = batch.iter().count();
        self.run(count, self.exporter.export(batch)).await
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: PushMetricExporter> PushMetricExporter for Counted<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        self.run(1, self.exporter.export(metrics)).await
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}

/// A batch processor of the SDK that is only given what it has room for: it would drop the rest
/// as well, but not tell how much.
#[derive(Debug)]
pub(super) struct Bounded<P> {
    processor: P,
    account: Arc<Account>,
}

impl<P> Bounded<P> {
    pub(super) fn new(processor: P, account: Arc<Account>) -> Self {
        Self { processor, account }
    }
}

impl<P: SpanProcessor> SpanProcessor for Bounded<P> {
    fn on_start(&self, span: &mut Span, context: &Context) {
        self.processor.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if span.span_context.is_sampled() && self.account.admit() {
            self.processor.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.processor.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.processor.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.processor.set_resource(resource);
    }
}

impl<P: LogProcessor> LogProcessor for Bounded<P> {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        if self.account.admit() {
            self.processor.emit(record, scope);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.processor.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.processor.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.processor.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destination(signal: &str, variables: &[(&str, &str)]) -> Option<Destination> {
        Destination::from_variables(signal, |name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    /// A signal's own variables go before the general ones, and nothing goes nowhere.
    #[test]
    fn variables_say_where_to() {
        assert_eq!(destination("TRACES", &[]), None);
        let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://one:4317");
        let traces = destination("TRACES", &[all]).unwrap();
        assert_eq!(traces.endpoint, "http://one:4317");
        assert_eq!((traces.protocol(), traces.timeout), ("grpc", TIMEOUT));

        let own = [
            all,
            ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "https://two/v1/logs"),
            ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "500"),
        ];
        let logs = destination("LOGS", &own).unwrap();
        assert_eq!(logs.endpoint, "https://two/v1/logs");
        assert_eq!(logs.protocol(), "http/protobuf");
        assert_eq!(logs.timeout, Duration::from_millis(500));
        assert_eq!(destination("TRACES", &own).unwrap().protocol(), "grpc");
    }

    /// Each way of saying that nothing is wanted is heard.
    #[test]
    fn variables_say_no() {
        let all = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://one:4317");
        let none = [all, ("OTEL_METRICS_EXPORTER", "none")];
        assert_eq!(destination("METRICS", &none), None);
        assert!(destination("LOGS", &none).is_some());
        assert_eq!(
            destination("LOGS", &[all, ("OTEL_SDK_DISABLED", "TRUE")]),
            None
        );
    }
}
