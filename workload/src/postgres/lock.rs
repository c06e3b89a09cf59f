//! A file lock that goes with its process, however that ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use super::PostgresError;

/// How long to wait for another process that fetches the same archive.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often to look.
const POLL: Duration = Duration::from_millis(100);

/// A lock that is held as long as this value lives.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock, or says that somebody has it (`None`).
    pub fn try_take(path: &Path) -> Result<Option<Self>, PostgresError> {
        let failed = |source| PostgresError::File {
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(failed(error)),
        }
    }

    /// Waits for the lock, within reason.
    pub async fn wait(path: &Path) -> Result<Self, PostgresError> {
        let wait = async {
            loop {
                if let Some(lock) = Self::try_take(path)? {
                    return Ok(lock);
                }
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait)
            .await
            .unwrap_or_else(|_| {
                Err(PostgresError::Locked {
                    path: path.to_owned(),
                })
            })
    }
}
