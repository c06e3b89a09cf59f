//! Names are looked up in a child process of the agent. These tests check what a recording loses when the
//! child hangs or is killed, and when the user ends naming early.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    MachineLock, Profile, Running, Summary, Workshop, agent, can_record, children_of, start,
};
use tempfile::TempDir;

/// Milliseconds of CPU time that no test reaches. The program is killed when the test drops it.
const LONG: &str = "120000";

/// A running program, and a recording of it that lasts half a second.
struct Recorded {
    directory: TempDir,
    agent: Running,
    _burning: Running,
}

impl Recorded {
    fn start(program: &Path, outputs: &[&str]) -> Recorded {
        let directory = TempDir::new().expect("temporary directory");
        let mut command = Command::new(program);
        command.arg(LONG);
        let mut burning = start(command);
        burning.wait_for_cpu(50);
        let mut command = agent(["record", "--duration", "500ms", "--summary", "json"]);
        command.args(["--frequency", "499", "--pid"]);
        command.arg(burning.pid().to_string());
        for output in outputs {
            command.arg("--output").arg(directory.path().join(output));
        }
        command.env("TMPDIR", directory.path());
        Recorded {
            agent: start(command),
            _burning: burning,
            directory,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Sends a signal to the agent's next namer child as soon as it exists. Returns its pid.
    fn signal_child(&mut self, signal: i32) -> i32 {
        self.agent
            .wait_until("recording", |agent| agent.stderr().contains("recording"));
        let worker = self.agent.worker();
        let mut found = 0;
        self.agent.wait_until("naming", |_| {
            // Not before it has executed the namer: the agent waits for that.
            let ready = |pid: &u32| {
                let words = fs::read_to_string(format!("/proc/{pid}/cmdline"));
                words.is_ok_and(|words| words.contains("name-functions"))
            };
            let namer = children_of(worker).into_iter().find(ready);
            found = namer.unwrap_or(0) as i32;
            found != 0
        });
        // SAFETY: kill takes no pointers. The child is the agent's, which waits for it only when it has ended.
        unsafe { libc::kill(found, signal) };
        found
    }

    fn report(&self, file: &Path) -> Profile {
        let mut command = agent(["report", "--output", "-"]);
        command.arg(file);
        Profile::parse(&start(command).finish().succeeded().stdout)
    }
}

fn alive(pid: i32) -> bool {
    // A zombie counts as ended.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest.to_owned());
    state.is_some_and(|state| !state.starts_with(['Z', 'X']))
}

fn notes(summary: &Summary) -> Vec<String> {
    let notes = summary.0["notes"].as_array().expect("notes");
    notes.iter().map(ToString::to_string).collect()
}

/// A child that hangs is killed. Only the file that it was reading stays without names, which a note
/// reports, and the next child names the rest.
#[test]
fn a_child_that_hangs_costs_one_file() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let program = workshop.cc("chain.c", "hanging", &[]);
    let mut recorded = Recorded::start(&program, &["a.folded"]);
    let child = recorded.signal_child(libc::SIGSTOP);
    let out = recorded.path("a.folded");
    let start = Instant::now();
    let finished = recorded.agent.finish().succeeded();
    assert!(start.elapsed() < Duration::from_secs(60), "{finished:#?}");
    assert!(!alive(child));
    let notes = notes(&Summary::parse(&finished.stdout));
    let took_long = notes.iter().filter(|note| note.contains("took longer"));
    assert_eq!(took_long.count(), 1, "{notes:?}");
    assert!(Profile::read(&out).total() > 0);
    assert!(finished.stderr.contains("Ctrl-C"), "{finished:#?}");
}

/// A child that is killed has the same effect, and the note contains the signal.
#[test]
fn a_child_that_dies_costs_one_file_at_most() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let program = workshop.cc("chain.c", "dying", &[]);
    let mut recorded = Recorded::start(&program, &["a.folded"]);
    // Stopped first, so that it is killed while it has a request to answer.
    let child = recorded.signal_child(libc::SIGSTOP);
    thread::sleep(Duration::from_millis(300));
    // SAFETY: kill takes no pointers; the stopped child is still the agent's.
    unsafe { libc::kill(child, libc::SIGKILL) };
    let out = recorded.path("a.folded");
    let finished = recorded.agent.finish().succeeded();
    let notes = notes(&Summary::parse(&finished.stdout));
    let killed = notes
        .iter()
        .filter(|note| note.contains("ended by signal 9"));
    assert_eq!(killed.count(), 1, "{notes:?}");
    assert!(Profile::read(&out).total() > 0);
}

/// A signal during naming ends it. The outputs are still written, and a message says that naming ended
/// early.
#[test]
fn a_signal_ends_naming_early() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let program = workshop.cc("chain.c", "impatient", &[]);
    let mut recorded = Recorded::start(&program, &["a.svg", "a.folded"]);
    let child = recorded.signal_child(libc::SIGSTOP);
    recorded.agent.signal(libc::SIGINT);
    let (out, picture) = (recorded.path("a.folded"), recorded.path("a.svg"));
    let start = Instant::now();
    let finished = recorded.agent.finish().succeeded();
    // Less time than a hanging child is given.
    assert!(start.elapsed() < Duration::from_secs(9), "{finished:#?}");
    assert!(!alive(child));
    let summary = Summary::parse(&finished.stdout);
    let notes = notes(&summary);
    assert!(
        notes.iter().any(|note| note.contains("ended early")),
        "{notes:?}"
    );
    assert!(summary.number("/frames_unnamed") > 0.0, "{summary}");
    assert!(
        finished.stderr.contains("naming ends early"),
        "{finished:#?}"
    );
    let profile = Profile::read(&out);
    assert!(profile.total() > 0);
    assert!(picture.exists());
    // The temporary recording has been removed.
    let files = fs::read_dir(recorded.directory.path()).expect("a directory of ours");
    assert_eq!(files.count(), 2);
}

/// An agent that is killed while it looks up names leaves a recording that can be read, and no child
/// process.
#[test]
fn a_killed_agent_leaves_its_recording() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let program = workshop.cc("chain.c", "unlucky", &[]);
    for output in ["a.pb.gz", "a.svg"] {
        let mut recorded = Recorded::start(&program, &[output]);
        let child = recorded.signal_child(libc::SIGSTOP);
        recorded.agent.signal_worker(libc::SIGKILL);
        let deadline = Instant::now() + Duration::from_secs(60);
        while alive(child) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        assert!(!alive(child), "the child outlived the agent");
        let files = fs::read_dir(recorded.directory.path()).expect("a directory of ours");
        let mut files = files.flatten().map(|entry| entry.path());
        let saved = files.find(|path| path.to_string_lossy().ends_with(".pb.gz"));
        let profile = recorded.report(&saved.expect("a recording"));
        assert!(profile.of("unlucky").total() > 0, "{profile}");
    }
}

/// A program whose debug link names a FIFO is named as if it had no link, and one note gives the reason.
#[test]
fn a_debug_link_to_a_fifo() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let program = workshop.cc(
        "chain.c",
        "linked",
        &["-g", "-Wl,--build-id=none", "-rdynamic"],
    );
    let debug = workshop.path().join("linked.debug");
    let run = |command: &mut Command| {
        assert!(command.status().expect("binutils").success(), "{command:?}");
    };
    run(Command::new("objcopy")
        .arg("--only-keep-debug")
        .args([&program, &debug]));
    run(Command::new("strip").arg(&program));
    let link = format!("--add-gnu-debuglink={}", debug.display());
    run(Command::new("objcopy").arg(link).arg(&program));
    fs::remove_file(&debug).expect("a file of ours");
    run(Command::new("mkfifo").arg(&debug));
    let recorded = Recorded::start(&program, &["a.folded"]);
    let out = recorded.path("a.folded");
    let start = Instant::now();
    let finished = recorded.agent.finish().succeeded();
    assert!(start.elapsed() < Duration::from_secs(30), "{finished:#?}");
    let notes = notes(&Summary::parse(&finished.stdout));
    let about = notes.iter().filter(|note| note.contains("linked.debug"));
    assert_eq!(about.count(), 1, "{notes:?}");
    let profile = Profile::read(&out);
    assert!(
        profile.filtered(|stack| stack.has("main")).total() > 0,
        "{profile}"
    );
}

/// Output of the recorded command does not mix with the summary on standard output.
#[test]
fn a_summary_is_alone_on_standard_output() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let directory = TempDir::new().expect("temporary directory");
    let out = directory.path().join("a.folded");
    let mut command = agent(["record", "--summary", "json", "--output"]);
    command
        .arg(&out)
        .args(["--", "sh", "-c", "echo from the command"]);
    let finished = start(command).finish().succeeded();
    Summary::parse(&finished.stdout);
    assert!(
        finished.stderr.contains("from the command"),
        "{finished:#?}"
    );
    let mut command = agent(["record", "--output"]);
    command
        .arg(&out)
        .args(["--", "sh", "-c", "echo from the command"]);
    let finished = start(command).finish().succeeded();
    assert!(
        finished.stdout.contains("from the command"),
        "{finished:#?}"
    );
}
