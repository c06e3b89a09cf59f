//! A private PostgreSQL: own data directory, free port, loopback, random password, never root,
//! and gone when whoever started it has gone.
//!
//! `workload postgres` is the supervisor. PostgreSQL is its direct child and gets an immediate
//! shutdown from the kernel when the supervisor dies; the supervisor itself ends with its
//! parent by watching its standard input. Programs and data are kept between runs.

mod binaries;
mod cluster;
mod lock;
mod pin;

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use tokio::process::Command;

pub use binaries::{Binaries, Source, VERSION};
pub use cluster::{Cluster, Server};
pub use pin::{DEMO_CPUS, pin};

/// What precedes the URL on the line by which the supervisor says that the server is ready.
pub const READY: &str = "DATABASE_URL=";

/// A private PostgreSQL that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    /// A file of the cluster or the cache.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The directory has things in it that we did not put there.
    #[error(
        "{directory} is not empty and not a cluster of ours; \
         choose another with --directory, or empty it"
    )]
    NotOurs {
        /// The directory.
        directory: PathBuf,
    },
    /// The directory is somebody else's.
    #[error("{directory} belongs to user {owner}, not to us; choose another with --directory")]
    NotOwned {
        /// The directory.
        directory: PathBuf,
        /// Its owner's number.
        owner: u32,
    },
    /// A server runs there.
    #[error(
        "another private PostgreSQL is running in {directory}; \
         wait for it, stop it, or choose another with --directory"
    )]
    InUse {
        /// The directory.
        directory: PathBuf,
    },
    /// Another process holds the cache.
    #[error("another process has held {path} for two minutes; end it and try again")]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The archive cannot be fetched or unpacked.
    #[error(
        "cannot fetch PostgreSQL {version}: {reason}; check the network, \
         install the package postgresql-15, or set DATABASE_URL"
    )]
    Fetch {
        /// The version wanted.
        version: String,
        /// What went wrong.
        reason: String,
    },
    /// The system has none.
    #[error(
        "no PostgreSQL {oldest} or newer under {root}; \
         install the package postgresql-15, or set DATABASE_URL"
    )]
    NoSystem {
        /// Where we looked.
        root: &'static str,
        /// The oldest version that would do.
        oldest: u32,
    },
    /// The programs do not run.
    #[error("no usable PostgreSQL programs in {directory}: {reason}")]
    Programs {
        /// Where they should be.
        directory: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// `initdb` failed.
    #[error("initdb failed: {reason}")]
    Initdb {
        /// What it said.
        reason: String,
    },
    /// The server does not start, or ended.
    #[error("PostgreSQL does not run: {reason}\n(its log: {log})")]
    Start {
        /// What it said.
        reason: String,
        /// The whole of what it said.
        log: PathBuf,
    },
    /// Somebody took the port between our finding it free and our taking it.
    #[error("port {port} was taken by another process")]
    PortTaken {
        /// The port.
        port: u16,
    },
    /// Loopback gives no port at all.
    #[error("no free port on 127.0.0.1: {reason}")]
    NoPort {
        /// What the system said.
        reason: String,
    },
}

/// What kind of private PostgreSQL is wanted.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the programs come from.
    pub source: Source,
    /// Where fetched programs are kept.
    pub cache: PathBuf,
    /// The cluster's own directory.
    pub directory: PathBuf,
    /// Throw the data away first.
    pub fresh: bool,
    /// Throw the whole directory away at the end.
    pub temporary: bool,
}

/// Runs a private PostgreSQL until `stop` resolves; `ready` is told the URL.
///
/// To be called on the process' main thread: the server is tied to the thread that starts it.
pub async fn run(
    options: &Options,
    ready: impl FnOnce(&str),
    stop: impl Future<Output = std::io::Result<()>>,
) -> Result<(), PostgresError> {
    let result = supervise(options, ready, stop).await;
    // An error may say that the directory is not ours to remove.
    if options.temporary && result.is_ok() {
        cluster::remove(&options.directory)?;
    }
    result
}

async fn supervise(
    options: &Options,
    ready: impl FnOnce(&str),
    stop: impl Future<Output = std::io::Result<()>>,
) -> Result<(), PostgresError> {
    let work = async {
        let binaries = Binaries::find(&options.source, &options.cache).await?;
        let mut cluster = Cluster::open(&options.directory, binaries, options.fresh).await?;
        let server = cluster.start().await?;
        Ok::<_, PostgresError>((cluster, server))
    };
    tokio::pin!(stop);
    let (cluster, mut server) = tokio::select! {
        biased;
        _ = &mut stop => return Ok(()),
        started = work => started?,
    };
    tracing::info!(version = cluster.version(), "PostgreSQL is ready");
    ready(&server.url());
    tokio::select! {
        _ = stop => {
            server.stop().await;
            Ok(())
        }
        error = server.wait() => Err(error),
    }
}

/// Makes `path` and its parents where they are missing, for our user alone. One that is
/// somebody else's is refused: in a directory that others can write to, it may be a trap.
fn make_private_directory(path: &Path) -> Result<(), PostgresError> {
    let failed = |source| PostgresError::File {
        path: path.to_owned(),
        source,
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed)?;
    let owner = std::fs::metadata(path).map_err(failed)?.uid();
    if owner == nix::unistd::Uid::effective().as_raw() {
        return Ok(());
    }
    Err(PostgresError::NotOwned {
        directory: path.to_owned(),
        owner,
    })
}

/// The command of a private PostgreSQL that ends with us.
pub(crate) fn command(
    program: &Path,
    source: &Source,
    directory: Option<&Path>,
    user: Option<&str>,
) -> Command {
    let mut command = Command::new(program);
    command.args(["postgres", "--with-parent", "--source"]);
    command.arg(source.to_string());
    command.args(["--cpus", &DEMO_CPUS.to_string()]);
    if let Some(directory) = directory {
        command.arg("--directory").arg(directory);
    }
    if let Some(user) = user {
        command.args(["--user", user]);
    }
    command
}
