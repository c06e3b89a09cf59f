//! A service's connections: how one is had, how a statement is run on it, and what is counted
//! of both.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use serde::Serialize;
use sqlx::pool::PoolConnection;
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres, SqlStr};

use super::Failure;
use super::failure::Failures;
use crate::live::Live;
use crate::problem::Problem;
use crate::telemetry::database::{self as telemetry, Call, Connections, Load, Target};

/// A statement, as it is named where it shows.
#[derive(Debug, Clone, Copy)]
pub struct Statement {
    /// What it does: `SELECT`.
    pub operation: &'static str,
    /// The table that it is about.
    pub table: &'static str,
    /// Its text, with `$1` where a value is.
    pub text: &'static str,
}

impl Statement {
    /// A statement that reads `table`.
    pub const fn select(table: &'static str, text: &'static str) -> Self {
        Self {
            operation: "SELECT",
            table,
            text,
        }
    }

    /// A statement that adds to `table`.
    pub const fn insert(table: &'static str, text: &'static str) -> Self {
        Self {
            operation: "INSERT",
            table,
            text,
        }
    }
}

/// A service's pool. Clones are the same pool.
#[derive(Debug, Clone)]
pub struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    pool: PgPool,
    service: &'static str,
    target: Target,
    /// Connections that requests have in their hands.
    held: AtomicU32,
    /// Statements that somebody waits for.
    active: AtomicU64,
    completed: AtomicU64,
    abandoned: AtomicU64,
    failures: Failures,
    live: Live,
    /// Milliseconds that each reading statement sleeps first; 0 is how a shop should be.
    slow_queries_ms: AtomicU32,
}

impl Pool {
    pub(super) fn new(pool: PgPool, service: &'static str, target: Target) -> Self {
        let watched = pool.clone();
        target.watch(move || {
            let health = PoolHealth::of(&watched);
            Connections {
                used: health.active,
                idle: watched.size().saturating_sub(health.active),
                max: health.max,
            }
        });
        Self(Arc::new(Inner {
            pool,
            service,
            target,
            held: AtomicU32::new(0),
            active: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            failures: Failures::default(),
            live: Live::default(),
            slow_queries_ms: AtomicU32::new(0),
        }))
    }

    /// The service that it belongs to.
    pub fn service(&self) -> &'static str {
        self.0.service
    }

    /// How full it is.
    pub fn health(&self) -> PoolHealth {
        PoolHealth::of(&self.0.pool)
    }

    /// What became of its statements.
    pub fn queries(&self) -> QueryCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        QueryCounts {
            active: of(&self.0.active),
            completed: of(&self.0.completed),
            abandoned: of(&self.0.abandoned),
            failed: self.0.failures.counts(),
        }
    }

    /// How long its statements have taken lately.
    pub fn live(&self) -> &Live {
        &self.0.live
    }

    /// Makes each reading statement from now on sleep in the database first; 0 ends that.
    pub fn slow_queries(&self, delay_ms: u32) {
        self.0.slow_queries_ms.store(delay_ms, Ordering::Relaxed);
    }

    /// The sleep that is simulated now, in milliseconds.
    pub fn slow_queries_ms(&self) -> Option<u32> {
        Some(self.0.slow_queries_ms.load(Ordering::Relaxed)).filter(|delay| *delay > 0)
    }

    /// Closes all connections, waiting for those in use.
    pub async fn close(&self) {
        self.0.pool.close().await;
    }

    /// Counts and logs a failure, and makes a client's answer of it.
    fn failed(&self, failure: Failure, error: &sqlx::Error) -> Problem {
        self.0.failures.add(failure);
        let health = self.health();
        let code = failure.code();
        macro_rules! tell {
            ($level:ident) => {
                tracing::$level!(
                    code,
                    %error,
                    connections_held = health.active,
                    pool_max = health.max,
                    utilization_percent = health.utilization_percent,
                    "a statement failed"
                )
            };
        }
        // One statement was too slow; or the shop has no database for anybody.
        match failure {
            Failure::StatementTimeout | Failure::StatementCancelled => tell!(warn),
            _ => tell!(error),
        }
        failure.problem()
    }
}

/// How full a pool is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PoolHealth {
    /// Connections that are in use now, or being opened or tested.
    pub active: u32,
    /// Connections that the pool may open.
    pub max: u32,
    /// `active` of `max`, in percent.
    pub utilization_percent: f64,
}

impl PoolHealth {
    fn of(pool: &PgPool) -> Self {
        let max = pool.options().get_max_connections();
        let idle = u32::try_from(pool.num_idle()).unwrap_or(u32::MAX);
        let active = pool.size().saturating_sub(idle);
        Self {
            active,
            max,
            utilization_percent: f64::from(active) * 100.0 / f64::from(max.max(1)),
        }
    }
}

/// What became of a service's statements since it started.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QueryCounts {
    /// Running now.
    pub active: u64,
    /// Answered by the database.
    pub completed: u64,
    /// Given up by who had asked: the client went away, or its time was over.
    pub abandoned: u64,
    /// Failed, by cause.
    pub failed: std::collections::BTreeMap<&'static str, u64>,
}

/// A connection for one request, given back when dropped.
#[derive(Debug)]
pub struct Connection {
    connection: telemetry::Held<PoolConnection<Postgres>>,
    pool: Pool,
}

impl Deref for Connection {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        &self.connection
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.connection
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.pool.0.held.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection for one request. Giving up has two causes that a client should tell apart: the
/// others hold all connections, or the server gives none.
pub async fn acquire(pool: &Pool) -> Result<Connection, Problem> {
    let inner = &pool.0;
    match telemetry::acquire(&inner.target, inner.pool.acquire()).await {
        Ok(connection) => {
            inner.held.fetch_add(1, Ordering::Relaxed);
            Ok(Connection {
                connection,
                pool: pool.clone(),
            })
        }
        Err(error) => {
            let health = pool.health();
            // With the server gone the pool looks full as well, of connections that are being
            // opened; but then nobody holds one.
            let is_exhausted = matches!(error, sqlx::Error::PoolTimedOut)
                && health.active >= health.max
                && inner.held.load(Ordering::Relaxed) > 0;
            let failure = if is_exhausted {
                Failure::PoolExhausted
            } else {
                Failure::of(&error, super::ACQUIRE_TIMEOUT)
            };
            Err(pool.failed(failure, &error))
        }
    }
}

/// Acquires a connection and runs `work` on it, which is to execute the text that it is given:
/// the statement's own, or that with a simulated delay in it.
pub async fn run<T>(
    pool: &Pool,
    statement: &Statement,
    work: impl AsyncFnOnce(&mut PgConnection, SqlStr) -> Result<T, sqlx::Error>,
) -> Result<T, Problem> {
    let mut connection = acquire(pool).await?;
    run_on(&mut connection, statement, work).await
}

/// As [`run`], on a connection that is there already.
pub async fn run_on<T>(
    connection: &mut Connection,
    statement: &Statement,
    work: impl AsyncFnOnce(&mut PgConnection, SqlStr) -> Result<T, sqlx::Error>,
) -> Result<T, Problem> {
    let pool = connection.pool.clone();
    let inner = &pool.0;
    let delay = pool
        .slow_queries_ms()
        .filter(|_| statement.operation == "SELECT");
    let mut running = Running::start(&pool);
    let health = pool.health();
    let load = Load {
        active: health.active,
        max: health.max,
        queries: inner.active.load(Ordering::Relaxed),
    };
    let call = Call {
        operation: statement.operation,
        table: statement.table,
        text: statement.text,
        simulated_delay_ms: delay.map(u64::from),
    };
    let work = work(connection, text(statement, delay));
    match telemetry::execute(&inner.target, call, load, work).await {
        Ok(answer) => {
            running.end();
            inner.completed.fetch_add(1, Ordering::Relaxed);
            Ok(answer)
        }
        Err(error) => {
            let took = running.end();
            Err(pool.failed(Failure::of(&error, took), &error))
        }
    }
}

/// The statement's text. A simulated delay sleeps in the database before the statement's own
/// work, in one statement with it, and says so in its text.
fn text(statement: &Statement, delay_ms: Option<u32>) -> SqlStr {
    match delay_ms {
        None => SqlStr::from_static(statement.text),
        Some(delay) => {
            let (text, seconds) = (statement.text, f64::from(delay) / 1000.0);
            let slow = format!(
                "SELECT simulated_slow_query.* FROM ({text}) AS simulated_slow_query \
                 WHERE (SELECT pg_sleep({seconds})) IS NOT NULL"
            );
            sqlx::SqlSafeStr::into_sql_str(AssertSqlSafe(slow))
        }
    }
}

/// A statement that somebody waits for. Dropped before its end, it was abandoned.
struct Running<'a> {
    pool: &'a Inner,
    since: Instant,
    ended: bool,
}

impl<'a> Running<'a> {
    fn start(pool: &'a Pool) -> Self {
        pool.0.active.fetch_add(1, Ordering::Relaxed);
        Self {
            pool: &pool.0,
            since: Instant::now(),
            ended: false,
        }
    }

    fn end(&mut self) -> std::time::Duration {
        self.ended = true;
        let took = self.since.elapsed();
        self.pool.live.record(took);
        took
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.pool.active.fetch_sub(1, Ordering::Relaxed);
        if !self.ended {
            self.pool.abandoned.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A simulated delay is a part of the statement, and its text says what it is.
    #[test]
    fn a_simulated_delay_is_in_the_statement() {
        let statement = Statement::select("products", "SELECT id FROM products");
        assert_eq!(text(&statement, None).as_str(), "SELECT id FROM products");
        let slow = text(&statement, Some(1500));
        assert!(
            slow.as_str()
                .contains("(SELECT id FROM products) AS simulated")
        );
        assert!(slow.as_str().contains("pg_sleep(1.5)"), "{}", slow.as_str());
    }
}
