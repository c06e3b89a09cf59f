//! The demo's ways to fail: whatever happens, it says so and nothing is left running.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::{eventually, processes_with, run, scratch, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A demo with a small catalogue, in directories of its own.
struct Demo {
    directory: PathBuf,
    output: PathBuf,
}

impl Demo {
    fn new(name: &str) -> Self {
        Self {
            directory: scratch(name),
            output: scratch("output"),
        }
    }

    fn command(&self, agent: &Path) -> Command {
        let mut command = common::program("demo");
        command.args(["--source", "system", "--products", "500", "--seconds", "1"]);
        command.arg("--agent").arg(agent);
        command.arg("--directory").arg(&self.directory);
        command.arg("--output-dir").arg(&self.output);
        command
    }

    /// Starts a demo whose agent never ends, and waits until it records.
    fn hanging(&self) -> Child {
        fs::create_dir(&self.output).unwrap();
        let agent = self.output.join("agent");
        let recording = self.output.join("recording");
        let script = format!("#!/bin/sh\ntouch {}\nexec sleep 987\n", recording.display());
        fs::write(&agent, script).unwrap();
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = self.command(&agent);
        let demo = command
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("the agent records", || recording.exists());
        assert!(!self.processes().is_empty());
        demo
    }

    /// Everything that belongs to this demo: its PostgreSQL, and the supervisor of it.
    fn processes(&self) -> Vec<String> {
        processes_with(self.directory.to_str().unwrap())
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        for directory in [&self.directory, &self.output] {
            let _ = fs::remove_dir_all(directory);
        }
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// A missing agent and a directory that cannot be written to are told before anything starts.
#[test]
fn what_is_missing_is_told_first() {
    let mut demo = Demo::new("missing");
    let (status, _, stderr) = run(&mut demo.command(Path::new("/nowhere/flamestorm")));
    assert!(!status.success());
    assert!(
        stderr.contains("/nowhere/flamestorm") && stderr.contains("make build"),
        "{stderr}"
    );
    assert!(!demo.directory.exists());

    demo.output = "/proc/pictures".into();
    let (status, _, stderr) = run(&mut demo.command(Path::new("/bin/true")));
    assert!(!status.success());
    assert!(
        stderr.contains("/proc/pictures") && stderr.contains("--output-dir"),
        "{stderr}"
    );
    assert!(!demo.directory.exists());
}

/// An agent that fails, and one that writes nothing, fail the demo.
#[test]
fn a_failing_agent_fails_the_demo() {
    let demo = Demo::new("failing");
    let (status, _, stderr) = run(&mut demo.command(Path::new("/bin/false")));
    assert!(!status.success());
    assert!(
        stderr.contains("the agent failed") && stderr.contains("doctor"),
        "{stderr}"
    );
    assert!(demo.processes().is_empty());

    let (status, _, stderr) = run(&mut demo.command(Path::new("/bin/true")));
    assert!(!status.success());
    assert!(
        stderr.contains("did not write") && stderr.contains("first-flame.svg"),
        "{stderr}"
    );
    assert!(demo.processes().is_empty());
}

/// Ctrl-C and SIGTERM in the middle: it cleans up before it ends.
#[test]
fn an_interrupted_demo_cleans_up() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let demo = Demo::new("interrupted");
        let mut child = demo.hanging();
        kill(pid(&child), signal).unwrap();
        assert!(!wait(&mut child).success());
        assert!(demo.processes().is_empty(), "{:?}", demo.processes());
    }
}

/// Killed in the middle: its children notice by themselves.
#[test]
fn a_killed_demo_leaves_nothing() {
    let demo = Demo::new("murdered");
    let mut child = demo.hanging();
    let children = children_of(child.id());
    assert_eq!(
        children.len(),
        3,
        "PostgreSQL's supervisor, the service, the agent"
    );
    kill(pid(&child), Signal::SIGKILL).unwrap();
    wait(&mut child);
    eventually("everything has gone", || {
        demo.processes().is_empty() && children.iter().all(|pid| !is_running(*pid))
    });
}

fn children_of(parent: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{parent}/task"))
        .unwrap()
        .flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .map(|pid| pid.parse().unwrap())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Whether a process is there and not merely waiting to be reaped.
fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}
