//! The process that a user sees, in front of the one that works.
//!
//! A thread of the agent may wait for a file system that never answers, and then not even SIGKILL ends it (FUSE:
//! fs/fuse/dev.c, `request_wait_answer`). Its process stays until the answer comes, and whoever waits for that process
//! waits as long. So the work is done in a child process. The process in front hands signals on to it, learns its exit
//! status by a pipe and ends with that, whatever is left of the child. If the child is killed while such a thread waits,
//! `/proc` shows that its first thread has ended, or has a SIGKILL that it does not take, and the process in front ends.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::OwnedFd,
    process::{self, ExitCode},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    pipe::PipeFlags,
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM},
    iterator::Signals,
};

/// How long the child may take to end after it has reported its status.
const GRACE: Duration = Duration::from_secs(1);

/// Signals that come within so short a time are one: `timeout` signals a process and then its process group.
const MERGED: Duration = Duration::from_millis(50);

/// How often the child is looked at while it works.
const LOOK_EVERY: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// SIGKILL in a set of signals (fs/proc/array.c, `render_sigset_t`).
const SIGKILL_BIT: u64 = 1 << (libc::SIGKILL - 1);

/// Exit status when the child died without a report.
const DIED: u8 = 1;

/// Does the work in a child process and returns its exit status. The work is given the process group in front, in which
/// a terminal's foreground programs belong. To be called before there is another thread.
///
/// # Errors
/// No pipe, no fork, no handler.
pub fn run(work: impl FnOnce(libc::pid_t) -> u8) -> Result<ExitCode> {
    let (reader, writer) =
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC).context("cannot make a pipe")?;
    let parent = process::id();
    // SAFETY: a query without side effects.
    let group = unsafe { libc::getpgrp() };
    // SAFETY: there is no other thread, so the child may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()).context("cannot start a process"),
        0 => {
            drop(reader);
            if let Err(error) = detach(parent) {
                eprintln!("flamestorm: {error:#}");
                report(writer, DIED);
            }
            report(writer, work(group))
        }
        child => {
            drop(writer);
            follow(child, reader.into())
        }
    }
}

/// Makes the child get signals from its parent only: those of the terminal would come twice.
fn detach(parent: u32) -> Result<()> {
    // SAFETY: these change only this process. The default action of SIGTTOU would stop it when it writes to the
    // terminal from a process group in the background.
    let failed = unsafe {
        libc::setpgid(0, 0) != 0
            || libc::signal(libc::SIGTTOU, libc::SIG_IGN) == libc::SIG_ERR
            || libc::prctl(libc::PR_SET_PDEATHSIG, SIGTERM) != 0
    };
    if failed {
        return Err(io::Error::last_os_error()).context("cannot prepare the recording process");
    }
    anyhow::ensure!(
        std::os::unix::process::parent_id() == parent,
        "the parent process has ended"
    );
    Ok(())
}

/// Ends the child with a status that the parent learns first.
fn report(writer: OwnedFd, status: u8) -> ! {
    // Without a reader nobody asks for it.
    let _ = File::from(writer).write_all(&[status]);
    process::exit(i32::from(status))
}

/// Waits until the child reports, ends, or has been killed for a while and has not ended.
fn wait_for_end(child: libc::pid_t, reader: &File) -> Result<()> {
    let mut was_killed = false;
    loop {
        if is_readable(reader, &LOOK_EVERY)? {
            return Ok(());
        }
        let is_killed = is_killed(child);
        if was_killed && is_killed {
            return Ok(());
        }
        was_killed = is_killed;
    }
}

/// Whether the pipe has a status or has ended, after at most `timeout`.
fn is_readable(reader: &File, timeout: &Timespec) -> Result<bool> {
    let mut fds = [PollFd::new(reader, PollFlags::IN)];
    match poll(&mut fds, Some(timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error).context("cannot wait for the recording process"),
    }
}

/// Whether a process that was not waited for is being killed: its first thread, the agent's main thread, which never ends
/// before the others by itself, has ended or is about to. Most processes are gone a moment later.
fn is_killed(pid: libc::pid_t) -> bool {
    procfs::process::Process::new(pid)
        .and_then(|process| process.status())
        .is_ok_and(|status| {
            status.state.starts_with('Z') || (status.sigpnd | status.shdpnd) & SIGKILL_BIT != 0
        })
}

/// Hands signals on until the child has ended, or has reported its status and does not end.
fn follow(child: libc::pid_t, mut reader: File) -> Result<ExitCode> {
    let mut signals =
        Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM]).context("cannot handle signals")?;
    thread::spawn(move || {
        let mut last: Option<(i32, Instant)> = None;
        for signal in signals.forever() {
            let is_same =
                last.is_some_and(|(before, at)| before == signal && at.elapsed() < MERGED);
            if !is_same {
                // SAFETY: the child is waited for at the end only, so the pid is its own.
                unsafe { libc::kill(child, signal) };
            }
            last = Some((signal, Instant::now()));
        }
    });
    wait_for_end(child, &reader)?;
    let mut status = [DIED];
    // The pipe ends with the child's last thread.
    let has_reported =
        is_readable(&reader, &Timespec::default())? && reader.read_exact(&mut status).is_ok();
    let deadline = Instant::now() + GRACE;
    loop {
        let mut how = 0;
        // SAFETY: waits for the own child, without blocking.
        let ended = unsafe { libc::waitpid(child, &raw mut how, libc::WNOHANG) };
        if ended == child && !has_reported && libc::WIFSIGNALED(how) {
            let signal = libc::WTERMSIG(how);
            eprintln!("flamestorm: the recording process was ended by signal {signal}");
            return Ok(ExitCode::from(128 + signal as u8));
        }
        if ended != 0 || Instant::now() > deadline {
            if ended == 0 && !has_reported {
                eprintln!(
                    "flamestorm: the recording process was killed, and a thread of it still waits for a file system \
                     that does not answer"
                );
            }
            return Ok(ExitCode::from(status[0]));
        }
        thread::sleep(Duration::from_millis(2));
    }
}
