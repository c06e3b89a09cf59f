//! Finds the functions that sent queries.

use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
};

use super::view::Marks;
use crate::{
    naming::readable,
    profile::{CALLER_MODULE, FrameRef, KNOWN, LocationId, ResolvedProfile, ResolvedSample, key},
};

/// A place in a caller's code.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// The function.
    pub function: String,
    /// Its source file; empty when unknown.
    pub file: String,
    /// Source line of the call; 0 when unknown.
    pub line: u32,
}

/// Finds the callers in a profile. The result for each stack is cached.
pub struct Callers<'a> {
    profile: &'a ResolvedProfile,
    marks: Marks,
    known: HashMap<&'a [LocationId], Option<FrameRef<'a>>>,
}

impl<'a> Callers<'a> {
    /// A finder for a profile's callers.
    pub fn of(profile: &'a ResolvedProfile) -> Callers<'a> {
        Callers {
            profile,
            marks: Marks::find(profile),
            known: HashMap::new(),
        }
    }

    /// The place from which the query of a sample was sent: [`Self::frame`] as text.
    pub fn place(&mut self, sample: &'a ResolvedSample) -> Place {
        let Some(frame) = self.frame(sample) else {
            return Place::default();
        };
        let name = &*frame.function.name;
        Place {
            function: readable(name, true).map_or_else(|| name.to_owned(), Cow::into_owned),
            file: frame.function.file.to_string(),
            line: frame.line,
        }
    }

    /// The innermost function of the caller's own code, which excludes the system's libraries, the database
    /// driver and the runtime. If there is no such function, the innermost function that is found.
    pub fn frame(&mut self, sample: &'a ResolvedSample) -> Option<FrameRef<'a>> {
        let query = self.marks.query(&sample.stack);
        let caller = &sample.stack[query.map_or(0, |query| query + 1)..];
        let profile = self.profile;
        *self
            .known
            .entry(caller)
            .or_insert_with(|| calling_frame(profile, caller))
    }
}

fn calling_frame<'a>(
    profile: &'a ResolvedProfile,
    caller: &'a [LocationId],
) -> Option<FrameRef<'a>> {
    let frames = || {
        let locations = caller
            .iter()
            .filter_map(|id| profile.locations.get(id.0 as usize));
        let frames = locations.flat_map(|location| profile.frames_at(location));
        frames.filter(|frame| &*frame.mapping.name != CALLER_MODULE)
    };
    frames()
        .find(is_own_source)
        .or_else(|| frames().find(|frame| !is_library(frame)))
        .or_else(|| frames().next())
}

/// Whether a frame has a source file that belongs neither to the compiler nor to a dependency.
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

/// Whether a frame is in a library of the system, in the kernel or in the vDSO. (The extension modules of
/// an interpreter do not count, so that [`calling_frame`] can choose them.)
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

/// Whether a process with this name is a connection pooler between a server and its clients.
pub fn is_pooler(name: &str) -> bool {
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

/// Notes on what the builds of callers lack for better function names; one line per program.
pub fn caller_notes(profile: &ResolvedProfile) -> Vec<String> {
    let mut callers = Callers::of(profile);
    let mut poor: BTreeMap<&str, (u64, u64, bool)> = BTreeMap::new();
    for sample in &profile.samples {
        if sample.label(key::CALLER) != Some(KNOWN) {
            continue;
        }
        let service = sample.label(key::SERVICE).unwrap_or_default();
        let Some(frame) = callers.frame(sample) else {
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
                "{service} is a connection pooler: the clients behind it are not known"
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
