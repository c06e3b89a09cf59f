//! One recording by the agent: its arguments, its progress, its summary, its files.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{ChildStderr, ChildStdout};

use super::Progress;
use super::visitors::Visitors;
use crate::child::Process;

/// The agent loads its programs first; the visitors stay this much longer than it records.
const START_UP: Duration = Duration::from_secs(3);

/// After the recording the agent resolves symbols and writes; more than this is a fault.
const WRITE_PATIENCE: Duration = Duration::from_secs(120);

/// How often to say that it goes on.
const TICK: Duration = Duration::from_secs(2);

/// A summary is some kilobytes.
const MAX_SUMMARY: u64 = 16 << 20;

/// A recording that failed.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// The agent said no. Its own words stand above.
    #[error(
        "the agent failed ({status}); what it said stands above; \
         `flamestorm doctor` tells what this machine lacks"
    )]
    Failed {
        /// Its exit status.
        status: ExitStatus,
    },
    /// The agent did not come to an end.
    #[error("the agent was still running {after} s after its start")]
    Hangs {
        /// How long it was given.
        after: u64,
    },
    /// The agent's pipes broke.
    #[error("cannot follow the agent: {0}")]
    Pipe(#[from] std::io::Error),
    /// What it printed is no JSON.
    #[error("the agent's summary is not JSON: {0}")]
    Summary(#[from] serde_json::Error),
    /// A file that it was to write is missing or empty.
    #[error("the agent did not write {path}")]
    Missing {
        /// The file.
        path: PathBuf,
    },
}

/// Where a recording's files go.
#[derive(Debug)]
pub struct Recording {
    svg: PathBuf,
    folded: PathBuf,
    pprof: PathBuf,
}

impl Recording {
    /// `NAME.svg`, `NAME.folded` and `NAME.pb.gz` in `directory`.
    pub fn new(directory: &Path, name: &str) -> Self {
        let file = |extension: &str| directory.join(format!("{name}.{extension}"));
        Self {
            svg: file("svg"),
            folded: file("folded"),
            pprof: file("pb.gz"),
        }
    }

    /// The three files: picture, folded stacks, pprof.
    pub fn files(&self) -> [&Path; 3] {
        [&self.svg, &self.folded, &self.pprof]
    }

    /// The folded stacks.
    pub fn folded(&self) -> &Path {
        &self.folded
    }

    /// The profile in pprof's format.
    pub fn pprof(&self) -> &Path {
        &self.pprof
    }

    /// The agent's command line.
    pub fn arguments(&self, seconds: u32) -> Vec<std::ffi::OsString> {
        let mut arguments: Vec<std::ffi::OsString> = vec![
            "record".into(),
            "--duration".into(),
            format!("{seconds}s").into(),
        ];
        for file in self.files() {
            arguments.push("--output".into());
            arguments.push(file.into());
        }
        arguments.extend(["--summary".into(), "json".into()]);
        arguments
    }

    /// Follows the agent to its end and gives its summary. The visitors leave when the time of
    /// the recording is over, so that the agent has the machine to itself afterwards.
    pub(super) async fn finish(
        &self,
        agent: &mut Process,
        seconds: u32,
        visitors: &Visitors,
        progress: &Progress,
    ) -> Result<Value, RecordingError> {
        let child = agent.child();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let recorded = Duration::from_secs(u64::from(seconds)) + START_UP;
        let limit = recorded + WRITE_PATIENCE;
        let ended =
            async { tokio::try_join!(read(stdout), forward(stderr, progress), agent.wait()) };
        let ticking = tick(recorded, visitors, progress);
        let (summary, (), status) = tokio::select! {
            ended = tokio::time::timeout(limit, ended) => {
                ended.map_err(|_| RecordingError::Hangs { after: limit.as_secs() })??
            }
            never = ticking => match never {},
        };
        if !status.success() {
            return Err(RecordingError::Failed { status });
        }
        for path in self.files() {
            if std::fs::metadata(path).map_or(0, |file| file.len()) == 0 {
                return Err(RecordingError::Missing {
                    path: path.to_owned(),
                });
            }
        }
        Ok(serde_json::from_slice(&summary)?)
    }
}

async fn read(stdout: Option<ChildStdout>) -> std::io::Result<Vec<u8>> {
    let mut summary = Vec::new();
    if let Some(stdout) = stdout {
        stdout.take(MAX_SUMMARY).read_to_end(&mut summary).await?;
    }
    Ok(summary)
}

/// Shows the agent's own lines.
async fn forward(stderr: Option<ChildStderr>, progress: &Progress) -> std::io::Result<()> {
    let Some(stderr) = stderr else { return Ok(()) };
    let mut lines = BufReader::new(stderr).lines();
    while let Some(line) = lines.next_line().await? {
        progress.say(&format!("  agent: {line}"));
    }
    Ok(())
}

/// Says that it goes on, for as long as it does.
async fn tick(
    recorded: Duration,
    visitors: &Visitors,
    progress: &Progress,
) -> std::convert::Infallible {
    let start = Instant::now();
    let mut leaving = false;
    loop {
        let rest = recorded.saturating_sub(start.elapsed());
        if rest.is_zero() {
            tokio::time::sleep(TICK).await;
        } else {
            tokio::time::sleep(TICK.min(rest)).await;
        }
        if start.elapsed() < recorded {
            progress.say(&format!("  {} searches answered", visitors.done()));
        } else if leaving {
            progress.say("  the agent is still writing");
        } else {
            leaving = true;
            visitors.leave();
            progress.say("  the visitors leave; the agent resolves names and writes");
        }
    }
}
