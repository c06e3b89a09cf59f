//! `flamestorm queries`: the CPU of PostgreSQL by query, and who asked for it.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::view::Marks;
use super::{Style, table};
use crate::encode::svg::grouped;
use crate::profile::{FrameRef, ResolvedProfile, ResolvedSample, key};
use crate::symbolize::readable;

/// Traces named for a query: those that cost most.
const TRACES: usize = 3;

/// Rows of the table on the terminal.
const ROWS: usize = 10;

/// What a query cost. Shares are between 0 and 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QueryCost {
    /// PostgreSQL's query id, or `text:` and a hash of the text where the server computes none.
    pub query_id: String,
    /// Text, without literals unless the recording kept them.
    pub query: String,
    /// Database: a text that is asked of two is two queries.
    pub database: String,
    /// CPU time of the backends and their parallel workers, seconds.
    pub cpu_seconds: f64,
    /// Of the CPU time of all queries.
    pub share: f64,
    /// CPU time over the recording's length: cores used on average.
    pub mean_cores: f64,
    /// Samples.
    pub samples: u64,
    /// Of these, taken between two statements: sending the rest of the answer, reading what comes next.
    pub samples_between_statements: u64,
    /// Executions of which at least one sample was taken.
    pub executions: u64,
    /// Who asked for it, by samples.
    pub callers: Vec<CallerCost>,
    /// Samples whose caller is known, of all.
    pub caller_share: f64,
    /// Samples whose caller is not known, by reason.
    pub callers_unknown: BTreeMap<String, u64>,
    /// Traces that cost most.
    pub trace_ids: Vec<String>,
}

/// A function that asked for a query.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CallerCost {
    /// Service of its process.
    pub service: String,
    /// The innermost function of the application's own code.
    pub function: String,
    /// Its source file; empty when unknown.
    pub file: String,
    /// Source line of the call; 0 when unknown.
    pub line: u32,
    /// Whether it is a connection pooler: who asked that one is not known.
    pub pooler: bool,
    /// Samples.
    pub samples: u64,
    /// Of the query's samples.
    pub share: f64,
}

#[derive(Default)]
struct Group<'a> {
    cost: QueryCost,
    nanoseconds: u64,
    callers: HashMap<(String, String, String, u32), u64>,
    known: u64,
    traces: BTreeMap<&'a str, u64>,
}

/// Every query of a profile, the most expensive first.
pub fn queries(profile: &ResolvedProfile) -> Vec<QueryCost> {
    let marks = Marks::find(profile);
    // One text may be asked of many databases.
    let mut groups: BTreeMap<[&str; 4], Group<'_>> = BTreeMap::new();
    for sample in &profile.samples {
        let (Some(id), Some(text)) = (sample.label(key::QUERY_ID), sample.label(key::QUERY)) else {
            continue;
        };
        let [database, port] =
            [key::DATABASE, key::PORT].map(|key| sample.label(key).unwrap_or_default());
        let group = groups.entry([id, text, database, port]).or_default();
        add(group, profile, &marks, sample);
    }
    complete(&mut groups);
    let all: u64 = groups.values().map(|group| group.nanoseconds).sum();
    let seconds = profile.meta.duration_ns as f64 / 1e9;
    let mut queries: Vec<_> = groups
        .into_iter()
        .map(|([id, text, database, _], group)| finish(id, text, database, group, all, seconds))
        .collect();
    queries.sort_by(|a, b| {
        b.samples
            .cmp(&a.samples)
            .then_with(|| a.query.cmp(&b.query))
    });
    queries
}

/// Database and port are learnt a moment after a server's first samples: what came before belongs to the query
/// of the same id and text, where there is one.
fn complete<'a>(groups: &mut BTreeMap<[&'a str; 4], Group<'a>>) {
    let keys: Vec<_> = groups.keys().copied().collect();
    for key in &keys {
        let fits = |other: &&[&str; 4]| {
            let mut parts = key.iter().zip(other.iter());
            *other != key && parts.all(|(part, other)| part == other || part.is_empty())
        };
        let mut fitting = keys.iter().filter(fits);
        if let (Some(other), None) = (fitting.next(), fitting.next())
            && let Some(part) = groups.remove(key)
        {
            groups.entry(*other).or_default().merge(part);
        }
    }
}

impl<'a> Group<'a> {
    fn merge(&mut self, part: Group<'a>) {
        self.nanoseconds += part.nanoseconds;
        self.known += part.known;
        self.cost.samples += part.cost.samples;
        self.cost.samples_between_statements += part.cost.samples_between_statements;
        self.cost.executions += part.cost.executions;
        for (caller, samples) in part.callers {
            *self.callers.entry(caller).or_default() += samples;
        }
        for (reason, samples) in part.cost.callers_unknown {
            *self.cost.callers_unknown.entry(reason).or_default() += samples;
        }
        for (trace, samples) in part.traces {
            *self.traces.entry(trace).or_default() += samples;
        }
    }
}

fn add<'a>(
    group: &mut Group<'a>,
    profile: &ResolvedProfile,
    marks: &Marks,
    sample: &'a ResolvedSample,
) {
    group.nanoseconds += sample.cpu_ns;
    group.cost.samples += sample.count;
    group.cost.executions += sample.executions;
    if sample.label(key::PHASE) == Some(crate::profile::Phase::Between.name()) {
        group.cost.samples_between_statements += sample.count;
    }
    if let Some(trace) = sample.label(key::TRACE) {
        *group.traces.entry(trace).or_default() += sample.count;
    }
    match sample.label(key::CALLER) {
        Some("known") => {
            group.known += sample.count;
            let service = sample.label(key::SERVICE).unwrap_or_default();
            let (function, file, line) = calling_function(profile, marks, sample);
            let caller = (service.to_owned(), function, file, line);
            *group.callers.entry(caller).or_default() += sample.count;
        }
        Some(reason) => {
            let unknown = &mut group.cost.callers_unknown;
            *unknown.entry(reason.to_owned()).or_default() += sample.count;
        }
        None => {}
    }
}

fn finish(
    id: &str,
    text: &str,
    database: &str,
    group: Group<'_>,
    all: u64,
    seconds: f64,
) -> QueryCost {
    let samples = group.cost.samples.max(1) as f64;
    let mut callers: Vec<_> = group
        .callers
        .into_iter()
        .map(|((service, function, file, line), count)| CallerCost {
            pooler: is_pooler(&service),
            service,
            function,
            file,
            line,
            samples: count,
            share: count as f64 / samples,
        })
        .collect();
    callers.sort_by(|a, b| {
        b.samples
            .cmp(&a.samples)
            .then_with(|| (&a.function, a.line).cmp(&(&b.function, b.line)))
    });
    let mut traces: Vec<_> = group.traces.into_iter().collect();
    traces.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let cpu_seconds = group.nanoseconds as f64 / 1e9;
    QueryCost {
        query_id: id.to_owned(),
        query: text.to_owned(),
        database: database.to_owned(),
        cpu_seconds,
        share: group.nanoseconds as f64 / all.max(1) as f64,
        mean_cores: if seconds > 0.0 {
            cpu_seconds / seconds
        } else {
            0.0
        },
        callers,
        caller_share: group.known as f64 / samples,
        trace_ids: traces
            .into_iter()
            .take(TRACES)
            .map(|(id, _)| id.to_owned())
            .collect(),
        ..group.cost
    }
}

/// Whether a process stands between a server and its clients, by its name.
fn is_pooler(name: &str) -> bool {
    const POOLERS: [&str; 7] = [
        "pgbouncer",
        "pgcat",
        "odyssey",
        "pgpool",
        "supavisor",
        "pgagroal",
        "pgdog",
    ];
    POOLERS.contains(&name)
}

/// What the builds of callers lack, so that their functions have no better names; a line a program.
pub fn caller_notes(profile: &ResolvedProfile) -> Vec<String> {
    let marks = Marks::find(profile);
    let mut poor: BTreeMap<&str, (u64, u64, bool)> = BTreeMap::new();
    for sample in &profile.samples {
        if sample.label(key::CALLER) != Some("known") {
            continue;
        }
        let service = sample.label(key::SERVICE).unwrap_or_default();
        let Some(frame) = calling_frame(profile, &marks, sample) else {
            continue;
        };
        let entry = poor.entry(service).or_default();
        entry.0 += sample.count;
        if frame.function.file.is_empty() {
            entry.1 += sample.count;
            entry.2 |= frame.function.is_module_only();
        }
    }
    let lacking = poor
        .into_iter()
        .filter(|(_, (all, lacking, _))| lacking * 2 > *all);
    lacking
        .map(|(service, (_, _, stripped))| match () {
            () if is_pooler(service) => format!(
                "{service} is a connection pooler: who asked it is not known"
            ),
            () if stripped => format!(
                "the callers in {service} have no symbols: install its debug symbols, or build it with them \
                 (Cargo: debug = 1, C: -g1)"
            ),
            () => format!(
                "the callers in {service} have no debug information, so inlined functions (most async ones) have no \
                 name: build it with debug = 1 in the Cargo profile, or -g1 in C"
            ),
        })
        .collect()
}

/// The innermost function of the caller's own code, its file and line: not the system's libraries, not the
/// database driver, not the runtime.
fn calling_function(
    profile: &ResolvedProfile,
    marks: &Marks,
    sample: &ResolvedSample,
) -> (String, String, u32) {
    calling_frame(profile, marks, sample).map_or_else(Default::default, |frame| {
        (
            readable(&frame.function.name, true)
                .map_or_else(|| frame.function.name.to_string(), Cow::into_owned),
            frame.function.file.to_string(),
            frame.line,
        )
    })
}

fn calling_frame<'a>(
    profile: &'a ResolvedProfile,
    marks: &Marks,
    sample: &'a ResolvedSample,
) -> Option<FrameRef<'a>> {
    let above = marks.query(&sample.stack).map_or(0, |query| query + 1);
    let frames = || {
        let locations = sample.stack[above..].iter();
        locations
            .filter_map(|id| profile.locations.get(id.0 as usize))
            .flat_map(|location| profile.frames_at(location))
    };
    frames()
        .find(is_own_source)
        .or_else(|| frames().find(|frame| !is_library(frame)))
        .or_else(|| frames().next())
}

/// Whether a frame has a source file that is neither the compiler's nor a dependency's.
fn is_own_source(frame: &FrameRef<'_>) -> bool {
    const FOREIGN: [&str; 7] = [
        "/rustc/",
        "/registry/src/",
        "/.cargo/git/",
        "/rust/deps/",
        "/rustlib/src/",
        "/usr/src/",
        "/usr/include/",
    ];
    let file = &*frame.function.file;
    !file.is_empty() && !is_library(frame) && !FOREIGN.iter().any(|part| file.contains(part))
}

/// Whether a frame is in a shared library, the kernel or the vDSO. (An interpreter's extension modules are
/// libraries too: the first that is not the system's counts by [`calling_function`]'s last resort.)
fn is_library(frame: &FrameRef<'_>) -> bool {
    const SYSTEM: [&str; 9] = [
        "libc.so",
        "libc-",
        "libpq",
        "libssl",
        "libcrypto",
        "libpthread",
        "ld-linux",
        "[vdso]",
        "libgssapi",
    ];
    let name = frame.mapping.short_name();
    frame.mapping.is_kernel || SYSTEM.iter().any(|system| name.starts_with(system))
}

/// The most expensive queries, for the terminal.
pub fn queries_table(queries: &[QueryCost], style: Style) -> String {
    let mut out = String::new();
    if queries.is_empty() {
        return out;
    }
    let heading = format!(
        "{:>6}  {:>8}  {:>6}  {:>10}  {:>7}  query and callers",
        "share", "CPU s", "cores", "executions", "callers"
    );
    table::push(&mut out, &style.heading(&heading));
    for query in queries.iter().take(ROWS) {
        let row = format!(
            "{:>6}  {:>8.2}  {:>6.2}  {:>10}  {:>7}  {}",
            table::percent(query.share),
            query.cpu_seconds,
            query.mean_cores,
            grouped(query.executions),
            table::percent(query.caller_share),
            table::fit(&query.query, 100).trim_end(),
        );
        table::push(&mut out, &row);
        for caller in query.callers.iter().take(3) {
            let place = super::top::place(&caller.file, caller.line);
            let row = format!(
                "{:>49}{} {} {} {}",
                "",
                table::percent(caller.share),
                table::printable(&match caller.pooler {
                    true => format!("{} (a pooler)", caller.service),
                    false => caller.service.clone(),
                }),
                table::printable(&caller.function),
                table::printable(&place),
            );
            table::push(&mut out, style.paint("36", row.trim_end()).as_str());
        }
        if let Some((reason, samples)) = query.callers_unknown.iter().max_by_key(|(_, n)| **n) {
            let share = *samples as f64 / query.samples.max(1) as f64;
            let row = format!(
                "{:>49}{} {}",
                "",
                table::percent(share),
                table::printable(reason)
            );
            table::push(&mut out, &style.paint("33", &row));
        }
        if let Some(trace) = query.trace_ids.first() {
            table::push(
                &mut out,
                &format!("{:>49}trace {}", "", table::printable(trace)),
            );
        }
    }
    let more = queries.len().saturating_sub(ROWS);
    if more > 0 {
        table::push(&mut out, &format!("{:>6}  and {more} more", ""));
    }
    out.push('\n');
    out
}
