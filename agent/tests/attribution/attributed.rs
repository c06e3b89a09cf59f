//! A recording of the whole machine while clients of PostgreSQL are at work.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::common::{Cluster, MANY_HERTZ, Profile, Running, Stack, Summary, agent, start};

/// Wrong attributions at most, of all samples of a query.
pub const WRONG: f64 = 0.005;

/// A recording that is being made.
pub struct Recorder {
    directory: TempDir,
    running: Running,
}

impl Recorder {
    /// Begins to record the servers' processes and those of programs, and waits until the agent knows the
    /// servers. So what else runs on the machine does not share in the bounds of the recording, such as that of
    /// stacks which are copied while a program is new.
    pub fn of(programs: &[&str], args: &[&str], clusters: &[&Cluster]) -> Recorder {
        let mut only = vec!["--comm", "postgres"];
        for program in programs {
            only.extend(["--comm", program]);
        }
        only.extend(args);
        Recorder::start(&only, clusters)
    }

    /// The same with the whole machine.
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

    /// Runs a program until the agent knows it: what it does from now on is walked in the kernel from the
    /// first sample.
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

    /// Ends the recording.
    pub fn finish(self) -> Recorded {
        self.running.signal(libc::SIGINT);
        let finished = self.running.finish().succeeded();
        let summary = Summary::parse(&finished.stdout);
        // Shown when the test fails.
        println!("{summary}");
        Recorded {
            summary,
            stdout: finished.stdout,
            stderr: finished.stderr,
            directory: self.directory,
        }
    }
}

/// A recording that was made.
pub struct Recorded {
    directory: TempDir,
    pub summary: Summary,
    pub stdout: String,
    pub stderr: String,
}

impl Recorded {
    /// One of its files: `a.pb.gz`, `a.folded`, `a.svg`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The folded stacks of samples with these labels.
    pub fn of(&self, filters: &[&str]) -> Profile {
        self.folded(filters, &[])
    }

    /// The same with more arguments.
    pub fn folded(&self, filters: &[&str], args: &[&str]) -> Profile {
        let mut command = agent(["report", "--output", "-", "--frames", "raw"]);
        command.arg(self.path("a.pb.gz")).args(args);
        for filter in filters {
            command.args(["--filter", filter]);
        }
        let finished = start(command).finish();
        // Filters without a match are an error to who typed them.
        if finished.stderr.contains("no sample") {
            return Profile(Vec::new());
        }
        Profile::parse(&finished.succeeded().stdout)
    }

    /// What `flamestorm queries --json` says.
    pub fn queries(&self, filters: &[&str]) -> Vec<Value> {
        let mut command = agent(["queries", "--json"]);
        command.arg(self.path("a.pb.gz"));
        for filter in filters {
            command.args(["--filter", filter]);
        }
        let stdout = start(command).finish().succeeded().stdout;
        serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
    }

    /// A figure of the summary's `attribution`.
    pub fn number(&self, name: &str) -> f64 {
        self.summary.number(&format!("/attribution/{name}"))
    }

    /// Asserts something of nearly all samples with a label, of which there are more than fifty.
    #[track_caller]
    pub fn share(&self, filter: &str, least: f64, what: &str, holds: impl Fn(&Stack) -> bool) {
        let profile = self.of(&[filter]);
        let why = &self.summary.0["attribution"]["without_caller"];
        assert!(profile.total() > 50, "{filter}: {}", profile.total());
        let what = format!("{filter}: {what} (unknown callers: {why})");
        profile.assert_share(least, &what, holds);
    }
}

/// What a client printed as `name value`.
#[track_caller]
pub fn printed(stdout: &str, name: &str) -> f64 {
    let mut lines = stdout.lines();
    lines
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {stdout:?}"))
}

/// Which of the two queries of `two_queries` a stack is of.
pub fn query(stack: &Stack) -> Option<&'static str> {
    let frame = |text: &str| stack.frames.iter().any(|frame| frame.contains(text));
    match () {
        () if frame("AS heavy") || frame("c_heavy") => Some("heavy"),
        () if frame("AS light") || frame("c_light") => Some("light"),
        () => None,
    }
}

/// Which of its two functions asked.
pub fn caller(stack: &Stack) -> Option<&'static str> {
    match (stack.has("ask_heavy"), stack.has("ask_light")) {
        (true, false) => Some("heavy"),
        (false, true) => Some("light"),
        _ => None,
    }
}

/// Starts a program.
pub fn client(program: &Path, args: &[&str]) -> Running {
    let mut command = Command::new(program);
    command.args(args);
    start(command)
}

/// Asserts that no sample of a query has the other's caller, and that the CPU time is split between them as
/// the client measured.
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
