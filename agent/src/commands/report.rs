//! `flamestorm report` and `flamestorm queries`, which read a saved recording.

use std::io::Write as _;

use anyhow::{Context as _, Result, bail};
use flamestorm::report::{self, Outputs, Style};

use super::{check_streams, print};
use crate::cli;

/// Prints the table of a recording and writes its outputs. Returns the exit status.
pub fn report(arguments: &cli::Report) -> Result<u8> {
    let outputs = Outputs::parse(&arguments.output)?;
    check_streams(&outputs, arguments.summary)?;
    outputs.preflight()?;
    let loaded = report::load(&arguments.file)?;
    let profile = report::filter(&loaded, &arguments.filter)
        .with_context(|| arguments.file.display().to_string())?;
    let shown = arguments.show.of(&profile);
    let written = outputs.write(&profile, &shown);
    print(
        &profile,
        &shown,
        &written,
        arguments.summary,
        outputs.uses_stdout(),
    )
}

/// Prints the queries of a recording. Returns the exit status.
pub fn queries(arguments: &cli::Queries) -> Result<u8> {
    let loaded = report::load(&arguments.file)?;
    let profile = report::filter(&loaded, &arguments.filter)
        .with_context(|| arguments.file.display().to_string())?;
    let queries = report::queries(&profile);
    let stdout = std::io::stdout();
    let told = if arguments.json {
        writeln!(stdout.lock(), "{}", serde_json::to_string(&queries)?)
    } else if queries.is_empty() {
        bail!(
            "{}: no sample belongs to a query; was PostgreSQL executing queries during the recording?",
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
