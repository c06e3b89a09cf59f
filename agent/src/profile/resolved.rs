//! A profile whose frames have names. It is the only input of the encoders, and it is what a `.pb.gz`
//! holds.
//!
//! The shape follows pprof's `profile.proto` (mappings, locations, functions, samples), so that a round
//! trip through a file loses nothing. Ids are indices into the lists of the same profile.

use std::sync::Arc;

use super::meta::{RecordingMeta, Runtime};

/// Keys of the labels of samples.
pub mod key {
    /// Process id, decimal.
    pub const PID: &str = "pid";
    /// The process's name.
    pub const COMM: &str = "comm";
    /// Thread id, decimal.
    pub const TID: &str = "tid";
    /// The thread's name.
    pub const THREAD: &str = "thread";
    /// How unwinding ended ([`agent_ebpf::sample::Outcome::name`]).
    pub const OUTCOME: &str = "outcome";
    /// Service that the process is an instance of; on a backend's sample, the service of its caller.
    pub const SERVICE: &str = "service";
    /// Trace id, 32 hexadecimal digits.
    pub const TRACE: &str = "trace_id";
    /// Span id, 16 hexadecimal digits.
    pub const SPAN: &str = "span_id";

    /// Kind of process of a PostgreSQL server. This key and the following ones are only on samples of such
    /// processes.
    pub const BACKEND: &str = "backend_type";
    /// Port of the server.
    pub const PORT: &str = "db_port";
    /// Query id, see [`crate::profile::Query::id`].
    pub const QUERY_ID: &str = "query_id";
    /// Query text.
    pub const QUERY: &str = "query";
    /// Whether the statement was being executed ([`crate::profile::Phase::name`]).
    pub const PHASE: &str = "phase";
    /// As in `pg_stat_activity.state`.
    pub const STATE: &str = "state";
    /// As in `pg_stat_activity.wait_event_type`.
    pub const WAIT: &str = "wait_event_type";
    /// The wait event ([`crate::profile::WaitEvent::name`]).
    pub const WAIT_EVENT: &str = "wait_event";
    /// Database.
    pub const DATABASE: &str = "database";
    /// Role.
    pub const USER: &str = "user";
    /// The client's `application_name`.
    pub const APPLICATION: &str = "application";
    /// Client's address.
    pub const CLIENT: &str = "client";
    /// `known`, `partial`, or why the caller is not known ([`crate::profile::Caller::label`]).
    pub const CALLER: &str = "caller";
    /// How the walk of a partial caller's stack ended ([`agent_ebpf::sample::Outcome::name`]).
    pub const CALLER_OUTCOME: &str = "caller_outcome";
    /// Name of the calling process; if that is not known, the reason in brackets. It is the root of a
    /// stitched stack.
    pub const CALLER_COMM: &str = "caller_comm";
    /// Process id of the caller.
    pub const CALLER_PID: &str = "caller_pid";
}

/// Module of the frames that stand for a query. They are between the caller's frames and the backend's.
pub const QUERY_MODULE: &str = "[query]";

/// Module of the frame that names the process in which a stitched stack continues.
pub const PROCESS_MODULE: &str = "[process]";

/// Module of the frame at the root end of a caller's stack that says why the rest is missing.
pub const CALLER_MODULE: &str = "[caller]";

/// The [`Function::system_name`] of a frame for which neither the function nor its start is known. No
/// symbol has this name.
pub const ADDRESS_ONLY: &str = "[address]";

/// Index into [`ResolvedProfile::mappings`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MappingId(pub u32);

/// Index into [`ResolvedProfile::functions`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FunctionId(pub u32);

/// Index into [`ResolvedProfile::locations`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LocationId(pub u32);

/// A module that was sampled.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Path as the process sees it, or a name in brackets: `[vdso]`, `[kernel]` ….
    pub name: Arc<str>,
    /// GNU build id, lower-case hexadecimal; empty when there is none.
    pub build_id: Arc<str>,
    /// Whether this is the kernel: its frames are marked `_[k]` in folded stacks and pictures.
    pub is_kernel: bool,
}

impl Mapping {
    /// The name without its directories.
    pub fn short_name(&self) -> &str {
        match self.name.rsplit('/').next() {
            Some(base) if !base.is_empty() => base,
            _ => &self.name,
        }
    }
}

/// A function.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Function {
    /// Demangled name; or, without a symbol, module and function start (`postgres+0x31e800`).
    pub name: Arc<str>,
    /// The symbol as it is in the file. Empty if there was none and `name` consists of the module and the
    /// start of the function; [`ADDRESS_ONLY`] if that start is not known either and `name` consists of the
    /// module and an address.
    pub system_name: Arc<str>,
    /// Source file; empty when unknown.
    pub file: Arc<str>,
}

impl Function {
    /// Whether no symbol was found, so that the name consists only of the module and an address (the
    /// function's start, or that of the frame).
    pub fn is_module_only(&self) -> bool {
        self.system_name.is_empty() || self.is_address_only()
    }

    /// Whether neither the function nor its start is known.
    pub fn is_address_only(&self) -> bool {
        &*self.system_name == ADDRESS_ONLY
    }
}

/// One function at a location. A location has several if functions were inlined there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Line {
    /// The function.
    pub function: FunctionId,
    /// Source line; 0 when unknown.
    pub line: u32,
}

/// A location in code, and the functions there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The module.
    pub mapping: MappingId,
    /// The frame's address: in a file, the address that the file itself uses (svma); in JIT code and the
    /// kernel, the address in memory (avma). The address of a calling frame is its return address.
    pub address: u64,
    /// Innermost (inlined) function first; never empty.
    pub lines: Vec<Line>,
}

/// Labels of a sample: pairs of key and value, with any keys.
pub type Labels = Arc<[(Arc<str>, Arc<str>)]>;

/// Samples with equal labels and equal stacks, counted together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvedSample {
    /// The labels. Keys other than those in [`key`] may occur.
    pub labels: Labels,
    /// The stack, leaf first.
    pub stack: Arc<[LocationId]>,
    /// Number of samples.
    pub count: u64,
    /// The CPU time they stand for, nanoseconds.
    pub cpu_ns: u64,
    /// Executions of a statement whose first sample is among these.
    pub executions: u64,
}

impl ResolvedSample {
    /// The value of a label.
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels
            .iter()
            .find(|(k, _)| &**k == key)
            .map(|(_, value)| &**value)
    }
}

/// A recording whose frames have names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResolvedProfile {
    /// The circumstances of the recording.
    pub meta: RecordingMeta,
    /// What the session measured besides the samples.
    pub runtime: Runtime,
    /// Modules.
    pub mappings: Vec<Mapping>,
    /// Functions.
    pub functions: Vec<Function>,
    /// Locations in code.
    pub locations: Vec<Location>,
    /// Samples.
    pub samples: Vec<ResolvedSample>,
}

/// One frame of a stack, inlined functions expanded.
#[derive(Clone, Copy, Debug)]
pub struct FrameRef<'a> {
    /// The function.
    pub function: &'a Function,
    /// Its index.
    pub id: FunctionId,
    /// The module.
    pub mapping: &'a Mapping,
    /// Source line; 0 when unknown.
    pub line: u32,
}

impl ResolvedProfile {
    /// The frames of a stack, leaf first, inlined functions expanded. Ids that point nowhere are skipped
    /// ([`decode`](crate::encode::pprof::decode) refuses files with such ids).
    pub fn frames<'a>(
        &'a self,
        sample: &'a ResolvedSample,
    ) -> impl Iterator<Item = FrameRef<'a>> + 'a {
        sample
            .stack
            .iter()
            .filter_map(|id| self.locations.get(id.0 as usize))
            .flat_map(|location| self.frames_at(location))
    }

    /// The functions at a location, innermost first.
    pub fn frames_at<'a>(
        &'a self,
        location: &'a Location,
    ) -> impl Iterator<Item = FrameRef<'a>> + 'a {
        let mapping = self.mappings.get(location.mapping.0 as usize);
        location.lines.iter().filter_map(move |line| {
            Some(FrameRef {
                function: self.functions.get(line.function.0 as usize)?,
                id: line.function,
                mapping: mapping?,
                line: line.line,
            })
        })
    }

    /// Number of all samples.
    pub fn total_count(&self) -> u64 {
        self.samples.iter().map(|sample| sample.count).sum()
    }
}
