//! `GET /debug/pprof/profile`: the process' own view of its CPU, in pprof's format.
//!
//! It stands beside the agent's view from outside, to be compared with it. It sees this process
//! alone, and never the kernel.

use std::io::Write;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use flate2::Compression;
use flate2::write::GzEncoder;
use nix::sys::signal::{self, Signal};
use pprof::ProfilerGuardBuilder;
use pprof::protos::Message;
use serde::Deserialize;
use tokio::sync::Semaphore;

use crate::problem::Problem;

/// The longest recording: the whole of it is kept in memory, and the request stays open.
const MAX_SECONDS: u32 = 60;

/// The highest rate: a signal handler's own time should stay far below a percent or two.
const MAX_FREQUENCY: i32 = 999;

#[derive(Debug, Deserialize)]
struct ProfileQuery {
    #[serde(default = "default_seconds")]
    seconds: u32,
    #[serde(default = "default_frequency")]
    frequency: i32,
}

fn default_seconds() -> u32 {
    10
}

fn default_frequency() -> i32 {
    99
}

/// The profiler's route. There is one interval timer per process, so one recording at a time.
pub fn router() -> Router {
    Router::new()
        .route("/debug/pprof/profile", get(profile))
        .with_state(Arc::new(Semaphore::new(1)))
}

async fn profile(
    State(one_at_a_time): State<Arc<Semaphore>>,
    query: Result<Query<ProfileQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) =
        query.map_err(|error| Problem::bad_request("bad_query", error.body_text()))?;
    if !(1..=MAX_SECONDS).contains(&query.seconds) {
        let detail = format!("seconds must lie between 1 and {MAX_SECONDS}");
        return Err(Problem::bad_request("seconds_out_of_range", detail));
    }
    if !(1..=MAX_FREQUENCY).contains(&query.frequency) {
        let detail = format!("frequency must lie between 1 and {MAX_FREQUENCY}");
        return Err(Problem::bad_request("frequency_out_of_range", detail));
    }
    let Ok(_permit) = one_at_a_time.try_acquire() else {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "profile_running",
            "another profile is being recorded; try again when it has ended",
        ));
    };
    let body = record(query).await?;
    Ok((
        [
            (header::CONTENT_TYPE, "application/octet-stream"),
            (
                header::CONTENT_DISPOSITION,
                "attachment; filename=\"profile.pb.gz\"",
            ),
        ],
        body,
    )
        .into_response())
}

/// Readies the profiler for the signals that it works by.
///
/// The crate reads the unwind information of all libraries at its first signal, in the handler: it allocates
/// there, and waits for ever when the signal has interrupted the allocator. So the first signal is raised here,
/// where nothing is interrupted; later ones find everything made.
fn prepare() -> Result<(), pprof::Error> {
    static PREPARED: OnceLock<()> = OnceLock::new();
    if PREPARED.get().is_none() {
        // The timer's own first tick is a second of CPU time away.
        let _guard = ProfilerGuardBuilder::default().frequency(1).build()?;
        signal::raise(Signal::SIGPROF).map_err(std::io::Error::from)?;
        let _ = PREPARED.set(());
    }
    Ok(())
}

/// Records and encodes. When the client goes away the future is dropped, and the guard with it.
async fn record(query: ProfileQuery) -> Result<Vec<u8>, Problem> {
    // Reads debug information: not on a thread that serves requests.
    let prepared = tokio::task::spawn_blocking(prepare).await;
    prepared.map_err(internal)?.map_err(internal)?;
    let guard = ProfilerGuardBuilder::default()
        .frequency(query.frequency)
        .build()
        .map_err(internal)?;
    tokio::time::sleep(Duration::from_secs(u64::from(query.seconds))).await;
    // Resolving reads the executable's debug information: not on a thread that serves requests.
    tokio::task::spawn_blocking(move || {
        let report = guard.report().build().map_err(internal)?;
        drop(guard);
        let profile = report.pprof().map_err(internal)?;
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(&profile.encode_to_vec()).map_err(internal)?;
        gzip.finish().map_err(internal)
    })
    .await
    .map_err(internal)?
}

fn internal(error: impl std::fmt::Display) -> Problem {
    tracing::error!(%error, "in-process profile failed");
    Problem::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "profile_failed",
        "the profile could not be recorded",
    )
}
