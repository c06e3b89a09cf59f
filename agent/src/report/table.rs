//! The table for the terminal.

use std::fmt::Write;

use super::style::{Style, exact, fit, percent, push};
use super::{Summary, printable, queries, queries_table, top_functions};
use crate::encode::svg::grouped;
use crate::profile::{AgentCost, AttributionStats, KernelCost, ResolvedProfile, UnwindTables};

/// The maximum number of rows of the table of functions.
const FUNCTIONS: usize = 20;
/// The maximum number of rows of the table of processes.
const PROCESSES: usize = 10;
/// Width of a function's name, columns.
const NAME: usize = 60;
/// Width of a module's or a process's name, columns.
const SHORT: usize = 24;

/// Top functions and processes, completeness, losses, costs, files.
pub fn table(profile: &ResolvedProfile, summary: &Summary, style: Style) -> String {
    let mut out = String::new();
    functions(&mut out, profile, summary, style);
    processes(&mut out, summary, style);
    out.push_str(&queries_table(&queries(profile), style));
    completeness(&mut out, summary, style);
    if let Some(stats) = &summary.attribution {
        attribution(&mut out, stats, style);
    }
    costs(&mut out, summary, style);
    for note in &summary.notes {
        line(&mut out, "note", &style.paint("33", &printable(note)));
    }
    for file in &summary.files {
        line(&mut out, "wrote", &style.paint("36", &printable(file)));
    }
    out
}

fn functions(out: &mut String, profile: &ResolvedProfile, summary: &Summary, style: Style) {
    let top = top_functions(profile, FUNCTIONS);
    if top.is_empty() {
        return;
    }
    let total = summary.samples.max(1) as f64;
    let heading = format!(
        "{:>6}  {:>6}  {:<NAME$}  {:<SHORT$}  line",
        "self", "total", "function", "module"
    );
    push(out, &style.heading(&heading));
    for function in top {
        let colour = if function.is_kernel { "34" } else { "0" };
        let row = format!(
            "{:>6}  {:>6}  {}  {}  {}",
            percent(function.self_samples as f64 / total),
            percent(function.total_samples as f64 / total),
            style.paint(colour, &fit(&function.name, NAME)),
            fit(&function.module, SHORT),
            printable(&function.place),
        );
        push(out, &row);
    }
    out.push('\n');
}

fn processes(out: &mut String, summary: &Summary, style: Style) {
    if summary.processes.is_empty() {
        return;
    }
    let heading = format!(
        "{:>6}  {:>9}  {:>7}  {:<SHORT$}  pids",
        "share", "samples", "rooted", "process"
    );
    push(out, &style.heading(&heading));
    for process in summary.processes.iter().take(PROCESSES) {
        let row = format!(
            "{:>6}  {:>9}  {:>7}  {}  {}",
            percent(process.share),
            grouped(process.samples),
            process.rooted_share.map_or_else(|| "-".to_owned(), exact),
            fit(&process.name, SHORT),
            pids(&process.pids),
        );
        push(out, &row);
    }
    let more = summary.processes.len().saturating_sub(PROCESSES);
    if more > 0 {
        push(out, &format!("{:>6}  and {more} more", ""));
    }
    out.push('\n');
}

/// The first pids, and the number of the others.
fn pids(pids: &[u32]) -> String {
    const SHOWN: usize = 4;
    let mut text: Vec<_> = pids.iter().take(SHOWN).map(u32::to_string).collect();
    if pids.len() > SHOWN {
        text.push(format!("and {} more", pids.len() - SHOWN));
    }
    text.join(" ")
}

fn completeness(out: &mut String, summary: &Summary, style: Style) {
    let recorded = format!(
        "{} in {:.1} s at {} Hz on {} CPUs ({})",
        grouped(summary.samples),
        summary.duration_seconds,
        summary.frequency_hz,
        summary.cpus,
        expected(summary),
    );
    line(out, "samples", &recorded);
    let rooted = summary.rooted_share.unwrap_or(1.0);
    let text = match summary.rooted_share {
        Some(share) => format!("{} of user stacks reach a proven root", exact(share)),
        None => "no user stacks".to_owned(),
    };
    line(out, "rooted", &style.verdict(rooted >= 0.999, &text));
    let outcomes: Vec<_> = summary
        .outcomes
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(name, count)| format!("{} {}", printable(name), grouped(*count)))
        .collect();
    line(out, "stacks", &outcomes.join(", "));
    let frames = format!(
        "{}: {} without a name, {} by module only ({}); depth {} (median), {} (deepest)",
        grouped(summary.frames),
        grouped(summary.frames_unnamed),
        grouped(summary.frames_module_only),
        percent(summary.frames_module_only as f64 / summary.frames.max(1) as f64),
        summary.stack_depth.p50,
        summary.stack_depth.max,
    );
    line(out, "frames", &frames);
    let lost: Vec<_> = summary
        .lost
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(cause, count)| format!("{} {}", printable(cause), grouped(*count)))
        .collect();
    let text = if lost.is_empty() {
        "nothing".to_owned()
    } else {
        lost.join(", ")
    };
    line(out, "lost", &style.verdict(lost.is_empty(), &text));
    tables(out, &summary.unwind_tables, style);
}

fn tables(out: &mut String, tables: &UnwindTables, style: Style) {
    let Some(unsupported) = tables.unsupported_share else {
        // Nothing was compiled, or another tool wrote the file.
        return;
    };
    let share = |bytes: u64| percent(bytes as f64 / tables.text_bytes as f64);
    let mut text = format!(
        "{} files, {:.1} MB of code: {} covered, {} by frame pointers, {:.2}% unsupported",
        grouped(tables.files),
        tables.text_bytes as f64 / 1e6,
        share(tables.covered_bytes),
        share(tables.frame_pointer_bytes),
        unsupported * 100.0,
    );
    let reasons: Vec<_> = tables
        .unsupported_bytes
        .iter()
        .filter(|(_, bytes)| **bytes > 0)
        .map(|(reason, bytes)| format!("{} {} bytes", printable(reason), grouped(*bytes)))
        .collect();
    if !reasons.is_empty() {
        let _ = write!(text, " ({})", reasons.join(", "));
    }
    if tables.failed > 0 {
        let _ = write!(text, "; {} files without a table", grouped(tables.failed));
    }
    line(out, "tables", &style.paint("2", &text));
}

fn expected(summary: &Summary) -> String {
    let mut parts = vec![format!("{} expected", grouped(summary.expected_samples))];
    for (name, count) in [
        ("idle", summary.idle_ticks),
        ("not targets", summary.filtered_ticks),
        ("missed", summary.missed_ticks),
    ] {
        if count > 0 {
            parts.push(format!("{} {name}", grouped(count)));
        }
    }
    if let Some(steal) = summary.steal_seconds
        && steal >= 0.01
    {
        parts.push(format!("{steal:.2} s stolen by the hypervisor"));
    }
    parts.join(", ")
}

fn attribution(out: &mut String, stats: &AttributionStats, style: Style) {
    let Some(with_query) = stats.query_share() else {
        line(out, "queries", "no PostgreSQL backend was on a CPU");
        return;
    };
    let mut text = format!(
        "{} of {} samples of PostgreSQL backends have their query, {} of these between two statements; ",
        exact(with_query),
        grouped(stats.backend_samples),
        percent(stats.between_statements as f64 / stats.with_query.max(1) as f64),
    );
    if stats.starting_workers > 0 {
        let _ = write!(
            text,
            "{} were of parallel workers that had none yet; ",
            grouped(stats.starting_workers)
        );
    }
    let with_caller = stats.caller_share().unwrap_or(1.0);
    let _ = write!(text, "{} have their caller", exact(with_caller));
    if stats.with_partial_caller > 0 {
        let share = stats.with_partial_caller as f64 / stats.with_query.max(1) as f64;
        let _ = write!(text, ", {} a part of its stack", exact(share));
    }
    let reasons: Vec<_> = stats
        .without_caller
        .iter()
        .filter(|(_, samples)| **samples > 0)
        .map(|(reason, samples)| format!("{} {}", printable(reason), grouped(*samples)))
        .collect();
    if !reasons.is_empty() {
        let _ = write!(text, " ({})", reasons.join(", "));
    }
    let good = with_query >= 0.99 && with_caller >= 0.99;
    line(out, "queries", &style.verdict(good, &text));
    let mut text = format!(
        "{} sends to {} PostgreSQL servers, {} stacks taken (at most {} a second and CPU)",
        grouped(stats.sends),
        stats.servers,
        grouped(stats.caller_stacks),
        grouped(u64::from(stats.caller_stack_budget)),
    );
    for (nanos, what) in [
        (stats.send_ns, "a send without a stack"),
        (stats.caller_stack_ns, "a send with one"),
        (stats.backend_ns, "a backend's state"),
    ] {
        if let Some(nanos) = nanos {
            let _ = write!(text, ", {:.1} µs {what}", nanos / 1e3);
        }
    }
    line(out, "callers", &style.paint("2", &text));
}

fn costs(out: &mut String, summary: &Summary, style: Style) {
    if summary.agent == AgentCost::default() && summary.kernel == KernelCost::default() {
        // Another tool wrote the file, and nothing was measured.
        return;
    }
    let cpu = summary.agent.cpu_seconds;
    let share = cpu.recording / summary.duration_seconds.max(0.001);
    let agent = format!(
        "{:.2} s CPU to start, {:.2} s while recording ({} of one CPU), {:.2} s for symbols; \
         {} MB resident while recording, {} MB at most",
        cpu.startup,
        cpu.recording,
        exact(share),
        cpu.symbolising,
        summary.agent.max_rss_bytes.recording.div_ceil(1_000_000),
        summary.agent.max_rss_bytes.peak.div_ceil(1_000_000),
    );
    line(out, "agent", &style.paint("2", &agent));
    let mut kernel = format!("{:.1} MB of maps", summary.kernel.map_bytes as f64 / 1e6);
    if let Some(nanos) = summary.kernel.run_ns_per_sample {
        let _ = write!(kernel, ", {:.1} µs a sample", nanos / 1e3);
    }
    if let Some(startup) = summary.startup_ms {
        let _ = write!(kernel, "; first unwindable sample after {startup:.0} ms");
    }
    line(out, "kernel", &style.paint("2", &kernel));
}

fn line(out: &mut String, name: &str, text: &str) {
    let _ = writeln!(out, "{name:<8}  {text}");
}
