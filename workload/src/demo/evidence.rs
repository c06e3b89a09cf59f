//! What a recording shows, read from what the agent wrote and answered as any other tool would read it.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use pprof::protos::{Message, Profile};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How many functions to list.
const TOP: usize = 10;

/// A profile of a demo has some megabytes; this keeps a broken file from eating the memory.
const MAX_PROFILE: u64 = 1 << 30;

/// A file of the recording that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the recording {path}: {reason}")]
pub struct EvidenceError {
    /// The file.
    path: PathBuf,
    /// What is wrong with it.
    reason: String,
}

/// One process name's part of the recording.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProcessShare {
    /// The name (`comm`).
    pub name: String,
    /// Its samples.
    pub samples: u64,
    /// Its part of all samples.
    pub share: f64,
    /// The part of its stacks whose end the agent has proven; `None` where it does not tell.
    pub rooted_share: Option<f64>,
}

impl ProcessShare {
    /// What the agent's `summary` tells of the process `name`.
    pub fn of(name: &str, summary: &Value) -> Self {
        let told = summary["processes"].as_array();
        let told = told.and_then(|all| all.iter().find(|process| process["name"] == name));
        let member = |member: &str| told.map_or(&Value::Null, |process| &process[member]);
        Self {
            name: name.to_owned(),
            samples: member("samples").as_u64().unwrap_or_default(),
            share: member("share").as_f64().unwrap_or_default(),
            rooted_share: member("rooted_share").as_f64(),
        }
    }
}

/// How well the samples of PostgreSQL's backends could be attributed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Attribution {
    /// Samples of processes that run statements for clients, parallel workers included.
    pub backend_samples: u64,
    /// The part of them whose query is known.
    pub query_share: f64,
    /// Of those, the samples of statements that ran already when the recording began: nobody
    /// watched who asked for them.
    pub before_recording: u64,
    /// Of the others, the part whose caller is known.
    pub caller_share: f64,
}

impl Attribution {
    /// What the agent's `summary` tells; `None` where it saw no server.
    pub fn of(summary: &Value) -> Option<Self> {
        let told = &summary["attribution"];
        let count = |value: &Value| value.as_u64().unwrap_or_default();
        let backend_samples = told["backend_samples"].as_u64()?;
        let with_query = count(&told["with_query"]);
        let before_recording = count(&told["without_caller"]["before_recording"]);
        Some(Self {
            backend_samples,
            query_share: share(with_query, backend_samples),
            before_recording,
            caller_share: share(
                count(&told["with_caller"]),
                with_query.saturating_sub(before_recording),
            ),
        })
    }
}

/// What a query cost, as `flamestorm queries --json` tells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Query {
    /// Its text, without literals.
    pub query: String,
    /// CPU time of the backends and their parallel workers, seconds.
    pub cpu_seconds: f64,
    /// Its part of the CPU time of all queries.
    pub share: f64,
    /// Samples.
    pub samples: u64,
    /// Executions that were seen.
    pub executions: u64,
    /// Who asked for it, most samples first.
    pub callers: Vec<Caller>,
    /// Samples whose caller is not known, by reason.
    pub callers_unknown: BTreeMap<String, u64>,
}

/// A function that asked for a query.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Caller {
    /// The service it is a part of.
    pub service: String,
    /// Its name.
    pub function: String,
    /// Its source file; empty when unknown.
    pub file: String,
    /// The line of the call; 0 when unknown.
    pub line: u32,
    /// Samples.
    pub samples: u64,
    /// Of the query's samples.
    pub share: f64,
}

/// The caller with `name` in its function's name that most samples lead to.
pub fn find_caller<'a>(queries: &'a [Query], name: &str) -> Option<&'a Caller> {
    let callers = queries.iter().flat_map(|query| &query.callers);
    callers
        .filter(|caller| caller.function.contains(name))
        .max_by_key(|caller| caller.samples)
}

/// A function and the samples taken in itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TopFunction {
    /// The process' name.
    pub process: String,
    /// The function's.
    pub function: String,
    /// Samples that ended there.
    pub samples: u64,
}

/// The functions in which most samples were taken, by the pprof file. (In the folded stacks the process of a
/// backend's sample is the caller's.)
pub fn top_functions(path: &Path) -> Result<Vec<TopFunction>, EvidenceError> {
    let profile = decode(path).map_err(|reason| EvidenceError {
        path: path.to_owned(),
        reason,
    })?;
    Ok(top_of(&profile))
}

fn decode(path: &Path) -> Result<Profile, String> {
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    GzDecoder::new(file)
        .take(MAX_PROFILE)
        .read_to_end(&mut bytes)
        .map_err(|error| error.to_string())?;
    Profile::decode(bytes.as_slice()).map_err(|error| error.to_string())
}

fn top_of(profile: &Profile) -> Vec<TopFunction> {
    let text = |index: i64| {
        let index = usize::try_from(index).ok()?;
        profile.string_table.get(index).map(String::as_str)
    };
    let names: HashMap<u64, _> = profile
        .function
        .iter()
        .filter_map(|function| Some((function.id, text(function.name)?)))
        .collect();
    // Of what was inlined into each other the innermost, which comes first.
    let innermost: HashMap<u64, _> = profile
        .location
        .iter()
        .filter_map(|location| {
            let name = names.get(&location.line.first()?.function_id)?;
            Some((location.id, *name))
        })
        .collect();
    let mut leaves: HashMap<(&str, &str), u64> = HashMap::new();
    for sample in &profile.sample {
        let mut labels = sample.label.iter();
        let process = labels.find(|label| text(label.key) == Some("comm"));
        let process = process.and_then(|label| text(label.str));
        let leaf = sample.location_id.first().and_then(|id| innermost.get(id));
        let place = (
            process.unwrap_or("(no process)"),
            leaf.copied().unwrap_or("(no stack)"),
        );
        // The first value is the count of samples.
        let count = sample.value.first().copied().unwrap_or_default();
        *leaves.entry(place).or_default() += u64::try_from(count).unwrap_or_default();
    }
    let mut all: Vec<_> = leaves.into_iter().collect();
    all.sort_unstable_by(|(a, m), (b, n)| n.cmp(m).then(a.cmp(b)));
    all.into_iter()
        .take(TOP)
        .map(|((process, function), samples)| TopFunction {
            process: process.to_owned(),
            function: function.to_owned(),
            samples,
        })
        .collect()
}

fn share(part: u64, whole: u64) -> f64 {
    // Both are counts of samples, far below 2^53.
    #[expect(
        clippy::cast_precision_loss,
        reason = "counts of samples are far below 2^53"
    )]
    let share = part as f64 / whole.max(1) as f64;
    share
}

#[cfg(test)]
mod tests {
    use super::*;
    use pprof::protos::{Function, Label, Line, Location, Sample};
    use serde_json::json;

    /// A process is found by its name; one that is absent has nothing.
    #[test]
    fn processes() {
        let summary = json!({
            "processes": [
                { "name": "bash", "samples": 2, "share": 0.2, "rooted_share": null },
                { "name": "postgres", "samples": 8, "share": 0.8, "rooted_share": 0.75 },
            ],
        });
        let postgres = ProcessShare::of("postgres", &summary);
        assert_eq!((postgres.samples, postgres.share), (8, 0.8));
        assert_eq!(postgres.rooted_share, Some(0.75));
        assert_eq!(ProcessShare::of("bash", &summary).rooted_share, None);
        assert_eq!(ProcessShare::of("absent", &summary).samples, 0);
        assert_eq!(ProcessShare::of("postgres", &Value::Null).samples, 0);
    }

    /// Statements that ran before anybody watched are no fault of the attribution.
    #[test]
    fn attribution() {
        let mut summary = json!({
            "attribution": {
                "backend_samples": 200, "with_query": 190, "with_caller": 171,
                "without_caller": { "before_recording": 10, "not_captured": 9 },
            },
        });
        let told = Attribution::of(&summary).unwrap();
        assert_eq!((told.backend_samples, told.before_recording), (200, 10));
        assert!((told.query_share - 0.95).abs() < 1e-9);
        assert!((told.caller_share - 0.95).abs() < 1e-9);
        summary["attribution"] = Value::Null;
        assert_eq!(Attribution::of(&summary), None);
    }

    /// What the agent prints is understood, and a caller found by a part of its name, where it cost most.
    #[test]
    fn callers() {
        let query = |text: &str, function: &str, samples: u64| {
            json!({
                "query_id": "7", "query": text, "database": "shop", "cpu_seconds": 1.5, "share": 0.5,
                "mean_cores": 0.3, "samples": samples, "samples_between_statements": 0,
                "executions": 3, "caller_share": 1.0, "callers_unknown": { "not_captured": 1 },
                "trace_ids": [],
                "callers": [{
                    "service": "workload", "function": function, "file": "a.rs", "line": 7,
                    "samples": samples, "share": 1.0,
                }],
            })
        };
        let queries: Vec<Query> = serde_json::from_value(json!([
            query("SELECT 1", "shop::search", 5),
            query("SELECT 2", "shop::search", 9),
            query("SELECT 3", "shop::other", 20),
        ]))
        .unwrap();
        let found = find_caller(&queries, "search").unwrap();
        assert_eq!((found.line, found.samples), (7, 9));
        assert_eq!(queries[0].callers_unknown["not_captured"], 1);
        assert_eq!(find_caller(&queries, "absent"), None);
    }

    /// Leaves are counted by the process that was running and the innermost function.
    #[test]
    fn leaves_are_counted() {
        let strings = ["", "comm", "postgres", "towlower", "main", "inlined"];
        let function = |id: u64, name| Function {
            id,
            name,
            ..Function::default()
        };
        let location = |id, functions: &[u64]| Location {
            id,
            line: functions
                .iter()
                .map(|id| Line {
                    function_id: *id,
                    line: 1,
                })
                .collect(),
            ..Location::default()
        };
        let sample = |ids: &[u64], count| Sample {
            location_id: ids.to_vec(),
            value: vec![count],
            label: vec![Label {
                key: 1,
                str: 2,
                ..Label::default()
            }],
        };
        let profile = Profile {
            string_table: strings.map(str::to_owned).to_vec(),
            function: vec![function(1, 3), function(2, 4), function(3, 5)],
            location: vec![location(1, &[1]), location(2, &[3, 2])],
            sample: vec![
                sample(&[1, 2], 6),
                sample(&[1], 2),
                sample(&[2], 5),
                sample(&[], 1),
            ],
            ..Profile::default()
        };
        let found: Vec<_> = top_of(&profile)
            .into_iter()
            .map(|top| (top.process, top.function, top.samples))
            .collect();
        let expected = [("towlower", 8), ("inlined", 5), ("(no stack)", 1)];
        assert_eq!(
            found,
            expected.map(|(name, n)| ("postgres".to_owned(), name.to_owned(), n))
        );
    }
}
