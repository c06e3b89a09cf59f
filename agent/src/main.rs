//! The binary `flamestorm`: parses the arguments, runs the subcommand, and sets the exit status.

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
/// Exit status for wrong arguments, the same as clap's.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let started = clock::now();
    return_large_allocations();
    let cli = Cli::parse();
    // The namer reports problems only in its answers. It has no log, because hostile files could determine
    // the log's text.
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

/// Prints the error of a result, and returns the exit status.
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

/// Sends the log to standard error, without control characters that a terminal would interpret.
fn log_to_stderr() {
    let default = env_logger::Env::default().default_filter_or("warn");
    let mut builder = env_logger::Builder::from_env(default);
    builder.format(|out, record| {
        let text = printable(&record.args().to_string());
        writeln!(out, "[{:<5} {}] {text}", record.level(), record.target())
    });
    builder.init();
}

/// Makes every allocation of 128 KiB and more a mapping of its own, which is returned to the kernel when it
/// is freed. By default glibc raises this threshold when the first large block is freed (here the kernel's
/// type information, 5 MB), and later blocks below the new threshold stay in the heap for good.
fn return_large_allocations() {
    // SAFETY: this sets a parameter of the allocator, before another thread exists.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 128 * 1024) };
}

/// Advice for the user when the kernel refuses something.
fn hint() -> &'static str {
    // SAFETY: a query without side effects.
    if unsafe { libc::geteuid() } == 0 {
        "`flamestorm doctor` reports what this machine lacks and how to fix that."
    } else {
        "Recording needs root: try sudo. `flamestorm doctor` reports what else is missing."
    }
}
