//! What a recording shows, read from the agent's files as any other tool would read them.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use pprof::protos::{Message, Profile};
use serde::Serialize;
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

/// Where a function was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FunctionFound {
    /// Its whole name.
    pub name: String,
    /// Its source file, where the program tells.
    pub file: Option<String>,
    /// The line in it that was seen most, where the program tells.
    pub line: Option<i64>,
    /// Samples with it anywhere on the stack.
    pub samples: u64,
}

/// The folded stacks, counted.
#[derive(Debug, Default)]
pub struct Folded {
    total: u64,
    processes: HashMap<String, u64>,
    leaves: HashMap<(String, String), u64>,
}

impl Folded {
    /// Reads a file of lines `comm;root;…;leaf count`.
    pub fn read(path: &Path) -> Result<Self, EvidenceError> {
        let failed = |reason: String| EvidenceError {
            path: path.to_owned(),
            reason,
        };
        let text = fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
        let mut folded = Self::default();
        for (number, line) in text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.is_empty())
        {
            folded
                .add(line)
                .ok_or_else(|| failed(format!("line {} is no folded stack", number + 1)))?;
        }
        Ok(folded)
    }

    fn add(&mut self, line: &str) -> Option<()> {
        let (stack, count) = line.rsplit_once(' ')?;
        let count: u64 = count.parse().ok()?;
        let mut frames = stack.split(';');
        let process = frames.next()?.to_owned();
        let leaf = frames.next_back().unwrap_or("(no stack)").to_owned();
        self.total += count;
        *self.processes.entry(process.clone()).or_default() += count;
        *self.leaves.entry((process, leaf)).or_default() += count;
        Some(())
    }

    /// All samples.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The part of the process `name`; the agent's `summary` knows how complete it is.
    pub fn process(&self, name: &str, summary: &Value) -> ProcessShare {
        let samples = self.processes.get(name).copied().unwrap_or_default();
        let told = summary.get("processes").and_then(Value::as_array);
        let told = told.and_then(|all| all.iter().find(|process| process["name"] == name));
        ProcessShare {
            name: name.to_owned(),
            samples,
            share: share(samples, self.total),
            rooted_share: told.and_then(|process| process["rooted_share"].as_f64()),
        }
    }

    /// The functions in which most samples were taken.
    pub fn top_functions(&self) -> Vec<TopFunction> {
        let mut all: Vec<_> = self.leaves.iter().collect();
        all.sort_unstable_by(|(a, m), (b, n)| n.cmp(m).then(a.cmp(b)));
        all.into_iter()
            .take(TOP)
            .map(|((process, function), samples)| TopFunction {
                process: process.clone(),
                function: function.clone(),
                samples: *samples,
            })
            .collect()
    }
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

/// Looks in the pprof file for the function whose name contains `name`: an async function's own
/// name is followed by its closure's.
pub fn find_function(path: &Path, name: &str) -> Result<Option<FunctionFound>, EvidenceError> {
    let profile = decode(path).map_err(|reason| EvidenceError {
        path: path.to_owned(),
        reason,
    })?;
    Ok(find_in(&profile, name))
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

fn find_in(profile: &Profile, name: &str) -> Option<FunctionFound> {
    let text = |index: i64| {
        let index = usize::try_from(index).ok()?;
        profile
            .string_table
            .get(index)
            .filter(|text| !text.is_empty())
    };
    let wanted: HashMap<u64, _> = profile
        .function
        .iter()
        .filter(|function| text(function.name).is_some_and(|found| found.contains(name)))
        .map(|function| (function.id, function))
        .collect();
    // The line in the function that each location stands for, where it stands for one.
    let lines: HashMap<u64, _> = profile
        .location
        .iter()
        .filter_map(|location| {
            let line = location
                .line
                .iter()
                .find(|l| wanted.contains_key(&l.function_id))?;
            Some((location.id, (line.function_id, line.line)))
        })
        .collect();
    let mut samples = 0;
    let mut seen: HashMap<(u64, i64), u64> = HashMap::new();
    for sample in &profile.sample {
        // The first value is the count of samples; leaf first, so the first hit is the innermost.
        let count = sample
            .value
            .first()
            .and_then(|c| u64::try_from(*c).ok())
            .unwrap_or(0);
        if let Some(place) = sample.location_id.iter().find_map(|id| lines.get(id)) {
            samples += count;
            *seen.entry(*place).or_default() += count;
        }
    }
    let ((function, line), _) = seen
        .into_iter()
        .max_by_key(|(place, count)| (*count, *place))?;
    let function = wanted.get(&function)?;
    Some(FunctionFound {
        name: text(function.name)?.clone(),
        file: text(function.filename).cloned(),
        line: (line > 0).then_some(line),
        samples,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pprof::protos::{Function, Line, Location, Sample};

    /// Shares and leaves come out as they went in.
    #[test]
    fn folded_stacks_are_counted() {
        let mut folded = Folded::default();
        for line in [
            "postgres;_start;main;ExecSeqScan;towlower 6",
            "postgres;heapgettup;towlower 2",
            "workload;libc.so.6+0x1000;start_thread;std::sys::poll 2",
        ] {
            folded.add(line).unwrap();
        }
        let summary = serde_json::json!({
            "processes": [{ "name": "postgres", "rooted_share": 0.75 }],
        });
        let postgres = folded.process("postgres", &summary);
        assert_eq!((postgres.samples, folded.total()), (8, 10));
        assert!((postgres.share - 0.8).abs() < 1e-9);
        assert_eq!(postgres.rooted_share, Some(0.75));
        assert_eq!(folded.process("workload", &summary).rooted_share, None);
        assert_eq!(folded.process("absent", &Value::Null).samples, 0);
        let top = &folded.top_functions()[0];
        assert_eq!((top.function.as_str(), top.samples), ("towlower", 8));
        assert!(folded.add("no count").is_none());
    }

    /// A function is found by a part of its name, with the line that was seen most.
    #[test]
    fn a_function_is_found_with_its_line() {
        let strings = [
            "",
            "shop::search_unindexed::{{closure}}",
            "product.rs",
            "main",
        ];
        let line = |function_id, line| Line { function_id, line };
        let location = |id, lines: Vec<Line>| Location {
            id,
            line: lines,
            ..Location::default()
        };
        let sample = |ids: &[u64], count| Sample {
            location_id: ids.to_vec(),
            value: vec![count],
            ..Sample::default()
        };
        let profile = Profile {
            string_table: strings.map(str::to_owned).to_vec(),
            function: vec![
                Function {
                    id: 1,
                    name: 1,
                    filename: 2,
                    ..Function::default()
                },
                Function {
                    id: 2,
                    name: 3,
                    ..Function::default()
                },
            ],
            location: vec![
                location(1, vec![line(2, 7)]),
                location(2, vec![line(1, 40), line(2, 8)]),
                location(3, vec![line(1, 41)]),
            ],
            sample: vec![sample(&[2, 1], 1), sample(&[1, 3], 5), sample(&[1], 9)],
            ..Profile::default()
        };
        let found = find_in(&profile, "search_unindexed").unwrap();
        assert_eq!(found.name, strings[1]);
        assert_eq!(found.file.as_deref(), Some("product.rs"));
        assert_eq!((found.line, found.samples), (Some(41), 6));
        assert_eq!(find_in(&profile, "another"), None);
    }
}
