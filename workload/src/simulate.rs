//! What the demo does to a service on purpose, and how it is undone.
//!
//! Slow queries: each reading statement sleeps in the database before it works. Pool exhaustion:
//! all connections of the pool but one are held, and on each a heavy query follows another, for a
//! bounded time. Both are real for everybody else, and both are named in `/health`.
//!
//! The endpoints that switch it on are in [`crate::services::demo`].

use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use serde::Serialize;
use sqlx::PgPool;
use tokio::task::JoinSet;

use crate::catalogue::RARE_WORDS;
use crate::db::{self, Connection, Failure, POOL_MAX, Pool};
use crate::problem::Problem;
use crate::services::search::Search;
use crate::telemetry;

/// Connections that are held: all but one, so that a quiet shop still answers, slowly, and a busy
/// one makes its visitors wait in vain.
pub const HELD: u32 = POOL_MAX - 1;

/// After a failed statement a holder waits, so that a database that is away is not hammered.
const AFTER_FAILURE: Duration = Duration::from_millis(250);

/// How long a reset waits for cancelled statements to end before it ends their backends.
const CANCEL_PATIENCE: Duration = Duration::from_secs(2);

/// And for ended backends to go.
const TERMINATE_PATIENCE: Duration = Duration::from_secs(2);

/// A heavy query under way.
pub type Working<'a> = Pin<Box<dyn Future<Output = Result<(), Problem>> + Send + 'a>>;

/// A service's heavy query, on a connection that is held.
pub type HeavyQuery = for<'a> fn(&'a mut Connection, &'a Search) -> Working<'a>;

/// What can be simulated in a service, and what is.
#[derive(Debug)]
pub struct Simulation {
    enabled: bool,
    pool: Pool,
    control: PgPool,
    heavy: HeavyQuery,
    // A std mutex: held for a few instructions, never across an await.
    holders: Mutex<JoinSet<()>>,
    /// Connections that holders have in their hands.
    held: Arc<AtomicU32>,
}

/// What is simulated now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SimulationState {
    /// How long each reading statement sleeps first.
    pub slow_queries_ms: Option<u32>,
    /// Whether connections are held.
    pub pool_exhaustion: bool,
    /// How many are.
    pub connections_held: u32,
}

/// What a reset found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reset {
    /// Whose.
    pub service: &'static str,
    /// Statements that were cancelled: holders', visitors', and those of a process that has gone.
    pub statements_cancelled: u64,
    /// Backends that did not heed that and were ended.
    pub backends_ended: u64,
    /// What is simulated now: nothing.
    pub simulation: SimulationState,
}

impl Simulation {
    pub(crate) fn new(pool: Pool, control: PgPool, heavy: HeavyQuery, enabled: bool) -> Self {
        Self {
            enabled,
            pool,
            control,
            heavy,
            holders: Mutex::default(),
            held: Arc::default(),
        }
    }

    /// Whether the demo's endpoints answer.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Connections beside the pool.
    pub fn control(&self) -> &PgPool {
        &self.control
    }

    /// What is simulated now.
    pub fn state(&self) -> SimulationState {
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        while holders.try_join_next().is_some() {}
        SimulationState {
            slow_queries_ms: self.pool.slow_queries_ms(),
            pool_exhaustion: !holders.is_empty(),
            connections_held: self.held.load(Ordering::Relaxed),
        }
    }

    /// Holds connections for `time`; those of an earlier call are let go first.
    pub(crate) fn exhaust(&self, time: Duration) {
        let until = Instant::now() + time;
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        holders.abort_all();
        for number in 0..HELD {
            let holder = Holder {
                pool: self.pool.clone(),
                heavy: self.heavy,
                held: Arc::clone(&self.held),
            };
            holders.spawn(holder.hold(number, until));
        }
    }

    /// Simulates nothing any more. Statements that run in the database run on.
    pub fn stop(&self) {
        self.pool.slow_queries(0);
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        holders.abort_all();
    }

    /// Stops, and cancels what the service still has running in the database, be it that of a
    /// process which was killed: its backends do not notice that before they answer.
    pub(crate) async fn reset(&self) -> Result<Reset, Problem> {
        self.stop();
        let service = self.pool.service();
        let cancel = async {
            let statements_cancelled = backends(&self.control, service, CANCEL).await?;
            if are_idle(&self.control, service, CANCEL_PATIENCE).await? {
                return Ok((statements_cancelled, 0));
            }
            let backends_ended = backends(&self.control, service, TERMINATE).await?;
            are_idle(&self.control, service, TERMINATE_PATIENCE).await?;
            Ok((statements_cancelled, backends_ended))
        };
        let cancelled: Result<_, sqlx::Error> = cancel.await;
        let (statements_cancelled, backends_ended) = cancelled.map_err(|error| {
            tracing::warn!(%error, "a reset could not ask the database");
            Failure::of(&error, Duration::ZERO).problem()
        })?;
        Ok(Reset {
            service,
            statements_cancelled,
            backends_ended,
            simulation: self.state(),
        })
    }
}

/// Who holds a connection.
struct Holder {
    pool: Pool,
    heavy: HeavyQuery,
    held: Arc<AtomicU32>,
}

impl Holder {
    async fn hold(self, number: u32, until: Instant) {
        let hold = async {
            // A lost connection is taken anew: the database may have been restarted.
            loop {
                match db::acquire(&self.pool).await {
                    Ok(connection) => self.work(number, connection).await,
                    Err(_) => tokio::time::sleep(AFTER_FAILURE).await,
                }
            }
        };
        // Dropped at the end, in the middle of a statement: the timeout bounds that in the database.
        let _ = tokio::time::timeout_at(until.into(), hold).await;
    }

    /// Heavy queries one after the other, until one fails for another reason than its timeout.
    async fn work(&self, number: u32, mut connection: Connection) {
        let _counted = Counted::new(&self.held);
        // Each holder starts elsewhere, so that they do not search the same word in step.
        let words = RARE_WORDS.iter().cycle().skip(number as usize * 3);
        for word in words {
            let search = Search {
                words: vec![(*word).to_owned()],
                limit: 20,
            };
            // A trace of its own, which says what it is.
            let work = (self.heavy)(&mut connection, &search);
            let kind = vec![KeyValue::new("simulation.type", "pool_exhaustion")];
            match telemetry::span::apart("simulated pool exhaustion", kind, work)
                .await
                .1
            {
                Err(problem) if problem.code != Failure::StatementTimeout.code() => {
                    tokio::time::sleep(AFTER_FAILURE).await;
                    return;
                }
                _ => {}
            }
        }
    }
}

/// One more while it lives.
struct Counted<'a>(&'a AtomicU32);

impl<'a> Counted<'a> {
    fn new(counter: &'a AtomicU32) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

const CANCEL: &str = "SELECT count(*) FILTER (WHERE pg_cancel_backend(pid)) FROM pg_stat_activity \
     WHERE application_name = $1 AND datname = current_database() AND state <> 'idle'";

const TERMINATE: &str = "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity \
     WHERE application_name = $1 AND datname = current_database() AND state <> 'idle'";

const AT_WORK: &str = "SELECT count(*) FROM pg_stat_activity \
     WHERE application_name = $1 AND datname = current_database() AND state <> 'idle'";

/// How many of the service's backends `statement` was about.
async fn backends(
    control: &PgPool,
    service: &str,
    statement: &'static str,
) -> Result<u64, sqlx::Error> {
    let count: i64 = sqlx::query_scalar(statement)
        .bind(service)
        .fetch_one(control)
        .await?;
    Ok(count.unsigned_abs())
}

/// Whether the service's backends come to rest within `patience`.
async fn are_idle(
    control: &PgPool,
    service: &str,
    patience: Duration,
) -> Result<bool, sqlx::Error> {
    let deadline = Instant::now() + patience;
    loop {
        if backends(control, service, AT_WORK).await? == 0 {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
}
