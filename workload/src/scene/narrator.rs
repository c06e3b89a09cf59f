//! What the investigator says: headings, lines with the time, figures in colour, and the wait for Enter.

use std::fmt::Display;
use std::io::{self, BufRead, IsTerminal, Write};
use std::time::Instant;

use anstream::AutoStream;
use anstyle::{AnsiColor, Style};
use tokio::sync::oneshot;

use super::SceneError;

const HEADING: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const FAIR: Style = AnsiColor::Yellow.on_default();
const BAD: Style = AnsiColor::Red.on_default().bold();
const FAINT: Style = Style::new().dimmed();

/// How a figure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// As expected.
    Good,
    /// Another than expected, and no harm.
    Fair,
    /// What somebody should look at.
    Bad,
    /// Of less importance.
    Faint,
    /// What somebody should remember.
    Strong,
}

/// A text in a tone; written without colours where nobody could see them.
pub fn toned(tone: Tone, text: impl Display) -> String {
    let style = match tone {
        Tone::Good => GOOD,
        Tone::Fair => FAIR,
        Tone::Bad => BAD,
        Tone::Faint => FAINT,
        Tone::Strong => HEADING,
    };
    format!("{style}{text}{style:#}")
}

/// Tells the story on standard output, or on standard error where that is for machines.
#[derive(Debug)]
pub struct Narrator {
    start: Instant,
    to_stderr: bool,
    asks: bool,
}

impl Narrator {
    /// `to_stderr`: standard output is for machines. `asks`: goes on when somebody presses Enter.
    pub fn new(to_stderr: bool, asks: bool) -> Result<Self, SceneError> {
        if asks && !io::stdin().is_terminal() {
            return Err(SceneError::NobodyThere);
        }
        Ok(Self {
            start: Instant::now(),
            to_stderr,
            asks,
        })
    }

    /// Begins a scene.
    pub fn heading(&self, text: &str) {
        self.write(&format!("\n{}\n", toned(Tone::Strong, text)));
    }

    /// Tells what happens, with the time since the beginning.
    pub fn say(&self, text: &str) {
        let elapsed = self.start.elapsed().as_secs_f64();
        let time = toned(Tone::Faint, format_args!("[{elapsed:5.1} s]"));
        self.write(&format!("{time} {text}\n"));
    }

    /// A line of a table, or of what belongs to the line before.
    pub fn line(&self, text: &str) {
        self.write(&format!("          {text}\n"));
    }

    /// Waits for Enter, where anybody is asked.
    pub async fn pause(&self, next: &str) -> Result<(), SceneError> {
        if !self.asks {
            return Ok(());
        }
        self.write(&format!(
            "\n  {} ",
            toned(Tone::Strong, format_args!("Enter: {next}"))
        ));
        // A thread of its own, and not tokio's standard input: that one keeps a runtime from ending until
        // something is read.
        let (pressed, wait) = oneshot::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = io::stdin().lock().read_line(&mut line);
            // Nobody waits any more when the scene was interrupted.
            let _ = pressed.send(matches!(read, Ok(1..)));
        });
        match wait.await {
            Ok(true) => Ok(()),
            _ => Err(SceneError::NobodyThere),
        }
    }

    fn write(&self, text: &str) {
        // Nobody may be reading any more: no reason to fail.
        let _ = if self.to_stderr {
            AutoStream::auto(io::stderr().lock()).write_all(text.as_bytes())
        } else {
            let mut stdout = AutoStream::auto(io::stdout().lock());
            stdout
                .write_all(text.as_bytes())
                .and_then(|()| stdout.flush())
        };
    }
}
