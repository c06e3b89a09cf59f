//! flamestorm: parses, resolves, runs.

mod cli;
mod front;

use std::{
    cell::RefCell,
    io::{IsTerminal as _, Write as _},
    os::fd::OwnedFd,
    path::Path,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;

use flamestorm::{
    clock, cost,
    diff::{self, Figures, Kind, Pair},
    doctor, kernel,
    profile::ResolvedProfile,
    report::{self, Outputs, Style, Summary, WriteReport, causes, printable},
    session::{self, Recording, UnwindEntries},
    symbolize::{self, Namer, Spawner},
};

use cli::{Cli, Command, SummaryForm};

/// Exit status when something failed.
const FAILED: u8 = 1;
/// Exit status for a wrong call, as clap gives it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let started = clock::now();
    return_large_allocations();
    let cli = Cli::parse();
    // The namer says what went wrong in its answers only: its log would be in the words of hostile files.
    if !matches!(cli.command, Command::NameFunctions) {
        log_to_stderr();
    }
    let result = match &cli.command {
        Command::Record(arguments) => {
            return front::run(|group| status_of(record(arguments, started, group)))
                .unwrap_or_else(|error| ExitCode::from(status_of(Err(error))));
        }
        Command::Report(arguments) => report(arguments),
        Command::Queries(arguments) => queries(arguments),
        Command::Diff(arguments) => diff(arguments),
        Command::Doctor(arguments) => {
            doctor::run(arguments.json).context("cannot write to standard output")
        }
        Command::NameFunctions => {
            let ready = session::survive_truncation();
            let served = ready.and_then(|()| symbolize::serve_names(&UnwindEntries));
            served.map(|()| 0).context("naming functions")
        }
    };
    ExitCode::from(status_of(result))
}

/// The exit status of a result; an error is printed.
fn status_of(result: Result<u8>) -> u8 {
    let error = match result {
        Ok(status) => return status,
        Err(error) => error,
    };
    eprintln!("flamestorm: {}", causes(error.as_ref()));
    if error.chain().any(|cause| cause.is::<kernel::Error>()) {
        eprintln!("{}", hint());
    }
    FAILED
}

/// The log, with nothing in it that a terminal obeys.
fn log_to_stderr() {
    let default = env_logger::Env::default().default_filter_or("warn");
    let mut builder = env_logger::Builder::from_env(default);
    builder.format(|out, record| {
        let text = printable(&record.args().to_string());
        writeln!(out, "[{:<5} {}] {text}", record.level(), record.target())
    });
    builder.init();
}

/// Makes every allocation of 128 KiB and more a mapping of its own, which goes back to the kernel when
/// it is freed. By default glibc raises that limit with the first large block that is freed (the
/// kernel's type information, 5 MB), and what comes after stays in the heap for good.
fn return_large_allocations() {
    // SAFETY: sets a parameter of the allocator, before there is another thread.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024) };
}

/// What to do when the kernel refuses.
fn hint() -> &'static str {
    // SAFETY: a query without side effects.
    if unsafe { libc::geteuid() } == 0 {
        "`flamestorm doctor` tells what this machine lacks and how to mend it."
    } else {
        "Recording needs root: try it with sudo. `flamestorm doctor` tells what else is missing."
    }
}

fn record(arguments: &cli::Record, started: u64, group: libc::pid_t) -> Result<u8> {
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
    // Before any file is opened that somebody else chose.
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
        // Not before: who waits for this line starts what is to be recorded.
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
    let (profile, unnamed) = name_functions(recording, &spawner, &outputs, &signals, &mut status);
    let shown = arguments.show.of(&profile);
    let written = outputs.write(&profile, &shown);
    status.clear();
    match unnamed {
        // Nothing else was kept of the recording.
        Some(unnamed) if !written.errors.is_empty() && written.rescued.is_none() => unnamed.keep(),
        unnamed => drop(unnamed),
    }
    let told = tell(
        &profile,
        &shown,
        &written,
        arguments.summary,
        outputs.uses_stdout(),
    )?;
    Ok(if told == 0 { command_status } else { told })
}

/// Signals that end a recording: the first ends the recording, the next ends naming early, one more ends the agent.
struct Signals {
    /// The last signal; 0 when there was none, or when it was seen to.
    last: Arc<AtomicUsize>,
    /// Whether the next signal ends the agent as usual.
    by_default: Arc<AtomicBool>,
}

impl Signals {
    fn register() -> std::io::Result<Signals> {
        let signals = Signals {
            last: Arc::default(),
            by_default: Arc::default(),
        };
        for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            let by_default = Arc::clone(&signals.by_default);
            signal_hook::flag::register_conditional_default(number, by_default)?;
            let last = Arc::clone(&signals.last);
            signal_hook::flag::register_usize(number, last, number as usize)?;
        }
        Ok(signals)
    }
}

/// Standard output kept back from the recorded command: what it writes there goes to standard error.
struct StdoutApart {
    stdout: OwnedFd,
}

impl StdoutApart {
    fn new() -> std::io::Result<StdoutApart> {
        let stdout = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
        rustix::stdio::dup2_stdout(rustix::stdio::stderr())?;
        Ok(StdoutApart { stdout })
    }

    fn restore(self) -> std::io::Result<()> {
        Ok(rustix::stdio::dup2_stdout(&self.stdout)?)
    }
}

/// How long naming takes before it says where the recording is meanwhile.
const LONG_NAMING: Duration = Duration::from_secs(3);

/// Saves the recording, then names every frame, and completes the figures with what that cost. The saved recording
/// is to be dropped when the outputs are written.
fn name_functions(
    recording: Recording,
    spawner: &Spawner,
    outputs: &Outputs,
    signals: &Signals,
    status: &mut StatusLine,
) -> (ResolvedProfile, Option<report::Unnamed>) {
    let Recording {
        window,
        meta,
        runtime,
        ..
    } = recording;
    let before = cost::cpu_seconds();
    // A second signal while the recording ended asked for what the first did.
    signals.last.store(0, Ordering::Relaxed);
    let mut profile = symbolize::resolve_unnamed(&window, meta.clone());
    profile.runtime = runtime.clone();
    profile
        .runtime
        .note("functions were not named: the recording was saved before");
    let unnamed = match outputs.write_unnamed(&profile) {
        Ok(unnamed) => Some(unnamed),
        Err(error) => {
            status.say(&format!("not saved before naming: {}", causes(&error)));
            None
        }
    };
    drop(profile);
    let naming = Naming {
        status: RefCell::new(status),
        module: RefCell::default(),
        saved: unnamed.as_ref().map(|unnamed| unnamed.path.as_path()),
        started: Instant::now(),
        told: RefCell::new(false),
        signals,
    };
    let mut go_on = || naming.go_on();
    let mut namer = Namer::new(spawner, symbolize::Options::default(), &mut go_on);
    let mut profile = symbolize::resolve_apart(&window, &mut namer, meta, |progress| {
        naming.update(&format!(
            "naming functions: {} of {} files {}",
            progress.done, progress.modules, progress.module
        ));
    });
    drop(namer);
    signals.by_default.store(true, Ordering::Relaxed);
    let notes = std::mem::take(&mut profile.runtime.notes);
    profile.runtime = runtime;
    for note in notes {
        profile.runtime.note(note);
    }
    for note in report::caller_notes(&profile) {
        profile.runtime.note(note);
    }
    profile.runtime.agent.cpu_seconds.symbolising = cost::cpu_seconds() - before;
    profile.runtime.agent.max_rss_bytes.peak = cost::max_rss_bytes();
    (profile, unnamed)
}

/// What is said while functions are named, and whether to go on.
struct Naming<'a> {
    status: RefCell<&'a mut StatusLine>,
    module: RefCell<String>,
    saved: Option<&'a Path>,
    started: Instant,
    /// Whether it was said where the recording is.
    told: RefCell<bool>,
    signals: &'a Signals,
}

impl Naming<'_> {
    fn update(&self, text: &str) {
        self.status.borrow_mut().update(text);
        text.clone_into(&mut self.module.borrow_mut());
    }

    fn go_on(&self) -> bool {
        if self.signals.by_default.load(Ordering::Relaxed) {
            return false;
        }
        if self.signals.last.load(Ordering::Relaxed) != 0 {
            self.say_where(
                "naming ends early, the outputs are written; a further signal ends at once",
            );
            self.signals.by_default.store(true, Ordering::Relaxed);
            return false;
        }
        if self.started.elapsed() >= LONG_NAMING && !*self.told.borrow() {
            self.say_where("functions are being named; Ctrl-C ends that early");
        }
        self.status.borrow_mut().update(&self.module.borrow());
        true
    }

    fn say_where(&self, text: &str) {
        *self.told.borrow_mut() = true;
        let saved = match self.saved {
            Some(path) => format!("; the recording without names is {}", path.display()),
            None => String::new(),
        };
        self.status.borrow_mut().say(&format!("{text}{saved}"));
    }
}

fn report(arguments: &cli::Report) -> Result<u8> {
    let outputs = Outputs::parse(&arguments.output)?;
    check_streams(&outputs, arguments.summary)?;
    outputs.preflight()?;
    let loaded = report::load(&arguments.file)?;
    let profile = report::filter(&loaded, &arguments.filter)
        .with_context(|| arguments.file.display().to_string())?;
    let shown = arguments.show.of(&profile);
    let written = outputs.write(&profile, &shown);
    tell(
        &profile,
        &shown,
        &written,
        arguments.summary,
        outputs.uses_stdout(),
    )
}

fn queries(arguments: &cli::Queries) -> Result<u8> {
    let loaded = report::load(&arguments.file)?;
    let profile = report::filter(&loaded, &arguments.filter)
        .with_context(|| arguments.file.display().to_string())?;
    let queries = report::queries(&profile);
    let stdout = std::io::stdout();
    let told = if arguments.json {
        writeln!(stdout.lock(), "{}", serde_json::to_string(&queries)?)
    } else if queries.is_empty() {
        bail!(
            "{}: no sample belongs to a query; was PostgreSQL at work while it was recorded?",
            arguments.file.display()
        );
    } else {
        let style = Style::detect(&stdout);
        write!(stdout.lock(), "{}", report::queries_table(&queries, style))
    };
    match told {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(0),
    }
}

fn diff(arguments: &cli::Diff) -> Result<u8> {
    let outputs = Outputs::parse(&arguments.output)?;
    outputs.refuse_recordings()?;
    if outputs.uses_stdout() && arguments.json {
        bail!("--output - and --json both want standard output: give the stacks a file name");
    }
    outputs.preflight()?;
    let pair = Pair::of(
        diff::load(&arguments.before)?,
        diff::load(&arguments.after)?,
    )?;
    let pair = pair.filter(&arguments.filter)?;
    let pair = match pair.kind() {
        Kind::Pprof => pair.shown(|profile| arguments.show.of(profile)),
        Kind::Folded if arguments.show.view == cli::ViewName::Stitched => pair,
        Kind::Folded => return Err(diff::Error::NoViews.into()),
    };
    let difference = pair.compare();
    let written = outputs.write_each(|format| difference.encode(format));
    let sort = arguments.sort.into();
    let told = if arguments.json {
        let figures = Figures::of(&difference, sort, written.files());
        writeln!(
            std::io::stdout().lock(),
            "{}",
            serde_json::to_string(&figures)?
        )
    } else {
        tell_difference(&difference, sort, &written, outputs.uses_stdout())
    };
    match told {
        // The reader has seen enough (`| head`).
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        told => told.context("cannot write to standard output")?,
    }
    for error in &written.errors {
        eprintln!("flamestorm: {}", causes(error));
    }
    Ok(if written.errors.is_empty() { 0 } else { FAILED })
}

/// The table of a difference, on standard error where standard output has the stacks.
fn tell_difference(
    difference: &diff::Difference,
    sort: diff::SortBy,
    written: &WriteReport,
    stdout_taken: bool,
) -> std::io::Result<()> {
    let (stdout, stderr) = (std::io::stdout(), std::io::stderr());
    let style = if stdout_taken {
        Style::detect(&stderr)
    } else {
        Style::detect(&stdout)
    };
    let mut text = diff::table(difference, sort, style);
    for file in written.files() {
        text += &format!("wrote   {}\n", printable(&file));
    }
    if stdout_taken {
        write!(stderr.lock(), "{text}")
    } else {
        write!(stdout.lock(), "{text}")
    }
}

/// Standard output can carry one thing.
fn check_streams(outputs: &Outputs, form: SummaryForm) -> Result<()> {
    if outputs.uses_stdout() && form == SummaryForm::Json {
        bail!(
            "--output - and --summary json both want standard output: give the folded stacks a file name"
        );
    }
    Ok(())
}

/// Tells what was found, and the status to end with.
fn tell(
    profile: &ResolvedProfile,
    shown: &ResolvedProfile,
    written: &WriteReport,
    form: SummaryForm,
    stdout_taken: bool,
) -> Result<u8> {
    let mut summary = Summary::of(profile);
    summary.files = written.files();
    let stdout = std::io::stdout();
    let told = match form {
        SummaryForm::Json => {
            let json = serde_json::to_string(&summary)?;
            writeln!(stdout.lock(), "{json}")
        }
        SummaryForm::Text if stdout_taken => {
            let style = Style::detect(&std::io::stderr());
            write!(
                std::io::stderr().lock(),
                "{}",
                report::table(shown, &summary, style)
            )
        }
        SummaryForm::Text => {
            let style = Style::detect(&stdout);
            write!(stdout.lock(), "{}", report::table(shown, &summary, style))
        }
    };
    match told {
        // The reader has seen enough (`| head`).
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        told => told.context("cannot write the summary")?,
    }
    for error in &written.errors {
        eprintln!("flamestorm: {}", causes(error));
    }
    if let Some(rescued) = &written.rescued {
        eprintln!(
            "flamestorm: the recording was saved as {}",
            printable(&rescued.path.display().to_string())
        );
    }
    Ok(if written.errors.is_empty() { 0 } else { FAILED })
}

/// How often a line is written where standard error is no terminal.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// One line on standard error that says how far things are. Where that is no terminal, lines of the recording's
/// progress are left out, and of those that follow one is written every ten seconds.
struct StatusLine {
    terminal: bool,
    last: Option<(Instant, String)>,
}

impl StatusLine {
    fn new() -> StatusLine {
        StatusLine {
            terminal: std::io::stderr().is_terminal(),
            last: None,
        }
    }

    /// A line that stays.
    fn say(&mut self, text: &str) {
        self.clear();
        eprintln!("flamestorm: {}", printable(text));
    }

    /// Replaces the line that does not stay.
    fn update(&mut self, text: &str) {
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

    fn clear(&mut self) {
        if self.terminal {
            eprint!("\r\x1b[K");
            self.last = None;
        }
    }
}
