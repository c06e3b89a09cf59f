//! The process that the user sees, in front of the child process that does the work.
//!
//! A thread of the agent may block on a file system that never answers, and then not even SIGKILL ends it
//! (FUSE: fs/fuse/dev.c, `request_wait_answer`). Its process stays until the answer comes, and anything that
//! waits for that process is blocked as long. The work is therefore done in a child process. The front process
//! forwards signals to the child, reads the child's exit status from a pipe, and exits with that status even
//! if the child cannot end. If the child is killed while one of its threads is blocked, no status arrives.
//! Then `/proc` shows that its first thread has ended or has a pending SIGKILL, and the front process exits.

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

/// How long the child may take to exit after it has reported its status.
const GRACE: Duration = Duration::from_secs(1);

/// Equal signals that arrive within this time count as one: `timeout` signals a process and then its process group.
const MERGED: Duration = Duration::from_millis(50);

/// How often the child's state is checked while it works.
const LOOK_EVERY: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// SIGKILL in a signal mask as `/proc` shows it (fs/proc/array.c, `render_sigset_t`).
const SIGKILL_BIT: u64 = 1 << (libc::SIGKILL - 1);

/// Exit status when the child ended without reporting one.
const DIED: u8 = 1;

/// Runs `work` in a child process and returns its exit status. `work` is given the process group of the front
/// process, in which a terminal's foreground programs belong. Must be called before any other thread is started.
///
/// # Errors
/// The pipe, the child process or the signal handler cannot be created, or the child cannot be waited for.
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

/// Gives the child a process group of its own, so that it gets signals from its parent only:
/// those of the terminal would arrive twice. It also gets SIGTERM when its parent ends.
fn detach(parent: u32) -> Result<()> {
    // SAFETY: these calls change only this process. SIGTTOU is ignored because its default action
    // would stop the process when it writes to the terminal from a background process group.
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

/// Reports a status to the parent and exits with it.
fn report(writer: OwnedFd, status: u8) -> ! {
    // The write fails only if the parent has ended, and then the status is not needed.
    let _ = File::from(writer).write_all(&[status]);
    process::exit(i32::from(status))
}

/// Waits until the child has reported its status or has ended, or until two checks in a row have found it killed.
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

/// Whether the pipe has data or is closed, after waiting for at most `timeout`.
fn is_readable(reader: &File, timeout: &Timespec) -> Result<bool> {
    let mut fds = [PollFd::new(reader, PollFlags::IN)];
    match poll(&mut fds, Some(timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error).context("cannot wait for the recording process"),
    }
}

/// Whether a child that has not been reaped is being killed: its first thread has ended or has
/// a pending SIGKILL. The first thread is the agent's main thread, which never ends before the
/// others by itself. Most processes are gone a moment later.
fn is_killed(pid: libc::pid_t) -> bool {
    procfs::process::Process::new(pid)
        .and_then(|process| process.status())
        .is_ok_and(|status| {
            status.state.starts_with('Z') || (status.sigpnd | status.shdpnd) & SIGKILL_BIT != 0
        })
}

/// Forwards signals until the child has ended, or has reported its status and does not end within [`GRACE`].
fn follow(child: libc::pid_t, mut reader: File) -> Result<ExitCode> {
    let mut signals =
        Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM]).context("cannot handle signals")?;
    thread::spawn(move || {
        let mut last: Option<(i32, Instant)> = None;
        for signal in signals.forever() {
            let is_same =
                last.is_some_and(|(before, at)| before == signal && at.elapsed() < MERGED);
            if !is_same {
                // SAFETY: the child is reaped only at the end, so the pid still belongs to it.
                unsafe { libc::kill(child, signal) };
            }
            last = Some((signal, Instant::now()));
        }
    });
    wait_for_end(child, &reader)?;
    let mut status = [DIED];
    // Check first, because the pipe is only closed when the last thread of the child has ended:
    // while one is blocked, a read would block as well.
    let has_reported =
        is_readable(&reader, &Timespec::default())? && reader.read_exact(&mut status).is_ok();
    let deadline = Instant::now() + GRACE;
    loop {
        let mut how = 0;
        // SAFETY: waits for this process's own child, without blocking.
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
