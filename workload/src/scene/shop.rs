//! The shop as the investigator sees it: through the gateway, as any other client would.

use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::{HeaderValue, Method};
use serde::Deserialize;
use serde_json::Value;

use super::SceneError;
use crate::index::Action;
use crate::load::{self, Pace};
use crate::problem::Problem;
use crate::services::gateway;
use crate::services::upstream::{Answer, Upstream, client};
use crate::storm::StormReport;
use crate::telemetry::memory::Line;

/// Questions about the state of things are answered at once or not at all.
const PATIENCE: Duration = Duration::from_secs(5);

/// A reset waits for what the services have running.
const RESET_PATIENCE: Duration = Duration::from_secs(20);

/// An index of the largest catalogue on a busy machine.
const INDEX_PATIENCE: Duration = Duration::from_secs(300);

/// A round whose every request runs into its time limit takes less.
const ROUND_PATIENCE: Duration = Duration::from_secs(20);

/// What precedes a storm's rounds: its own measurement of the shop at rest.
const BEFORE_PATIENCE: Duration = Duration::from_secs(20);

/// Requests a second of the traffic before a storm.
const RATE: f64 = 20.0;

/// Which traffic: the same each time the story is told.
const SEED: u64 = 1;

/// What the gateway tells of itself, of the services and of the database.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    /// Each service, and whether it answers.
    pub services: Vec<ServiceStatus>,
    /// The database; `None` when nothing can be had.
    pub database: Option<Database>,
    /// Whether the demo's endpoints answer.
    pub demo: bool,
    /// The storm that runs, or the last one.
    pub storm: Option<Storm>,
}

/// A service behind the gateway.
#[derive(Debug, Clone, Deserialize)]
pub struct ServiceStatus {
    /// Its name.
    pub name: String,
    /// Whether it answers.
    pub up: bool,
    /// Where it is.
    pub url: String,
    /// What it says of itself.
    health: Value,
}

/// The database that all share.
#[derive(Debug, Clone, Deserialize)]
pub struct Database {
    /// Its name.
    pub name: String,
    /// The server's version.
    pub version: String,
    /// Whether the search has its index.
    pub search_index: bool,
}

/// A storm, in a few words.
#[derive(Debug, Clone, Deserialize)]
pub struct Storm {
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
}

impl ServiceStatus {
    /// Connections in use and connections that there may be.
    fn pool(&self) -> Option<(u64, u64)> {
        let pool = &self.health["pool"];
        Some((pool["active"].as_u64()?, pool["max"].as_u64()?))
    }
}

impl Status {
    /// How full all pools together are, in percent; `None` where a service does not tell.
    pub fn pool_utilization_percent(&self) -> Option<f64> {
        let pools: Option<Vec<_>> = self.services.iter().map(ServiceStatus::pool).collect();
        let pools = pools?.into_iter();
        let (active, max) = pools.fold((0, 0), |(a, m), (active, max)| (a + active, m + max));
        // Dozens of connections, at most.
        (max > 0).then(|| active as f64 * 100.0 / max as f64)
    }
}

/// The gateway of a shop.
#[derive(Debug, Clone)]
pub struct Shop(Upstream);

impl Shop {
    /// The shop whose gateway is at `url` (`http://host:port`).
    pub fn at(url: &str) -> Result<Self, SceneError> {
        Ok(Self(Upstream::new(gateway::NAME, url, client())?))
    }

    /// The gateway's address.
    pub fn url(&self) -> &str {
        self.0.url()
    }

    /// How things are.
    pub async fn status(&self) -> Result<Status, SceneError> {
        let status = self.0.peek("/api/status", PATIENCE).await;
        status.map_err(|problem| SceneError::NoShop {
            url: self.url().to_owned(),
            reason: problem.detail,
        })
    }

    /// Ends what is simulated and cancels what runs.
    pub async fn reset(&self) -> Result<(), SceneError> {
        self.post("/api/demo/reset", "", RESET_PATIENCE).await?;
        Ok(())
    }

    /// Makes or drops the search's index; how long that took.
    pub async fn index(&self, action: Action) -> Result<Duration, SceneError> {
        let body = match action {
            Action::Create => r#"{"action": "create"}"#,
            Action::Drop => r#"{"action": "drop"}"#,
        };
        let start = Instant::now();
        self.post("/api/demo/index", body, INDEX_PATIENCE).await?;
        Ok(start.elapsed())
    }

    /// Drops the search's index where it is there; whether it was.
    pub async fn drop_index(&self) -> Result<bool, SceneError> {
        let database = self.status().await?.database;
        let is_there = database.is_some_and(|database| database.search_index);
        if is_there {
            self.index(Action::Drop).await?;
        }
        Ok(is_there)
    }

    /// A storm, to its end.
    pub async fn storm(&self, rounds: u32) -> Result<StormReport, SceneError> {
        const TRIGGER: &str = "/api/demo/trigger-database-scenario";
        let body = format!("{{\"rounds\": {rounds}}}");
        let patience = BEFORE_PATIENCE + ROUND_PATIENCE * rounds;
        let answer = self.post(TRIGGER, &body, patience).await?;
        serde_json::from_slice(&answer.body).map_err(|error| {
            SceneError::Answer(format!("{TRIGGER} answered something else: {error}"))
        })
    }

    /// What the last storm did; `None` where there was none.
    pub async fn last_storm(&self) -> Result<Option<StormReport>, SceneError> {
        #[derive(Deserialize)]
        struct Progress {
            report: Option<StormReport>,
        }
        let progress: Result<Progress, Problem> = self.0.peek("/api/demo/storm", PATIENCE).await;
        match progress {
            Ok(progress) => Ok(progress.report),
            Err(problem) => Err(SceneError::Answer(problem.detail)),
        }
    }

    /// A shop as on any other day: light traffic for `duration`.
    pub async fn traffic(&self, duration: Duration) -> Result<load::Report, SceneError> {
        let options = load::Options {
            url: self.url().to_owned(),
            pace: Pace::Open { rate: RATE },
            seed: SEED,
            duration,
        };
        Ok(load::run(&options, std::future::pending()).await?)
    }

    /// What all services logged in a trace, or, without one, lately; of `level` and above.
    pub async fn lines(&self, trace: Option<&str>, level: &str) -> Result<Vec<Line>, SceneError> {
        let mut path = format!("/api/logs?limit=200&level={level}");
        if let Some(trace) = trace {
            path.push_str("&trace_id=");
            path.push_str(trace);
        }
        let lines = self.0.peek(&path, PATIENCE).await;
        lines.map_err(|problem: Problem| SceneError::Answer(problem.detail))
    }

    async fn post(
        &self,
        path: &'static str,
        body: &str,
        patience: Duration,
    ) -> Result<Answer, SceneError> {
        let body = (!body.is_empty()).then(|| {
            let kind = HeaderValue::from_static("application/json");
            (kind, Bytes::copy_from_slice(body.as_bytes()))
        });
        let answer = self.0.call(path, Method::POST, path, body, patience).await;
        let answer =
            answer.map_err(|problem| SceneError::Answer(format!("{path}: {}", problem.detail)))?;
        if answer.status.is_success() {
            return Ok(answer);
        }
        let told: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let detail = told["detail"].as_str().unwrap_or("it does not say why");
        Err(SceneError::Answer(format!(
            "{path} was refused ({}): {detail}",
            answer.status
        )))
    }
}
