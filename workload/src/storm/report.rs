//! What a storm did, in figures.

use std::collections::BTreeMap;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::db::Failure;

/// The longest latency that is told apart, in microseconds: ten times what a request may take.
const MAX_MICROS: u64 = 90_000_000;

/// The slowest queries that a report lists: as many as a page shows.
const SLOWEST: usize = 20;

/// The outcome of a query that was answered.
pub const COMPLETED: &str = "completed";

/// What the audience is told to expect.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Expected {
    /// The 95th percentile of completed queries.
    pub p95_ms: f64,
    /// The 99th percentile of executed queries.
    pub p99_ms: f64,
    /// Queries at once.
    pub active: u32,
    /// Connections in use.
    pub pool_utilization_percent: f64,
    /// Queries that fail.
    pub failed_percent: f64,
    /// The 95th percentile before the storm.
    pub baseline_p95_ms: f64,
}

/// The scenario's own words, to be printed beside what was measured.
pub const EXPECTED: Expected = Expected {
    p95_ms: 2800.0,
    p99_ms: 3200.0,
    active: 43,
    pool_utilization_percent: 95.0,
    failed_percent: 8.3,
    baseline_p95_ms: 45.0,
};

/// A query and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// Its trace, in hexadecimal.
    pub trace_id: String,
    /// Who was asked.
    pub service: String,
    /// How long the answer took, whatever it was.
    pub ms: f64,
    /// `completed`, or the cause of the failure.
    pub outcome: String,
}

impl Asked {
    /// Whether it was answered.
    pub fn is_completed(&self) -> bool {
        self.outcome == COMPLETED
    }

    /// Whether a statement ran for it. One that never got a connection ran nothing.
    fn is_executed(&self) -> bool {
        const RAN: [Failure; 3] = [
            Failure::StatementTimeout,
            Failure::StatementCancelled,
            Failure::DatabaseError,
        ];
        self.is_completed() || RAN.iter().any(|failure| failure.code() == self.outcome)
    }
}

/// A storm's queries of one service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ByService {
    /// Which.
    pub service: String,
    /// How many were asked of it.
    pub queries: usize,
    /// Of those that completed; `null` when none did.
    pub p95_ms: Option<f64>,
    /// How many failed.
    pub failed: usize,
}

/// What a storm did. All of it is measured where the queries are sent, with the wait for a
/// connection and the way there and back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StormReport {
    /// How many rounds began: fewer than were asked for when the demo was reset meanwhile.
    pub rounds: u32,
    /// How many queries in all rounds.
    pub queries: usize,
    /// How long they took, all in all.
    pub seconds: f64,
    /// The 95th percentile of the background's requests just before; `null` when none was answered.
    pub baseline_p95_ms: Option<f64>,
    /// One of the storm's queries alone, just before: the median of a few.
    pub single_query_ms: Option<f64>,
    /// The median of the completed queries.
    pub p50_ms: Option<f64>,
    /// The 95th percentile of the completed queries.
    pub p95_ms: Option<f64>,
    /// The 99th percentile of the executed queries: those that timed out are among them.
    pub p99_ms: Option<f64>,
    /// The most statements seen at once, in all services together.
    pub active_max: u64,
    /// The fullest that all pools together were seen.
    pub pool_utilization_percent: f64,
    /// Queries that the database began.
    pub executed: usize,
    /// Queries that were answered.
    pub completed: usize,
    /// Queries that were not, for whatever cause.
    pub failed: usize,
    /// `failed` of `queries`, in percent.
    pub failed_percent: f64,
    /// `failed` by cause.
    pub failures: BTreeMap<String, usize>,
    /// The same by service.
    pub by_service: Vec<ByService>,
    /// What the audience is told to expect.
    pub expected: Expected,
    /// The slowest queries, the slowest first.
    pub slowest: Vec<Asked>,
    /// The slowest of those that failed, the slowest first. What fails at once is not among the slowest of all.
    pub slowest_failed: Vec<Asked>,
}

/// What is measured around a storm's queries.
#[derive(Debug, Clone, Copy, Default)]
pub struct Around {
    /// How long the rounds took.
    pub took: Duration,
    /// See [`StormReport::baseline_p95_ms`].
    pub baseline_p95_ms: Option<f64>,
    /// See [`StormReport::single_query_ms`].
    pub single_query_ms: Option<f64>,
    /// See [`StormReport::active_max`].
    pub active_max: u64,
    /// See [`StormReport::pool_utilization_percent`].
    pub pool_utilization_percent: f64,
}

impl StormReport {
    /// The figures of `asked`; `services` are listed in this order.
    pub fn of(rounds: u32, services: [&str; 3], asked: &[Asked], around: Around) -> Self {
        let completed = || asked.iter().filter(|query| query.is_completed());
        let executed = || asked.iter().filter(|query| query.is_executed());
        let failed = asked.len() - completed().count();
        let mut failures = BTreeMap::new();
        for query in asked.iter().filter(|query| !query.is_completed()) {
            *failures.entry(query.outcome.clone()).or_default() += 1;
        }
        let mut slowest = asked.to_vec();
        slowest.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        let failures_only = slowest.iter().filter(|query| !query.is_completed());
        let slowest_failed = failures_only.take(SLOWEST).cloned().collect();
        slowest.truncate(SLOWEST);
        Self {
            rounds,
            queries: asked.len(),
            seconds: around.took.as_secs_f64(),
            baseline_p95_ms: around.baseline_p95_ms,
            single_query_ms: around.single_query_ms,
            p50_ms: percentile(completed(), 0.50),
            p95_ms: percentile(completed(), 0.95),
            p99_ms: percentile(executed(), 0.99),
            active_max: around.active_max,
            pool_utilization_percent: around.pool_utilization_percent,
            executed: executed().count(),
            completed: completed().count(),
            failed,
            failed_percent: percent(failed, asked.len()),
            failures,
            by_service: services
                .into_iter()
                .map(|service| ByService::of(service, asked))
                .collect(),
            expected: EXPECTED,
            slowest,
            slowest_failed,
        }
    }
}

impl ByService {
    fn of(service: &str, asked: &[Asked]) -> Self {
        let own = || asked.iter().filter(|query| query.service == service);
        let completed = || own().filter(|query| query.is_completed());
        Self {
            service: service.to_owned(),
            queries: own().count(),
            p95_ms: percentile(completed(), 0.95),
            failed: own().count() - completed().count(),
        }
    }
}

/// A quantile of the queries' latencies in milliseconds; nothing of none.
fn percentile<'a>(asked: impl Iterator<Item = &'a Asked>, quantile: f64) -> Option<f64> {
    let mut latencies = latencies();
    for query in asked {
        record(&mut latencies, Duration::from_secs_f64(query.ms / 1e3));
    }
    quantile_ms(&latencies, quantile)
}

/// An empty histogram of latencies.
pub fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_MICROS, 3)
        .expect("1 to a minute and a half with three digits is a valid histogram")
}

/// Notes a latency.
pub fn record(latencies: &mut Histogram<u64>, took: Duration) {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    latencies.saturating_record(micros);
}

/// A quantile in milliseconds; nothing of none.
pub fn quantile_ms(latencies: &Histogram<u64>, quantile: f64) -> Option<f64> {
    if latencies.is_empty() {
        return None;
    }
    let micros = u32::try_from(latencies.value_at_quantile(quantile)).unwrap_or(u32::MAX);
    Some(f64::from(micros) / 1e3)
}

fn percent(part: usize, whole: usize) -> f64 {
    let of = |count: usize| f64::from(u32::try_from(count).unwrap_or(u32::MAX));
    of(part) * 100.0 / of(whole.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICES: [&str; 3] = ["product-service", "order-service", "inventory-service"];

    fn asked(service: usize, ms: f64, outcome: &str) -> Asked {
        Asked {
            trace_id: String::new(),
            service: SERVICES[service].to_owned(),
            ms,
            outcome: outcome.to_owned(),
        }
    }

    /// P50 and P95 are of the completed queries, P99 of all that ran; what never got a connection
    /// is counted as a failure, and in no percentile.
    #[test]
    fn percentiles_are_of_what_they_say() {
        let mut queries: Vec<Asked> = (1..=90)
            .map(|ms| asked(0, f64::from(ms), COMPLETED))
            .collect();
        queries.extend((0..8).map(|_| asked(1, 3200.0, "statement_timeout")));
        queries.extend((0..2).map(|_| asked(2, 9000.0, "pool_exhausted")));
        let report = StormReport::of(1, SERVICES, &queries, Around::default());
        let near = |value: Option<f64>, wanted: f64| {
            let value = value.unwrap();
            assert!(
                (value / wanted - 1.0).abs() < 0.002,
                "{value}, not {wanted}"
            );
        };
        near(report.p50_ms, 45.0);
        near(report.p95_ms, 86.0);
        near(report.p99_ms, 3200.0);
        assert_eq!(
            (
                report.queries,
                report.executed,
                report.completed,
                report.failed
            ),
            (100, 98, 90, 10)
        );
        assert!((report.failed_percent - 10.0).abs() < 1e-9);
        assert_eq!(report.failures["statement_timeout"], 8);
        assert_eq!(report.failures["pool_exhausted"], 2);
        assert_eq!(report.by_service[1].p95_ms, None);
        assert_eq!(report.by_service[2].failed, 2);
        assert_eq!(report.slowest.len(), SLOWEST);
        assert_eq!(report.slowest[0].outcome, "pool_exhausted");
        assert_eq!(report.slowest_failed.len(), 10);
    }

    /// Nothing has no percentiles, and no division by nothing.
    #[test]
    fn a_storm_of_nothing_is_no_number() {
        let report = StormReport::of(0, SERVICES, &[], Around::default());
        assert_eq!((report.p95_ms, report.p99_ms), (None, None));
        assert!(report.failed_percent.abs() < f64::EPSILON);
    }
}
