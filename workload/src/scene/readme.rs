//! `README.md` beside the pictures: what each is, and how it was made.

use std::fmt::Write;
use std::time::SystemTime;

use super::fire::ms;
use super::investigation::{Investigation, place};
use super::{Options, Recording, SceneError};
use crate::calibration::Machine;
use crate::storm::StormReport;
use crate::storm::plan::QUERIES_OF_A_ROUND;
use crate::user;

/// Writes it beside the pictures, and gives all of these files to the user behind sudo.
pub fn add(
    investigation: &mut Investigation,
    storm: &StormReport,
    options: &Options,
) -> Result<(), SceneError> {
    let readme = options.output_dir.join("README.md");
    let failed = |source| SceneError::Output {
        path: readme.clone(),
        source,
    };
    std::fs::write(&readme, text(investigation, storm, options)).map_err(failed)?;
    investigation.files.push(readme.clone());
    // Pictures first.
    investigation
        .files
        .sort_by_key(|file| file.extension().is_none_or(|ending| ending != "svg"));
    for file in &investigation.files {
        user::give_to_sudo_user(file).map_err(failed)?;
    }
    Ok(())
}

/// The text, with the figures of this time.
fn text(found: &Investigation, storm: &StormReport, options: &Options) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut text, found, storm, options);
    text
}

fn write(
    out: &mut String,
    found: &Investigation,
    storm: &StormReport,
    options: &Options,
) -> std::fmt::Result {
    let machine = Machine::with(String::new());
    let when = humantime::format_rfc3339_seconds(SystemTime::now());
    let rounds = options.rounds;
    writeln!(out, "# Pictures\n")?;
    writeln!(
        out,
        "Made by `workload scene` at {when} on a machine with {} CPUs ({}). Every figure was measured then.\n",
        machine.cores, machine.cpu_model
    )?;
    writeln!(out, "| file | what it shows | how it was made |")?;
    writeln!(out, "|---|---|---|")?;
    for recorded in &found.recordings {
        let what = match recorded.name {
            "baseline" => "the shop on a day like any other: 20 requests a second".to_owned(),
            "storm" => format!(
                "{rounds} rounds of {QUERIES_OF_A_ROUND} queries at once, without the index"
            ),
            _ => "the same queries in the same time, with the index".to_owned(),
        };
        writeln!(
            out,
            "| `{}.svg`, `.folded`, `.pb.gz` | {what} | {:.1} s of the whole machine, {} samples, {} lost |",
            recorded.name, recorded.seconds, recorded.samples, recorded.lost
        )?;
    }
    writeln!(
        out,
        "| `storm-app.svg`, `storm-database.svg` | the storm, the services' and PostgreSQL's side by themselves | \
         `flamestorm report storm.pb.gz --view app --output storm-app.svg`, likewise `database` |"
    )?;
    writeln!(
        out,
        "| `storm-vs-fixed.svg` | what the fix changed: blue has gone, red has come | \
         `flamestorm diff storm.pb.gz fixed.pb.gz --output storm-vs-fixed.svg` |\n"
    )?;
    let command = Recording::new(&options.agent, &options.output_dir, "storm").arguments();
    let command: Vec<_> = command.iter().map(|word| word.to_string_lossy()).collect();
    writeln!(
        out,
        "A storm is `POST /api/demo/trigger-database-scenario {{\"rounds\": {rounds}}}` at the shop's gateway; the fix between \
         the two is `workload index create`. A recording is made, as root, by\n\n```\nflamestorm {}\n```\n",
        command.join(" ")
    )?;
    writeln!(
        out,
        "which starts before the queries and ends by Ctrl-C after them. The `.pb.gz` is the file of record: \
         `flamestorm report` makes the others again, also of a part (`--filter service=order-service`).\n"
    )?;
    writeln!(out, "## What they show\n")?;
    writeln!(
        out,
        "- `{}`, {}",
        found.function,
        place(&found.file, found.line)
    )?;
    writeln!(
        out,
        "- {:.1} % of the product-service's CPU time, its queries in PostgreSQL included; {:.1} % of the machine's",
        found.share_of_service * 100.0,
        found.share_of_machine * 100.0
    )?;
    writeln!(out, "- it asks `{}`", found.query.replace('`', "'"))?;
    writeln!(
        out,
        "- P95 of the storm's queries {} without the index and {} with it; {:.1} % of them failed without, {:.1} % with",
        ms(found.p95_before_fix_ms),
        ms(found.p95_after_fix_ms),
        storm.failed_percent,
        found.fixed_storm.failed_percent
    )?;
    writeln!(
        out,
        "\n## How to read them\n\n\
         Width is CPU time; a frame hangs from its caller. Above a query (violet) stands who asked, below it what \
         PostgreSQL did for it. Click a frame to look into it; Ctrl-F `search_products_unindexed` finds the function."
    )
}
