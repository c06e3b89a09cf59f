//! Views of a stitched profile: the whole, the application's side, or the database's.

use std::sync::Arc;

use crate::profile::{
    LocationId, PROCESS_MODULE, QUERY_MODULE, ResolvedProfile, ResolvedSample, key,
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

/// PLACEHOLDER
pub fn fold_frames(profile: &ResolvedProfile) -> ResolvedProfile {
    profile.clone()
}
