//! flamestorm: parses, resolves, runs.

mod cli;
mod commands;
mod front;
mod signals;
mod terminal;

use std::{io::Write as _, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::Parser as _;

use flamestorm::{
    clock, doctor, kernel, naming,
    report::{causes, printable},
    session::{self, UnwindEntries},
};

use cli::{Cli, Command};

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
            return front::run(|group| status_of(commands::record(arguments, started, group)))
                .unwrap_or_else(|error| ExitCode::from(status_of(Err(error))));
        }
        Command::Report(arguments) => commands::report(arguments),
        Command::Queries(arguments) => commands::queries(arguments),
        Command::Diff(arguments) => commands::diff(arguments),
        Command::Doctor(arguments) => {
            doctor::run(arguments.json).context("cannot write to standard output")
        }
        Command::NameFunctions => {
            let ready = session::survive_truncation();
            let served = ready.and_then(|()| naming::serve_names(&UnwindEntries));
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
