//! A recording of the whole machine while the test itself is PostgreSQL's client, and what the agent says
//! of it afterwards.
//!
//! Needs `make build`, root, and a kernel that lets root record. Where one is missing a test says so and
//! ends; with `FLAMESTORM_REQUIRE_BPF=1` it fails.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use serde_json::Value;

use super::{scratch, wait};

/// Samples a second: so many that shares mean something after some seconds, and no divisor of the kernel's
/// own tick.
const HERTZ: &str = "997";

/// A release program of this workspace.
pub fn release(name: &str) -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
        PathBuf::from,
    );
    target.join("release").join(name)
}

/// Whether what a test needs has to be there.
pub fn is_required() -> bool {
    std::env::var_os("FLAMESTORM_REQUIRE_BPF").is_some_and(|value| value == "1")
}

/// Says on standard error that something is not tested: past the test runner, which keeps what a passed
/// test prints to itself.
pub fn skipped(what: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    writeln!(io::stderr(), "{test}: SKIPPED, {what}").expect("standard error");
}

/// Whether this machine can do it: the release programs are there, and the agent's doctor agrees.
pub fn can_record() -> bool {
    let agent = release("flamestorm");
    let able = release("workload").exists()
        && nix::unistd::geteuid().is_root()
        && Command::new(&agent)
            .arg("doctor")
            .output()
            .is_ok_and(|o| o.status.success());
    assert!(
        able || !is_required(),
        "cannot record: needs root, {agent:?} and `workload` beside it (make build), \
         and a kernel that `flamestorm doctor` is content with"
    );
    if !able {
        skipped("needs root, `make build`, and a content `flamestorm doctor`");
    }
    able
}

/// Keeps recordings apart from each other, also from those of the agent's tests: held until dropped.
pub struct MachineLock(#[expect(dead_code, reason = "the open file is the lock")] File);

impl MachineLock {
    pub fn exclusive() -> Self {
        let path = std::env::temp_dir().join("flamestorm-tests.lock");
        let mut options = File::options();
        let file = options.append(true).create(true).open(&path);
        // Opened for reading alone if another user made it: enough for a lock.
        let file = file.or_else(|_| File::open(&path)).unwrap();
        file.lock().unwrap();
        Self(file)
    }
}

/// The agent at work.
pub struct Recording {
    agent: Child,
    stderr: JoinHandle<String>,
    directory: PathBuf,
}

impl Recording {
    /// Starts to record, and waits until samples are taken.
    pub fn start(seconds: u32) -> Self {
        let directory = scratch("recording");
        fs::create_dir(&directory).unwrap();
        let mut agent = Command::new(release("flamestorm"))
            .args(["record", "--summary", "json", "--frequency", HERTZ])
            .args(["--duration", &format!("{seconds}s"), "--output"])
            .arg(directory.join("a.pb.gz"))
            .stdin(Stdio::null())
            .stdout(File::create(directory.join("summary.json")).unwrap())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(agent.stderr.take().unwrap());
        let mut text = String::new();
        while !text.contains("recording") {
            let read = stderr.read_line(&mut text).unwrap();
            assert_ne!(read, 0, "the agent ended: {text}");
        }
        // Read to the end, so that the agent never waits for us.
        let stderr = std::thread::spawn(move || {
            stderr.read_to_string(&mut text).unwrap();
            text
        });
        Self {
            agent,
            stderr,
            directory,
        }
    }

    /// Waits for the agent's end.
    pub fn finish(mut self) -> Recorded {
        let status = wait(&mut self.agent);
        let stderr = self.stderr.join().unwrap();
        assert!(status.success(), "{stderr}");
        let summary = fs::read(self.directory.join("summary.json")).unwrap();
        Recorded {
            summary: serde_json::from_slice(&summary).unwrap(),
            directory: self.directory,
        }
    }
}

/// A recording that has ended.
pub struct Recorded {
    pub summary: Value,
    directory: PathBuf,
}

impl Recorded {
    /// The stitched stacks, unshortened, of the samples with these labels.
    pub fn stacks(&self, filters: &[&str]) -> Vec<Stack> {
        let mut command = self.command("report", filters);
        command.args(["--output", "-", "--frames", "raw"]);
        let folded = answer(&mut command);
        folded.lines().map(Stack::parse).collect()
    }

    /// What `flamestorm queries` tells of the samples with these labels.
    pub fn queries(&self, filters: &[&str]) -> Vec<Value> {
        let mut command = self.command("queries", filters);
        serde_json::from_str(&answer(command.arg("--json"))).unwrap()
    }

    fn command(&self, name: &str, filters: &[&str]) -> Command {
        let mut command = Command::new(release("flamestorm"));
        command.arg(name).arg(self.directory.join("a.pb.gz"));
        for filter in filters {
            command.args(["--filter", filter]);
        }
        command
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

fn answer(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// A line of folded stacks.
#[derive(Debug)]
pub struct Stack {
    /// The process at the root, then its frames from the root, as far as they are known; a backend's begin
    /// with its caller's.
    pub frames: Vec<String>,
    pub count: u64,
}

impl Stack {
    pub fn parse(line: &str) -> Self {
        let (stack, count) = line.rsplit_once(' ').unwrap();
        Self {
            frames: stack.split(';').map(str::to_owned).collect(),
            count: count.parse().unwrap(),
        }
    }

    /// Whether there are frames that contain these texts, in this order from the root.
    pub fn has_in_order(&self, parts: &[&str]) -> bool {
        let mut frames = self.frames.iter();
        parts
            .iter()
            .all(|part| frames.any(|frame| frame.contains(part)))
    }

    pub fn has(&self, part: &str) -> bool {
        self.has_in_order(&[part])
    }
}

/// The samples of stacks of which something is true.
pub fn count(stacks: &[Stack], holds: impl Fn(&Stack) -> bool) -> u64 {
    let chosen = stacks.iter().filter(|stack| holds(stack));
    chosen.map(|stack| stack.count).sum()
}

/// The share of samples of which something is true.
pub fn share(stacks: &[Stack], holds: impl Fn(&Stack) -> bool) -> f64 {
    count(stacks, holds) as f64 / count(stacks, |_| true) as f64
}
