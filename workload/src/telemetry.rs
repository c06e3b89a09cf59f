//! Traces, metrics and logs of a service: by OTLP to wherever the standard `OTEL_*` variables say,
//! as lines on standard error, and in a bounded memory that the service itself can be asked for.
//!
//! The services speak to OpenTelemetry's own interface for spans and metrics, and to `tracing` for
//! logs: a span needs no bridge then, and no log filter can take one away.

pub mod database;
pub mod http;
pub mod memory;
pub mod span;
pub mod terminal;

mod context;
mod export;
mod loss;

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::ExporterBuildError;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{BatchLogProcessor, SdkLoggerProvider};
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::{BatchSpanProcessor, SdkTracerProvider};
use tokio::runtime::{Builder, Handle, Runtime};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use export::{Bounded, Counted, Destination};
use loss::Account;
use memory::{RememberLogs, RememberSpans};
pub use terminal::Lines;

/// The name under which the workload's own instruments and spans are reported.
const SCOPE: &str = "workload";

/// What services log without `RUST_LOG`.
const LEVEL: &str = "info,sqlx=warn";

/// How often metrics are sent without `OTEL_METRIC_EXPORT_INTERVAL`: a storm lasts half a minute,
/// and should be more than one point on a line.
const METRIC_INTERVAL: Duration = Duration::from_secs(5);

/// What is still unsent at the end has this long to be sent.
const SHUTDOWN: Duration = Duration::from_secs(3);

/// The size of a queue when its variable does not say; the specification's own.
const QUEUE: usize = 2048;

/// A service's telemetry, from [`start`] to [`Telemetry::shutdown`].
#[derive(Debug)]
pub struct Telemetry {
    tracer: SdkTracerProvider,
    meter: SdkMeterProvider,
    logger: SdkLoggerProvider,
    exports: Exports,
}

/// Starts the telemetry of `service`. It never fails: what cannot be exported is said in a log
/// line, and the service works without.
pub fn start(service: &'static str, lines: Lines) -> Telemetry {
    let resource = resource(service);
    let mut exports = Exports::default();
    // First of all, so that no thread enters a context that it would then leave unseen.
    context::thread::publish();
    let published = context::process::publish(&resource);
    let meter = exports.meter(resource.clone());
    opentelemetry::global::set_meter_provider(meter.clone());
    let tracer = exports.tracer(resource.clone(), service);
    opentelemetry::global::set_tracer_provider(tracer.clone());
    let logger = exports.logger(resource, service);
    let bridge =
        OpenTelemetryTracingBridge::new(&logger).with_filter(terminal::filter_for_export(LEVEL));
    let started = tracing_subscriber::registry()
        .with(terminal::layer(lines, Some(service), LEVEL))
        .with(bridge)
        .try_init();
    if let Err(error) = started {
        tracing::warn!(%error, "another subscriber has the log");
    }
    if let Err(error) = published {
        tracing::warn!(%error, "profilers cannot read this service's name");
    }
    exports.measure();
    exports.tell();
    Telemetry {
        tracer,
        meter,
        logger,
        exports,
    }
}

/// The routes `/debug/traces…` and `/debug/logs` of the memory.
pub fn routes<S: Clone + Send + Sync + 'static>() -> axum::Router<S> {
    memory::router()
}

impl Telemetry {
    /// Sends what is unsent, within three seconds, and tells what was lost. Blocks; call it when
    /// the service has ended.
    pub fn shutdown(self) {
        let deadline = Instant::now() + SHUTDOWN;
        let (tracer, logger, meter) = (self.tracer, self.logger, self.meter);
        within(
            deadline,
            [
                Box::new(move || tracer.shutdown_with_timeout(SHUTDOWN)) as Shutdown,
                Box::new(move || logger.shutdown_with_timeout(SHUTDOWN)),
            ],
        );
        // After the others, whose losses it counts.
        within(
            deadline,
            [Box::new(move || meter.shutdown_with_timeout(SHUTDOWN)) as Shutdown],
        );
        for account in &self.exports.accounts {
            account.close();
        }
        if let Some(runtime) = self.exports.runtime {
            runtime.shutdown_background();
        }
    }
}

type Shutdown = Box<dyn FnOnce() -> OTelSdkResult + Send>;

/// Runs all `steps` at once, and waits for them until `deadline`. A receiver that does not answer
/// keeps a step from ending; its thread then ends with the process.
fn within<const N: usize>(deadline: Instant, steps: [Shutdown; N]) {
    let (done, wait) = mpsc::channel();
    for step in steps {
        let done = done.clone();
        std::thread::spawn(move || {
            // A failure is in the account already. Nobody waits any more after the deadline.
            let _ = step();
            let _ = done.send(());
        });
    }
    for _ in 0..N {
        let left = deadline.saturating_duration_since(Instant::now());
        if wait.recv_timeout(left).is_err() {
            return;
        }
    }
}

/// Who speaks: the service, unless the variables name it otherwise, and this instance of it.
fn resource(service: &'static str) -> Resource {
    let detected = Resource::builder().build();
    let named = detected
        .get(&"service.name".into())
        .is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    let mut resource = Resource::builder_empty().with_attributes([
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("process.pid", i64::from(std::process::id())),
    ]);
    resource = resource.with_attributes(
        detected
            .iter()
            .map(|(key, value)| KeyValue::new(key.clone(), value.clone())),
    );
    if !named {
        resource = resource.with_service_name(service);
    }
    resource.build()
}

/// The exporters that there are, and what became of what they had.
#[derive(Debug, Default)]
struct Exports {
    /// The exporters' own: a busy service must not keep them waiting, and a profile shows their
    /// work apart. Made when the first is.
    runtime: Option<Runtime>,
    destinations: Vec<Destination>,
    accounts: Vec<Arc<Account>>,
    troubles: Vec<String>,
}

impl Exports {
    fn meter(&mut self, resource: Resource) -> SdkMeterProvider {
        let provider = SdkMeterProvider::builder().with_resource(resource);
        let account = Account::unqueued("metrics");
        let Some(exporter) = self.exporter("METRICS", &account, Destination::metrics) else {
            return provider.build();
        };
        let mut reader = PeriodicReader::builder(exporter);
        if std::env::var_os("OTEL_METRIC_EXPORT_INTERVAL").is_none() {
            reader = reader.with_interval(METRIC_INTERVAL);
        }
        provider.with_reader(reader.build()).build()
    }

    fn tracer(&mut self, resource: Resource, service: &'static str) -> SdkTracerProvider {
        let provider = SdkTracerProvider::builder()
            .with_resource(resource)
            .with_span_processor(RememberSpans { service });
        let limit = queue_size("OTEL_BSP_MAX_QUEUE_SIZE");
        let account = Account::queued("spans", "span", limit);
        let Some(exporter) = self.exporter("TRACES", &account, Destination::spans) else {
            return provider.build();
        };
        let batches = BatchSpanProcessor::builder(exporter).build();
        provider
            .with_span_processor(Bounded::new(batches, account))
            .build()
    }

    fn logger(&mut self, resource: Resource, service: &'static str) -> SdkLoggerProvider {
        let provider = SdkLoggerProvider::builder()
            .with_resource(resource)
            .with_log_processor(RememberLogs { service });
        let limit = queue_size("OTEL_BLRP_MAX_QUEUE_SIZE");
        let account = Account::queued("log records", "log", limit);
        let Some(exporter) = self.exporter("LOGS", &account, Destination::logs) else {
            return provider.build();
        };
        let batches = BatchLogProcessor::builder(exporter).build();
        provider
            .with_log_processor(Bounded::new(batches, account))
            .build()
    }

    /// An exporter of `signal`, where one is wanted and can be made.
    fn exporter<E>(
        &mut self,
        signal: &str,
        account: &Arc<Account>,
        make: impl FnOnce(&Destination) -> Result<E, ExporterBuildError>,
    ) -> Option<Counted<E>> {
        let destination = Destination::of(signal)?;
        let runtime = self.runtime()?;
        let made = {
            let _inside = runtime.enter();
            make(&destination)
        };
        match made {
            Ok(exporter) => {
                let account = Arc::clone(account);
                self.accounts.push(Arc::clone(&account));
                let counted = Counted::new(exporter, account, runtime, &destination);
                self.destinations.push(destination);
                Some(counted)
            }
            Err(error) => {
                self.troubles.push(format!("{signal}: {error}"));
                None
            }
        }
    }

    fn runtime(&mut self) -> Option<Handle> {
        if self.runtime.is_none() {
            let made = Builder::new_multi_thread()
                .worker_threads(1)
                .thread_name("telemetry")
                .enable_all()
                .build();
            match made {
                Ok(runtime) => self.runtime = Some(runtime),
                Err(error) => self.troubles.push(format!("no runtime: {error}")),
            }
        }
        self.runtime
            .as_ref()
            .map(|runtime| runtime.handle().clone())
    }

    fn measure(&self) {
        let meter = opentelemetry::global::meter(SCOPE);
        for account in &self.accounts {
            account.measure(&meter);
        }
    }

    /// Says once where telemetry goes, or that it goes nowhere.
    fn tell(&self) {
        for trouble in &self.troubles {
            tracing::warn!(error = trouble, "telemetry is not exported");
        }
        let mut told: Vec<&Destination> = Vec::new();
        for destination in &self.destinations {
            if !told.contains(&destination) {
                told.push(destination);
                tracing::info!(
                    endpoint = destination.endpoint,
                    protocol = destination.protocol(),
                    "telemetry is exported"
                );
            }
        }
        if told.is_empty() && self.troubles.is_empty() {
            tracing::info!(
                "telemetry is not exported: OTEL_EXPORTER_OTLP_ENDPOINT is not set; \
                 /debug/traces and /debug/logs show what is recent"
            );
        }
    }
}

/// What the SDK's own processor reads from `variable`.
fn queue_size(variable: &str) -> usize {
    let size = std::env::var(variable).ok();
    size.and_then(|size| size.parse().ok()).unwrap_or(QUEUE)
}
