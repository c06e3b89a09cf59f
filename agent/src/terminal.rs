//! What a subcommand writes to the terminal besides its result.

use std::{
    io::IsTerminal as _,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use flamestorm::report::printable;

/// Interval at which a progress line is written if standard error is not a terminal.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// The status line on standard error, which shows progress. If standard error is not a terminal, progress
/// lines are written as ordinary lines, at most one every ten seconds, and the caller leaves out those of
/// the recording.
pub struct StatusLine {
    /// Whether standard error is a terminal.
    pub terminal: bool,
    last: Option<(Instant, String)>,
}

impl StatusLine {
    /// Makes a status line. Nothing is printed yet.
    pub fn new() -> StatusLine {
        StatusLine {
            terminal: std::io::stderr().is_terminal(),
            last: None,
        }
    }

    /// Prints a line that stays.
    pub fn say(&mut self, text: &str) {
        self.clear();
        eprintln!("flamestorm: {}", printable(text));
    }

    /// Replaces the progress line.
    pub fn update(&mut self, text: &str) {
        if self.terminal {
            if self.last.as_ref().is_none_or(|(_, last)| last != text) {
                eprint!("\r\x1b[K{}", printable(text));
                self.last = Some((Instant::now(), text.to_owned()));
            }
        } else {
            let now = Instant::now();
            let (last, _) = self.last.get_or_insert_with(|| (now, String::new()));
            if last.elapsed() >= PROGRESS_EVERY {
                *last = now;
                self.say(text);
            }
        }
    }

    /// Removes the progress line.
    pub fn clear(&mut self) {
        if self.terminal {
            eprint!("\r\x1b[K");
            self.last = None;
        }
    }
}

/// Keeps standard output apart from the recorded command, whose standard output goes to standard error
/// instead.
pub struct StdoutApart {
    stdout: OwnedFd,
}

impl StdoutApart {
    /// Makes standard output refer to standard error, until [`StdoutApart::restore`].
    ///
    /// # Errors
    /// A descriptor cannot be duplicated.
    pub fn new() -> std::io::Result<StdoutApart> {
        let stdout = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
        rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
        Ok(StdoutApart { stdout })
    }

    /// Restores standard output.
    ///
    /// # Errors
    /// The descriptor cannot be duplicated.
    pub fn restore(self) -> std::io::Result<()> {
        Ok(rustix::stdio::dup2_stdout(&self.stdout)?)
    }
}
