//! One recording by the agent: its arguments, its progress, its summary, its files, and what it answers
//! about them afterwards.

use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{ChildStderr, ChildStdout, Command};

use super::Progress;
use super::evidence::Query;
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
    /// It said no when it was asked about the recording.
    #[error("`flamestorm {command}` failed ({status}): {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// Its exit status.
        status: ExitStatus,
        /// What it said.
        reason: String,
    },
    /// What it printed is not the JSON that we know.
    #[error("the agent's answer is not understood: {0}")]
    Answer(#[from] serde_json::Error),
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
    database_svg: PathBuf,
    app_svg: PathBuf,
    folded: PathBuf,
    pprof: PathBuf,
}

impl Recording {
    /// `NAME.svg`, `NAME-database.svg`, `NAME-app.svg`, `NAME.folded` and `NAME.pb.gz` in `directory`.
    pub fn new(directory: &Path, name: &str) -> Self {
        let file = |ending: &str| directory.join(format!("{name}{ending}"));
        Self {
            svg: file(".svg"),
            database_svg: file("-database.svg"),
            app_svg: file("-app.svg"),
            folded: file(".folded"),
            pprof: file(".pb.gz"),
        }
    }

    /// All files, the one to open first at the front: the stitched picture, those of the database and of
    /// the application alone, the folded stacks, pprof.
    pub fn files(&self) -> [&Path; 5] {
        [
            &self.svg,
            &self.database_svg,
            &self.app_svg,
            &self.folded,
            &self.pprof,
        ]
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
        for file in [&self.svg, &self.folded, &self.pprof] {
            arguments.push("--output".into());
            arguments.push(file.into());
        }
        arguments.extend(["--summary".into(), "json".into()]);
        arguments
    }

    /// Has the agent draw the two sides of the picture by themselves.
    pub(super) async fn draw_views(&self, agent: &Path) -> Result<(), RecordingError> {
        for (view, file) in [("database", &self.database_svg), ("app", &self.app_svg)] {
            let mut command = Command::new(agent);
            command.arg("report").arg(&self.pprof);
            command.args(["--view", view, "--output"]).arg(file);
            answer("report", &mut command).await?;
            check_written(file)?;
        }
        Ok(())
    }

    /// Asks the agent for the queries, the most expensive first.
    pub(super) async fn queries(&self, agent: &Path) -> Result<Vec<Query>, RecordingError> {
        let mut command = Command::new(agent);
        command.arg("queries").arg(&self.pprof).arg("--json");
        let printed = answer("queries", &mut command).await?;
        Ok(serde_json::from_slice(&printed)?)
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
        for path in [&self.svg, &self.folded, &self.pprof] {
            check_written(path)?;
        }
        Ok(serde_json::from_slice(&summary)?)
    }
}

fn check_written(path: &Path) -> Result<(), RecordingError> {
    if std::fs::metadata(path).map_or(0, |file| file.len()) == 0 {
        return Err(RecordingError::Missing {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// Runs the agent to its end and gives what it printed.
async fn answer(name: &'static str, command: &mut Command) -> Result<Vec<u8>, RecordingError> {
    let output = command
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(WRITE_PATIENCE, output)
        .await
        .map_err(|_| RecordingError::Hangs {
            after: WRITE_PATIENCE.as_secs(),
        })??;
    if !output.status.success() {
        return Err(RecordingError::Refused {
            command: name,
            status: output.status,
            reason: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(output.stdout)
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
