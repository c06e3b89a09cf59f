//! Builds the programs of `tests/programs`, whose true stacks are known.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

/// A temporary directory with programs built for one test. Removed when dropped.
pub struct Workshop(TempDir);

impl Workshop {
    /// An empty directory, which every user of the machine can read.
    pub fn new() -> Self {
        let directory = tempfile::Builder::new()
            .prefix("flamestorm-programs-")
            .tempdir()
            .expect("temporary directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))
            .expect("permissions of a directory of ours");
        Self(directory)
    }

    /// The directory of the programs.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Builds `source` as `name`, without frame pointers and with the compiler's default unwind tables. The
    /// name becomes the process's name too, which has at most 15 bytes.
    pub fn cc(&self, source: &str, name: &str, flags: &[&str]) -> PathBuf {
        let program = self.path().join(name);
        let mut command = Command::new("cc");
        command
            .args(["-O2", "-fomit-frame-pointer", "-fno-optimize-sibling-calls"])
            .args(["-Wall", "-Wextra", "-Werror"])
            .arg(sources().join(source))
            .arg("-o")
            .arg(&program)
            .args(flags);
        run(command);
        program
    }

    /// Builds a Rust `source` with full debug information.
    pub fn rustc(&self, source: &str, name: &str) -> PathBuf {
        let program = self.path().join(name);
        let mut command = Command::new(option_env!("RUSTC").unwrap_or("rustc"));
        command
            .args(["--edition", "2024", "-O", "-g", "-C", "codegen-units=1"])
            .arg(sources().join(source))
            .arg("-o")
            .arg(&program);
        run(command);
        program
    }

    /// Addresses of the symbols of a program that is not stripped, as `nm` prints them.
    pub fn symbols(program: &Path) -> BTreeMap<String, u64> {
        let mut command = Command::new("nm");
        command.arg(program);
        run(command)
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let address = u64::from_str_radix(words.next()?, 16).ok()?;
                Some((words.nth(1)?.to_owned(), address))
            })
            .collect()
    }
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs")
}

/// Runs a command, which must succeed. Returns what it wrote to standard output.
#[track_caller]
pub fn run(mut command: Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
