//! What one of the storm's queries costs the processor.

use std::fs;

use sqlx::{Connection, PgConnection, PgPool};

use super::CalibrateError;
use crate::calibration::FileError;
use crate::catalogue::RARE_WORDS;
use crate::services::product::SEARCH;

/// Queries before the measured ones: the table is in memory then, and the catalogues are read.
const WARM_UP: usize = 2;

/// Measured queries, of which the median counts.
const MEASURED: usize = 7;

/// The CPU time of one search for a rare word, in nanoseconds. What else runs on the machine hardly
/// matters: it is the backend's own time, by the kernel's account.
pub async fn of_a_query(pool: &PgPool) -> Result<f64, CalibrateError> {
    let mut connection = pool.acquire().await?;
    // Workers would do a part of it, in processes of their own; and a story that was broken off
    // may have left the index.
    let mut transaction = connection.begin().await?;
    sqlx::raw_sql(
        "SET LOCAL max_parallel_workers_per_gather = 0; SET LOCAL enable_bitmapscan = off",
    )
    .execute(&mut *transaction)
    .await?;
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()")
        .fetch_one(&mut *transaction)
        .await?;
    let mut costs = Vec::with_capacity(MEASURED);
    for (number, word) in RARE_WORDS.iter().take(WARM_UP + MEASURED).enumerate() {
        let before = cpu_nanos(pid)?;
        search(&mut transaction, word).await?;
        if number >= WARM_UP {
            costs.push(cpu_nanos(pid)?.saturating_sub(before));
        }
    }
    transaction.rollback().await?;
    costs.sort_unstable();
    let median = u32::try_from(costs[costs.len() / 2]).unwrap_or(u32::MAX);
    Ok(f64::from(median))
}

async fn search(connection: &mut PgConnection, word: &str) -> Result<(), sqlx::Error> {
    sqlx::query(SEARCH)
        .bind(word)
        .bind(20_i64)
        .fetch_all(connection)
        .await
        .map(drop)
}

/// How long a process of one thread has been on a processor
/// (<https://docs.kernel.org/scheduler/sched-stats.html#proc-pid-schedstat>).
fn cpu_nanos(pid: i32) -> Result<u64, CalibrateError> {
    let path = format!("/proc/{pid}/schedstat");
    let text = fs::read_to_string(&path).map_err(|source| FileError {
        path: path.clone().into(),
        source,
    })?;
    let first = text.split_whitespace().next();
    let nanos = first.and_then(|nanos| nanos.parse().ok());
    nanos.ok_or_else(|| {
        CalibrateError::File(FileError {
            path: path.into(),
            source: std::io::ErrorKind::InvalidData.into(),
        })
    })
}
