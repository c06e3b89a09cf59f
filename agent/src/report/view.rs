//! Views of a stitched profile: the whole, the application's side, or the database's.

use std::collections::HashMap;
use std::sync::Arc;

use indexmap::IndexMap;

use crate::naming::fold;
use crate::profile::{
    Function, FunctionId, Line, Location, LocationId, PROCESS_MODULE, QUERY_MODULE,
    ResolvedProfile, ResolvedSample, key,
};

/// What of a stitched profile is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum View {
    /// Programs and their time; what a query cost in the application, without the inside of the database:
    /// the caller's stack ends in the query.
    App,
    /// The database's processes alone: the query, then their stacks.
    Database,
    /// The caller's stack, then the query, then the database's.
    #[default]
    Stitched,
}

impl View {
    /// The profile as this view shows it. Runtime figures stay those of the recording.
    pub fn of(self, profile: &ResolvedProfile) -> ResolvedProfile {
        let marks = Marks::find(profile);
        let show = |sample: &ResolvedSample| match self {
            View::Stitched => Some(sample.clone()),
            View::App => app(sample, &marks),
            View::Database => database(sample, &marks),
        };
        ResolvedProfile {
            samples: profile.samples.iter().filter_map(show).collect(),
            ..profile.clone()
        }
    }
}

/// Which locations stand for queries and processes.
pub(super) struct Marks {
    query: Vec<bool>,
    process: Vec<bool>,
}

impl Marks {
    pub(super) fn find(profile: &ResolvedProfile) -> Marks {
        let of = |module: &str| {
            let is = |id: u32| {
                profile
                    .mappings
                    .get(id as usize)
                    .is_some_and(|m| &*m.name == module)
            };
            profile
                .locations
                .iter()
                .map(|location| is(location.mapping.0))
                .collect()
        };
        Marks {
            query: of(QUERY_MODULE),
            process: of(PROCESS_MODULE),
        }
    }

    /// Position of the query in a stack: what comes before it, leaf first, is the backend's, what comes
    /// after it the caller's.
    pub(super) fn query(&self, stack: &[LocationId]) -> Option<usize> {
        stack.iter().position(|id| marked(&self.query, *id))
    }
}

fn marked(marks: &[bool], id: LocationId) -> bool {
    marks.get(id.0 as usize).copied().unwrap_or(false)
}

fn app(sample: &ResolvedSample, marks: &Marks) -> Option<ResolvedSample> {
    if sample.label(key::BACKEND).is_none() {
        return Some(sample.clone());
    }
    // A caller that is not known is no application.
    sample.label(key::CALLER_PID)?;
    let query = marks.query(&sample.stack)?;
    Some(ResolvedSample {
        stack: Arc::from(&sample.stack[query..]),
        ..sample.clone()
    })
}

fn database(sample: &ResolvedSample, marks: &Marks) -> Option<ResolvedSample> {
    sample.label(key::BACKEND)?;
    let end = marks
        .query(&sample.stack)
        .map_or(sample.stack.len(), |query| query + 1);
    let stack = sample.stack[..end].iter().copied();
    let labels = sample
        .labels
        .iter()
        .filter(|(name, _)| &**name != key::CALLER_COMM);
    Some(ResolvedSample {
        // The process is the root.
        stack: stack.filter(|id| !marked(&marks.process, *id)).collect(),
        labels: labels.cloned().collect(),
        ..sample.clone()
    })
}

/// The profile with the stacks of asynchronous Rust made readable, see [`fold`].
pub fn fold_frames(profile: &ResolvedProfile) -> ResolvedProfile {
    let mut folded = Folded {
        functions: profile.functions.clone(),
        renamed: HashMap::new(),
        locations: IndexMap::new(),
    };
    let mut stacks: HashMap<&[LocationId], Arc<[LocationId]>> = HashMap::new();
    let mut samples = Vec::with_capacity(profile.samples.len());
    for sample in &profile.samples {
        let stack = stacks
            .entry(&sample.stack)
            .or_insert_with(|| folded.stack(profile, &sample.stack));
        samples.push(ResolvedSample {
            stack: Arc::clone(stack),
            ..sample.clone()
        });
    }
    ResolvedProfile {
        samples,
        functions: folded.functions,
        locations: folded.locations.into_values().collect(),
        meta: profile.meta.clone(),
        runtime: profile.runtime.clone(),
        mappings: profile.mappings.clone(),
    }
}

/// What the places of a profile become. The old functions keep their numbers.
struct Folded {
    functions: Vec<Function>,
    /// The renamed, by their old numbers and new names.
    renamed: HashMap<(FunctionId, String), FunctionId>,
    /// By the old location and the lines that are left of it.
    locations: IndexMap<(LocationId, Vec<(FunctionId, u32)>), Location>,
}

impl Folded {
    fn stack(&mut self, profile: &ResolvedProfile, stack: &[LocationId]) -> Arc<[LocationId]> {
        // With the position in the stack: a recursive function is at one place many times.
        let mut lines: Vec<(usize, LocationId, Line, &Function)> = Vec::new();
        for (position, id) in stack.iter().enumerate() {
            let Some(location) = profile.locations.get(id.0 as usize) else {
                continue;
            };
            lines.extend(location.lines.iter().filter_map(|line| {
                let function = profile.functions.get(line.function.0 as usize)?;
                Some((position, *id, *line, function))
            }));
        }
        let names: Vec<&str> = lines
            .iter()
            .map(|(_, _, _, function)| &*function.name)
            .collect();
        let kept = fold(&names);
        let mut places: Vec<(LocationId, Vec<(FunctionId, u32)>)> = Vec::new();
        let mut last = None;
        for (index, name) in kept {
            let (position, id, line, function) = lines[index];
            let line = (self.function(function, line.function, &name), line.line);
            match places.last_mut() {
                Some((_, inlined)) if last == Some(position) => inlined.push(line),
                _ => places.push((id, vec![line])),
            }
            last = Some(position);
        }
        places
            .into_iter()
            .filter_map(|(id, lines)| {
                let location = profile.locations.get(id.0 as usize)?;
                Some(self.location(location, id, lines))
            })
            .collect()
    }

    fn function(&mut self, function: &Function, id: FunctionId, name: &str) -> FunctionId {
        if &*function.name == name {
            return id;
        }
        let functions = &mut self.functions;
        *self
            .renamed
            .entry((id, name.to_owned()))
            .or_insert_with(|| {
                functions.push(Function {
                    name: Arc::from(name),
                    ..function.clone()
                });
                FunctionId(functions.len() as u32 - 1)
            })
    }

    fn location(
        &mut self,
        location: &Location,
        id: LocationId,
        lines: Vec<(FunctionId, u32)>,
    ) -> LocationId {
        let entry = self.locations.entry((id, lines));
        let index = entry.index();
        entry.or_insert_with_key(|(_, lines)| Location {
            mapping: location.mapping,
            address: location.address,
            lines: lines
                .iter()
                .map(|(function, line)| Line {
                    function: *function,
                    line: *line,
                })
                .collect(),
        });
        LocationId(index as u32)
    }
}
