//! The database as OpenTelemetry describes one: a CLIENT span and a duration for each statement,
//! and what a pool knows of its connections.
//!
//! Names are those of the stable conventions, and beside them, by default, the old ones, which
//! dashboards still read (`OTEL_SEMCONV_STABILITY_OPT_IN`: `database/dup` both, `database` the
//! stable ones alone). A text is the statement's own, with `$1` where a value was: values are
//! never recorded.

mod error;
mod metrics;

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime};

use opentelemetry::context::FutureExt;
use opentelemetry::trace::{SpanKind, Status, TraceContextExt, Tracer};
use opentelemetry::{Context, KeyValue};

use super::SCOPE;
use error::Failure;
use metrics::METRICS;

/// Waiting for a connection for less than this is not worth a span: opening one takes as long, and
/// on a busy machine sqlx's question whether it is still alive.
const WORTH_A_SPAN: Duration = Duration::from_millis(10);

/// Whether the old names are recorded as well.
static WITH_OLD_NAMES: LazyLock<bool> = LazyLock::new(|| {
    with_old_names(&std::env::var("OTEL_SEMCONV_STABILITY_OPT_IN").unwrap_or_default())
});

fn with_old_names(opt_in: &str) -> bool {
    let mut wanted = opt_in.split(',').map(str::trim);
    // Both where it says nothing about databases: that is what the shop's scenes read.
    wanted.clone().any(|word| word == "database/dup") || !wanted.any(|word| word == "database")
}

/// A database, as its pool's spans and metrics name it.
#[derive(Debug, Clone)]
pub struct Target(Arc<Place>);

#[derive(Debug)]
struct Place {
    database: String,
    host: String,
    port: u16,
    /// What the pool's metrics are told apart by.
    pool: [KeyValue; 1],
}

/// A statement: what it does (`SELECT`), to which table, and its text without values.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its first word.
    pub operation: &'static str,
    /// The table that it is about.
    pub table: &'static str,
    /// Its text, with `$1` where a value is.
    pub text: &'static str,
    /// Milliseconds that it sleeps before it works, when slowness is being simulated.
    pub simulated_delay_ms: Option<u64>,
}

/// How busy the pool is when a statement begins, the statement itself included.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Connections that are held.
    pub active: u32,
    /// Connections that there can be.
    pub max: u32,
    /// Statements that run in this service.
    pub queries: u64,
}

/// What a pool tells about its connections.
#[derive(Debug, Clone, Copy)]
pub struct Connections {
    /// Held by a request.
    pub used: u32,
    /// Open, and held by nobody.
    pub idle: u32,
    /// The most that there can be.
    pub max: u32,
}

impl Target {
    /// The database `database` at `host` and `port`.
    pub fn new(database: impl Into<String>, host: impl Into<String>, port: u16) -> Self {
        let database = database.into();
        let pool = KeyValue::new("db.client.connection.pool.name", database.clone());
        Self(Arc::new(Place {
            database,
            host: host.into(),
            port,
            pool: [pool],
        }))
    }

    /// Reports the connections of a pool to this database, as `read` tells them whenever metrics
    /// are collected. Once for each pool.
    pub fn watch(&self, read: impl Fn() -> Connections + Send + Sync + Clone + 'static) {
        metrics::watch(self.0.pool.clone(), read);
    }

    fn address(&self) -> [KeyValue; 2] {
        [
            KeyValue::new("server.address", self.0.host.clone()),
            KeyValue::new("server.port", i64::from(self.0.port)),
        ]
    }
}

/// Waits for a connection and measures how long. A wait that can be noticed has a span.
pub async fn acquire<C>(
    target: &Target,
    connecting: impl Future<Output = Result<C, sqlx::Error>>,
) -> Result<Held<C>, sqlx::Error> {
    let wait = Wait::begin(target);
    let acquired = connecting.await;
    wait.end(acquired.as_ref().err());
    acquired.map(|connection| Held {
        connection,
        since: Instant::now(),
        target: target.clone(),
    })
}

/// Somebody who waits for a connection.
struct Wait<'a> {
    target: &'a Target,
    since: Instant,
    since_time: SystemTime,
}

impl<'a> Wait<'a> {
    fn begin(target: &'a Target) -> Self {
        METRICS.pending.add(1, &target.0.pool);
        Self {
            target,
            since: Instant::now(),
            since_time: SystemTime::now(),
        }
    }

    fn end(self, error: Option<&sqlx::Error>) {
        let waited = self.since.elapsed();
        let pool = &self.target.0.pool;
        METRICS.wait_time.record(waited.as_secs_f64(), pool);
        if matches!(error, Some(sqlx::Error::PoolTimedOut)) {
            METRICS.timeouts.add(1, pool);
        }
        if error.is_none() && waited < WORTH_A_SPAN {
            return;
        }
        let tracer = opentelemetry::global::tracer(SCOPE);
        let mut attributes = vec![
            KeyValue::new("db.system.name", "postgresql"),
            KeyValue::new("db.namespace", self.target.0.database.clone()),
            pool[0].clone(),
        ];
        attributes.extend(self.target.address());
        // Not a CLIENT span: no statement has reached the server.
        let span = tracer
            .span_builder("acquire connection")
            .with_kind(SpanKind::Internal)
            .with_start_time(self.since_time)
            .with_attributes(attributes)
            .start(&tracer);
        if let Some(error) = error {
            Failure::of(error).tell(&Context::new().with_span(span));
        }
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        METRICS.pending.add(-1, &self.target.0.pool);
    }
}

/// A connection in use, which is measured until it is given back.
#[derive(Debug)]
pub struct Held<C> {
    connection: C,
    since: Instant,
    target: Target,
}

impl<C> Deref for Held<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.connection
    }
}

impl<C> DerefMut for Held<C> {
    fn deref_mut(&mut self) -> &mut C {
        &mut self.connection
    }
}

impl<C> Drop for Held<C> {
    fn drop(&mut self) {
        let held = self.since.elapsed().as_secs_f64();
        METRICS.use_time.record(held, &self.target.0.pool);
    }
}

/// Runs a statement inside its span, and measures it.
pub async fn execute<T>(
    target: &Target,
    call: Call,
    load: Load,
    work: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    let mut execution = Execution::begin(target, call, load);
    let context = execution.context.clone();
    let outcome = work.with_context(context).await;
    execution.end(outcome.as_ref().err().map(Failure::of));
    outcome
}

/// A statement under way. Dropped before its end, it tells that nobody waits for it any more.
struct Execution {
    context: Context,
    started: Instant,
    labels: Vec<KeyValue>,
    ended: bool,
}

impl Execution {
    fn begin(target: &Target, call: Call, load: Load) -> Self {
        let tracer = opentelemetry::global::tracer(SCOPE);
        let name = format!("{} {}.{}", call.operation, target.0.database, call.table);
        let labels = labels(target, call);
        let mut attributes = labels.clone();
        attributes.push(KeyValue::new("db.query.text", call.text));
        if *WITH_OLD_NAMES {
            attributes.extend(old_names(target, call));
        }
        attributes.extend(scene(call, load));
        let span = tracer
            .span_builder(name)
            .with_kind(SpanKind::Client)
            .with_attributes(attributes)
            .start(&tracer);
        Self {
            context: Context::current_with_span(span),
            started: Instant::now(),
            labels,
            ended: false,
        }
    }

    fn end(&mut self, failure: Option<Failure>) {
        self.ended = true;
        let took = self.started.elapsed();
        let span = self.context.span();
        let milliseconds = took.as_secs_f64() * 1e3;
        span.set_attribute(KeyValue::new("db.query.duration_ms", milliseconds));
        if let Some(failure) = failure {
            self.labels.extend(failure.attributes());
            failure.tell(&self.context);
        }
        span.end();
        METRICS.duration.record(took.as_secs_f64(), &self.labels);
    }
}

impl Drop for Execution {
    fn drop(&mut self) {
        if !self.ended {
            self.end(Some(Failure::ABANDONED));
        }
    }
}

/// The stable names, but for the text, which a metric would have too many of.
fn labels(target: &Target, call: Call) -> Vec<KeyValue> {
    let [address, port] = target.address();
    vec![
        KeyValue::new("db.system.name", "postgresql"),
        KeyValue::new("db.namespace", target.0.database.clone()),
        KeyValue::new("db.operation.name", call.operation),
        KeyValue::new("db.collection.name", call.table),
        address,
        port,
    ]
}

/// The names before version 1.28 of the conventions.
fn old_names(target: &Target, call: Call) -> [KeyValue; 7] {
    [
        KeyValue::new("db.system", "postgresql"),
        KeyValue::new("db.name", target.0.database.clone()),
        KeyValue::new("db.statement", call.text),
        KeyValue::new("db.operation", call.operation),
        KeyValue::new("db.sql.table", call.table),
        KeyValue::new("net.peer.name", target.0.host.clone()),
        KeyValue::new("net.peer.port", i64::from(target.0.port)),
    ]
}

/// What the scene's dashboards read beside the conventions.
fn scene(call: Call, load: Load) -> Vec<KeyValue> {
    let utilization = f64::from(load.active) * 100.0 / f64::from(load.max.max(1));
    let queries = i64::try_from(load.queries).unwrap_or(i64::MAX);
    let mut attributes = vec![
        KeyValue::new("db.connection_pool.active", i64::from(load.active)),
        KeyValue::new("db.connection_pool.max", i64::from(load.max)),
        KeyValue::new("db.connection_pool.utilization_percent", utilization),
        KeyValue::new("db.active_queries", queries),
    ];
    if let Some(delay) = call.simulated_delay_ms {
        let delay = i64::try_from(delay).unwrap_or(i64::MAX);
        attributes.push(KeyValue::new("simulation.delay_ms", delay));
    }
    attributes
}

impl Failure {
    /// Marks the span of `context` as failed.
    fn tell(&self, context: &Context) {
        let span = context.span();
        for attribute in self.attributes() {
            span.set_attribute(attribute);
        }
        span.set_status(Status::error(self.reason()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The variable of the conventions, and the shop's own default.
    #[test]
    fn old_names_can_be_left_out() {
        assert!(with_old_names(""));
        assert!(with_old_names("http"));
        assert!(with_old_names("http, database/dup"));
        assert!(with_old_names("database,database/dup"));
        assert!(!with_old_names("database"));
        assert!(!with_old_names("http/dup, database"));
    }
}
