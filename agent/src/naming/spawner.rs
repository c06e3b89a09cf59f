//! A thread that starts namers, and that has none of the agent's files open.
//!
//! A child inherits its parent's open files and closes them at its exec. A FUSE server may block that
//! forever (fs/fuse/file.c, `fuse_flush`), and with it the thread that starts the child. This thread
//! therefore has its own table of open files (unshare(2), `CLONE_FILES`), made before the agent opens any
//! file whose path another process chose.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::child::{NAMER_ARGUMENT, program};
use super::wire;

/// Starts namers.
#[derive(Debug)]
pub struct Spawner {
    /// One message for each child to start.
    requests: Sender<()>,
    /// Passes the child's standard input to the thread. Descriptors that were opened later than the
    /// thread's table do not exist in it.
    inputs: UnixStream,
    children: Receiver<io::Result<Child>>,
}

impl Spawner {
    /// Starts the thread. Files that are open now stay open until the thread ends, which is when this is
    /// dropped. One descriptor stays in the caller's table.
    ///
    /// # Errors
    /// The thread, its socket or its own table of files cannot be made.
    pub fn start() -> io::Result<Spawner> {
        let (inputs, received) = UnixStream::pair()?;
        let (requests, wanted) = mpsc::channel();
        let (started, children) = mpsc::channel();
        let (tell_ready, ready) = mpsc::channel();
        let serve = move || {
            // SAFETY: no other thread uses `received` or any file that this one opens.
            let unshared = unsafe { unshare_unsafe(UnshareFlags::FILES) };
            let is_ready = unshared.is_ok();
            if tell_ready.send(unshared).is_err() || !is_ready {
                return;
            }
            for () in wanted {
                let child = receive(&received).and_then(start_namer);
                if started.send(child).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("spawner".to_owned())
            .spawn(serve)?;
        ready.recv().map_err(io::Error::other)??;
        Ok(Spawner {
            requests,
            inputs,
            children,
        })
    }

    /// Starts a namer with this standard input. If it still runs when the spawner is dropped, it is killed.
    pub(super) fn namer(&self, input: OwnedFd) -> io::Result<Child> {
        wire::send(&self.inputs, &[0], &[input.as_fd()])?;
        self.requests.send(()).map_err(io::Error::other)?;
        self.children.recv().map_err(io::Error::other)?
    }
}

fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    let (_, files) = wire::receive(socket, &mut [0])?;
    let input = files.into_iter().next();
    Ok(input.ok_or(io::ErrorKind::UnexpectedEof)?.into())
}

fn start_namer(input: OwnedFd) -> io::Result<Child> {
    let mut command = Command::new(program());
    command
        .arg0("flamestorm")
        .arg(NAMER_ARGUMENT)
        .stdin(Stdio::from(input))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // In a process group of its own it does not receive the terminal's Ctrl-C, which the agent handles.
        .process_group(0);
    // With this the child ends when the thread that started it ends, wherever it is blocked.
    // SAFETY: the closure runs after the fork and only makes a system call.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
    command.spawn()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files that are opened after the thread was started are not open in it.
    #[test]
    fn has_files_of_its_own() {
        let spawner = Spawner::start().unwrap();
        let _opened = [(); 64].map(|()| tempfile::tempfile().unwrap());
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let counts = tasks.flatten().filter_map(|task| {
            let name = std::fs::read_to_string(task.path().join("comm")).ok()?;
            let open = std::fs::read_dir(task.path().join("fd")).ok()?.flatten();
            let temporary = open.filter(|fd| {
                let target = std::fs::read_link(fd.path()).unwrap_or_default();
                target.to_string_lossy().contains("(deleted)")
            });
            (name.trim() == "spawner").then(|| temporary.count())
        });
        // Other tests that run at the same time have spawners too.
        assert!(counts.min().unwrap() < 64);
        drop(spawner);
    }
}
