//! What `flamestorm record` promises apart from its stacks: targets, the ways in which a recording ends,
//! files and errors.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Duration,
};

use crate::common::{
    self, Finished, MachineLock, Profile, Running, Summary, Workshop, agent, can_record, start,
};
use tempfile::TempDir;

/// Milliseconds of CPU time that no test reaches. The program is killed when the test drops it.
const LONG: &str = "120000";

fn burner(workshop: &Workshop, name: &str) -> PathBuf {
    workshop.cc("chain.c", name, &[])
}

fn run(program: &Path, args: &[&str]) -> Running {
    let mut command = Command::new(program);
    command.args(args);
    start(command)
}

/// Waits until the agent has printed the line that says that it records.
fn wait_for_recording(agent: &mut Running) {
    agent.wait_until("recording", |agent| agent.stderr().contains("recording"));
}

/// The exit status of the recording is that of COMMAND, also when a signal ended the command.
#[test]
fn exit_status_of_the_command_is_handed_on() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let program = burner(&workshop, "status");
    let out = workshop.path().join("out.folded");
    let record = |command: &[&str]| {
        let mut words = vec![
            "record",
            "--output",
            out.to_str().expect("a path of ours"),
            "--",
        ];
        words.extend(command);
        start(agent(words)).finish()
    };
    let program = program.to_str().expect("a path of ours");
    assert_eq!(record(&[program, "50", "7"]).code(), 7);
    assert_eq!(record(&[program, "50", "0"]).code(), 0);
    assert_eq!(record(&["sh", "-c", "kill -KILL $$"]).code(), 128 + 9);
    assert!(out.exists());
}

/// Ctrl-C ends a recording of the whole machine, and every output file is written.
#[test]
fn interrupt_writes_the_files() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let mut burning = run(&burner(&workshop, "machine_load"), &[LONG]);
    let directory = TempDir::new().expect("temporary directory");
    let [folded, svg, pprof] =
        ["a.folded", "a.svg", "a.pb.gz"].map(|name| directory.path().join(name));
    let mut command = agent(["record", "--summary", "json"]);
    for file in [&folded, &svg, &pprof] {
        command.arg("--output").arg(file);
    }
    let mut recording = start(command);
    wait_for_recording(&mut recording);
    burning.wait_for_cpu(500);
    recording.signal(libc::SIGINT);
    let finished = recording.finish().succeeded();
    let summary = Summary::parse(&finished.stdout);
    assert!(summary.number("/samples") > 0.0);
    assert!(Profile::read(&folded).of("machine_load").total() > 0);
    let picture = fs::read_to_string(&svg).expect("the picture");
    assert!(picture.contains("<svg") && picture.contains("machine_load"));
    let packed = fs::read(&pprof).expect("the profile");
    assert_eq!(packed[..2], [0x1f, 0x8b], "gzip");
}

/// Ctrl-C while a command is recorded ends the command as well. The files are written, and the exit status
/// is that of the command.
#[test]
fn interrupt_ends_the_command() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let program = burner(&workshop, "interrupted");
    let out = workshop.path().join("out.folded");
    let mut command = agent(["record", "--output"]);
    command.arg(&out).arg("--").arg(&program).arg(LONG);
    let mut recording = start(command);
    wait_for_recording(&mut recording);
    thread::sleep(Duration::from_millis(500));
    recording.signal(libc::SIGINT);
    assert_eq!(recording.finish().code(), 128 + libc::SIGINT);
    assert!(out.exists());
}

/// `--duration` ends a recording. Without `--output` the agent writes a picture and the file of record.
#[test]
fn duration_and_default_outputs() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let directory = TempDir::new().expect("temporary directory");
    let mut command = agent(["record", "--duration", "1s"]);
    command.current_dir(directory.path());
    let finished = start(command).finish().succeeded();
    for file in ["flamestorm.svg", "flamestorm.pb.gz"] {
        assert!(directory.path().join(file).exists(), "{file}");
        assert!(finished.stdout.contains(file), "{finished:#?}");
    }
    assert_eq!(files(directory.path()), 2);
}

/// `--pid` gives samples of that process only. Ticks in other processes are not sent to the agent but
/// counted in the kernel.
#[test]
fn pid_is_filtered_in_the_kernel() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let mut wanted = run(&burner(&workshop, "wanted"), &[LONG]);
    let _other = run(&burner(&workshop, "other"), &[LONG]);
    let pid = wanted.pid().to_string();
    let (profile, summary) = filtered(&["--pid", &pid], &mut wanted);
    assert!(profile.total() > 0);
    profile.assert_share(1.0, "samples of the target only", |stack| {
        stack.comm == "wanted"
    });
    profile.assert_share(0.95, "complete stacks", |stack| {
        stack.has_chain(&["main", "first", "second", "third", "burn"])
    });
    assert!(summary.number("/filtered_ticks") > 0.0, "{:#}", summary.0);
}

/// `--comm` gives samples of every process of that name.
#[test]
fn comm_is_filtered_in_the_kernel() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let program = burner(&workshop, "named");
    let mut wanted = run(&program, &[LONG]);
    let _other = run(&burner(&workshop, "other"), &[LONG]);
    let (profile, summary) = filtered(&["--comm", "named"], &mut wanted);
    profile.assert_share(1.0, "samples of the target only", |stack| {
        stack.comm == "named"
    });
    assert!(profile.total() > 0);
    assert!(summary.number("/filtered_ticks") > 0.0, "{:#}", summary.0);
}

/// A process of the wanted name that starts during the recording is recorded.
#[test]
fn comm_that_starts_later() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let program = burner(&workshop, "later");
    let out = workshop.path().join("out.folded");
    let mut command = agent([
        "record",
        "--comm",
        "later",
        "--frequency",
        "499",
        "--output",
    ]);
    command.arg(&out);
    let mut recording = start(command);
    wait_for_recording(&mut recording);
    run(&program, &["800"]).finish().succeeded();
    recording.signal(libc::SIGTERM);
    recording.finish().succeeded();
    let profile = Profile::read(&out);
    assert!(profile.total() > 100, "{profile}");
    profile.assert_share(1.0, "samples of the target only", |stack| {
        stack.comm == "later"
    });
}

/// Records a target until `burning` has used a second of CPU time.
fn filtered(target: &[&str], burning: &mut Running) -> (Profile, Summary) {
    let directory = TempDir::new().expect("temporary directory");
    let out = directory.path().join("out.folded");
    let mut command = agent(["record", "--summary", "json"]);
    command.args(target).arg("--output").arg(&out);
    let mut recording = start(command);
    wait_for_recording(&mut recording);
    burning.wait_for_cpu(1000);
    recording.signal(libc::SIGINT);
    let finished = recording.finish().succeeded();
    (Profile::read(&out), Summary::parse(&finished.stdout))
}

/// Children that a target forks belong to the target, also after they have executed another program.
#[test]
fn children_of_the_target() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let child = burner(&workshop, "the_child");
    let starter = workshop.cc("short_lived.c", "the_parent", &[]);
    let child = child.to_str().expect("a path of ours");
    let mut parent = run(&starter, &["1000", child, "100"]);
    let pid = parent.pid().to_string();
    let (profile, _) = filtered(&["--pid", &pid], &mut parent);
    let of_child = profile.of("the_child");
    assert!(of_child.total() > 30, "{profile}");
    of_child
        .filtered(|stack| stack.has("burn"))
        .assert_share(0.95, "complete stacks", |stack| {
            stack.has_chain(&["main", "first", "second", "third", "burn"])
        });
}

/// The samples of a target that has died keep their names, and the recording continues to its end.
#[test]
fn target_that_dies() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let program = burner(&workshop, "dying");
    let mut target = run(&program, &[LONG]);
    let out = workshop.path().join("out.folded");
    let mut command = agent(["record", "--frequency", "499"]);
    command.args(["--pid", &target.pid().to_string(), "--output"]);
    command.arg(&out);
    let mut recording = start(command);
    wait_for_recording(&mut recording);
    target.wait_for_cpu(500);
    drop(target);
    // Its program is removed too, before the agent looks up names.
    fs::remove_file(&program).expect("the program");
    // With no target left the recording still continues.
    thread::sleep(Duration::from_millis(500));
    recording.signal(libc::SIGINT);
    recording.finish().succeeded();
    let profile = Profile::read(&out);
    assert!(profile.total() > 50, "{profile}");
    profile.assert_share(0.95, "stacks with names", |stack| {
        stack.has_chain(&["main", "first", "second", "third", "burn"])
    });
}

/// An unknown pid is an error at once, which names the pid.
#[test]
fn unknown_pid() {
    if !can_record() {
        return;
    }
    // Larger than any pid can be.
    let directory = TempDir::new().expect("temporary directory");
    let mut command = agent(["record", "--pid", "4194305", "--duration", "60s"]);
    command.current_dir(directory.path());
    start(command).finish().failed_saying(&["4194305"]);
    assert_eq!(files(directory.path()), 0);
}

/// A command that does not exist is an error that names it.
#[test]
fn unknown_command() {
    if !can_record() {
        return;
    }
    let directory = TempDir::new().expect("temporary directory");
    let mut command = agent(["record", "--", "/nonexistent/program"]);
    command.current_dir(directory.path());
    start(command)
        .finish()
        .failed_saying(&["/nonexistent/program"]);
}

fn files(directory: &Path) -> usize {
    fs::read_dir(directory)
        .expect("a directory of ours")
        .count()
}

/// An output that cannot be written is an error before the recording, not after it.
#[test]
fn unwritable_output() {
    if !can_record() {
        return;
    }
    for output in ["/nonexistent/out.svg", "/proc/out.folded", "/etc"] {
        let workshop = Workshop::new();
        let mark = workshop.path().join("the command ran");
        let mark = mark.to_str().expect("a path of ours");
        let words = ["record", "--output", output, "--", "touch", mark];
        start(agent(words)).finish().failed_saying(&[output]);
        assert!(
            !Path::new(mark).exists(),
            "{output}: the command ran nevertheless"
        );
    }
}

/// An unknown extension is refused, with a list of those that exist.
#[test]
fn unknown_kind_of_output() {
    start(agent(["record", "--duration", "1s", "--output", "out.png"]))
        .finish()
        .failed_saying(&["out.png", ".svg", ".folded", ".pb.gz"]);
}

/// A small file system for a test. Unmounted when dropped.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(size: &str) -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let status = Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={size},mode=0755"),
                "small",
            ])
            .arg(directory.path())
            .status()
            .expect("mount");
        assert!(status.success(), "mount: {status}");
        Self(directory)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // If this fails, all that can be done is to leave a mount point behind.
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// A full disk is an error that names the file and leaves no partial file. The recording itself is saved
/// elsewhere.
#[test]
fn full_disk() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let program = burner(&workshop, "filling");
    let disk = SmallDisk::new("16k");
    let elsewhere = TempDir::new().expect("temporary directory");
    // The picture alone is larger than the disk.
    let picture = disk.0.path().join("out.svg");
    let mut command = agent(["record", "--output"]);
    command.arg(&picture).arg("--").arg(&program).arg("300");
    command.env("TMPDIR", elsewhere.path());
    let finished = start(command).finish();
    finished.failed_saying(&["out.svg", "No space left", "was saved as"]);
    assert!(!picture.exists(), "a partial picture");
    let rescued = fs::read_dir(elsewhere.path()).expect("a directory of ours");
    let rescued: Vec<_> = rescued.flatten().map(|entry| entry.path()).collect();
    assert_eq!(rescued.len(), 1, "{rescued:?}");
    let mut command = agent(["report", "--output", "-"]);
    command.arg(&rescued[0]);
    let report = start(command).finish().succeeded();
    assert!(Profile::parse(&report.stdout).of("filling").total() > 0);
}

/// Without privileges the error says what is missing and what to do.
#[test]
fn no_privileges() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let copy = copy_for_everyone(&workshop);
    let finished = as_nobody(&copy, &["record", "--duration", "1s", "--output", "-"]);
    finished.failed_saying(&["ermi", "root", "flamestorm doctor"]);
    assert_eq!(finished.stdout, "");
}

/// As root, `doctor` finds that this machine can record.
#[test]
fn doctor_as_root() {
    if !can_record() {
        return;
    }
    let finished = start(agent(["doctor"])).finish().succeeded();
    assert!(finished.stdout.contains("Recording works"), "{finished:#?}");
    let json = start(agent(["doctor", "--json"])).finish().succeeded();
    let value = Summary::parse(&json.stdout).0;
    assert_eq!(value["can_record"], true);
    let findings = value["findings"].as_array().expect("a list");
    for name in [
        "kernel",
        "BTF",
        "CAP_BPF",
        "perf_event",
        "ring buffer",
        "bpf_loop",
    ] {
        let line = findings.iter().find(|line| line["name"] == name);
        let line = line.unwrap_or_else(|| panic!("no {name} in {value:#}"));
        assert_eq!(line["state"], "ok", "{line}");
    }
}

/// As nobody, `doctor` exits with 1, and names what is missing and the way out.
#[test]
fn doctor_as_nobody() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let copy = copy_for_everyone(&workshop);
    let finished = as_nobody(&copy, &["doctor"]);
    assert_eq!(finished.code(), 1);
    let missing: Vec<&str> = finished
        .stdout
        .lines()
        .filter(|line| line.starts_with("missing"))
        .collect();
    for name in ["CAP_BPF", "CAP_PERFMON", "perf_event", "ring buffer"] {
        assert!(
            missing.iter().any(|line| line.contains(name)),
            "{name}: {finished:#?}"
        );
    }
    assert!(finished.stdout.contains("run as root"));
    assert!(finished.stdout.contains("Recording cannot work"));
}

/// Copies the agent to where every user can run it: the build directory may be closed to other users.
fn copy_for_everyone(workshop: &Workshop) -> PathBuf {
    let copy = workshop.path().join("flamestorm");
    // Copied by another program. If this process had the file open for writing, a child that another test
    // forks at that moment would inherit the descriptor, and the file could not be executed (ETXTBSY) until
    // that child has executed its own program.
    let mut install = Command::new("install");
    install.args(["-m", "0755", env!("CARGO_BIN_EXE_flamestorm")]);
    install.arg(&copy);
    common::run(install);
    copy
}

fn as_nobody(program: &Path, args: &[&str]) -> Finished {
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .args(["--inh-caps=-all", "--bounding-set=-all"])
        .arg(program)
        .args(args)
        .current_dir("/");
    start(command).finish()
}

/// In a pid namespace of its own the agent sees other pids than the kernel. It refuses to record, and says
/// how to run it instead.
#[test]
fn a_pid_namespace_of_its_own() {
    if !can_record() {
        return;
    }
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.arg(env!("CARGO_BIN_EXE_flamestorm"));
    command.args(["record", "--output", "-", "--", "true"]);
    let finished = start(command).finish();
    assert_eq!(finished.code(), 1, "{finished:#?}");
    finished.failed_saying(&["pid namespace", "--pid=host", "hostPID: true"]);
    assert_eq!(finished.stdout, "");
}

/// If `--pid` is given the id of a thread, the message names the process of that thread.
#[test]
fn a_thread_in_the_place_of_its_process() {
    if !can_record() {
        return;
    }
    // Nothing is recorded, but a thread burns CPU time, which must not disturb a test that holds the lock
    // as exclusive.
    let _lock = MachineLock::shared();
    let workshop = Workshop::new();
    let threads = workshop.cc("threads.c", "two_threads", &["-pthread"]);
    let mut running = run(&threads, &[LONG, "1"]);
    let pid = running.pid();
    let thread = |running: &Running| {
        let threads = fs::read_dir(format!("/proc/{}/task", running.pid())).ok()?;
        let mut tids = threads.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        tids.find(|tid: &u32| *tid != pid)
    };
    running.wait_until("it has a second thread", |running| {
        thread(running).is_some()
    });
    let tid = thread(&running).expect("it burns for long").to_string();
    let finished = start(agent(["record", "--duration", "1s", "--pid", &tid])).finish();
    assert_eq!(finished.code(), 1, "{finished:#?}");
    let advice = format!("{tid} is a thread of process {pid} (two_threads): use --pid {pid}");
    finished.failed_saying(&[&advice]);
}
