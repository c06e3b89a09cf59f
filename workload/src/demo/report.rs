//! What the demo found, as a table and as JSON.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use super::evidence::{self, EvidenceError, Folded, FunctionFound, ProcessShare, TopFunction};
use super::recording::Recording;
use super::visitors::{Latency, Searches};
use super::{FUNCTION, Options};

/// The processes that the demo is about, by the names of their threads.
const PROCESSES: [&str; 2] = ["postgres", "workload"];

/// The result of a demo. Every figure was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// For how long was recorded.
    pub seconds: u32,
    /// What the visitors saw.
    pub searches: Searches,
    /// All samples in the profile.
    pub samples: u64,
    /// PostgreSQL's and the shop's parts.
    pub processes: Vec<ProcessShare>,
    /// Where the CPU was.
    pub top_functions: Vec<TopFunction>,
    /// The searches' function, where the recording shows it.
    pub function: Option<FunctionFound>,
    /// The agent's own summary.
    pub agent: Value,
    /// The files that were written.
    pub files: Vec<PathBuf>,
}

/// A demo that ran to its end and did not show what it should.
#[derive(Debug, thiserror::Error)]
pub enum VerdictError {
    /// Nothing was searched.
    #[error("no search was answered; the last error: {0}")]
    NoSearch(String),
    /// The recording does not show PostgreSQL.
    #[error("the recording has no sample of postgres")]
    NoPostgres,
    /// The recording does not show the function.
    #[error("{FUNCTION} is not in the recording; record longer with --seconds")]
    NoFunction,
    /// The function has no place in the source.
    #[error("{FUNCTION} was found without file and line: is `debug = 1` in the build profile?")]
    NoLine,
}

impl Report {
    pub(super) fn new(
        options: &Options,
        searches: Searches,
        agent: Value,
        recording: &Recording,
    ) -> Result<Self, EvidenceError> {
        let folded = Folded::read(recording.folded())?;
        let function = evidence::find_function(recording.pprof(), FUNCTION)?;
        Ok(Self {
            seconds: options.seconds,
            searches,
            samples: folded.total(),
            processes: PROCESSES
                .iter()
                .map(|name| folded.process(name, &agent))
                .collect(),
            top_functions: folded.top_functions(),
            function,
            agent,
            files: recording
                .files()
                .iter()
                .map(|path| path.to_path_buf())
                .collect(),
        })
    }

    /// Whether the demo showed what it promises.
    pub fn verdict(&self) -> Result<(), VerdictError> {
        if self.searches.done == 0 {
            let error = self.searches.last_error.clone();
            return Err(VerdictError::NoSearch(error.unwrap_or_default()));
        }
        if self
            .processes
            .iter()
            .any(|p| p.name == "postgres" && p.samples == 0)
        {
            return Err(VerdictError::NoPostgres);
        }
        match &self.function {
            None => Err(VerdictError::NoFunction),
            Some(found) if found.file.is_none() || found.line.is_none() => {
                Err(VerdictError::NoLine)
            }
            Some(_) => Ok(()),
        }
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let searches = &self.searches;
        writeln!(f)?;
        writeln!(
            f,
            "  searches    {} answered, {} failed in {:.1} s",
            searches.done, searches.failed, searches.seconds
        )?;
        if let Some(error) = &searches.last_error {
            writeln!(f, "              the last failure: {error}")?;
        }
        write_latency(f, "rare words", &searches.rare)?;
        write_latency(f, "common words", &searches.common)?;
        writeln!(f, "\n  samples     {} in {} s", self.samples, self.seconds)?;
        for process in &self.processes {
            let complete = process.rooted_share.map_or_else(
                || "not told".to_owned(),
                |share| format!("{:.2} %", share * 100.0),
            );
            writeln!(
                f,
                "              {:<12} {:>6} {:>6.1} %   complete to the root {complete:>10}",
                process.name,
                process.samples,
                process.share * 100.0,
            )?;
        }
        self.write_losses(f)?;
        writeln!(f, "\n  CPU by function (self)")?;
        for top in &self.top_functions {
            writeln!(
                f,
                "              {:>6}  {:<12} {}",
                top.samples, top.process, top.function
            )?;
        }
        writeln!(f)?;
        self.write_function(f)?;
        writeln!(f, "\n  files")?;
        for file in &self.files {
            writeln!(f, "              {}", file.display())?;
        }
        write!(
            f,
            "  Open the .svg in a browser; click a frame to look into it."
        )
    }
}

impl Report {
    fn write_losses(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if let Some(expected) = self.agent.get("expected_samples") {
            writeln!(f, "  expected    {expected} samples")?;
        }
        match self.agent.get("lost") {
            Some(Value::Object(causes)) => {
                let lost = causes.iter().filter(|(_, count)| count.as_u64() != Some(0));
                let lost: Vec<String> = lost.map(|(cause, n)| format!("{cause} {n}")).collect();
                let lost = if lost.is_empty() {
                    "none".to_owned()
                } else {
                    lost.join(", ")
                };
                writeln!(f, "  lost        {lost}")
            }
            Some(lost) => writeln!(f, "  lost        {lost}"),
            None => writeln!(f, "  lost        not told by the agent"),
        }
    }

    fn write_function(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Some(found) = &self.function else {
            return writeln!(f, "  not found   {FUNCTION}");
        };
        let file = found.file.as_deref().unwrap_or("(no file)");
        let line = found
            .line
            .map_or_else(String::new, |line| format!(":{line}"));
        writeln!(f, "  found       {}", found.name)?;
        writeln!(
            f,
            "              {file}{line}, on {} samples' stacks",
            found.samples
        )
    }
}

fn write_latency(f: &mut Formatter<'_>, name: &str, latency: &Latency) -> fmt::Result {
    writeln!(
        f,
        "              {name:<12} {:>6}   p50 {:>8.1} ms   p95 {:>8.1} ms",
        latency.searches, latency.p50_ms, latency.p95_ms
    )
}
