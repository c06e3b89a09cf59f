//! Starts `-- COMMAND` so that it can be recorded from its first instruction.

use std::{
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::process::{CommandExt as _, ExitStatusExt as _},
    },
    process::{Child, Command, ExitStatus},
    thread::{self, JoinHandle},
};

/// A command that was forked and is held just before its exec.
pub struct HeldCommand {
    pid: u32,
    release: std::fs::File,
    spawning: JoinHandle<io::Result<Child>>,
}

/// Makes a pipe; the reading end is returned first. Both ends close on exec.
fn pipe() -> io::Result<(std::fs::File, std::fs::File)> {
    let mut ends = [0; 2];
    // SAFETY: the array holds two descriptors, which the call fills.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: both were just opened and are owned by nothing else.
    let [read, write] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok((read.into(), write.into()))
}

impl HeldCommand {
    /// Forks the command, into a process group if one is given. It continues when [`HeldCommand::release`]
    /// is called, and exits if this is dropped before that.
    ///
    /// # Errors
    /// A pipe cannot be made, or the fork fails.
    pub fn start(command: &[String], group: Option<i32>) -> io::Result<HeldCommand> {
        let (mut tells_pid, pid_to) = pipe()?;
        let (waits, release) = pipe()?;
        let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
        let mut child = Command::new(program);
        child.args(arguments);
        if let Some(group) = group {
            child.process_group(group);
        }
        let waits_fd = waits.as_raw_fd();
        let pid_fd = pid_to.as_raw_fd();
        let release_fd = release.as_raw_fd();
        // SAFETY: between fork and exec the closure only makes system calls, on descriptors that
        // live until the exec.
        unsafe {
            child.pre_exec(move || {
                // If the child kept this copy of the pipe's writing end open, the read below would never
                // end if the agent exited without releasing the command.
                libc::close(release_fd);
                let pid = libc::getpid().to_le_bytes();
                libc::write(pid_fd, pid.as_ptr().cast(), pid.len());
                let mut go = 0u8;
                match libc::read(waits_fd, (&raw mut go).cast(), 1) {
                    1 => Ok(()),
                    _ => Err(io::Error::from_raw_os_error(libc::ECANCELED)),
                }
            });
        }
        // `spawn` returns only after the exec, so it is called in a separate thread.
        let spawning = thread::spawn(move || {
            let spawned = child.spawn();
            drop((pid_to, waits));
            spawned
        });
        let mut pid = [0; 4];
        if tells_pid.read_exact(&mut pid).is_err() {
            // The child failed before it could write its pid. `spawn` returns the reason.
            let failed = join(spawning).err();
            return Err(failed.unwrap_or_else(|| io::Error::other("the command did not start")));
        }
        Ok(HeldCommand {
            pid: u32::from_le_bytes(pid),
            release,
            spawning,
        })
    }

    /// The pid of the command.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Lets the command continue with its exec.
    ///
    /// # Errors
    /// The program cannot be executed.
    pub fn release(mut self) -> io::Result<Child> {
        self.release.write_all(&[1])?;
        drop(self.release);
        join(self.spawning)
    }
}

fn join(spawning: JoinHandle<io::Result<Child>>) -> io::Result<Child> {
    spawning.join().unwrap_or_else(|_| {
        Err(io::Error::other(
            "the thread that starts the command panicked",
        ))
    })
}

/// The exit status of the agent, as a shell would report it: the command's own status, or 128 + the signal.
pub fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    u8::try_from(code.unwrap_or(1)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(command: &[&str]) -> u8 {
        let command: Vec<_> = command.iter().map(|word| (*word).to_owned()).collect();
        let held = HeldCommand::start(&command, None).unwrap();
        assert!(held.pid() > 1);
        exit_code(held.release().unwrap().wait().unwrap())
    }

    /// The command's exit status is passed on, or its signal as 128 + its number.
    #[test]
    fn status() {
        assert_eq!(run(&["sh", "-c", "exit 7"]), 7);
        assert_eq!(run(&["sh", "-c", "kill -TERM $$"]), 128 + 15);
    }

    /// A held command does not run before it is released, and exits if it never is.
    #[test]
    fn held_and_dropped() {
        let file = std::env::temp_dir().join(format!("held-{}", std::process::id()));
        let touch = vec!["touch".to_owned(), file.display().to_string()];
        let held = HeldCommand::start(&touch, None).unwrap();
        drop(held.release);
        assert!(join(held.spawning).is_err());
        assert!(!file.exists());
    }

    /// A program that does not exist is reported as `NotFound`.
    #[test]
    fn no_such_program() {
        let held = HeldCommand::start(&["/nonexistent/program".to_owned()], None).unwrap();
        let error = held.release().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
