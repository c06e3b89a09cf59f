//! How the services are while a storm runs, by their own `/health`.

use std::time::Duration;

use serde::Deserialize;

use super::Services;
use crate::problem::Problem;
use crate::services::upstream::Upstream;

/// A service under a storm answers this question in milliseconds; one that needs longer is left out.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a storm reads of a service's health.
#[derive(Debug, Deserialize)]
struct Health {
    pool: Pool,
    queries: Queries,
    latency: Latency,
}

#[derive(Debug, Deserialize)]
struct Pool {
    active: u32,
    max: u32,
}

#[derive(Debug, Deserialize)]
struct Queries {
    active: u64,
}

#[derive(Debug, Deserialize)]
struct Latency {
    p95_ms: Option<f64>,
}

/// All services at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Seen {
    /// Statements that run.
    pub active: u64,
    /// Connections in use.
    pub held: u32,
    /// Connections that there may be.
    pub max: u32,
    /// The slowest service's.
    pub p95_ms: Option<f64>,
}

/// The most of what was seen.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Peak {
    pub active: u64,
    pub pool_utilization_percent: f64,
}

impl Seen {
    /// Nothing, when not all of them answer: a sum of some would not be the shop's.
    pub async fn now(services: &Services) -> Option<Self> {
        let [product, order, inventory] = services.each_ref().map(health);
        let healths = tokio::try_join!(product, order, inventory);
        let (product, order, inventory) = healths.ok()?;
        let healths = [product, order, inventory];
        Some(Self {
            active: healths.iter().map(|health| health.queries.active).sum(),
            held: healths.iter().map(|health| health.pool.active).sum(),
            max: healths.iter().map(|health| health.pool.max).sum(),
            p95_ms: healths
                .iter()
                .filter_map(|health| health.latency.p95_ms)
                .max_by(f64::total_cmp),
        })
    }

    pub fn pool_utilization_percent(&self) -> f64 {
        f64::from(self.held) * 100.0 / f64::from(self.max.max(1))
    }
}

impl Peak {
    pub fn add(&mut self, seen: &Seen) {
        self.active = self.active.max(seen.active);
        let utilization = seen.pool_utilization_percent();
        self.pool_utilization_percent = self.pool_utilization_percent.max(utilization);
    }
}

/// Whether each service answers; the first that does not is named.
pub(super) async fn all_answer(services: &Services) -> Result<(), Problem> {
    let [product, order, inventory] = services.each_ref().map(health);
    tokio::try_join!(product, order, inventory).map(drop)
}

async fn health(service: &Upstream) -> Result<Health, Problem> {
    service.peek("/health", PATIENCE).await
}
