//! How long a service's statements have taken in the last seconds.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// What counts as lately.
pub const WINDOW: Duration = Duration::from_secs(10);

/// Statements that are remembered: more than a service ends in [`WINDOW`] on a laptop, and 256 KiB.
const MAX_REMEMBERED: usize = 16_384;

/// The latencies of the last [`WINDOW`], or of the last 16,384 statements where there were more.
#[derive(Debug, Default)]
pub struct Live {
    // A std mutex: held for a few instructions, never across an await.
    recent: Mutex<VecDeque<(Instant, Duration)>>,
}

/// What [`Live`] tells.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// The median; `null` when nothing happened.
    pub p50_ms: Option<f64>,
    /// The 95th percentile; `null` when nothing happened.
    pub p95_ms: Option<f64>,
    /// Of how many statements.
    pub count: usize,
}

impl Live {
    /// Notes a statement that ended now, however it ended.
    pub fn record(&self, took: Duration) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() == MAX_REMEMBERED {
            recent.pop_front();
        }
        recent.push_back((Instant::now(), took));
    }

    /// The latencies of the last [`WINDOW`].
    pub fn latency(&self) -> Latency {
        let mut took: Vec<Duration> = {
            let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
            while let Some((ended, _)) = recent.front()
                && ended.elapsed() > WINDOW
            {
                recent.pop_front();
            }
            recent.iter().map(|(_, took)| *took).collect()
        };
        took.sort_unstable();
        Latency {
            p50_ms: percentile(&took, 50),
            p95_ms: percentile(&took, 95),
            count: took.len(),
        }
    }
}

/// The smallest value that `percent` of all values do not exceed, in milliseconds.
fn percentile(sorted: &[Duration], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100);
    let value = sorted.get(rank.saturating_sub(1))?;
    Some(value.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Percentiles are values that occurred, and nothing is no number.
    #[test]
    fn percentiles_are_of_what_happened() {
        let live = Live::default();
        let none = Latency {
            p50_ms: None,
            p95_ms: None,
            count: 0,
        };
        assert_eq!(live.latency(), none);
        for ms in (1..=100).rev() {
            live.record(Duration::from_millis(ms));
        }
        let latency = live.latency();
        assert_eq!((latency.p50_ms, latency.p95_ms), (Some(50.0), Some(95.0)));
        assert_eq!(latency.count, 100);
    }

    /// The memory is bounded.
    #[test]
    fn the_oldest_is_forgotten() {
        let live = Live::default();
        live.record(Duration::from_secs(9));
        for _ in 0..MAX_REMEMBERED {
            live.record(Duration::from_millis(1));
        }
        assert_eq!(live.latency().count, MAX_REMEMBERED);
        assert!(
            live.recent
                .lock()
                .unwrap()
                .iter()
                .all(|(_, took)| took.as_millis() == 1)
        );
    }
}
