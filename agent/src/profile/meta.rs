//! What a profile says about its own recording, kept inside the `.pb.gz` so that a report made
//! later prints the same table.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The circumstances of a recording.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RecordingMeta {
    /// Host name.
    pub host: String,
    /// Kernel release (`uname -r`).
    pub kernel: String,
    /// Version of the agent.
    pub agent_version: String,
    /// What was recorded: `whole machine`, `pid 7`, `comm postgres`, the command line.
    pub target: String,
    /// Start, nanoseconds since 1970-01-01 UTC.
    pub start_unix_ns: i64,
    /// Length, nanoseconds.
    pub duration_ns: u64,
    /// Samples per second and CPU.
    pub frequency_hz: u32,
    /// CPUs that were sampled.
    pub cpus: u32,
}

impl RecordingMeta {
    /// Nanoseconds between two samples of one CPU: what one sample stands for.
    pub fn period_ns(&self) -> u64 {
        1_000_000_000 / u64::from(self.frequency_hz.max(1))
    }
}

/// What the session measured besides the samples. Every figure is a measurement; what could not be
/// measured is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Runtime {
    /// Samples that the timers should have given: frequency × CPUs × time.
    pub expected_samples: u64,
    /// Samples lost in the agent's own pipeline, by cause. A cause that did not occur may be
    /// present with 0: that says it was watched.
    pub lost: BTreeMap<String, u64>,
    /// What became of ticks that were not samples.
    pub ticks: Ticks,
    /// CPU time that the hypervisor took from this machine during the recording, seconds.
    pub steal_seconds: Option<f64>,
    /// What became of the stack copies of samples that the kernel could not unwind.
    pub stack_copies: StackCopies,
    /// The unwind tables that were made.
    pub unwind_tables: UnwindTables,
    /// What the agent itself cost.
    pub agent: AgentCost,
    /// What its programs in the kernel cost.
    pub kernel: KernelCost,
    /// How well the work of PostgreSQL's backends could be attributed. `None` where there was no server.
    pub attribution: Option<AttributionStats>,
    /// Milliseconds from the agent's start to the first sample that could be unwound.
    pub startup_ms: Option<f64>,
    /// Entries of the maps of the kernel programs, and of what the agent remembers, at the end.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sizes: BTreeMap<String, u64>,
    /// Runs that the kernel skipped, by kernel program: what these would have seen is missing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub skipped_runs: BTreeMap<String, u64>,
    /// Things the reader should know (a file without readable symbols, hidden kernel addresses …).
    pub notes: Vec<String>,
}

/// Most [`Runtime::notes`] that are kept: beyond it they are noise.
const MAX_NOTES: usize = 100;

impl Runtime {
    /// Adds a note, unless it was given already or there are 100.
    pub fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        if self.notes.len() < MAX_NOTES && !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }
}

/// Timer ticks that did not become samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ticks {
    /// On an idle CPU.
    pub idle: u64,
    /// In a process that was not a target.
    pub filtered: u64,
    /// That did not come: late timers, stolen CPUs, or a program that was skipped by the kernel.
    pub missed: u64,
}

/// Copies of stacks that user space was to finish.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StackCopies {
    /// Sent up.
    pub sent: u64,
    /// Refused, by cause: those samples have the part of their stack that the kernel found.
    pub refused: BTreeMap<String, u64>,
}

/// What the compiled unwind tables know of the code of their files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnwindTables {
    /// Files with a table.
    pub files: u64,
    /// Files whose table could not be compiled, or found no room in the kernel.
    pub failed: u64,
    /// Bytes of code in the files with a table.
    pub text_bytes: u64,
    /// Of these, with a rule, be it one that is not supported.
    pub covered_bytes: u64,
    /// Of these, without an unwind entry, with a rule read from the instructions.
    pub derived_bytes: u64,
    /// Bytes of code that are followed by their frame pointer; not among the covered.
    pub frame_pointer_bytes: u64,
    /// Bytes of code whose rule is not supported, by reason.
    pub unsupported_bytes: BTreeMap<String, u64>,
    /// All of these, as a share of the code (0 to 1). `None` without any code.
    pub unsupported_share: Option<f64>,
    /// Mappings beyond the bound of a process, left out of its address space in the kernel: of the
    /// process with most.
    pub mappings_left_out: u64,
}

/// The agent's own consumption.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentCost {
    /// CPU time, user and system.
    pub cpu_seconds: CpuSeconds,
    /// Resident memory at its highest.
    pub max_rss_bytes: MaxRss,
}

/// CPU time by phase, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CpuSeconds {
    /// Until the first sample could be unwound.
    pub startup: f64,
    /// While recording.
    pub recording: f64,
    /// Symbols and encoding, afterwards.
    pub symbolising: f64,
}

/// Resident memory, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MaxRss {
    /// Highest while recording.
    pub recording: u64,
    /// Highest of all, with symbolising.
    pub peak: u64,
}

/// How well the work of PostgreSQL's backends could be attributed, in samples, and what that cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AttributionStats {
    /// Servers seen.
    pub servers: u64,
    /// Samples of their processes.
    pub server_samples: u64,
    /// Of these, of processes that run statements for clients, parallel workers included.
    pub backend_samples: u64,
    /// Of those, with the query.
    pub with_query: u64,
    /// Samples of parallel workers that had no statement yet or none any more, and of which no other sample
    /// tells it.
    pub starting_workers: u64,
    /// Of those with the query, taken between two statements.
    pub between_statements: u64,
    /// Of those with the query, with the caller's stack.
    pub with_caller: u64,
    /// Of those with the query, with a part of the caller's stack: its walk did not come to a proven end.
    pub with_partial_caller: u64,
    /// Of those with the query, by why the caller's stack is not known
    /// ([`crate::profile::Unknown::name`]).
    pub without_caller: BTreeMap<String, u64>,
    /// Samples of queries that there was no room for, or no more, counted as `[other queries]`.
    pub other_queries: u64,
    /// Sends to servers.
    pub sends: u64,
    /// Stacks taken at sends.
    pub caller_stacks: u64,
    /// Stacks that each CPU may take in one second.
    pub caller_stack_budget: u32,
    /// Sends on connections for which there was no room.
    pub connections_refused: u64,
    /// Nanoseconds at a send whose stack was not taken: the mean of some, from when it is known to be one to a server.
    pub send_ns: Option<f64>,
    /// Nanoseconds at a send whose stack was taken: the median, exact to half a microsecond. (The first sends of a
    /// process copy its stack: that is few, and takes many times as long.)
    pub caller_stack_ns: Option<f64>,
    /// Nanoseconds for a backend's state, added to its sample.
    pub backend_ns: Option<f64>,
}

impl AttributionStats {
    /// Share of the backends' samples whose query is known, without the starting workers'.
    pub fn query_share(&self) -> Option<f64> {
        share(
            self.with_query,
            self.backend_samples.saturating_sub(self.starting_workers),
        )
    }

    /// Share of those with the query whose caller is known.
    pub fn caller_share(&self) -> Option<f64> {
        share(self.with_caller, self.with_query)
    }
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// The consumption of the programs in the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct KernelCost {
    /// Memory of all maps, bytes.
    pub map_bytes: u64,
    /// Nanoseconds of the sampling program per sample, without the backends' state.
    pub run_ns_per_sample: Option<f64>,
}
