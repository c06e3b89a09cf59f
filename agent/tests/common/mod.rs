//! Helpers of the tests that run the agent: build a program whose true stacks are known, record it with the
//! agent, and read what the agent wrote.
//!
//! On a machine that cannot record (missing capabilities, or a kernel without BTF) a test says so on
//! standard error and passes. With `FLAMESTORM_REQUIRE_BPF=1` it fails instead.
#![allow(
    dead_code,
    unused_imports,
    reason = "each test binary uses a part of this"
)]

mod cluster;
mod namespace;
mod process;
mod profile;
mod programs;
mod recording;

pub use cluster::{Cluster, cluster_directory, free_port, unprivileged};
pub use namespace::Namespace;
pub use process::{Finished, Running, agent, children_of, start};
pub use profile::{Profile, Stack, Summary};
pub use programs::{Workshop, run};
pub use recording::Recording;

use std::{
    env,
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

/// Sampling frequency of most tests, Hz. It does not divide the frequency of the kernel's own tick, and it
/// is low enough that the kernel's budget of stack copies is not used up while a process is new to the
/// agent, even on a busy machine.
pub const HERTZ: u32 = 199;

/// Sampling frequency of tests that measure shares of CPU time, Hz.
pub const MANY_HERTZ: u32 = 997;

/// Whether this machine can record. If not, prints the reason, or fails if `FLAMESTORM_REQUIRE_BPF=1`.
pub fn can_record() -> bool {
    let Some(missing) = what_is_missing() else {
        return true;
    };
    assert!(
        env::var_os("FLAMESTORM_REQUIRE_BPF").is_none_or(|value| value != "1"),
        "FLAMESTORM_REQUIRE_BPF=1, but this machine cannot record: {missing}"
    );
    // Not `eprintln!`, whose output the test runner captures and drops when the test passes.
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    writeln!(io::stderr(), "{test}: SKIPPED, {missing}").expect("standard error");
    false
}

/// A program that `scripts/setup.sh test` has put under `target/tools`. If it is missing, says so and
/// returns `None`, or fails if `FLAMESTORM_REQUIRE_BPF=1`.
pub fn tool(path: &str) -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools");
    let tool = tools.join(path);
    if tool.exists() {
        return Some(tool);
    }
    assert!(
        env::var_os("FLAMESTORM_REQUIRE_BPF").is_none_or(|value| value != "1"),
        "{} is missing: scripts/setup.sh test",
        tool.display()
    );
    writeln!(io::stderr(), "SKIPPED in part: no {}", tool.display()).expect("standard error");
    None
}

fn what_is_missing() -> Option<String> {
    const ADMIN: u32 = 21;
    const NEEDED: [(u32, &str); 3] = [(19, "CAP_SYS_PTRACE"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())?;
    let has = |bit: u32| effective >> bit & 1 == 1;
    for (bit, name) in NEEDED {
        let by_admin = bit != 19 && has(ADMIN);
        if !has(bit) && !by_admin {
            return Some(format!("{name} is missing; run as root"));
        }
    }
    if !Path::new("/sys/kernel/btf/vmlinux").exists() {
        return Some("the kernel has no BTF".to_owned());
    }
    None
}

/// A lock of the whole machine, which keeps recordings that measure shares of CPU time apart from all
/// others, in this process and in other processes. Held until dropped.
pub struct MachineLock(#[expect(dead_code, reason = "the open file is the lock")] File);

impl MachineLock {
    /// For recordings that may run beside each other. Waits while a test holds the lock as exclusive.
    pub fn shared() -> Self {
        let file = Self::file();
        file.lock_shared().expect("lock of the tests");
        Self(file)
    }

    /// For a recording beside which no other may run.
    pub fn exclusive() -> Self {
        let file = Self::file();
        file.lock().expect("lock of the tests");
        Self(file)
    }

    fn file() -> File {
        let path = env::temp_dir().join("flamestorm-tests.lock");
        // If another user created the file it can only be opened for reading, which is enough for a lock.
        File::options()
            .append(true)
            .create(true)
            .open(&path)
            .or_else(|_| File::open(&path))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}
