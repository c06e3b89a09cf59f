//! flamestorm: parses, resolves, runs.

mod cli;
mod front;

use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use anyhow::{Context as _, Result, bail};
use clap::Parser as _;

use flamestorm::{
    diff::{self, Figures, Kind, Pair},
    doctor, kernel,
    profile::ResolvedProfile,
    report::{self, Outputs, Style, Summary, WriteReport},
    session::{self, Recording, UnwindEntries},
    symbolize,
};

use cli::{Cli, Command, SummaryForm};

/// Exit status when something failed.
const FAILED: u8 = 1;
/// Exit status for a wrong call, as clap gives it.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let started = session::now();
    return_large_allocations();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let cli = Cli::parse();
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
    };
    ExitCode::from(status_of(result))
}

/// The exit status of a result; an error is printed.
fn status_of(result: Result<u8>) -> u8 {
    let error = match result {
        Ok(status) => return status,
        Err(error) => error,
    };
    eprintln!("flamestorm: {error:#}");
    if error.chain().any(|cause| cause.is::<kernel::Error>()) {
        eprintln!("{}", hint());
    }
    FAILED
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
            eprintln!("flamestorm: {error}");
            return Ok(USAGE);
        }
    };
    let outputs = Outputs::parse(&arguments.outputs())?;
    check_streams(&outputs, arguments.summary)?;
    outputs.preflight()?;
    session::survive_truncation().context("cannot handle SIGBUS")?;
    let signal = Arc::new(AtomicUsize::new(0));
    // Once the recording is over, a signal ends the agent as usual.
    let recorded = Arc::new(AtomicBool::new(false));
    for number in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        signal_hook::flag::register_conditional_default(number, Arc::clone(&recorded))
            .context("cannot handle signals")?;
        signal_hook::flag::register_usize(number, Arc::clone(&signal), number as usize)
            .context("cannot handle signals")?;
    }
    let mut status = StatusLine::new();
    let until = match (config.duration, config.command.is_empty()) {
        (Some(duration), _) => format!("for {}", humantime::format_duration(duration)),
        (None, true) => "until Ctrl-C".to_owned(),
        (None, false) => "until it ends".to_owned(),
    };
    let target = config.target();
    let recording = session::record(&config, &signal, |progress| {
        let elapsed = progress.elapsed.as_secs();
        // Not before: who waits for this line starts what is to be recorded.
        if elapsed == 0 {
            status.say(&format!(
                "recording {target} at {} Hz {until}",
                config.frequency
            ));
        } else {
            status.update(&format!("{elapsed} s, {} samples", progress.samples));
        }
    })?;
    status.clear();
    recorded.store(true, Ordering::Relaxed);
    let command_status = recording.command_status.unwrap_or(0);
    let profile = symbolize(recording, &mut status);
    let shown = arguments.show.of(&profile);
    let written = outputs.write(&profile, &shown);
    status.clear();
    let told = tell(
        &profile,
        &shown,
        &written,
        arguments.summary,
        outputs.uses_stdout(),
    )?;
    Ok(if told == 0 { command_status } else { told })
}

/// Names every frame, and completes the figures of the recording with what that cost.
fn symbolize(recording: Recording, status: &mut StatusLine) -> ResolvedProfile {
    let Recording {
        window,
        meta,
        runtime,
        ..
    } = recording;
    let before = session::cpu_seconds();
    let options = symbolize::Options {
        function_starts: &UnwindEntries,
        ..symbolize::Options::default()
    };
    let mut profile = symbolize::resolve(window, &options, meta, |progress| {
        let (done, modules) = (progress.done, progress.modules);
        status.update(&format!(
            "naming functions: {done} of {modules} files {}",
            progress.module
        ));
    });
    let notes = std::mem::take(&mut profile.runtime.notes);
    profile.runtime = runtime;
    for note in notes {
        profile.runtime.note(note);
    }
    for note in report::caller_notes(&profile) {
        profile.runtime.note(note);
    }
    profile.runtime.agent.cpu_seconds.symbolising = session::cpu_seconds() - before;
    profile.runtime.agent.max_rss_bytes.peak = session::max_rss_bytes();
    profile
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
        eprintln!("flamestorm: {error}");
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
        text += &format!("wrote   {file}\n");
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
        eprintln!("flamestorm: {error}");
    }
    if let Some(rescued) = &written.rescued {
        eprintln!(
            "flamestorm: the recording was saved as {}",
            rescued.path.display()
        );
    }
    Ok(if written.errors.is_empty() { 0 } else { FAILED })
}

/// One line on standard error that says how far things are; only the first where that is no terminal.
struct StatusLine {
    terminal: bool,
}

impl StatusLine {
    fn new() -> StatusLine {
        StatusLine {
            terminal: std::io::stderr().is_terminal(),
        }
    }

    /// A line that stays.
    fn say(&mut self, text: &str) {
        self.clear();
        eprintln!("flamestorm: {text}");
    }

    /// Replaces the line that does not stay.
    fn update(&mut self, text: &str) {
        if self.terminal {
            eprint!("\r\x1b[K{text}");
        }
    }

    fn clear(&mut self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}
