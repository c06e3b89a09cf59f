//! Scene 9.5: which function? A recording of a day like any other, one of the storm, what the second one shows, the
//! fix, and a third one of the same storm.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::evidence::{self, Caller, Query, Stacks, Step, share};
use super::fire::{self, ms};
use super::narrator::{Narrator, Tone, toned};
use super::shop::Shop;
use super::{Options, Recording, SceneError};
use crate::index::Action;
use crate::services::product;
use crate::storm::StormReport;

/// What the search's function is called: what the audience is promised.
pub const FUNCTION: &str = "search_products_unindexed";

/// The function's part of its service, at least.
const LEAST_SHARE: f64 = 0.9;

/// The fix makes the shop so many times faster, at least.
const FASTER: f64 = 2.0;

/// How many queries to list, and how many callers of each.
const QUERIES: usize = 5;
const CALLERS: usize = 2;

/// `src/services/product.rs`.
const PATH_COMPONENTS: usize = 3;

/// The function of PostgreSQL in which a backend's life goes on from statement to statement.
const BACKEND: &str = "PostgresMain";

/// How much of a query's text fits on a line.
const TEXT_CHARS: usize = 90;

/// A file of one recording, as `flamegraphs/README.md` tells of it.
#[derive(Debug, Clone, Serialize)]
pub struct Recorded {
    /// `baseline`, `storm` or `fixed`.
    pub name: &'static str,
    /// For how long.
    pub seconds: f64,
    /// Samples in the profile.
    pub samples: u64,
    /// The part of the user stacks whose end the agent has proven.
    pub rooted_share: Option<f64>,
    /// Samples that were taken and lost on the way, for whatever cause.
    pub lost: u64,
}

/// What scene 9.5 found. Every figure was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Investigation {
    /// The function of the product-service that had the database work most.
    pub function: String,
    /// Its source file; empty when unknown.
    pub file: String,
    /// The line of the call; 0 when unknown.
    pub line: u32,
    /// The query that it asked, without literals.
    pub query: String,
    /// Its part of the product-service's CPU time, the service's queries in PostgreSQL included.
    pub share_of_service: f64,
    /// Its part of all CPU time of the machine, the same included.
    pub share_of_machine: f64,
    /// From the function to where the time goes, through the query into PostgreSQL; shares are of the function's samples.
    pub way: Vec<Step>,
    /// PostgreSQL's work during the storm by query, the most expensive first.
    pub queries_by_cpu: Vec<Query>,
    /// The samples of PostgreSQL's backends whose caller is known, of those whose query is.
    pub caller_share: Option<f64>,
    /// The storm before the fix.
    pub p95_before_fix_ms: Option<f64>,
    /// The same storm after it.
    pub p95_after_fix_ms: Option<f64>,
    /// How long the fix took.
    pub index_seconds: f64,
    /// The storm after the fix.
    pub fixed_storm: StormReport,
    /// CPU time of all processes before and after, in seconds a second.
    pub cpu_before_fix: Option<f64>,
    /// See [`Self::cpu_before_fix`].
    pub cpu_after_fix: Option<f64>,
    /// The recordings.
    pub recordings: Vec<Recorded>,
    /// The files that were written, the pictures first.
    pub files: Vec<PathBuf>,
}

/// The scene; with it the storm before the fix.
pub async fn tell(
    narrator: &Narrator,
    shop: &Shop,
    options: &Options,
) -> Result<(Investigation, StormReport), SceneError> {
    narrator.heading("Scene 9.5: which function?");
    let recording = |name| Recording::new(&options.agent, &options.output_dir, name);
    let (baseline, storm, fixed) = (
        recording("baseline"),
        recording("storm"),
        recording("fixed"),
    );
    let mut files = Vec::new();
    let mut recordings = Vec::new();

    narrator
        .pause("record the whole machine on a day like any other")
        .await?;
    let running = baseline.start().await?;
    fire::baseline(narrator, shop).await?;
    let (summary, written) = baseline.finish(running).await?;
    recordings.push(recorded(narrator, "baseline", &summary));
    files.extend(written);

    narrator.pause("record the storm").await?;
    let running = storm.start().await?;
    let start = Instant::now();
    let before_fix = fire::storm(narrator, shop, options.rounds).await?;
    let took = start.elapsed();
    let (summary, written) = storm.finish(running).await?;
    recordings.push(recorded(narrator, "storm", &summary));
    files.extend(written);
    for view in ["app", "database"] {
        files.push(storm.draw(view).await?);
    }
    let queries = storm.queries().await?;
    let stacks = storm.stacks(&format!("service={}", product::NAME)).await?;
    let verdict = Verdict::of(&queries, &stacks, &summary)?;
    verdict.tell(narrator, &queries);
    narrator.line(&format!(
        "look at {}, or at {}/#/flamegraphs",
        storm.file(".svg").display(),
        shop.url()
    ));
    narrator.line("in Coralogix: the trace of one of these queries; `flamestorm queries` on storm.pb.gz prints its id");

    narrator.pause("the fix: an index").await?;
    let index_took = shop.index(Action::Create).await?;
    let index_seconds = index_took.as_secs_f64();
    narrator.say(&format!(
        "an index of trigrams on the descriptions: made in {index_seconds:.1} s"
    ));

    narrator.pause("the same storm again, recorded").await?;
    let running = fixed.start().await?;
    let start = Instant::now();
    let after_fix = fire::storm(narrator, shop, options.rounds).await?;
    // The same work in the same time: what is left of it shows the shop with nothing to do.
    let rest = took.saturating_sub(start.elapsed());
    if rest > Duration::from_secs(1) {
        narrator.line(&format!(
            "{:.0} s are left of what it took before: the shop rests",
            rest.as_secs_f64()
        ));
    }
    tokio::time::sleep(rest).await;
    let (summary, written) = fixed.finish(running).await?;
    recordings.push(recorded(narrator, "fixed", &summary));
    files.extend(written);
    narrator.say("the index is dropped again: the story can be told once more");
    shop.index(Action::Drop).await?;

    let picture = options.output_dir.join("storm-vs-fixed.svg");
    let difference = storm.compare(&fixed, &picture).await?;
    files.push(picture);
    let total = |side: &str| difference["total"][side].as_f64();
    let Verdict { query, caller, .. } = &verdict;
    let investigation = Investigation {
        function: caller.function.clone(),
        file: caller.file.clone(),
        line: caller.line,
        query: query.query.clone(),
        share_of_service: verdict.share_of_service,
        share_of_machine: verdict.share_of_machine,
        way: verdict.way,
        caller_share: verdict.caller_share,
        queries_by_cpu: queries.clone(),
        p95_before_fix_ms: before_fix.p95_ms,
        p95_after_fix_ms: after_fix.p95_ms,
        index_seconds,
        fixed_storm: after_fix,
        cpu_before_fix: total("before"),
        cpu_after_fix: total("after"),
        recordings,
        files,
    };
    investigation.tell_difference(narrator);
    Ok((investigation, before_fix))
}

/// What a summary says of a recording.
fn recorded(narrator: &Narrator, name: &'static str, summary: &Value) -> Recorded {
    let lost = summary["lost"].as_object().into_iter().flatten();
    let recorded = Recorded {
        name,
        seconds: summary["duration_seconds"].as_f64().unwrap_or_default(),
        samples: summary["samples"].as_u64().unwrap_or_default(),
        rooted_share: summary["rooted_share"].as_f64(),
        lost: lost.filter_map(|(_, count)| count.as_u64()).sum(),
    };
    let rooted = recorded.rooted_share.map_or_else(
        || "not told".to_owned(),
        |share| format!("{:.2} %", share * 100.0),
    );
    narrator.say(&format!(
        "recorded: {} samples of the whole machine in {:.1} s, {} lost; {rooted} of the stacks are whole",
        recorded.samples, recorded.seconds, recorded.lost
    ));
    recorded
}

/// What the storm's recording shows.
struct Verdict<'a> {
    query: &'a Query,
    caller: &'a Caller,
    share_of_service: f64,
    share_of_machine: f64,
    way: Vec<Step>,
    caller_share: Option<f64>,
}

impl<'a> Verdict<'a> {
    fn of(queries: &'a [Query], stacks: &Stacks, summary: &Value) -> Result<Self, SceneError> {
        let found = evidence::costliest(queries, product::NAME);
        let (query, caller) = found.ok_or_else(|| {
            let told = &summary["attribution"];
            SceneError::NoFunction(match told.is_null() {
                true => "the agent recognised no PostgreSQL; `flamestorm doctor` may tell why"
                    .to_owned(),
                false => format!("it says {told}"),
            })
        })?;
        let of_function = stacks.with(&caller.function);
        let attribution = &summary["attribution"];
        let known = attribution["with_caller"]
            .as_u64()
            .zip(attribution["with_query"].as_u64());
        Ok(Self {
            query,
            caller,
            share_of_service: share(of_function, stacks.total()),
            share_of_machine: share(of_function, summary["samples"].as_u64().unwrap_or_default()),
            way: stacks.way(&caller.function),
            caller_share: known.map(|(caller, query)| share(caller, query)),
        })
    }

    fn tell(&self, narrator: &Narrator, queries: &[Query]) {
        narrator.say("PostgreSQL's CPU time by query, and who asked:");
        for query in queries.iter().take(QUERIES) {
            narrator.line(&format!(
                "{:5.1} %  {}",
                query.share * 100.0,
                one_line(&query.query)
            ));
            for caller in query.callers.iter().take(CALLERS) {
                narrator.line(&format!(
                    "            {:5.1} %  {} in {} ({})",
                    caller.share * 100.0,
                    caller.function,
                    caller.service,
                    place(&caller.file, caller.line)
                ));
            }
        }
        narrator.say("the verdict:");
        narrator.line(&toned(Tone::Strong, &self.caller.function));
        narrator.line(&place(&self.caller.file, self.caller.line));
        narrator.line(&format!(
            "{} of the product-service's CPU time, its queries in PostgreSQL included; {:.1} % of the whole machine's",
            toned(Tone::Bad, format_args!("{:.1} %", self.share_of_service * 100.0)),
            self.share_of_machine * 100.0
        ));
        narrator.line("from there to where the time goes:");
        for step in self.told_way() {
            narrator.line(&format!(
                "  {:5.1} %  {}",
                step.share * 100.0,
                one_line(&step.function)
            ));
        }
    }
}

impl Verdict<'_> {
    /// The way without what is the same for every query: from the function to the socket, and PostgreSQL's start.
    fn told_way(&self) -> impl Iterator<Item = &Step> {
        let backend = self
            .way
            .iter()
            .position(|step| step.function == BACKEND)
            .unwrap_or(0);
        let is_told = move |(number, step): &(usize, &Step)| {
            *number > backend
                || step.function == self.caller.function
                || step.function == self.query.query
        };
        self.way
            .iter()
            .enumerate()
            .filter(is_told)
            .map(|(_, step)| step)
    }
}

impl Investigation {
    /// What the scene did not show.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if !self.function.ends_with(FUNCTION) {
            problems.push(format!(
                "the costliest function is {}, not {FUNCTION}",
                self.function
            ));
        }
        if self.file.is_empty() || self.line == 0 {
            problems.push(format!(
                "{} has no file and line: is `debug = 1` in the build profile?",
                self.function
            ));
        }
        if self.share_of_service < LEAST_SHARE {
            problems.push(format!(
                "it has only {:.1} % of its service",
                self.share_of_service * 100.0
            ));
        }
        let (before, after) = (self.p95_before_fix_ms, self.p95_after_fix_ms);
        if before
            .zip(after)
            .is_none_or(|(before, after)| after * FASTER > before)
        {
            problems.push(format!(
                "the fix did not help: P95 {} before and {} after",
                ms(before),
                ms(after)
            ));
        }
        problems
    }

    fn tell_difference(&self, narrator: &Narrator) {
        narrator.say(&format!(
            "P95 {} before the fix, {} after it",
            toned(Tone::Bad, ms(self.p95_before_fix_ms)),
            toned(Tone::Good, ms(self.p95_after_fix_ms))
        ));
        if let Some((before, after)) = self.cpu_before_fix.zip(self.cpu_after_fix) {
            narrator.line(&format!(
                "CPU seconds a second, of all processes: {before:.2} before, {after:.2} after, for the same queries"
            ));
        }
        narrator.line("in storm-vs-fixed.svg the tower that has gone is blue");
    }
}

/// A file and a line, as far as they are known. Of the path, which is that of the machine that built it, the end.
pub fn place(file: &str, line: u32) -> String {
    let components: Vec<&str> = file.split('/').collect();
    let first = components.len().saturating_sub(PATH_COMPONENTS);
    let file = components.get(first..).unwrap_or_default().join("/");
    match (file.as_str(), line) {
        ("", _) => "no file known".to_owned(),
        (file, 0) => file.to_owned(),
        (file, line) => format!("{file}:{line}"),
    }
}

/// The beginning of a text, on one line.
fn one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control());
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    let text = words.join(" ");
    if text.chars().count() <= TEXT_CHARS {
        return text;
    }
    let start: String = text.chars().take(TEXT_CHARS - 1).collect();
    format!("{start}…")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storm::Around;

    fn investigation() -> Investigation {
        let services = ["product-service", "order-service", "inventory-service"];
        Investigation {
            function: format!("workload::services::product::{FUNCTION}"),
            file: "product.rs".to_owned(),
            line: 7,
            query: "SELECT ?".to_owned(),
            share_of_service: 0.99,
            share_of_machine: 0.3,
            way: Vec::new(),
            queries_by_cpu: Vec::new(),
            caller_share: Some(1.0),
            p95_before_fix_ms: Some(2700.0),
            p95_after_fix_ms: Some(40.0),
            index_seconds: 3.0,
            fixed_storm: StormReport::of(1, services, &[], Around::default()),
            cpu_before_fix: None,
            cpu_after_fix: None,
            recordings: Vec::new(),
            files: Vec::new(),
        }
    }

    /// Only the promised function, with its place, a large share and a fix that helps, is a success.
    #[test]
    fn success() {
        assert_eq!(investigation().problems(), Vec::<String>::new());
        let broken: [fn(&mut Investigation); 5] = [
            |it| it.function = "other".to_owned(),
            |it| it.line = 0,
            |it| it.share_of_service = 0.5,
            |it| it.p95_after_fix_ms = Some(2000.0),
            |it| it.p95_after_fix_ms = None,
        ];
        for break_it in broken {
            let mut it = investigation();
            break_it(&mut it);
            assert_eq!(it.problems().len(), 1, "{:?}", it.problems());
        }
    }

    /// A query's text takes one line, whatever is in it.
    #[test]
    fn texts() {
        assert_eq!(one_line("SELECT\n  1\u{7}"), "SELECT 1");
        assert_eq!(one_line(&"ü".repeat(5000)).chars().count(), TEXT_CHARS);
        assert_eq!(place("", 7), "no file known");
        assert_eq!(place("a.rs", 7), "a.rs:7");
        assert_eq!(
            place("/home/x/shop/src/services/a.rs", 7),
            "src/services/a.rs:7"
        );
    }
}
