//! `workload demo`: from nothing to a flame graph of a PostgreSQL on fire, in one command.
//!
//! Starts a private PostgreSQL and the product service, lets visitors search, has the agent
//! record the whole machine, and reports what the recording shows. Whatever happens, nothing is
//! left running.

mod evidence;
mod recording;
mod report;
mod stage;
mod visitors;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use evidence::{Attribution, Caller, EvidenceError, ProcessShare, Query, TopFunction};
pub use recording::RecordingError;
pub use report::{Report, VerdictError};
pub use visitors::{Latency, Searches};

use self::recording::Recording;
use self::stage::Stage;
use self::visitors::Visitors;
use crate::catalogue::{Catalogue, Outcome};
use crate::child;
use crate::db::{Database, DbError};
use crate::postgres::Source;
use crate::user::{self, UserError};

/// The searches' function, which the recording has to show as the caller of PostgreSQL's work.
pub const FUNCTION: &str = "search_products_unindexed";

/// Searches run this long before the recording starts: caches are warm, plans are made.
const WARM_UP: Duration = Duration::from_secs(1);

/// What the demo is to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// This program, to be started again for PostgreSQL and for the product service.
    pub program: PathBuf,
    /// The profiler.
    pub agent: PathBuf,
    /// How long to record.
    pub seconds: u32,
    /// Where the pictures go.
    pub output_dir: PathBuf,
    /// A PostgreSQL to use instead of a private one.
    pub database_url: Option<String>,
    /// Where the private one's programs come from.
    pub source: Source,
    /// The private one's directory.
    pub directory: Option<PathBuf>,
    /// The user that it runs as.
    pub user: Option<String>,
    /// What the shop sells.
    pub catalogue: Catalogue,
}

/// A demo that could not be given.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// There is no agent at that path.
    #[error("no profiler at {path}: {source}; build it with `make build`, or name it with --agent")]
    Agent {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The pictures cannot be written.
    #[error("cannot write to {path}: {source}; choose another directory with --output-dir")]
    Output {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A child did not start, or ended before it was ready. Its own message stands above.
    #[error("{name} did not start: {reason}")]
    Child {
        /// Which.
        name: &'static str,
        /// What happened to it.
        reason: String,
    },
    /// No user to become.
    #[error(transparent)]
    User(#[from] UserError),
    /// No database.
    #[error(transparent)]
    Db(#[from] DbError),
    /// The catalogue cannot be written or read.
    #[error("the catalogue in {place} cannot be used: {source}")]
    Catalogue {
        /// Host, port and database.
        place: String,
        /// What sqlx said.
        source: sqlx::Error,
    },
    /// The agent failed.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// What it wrote cannot be read.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
    /// Somebody pressed Ctrl-C or sent a signal.
    #[error("interrupted; nothing is left running")]
    Interrupted,
    /// Signals cannot be received.
    #[error("cannot watch for signals: {0}")]
    Signals(std::io::Error),
}

/// Gives the demo. To be called on the process' main thread: the agent is tied to the thread
/// that starts it.
pub async fn run(options: &Options) -> Result<Report, DemoError> {
    let mut stage = Stage::default();
    let result = tokio::select! {
        result = play(options, &mut stage) => result,
        signal = child::shutdown_signal() => {
            Err(signal.map_or_else(DemoError::Signals, |()| DemoError::Interrupted))
        }
    };
    stage.clear().await;
    result
}

async fn play(options: &Options, stage: &mut Stage) -> Result<Report, DemoError> {
    let progress = Progress::new();
    check_agent(&options.agent)?;
    prepare_output(&options.output_dir)?;
    let url = database(options, stage, &progress).await?;
    progress.say("starting the product service");
    let address = stage.start_product(options, &url).await?;
    progress.say(&format!("the shop is open at {address}: visitors search"));
    let visitors = Visitors::start(&address);
    tokio::time::sleep(WARM_UP).await;
    progress.say(&format!(
        "recording the whole machine for {} s",
        options.seconds
    ));
    let recording = Recording::new(&options.output_dir, "first-flame");
    stage.start_agent(options, &recording)?;
    let summary = recording
        .finish(stage.agent()?, options.seconds, &visitors, &progress)
        .await?;
    let searches = visitors.stop();
    progress.say("reading what was recorded");
    recording.draw_views(&options.agent).await?;
    let queries = recording.queries(&options.agent).await?;
    for file in recording.files() {
        give_away(file)?;
    }
    let report = Report::new(options, searches, summary, queries, &recording)?;
    progress.say("done");
    Ok(report)
}

/// The URL of a database with the catalogue in it. Broken data of a private PostgreSQL is made
/// anew, once.
async fn database(
    options: &Options,
    stage: &mut Stage,
    progress: &Progress,
) -> Result<String, DemoError> {
    if let Some(url) = &options.database_url {
        progress.say("using the PostgreSQL of DATABASE_URL");
        fill(url, options.catalogue, progress).await?;
        return Ok(url.clone());
    }
    progress.say("starting a private PostgreSQL");
    let url = stage.start_postgres(options, false).await?;
    match fill(&url, options.catalogue, progress).await {
        Ok(()) => Ok(url),
        Err(error @ (DemoError::Catalogue { .. } | DemoError::Db(_))) => {
            progress.say(&format!("{error}"));
            progress.say("making the data anew");
            stage.stop_postgres().await;
            let url = stage.start_postgres(options, true).await?;
            fill(&url, options.catalogue, progress).await?;
            Ok(url)
        }
        Err(error) => Err(error),
    }
}

async fn fill(url: &str, catalogue: Catalogue, progress: &Progress) -> Result<(), DemoError> {
    let database = Database::from_url(url)?;
    let connection = database.connect().await?;
    database.migrate(&connection).await?;
    let failed = |source| DemoError::Catalogue {
        place: database.place(),
        source,
    };
    progress.say(&format!("a catalogue of {} products", catalogue.products));
    match catalogue.ensure(&connection).await.map_err(failed)? {
        Outcome::Filled => progress.say("the catalogue is written"),
        Outcome::AlreadyThere => {
            catalogue.check(&connection).await.map_err(failed)?;
            progress.say("the catalogue was there already");
        }
    }
    connection.close().await;
    Ok(())
}

/// A missing agent should be told before a minute of preparations.
fn check_agent(path: &Path) -> Result<(), DemoError> {
    let executable = nix::unistd::access(path, nix::unistd::AccessFlags::X_OK);
    executable.map_err(|error| DemoError::Agent {
        path: path.to_owned(),
        source: error.into(),
    })
}

/// Makes the directory, and tries whether it can be written to.
fn prepare_output(directory: &Path) -> Result<(), DemoError> {
    let failed = |source| DemoError::Output {
        path: directory.to_owned(),
        source,
    };
    let existed = directory.exists();
    fs::create_dir_all(directory).map_err(failed)?;
    if !existed {
        give_away(directory)?;
    }
    let probe = directory.join(format!(".probe-{}", std::process::id()));
    fs::write(&probe, b"").map_err(failed)?;
    fs::remove_file(&probe).map_err(failed)
}

fn give_away(path: &Path) -> Result<(), DemoError> {
    user::give_to_sudo_user(path).map_err(|source| DemoError::Output {
        path: path.to_owned(),
        source,
    })
}

/// Tells on standard error what happens, and when.
#[derive(Debug)]
struct Progress {
    start: Instant,
}

impl Progress {
    fn new() -> Self {
        Self {
            start: Instant::now(),
        }
    }

    fn say(&self, text: &str) {
        let elapsed = self.start.elapsed().as_secs_f64();
        // Nobody may be reading any more: no reason to fail.
        let _ = writeln!(std::io::stderr(), "[{elapsed:5.1} s] {text}");
    }
}
