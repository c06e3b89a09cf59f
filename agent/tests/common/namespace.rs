//! Linux namespaces for a test, as a container has them: its own processes, mounts and network.

use std::{ffi::OsStr, fs, path::Path, process::Command};

use super::{Running, children_of, start};

/// A pid, a mount and a network namespace. Loopback is up, and an empty directory is mounted over an
/// existing one. All processes in the namespaces are killed when this is dropped.
pub struct Namespace {
    /// The process that keeps the namespaces alive.
    _holder: Running,
    /// The pid of their first process, as the test sees it.
    init: u32,
}

impl Namespace {
    /// Creates the namespaces. `directory` is empty inside.
    pub fn new(directory: &Path) -> Namespace {
        let mut command = Command::new("unshare");
        command
            .args(["--net", "--pid", "--mount", "--fork", "--kill-child"])
            .args(["--mount-proc", "sh", "-c"])
            .arg(
                "ip link set lo up && mount -t tmpfs -o mode=0777 tmpfs \"$0\" && echo ready && exec sleep 600",
            )
            .arg(directory);
        let mut holder = start(command);
        holder.wait_until("the namespaces are ready", |holder| {
            holder.stdout().contains("ready")
        });
        let init = children_of(holder.pid()).first().copied();
        let init = init.expect("unshare has a child");
        Namespace {
            _holder: holder,
            init,
        }
    }

    /// A command that runs a program in the namespaces, with the ids of `user` (user, group) if given.
    pub fn command(&self, program: impl AsRef<OsStr>, user: Option<(u32, u32)>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string()]);
        command.args(["--net", "--pid", "--mount"]);
        if let Some((user, group)) = user {
            command.arg(format!("--setuid={user}"));
            command.arg(format!("--setgid={group}"));
        }
        command.arg("--").arg(program);
        command
    }

    /// A path in the namespaces, as the test sees it.
    pub fn outside(&self, path: &Path) -> std::path::PathBuf {
        let path = path.strip_prefix("/").expect("a path from the root");
        Path::new("/proc")
            .join(self.init.to_string())
            .join("root")
            .join(path)
    }

    /// The pid by which the test knows a process; `pid` is its pid inside the namespace.
    pub fn pid_outside(&self, pid: u32) -> u32 {
        let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = |process: u32| -> Option<u32> {
            let status = fs::read_to_string(format!("/proc/{process}/status")).ok()?;
            let pids = status
                .lines()
                .find_map(|line| line.strip_prefix("NSpid:"))?;
            pids.split_whitespace().last()?.parse().ok()
        };
        fs::read_dir("/proc")
            .expect("/proc")
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .find(|&process| {
                own(process) == Some(pid) && namespace(process) == namespace(self.init)
            })
            .unwrap_or_else(|| panic!("no process of the namespace has pid {pid}"))
    }
}
