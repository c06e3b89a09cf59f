//! The instruments of the conventions for database clients.

use std::sync::LazyLock;

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram, UpDownCounter};

use super::Connections;
use crate::telemetry::SCOPE;

/// Seconds. The conventions advise nothing between 1 and 5, where a storm's 95th percentile lies
/// (2.8) and its timeout (3.2).
const BUCKETS: [f64; 13] = [
    0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 2.5, 3.0, 3.5, 5.0, 10.0,
];

pub(super) static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

pub(super) struct Metrics {
    pub(super) duration: Histogram<f64>,
    pub(super) pending: UpDownCounter<i64>,
    pub(super) timeouts: Counter<u64>,
    pub(super) wait_time: Histogram<f64>,
    pub(super) use_time: Histogram<f64>,
}

impl Metrics {
    fn new() -> Self {
        let meter = opentelemetry::global::meter(SCOPE);
        let seconds = |name, description| {
            meter
                .f64_histogram(name)
                .with_unit("s")
                .with_description(description)
                .with_boundaries(BUCKETS.to_vec())
                .build()
        };
        Self {
            duration: seconds(
                "db.client.operation.duration",
                "Duration of database client operations.",
            ),
            wait_time: seconds(
                "db.client.connection.wait_time",
                "The time it took to obtain an open connection from the pool.",
            ),
            use_time: seconds(
                "db.client.connection.use_time",
                "The time between borrowing a connection and returning it to the pool.",
            ),
            pending: meter
                .i64_up_down_counter("db.client.connection.pending_requests")
                .with_unit("{request}")
                .with_description("The number of current pending requests for an open connection.")
                .build(),
            timeouts: meter
                .u64_counter("db.client.connection.timeouts")
                .with_unit("{timeout}")
                .with_description("The number of connection timeouts that have occurred trying to obtain a connection from the pool.")
                .build(),
        }
    }
}

/// Reports what `read` tells at each collection. sqlx has no bound of its own on idle connections
/// and does not tell how long one takes to make, so neither is reported.
pub(super) fn watch(
    pool: [KeyValue; 1],
    read: impl Fn() -> Connections + Send + Sync + Clone + 'static,
) {
    let meter = opentelemetry::global::meter(SCOPE);
    let [name] = pool;
    let label = name.clone();
    let now = read.clone();
    meter
        .i64_observable_up_down_counter("db.client.connection.count")
        .with_unit("{connection}")
        .with_description("The number of connections that are currently in the state described by the state attribute.")
        .with_callback(move |count| {
            let connections = now();
            for (state, number) in [("used", connections.used), ("idle", connections.idle)] {
                let state = KeyValue::new("db.client.connection.state", state);
                count.observe(i64::from(number), &[label.clone(), state]);
            }
        })
        .build();
    meter
        .i64_observable_up_down_counter("db.client.connection.max")
        .with_unit("{connection}")
        .with_description("The maximum number of open connections allowed.")
        .with_callback(move |max| max.observe(i64::from(read().max), std::slice::from_ref(&name)))
        .build();
}
