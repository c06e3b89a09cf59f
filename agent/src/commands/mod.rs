//! The subcommands, and what they print.

mod diff;
mod record;
mod report;

use std::io::Write as _;

use anyhow::{Context as _, Result, bail};
use flamestorm::{
    profile::ResolvedProfile,
    report::{Outputs, Style, Summary, WriteReport, causes, printable, table},
};

pub use self::{
    diff::diff,
    record::record,
    report::{queries, report},
};
use crate::{FAILED, cli::SummaryForm};

/// Checks that at most one output is written to standard output.
fn check_streams(outputs: &Outputs, form: SummaryForm) -> Result<()> {
    if outputs.uses_stdout() && form == SummaryForm::Json {
        bail!(
            "--output - and --summary json both want standard output: give the folded stacks a file name"
        );
    }
    Ok(())
}

/// Prints the summary and the errors. Returns the exit status.
fn print(
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
                table(shown, &summary, style)
            )
        }
        SummaryForm::Text => {
            let style = Style::detect(&stdout);
            write!(stdout.lock(), "{}", table(shown, &summary, style))
        }
    };
    match told {
        // The reader of the pipe has closed it (`| head`), which is not an error.
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
