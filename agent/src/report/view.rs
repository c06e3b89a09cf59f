//! Views of a stitched profile: the whole, the application's side, or the database's.

use std::collections::HashMap;
use std::sync::Arc;

use indexmap::IndexMap;

use crate::naming::fold;
use crate::profile::{
    Function, FunctionId, Line, Location, LocationId, PROCESS_MODULE, QUERY_MODULE,
    ResolvedProfile, ResolvedSample, key,
};

/// The part of a stitched profile that is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum View {
    /// All programs except the database: a backend's sample is shown as the caller's stack, which ends in
    /// the query. Backends' samples whose caller is not known are left out.
    App,
    /// Only the database's processes: the query, followed by the backend's stack.
    Database,
    /// The caller's stack, then the query, then the backend's stack.
    #[default]
    Stitched,
}

impl View {
    /// The profile as this view shows it. The runtime figures remain those of the recording.
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

    /// The position of the query in a stack, which is ordered leaf first: the frames before it are the
    /// backend's, those after it the caller's.
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
    // Without a known caller, there is no application to which the sample belongs.
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
        // The process's own frame is left out, because its name is already the root.
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

/// The folded functions and locations of a profile. Functions that exist already keep their indices.
struct Folded {
    functions: Vec<Function>,
    /// Renamed functions, by the original function and the new name.
    renamed: HashMap<(FunctionId, String), FunctionId>,
    /// By the original location, and the lines of it that are left.
    locations: IndexMap<(LocationId, Vec<(FunctionId, u32)>), Location>,
}

impl Folded {
    fn stack(&mut self, profile: &ResolvedProfile, stack: &[LocationId]) -> Arc<[LocationId]> {
        // The position in the stack is needed because a recursive function has the same location several
        // times.
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
