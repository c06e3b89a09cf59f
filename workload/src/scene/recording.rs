//! A recording by the agent while something happens: its start, its end, its files, and what it answers about them
//! afterwards.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{ChildStderr, Command};
use tokio::task::JoinHandle;

use super::evidence::{Query, Stacks};
use crate::child::{Process, tie};

/// The agent loads its programs first, and says when it samples.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// After the recording the agent resolves symbols and writes; more than this is a fault.
const WRITE_PATIENCE: Duration = Duration::from_secs(120);

/// With this line the agent says that it samples.
const STARTED: &str = "recording";

/// An answer of the agent: a summary is some kilobytes, the stacks of a whole machine some megabytes.
const MAX_ANSWER: u64 = 256 << 20;

/// A recording that failed.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// There is no agent at that path.
    #[error("no profiler at {path}: {source}; build it with `make build`, or name it with --agent")]
    Agent {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The agent said no.
    #[error("`flamestorm {command}` failed ({status}): {reason}")]
    Refused {
        /// The command.
        command: String,
        /// Its exit status.
        status: ExitStatus,
        /// What it said.
        reason: String,
    },
    /// The agent did not get on.
    #[error("the agent was still {what} after {after} s")]
    Hangs {
        /// What it was doing.
        what: &'static str,
        /// How long it was given.
        after: u64,
    },
    /// The agent's pipes broke.
    #[error("cannot follow the agent: {0}")]
    Pipe(#[from] std::io::Error),
    /// What it printed is not what we know.
    #[error("the agent's answer is not understood: {0}")]
    Answer(String),
    /// A file that it was to write is missing or empty.
    #[error("the agent did not write {path}")]
    Missing {
        /// The file.
        path: PathBuf,
    },
}

/// Where a recording's files go, and the agent that makes them.
#[derive(Debug, Clone)]
pub struct Recording {
    agent: PathBuf,
    directory: PathBuf,
    name: &'static str,
}

/// The agent, recording.
#[derive(Debug)]
pub struct Running {
    process: Process,
    command: String,
    said: JoinHandle<std::io::Result<String>>,
    summary: JoinHandle<std::io::Result<Vec<u8>>>,
}

impl Recording {
    /// A recording into `NAME.svg`, `NAME.folded` and `NAME.pb.gz` in `directory`.
    pub fn new(agent: &Path, directory: &Path, name: &'static str) -> Self {
        Self {
            agent: agent.to_owned(),
            directory: directory.to_owned(),
            name,
        }
    }

    /// One of its files, or of those that are made of it.
    pub fn file(&self, ending: &str) -> PathBuf {
        self.directory.join(format!("{}{ending}", self.name))
    }

    /// The profile in pprof's format: the file of record.
    pub fn profile(&self) -> PathBuf {
        self.file(".pb.gz")
    }

    fn written(&self) -> [PathBuf; 3] {
        [self.file(".svg"), self.file(".folded"), self.profile()]
    }

    /// The agent's command line.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["record".into()];
        for file in self.written() {
            arguments.push("--output".into());
            arguments.push(file.into());
        }
        arguments.extend(["--summary".into(), "json".into()]);
        arguments
    }

    /// Starts the agent on the whole machine, and waits until it samples. To be called on the process' main thread:
    /// the agent ends with the thread that starts it.
    pub async fn start(&self) -> Result<Running, RecordingError> {
        let mut command = Command::new(&self.agent);
        command
            .args(self.arguments())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // Killed, not interrupted: nobody is left to read what it would write.
        let mut process = Process::spawn_tied(&mut command, Signal::SIGKILL).map_err(|source| {
            RecordingError::Agent {
                path: self.agent.clone(),
                source,
            }
        })?;
        let child = process.child();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (started, has_started) = tokio::sync::oneshot::channel();
        let mut running = Running {
            process,
            command: "record".to_owned(),
            said: tokio::spawn(listen(stderr, started)),
            summary: tokio::spawn(async move {
                let mut summary = Vec::new();
                if let Some(stdout) = stdout {
                    stdout.take(MAX_ANSWER).read_to_end(&mut summary).await?;
                }
                Ok(summary)
            }),
        };
        match tokio::time::timeout(START_PATIENCE, has_started).await {
            Ok(Ok(())) => Ok(running),
            // It has closed its standard error: it ends.
            Ok(Err(_)) => Err(running.refusal().await),
            Err(_) => Err(RecordingError::Hangs {
                what: "starting",
                after: START_PATIENCE.as_secs(),
            }),
        }
    }

    /// What the agent tells of a part of the recording, as folded stacks. Nothing where there is no such part.
    pub async fn stacks(&self, filter: &str) -> Result<Stacks, RecordingError> {
        let mut command = Command::new(&self.agent);
        command.arg("report").arg(self.profile());
        command.args(["--filter", filter, "--output", "-"]);
        let printed = answer("report", &mut command).await?;
        Stacks::parse(&printed).map_err(RecordingError::Answer)
    }

    /// Has the agent draw one side of the picture by itself.
    pub async fn draw(&self, view: &str) -> Result<PathBuf, RecordingError> {
        let file = self.file(&format!("-{view}.svg"));
        let mut command = Command::new(&self.agent);
        command.arg("report").arg(self.profile());
        command.args(["--view", view, "--output"]).arg(&file);
        answer("report", &mut command).await?;
        check_written(&file)?;
        Ok(file)
    }

    /// Asks the agent for the queries, the most expensive first.
    pub async fn queries(&self) -> Result<Vec<Query>, RecordingError> {
        let mut command = Command::new(&self.agent);
        command.arg("queries").arg(self.profile()).arg("--json");
        json(&answer("queries", &mut command).await?)
    }

    /// Has the agent draw what changed between this recording and `after`; its figures.
    pub async fn compare(&self, after: &Self, picture: &Path) -> Result<Value, RecordingError> {
        let mut command = Command::new(&self.agent);
        command.arg("diff").args([self.profile(), after.profile()]);
        command.arg("--output").arg(picture);
        command.args(["--sort", "total", "--json"]);
        let figures = json(&answer("diff", &mut command).await?)?;
        check_written(picture)?;
        Ok(figures)
    }

    /// Ends the recording: its summary, and the files that were written.
    pub async fn finish(&self, running: Running) -> Result<(Value, Vec<PathBuf>), RecordingError> {
        let summary = running.finish().await?;
        let files = self.written();
        for file in &files {
            check_written(file)?;
        }
        Ok((summary, files.to_vec()))
    }
}

impl Running {
    /// Ends the recording as Ctrl-C does, and gives the agent's summary.
    async fn finish(mut self) -> Result<Value, RecordingError> {
        let status = self.process.stop(Signal::SIGINT, WRITE_PATIENCE).await?;
        let summary = joined(self.summary).await?;
        if !status.success() {
            let said = joined(self.said).await?;
            return Err(refused(&self.command, status, &said));
        }
        json(&summary)
    }

    /// Why it ended before it began.
    async fn refusal(&mut self) -> RecordingError {
        let status = match self.process.wait().await {
            Ok(status) => status,
            Err(error) => return error.into(),
        };
        match (&mut self.said).await {
            Ok(Ok(said)) => refused(&self.command, status, &said),
            Ok(Err(error)) => error.into(),
            Err(error) => RecordingError::Pipe(error.into()),
        }
    }
}

async fn joined<T>(task: JoinHandle<std::io::Result<T>>) -> Result<T, RecordingError> {
    Ok(task.await.map_err(std::io::Error::from)??)
}

/// Reads the agent's lines to their end, and tells when one says that it samples.
async fn listen(
    stderr: Option<ChildStderr>,
    started: tokio::sync::oneshot::Sender<()>,
) -> std::io::Result<String> {
    let mut said = String::new();
    let mut started = Some(started);
    let Some(stderr) = stderr else {
        return Ok(said);
    };
    let mut lines = BufReader::new(stderr.take(MAX_ANSWER)).lines();
    while let Some(line) = lines.next_line().await? {
        if line.contains(STARTED)
            && let Some(started) = started.take()
        {
            // Nobody waits any more when the scene was interrupted.
            let _ = started.send(());
        }
        said.push_str(&line);
        said.push('\n');
    }
    Ok(said)
}

fn refused(command: &str, status: ExitStatus, said: &str) -> RecordingError {
    let said: Vec<&str> = said.lines().map(str::trim).collect();
    RecordingError::Refused {
        command: command.to_owned(),
        status,
        reason: match said.join("; ") {
            said if said.is_empty() => "it did not say why".to_owned(),
            said => said,
        },
    }
}

fn json<T: DeserializeOwned>(text: &[u8]) -> Result<T, RecordingError> {
    serde_json::from_slice(text).map_err(|error| RecordingError::Answer(error.to_string()))
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
pub async fn answer(name: &str, command: &mut Command) -> Result<Vec<u8>, RecordingError> {
    let output = tie(command.stdin(Stdio::null()), Signal::SIGKILL).output();
    let output = tokio::time::timeout(WRITE_PATIENCE, output)
        .await
        .map_err(|_| RecordingError::Hangs {
            what: "reading a recording",
            after: WRITE_PATIENCE.as_secs(),
        })??;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(refused(name, output.status, &said));
    }
    Ok(output.stdout)
}
