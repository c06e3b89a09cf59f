//! `flamestorm diff`: compares two recordings, and shows what grew and what shrank.

use std::io::Write as _;

use anyhow::{Context as _, Result, bail};
use flamestorm::{
    diff::{self, Figures, Kind, Pair},
    report::{Outputs, Style, WriteReport, causes, printable},
};

use crate::{FAILED, cli};

/// Compares two recordings.
pub fn diff(arguments: &cli::Diff) -> Result<u8> {
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
        // The reader of the pipe has closed it (`| head`), which is not an error.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        told => told.context("cannot write to standard output")?,
    }
    for error in &written.errors {
        eprintln!("flamestorm: {}", causes(error));
    }
    Ok(if written.errors.is_empty() { 0 } else { FAILED })
}

/// Prints the table of a difference: on standard output, or on standard error if the stacks are written to
/// standard output.
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
