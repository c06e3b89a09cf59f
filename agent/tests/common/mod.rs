//! What the tests on a real kernel share: build a ground-truth program, record it with the agent,
//! read what the agent wrote.
//!
//! Without the rights or the kernel to record, a test says so on standard error and passes;
//! `FLAMESTORM_REQUIRE_BPF=1` makes it fail instead.
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

/// Samples a second in most tests. No divisor of the kernel's own tick; and few enough that the
/// kernel's budget of stack copies lasts while a process is new to it, however busy the machine is.
pub const HERTZ: u32 = 199;

/// Samples a second where a share of CPU time is measured.
pub const MANY_HERTZ: u32 = 997;

/// Whether this machine can record. Where it cannot: says why, or fails if it has to.
pub fn can_record() -> bool {
    let Some(missing) = what_is_missing() else {
        return true;
    };
    assert!(
        env::var_os("FLAMESTORM_REQUIRE_BPF").is_none_or(|value| value != "1"),
        "FLAMESTORM_REQUIRE_BPF=1, but this machine cannot record: {missing}"
    );
    // Not `eprintln!`, which the test runner keeps to itself when the test passes.
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    writeln!(io::stderr(), "{test}: SKIPPED, {missing}").expect("standard error");
    false
}

/// A program that `scripts/setup.sh test` has put under `target/tools`. Where it is missing: says so, or fails if
/// it has to be there.
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

/// Keeps recordings that measure shares of CPU time apart from all others, in this process and in
/// others: held until dropped.
pub struct MachineLock(#[expect(dead_code, reason = "the open file is the lock")] File);

impl MachineLock {
    /// With other recordings, but with none that wants the machine for itself.
    pub fn shared() -> Self {
        let file = Self::file();
        file.lock_shared().expect("lock of the tests");
        Self(file)
    }

    /// Alone.
    pub fn exclusive() -> Self {
        let file = Self::file();
        file.lock().expect("lock of the tests");
        Self(file)
    }

    fn file() -> File {
        let path = env::temp_dir().join("flamestorm-tests.lock");
        // Opened for reading alone if another user made it: enough for a lock.
        File::options()
            .append(true)
            .create(true)
            .open(&path)
            .or_else(|_| File::open(&path))
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }
}
