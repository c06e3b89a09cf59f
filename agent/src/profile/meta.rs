//! What a profile records about its own recording. It is stored in the `.pb.gz`, so that a later report
//! prints the same table.

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
    /// Length of the recording, nanoseconds.
    pub duration_ns: u64,
    /// Samples per second and CPU.
    pub frequency_hz: u32,
    /// Number of CPUs that were sampled.
    pub cpus: u32,
}

impl RecordingMeta {
    /// Nanoseconds between two samples of one CPU, which is the CPU time that a sample stands for.
    pub fn period_ns(&self) -> u64 {
        1_000_000_000 / u64::from(self.frequency_hz.max(1))
    }
}

/// What the session measured besides the samples. Every figure is a measurement; a figure that could not be
/// measured is `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Runtime {
    /// Samples that the timers should have produced: frequency × CPUs × time.
    pub expected_samples: u64,
    /// Samples lost in the agent's own pipeline, by cause. A cause that did not occur may be present with
    /// 0, which says that it was monitored.
    pub lost: BTreeMap<String, u64>,
    /// Timer ticks that did not become samples.
    pub ticks: Ticks,
    /// CPU time that the hypervisor took from this machine during the recording, seconds.
    pub steal_seconds: Option<f64>,
    /// Stack copies of the samples that the kernel could not unwind.
    pub stack_copies: StackCopies,
    /// The unwind tables that were compiled.
    pub unwind_tables: UnwindTables,
    /// What the agent itself consumed.
    pub agent: AgentCost,
    /// What the agent's programs in the kernel consumed.
    pub kernel: KernelCost,
    /// How well the work of PostgreSQL's backends could be attributed. `None` if no server was seen.
    pub attribution: Option<AttributionStats>,
    /// Milliseconds from the agent's start to the first sample that could be unwound.
    pub startup_ms: Option<f64>,
    /// Number of entries at the end of the recording, by collection: the maps of the kernel programs, and
    /// the agent's own caches.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sizes: BTreeMap<String, u64>,
    /// Runs that the kernel skipped, by kernel program. What these runs would have recorded is missing.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub skipped_runs: BTreeMap<String, u64>,
    /// Things the reader should know (a file without readable symbols, hidden kernel addresses …).
    pub notes: Vec<String>,
}

/// The maximum number of [`Runtime::notes`] that are kept, because nobody would read more.
const MAX_NOTES: usize = 100;

impl Runtime {
    /// Adds a note, unless it was added before or there are already 100.
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
    /// Ticks that did not come, because a timer was late, a CPU was stolen by the hypervisor, or the kernel
    /// skipped the program.
    pub missed: u64,
}

/// Copies of stacks that the kernel could not unwind to the end, made for unwinding in user space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StackCopies {
    /// Copies that were sent to user space.
    pub sent: u64,
    /// Copies that were refused, by cause. The samples concerned have only the frames that the kernel
    /// found.
    pub refused: BTreeMap<String, u64>,
}

/// How much of the files' code the compiled unwind tables cover.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnwindTables {
    /// Files with a table.
    pub files: u64,
    /// Files whose table could not be compiled, or for whose table the kernel had no room.
    pub failed: u64,
    /// Bytes of code in the files with a table.
    pub text_bytes: u64,
    /// Of these bytes, those with a rule, even if that rule is not supported.
    pub covered_bytes: u64,
    /// Of these bytes, those that have no unwind entry, and whose rule was derived from the instructions.
    pub derived_bytes: u64,
    /// Bytes of code that are unwound by frame pointer. They do not count as covered.
    pub frame_pointer_bytes: u64,
    /// Bytes of code whose rule is not supported, by reason.
    pub unsupported_bytes: BTreeMap<String, u64>,
    /// All unsupported bytes as a share of the code (0 to 1). `None` if there is no code.
    pub unsupported_share: Option<f64>,
    /// Mappings that exceeded the bound of a process and were left out of its address space in the kernel:
    /// the number for the process that has the most of them.
    pub mappings_left_out: u64,
}

/// What the agent itself consumed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentCost {
    /// CPU time, user and system.
    pub cpu_seconds: CpuSeconds,
    /// Highest resident memory.
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
    /// After the recording, for symbolization and encoding.
    pub symbolising: f64,
}

/// Highest resident memory, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MaxRss {
    /// While recording.
    pub recording: u64,
    /// Over the whole run, including symbolization.
    pub peak: u64,
}

/// How well the work of PostgreSQL's backends could be attributed, in samples, and what that cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AttributionStats {
    /// Servers that were seen.
    pub servers: u64,
    /// Samples of the processes of servers.
    pub server_samples: u64,
    /// Of `server_samples`, those of processes that run statements for clients, parallel workers included.
    pub backend_samples: u64,
    /// Of `backend_samples`, those whose query is known.
    pub with_query: u64,
    /// Of `backend_samples`, those of parallel workers that had no statement yet or no longer had one, and
    /// whose statement is not known from another sample of the worker either.
    pub starting_workers: u64,
    /// Of `with_query`, those taken between two statements.
    pub between_statements: u64,
    /// Of `with_query`, those with the caller's stack.
    pub with_caller: u64,
    /// Of `with_query`, those with a part of the caller's stack, whose walk did not reach a proven end.
    pub with_partial_caller: u64,
    /// Of `with_query`, the others, by the reason why the caller's stack is not known
    /// ([`crate::profile::Unknown::name`]).
    pub without_caller: BTreeMap<String, u64>,
    /// Samples that count as `[other queries]`, because there was no room for their query, or the query was
    /// evicted.
    pub other_queries: u64,
    /// Sends to servers that were seen.
    pub sends: u64,
    /// Stacks that were taken at sends.
    pub caller_stacks: u64,
    /// The maximum number of stacks that each CPU may take at sends in one second.
    pub caller_stack_budget: u32,
    /// Sends on connections for which there was no room.
    pub connections_refused: u64,
    /// Nanoseconds that a send without a stack costs: the mean over a part of the sends, measured from the
    /// point where the send is known to go to a server.
    pub send_ns: Option<f64>,
    /// Nanoseconds that a send with a stack costs: the median, exact to half a microsecond. (The first
    /// sends of a process copy its stack, which takes many times as long but is rare.)
    pub caller_stack_ns: Option<f64>,
    /// Nanoseconds that reading a backend's state adds to its sample.
    pub backend_ns: Option<f64>,
}

impl AttributionStats {
    /// The share of the backends' samples whose query is known. Samples of starting workers are left out.
    pub fn query_share(&self) -> Option<f64> {
        share(
            self.with_query,
            self.backend_samples.saturating_sub(self.starting_workers),
        )
    }

    /// The share of the samples with a query whose caller's stack is known.
    pub fn caller_share(&self) -> Option<f64> {
        share(self.with_caller, self.with_query)
    }
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// What the programs in the kernel consumed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct KernelCost {
    /// Memory of all maps, bytes.
    pub map_bytes: u64,
    /// Nanoseconds that the sampling program takes per sample, without reading a backend's state.
    pub run_ns_per_sample: Option<f64>,
}
