//! The storm: 43 queries at once through the services' HTTP, some rounds of them, measured.
//!
//! One storm at a time. It goes on to its end when whoever asked for it goes away, and what it did
//! is kept until the next one begins. Everything that it tells is measured: [`plan`] says what is
//! asked, the gateway's own clock how long it took, the services' `/health` how full they were.

pub mod plan;
mod report;
mod round;
mod watch;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use serde::Serialize;

pub use report::{Around, Asked, ByService, COMPLETED, EXPECTED, Expected, StormReport};
pub(crate) use report::{latencies, quantile_ms, record};
pub(crate) use round::outcome;

use crate::problem::Problem;
use crate::services::upstream::Upstream;
use crate::telemetry::span;
use watch::{Peak, Seen};

/// The most rounds of one storm: about a minute of a machine at its limit.
pub const MAX_ROUNDS: u32 = 20;

/// How often the services are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Samples that are kept. A storm of [`MAX_ROUNDS`] whose every request runs into its time limit
/// has fewer.
const MAX_SAMPLES: usize = 1024;

/// The services, in the order of [`plan::Ask::service`].
pub type Services = [Upstream; 3];

/// The storms of a gateway. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Storms(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The storm that runs, or the last one.
    current: Option<Current>,
}

#[derive(Debug)]
struct Current {
    running: bool,
    /// No further round begins.
    cancelled: bool,
    started: Instant,
    /// From when it was over.
    took: Option<Duration>,
    round: u32,
    rounds: u32,
    done: usize,
    failed: usize,
    samples: Vec<Sample>,
    peak: Peak,
    report: Option<StormReport>,
}

/// How the services were at one moment of a storm.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sample {
    /// Since the storm began, in seconds.
    pub t_s: f64,
    /// The 95th percentile of the slowest service's last ten seconds; `null` when nothing ended.
    pub p95_ms: Option<f64>,
    /// Statements that ran in all services together.
    pub active: u64,
    /// How full all pools together were.
    pub pool_utilization_percent: f64,
    /// The storm's queries that had failed until then.
    pub failed: usize,
}

/// What `GET /api/demo/storm` tells.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Progress {
    /// Whether a storm runs.
    pub running: bool,
    /// The round that it is in, from 1; 0 while the figures before it are taken.
    pub round: u32,
    /// How many it has.
    pub rounds: u32,
    /// How the services were, every 200 ms.
    pub samples: Vec<Sample>,
    /// What the last storm did; `null` before the first and while one runs.
    pub report: Option<StormReport>,
}

/// What `GET /api/status` tells of a storm.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Brief {
    /// Whether it still runs.
    pub running: bool,
    /// The round that it is in.
    pub round: u32,
    /// How many it has.
    pub rounds: u32,
    /// Queries that have been answered, one way or another.
    pub done: usize,
    /// How many of them failed.
    pub failed: usize,
    /// For how long it has run, or ran.
    pub elapsed_s: f64,
}

impl Storms {
    /// Runs a storm to its end. Dropping the future before ends it; a server therefore runs it in a
    /// task of its own.
    pub async fn run(&self, services: &Services, rounds: u32) -> Result<StormReport, Problem> {
        let running = self.begin(rounds)?;
        watch::all_answer(services).await?;
        tracing::warn!(rounds, action = "storm", "a storm begins");
        let attributes = vec![opentelemetry::KeyValue::new(
            "storm.rounds",
            i64::from(rounds),
        )];
        let (_, report) = span::apart("storm", attributes, running.rounds(services)).await;
        tracing::warn!(
            action = "storm",
            p95_ms = report.p95_ms,
            p99_ms = report.p99_ms,
            active_max = report.active_max,
            utilization_percent = report.pool_utilization_percent,
            failed = report.failed,
            failed_percent = report.failed_percent,
            "the storm is over"
        );
        running.end(report.clone());
        Ok(report)
    }

    /// Has the storm that runs end with the round that it is in.
    pub fn cancel(&self) {
        if let Some(current) = self.lock().current.as_mut().filter(|it| it.running) {
            current.cancelled = true;
        }
    }

    /// How far the storm is, and what became of the last one.
    pub fn progress(&self) -> Progress {
        let state = self.lock();
        state
            .current
            .as_ref()
            .map_or_else(Progress::default, |it| Progress {
                running: it.running,
                round: it.round,
                rounds: it.rounds,
                samples: it.samples.clone(),
                report: it.report.clone(),
            })
    }

    /// The same in a few words; nothing before the first storm.
    pub fn brief(&self) -> Option<Brief> {
        let state = self.lock();
        state.current.as_ref().map(|it| Brief {
            running: it.running,
            round: it.round,
            rounds: it.rounds,
            done: it.done,
            failed: it.failed,
            elapsed_s: it
                .took
                .unwrap_or_else(|| it.started.elapsed())
                .as_secs_f64(),
        })
    }

    fn begin(&self, rounds: u32) -> Result<Running, Problem> {
        let mut state = self.lock();
        if let Some(current) = state.current.as_ref().filter(|current| current.running) {
            let detail = format!(
                "a storm is running, in round {} of {}; wait for its end",
                current.round, current.rounds
            );
            return Err(Problem::new(StatusCode::CONFLICT, "storm_running", detail));
        }
        state.current = Some(Current {
            running: true,
            cancelled: false,
            started: Instant::now(),
            took: None,
            round: 0,
            rounds,
            done: 0,
            failed: 0,
            samples: Vec::new(),
            peak: Peak::default(),
            report: None,
        });
        Ok(Running {
            storms: self.clone(),
            rounds,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A std mutex: held for a few instructions, never across an await.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The storm that runs. Dropped, it does not run any more, whatever became of it.
struct Running {
    storms: Storms,
    rounds: u32,
}

impl Running {
    /// What is measured before, and then round after round, watched.
    async fn rounds(&self, services: &Services) -> StormReport {
        let before = round::before(services).await;
        let start = Instant::now();
        let mut asked = Vec::new();
        let mut begun = 0;
        let queries = async {
            for number in 0..self.rounds {
                if self.with(|current| current.cancelled) == Some(true) {
                    break;
                }
                begun = number + 1;
                self.with(|current| current.round = begun);
                let note = |query: &Asked| self.note(query);
                asked.extend(round::ask_at_once(services, number, note).await);
            }
        };
        tokio::select! {
            () = queries => {}
            () = self.watch(services) => {}
        }
        let peak = self.with(|current| current.peak).unwrap_or_default();
        let around = Around {
            took: start.elapsed(),
            baseline_p95_ms: before.baseline_p95_ms,
            single_query_ms: before.single_query_ms,
            active_max: peak.active,
            pool_utilization_percent: peak.pool_utilization_percent,
        };
        let names = services.each_ref().map(Upstream::name);
        StormReport::of(begun, names, &asked, around)
    }

    /// Looks at the services again and again.
    async fn watch(&self, services: &Services) {
        let mut look = tokio::time::interval(LOOK);
        // Late looks are not made up for: the services are busy enough.
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            if let Some(seen) = Seen::now(services).await {
                self.with(|current| current.add(seen));
            }
        }
    }

    fn note(&self, query: &Asked) {
        self.with(|current| {
            current.done += 1;
            current.failed += usize::from(!query.is_completed());
        });
    }

    fn end(&self, report: StormReport) {
        self.with(|current| current.report = Some(report));
    }

    fn with<T>(&self, change: impl FnOnce(&mut Current) -> T) -> Option<T> {
        self.storms.lock().current.as_mut().map(change)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.with(|current| {
            current.running = false;
            current.took = Some(current.started.elapsed());
        });
    }
}

impl Current {
    fn add(&mut self, seen: Seen) {
        self.peak.add(&seen);
        if self.samples.len() < MAX_SAMPLES {
            self.samples.push(Sample {
                t_s: self.started.elapsed().as_secs_f64(),
                p95_ms: seen.p95_ms,
                active: seen.active,
                pool_utilization_percent: seen.pool_utilization_percent(),
                failed: self.failed,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A second storm has to wait, and one that broke off does not stand in its way.
    #[test]
    fn one_storm_at_a_time() {
        let storms = Storms::default();
        assert_eq!(storms.progress(), Progress::default());
        let running = storms.begin(3).unwrap();
        assert_eq!(storms.begin(1).err().unwrap().code, "storm_running");
        let progress = storms.progress();
        assert!(progress.running);
        assert_eq!(progress.rounds, 3);
        storms.cancel();
        assert_eq!(running.with(|current| current.cancelled), Some(true));
        drop(running);
        assert!(!storms.progress().running);
        assert!(storms.begin(1).is_ok());
    }

    /// The samples are bounded, the peak is not forgotten with those that are not kept.
    #[test]
    fn samples_are_bounded() {
        let storms = Storms::default();
        let running = storms.begin(1).unwrap();
        let seen = |active| Seen {
            active,
            held: 43,
            max: 45,
            p95_ms: None,
        };
        for _ in 0..MAX_SAMPLES {
            running.with(|current| current.add(seen(1)));
        }
        running.with(|current| current.add(seen(43)));
        assert_eq!(storms.progress().samples.len(), MAX_SAMPLES);
        let peak = running.with(|current| current.peak).unwrap();
        assert_eq!(peak.active, 43);
        assert!((peak.pool_utilization_percent - 95.6).abs() < 0.1);
    }
}
