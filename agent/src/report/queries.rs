//! `flamestorm queries`: PostgreSQL's CPU time by query and caller.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::callers::{Callers, Place, is_pooler};
use super::style::{Style, fit, percent, push};
use crate::encode::svg::grouped;
use crate::profile::{KNOWN, PARTIAL, Phase, ResolvedProfile, ResolvedSample, key};

/// The maximum number of traces that are listed for a query: those that cost the most.
const TRACES: usize = 3;

/// The maximum number of rows of the table on the terminal.
const ROWS: usize = 10;

/// What a query cost. Shares are between 0 and 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct QueryCost {
    /// PostgreSQL's query id, or `text:` and a hash of the text where the server computes none.
    pub query_id: String,
    /// Text, without literals unless the recording kept them.
    pub query: String,
    /// Database. The same text in two databases is two queries.
    pub database: String,
    /// CPU time of the backends and their parallel workers, seconds.
    pub cpu_seconds: f64,
    /// Share of the CPU time of all queries.
    pub share: f64,
    /// CPU time divided by the recording's length: the number of cores used on average.
    pub mean_cores: f64,
    /// Samples.
    pub samples: u64,
    /// Of these, samples taken between two statements, while the backend sent the rest of the answer or
    /// read the next message.
    pub samples_between_statements: u64,
    /// Executions of which at least one sample was taken.
    pub executions: u64,
    /// The functions that sent it, most samples first.
    pub callers: Vec<CallerCost>,
    /// Share of the samples whose caller is known.
    pub caller_share: f64,
    /// Share of the samples for which a part of the caller's stack is known.
    #[serde(default)]
    pub caller_partial_share: f64,
    /// Number of samples whose caller is not known, by reason.
    pub callers_unknown: BTreeMap<String, u64>,
    /// The traces that cost the most.
    pub trace_ids: Vec<String>,
}

/// A function that sent a query.
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
    /// Whether the end of its stack is not proven. The outer functions are then missing or uncertain.
    #[serde(default)]
    pub partial: bool,
    /// Whether the process is a connection pooler, whose own clients are not known.
    pub pooler: bool,
    /// Samples.
    pub samples: u64,
    /// Share of the query's samples.
    pub share: f64,
}

#[derive(Default)]
struct Group<'a> {
    cost: QueryCost,
    nanoseconds: u64,
    /// Samples by service, place, and whether the stack is partial.
    callers: HashMap<(&'a str, Place, bool), u64>,
    known: u64,
    partial: u64,
    traces: BTreeMap<&'a str, u64>,
}

/// Every query of a profile, the most expensive first.
pub fn queries(profile: &ResolvedProfile) -> Vec<QueryCost> {
    let mut callers = Callers::of(profile);
    // The same text may be used in many databases.
    let mut groups: BTreeMap<[&str; 4], Group<'_>> = BTreeMap::new();
    for sample in &profile.samples {
        let (Some(id), Some(text)) = (sample.label(key::QUERY_ID), sample.label(key::QUERY)) else {
            continue;
        };
        let [database, port] =
            [key::DATABASE, key::PORT].map(|key| sample.label(key).unwrap_or_default());
        let group = groups.entry([id, text, database, port]).or_default();
        group.add(&mut callers, sample);
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

/// Merges incomplete groups. The database and port become known a moment after a server's first samples, so
/// earlier samples lack them. They belong to the query of the same id and text, if there is exactly one.
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
    fn add(&mut self, callers: &mut Callers<'a>, sample: &'a ResolvedSample) {
        self.nanoseconds += sample.cpu_ns;
        self.cost.samples += sample.count;
        self.cost.executions += sample.executions;
        if sample.label(key::PHASE) == Some(Phase::Between.name()) {
            self.cost.samples_between_statements += sample.count;
        }
        if let Some(trace) = sample.label(key::TRACE) {
            *self.traces.entry(trace).or_default() += sample.count;
        }
        match sample.label(key::CALLER) {
            Some(label @ (KNOWN | PARTIAL)) => {
                let is_partial = label == PARTIAL;
                *match is_partial {
                    true => &mut self.partial,
                    false => &mut self.known,
                } += sample.count;
                let service = sample.label(key::SERVICE).unwrap_or_default();
                let caller = (service, callers.place(sample), is_partial);
                *self.callers.entry(caller).or_default() += sample.count;
            }
            Some(reason) => {
                let unknown = &mut self.cost.callers_unknown;
                *unknown.entry(reason.to_owned()).or_default() += sample.count;
            }
            None => {}
        }
    }

    fn merge(&mut self, part: Group<'a>) {
        self.nanoseconds += part.nanoseconds;
        self.known += part.known;
        self.partial += part.partial;
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
        .map(|((service, place, partial), count)| CallerCost {
            partial,
            pooler: is_pooler(service),
            service: service.to_owned(),
            function: place.function,
            file: place.file,
            line: place.line,
            samples: count,
            share: count as f64 / samples,
        })
        .collect();
    callers.sort_by(|a, b| {
        b.samples
            .cmp(&a.samples)
            .then_with(|| (&a.function, a.line).cmp(&(&b.function, b.line)))
            .then_with(|| a.partial.cmp(&b.partial))
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
        caller_partial_share: group.partial as f64 / samples,
        trace_ids: traces
            .into_iter()
            .take(TRACES)
            .map(|(id, _)| id.to_owned())
            .collect(),
        ..group.cost
    }
}

/// A table of the most expensive queries, for the terminal.
pub fn queries_table(queries: &[QueryCost], style: Style) -> String {
    let mut out = String::new();
    if queries.is_empty() {
        return out;
    }
    let heading = format!(
        "{:>6}  {:>8}  {:>6}  {:>10}  {:>7}  query and callers",
        "share", "CPU s", "cores", "executions", "callers"
    );
    push(&mut out, &style.heading(&heading));
    for query in queries.iter().take(ROWS) {
        let row = format!(
            "{:>6}  {:>8.2}  {:>6.2}  {:>10}  {:>7}  {}",
            percent(query.share),
            query.cpu_seconds,
            query.mean_cores,
            grouped(query.executions),
            percent(query.caller_share),
            fit(&query.query, 100).trim_end(),
        );
        push(&mut out, &row);
        for caller in query.callers.iter().take(3) {
            let place = super::top::place(&caller.file, caller.line);
            let row = format!(
                "{:>49}{} {} {} {}{}",
                "",
                percent(caller.share),
                super::printable(&match caller.pooler {
                    true => format!("{} (a pooler)", caller.service),
                    false => caller.service.clone(),
                }),
                super::printable(&caller.function),
                super::printable(&place),
                match caller.partial {
                    true => " (stack incomplete)",
                    false => "",
                },
            );
            let color = if caller.partial { "33" } else { "36" };
            push(&mut out, style.paint(color, row.trim_end()).as_str());
        }
        if let Some((reason, samples)) = query.callers_unknown.iter().max_by_key(|(_, n)| **n) {
            let share = *samples as f64 / query.samples.max(1) as f64;
            let row = format!("{:>49}{} {}", "", percent(share), super::printable(reason));
            push(&mut out, &style.paint("33", &row));
        }
        if let Some(trace) = query.trace_ids.first() {
            push(
                &mut out,
                &format!("{:>49}trace {}", "", super::printable(trace)),
            );
        }
    }
    let more = queries.len().saturating_sub(ROWS);
    if more > 0 {
        push(&mut out, &format!("{:>6}  and {more} more", ""));
    }
    out.push('\n');
    out
}
