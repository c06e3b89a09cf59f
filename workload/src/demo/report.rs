//! What the demo found, as a table and as JSON.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;

use serde::Serialize;
use serde_json::Value;

use super::evidence::{self, Attribution, Caller, EvidenceError, ProcessShare, Query, TopFunction};
use super::recording::Recording;
use super::visitors::{Latency, Searches};
use super::{FUNCTION, Options};

/// The processes that the demo is about, by their names.
const PROCESSES: [&str; 2] = ["postgres", "workload"];

/// How many queries to list, and how many callers of each.
const QUERIES: usize = 5;
const CALLERS: usize = 3;

/// How much of a query's text fits on a line.
const TEXT_CHARS: usize = 90;

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
    /// How well PostgreSQL's samples could be attributed, where the agent saw a server.
    pub attribution: Option<Attribution>,
    /// PostgreSQL's work by query, the most expensive first.
    pub queries: Vec<Query>,
    /// The searches' function, where the recording shows it as a query's caller.
    pub function: Option<Caller>,
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
    /// The recording does not show PostgreSQL's queries.
    #[error("the agent did not recognise PostgreSQL: `flamestorm doctor` may tell why")]
    NoServer,
    /// The recording does not lead from PostgreSQL's work to the function.
    #[error(
        "{FUNCTION} was not found as the caller of any query: the callers that were found, and why others \
         were not, stand above; record longer with --seconds"
    )]
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
        queries: Vec<Query>,
        recording: &Recording,
    ) -> Result<Self, EvidenceError> {
        Ok(Self {
            seconds: options.seconds,
            searches,
            samples: agent["samples"].as_u64().unwrap_or_default(),
            processes: PROCESSES
                .iter()
                .map(|name| ProcessShare::of(name, &agent))
                .collect(),
            top_functions: evidence::top_functions(recording.pprof())?,
            attribution: Attribution::of(&agent),
            function: evidence::find_caller(&queries, FUNCTION).cloned(),
            queries,
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
        if self.attribution.is_none() {
            return Err(VerdictError::NoServer);
        }
        match &self.function {
            None => Err(VerdictError::NoFunction),
            Some(found) if found.file.is_empty() || found.line == 0 => Err(VerdictError::NoLine),
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
        self.write_queries(f)?;
        writeln!(f, "\n  files")?;
        for file in &self.files {
            writeln!(f, "              {}", file.display())?;
        }
        write!(
            f,
            "  Open the first in a browser: above a query stands who asked, below it what PostgreSQL did.\n  \
             Click a frame to look into it."
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

    fn write_queries(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Some(attribution) = &self.attribution else {
            return writeln!(f, "\n  queries     the agent saw no PostgreSQL");
        };
        writeln!(
            f,
            "\n  queries     {:.1} % of {} samples of PostgreSQL's backends have their query,",
            attribution.query_share * 100.0,
            attribution.backend_samples,
        )?;
        write!(
            f,
            "              {:.1} % of these their caller",
            attribution.caller_share * 100.0
        )?;
        match attribution.before_recording {
            0 => writeln!(f)?,
            before => writeln!(
                f,
                " (without {before} of queries that were running already)"
            )?,
        }
        writeln!(f, "\n       share    CPU s  query, and who asked for it")?;
        for query in self.queries.iter().take(QUERIES) {
            write_query(f, query)?;
        }
        match self.queries.len().saturating_sub(QUERIES) {
            0 => Ok(()),
            more => writeln!(f, "                       and {more} more"),
        }
    }
}

fn write_query(f: &mut Formatter<'_>, query: &Query) -> fmt::Result {
    let share = query.share * 100.0;
    let text = one_line(&query.query);
    writeln!(f, "     {share:5.1} %  {:>7.2}  {text}", query.cpu_seconds)?;
    for caller in query.callers.iter().take(CALLERS) {
        let place = match (caller.file.as_str(), caller.line) {
            ("", _) => "no file known".to_owned(),
            (file, 0) => file.to_owned(),
            (file, line) => format!("{file}:{line}"),
        };
        writeln!(
            f,
            "                       {:5.1} %  {} in {} ({place})",
            caller.share * 100.0,
            caller.function,
            caller.service,
        )?;
    }
    for (reason, samples) in &query.callers_unknown {
        writeln!(f, "                       {samples} samples: {reason}")?;
    }
    Ok(())
}

/// The beginning of a text, on one line.
fn one_line(text: &str) -> String {
    let text = text.split(|c: char| c.is_whitespace() || c.is_control());
    let text: Vec<&str> = text.filter(|word| !word.is_empty()).collect();
    let text = text.join(" ");
    if text.chars().count() <= TEXT_CHARS {
        return text;
    }
    let start: String = text.chars().take(TEXT_CHARS - 1).collect();
    format!("{start}…")
}

fn write_latency(f: &mut Formatter<'_>, name: &str, latency: &Latency) -> fmt::Result {
    writeln!(
        f,
        "              {name:<12} {:>6}   p50 {:>8.1} ms   p95 {:>8.1} ms",
        latency.searches, latency.p50_ms, latency.p95_ms
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn report(function: Option<Caller>) -> Report {
        let agent = json!({
            "processes": [{ "name": "postgres", "samples": 9, "share": 0.9 }],
            "attribution": { "backend_samples": 9, "with_query": 9, "with_caller": 9 },
        });
        Report {
            seconds: 1,
            searches: Searches {
                done: 1,
                ..Searches::default()
            },
            samples: 10,
            processes: vec![ProcessShare::of("postgres", &agent)],
            top_functions: Vec::new(),
            attribution: Attribution::of(&agent),
            queries: Vec::new(),
            function,
            agent,
            files: Vec::new(),
        }
    }

    /// Only a demo that leads from PostgreSQL to the function, its file and its line, was a success.
    #[test]
    fn verdicts() {
        let found = Caller {
            service: "workload".to_owned(),
            function: FUNCTION.to_owned(),
            file: "product.rs".to_owned(),
            line: 7,
            samples: 9,
            share: 1.0,
        };
        report(Some(found.clone())).verdict().unwrap();
        let error = |report: Report| report.verdict().unwrap_err();
        assert!(matches!(error(report(None)), VerdictError::NoFunction));
        let without_line = Caller {
            line: 0,
            ..found.clone()
        };
        assert!(matches!(
            error(report(Some(without_line))),
            VerdictError::NoLine
        ));
        let mut without_server = report(Some(found.clone()));
        without_server.attribution = None;
        assert!(matches!(error(without_server), VerdictError::NoServer));
        let mut without_postgres = report(Some(found));
        without_postgres.processes[0].samples = 0;
        assert!(matches!(error(without_postgres), VerdictError::NoPostgres));
    }

    /// A query's text takes one line, whatever is in it.
    #[test]
    fn texts() {
        assert_eq!(one_line("SELECT\n  1\u{7}"), "SELECT 1");
        let long = one_line(&"ü".repeat(5000));
        assert_eq!(long.chars().count(), TEXT_CHARS);
    }
}
