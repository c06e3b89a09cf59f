//! What an export has come to: how much waits, how much arrived, how much was lost and why. A
//! receiver that is down costs a warning now and then, and nothing else.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::metrics::Meter;
use opentelemetry_sdk::error::OTelSdkResult;

/// The least time between two warnings about one signal.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// The account of one signal.
#[derive(Debug)]
pub(super) struct Account {
    /// `spans`, `log records` or `metrics`.
    what: &'static str,
    /// As the conventions for an SDK's own metrics name it; `None` where nothing is queued.
    queued: Option<&'static str>,
    /// More than so many never wait.
    limit: usize,
    /// In the queue, and in the exporter's hands.
    waiting: AtomicUsize,
    delivered: AtomicU64,
    failed: AtomicU64,
    refused: AtomicU64,
    trouble: Mutex<Trouble>,
}

#[derive(Debug, Default)]
struct Trouble {
    failing: bool,
    warned: Option<Instant>,
}

impl Account {
    /// The account of spans or log records, of which at most `limit` wait.
    pub(super) fn queued(what: &'static str, name: &'static str, limit: usize) -> Arc<Self> {
        Arc::new(Self {
            queued: Some(name),
            ..Self::new(what, limit)
        })
    }

    /// The account of metrics: they do not wait, the next export tells the same sums again.
    pub(super) fn unqueued(what: &'static str) -> Arc<Self> {
        Arc::new(Self::new(what, 0))
    }

    fn new(what: &'static str, limit: usize) -> Self {
        Self {
            what,
            queued: None,
            limit,
            waiting: AtomicUsize::new(0),
            delivered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            trouble: Mutex::default(),
        }
    }

    /// Whether one more may wait. It is lost when not.
    pub(super) fn admit(&self) -> bool {
        // Two at once may both be refused where one would fit; never is one too many let in.
        if self.waiting.fetch_add(1, Relaxed) < self.limit {
            return true;
        }
        self.waiting.fetch_sub(1, Relaxed);
        self.refused.fetch_add(1, Relaxed);
        false
    }

    /// What became of `count` of them: they wait no longer.
    pub(super) fn settle(&self, count: usize, outcome: &OTelSdkResult) {
        if self.queued.is_some() {
            self.waiting.fetch_sub(count, Relaxed);
        }
        let total = match outcome {
            Ok(()) => &self.delivered,
            Err(_) => &self.failed,
        };
        total.fetch_add(count as u64, Relaxed);
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Err(error) => {
                trouble.failing = true;
                if trouble.warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
                    trouble.warned = Some(Instant::now());
                    let (signal, lost) = (self.what, self.lost());
                    tracing::warn!(signal, %error, lost, "telemetry cannot be exported");
                }
            }
            Ok(()) if trouble.failing => {
                *trouble = Trouble::default();
                tracing::info!(signal = self.what, "telemetry is exported again");
            }
            Ok(()) => {}
        }
    }

    /// How many will never arrive.
    fn lost(&self) -> u64 {
        if self.queued.is_none() {
            return 0;
        }
        self.refused.load(Relaxed) + self.failed.load(Relaxed)
    }

    /// At the end: whatever still waits is lost as well.
    pub(super) fn close(&self) {
        let unsent = self.waiting.swap(0, Relaxed) as u64;
        let lost = self.lost() + unsent;
        if self.queued.is_some() && lost > 0 {
            tracing::warn!(
                signal = self.what,
                lost,
                queue_full = self.refused.load(Relaxed),
                export_failed = self.failed.load(Relaxed),
                unsent,
                delivered = self.delivered.load(Relaxed),
                "telemetry was lost"
            );
        }
    }

    /// Tells the sums as metrics of the SDK: <https://opentelemetry.io/docs/specs/semconv/otel/sdk-metrics/>.
    pub(super) fn measure(self: &Arc<Self>, meter: &Meter) {
        let Some(name) = self.queued else { return };
        let account = Arc::clone(self);
        meter
            .u64_observable_counter(format!("otel.sdk.exporter.{name}.exported"))
            .with_unit(format!("{{{name}}}"))
            .with_callback(move |counter| {
                counter.observe(account.delivered.load(Relaxed), &[]);
                let failed = [KeyValue::new("error.type", "export_failed")];
                counter.observe(account.failed.load(Relaxed), &failed);
            })
            .build();
        let account = Arc::clone(self);
        meter
            .u64_observable_counter(format!("otel.sdk.processor.{name}.processed"))
            .with_unit(format!("{{{name}}}"))
            .with_callback(move |counter| {
                let taken = account.delivered.load(Relaxed) + account.failed.load(Relaxed);
                counter.observe(taken, &[]);
                let full = [KeyValue::new("error.type", "queue_full")];
                counter.observe(account.refused.load(Relaxed), &full);
            })
            .build();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry_sdk::error::OTelSdkError;

    /// Only so many wait; the rest is refused and counted, and there is room again after an
    /// export, whatever became of it.
    #[test]
    fn a_full_queue_refuses() {
        let account = Account::queued("spans", "span", 3);
        let admitted = |account: &Account| (0..5).filter(|_| account.admit()).count();
        assert_eq!(admitted(&account), 3);
        assert_eq!(account.lost(), 2);
        account.settle(3, &Ok(()));
        assert_eq!(admitted(&account), 3);
        account.settle(2, &Err(OTelSdkError::Timeout(Duration::ZERO)));
        assert_eq!(account.lost(), 2 + 2 + 2);
        assert_eq!(account.delivered.load(Relaxed), 3);
        assert_eq!(account.waiting.load(Relaxed), 1);
    }

    /// Threads that come at once never get more in than there is room for.
    #[test]
    fn the_bound_holds_among_threads() {
        let account = Account::queued("spans", "span", 100);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..1000).filter(|_| account.admit()).count());
            }
        });
        let waiting = account.waiting.load(Relaxed) as u64;
        assert!(waiting <= 100, "{waiting}");
        assert_eq!(waiting + account.refused.load(Relaxed), 4000);
    }
}
