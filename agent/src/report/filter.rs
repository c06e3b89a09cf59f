//! Selects a part of a profile: `--filter KEY=VALUE`.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::Arc;

use crate::profile::{
    FunctionId, Line, Location, LocationId, MappingId, ResolvedProfile, ResolvedSample, key,
};

/// The keys that are not labels.
const FUNCTION: &str = "function";
const MODULE: &str = "module";

/// The short form of the key `trace_id`.
const TRACE: &str = "trace";

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// A label's key, `function`, `module` or `trace`.
    pub key: String,
    /// The required value.
    pub value: String,
}

/// Why a filter cannot be applied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// Not of the form `KEY=VALUE`.
    #[error("filter {0:?} is not KEY=VALUE, for example comm=postgres")]
    NotAPair(String),
    /// No sample has such a key.
    #[error("no sample has the key {key:?}; the keys of this profile are {known}")]
    UnknownKey {
        /// The key.
        key: String,
        /// The keys that exist.
        known: String,
    },
    /// No sample fulfils the conditions on one key.
    #[error("no sample has {condition}; the values of {key} are {known}")]
    NoSuchValue {
        /// The filters with this key.
        condition: String,
        /// The key.
        key: String,
        /// The values of the key with the most samples.
        known: String,
    },
    /// Each condition is fulfilled by some sample, but no sample fulfils all.
    #[error("no sample fulfils all of {0}, though each by itself is fulfilled by some")]
    Nothing(String),
}

/// The maximum number of values that an error message lists.
const TOLD_VALUES: usize = 8;

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Filter, FilterError> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() && !value.is_empty() => Ok(Filter {
                key: key.to_owned(),
                value: value.to_owned(),
            }),
            _ => Err(FilterError::NotAPair(text.to_owned())),
        }
    }
}

/// The samples that fulfil the filters: for each key at least one of its filters, and that for all keys.
///
/// The value of a label must be equal; `function` must be part of the name of a function in the stack;
/// `module` must be the path or base name of a module in the stack; `query` must be the query's id or a
/// part of its text; `trace` is short for `trace_id`. The runtime figures remain those of the whole
/// recording, and a note says so.
///
/// # Errors
/// A key that is neither `function` nor `module` nor a label of any sample; filters that no sample fulfils.
pub fn filter(
    profile: &ResolvedProfile,
    filters: &[Filter],
) -> Result<ResolvedProfile, FilterError> {
    if filters.is_empty() {
        return Ok(profile.clone());
    }
    let mut by_key: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for filter in filters {
        let key = match filter.key.as_str() {
            TRACE => key::TRACE,
            key => key,
        };
        by_key.entry(key).or_default().push(&filter.value);
    }
    refuse_unknown(profile, by_key.keys().copied())?;
    let functions = matching_functions(profile, by_key.get(FUNCTION));
    let fulfils = |sample: &ResolvedSample, key: &str, values: &[&str]| match key {
        FUNCTION => profile.frames(sample).any(|f| functions.contains(&f.id)),
        MODULE => profile.frames(sample).any(|frame| {
            let mapping = frame.mapping;
            values.contains(&&*mapping.name) || values.contains(&mapping.short_name())
        }),
        key::QUERY => {
            let id = sample.label(key::QUERY_ID).unwrap_or_default();
            let text = sample.label(key::QUERY).unwrap_or_default();
            let mut values = values.iter();
            values.any(|value| *value == id || text.contains(value))
        }
        key => sample
            .label(key)
            .is_some_and(|value| values.contains(&value)),
    };
    let samples = profile.samples.iter().filter(|sample| {
        let mut conditions = by_key.iter();
        conditions.all(|(key, values)| fulfils(sample, key, values))
    });
    let samples: Vec<ResolvedSample> = samples.cloned().collect();
    let conditions: Vec<_> = filters
        .iter()
        .map(|filter| format!("{}={}", filter.key, filter.value))
        .collect();
    let conditions = conditions.join(" ");
    if samples.is_empty() {
        let unknown = by_key.iter().find(|(key, values)| {
            let mut samples = profile.samples.iter();
            !samples.any(|sample| fulfils(sample, key, values))
        });
        return Err(match unknown {
            Some((key, values)) => no_such_value(profile, key, values),
            None => FilterError::Nothing(conditions),
        });
    }
    let mut part = compact(profile, samples);
    part.runtime.note(format!(
        "filtered by {conditions}: {} of {} samples; losses and costs are those of the whole recording",
        part.total_count(),
        profile.total_count(),
    ));
    Ok(part)
}

/// The error for a value that no sample has. It lists the values of the key that have the most samples.
fn no_such_value(profile: &ResolvedProfile, key: &str, values: &[&str]) -> FilterError {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for sample in &profile.samples {
        let mut seen: BTreeSet<&str> = BTreeSet::new();
        match key {
            FUNCTION => seen.extend(profile.frames(sample).map(|f| &*f.function.name)),
            MODULE => seen.extend(profile.frames(sample).map(|f| f.mapping.short_name())),
            key => seen.extend(sample.label(key)),
        }
        for value in seen {
            *counts.entry(value).or_insert(0) += sample.count;
        }
    }
    let mut known: Vec<_> = counts.into_iter().collect();
    known.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let more = known.len().saturating_sub(TOLD_VALUES);
    let mut told: Vec<String> = known
        .iter()
        .take(TOLD_VALUES)
        // A process chooses its own name, and a terminal interprets escape sequences.
        .map(|(value, _)| value.escape_debug().to_string())
        .collect();
    if told.is_empty() {
        told.push("none".to_owned());
    }
    if more > 0 {
        told.push(format!("and {more} more"));
    }
    let condition: Vec<_> = values.iter().map(|v| format!("{key}={v}")).collect();
    FilterError::NoSuchValue {
        condition: condition.join(" or "),
        key: key.to_owned(),
        known: told.join(", "),
    }
}

fn refuse_unknown<'a>(
    profile: &ResolvedProfile,
    mut keys: impl Iterator<Item = &'a str>,
) -> Result<(), FilterError> {
    let mut known = BTreeSet::from([
        FUNCTION,
        MODULE,
        key::PID,
        key::COMM,
        key::TID,
        key::THREAD,
        key::OUTCOME,
    ]);
    for sample in &profile.samples {
        known.extend(sample.labels.iter().map(|(key, _)| &**key));
    }
    match keys.find(|key| !known.contains(key)) {
        None => Ok(()),
        Some(key) => Err(FilterError::UnknownKey {
            key: key.to_owned(),
            known: known.into_iter().collect::<Vec<_>>().join(", "),
        }),
    }
}

fn matching_functions(
    profile: &ResolvedProfile,
    values: Option<&Vec<&str>>,
) -> BTreeSet<FunctionId> {
    let values = values.map_or(&[][..], Vec::as_slice);
    let matching = profile.functions.iter().zip(0..).filter(|(function, _)| {
        let mut values = values.iter();
        values.any(|value| function.name.contains(value))
    });
    matching.map(|(_, index)| FunctionId(index)).collect()
}

/// A profile of these samples alone. Whatever no sample refers to any more is left out, so that a filtered
/// file reveals nothing about the processes that were filtered out.
fn compact(profile: &ResolvedProfile, samples: Vec<ResolvedSample>) -> ResolvedProfile {
    let mut part = ResolvedProfile {
        meta: profile.meta.clone(),
        runtime: profile.runtime.clone(),
        ..ResolvedProfile::default()
    };
    let mut locations = vec![None; profile.locations.len()];
    let mut functions = vec![None; profile.functions.len()];
    let mut mappings = vec![None; profile.mappings.len()];
    for mut sample in samples {
        let mut stack = Vec::with_capacity(sample.stack.len());
        for id in sample.stack.iter() {
            let Some(location) = profile.locations.get(id.0 as usize) else {
                continue;
            };
            let new = *locations[id.0 as usize].get_or_insert_with(|| {
                let location = Location {
                    mapping: move_mapping(profile, &mut part, &mut mappings, location.mapping),
                    address: location.address,
                    lines: move_lines(profile, &mut part, &mut functions, &location.lines),
                };
                part.locations.push(location);
                LocationId(part.locations.len() as u32 - 1)
            });
            stack.push(new);
        }
        sample.stack = Arc::from(stack);
        part.samples.push(sample);
    }
    part
}

fn move_mapping(
    profile: &ResolvedProfile,
    part: &mut ResolvedProfile,
    moved: &mut [Option<MappingId>],
    id: MappingId,
) -> MappingId {
    let index = id.0 as usize;
    *moved[index].get_or_insert_with(|| {
        part.mappings.push(profile.mappings[index].clone());
        MappingId(part.mappings.len() as u32 - 1)
    })
}

fn move_lines(
    profile: &ResolvedProfile,
    part: &mut ResolvedProfile,
    moved: &mut [Option<FunctionId>],
    lines: &[Line],
) -> Vec<Line> {
    let mut copy = Vec::with_capacity(lines.len());
    for line in lines {
        let index = line.function.0 as usize;
        let function = *moved[index].get_or_insert_with(|| {
            part.functions.push(profile.functions[index].clone());
            FunctionId(part.functions.len() as u32 - 1)
        });
        copy.push(Line { function, ..*line });
    }
    copy
}
