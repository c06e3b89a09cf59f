//! What a command writes to the terminal beside its result.

use std::{
    io::IsTerminal as _,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use flamestorm::report::printable;

/// How often a line is written where standard error is no terminal.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// One line on standard error that says how far things are. Where that is no terminal, lines of the recording's
/// progress are left out, and of those that follow one is written every ten seconds.
pub struct StatusLine {
    pub terminal: bool,
    last: Option<(Instant, String)>,
}

impl StatusLine {
    pub fn new() -> StatusLine {
        StatusLine {
            terminal: std::io::stderr().is_terminal(),
            last: None,
        }
    }

    /// A line that stays.
    pub fn say(&mut self, text: &str) {
        self.clear();
        eprintln!("flamestorm: {}", printable(text));
    }

    /// Replaces the line that does not stay.
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

    pub fn clear(&mut self) {
        if self.terminal {
            eprint!("\r\x1b[K");
            self.last = None;
        }
    }
}

/// Standard output kept back from the recorded command: what it writes there goes to standard error.
pub struct StdoutApart {
    stdout: OwnedFd,
}

impl StdoutApart {
    pub fn new() -> std::io::Result<StdoutApart> {
        let stdout = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
        rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
        Ok(StdoutApart { stdout })
    }

    pub fn restore(self) -> std::io::Result<()> {
        Ok(rustix::stdio::dup2_stdout(&self.stdout)?)
    }
}
