//! What came of the requests.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::{Options, Pace};
use crate::storm::{COMPLETED, latencies, quantile_ms, record};

/// Causes of failures that are told apart; a server that invents codes fills no memory.
const MAX_CAUSES: usize = 32;

/// The cause of what is beyond [`MAX_CAUSES`].
const OTHER: &str = "other";

/// Counts and latencies so far.
#[derive(Debug)]
pub(super) struct Tally {
    pub closed: bool,
    completed: Histogram<u64>,
    /// Failed ones as well: a failure may have been waited for.
    all: Histogram<u64>,
    failures: BTreeMap<String, u64>,
    kinds: BTreeMap<&'static str, Histogram<u64>>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            closed: false,
            completed: latencies(),
            all: latencies(),
            failures: BTreeMap::new(),
            kinds: BTreeMap::new(),
        }
    }
}

impl Tally {
    /// Notes a request that has ended; whether it was answered as it should.
    pub fn note(&mut self, template: &'static str, took: Duration, outcome: &str) -> bool {
        record(&mut self.all, took);
        if outcome == COMPLETED {
            record(&mut self.completed, took);
            record(self.kinds.entry(template).or_insert_with(latencies), took);
            return true;
        }
        let is_known = self.failures.contains_key(outcome);
        let cause = if is_known || self.failures.len() < MAX_CAUSES {
            outcome
        } else {
            OTHER
        };
        *self.failures.entry(cause.to_owned()).or_default() += 1;
        false
    }
}

/// Completed requests of one kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kind {
    /// The path, without what differs from request to request.
    pub path: &'static str,
    /// How many.
    pub completed: u64,
    /// Their 95th percentile.
    pub p95_ms: Option<f64>,
}

/// What came of the traffic.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// `open` or `closed`.
    pub r#loop: &'static str,
    /// Requests a second that were wanted; of an open loop.
    pub rate: Option<f64>,
    /// Clients; of a closed loop.
    pub clients: Option<u32>,
    /// Which sequence of requests.
    pub seed: u64,
    /// How long it took.
    pub seconds: f64,
    /// Requests that were due.
    pub due: u64,
    /// Requests that were answered as they should.
    pub completed: u64,
    /// Completed requests a second.
    pub completed_per_second: f64,
    /// Requests that failed.
    pub failed: u64,
    /// Those by cause: the code of a problem, or why there was no answer.
    pub failures: BTreeMap<String, u64>,
    /// Requests that were due and had neither been answered nor failed at the end.
    pub unanswered: u64,
    /// The median of the completed ones.
    pub p50_ms: Option<f64>,
    /// The 95th percentile of the completed ones.
    pub p95_ms: Option<f64>,
    /// The 99th percentile of all, failed ones included.
    pub p99_ms: Option<f64>,
    /// The slowest of all.
    pub max_ms: Option<f64>,
    /// The completed ones by kind.
    pub by_kind: Vec<Kind>,
}

impl Report {
    pub(super) fn of(options: &Options, took: Duration, due: u64, tally: &Tally) -> Self {
        let (kind, rate, clients) = match options.pace {
            Pace::Open { rate } => ("open", Some(rate), None),
            Pace::Closed { clients } => ("closed", None, Some(clients)),
        };
        let by_kind = tally.kinds.iter().map(|(path, latencies)| Kind {
            path,
            completed: latencies.len(),
            p95_ms: quantile_ms(latencies, 0.95),
        });
        let (completed, seconds) = (tally.completed.len(), took.as_secs_f64());
        Self {
            r#loop: kind,
            rate,
            clients,
            seed: options.seed,
            seconds,
            due,
            completed,
            completed_per_second: completed as f64 / seconds.max(0.001),
            failed: tally.failures.values().sum(),
            failures: tally.failures.clone(),
            unanswered: due.saturating_sub(tally.all.len()),
            p50_ms: quantile_ms(&tally.completed, 0.5),
            p95_ms: quantile_ms(&tally.completed, 0.95),
            p99_ms: quantile_ms(&tally.all, 0.99),
            max_ms: quantile_ms(&tally.all, 1.0),
            by_kind: by_kind.collect(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1}"));
        match (self.rate, self.clients) {
            (Some(rate), _) => write!(out, "open loop, {rate} requests a second")?,
            (_, clients) => write!(out, "closed loop, {} clients", clients.unwrap_or(0))?,
        }
        writeln!(out, ", seed {}, {:.1} s", self.seed, self.seconds)?;
        writeln!(
            out,
            "completed  {} of {} due ({:.1} a second)",
            self.completed, self.due, self.completed_per_second
        )?;
        writeln!(
            out,
            "latency    P50 {} ms, P95 {} ms (completed); P99 {} ms, slowest {} ms (all)",
            ms(self.p50_ms),
            ms(self.p95_ms),
            ms(self.p99_ms),
            ms(self.max_ms)
        )?;
        for kind in &self.by_kind {
            let (path, p95) = (kind.path, ms(kind.p95_ms));
            writeln!(
                out,
                "           {path:<26} {:>6}  P95 {p95} ms",
                kind.completed
            )?;
        }
        write!(out, "failed     {}", self.failed)?;
        for (cause, count) in &self.failures {
            let cause: String = cause.chars().filter(|c| !c.is_control()).collect();
            write!(out, ", {cause} {count}")?;
        }
        if self.unanswered > 0 {
            write!(out, "\nunanswered {}", self.unanswered)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            url: String::new(),
            pace: Pace::Open { rate: 10.0 },
            seed: 7,
            duration: Duration::from_secs(1),
        }
    }

    /// Percentiles of the completed are theirs alone; the slowest failure counts among all.
    #[test]
    fn failures_are_told_apart() {
        let mut tally = Tally::default();
        for ms in 1..=100 {
            assert!(tally.note("/a", Duration::from_millis(ms), COMPLETED));
        }
        assert!(!tally.note("/a", Duration::from_secs(3), "statement_timeout"));
        let report = Report::of(&options(), Duration::from_secs(10), 110, &tally);
        assert!((report.p95_ms.unwrap() - 95.0).abs() < 0.2, "{report:?}");
        assert!(report.max_ms.unwrap() > 2_900.0);
        assert_eq!(
            (report.completed, report.failed, report.unanswered),
            (100, 1, 9)
        );
        assert_eq!(report.failures["statement_timeout"], 1);
        let text = report.to_string();
        assert!(text.contains("100 of 110 due (10.0 a second)"), "{text}");
        assert!(text.contains("unanswered 9"), "{text}");
    }

    /// Nothing is no number, and invented causes are bounded.
    #[test]
    fn bounds() {
        let mut tally = Tally::default();
        let nothing = Report::of(&options(), Duration::ZERO, 0, &tally);
        assert_eq!((nothing.p95_ms, nothing.max_ms), (None, None));
        for number in 0..100 {
            tally.note("/a", Duration::ZERO, &format!("cause_{number}"));
        }
        let report = Report::of(&options(), Duration::from_secs(1), 100, &tally);
        assert_eq!(report.failures.len(), MAX_CAUSES + 1);
        assert_eq!((report.failed, report.failures[OTHER]), (100, 68));
    }
}
