//! Every map, and the global settings that the agent writes before it loads the programs. (The offsets of
//! kernel fields, which it also writes, are in `fields.rs`.)

use aya_ebpf::{
    Global,
    btf_maps::{self, ArrayOfMaps},
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};

use agent_ebpf::{
    counters::COUNTERS,
    limits::{
        BLOCK_WORDS, CACHES, MAX_BACKENDS, MAX_CONNECTIONS, MAX_PROCESSES, MAX_SEGMENTS,
        MAX_SERVERS, MAX_TARGET_NAMES, MAX_TARGETS, MIN_RING_BYTES, SEGMENT_BLOCKS,
    },
    postgres::{BackendKey, Budget, Connection, ServedConnection, ServerVariables, WallClock},
    table::Space,
};

use crate::state::{
    BackendFacts, BackendRecord, RuleCache, SLOTS, SendRing, StackCopyRecord, Walk,
};

/// The ring buffer to the agent, for all kinds of records (see [`agent_ebpf::sample`]). The agent sets its
/// size before loading.
#[map]
pub static RING: RingBuf = RingBuf::with_byte_size(MIN_RING_BYTES, 0);

/// The counters, indexed by [`agent_ebpf::counters::Counter`].
#[map]
pub static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS, 0);

/// For each CPU, the state of each walk and the sample that it builds; indexed by [`crate::state::SAMPLER`]
/// and [`crate::state::CALLER`].
#[map]
pub static WALK: PerCpuArray<Walk> = PerCpuArray::with_max_entries(SLOTS, 0);

/// Stack copies under construction: one for each walk of each CPU, at index CPU × [`SLOTS`] + slot. They
/// are too large for a per-CPU map. The agent sets the number of entries before loading.
#[map]
pub static STACK_COPY: Array<StackCopyRecord> = Array::with_max_entries(1, 0);

/// [`CACHES`] rule caches for each walk of each CPU, at indices from (CPU × [`SLOTS`] + slot) × [`CACHES`].
/// The agent sets the number of entries before loading.
#[map]
pub static CACHE: Array<RuleCache> = Array::with_max_entries(CACHES, 0);

/// The address space of each process that the agent has compiled tables for, by pid. The agent adds
/// entries; the programs at fork, exec and exit copy and remove them.
#[map]
pub static PROCESSES: HashMap<u32, Space> = HashMap::with_max_entries(MAX_PROCESSES, 0);

/// The pids of selected processes. The map is used as a set: the value has no meaning.
#[map]
pub static TARGETS: HashMap<u32, u8> = HashMap::with_max_entries(MAX_TARGETS, 0);

/// The thread names that `--comm` selects, padded with NULs. The map is used as a set.
#[map]
pub static TARGET_NAMES: HashMap<[u8; 16], u8> = HashMap::with_max_entries(MAX_TARGET_NAMES, 0);

/// The pool of blocks, in segments that the agent adds when it needs them.
///
/// The value of an inner map is described as an array of words, not as the struct `Block`. The segments
/// that the agent creates carry no type description (BTF), and Linux 6.1 accepts an inner map only if it
/// matches this template, also in the result of the search for a timer in its value type. That result
/// differs if the template's value is a struct (kernel/bpf/map_in_map.c, `bpf_map_meta_equal`;
/// kernel/bpf/btf.c, `btf_find_timer`).
#[btf_map]
pub static SEGMENTS: ArrayOfMaps<
    btf_maps::Array<[u32; BLOCK_WORDS], { SEGMENT_BLOCKS as usize }>,
    { MAX_SEGMENTS as usize },
> = ArrayOfMaps::new();

/// The PostgreSQL servers, by the index that the agent gave each of them.
#[map]
pub static SERVERS: Array<ServerVariables> = Array::with_max_entries(MAX_SERVERS, 0);

/// The TCP ports on which the servers listen, as a bit set: bit `port % 64` of word `port / 64`.
#[map]
pub static SERVER_PORTS: Array<u64> = Array::with_max_entries(65_536 / 64, 0);

/// The backend record that each CPU is building.
#[map]
pub static BACKEND: PerCpuArray<BackendRecord> = PerCpuArray::with_max_entries(1, 0);

/// Cached facts about the server processes that were sampled, by pid.
#[map]
pub static KNOWN: LruHashMap<u32, BackendFacts> = LruHashMap::with_max_entries(MAX_BACKENDS, 0);

/// The connection of each backend, where its parallel workers look it up.
#[map]
pub static BACKENDS: LruHashMap<BackendKey, ServedConnection> =
    LruHashMap::with_max_entries(MAX_BACKENDS, 0);

/// The last sends on each connection to a server. The protocol is described in `sends.rs`.
#[map]
pub static CONNECTIONS: LruHashMap<Connection, SendRing> =
    LruHashMap::with_max_entries(MAX_CONNECTIONS, 0);

/// A zeroed ring, from which new entries of [`CONNECTIONS`] are copied. It is too large for the stack of a
/// BPF program.
#[map]
pub static NEW_RING: Array<SendRing> = Array::with_max_entries(1, 0);

/// How much each CPU has used of its budget for stacks at sends, and how long those took.
#[map]
pub static CALLER_BUDGET: PerCpuArray<Budget> = PerCpuArray::with_max_entries(1, 0);

/// The offset of the wall clock, which the agent keeps up to date.
#[map]
pub static WALL_CLOCK: Array<WallClock> = Array::with_max_entries(1, 0);

/// 1 if the kernel has the helper `bpf_ktime_get_tai_ns` (since Linux 6.1).
#[unsafe(no_mangle)]
pub static HAS_TAI_CLOCK: Global<u8> = Global::new(0);

/// Number of stacks at sends that a CPU should take in each [`BUDGET_WINDOW`](crate::caller::BUDGET_WINDOW).
#[unsafe(no_mangle)]
pub static CALLERS_PER_WINDOW: Global<u32> = Global::new(0);

/// Nanoseconds between two sampling ticks of a CPU.
#[unsafe(no_mangle)]
pub static PERIOD_NS: Global<u64> = Global::new(0);

/// 1 if only the tasks selected by [`TARGETS`] or [`TARGET_NAMES`] are sampled.
#[unsafe(no_mangle)]
pub static FILTER: Global<u8> = Global::new(0);
