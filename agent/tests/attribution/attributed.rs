//! A recording made while clients of PostgreSQL run statements, and what its samples must show.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::common::{Cluster, MANY_HERTZ, Profile, Running, Stack, Summary, agent, start};

/// The largest share of the samples of a query that may be attributed to the wrong caller.
pub const WRONG: f64 = 0.005;

/// A recording in progress.
pub struct Recorder {
    directory: TempDir,
    running: Running,
}

impl Recorder {
    /// Starts to record the servers' processes and those of `programs` only, and waits until the agent has
    /// the servers' tables. Other processes of the machine then cannot use up the limits of the recording,
    /// such as the budget of stack copies for new programs.
    pub fn of(programs: &[&str], args: &[&str], clusters: &[&Cluster]) -> Recorder {
        let mut only = vec!["--comm", "postgres"];
        for program in programs {
            only.extend(["--comm", program]);
        }
        only.extend(args);
        Recorder::start(&only, clusters)
    }

    /// Like [`Recorder::of`], but records the whole machine unless `args` restrict it.
    pub fn start(args: &[&str], clusters: &[&Cluster]) -> Recorder {
        let directory = TempDir::new().expect("temporary directory");
        let mut command = agent(["record", "--summary", "json", "--frequency"]);
        command.arg(MANY_HERTZ.to_string()).args(args);
        for name in ["a.pb.gz", "a.folded", "a.svg"] {
            command.arg("--output").arg(directory.path().join(name));
        }
        command.env("RUST_LOG", "debug");
        let mut running = start(command);
        running.wait_until("it records", |agent| agent.stderr().contains("recording"));
        let mut recorder = Recorder { directory, running };
        for cluster in clusters {
            recorder.wait_for_tables(cluster.postmaster());
        }
        recorder
    }

    /// Runs a program until its unwind tables are in the kernel. Later processes of that program are then
    /// unwound in the kernel from their first sample on.
    pub fn learn(&mut self, program: &Path, args: &[&str]) {
        let example = client(program, args);
        self.wait_for_tables(example.pid());
    }

    /// Waits until the unwind tables of a process are in the kernel.
    pub fn wait_for_tables(&mut self, pid: u32) {
        let line = format!("] pid {pid}: every table is there");
        self.running
            .wait_until(&format!("pid {pid} is known"), |agent| {
                agent.stderr().contains(&line)
            });
    }

    /// Ends the recording and reads its summary.
    pub fn finish(self) -> Recorded {
        self.running.signal(libc::SIGINT);
        let finished = self.running.finish().succeeded();
        let summary = Summary::parse(&finished.stdout);
        // The test runner shows this when the test fails.
        println!("{summary}");
        Recorded {
            summary,
            stdout: finished.stdout,
            stderr: finished.stderr,
            directory: self.directory,
        }
    }
}

/// A finished recording.
pub struct Recorded {
    directory: TempDir,
    pub summary: Summary,
    pub stdout: String,
    pub stderr: String,
}

impl Recorded {
    /// The path of one of its files: `a.pb.gz`, `a.folded` or `a.svg`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The folded stacks of the samples that match all filters.
    pub fn of(&self, filters: &[&str]) -> Profile {
        self.folded(filters, &[])
    }

    /// Like [`Recorded::of`], with more arguments for `flamestorm report`.
    pub fn folded(&self, filters: &[&str], args: &[&str]) -> Profile {
        let mut command = agent(["report", "--output", "-", "--frames", "raw"]);
        command.arg(self.path("a.pb.gz")).args(args);
        for filter in filters {
            command.args(["--filter", filter]);
        }
        let finished = start(command).finish();
        // `flamestorm report` fails when a filter matches no sample; for a test that is an empty profile.
        if finished.stderr.contains("no sample") {
            return Profile(Vec::new());
        }
        Profile::parse(&finished.succeeded().stdout)
    }

    /// The output of `flamestorm queries --json`.
    pub fn queries(&self, filters: &[&str]) -> Vec<Value> {
        let mut command = agent(["queries", "--json"]);
        command.arg(self.path("a.pb.gz"));
        for filter in filters {
            command.args(["--filter", filter]);
        }
        let stdout = start(command).finish().succeeded().stdout;
        serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
    }

    /// A figure of the object `attribution` in the summary.
    pub fn number(&self, name: &str) -> f64 {
        self.summary.number(&format!("/attribution/{name}"))
    }

    /// Asserts that `filter` matches more than fifty samples, and that `holds` is true for at least the
    /// share `least` of them.
    #[track_caller]
    pub fn share(&self, filter: &str, least: f64, what: &str, holds: impl Fn(&Stack) -> bool) {
        let profile = self.of(&[filter]);
        let why = &self.summary.0["attribution"]["without_caller"];
        assert!(profile.total() > 50, "{filter}: {}", profile.total());
        let what = format!("{filter}: {what} (unknown callers: {why})");
        profile.assert_share(least, &what, holds);
    }
}

/// A value that a client printed as `name value`.
#[track_caller]
pub fn printed(stdout: &str, name: &str) -> f64 {
    let mut lines = stdout.lines();
    lines
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {stdout:?}"))
}

/// The query of `two_queries` for which a stack was sampled: `heavy`, `light`, or neither.
pub fn query(stack: &Stack) -> Option<&'static str> {
    let frame = |text: &str| stack.frames.iter().any(|frame| frame.contains(text));
    match () {
        () if frame("AS heavy") || frame("c_heavy") => Some("heavy"),
        () if frame("AS light") || frame("c_light") => Some("light"),
        () => None,
    }
}

/// The function of `two_queries` that sent the statement, if the stack contains exactly one of the two.
pub fn caller(stack: &Stack) -> Option<&'static str> {
    match (stack.has("ask_heavy"), stack.has("ask_light")) {
        (true, false) => Some("heavy"),
        (false, true) => Some("light"),
        _ => None,
    }
}

/// Starts a client program.
pub fn client(program: &Path, args: &[&str]) -> Running {
    let mut command = Command::new(program);
    command.args(args);
    start(command)
}

/// Asserts that almost no sample of a query has the other query's caller, and that the CPU time is split
/// between the queries as the client measured it.
#[track_caller]
pub fn assert_split(name: &str, stacks: &Profile, truth: &str) {
    let of_a_query = stacks.filtered(|stack| query(stack).is_some());
    let total = of_a_query.total() as f64;
    assert!(total >= 100.0, "{name}: {total} samples\n{stacks}");
    let wrong =
        of_a_query.filtered(|stack| caller(stack).is_some_and(|who| Some(who) != query(stack)));
    assert!(
        wrong.total() as f64 <= WRONG * total,
        "{name}: {} of {total} wrong:\n{wrong}",
        wrong.total()
    );
    let (heavy, light) = (printed(truth, "heavy_us"), printed(truth, "light_us"));
    let truth = heavy / (heavy + light);
    let sampled = of_a_query.count(|stack| query(stack) == Some("heavy")) as f64 / total;
    let deviation = (truth * (1.0 - truth) / total).sqrt();
    assert!(
        (sampled - truth).abs() <= 4.0 * deviation + 0.02,
        "{name}: the truth is {truth:.3}, the profile says {sampled:.3} of {total}"
    );
}
