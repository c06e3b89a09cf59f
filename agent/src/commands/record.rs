//! `flamestorm record`: from the arguments to the written profile.

use std::{
    cell::{Cell, RefCell},
    path::PathBuf,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use flamestorm::{
    naming::{Progress, Spawner},
    pipeline,
    report::{OutputError, Outputs, Unnamed, causes, printable},
    session,
};

use super::{check_streams, print};
use crate::{
    USAGE,
    cli::{self, SummaryForm},
    signals::Signals,
    terminal::{StatusLine, StdoutApart},
};

/// Records, names functions and writes the outputs. Returns the exit status. `started` is when the agent
/// was started, nanoseconds; `group` is the process group of the command.
pub fn record(arguments: &cli::Record, started: u64, group: libc::pid_t) -> Result<u8> {
    let config = match arguments.config(started) {
        Ok(config) => session::Config {
            process_group: Some(group),
            ..config
        },
        Err(error) => {
            eprintln!("flamestorm: {}", printable(&error));
            return Ok(USAGE);
        }
    };
    let outputs = Outputs::parse(&arguments.outputs())?;
    check_streams(&outputs, arguments.summary)?;
    outputs.preflight()?;
    session::survive_truncation().context("cannot handle SIGBUS")?;
    let signals = Signals::register().context("cannot handle signals")?;
    let stdout_taken = arguments.summary == SummaryForm::Json || outputs.uses_stdout();
    let apart = (stdout_taken && !config.command.is_empty())
        .then(StdoutApart::new)
        .transpose()
        .context("cannot send the command's output to standard error")?;
    // This comes before any file is opened whose path another process chose, see [`Spawner`].
    let spawner = Spawner::start().context("cannot prepare the thread that starts namers")?;
    let mut status = StatusLine::new();
    let until = match (config.duration, config.command.is_empty()) {
        (Some(duration), _) => format!("for {}", humantime::format_duration(duration)),
        (None, true) => "until Ctrl-C".to_owned(),
        (None, false) => "until it ends".to_owned(),
    };
    let target = config.target();
    let recording = session::record(&config, &signals.last, |progress| {
        let elapsed = progress.elapsed.as_secs();
        // This line is printed only now, when sampling has started, because a script may wait for it before
        // it starts the work that is to be recorded.
        if elapsed == 0 {
            status.say(&format!(
                "recording {target} at {} Hz {until}",
                config.frequency
            ));
        } else if status.terminal {
            status.update(&format!("{elapsed} s, {} samples", progress.samples));
        }
    })?;
    status.clear();
    if let Some(apart) = apart {
        apart.restore().context("standard output is lost")?;
    }
    let command_status = recording.command_status.unwrap_or(0);
    // A second signal that arrived while the recording was being finished asked for the same as the first.
    signals.last.store(0, Ordering::Relaxed);
    let naming = Naming::new(&mut status, &signals);
    let (profile, unnamed) = pipeline::name_functions(recording, &outputs, &spawner, &naming);
    signals.by_default.store(true, Ordering::Relaxed);
    let shown = arguments.show.of(&profile);
    let written = outputs.write(&profile, &shown);
    status.clear();
    match unnamed {
        // No other copy of the recording exists.
        Some(unnamed) if !written.errors.is_empty() && written.rescued.is_none() => unnamed.keep(),
        unnamed => drop(unnamed),
    }
    let printed = print(
        &profile,
        &shown,
        &written,
        arguments.summary,
        outputs.uses_stdout(),
    )?;
    Ok(if printed == 0 {
        command_status
    } else {
        printed
    })
}

/// How long naming may take before the path of the saved recording is printed.
const LONG_NAMING: Duration = Duration::from_secs(3);

/// Prints the progress of naming, and ends naming early on a signal.
struct Naming<'a> {
    status: RefCell<&'a mut StatusLine>,
    signals: &'a Signals,
    started: Instant,
    /// The last progress line.
    line: RefCell<String>,
    /// Path of the recording that was saved without names.
    saved: RefCell<Option<PathBuf>>,
    /// Whether that path was printed.
    is_path_known: Cell<bool>,
}

impl<'a> Naming<'a> {
    fn new(status: &'a mut StatusLine, signals: &'a Signals) -> Naming<'a> {
        Naming {
            status: RefCell::new(status),
            signals,
            started: Instant::now(),
            line: RefCell::default(),
            saved: RefCell::default(),
            is_path_known: Cell::new(false),
        }
    }

    fn say_with_path(&self, text: &str) {
        self.is_path_known.set(true);
        let saved = match &*self.saved.borrow() {
            Some(path) => format!("; the recording without names is {}", path.display()),
            None => String::new(),
        };
        self.status.borrow_mut().say(&format!("{text}{saved}"));
    }
}

impl pipeline::Observer for Naming<'_> {
    fn saved(&self, unnamed: Result<&Unnamed, &OutputError>) {
        match unnamed {
            Ok(unnamed) => *self.saved.borrow_mut() = Some(unnamed.path.clone()),
            Err(error) => {
                let text = format!("not saved before naming: {}", causes(error));
                self.status.borrow_mut().say(&text);
            }
        }
    }

    fn naming(&self, progress: Progress<'_>) {
        let line = format!(
            "naming functions: {} of {} files {}",
            progress.done, progress.modules, progress.module
        );
        self.status.borrow_mut().update(&line);
        self.line.replace(line);
    }

    fn go_on(&self) -> bool {
        if self.signals.by_default.load(Ordering::Relaxed) {
            return false;
        }
        if self.signals.last.load(Ordering::Relaxed) != 0 {
            self.say_with_path(
                "naming ends early, the outputs are written; a further signal ends at once",
            );
            self.signals.by_default.store(true, Ordering::Relaxed);
            return false;
        }
        if self.started.elapsed() >= LONG_NAMING && !self.is_path_known.get() {
            self.say_with_path("functions are being named; Ctrl-C ends that early");
        }
        self.status.borrow_mut().update(&self.line.borrow());
        true
    }
}
