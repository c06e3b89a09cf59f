//! Visitors of the shop: a bounded, closed loop of searches through its HTTP endpoint.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::Uri;
use hdrhistogram::Histogram;
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::catalogue::{COMMON_WORDS, RARE_WORDS};

/// Visitors who look for something rare: each of their searches reads the whole table. Fewer
/// than would run into the statement timeout on two cores.
const RARE_VISITORS: usize = 4;

/// Visitors who look for something common: their searches end at once, so that the product
/// service has work of its own to be seen by.
const COMMON_VISITORS: usize = 4;

/// No answer takes longer: the service gives up before.
const TIMEOUT: Duration = Duration::from_secs(15);

/// After a failure a visitor waits, so that a broken service is not hammered.
const AFTER_FAILURE: Duration = Duration::from_millis(100);

/// The longest latency that is told apart, in microseconds.
const MAX_MICROS: u64 = 60_000_000;

/// Searches of one kind.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Latency {
    /// How many were answered.
    pub searches: u64,
    /// The median.
    pub p50_ms: f64,
    /// The 95th percentile.
    pub p95_ms: f64,
}

/// What the visitors saw.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Searches {
    /// For how long they searched.
    pub seconds: f64,
    /// Searches answered with a result.
    pub done: u64,
    /// Searches answered with an error, or not at all.
    pub failed: u64,
    /// The last of the errors.
    pub last_error: Option<String>,
    /// Words that few products have.
    pub rare: Latency,
    /// Words that many products have.
    pub common: Latency,
}

#[derive(Debug)]
struct Kind {
    latency: Histogram<u64>,
}

/// What all visitors write to.
#[derive(Debug)]
struct Tally {
    rare: Kind,
    common: Kind,
    failed: u64,
    last_error: Option<String>,
}

/// Visitors at work; dropping them ends their visits.
#[derive(Debug)]
pub struct Visitors {
    start: Instant,
    // A std mutex: held for a few instructions, never across an await.
    tally: Arc<Mutex<Tally>>,
    tasks: Mutex<JoinSet<()>>,
}

impl Visitors {
    /// Sends the visitors to the shop at `address` (`http://host:port`).
    pub fn start(address: &str) -> Self {
        let client = Client::builder(TokioExecutor::new()).build_http();
        let kind = || Kind {
            latency: new_histogram(),
        };
        let tally = Arc::new(Mutex::new(Tally {
            rare: kind(),
            common: kind(),
            failed: 0,
            last_error: None,
        }));
        let mut tasks = JoinSet::new();
        for number in 0..RARE_VISITORS + COMMON_VISITORS {
            let visit = Visit {
                client: client.clone(),
                search: format!("{address}/products/search"),
                rare: number < RARE_VISITORS,
                tally: Arc::clone(&tally),
            };
            tasks.spawn(visit.search_for_ever(number));
        }
        Self {
            start: Instant::now(),
            tally,
            tasks: Mutex::new(tasks),
        }
    }

    /// How many searches were answered so far.
    pub fn done(&self) -> u64 {
        let tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.rare.latency.len() + tally.common.latency.len()
    }

    /// Sends the visitors home.
    pub fn leave(&self) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.abort_all();
    }

    /// Sends the visitors home and asks them what they saw.
    pub fn stop(self) -> Searches {
        self.leave();
        let seconds = self.start.elapsed().as_secs_f64();
        let tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        let (rare, common) = (tally.rare.latency(), tally.common.latency());
        Searches {
            seconds,
            done: rare.searches + common.searches,
            failed: tally.failed,
            last_error: tally.last_error.clone(),
            rare,
            common,
        }
    }
}

impl Kind {
    fn latency(&self) -> Latency {
        let quantile = |q| {
            let micros = u32::try_from(self.latency.value_at_quantile(q)).unwrap_or(u32::MAX);
            f64::from(micros) / 1000.0
        };
        Latency {
            searches: self.latency.len(),
            p50_ms: quantile(0.5),
            p95_ms: quantile(0.95),
        }
    }
}

/// One visitor's way through the words.
struct Visit {
    client: Client<HttpConnector, Empty<Bytes>>,
    search: String,
    rare: bool,
    tally: Arc<Mutex<Tally>>,
}

impl Visit {
    async fn search_for_ever(self, number: usize) {
        let words: &[&str] = if self.rare {
            &RARE_WORDS
        } else {
            &COMMON_WORDS
        };
        // Each visitor starts elsewhere, so that they do not search the same word in step.
        for word in words.iter().cycle().skip(number * 11) {
            let start = Instant::now();
            let result = self.search_for(word).await;
            self.note(start.elapsed(), result).await;
        }
    }

    async fn search_for(&self, word: &str) -> Result<(), String> {
        // The words are plain letters: nothing to escape.
        let uri: Uri = format!("{}?q={word}", self.search)
            .parse()
            .map_err(|error| format!("{error}"))?;
        let answer = async {
            let response = self.client.get(uri).await.map_err(|e| e.to_string())?;
            let status = response.status();
            let body = response.into_body().collect().await;
            let body = body.map_err(|e| e.to_string())?.to_bytes();
            Ok::<_, String>((status, body))
        };
        let answer = tokio::time::timeout(TIMEOUT, answer).await;
        let (status, body) = answer.map_err(|_| "no answer in time".to_owned())??;
        if status.is_success() {
            return Ok(());
        }
        Err(format!("{status}: {}", String::from_utf8_lossy(&body)))
    }

    async fn note(&self, elapsed: Duration, result: Result<(), String>) {
        let failed = result.is_err();
        {
            let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(()) => {
                    let kind = if self.rare {
                        &mut tally.rare
                    } else {
                        &mut tally.common
                    };
                    let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
                    kind.latency.saturating_record(micros);
                }
                Err(error) => {
                    tally.failed += 1;
                    tally.last_error = Some(error);
                }
            }
        }
        if failed {
            tokio::time::sleep(AFTER_FAILURE).await;
        }
    }
}

fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_MICROS, 3)
        .expect("1 to a minute with three digits is a valid histogram")
}
