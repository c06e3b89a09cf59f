//! The size of the catalogue that was found for a machine, in a file beside the private cluster.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::catalogue::MAX_PRODUCTS;
use crate::db::Database;

/// The file's name in the cache directory.
const FILE: &str = "calibration.json";

/// A calibration is a few hundred bytes.
const MAX_BYTES: u64 = 16 * 1024;

/// What a catalogue's size depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu_model: String,
    /// How many processors this process may use.
    pub cores: usize,
    /// The server's version.
    pub postgres_version: String,
}

/// A catalogue's size that was tried on a machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Where.
    pub machine: Machine,
    /// The size.
    pub products: u32,
    /// The CPU time of one of the storm's queries at that size, alone.
    pub cpu_ms_per_query: f64,
    /// What a round of the storm showed with it.
    pub measured: Measured,
}

/// What a round of the storm showed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The 95th percentile of the completed queries.
    pub p95_ms: Option<f64>,
    /// Queries that failed, in percent.
    pub failed_percent: f64,
    /// The fullest that the pools were seen, in percent.
    pub pool_utilization_percent: f64,
    /// The background's 95th percentile just before.
    pub baseline_p95_ms: Option<f64>,
    /// One query alone, just before.
    pub single_query_ms: Option<f64>,
}

/// A file that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct FileError {
    /// Which.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl Machine {
    /// This machine with that server.
    pub fn with(postgres_version: String) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            cpu_model: cpu_model(&cpuinfo),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            postgres_version,
        }
    }
}

/// The processor's name: on x86 by name, on ARM by the numbers that stand for it.
fn cpu_model(cpuinfo: &str) -> String {
    let value = |key: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(key))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    value("model name")
        .or_else(|| {
            Some(format!(
                "{} {}",
                value("CPU implementer")?,
                value("CPU part")?
            ))
        })
        .unwrap_or_else(|| "unknown".to_owned())
}

/// Where a cache directory has its calibration.
pub fn path(cache: &Path) -> PathBuf {
    cache.join(FILE)
}

/// What is remembered of `machine`. Whatever is wrong with the file, it remembers nothing.
pub fn recall(path: &Path, machine: &Machine) -> Option<Calibration> {
    // The directory may be another user's: no link is followed, and no pipe waited for.
    let file = File::options()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path)
        .ok()?;
    let mut text = String::new();
    file.take(MAX_BYTES).read_to_string(&mut text).ok()?;
    let found: Calibration = serde_json::from_str(&text).ok()?;
    let is_ours = found.machine == *machine && (1..=MAX_PRODUCTS).contains(&found.products);
    is_ours.then_some(found)
}

/// The size that is remembered for this machine and the server at `url`.
pub async fn known_size(remembered: &Path, url: &str) -> Option<u32> {
    let pool = Database::from_url(url).ok()?.connect().await.ok()?;
    let version = server_version(&pool).await;
    pool.close().await;
    Some(recall(remembered, &Machine::with(version.ok()?))?.products)
}

/// The server's version.
///
/// # Errors
/// The statement failed.
pub async fn server_version(pool: &sqlx::PgPool) -> Result<String, sqlx::Error> {
    sqlx::query_scalar("SELECT current_setting('server_version')")
        .fetch_one(pool)
        .await
}

/// Remembers. To be called as the user whom the cache belongs to.
pub fn remember(path: &Path, calibration: &Calibration) -> Result<(), FileError> {
    let write = || -> io::Result<()> {
        let text = serde_json::to_string_pretty(calibration)?;
        // Complete or not at all.
        let new = path.with_extension("new");
        let mut file = File::options()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(text.as_bytes())?;
        fs::rename(&new, path)
    };
    write().map_err(|source| FileError {
        path: path.to_owned(),
        source,
    })
}

/// Forgets what proved wrong. To be called as the user whom the cache belongs to.
pub fn forget(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(FileError {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calibration(version: &str) -> Calibration {
        Calibration {
            machine: Machine::with(version.to_owned()),
            products: 71_000,
            cpu_ms_per_query: 121.5,
            measured: Measured {
                p95_ms: Some(2612.0),
                failed_percent: 7.0,
                pool_utilization_percent: 95.6,
                baseline_p95_ms: Some(9.0),
                single_query_ms: Some(133.0),
            },
        }
    }

    /// What is remembered is remembered for the same machine and server, and a broken file is none.
    #[test]
    fn a_calibration_is_remembered() {
        let directory = std::env::temp_dir().join(format!("calibration-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = path(&directory);
        let ours = calibration("18.0");
        assert_eq!(recall(&path, &ours.machine), None);
        remember(&path, &ours).unwrap();
        assert_eq!(recall(&path, &ours.machine), Some(ours.clone()));
        assert_eq!(recall(&path, &calibration("17.6").machine), None);
        fs::write(&path, "{\"products\":").unwrap();
        assert_eq!(recall(&path, &ours.machine), None);
        for _ in 0..2 {
            forget(&path).unwrap();
            assert!(!path.exists());
        }
        fs::remove_dir_all(&directory).unwrap();
    }

    /// Both ways of naming a processor are understood.
    #[test]
    fn a_processor_has_a_name() {
        assert_eq!(
            cpu_model("processor\t: 0\nmodel name\t: AMD EPYC 7763\n"),
            "AMD EPYC 7763"
        );
        let arm = "CPU implementer\t: 0x41\nCPU part\t: 0xd0c\n";
        assert_eq!(cpu_model(arm), "0x41 0xd0c");
        assert_eq!(cpu_model(""), "unknown");
    }
}
