//! `workload load`: steady background traffic through the gateway, measured.
//!
//! Open loop (`rate`): requests are due at fixed times, whether or not the shop answers, and a latency counts from the
//! time at which the request was due. A slow shop therefore shows as slow, also where a client that waits for each
//! answer would have asked less often (coordinated omission). Closed loop (`clients`): each client asks again when it
//! has its answer, as fast as the shop allows.

mod tally;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::Method;
use fastrand::Rng;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

pub use tally::{Kind, Report};

use crate::services::gateway;
use crate::services::upstream::{Upstream, UpstreamError, client};
use crate::storm::{outcome, plan};
use tally::Tally;

/// Requests that may wait for their answer at once in an open loop. A shop that is so far behind is down; what is due
/// meanwhile waits, and that wait counts.
const MAX_IN_FLIGHT: usize = 1_000;

/// One request in so many looks for a rare word, which costs a scan: few enough to leave the 95th percentile to the
/// common ones.
const RARE_ONE_IN: usize = 200;

/// An answer that takes longer is not waited for: the gateway gives up before.
const TIMEOUT: Duration = Duration::from_secs(15);

/// After a failure a client of a closed loop waits, so that a broken shop is not hammered.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// At the end answers that are still due are waited for so long.
const DRAIN: Duration = Duration::from_secs(4);

/// The name of an answer that did not come in [`TIMEOUT`].
const NO_ANSWER: &str = "no_answer";

/// How requests follow each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// So many a second, whether or not they are answered.
    Open {
        /// Requests a second.
        rate: f64,
    },
    /// So many clients, each of which waits for its answer.
    Closed {
        /// Clients.
        clients: u32,
    },
}

/// What traffic is wanted.
#[derive(Debug, Clone)]
pub struct Options {
    /// The gateway: `http://host:port`.
    pub url: String,
    /// How requests follow each other.
    pub pace: Pace,
    /// Which of the possible sequences of requests.
    pub seed: u64,
    /// For how long.
    pub duration: Duration,
}

/// Sends the traffic, until its time is over or `stop` resolves, and tells what came of it.
///
/// # Errors
/// The address is none.
pub async fn run(
    options: &Options,
    stop: impl Future<Output = ()>,
) -> Result<Report, UpstreamError> {
    let gateway = Upstream::new(gateway::NAME, &options.url, client())?;
    let shared = Arc::new(Shared {
        gateway,
        tally: Mutex::new(Tally::default()),
        due: AtomicU64::new(0),
    });
    let started = Instant::now();
    let end = started + options.duration;
    let mut requests = JoinSet::new();
    let traffic = async {
        match options.pace {
            Pace::Open { rate } => open(&shared, rate, options.seed, end, &mut requests).await,
            Pace::Closed { clients } => {
                for client in 0..clients {
                    let seed = options.seed.wrapping_add(u64::from(client));
                    requests.spawn(closed(Arc::clone(&shared), seed, end));
                }
                sleep_until(end).await;
            }
        }
    };
    tokio::select! {
        () = traffic => {}
        () = stop => {}
    }
    let took = started.elapsed();
    shared.close();
    // Those that are under way.
    let drained = async { while requests.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(DRAIN, drained).await;
    requests.shutdown().await;
    let due = shared.due.load(Ordering::Relaxed);
    let tally = shared.tally.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(Report::of(options, took, due, &tally))
}

/// What all requests share.
#[derive(Debug)]
struct Shared {
    gateway: Upstream,
    // A std mutex: held for a few instructions, never across an await.
    tally: Mutex<Tally>,
    /// Requests that were due, sent or not.
    due: AtomicU64,
}

impl Shared {
    /// Sends one request and notes how long it took from `since`.
    async fn ask(&self, ask: &plan::Ask, since: Instant) -> bool {
        let path = format!("/api{}", ask.path);
        let call = self
            .gateway
            .call(ask.template, Method::GET, &path, None, TIMEOUT);
        let outcome = match call.await {
            Ok(answer) => outcome(&answer),
            Err(problem) if problem.status() == axum::http::StatusCode::GATEWAY_TIMEOUT => {
                NO_ANSWER.to_owned()
            }
            Err(problem) => problem.code.to_owned(),
        };
        let took = since.elapsed();
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.note(ask.template, took, &outcome)
    }

    /// From now on clients of a closed loop ask no more.
    fn close(&self) {
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.closed = true;
    }

    fn is_closed(&self) -> bool {
        let tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.closed
    }
}

/// Requests at fixed times. One that cannot be sent when it is due is sent later, with its wait counted.
async fn open(
    shared: &Arc<Shared>,
    rate: f64,
    seed: u64,
    end: Instant,
    requests: &mut JoinSet<()>,
) {
    let mut rng = Rng::with_seed(seed);
    let room = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    let start = Instant::now();
    for number in 0_u64.. {
        let due = start + Duration::from_secs_f64(number as f64 / rate);
        if due >= end {
            break;
        }
        sleep_until(due).await;
        shared.due.store(number + 1, Ordering::Relaxed);
        let ask = next(&mut rng);
        // Closed never: the semaphore lives as long as this loop.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        while requests.try_join_next().is_some() {}
        let sender = Arc::clone(shared);
        requests.spawn(async move {
            sender.ask(&ask, due).await;
            drop(permit);
        });
        if Instant::now() >= end {
            // All that were due by now, also those that nobody came to send.
            let all = (end - start).as_secs_f64() * rate;
            shared.due.store(all.ceil() as u64, Ordering::Relaxed);
            return;
        }
    }
    sleep_until(end).await;
}

/// One client after the other's answer.
async fn closed(shared: Arc<Shared>, seed: u64, end: Instant) {
    let mut rng = Rng::with_seed(seed);
    while Instant::now() < end && !shared.is_closed() {
        let ask = next(&mut rng);
        shared.due.fetch_add(1, Ordering::Relaxed);
        if !shared.ask(&ask, Instant::now()).await {
            sleep(AFTER_FAILURE).await;
        }
    }
}

/// The next request: nearly always something that costs the database little.
fn next(rng: &mut Rng) -> plan::Ask {
    if rng.usize(..RARE_ONE_IN) == 0 {
        return plan::single(rng.usize(..1_000));
    }
    plan::background(rng.usize(..100_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(seed: u64) -> Vec<plan::Ask> {
        let mut rng = Rng::with_seed(seed);
        (0..2_000).map(|_| next(&mut rng)).collect()
    }

    /// The same seed gives the same requests; nearly all are light, and each service is asked.
    #[test]
    fn the_mixture() {
        let asks = sequence(1);
        assert_eq!(asks, sequence(1));
        assert_ne!(asks, sequence(2));
        let rare = |ask: &&plan::Ask| {
            crate::catalogue::RARE_WORDS
                .iter()
                .any(|w| ask.path.ends_with(w))
        };
        let rare = asks.iter().filter(rare).count();
        assert!((1..=30).contains(&rare), "{rare}");
        for service in 0..3 {
            assert!(asks.iter().any(|ask| ask.service == service));
        }
    }
}
