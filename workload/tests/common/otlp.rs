//! A receiver of OTLP, by gRPC and by HTTP, that keeps what it is sent.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::http::StatusCode;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{
    LogsService, LogsServiceServer,
};
use opentelemetry_proto::tonic::collector::logs::v1::{
    ExportLogsServiceRequest, ExportLogsServiceResponse,
};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsServiceRequest, ExportMetricsServiceResponse,
};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{Metric as MetricMessage, metric, number_data_point};
use opentelemetry_proto::tonic::resource::v1::Resource;
use prost::Message;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// Attributes as JSON, by name.
pub type Attributes = BTreeMap<String, Value>;

/// A span as it arrived.
#[derive(Debug, Clone)]
pub struct Span {
    pub service: String,
    pub trace: String,
    pub id: String,
    /// Empty at the beginning of a trace.
    pub parent: String,
    pub name: String,
    /// 1 internal, 2 server, 3 client.
    pub kind: i32,
    /// 0 unset, 1 ok, 2 error.
    pub status: i32,
    pub milliseconds: f64,
    pub attributes: Attributes,
}

/// A log record as it arrived.
#[derive(Debug, Clone)]
pub struct Log {
    pub service: String,
    pub trace: String,
    pub span: String,
    pub severity: String,
    pub body: Value,
    pub attributes: Attributes,
}

/// A data point of a metric as it arrived.
#[derive(Debug, Clone)]
pub struct Point {
    pub service: String,
    pub name: String,
    pub unit: String,
    /// `histogram`, `sum` (that may fall) or `counter`.
    pub kind: &'static str,
    pub bounds: Vec<f64>,
    /// A sum's value, a histogram's count.
    pub value: f64,
    pub attributes: Attributes,
}

/// What has arrived.
#[derive(Debug, Default)]
pub struct Received {
    pub spans: Vec<Span>,
    pub logs: Vec<Log>,
    pub points: Vec<Point>,
    /// The attributes of every resource, by service.
    pub resources: BTreeMap<String, Attributes>,
}

/// A server that ends when it is dropped.
pub struct Receiver {
    pub endpoint: String,
    received: Arc<Mutex<Received>>,
    server: JoinHandle<()>,
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Receiver {
    /// OTLP by gRPC.
    pub async fn grpc() -> Self {
        let (listener, address) = listen().await;
        let received = Arc::new(Mutex::new(Received::default()));
        let sink = Sink(Arc::clone(&received));
        let serving = Server::builder()
            .add_service(TraceServiceServer::new(sink.clone()))
            .add_service(MetricsServiceServer::new(sink.clone()))
            .add_service(LogsServiceServer::new(sink))
            .serve_with_incoming(TcpIncoming::from(listener));
        Self {
            endpoint: format!("http://{address}"),
            received,
            server: tokio::spawn(async { serving.await.unwrap() }),
        }
    }

    /// OTLP by HTTP, with protobuf.
    pub async fn http() -> Self {
        let (listener, address) = listen().await;
        let received = Arc::new(Mutex::new(Received::default()));
        let sink = Sink(Arc::clone(&received));
        let app = Router::new()
            .route("/v1/traces", accept(&sink, Sink::traces))
            .route("/v1/metrics", accept(&sink, Sink::metrics))
            .route("/v1/logs", accept(&sink, Sink::logs));
        let listener = listener.into_std().unwrap();
        let serving = axum_server::from_tcp(listener).unwrap();
        Self {
            endpoint: format!("http://{address}"),
            received,
            server: tokio::spawn(async { serving.serve(app.into_make_service()).await.unwrap() }),
        }
    }

    /// Waits until what has arrived holds something, and gives that.
    #[track_caller]
    pub fn wait<T>(
        &self,
        what: &str,
        find: impl FnMut(&Received) -> Option<T>,
    ) -> impl Future<Output = T> {
        let caller = std::panic::Location::caller();
        self.wait_from(caller, what.to_owned(), find)
    }

    async fn wait_from<T>(
        &self,
        caller: &'static std::panic::Location<'static>,
        what: String,
        mut find: impl FnMut(&Received) -> Option<T>,
    ) -> T {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(found) = find(&self.received()) {
                return found;
            }
            if Instant::now() > deadline {
                panic!("{caller}: {what} did not arrive: {:#?}", self.received());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn received(&self) -> MutexGuard<'_, Received> {
        self.received.lock().unwrap()
    }
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A route that decodes a message and keeps it.
fn accept<M: Message + Default + 'static>(
    sink: &Sink,
    keep: fn(&Sink, M),
) -> axum::routing::MethodRouter {
    let sink = sink.clone();
    post(move |body: Bytes| async move {
        match M::decode(body) {
            Ok(message) => keep(&sink, message),
            Err(_) => return StatusCode::BAD_REQUEST,
        }
        StatusCode::OK
    })
}

#[derive(Clone)]
struct Sink(Arc<Mutex<Received>>);

impl Sink {
    fn service(received: &mut Received, resource: Option<Resource>) -> String {
        let attributes = attributes(resource.unwrap().attributes);
        let service = attributes["service.name"].as_str().unwrap().to_owned();
        received.resources.insert(service.clone(), attributes);
        service
    }

    fn traces(&self, message: ExportTraceServiceRequest) {
        let mut received = self.0.lock().unwrap();
        for group in message.resource_spans {
            let service = Self::service(&mut received, group.resource);
            let spans = group.scope_spans.into_iter().flat_map(|scope| scope.spans);
            received.spans.extend(spans.map(|span| Span {
                service: service.clone(),
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                name: span.name,
                kind: span.kind,
                status: span.status.map_or(0, |status| status.code),
                milliseconds: (span.end_time_unix_nano - span.start_time_unix_nano) as f64 / 1e6,
                attributes: attributes(span.attributes),
            }));
        }
    }

    fn logs(&self, message: ExportLogsServiceRequest) {
        let mut received = self.0.lock().unwrap();
        for group in message.resource_logs {
            let service = Self::service(&mut received, group.resource);
            let logs = group.scope_logs.into_iter().flat_map(|s| s.log_records);
            received.logs.extend(logs.map(|log| Log {
                service: service.clone(),
                trace: hex(&log.trace_id),
                span: hex(&log.span_id),
                severity: log.severity_text,
                body: json(log.body),
                attributes: attributes(log.attributes),
            }));
        }
    }

    fn metrics(&self, message: ExportMetricsServiceRequest) {
        let mut received = self.0.lock().unwrap();
        for group in message.resource_metrics {
            let service = Self::service(&mut received, group.resource);
            let metrics = group.scope_metrics.into_iter().flat_map(|s| s.metrics);
            let points = metrics.flat_map(|metric| points(&service, metric));
            received.points.extend(points);
        }
    }
}

fn points(service: &str, metric: MetricMessage) -> Vec<Point> {
    let point = |kind, bounds, value, pairs| Point {
        service: service.to_owned(),
        name: metric.name.clone(),
        unit: metric.unit.clone(),
        kind,
        bounds,
        value,
        attributes: attributes(pairs),
    };
    match metric.data.unwrap() {
        metric::Data::Histogram(histogram) => histogram
            .data_points
            .into_iter()
            .map(|p| point("histogram", p.explicit_bounds, p.count as f64, p.attributes))
            .collect(),
        metric::Data::Sum(sum) => {
            let kind = if sum.is_monotonic { "counter" } else { "sum" };
            let points = sum.data_points.into_iter();
            points
                .map(|p| {
                    let value = match p.value.unwrap() {
                        number_data_point::Value::AsDouble(value) => value,
                        number_data_point::Value::AsInt(value) => value as f64,
                    };
                    point(kind, Vec::new(), value, p.attributes)
                })
                .collect()
        }
        other => panic!("{}: {other:?}", metric.name),
    }
}

#[tonic::async_trait]
impl TraceService for Sink {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.traces(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Sink {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.metrics(request.into_inner());
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Sink {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        self.logs(request.into_inner());
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attributes(pairs: Vec<KeyValue>) -> Attributes {
    let count = pairs.len();
    let attributes: Attributes = pairs
        .into_iter()
        .map(|pair| (pair.key, json(pair.value)))
        .collect();
    assert_eq!(attributes.len(), count, "a key stands twice");
    attributes
}

fn json(value: Option<AnyValue>) -> Value {
    match value.and_then(|value| value.value) {
        Some(any_value::Value::StringValue(text)) => text.into(),
        Some(any_value::Value::IntValue(number)) => number.into(),
        Some(any_value::Value::DoubleValue(number)) => number.into(),
        Some(any_value::Value::BoolValue(value)) => value.into(),
        None => Value::Null,
        other => panic!("{other:?}"),
    }
}
