//! Child processes that never outlive us, and the signals that end us.
//!
//! Two ways, for two kinds of children. What is not ours (PostgreSQL, the agent) gets a signal
//! from the kernel when the thread that started it dies, so it must be started on a thread that
//! lives as long as the process. What is ours watches its standard input, a pipe that closes
//! with the parent however that ends; this also survives a change of user, which clears the
//! kernel's signal.

use std::io::Read;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// A child that did not become ready.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// It could not be started or waited for.
    #[error(transparent)]
    Failed(#[from] std::io::Error),
    /// It ended before.
    #[error("{0}")]
    Ended(ExitStatus),
    /// It took too long.
    #[error("not ready after {} s", .0.as_secs())]
    Slow(Duration),
    /// It was asked for a second time.
    #[error("its output is not ours")]
    NoOutput,
}

/// A child in a process group of its own, so that Ctrl-C reaches us alone and we end it in order.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts `command`, which is to watch its standard input (a pipe of ours).
    pub fn spawn_watching(command: &mut Command) -> std::io::Result<Self> {
        let child = command
            .stdin(std::process::Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self { child })
    }

    /// Starts `command` and has the kernel send it `signal` when this thread dies.
    pub fn spawn_tied(command: &mut Command, signal: Signal) -> std::io::Result<Self> {
        let child = tie(command, signal)
            .stdin(std::process::Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Self { child })
    }

    /// The child itself, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits for the line on its standard output (a pipe of ours) that starts with `prefix`, and
    /// gives the rest of it.
    pub async fn ready(&mut self, prefix: &str, patience: Duration) -> Result<String, ReadyError> {
        let stdout = self.child.stdout.take().ok_or(ReadyError::NoOutput)?;
        let mut lines = BufReader::new(stdout).lines();
        let find = async {
            while let Ok(Some(line)) = lines.next_line().await {
                if let Some(rest) = line.strip_prefix(prefix) {
                    return Some(rest.to_owned());
                }
            }
            None
        };
        match tokio::time::timeout(patience, find).await {
            Ok(Some(rest)) => Ok(rest),
            Ok(None) => Err(ReadyError::Ended(self.wait().await?)),
            Err(_) => Err(ReadyError::Slow(patience)),
        }
    }

    /// Waits for the child to end by itself.
    pub async fn wait(&mut self) -> std::io::Result<ExitStatus> {
        // Not `Child::wait`, which closes the pipe that a watching child lives by.
        let stdin = self.child.stdin.take();
        let status = self.child.wait().await;
        self.child.stdin = stdin;
        status
    }

    /// Asks the child to end by `signal`; kills it when it has not after `grace`.
    pub async fn stop(&mut self, signal: Signal, grace: Duration) -> std::io::Result<ExitStatus> {
        if let Some(pid) = self.child.id() {
            let pid = Pid::from_raw(pid.cast_signed());
            // It may have ended meanwhile: then there is nobody to signal, and `wait` knows.
            let _ = kill(pid, signal);
        }
        if let Ok(status) = tokio::time::timeout(grace, self.wait()).await {
            return status;
        }
        tracing::warn!(pid = self.child.id(), ?grace, "still running: killed");
        self.child.kill().await?;
        self.wait().await
    }
}

/// Has the kernel send `signal` to the child when the thread that starts it dies.
pub fn tie(command: &mut Command, signal: Signal) -> &mut Command {
    let parent = Pid::this();
    let tie = move || {
        prctl::set_pdeathsig(signal)?;
        // The parent may have died before the call above.
        if getppid() == parent {
            Ok(())
        } else {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
    };
    // SAFETY: between fork and exec `tie` makes two system calls and compares two numbers; it
    // allocates nothing and takes no lock.
    unsafe { command.pre_exec(tie) };
    command.kill_on_drop(true)
}

/// Resolves when somebody wants this process to end: Ctrl-C, SIGTERM, or the terminal closed.
pub async fn shutdown_signal() -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let name = tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
        _ = hangup.recv() => "SIGHUP",
    };
    tracing::debug!(signal = name, "asked to stop");
    Ok(())
}

/// Resolves when standard input closes, which it does when the parent has gone.
///
/// A thread of its own, and not tokio's standard input: that one keeps a runtime from ending
/// until something is read.
pub async fn stdin_closed() {
    let (closed, wait) = oneshot::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        let mut stdin = std::io::stdin().lock();
        while matches!(stdin.read(&mut buffer), Ok(1..)) {}
        // The receiver is gone when something else ended the wait.
        let _ = closed.send(());
    });
    // An error means the thread has gone, and with it the watch: end as well.
    let _ = wait.await;
}

/// Resolves at a signal, and, `with_parent`, when standard input closes.
pub async fn told_to_stop(with_parent: bool) -> std::io::Result<()> {
    if !with_parent {
        return shutdown_signal().await;
    }
    tokio::select! {
        signal = shutdown_signal() => signal,
        () = stdin_closed() => {
            tracing::debug!("the parent has gone");
            Ok(())
        }
    }
}
