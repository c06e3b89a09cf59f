//! `workload load`: steady background traffic.

use std::time::Duration;

use clap::Args;
use workload::child;
use workload::load::{self, Options, Pace};

use super::{announce, runtime};

/// More than one machine answers: a slip of the keyboard should not take a network down.
const MAX_RATE: f64 = 10_000.0;

/// A day.
const MAX_DURATION: Duration = Duration::from_secs(86_400);

/// Steady background traffic through the gateway.
#[derive(Debug, Args)]
pub struct Load {
    /// The gateway
    #[arg(long, default_value = "http://127.0.0.1:8010")]
    url: String,
    /// Open loop: so many requests a second, whether or not they are answered [default: 20]
    #[arg(long, conflicts_with = "clients", value_parser = rate)]
    rate: Option<f64>,
    /// Closed loop: so many clients, each of which waits for its answer
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    clients: Option<u32>,
    /// Which of the possible sequences of requests
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// For how long, for example 30s or 5m
    #[arg(long, default_value = "60s", value_parser = duration)]
    duration: Duration,
    /// Print the result as one JSON object on standard output
    #[arg(long)]
    json: bool,
    /// End when standard input closes, which it does when the parent has gone
    #[arg(long, hide = true)]
    with_parent: bool,
}

/// What there is without `--rate` and `--clients`: a few per cent of the pools of a laptop's shop.
const DEFAULT_RATE: f64 = 20.0;

fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= MAX_RATE => Ok(rate),
        _ => Err(format!("must be a number above 0, at most {MAX_RATE}")),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    // A bare number is seconds, as with the profiler.
    let parsed = match text.parse::<u64>() {
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
        Err(_) => humantime::parse_duration(text).map_err(|error| error.to_string()),
    };
    match parsed? {
        duration if duration.is_zero() => Err("must be longer than nothing".to_owned()),
        duration if duration > MAX_DURATION => Err("must be a day at most".to_owned()),
        duration => Ok(duration),
    }
}

impl Load {
    /// Runs it.
    pub fn run(self) -> anyhow::Result<()> {
        let pace = match self.clients {
            Some(clients) => Pace::Closed { clients },
            None => Pace::Open {
                rate: self.rate.unwrap_or(DEFAULT_RATE),
            },
        };
        let options = Options {
            url: self.url,
            pace,
            seed: self.seed,
            duration: self.duration,
        };
        let with_parent = self.with_parent;
        let report = runtime("load")?.block_on(async {
            let stop = async {
                if let Err(error) = child::told_to_stop(with_parent).await {
                    tracing::error!(%error, "cannot watch for signals");
                }
            };
            load::run(&options, stop).await
        })?;
        if self.json {
            announce(&serde_json::to_string(&report)?);
        } else {
            announce(&report.to_string());
        }
        anyhow::ensure!(
            report.completed > 0 || report.due == 0,
            "no request was answered by {}; is the shop open? (`workload all`)",
            options.url
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nonsense is refused.
    #[test]
    fn figures_are_checked() {
        assert_eq!(rate("0.5"), Ok(0.5));
        for wrong in ["0", "-1", "NaN", "inf", "10001", "x"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        for wrong in ["0", "0s", "2days", "soon"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
