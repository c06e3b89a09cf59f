//! Child processes that cannot outlive their test.

use std::{
    fs::{self, File},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// Timeout for every wait: longer than anything here takes on a machine that is busy with other builds.
const PATIENCE: Duration = Duration::from_secs(180);

/// The agent's command line with these arguments.
pub fn agent<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flamestorm"));
    command.args(args);
    // Set by Cargo, and inherited by recorded programs: their loader would search all of these directories
    // for libc, which takes as long as a short-lived program runs.
    command.env_remove("LD_LIBRARY_PATH");
    command
}

/// A started process in a process group of its own. The whole group is killed when this is dropped.
pub struct Running {
    child: Child,
    /// Standard output and standard error are written to files here, so that the process never blocks on a
    /// full pipe.
    output: TempDir,
}

/// The result of a process that has ended.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Starts a command.
pub fn start(mut command: Command) -> Running {
    let output = TempDir::new().expect("temporary directory");
    let file = |name: &str| File::create(output.path().join(name)).expect("output file");
    command
        .stdin(Stdio::null())
        .stdout(file("stdout"))
        .stderr(file("stderr"))
        .process_group(0);
    // Ends the process also when the test itself is killed.
    // SAFETY: between fork and exec the closure makes one system call, which takes no pointers.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    let child = command
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    Running { child, output }
}

impl Running {
    /// The process id, which is also the id of its process group.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the process, not to its group.
    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.pid()).expect("a pid is positive");
        // SAFETY: kill takes no pointers; the child has not been waited for, so the pid is its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0, "kill {pid}");
    }

    /// What the process has written to standard error so far.
    pub fn stderr(&self) -> String {
        read(&self.output.path().join("stderr"))
    }

    /// The pid of the process that records. The agent that was started only waits for that child and
    /// forwards signals to it.
    pub fn worker(&self) -> u32 {
        let pid = self.pid();
        let first = children_of(pid).first().copied();
        first.unwrap_or_else(|| panic!("pid {pid} has no child"))
    }

    /// Sends a signal to the [`Running::worker`].
    pub fn signal_worker(&self, signal: i32) {
        let worker = i32::try_from(self.worker()).expect("a pid");
        // SAFETY: kill takes no pointers; the worker is waited for by the process in front, which runs.
        unsafe { libc::kill(worker, signal) };
    }

    /// What the process has written to standard output so far.
    pub fn stdout(&self) -> String {
        read(&self.output.path().join("stdout"))
    }

    /// The exit status, if the process has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("wait")
    }

    /// Waits until `condition` holds. Panics if the process ends first or [`PATIENCE`] is over.
    pub fn wait_until(&mut self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            let ended = self.child.try_wait().expect("wait");
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "waiting until {what}: {ended:?}\n{}",
                self.stderr()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// CPU time of the process so far, including children that it has waited for, milliseconds.
    pub fn cpu_ms(&self) -> u64 {
        let path = format!("/proc/{}/stat", self.pid());
        let stat = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        // The name may contain any character, so fields are counted after the last `)`: state is field 3,
        // utime field 14, followed by stime, cutime and cstime.
        let (_, fields) = stat.rsplit_once(')').expect("the name is in parentheses");
        let times = fields.split_whitespace().skip(14 - 3).take(4);
        let ticks: u64 = times.filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
        // SAFETY: a query without side effects.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        ticks * 1000 / u64::try_from(per_second).expect("ticks a second")
    }

    /// Waits until the process has used this much more CPU time. Unlike a wait by the clock, this gives the
    /// same number of samples on a busy machine.
    pub fn wait_for_cpu(&mut self, milliseconds: u64) {
        let until = self.cpu_ms() + milliseconds;
        self.wait_until("it has used its CPU time", |running| {
            running.cpu_ms() >= until
        });
    }

    /// Waits until the process has ended.
    pub fn finish(self) -> Finished {
        self.finish_within(PATIENCE)
    }

    /// Waits until the process has ended. Panics if that takes longer than `patience`.
    pub fn finish_within(mut self, patience: Duration) -> Finished {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                break status;
            }
            assert!(
                start.elapsed() < patience,
                "still running after {patience:?}\n{}",
                self.stderr()
            );
            thread::sleep(Duration::from_millis(5));
        };
        Finished {
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let group = i32::try_from(self.pid()).expect("a pid is positive");
        // SAFETY: killpg takes no pointers. The group is the child's own; when everything in it has
        // ended there is no such group, and nothing happens.
        unsafe { libc::killpg(group, libc::SIGKILL) };
        // Without this the child would stay a zombie. If it has been waited for, this returns the same
        // status again.
        let _ = self.child.wait();
    }
}

impl Finished {
    /// Returns `self` if the process succeeded, panics otherwise.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert!(self.status.success(), "{self:#?}");
        self
    }

    /// The exit status that the process chose. Panics when a signal ended it.
    #[track_caller]
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| panic!("ended by signal {:?}\n{self:#?}", self.status.signal()))
    }

    /// Asserts that the process failed cleanly: it chose its exit status, and printed a message with all of
    /// `words` on standard error that is no panic.
    #[track_caller]
    pub fn failed_saying(&self, words: &[&str]) {
        assert_ne!(self.code(), 0, "{self:#?}");
        assert!(!self.stderr.contains("panicked at"), "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "no {word:?} in {self:#?}");
        }
    }
}

fn read(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Pids of the children of a process, of all its threads.
pub fn children_of(pid: u32) -> Vec<u32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let children = threads
        .into_iter()
        .flatten()
        .flatten()
        .map(|thread| fs::read_to_string(thread.path().join("children")).unwrap_or_default());
    children
        .flat_map(|pids| {
            let pids = pids.split_whitespace().filter_map(|pid| pid.parse().ok());
            pids.collect::<Vec<u32>>()
        })
        .collect()
}
