//! How large the catalogue has to be on this machine for the storm to be what the scenario tells.
//!
//! The size follows from what one query costs the processor (`sums`); then a round of the storm
//! on the whole shop shows whether it does, and the size is corrected where it does not. What did
//! is remembered beside the private cluster (`memory`), so that it is done once for a machine.

mod cost;
mod sums;

use std::path::PathBuf;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderValue, Method};
use nix::sys::signal::Signal;
use tokio::sync::oneshot;

pub use sums::FAILED_PERCENT;

use crate::calibration::{Calibration, FileError, Machine, Measured, recall, server_version};
use crate::catalogue::Catalogue;
use crate::child::{Process, ReadyError};
use crate::db::{Database, DbError};
use crate::postgres::{self, Source};
use crate::problem::Problem;
use crate::services::gateway;
use crate::services::upstream::{Upstream, UpstreamError, client};
use crate::storm::StormReport;
use crate::supervise::{self, SuperviseError};

/// Large enough that the scan is what costs, small enough to be filled in seconds.
const PROBE_PRODUCTS: u32 = 30_000;

/// Rounds that are tried. With an undisturbed machine the first or the second will do.
const TRIES: u32 = 4;

/// A first start fetches and initialises; on a slow line that takes a while.
const POSTGRES_PATIENCE: Duration = Duration::from_secs(300);

/// PostgreSQL's own supervisor waits 20 s for it before it kills it.
const POSTGRES_GRACE: Duration = Duration::from_secs(25);

/// A round, with what is measured before, takes seconds.
const STORM_PATIENCE: Duration = Duration::from_secs(60);

const TRIGGER: &str = "/api/demo/trigger-database-scenario";

/// A calibration that did not come about.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// A file of ours or of the kernel's.
    #[error(transparent)]
    File(#[from] FileError),
    /// The private PostgreSQL.
    #[error("PostgreSQL did not start: {0}")]
    Postgres(ReadyError),
    /// The database cannot be used.
    #[error(transparent)]
    Database(#[from] DbError),
    /// A statement failed.
    #[error("the database could not answer: {0}")]
    Statement(#[from] sqlx::Error),
    /// The shop did not open.
    #[error(transparent)]
    Shop(#[from] SuperviseError),
    /// The shop ended in the middle of a round.
    #[error("the shop closed in the middle of a round")]
    Closed,
    /// The gateway has an address that is none.
    #[error(transparent)]
    Gateway(#[from] UpstreamError),
    /// The storm could not be had.
    #[error("the storm could not be had: {0}")]
    Storm(String),
}

/// What a calibration is done with.
#[derive(Debug, Clone)]
pub struct Options {
    /// This program, to be started again for each part of the shop.
    pub program: PathBuf,
    /// Where PostgreSQL's programs come from.
    pub source: Source,
    /// The private PostgreSQL's directory.
    pub directory: Option<PathBuf>,
    /// The user that everything runs as where root calls.
    pub user: Option<String>,
    /// Which catalogue.
    pub seed: i64,
    /// Where an earlier calibration is remembered, to be used if it is; nothing asks for a new one.
    pub remembered: Option<PathBuf>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The machine was known.
    Known(Calibration),
    /// It was measured now, and is to be remembered.
    Measured(Calibration),
    /// Nothing that was tried was good; this came nearest.
    Nearest {
        /// What that was; the cost of a query is estimated.
        found: Calibration,
        /// Whether what is remembered of this machine proved wrong.
        refuted: bool,
    },
}

/// Finds the catalogue's size; leaves nothing running. `tell` gets a line about each step.
pub async fn run(options: &Options, tell: impl Fn(&str)) -> Result<Outcome, CalibrateError> {
    let mut postgres = start_postgres(options)
        .map_err(|error| CalibrateError::Postgres(ReadyError::Failed(error)))?;
    let result = match postgres.ready(postgres::READY, POSTGRES_PATIENCE).await {
        Ok(url) => with_database(options, &url, tell).await,
        Err(error) => Err(CalibrateError::Postgres(error)),
    };
    if let Err(error) = postgres.stop(Signal::SIGTERM, POSTGRES_GRACE).await {
        tracing::warn!(%error, "PostgreSQL could not be stopped");
    }
    result
}

fn start_postgres(options: &Options) -> std::io::Result<Process> {
    let (directory, user) = (options.directory.as_deref(), options.user.as_deref());
    let mut command = postgres::command(&options.program, &options.source, directory, user);
    command.stdout(std::process::Stdio::piped());
    Process::spawn_watching(&mut command)
}

async fn with_database(
    options: &Options,
    url: &str,
    tell: impl Fn(&str),
) -> Result<Outcome, CalibrateError> {
    let database = Database::from_url(url)?;
    let pool = database.connect().await?;
    let machine = Machine::with(server_version(&pool).await?);
    database.migrate(&pool).await?;
    let mut refuted = false;
    if let Some(path) = &options.remembered
        && let Some(known) = recall(path, &machine)
    {
        let now = cost_with(options, &pool, known.products).await? / 1e6;
        if sums::costs_the_same(known.cpu_ms_per_query, now) {
            return Ok(Outcome::Known(known));
        }
        tell(&format!(
            "one search with {} products costs {now:.0} ms of CPU; it was {:.0} when this machine was calibrated",
            known.products, known.cpu_ms_per_query
        ));
        refuted = true;
    }
    let per_product = cost_with(options, &pool, PROBE_PRODUCTS).await? / f64::from(PROBE_PRODUCTS);
    let cpus = machine.cores.min(postgres::DEMO_CPUS);
    tell(&format!(
        "one search costs {:.2} ms of CPU for each 1,000 products; PostgreSQL has {cpus} CPUs",
        per_product / 1e3
    ));
    let products = sums::products_for(per_product, cpus);
    let (products, measured) = try_sizes(options, url, products, &tell).await?;
    let mut found = Calibration {
        machine,
        products,
        cpu_ms_per_query: per_product * f64::from(products) / 1e6,
        measured,
    };
    if !found.measured.faults().is_empty() {
        return Ok(Outcome::Nearest { found, refuted });
    }
    // At this size, as it is measured again before it is relied on.
    found.cpu_ms_per_query = cost_with(options, &pool, products).await? / 1e6;
    Ok(Outcome::Measured(found))
}

/// Has rounds of the storm, beginning with a size, until one shows what is wanted. The size that was best, and
/// what it showed.
async fn try_sizes(
    options: &Options,
    url: &str,
    mut products: u32,
    tell: &impl Fn(&str),
) -> Result<(u32, Measured), CalibrateError> {
    let mut best: Option<(u32, Measured)> = None;
    for _ in 0..TRIES {
        let measured = Measured::from(&one_round(options, url, products).await?);
        tell(&describe(products, &measured));
        if measured.faults().is_empty() {
            return Ok((products, measured));
        }
        // Of rounds that are all beyond the cliff the last is the nearest: it was the smallest.
        if best.is_none_or(|(_, best)| measured.distance() <= best.distance()) {
            best = Some((products, measured));
        }
        products = sums::adjusted(products, &measured);
    }
    Ok(best.expect("a round was had"))
}

/// The CPU time of one search in a catalogue of that size, in nanoseconds.
async fn cost_with(
    options: &Options,
    pool: &sqlx::PgPool,
    products: u32,
) -> Result<f64, CalibrateError> {
    let catalogue = Catalogue {
        products,
        seed: options.seed,
    };
    catalogue.ensure(pool).await?;
    cost::of_a_query(pool).await
}

/// A line about a round.
fn describe(products: u32, measured: &Measured) -> String {
    let ms = |value: Option<f64>| value.map_or("none".to_owned(), |ms| format!("{ms:.0} ms"));
    format!(
        "{products} products: P95 {}, {:.1} % failed, pools {:.1} % full; before: P95 {}, one search {}",
        ms(measured.p95_ms),
        measured.failed_percent,
        measured.pool_utilization_percent,
        ms(measured.baseline_p95_ms),
        ms(measured.single_query_ms),
    )
}

/// Opens the shop, has one round of the storm, and closes it.
async fn one_round(
    options: &Options,
    url: &str,
    products: u32,
) -> Result<StormReport, CalibrateError> {
    let shop = supervise::Options {
        program: options.program.clone(),
        database_url: Some(url.to_owned()),
        source: options.source.clone(),
        directory: None,
        user: options.user.clone(),
        catalogue: Catalogue {
            products,
            seed: options.seed,
        },
        remembered: None,
        port: 0,
        demo: true,
        flamegraphs: PathBuf::from("flamegraphs"),
    };
    let (opened, address) = oneshot::channel::<String>();
    let (close, closed) = oneshot::channel::<()>();
    let ready = |address: &str| {
        // Nobody waits for it any more: then the shop is about to be closed.
        let _ = opened.send(address.to_owned());
    };
    let stop = async {
        // An error says that the other end has gone: as good a reason.
        let _ = closed.await;
        Ok(())
    };
    let storm = async {
        let storm = match address.await {
            Ok(address) => storm(&address).await,
            Err(_) => Err(CalibrateError::Closed),
        };
        let _ = close.send(());
        storm
    };
    let (shop, report) = tokio::join!(supervise::run(&shop, ready, stop), storm);
    shop?;
    report
}

async fn storm(address: &str) -> Result<StormReport, CalibrateError> {
    let told = |problem: Problem| CalibrateError::Storm(problem.detail);
    let gateway = Upstream::new(gateway::NAME, address, client())?;
    let body = Some((
        HeaderValue::from_static("application/json"),
        Bytes::from_static(b"{\"rounds\":1}"),
    ));
    let answer = gateway
        .call(TRIGGER, Method::POST, TRIGGER, body, STORM_PATIENCE)
        .await
        .map_err(told)?;
    serde_json::from_slice(&answer.body).map_err(|_| {
        let text = String::from_utf8_lossy(&answer.body);
        CalibrateError::Storm(format!("{}: {text}", answer.status))
    })
}
