//! Every map, and the settings that the agent makes before loading.

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

/// Samples and stack copies on their way to the agent, which sets its size.
#[map]
pub static RING: RingBuf = RingBuf::with_byte_size(MIN_RING_BYTES, 0);

/// One slot a [`agent_ebpf::counters::Counter`].
#[map]
pub static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS, 0);

/// The state of each walk and the sample being built.
#[map]
pub static WALK: PerCpuArray<Walk> = PerCpuArray::with_max_entries(SLOTS, 0);

/// The stack copies that each CPU is building (too large for a per-CPU map), one a walk. The agent sets
/// the number.
#[map]
pub static STACK_COPY: Array<StackCopyRecord> = Array::with_max_entries(1, 0);

/// [`CACHES`] for each walk of each CPU, one after the other. The agent sets the number.
#[map]
pub static CACHE: Array<RuleCache> = Array::with_max_entries(CACHES, 0);

/// pid → address space.
#[map]
pub static PROCESSES: HashMap<u32, Space> = HashMap::with_max_entries(MAX_PROCESSES, 0);

/// Selected processes: a set.
#[map]
pub static TARGETS: HashMap<u32, u8> = HashMap::with_max_entries(MAX_TARGETS, 0);

/// Selected names: a set.
#[map]
pub static TARGET_NAMES: HashMap<[u8; 16], u8> = HashMap::with_max_entries(MAX_TARGET_NAMES, 0);

/// The pool of blocks, in segments that the agent adds as it needs them.
///
/// The inner value is an array, not the struct `Block`: Linux 6.1 takes an inner map only when it is
/// like this template also in whether a timer was looked for in it, and that depends on the value
/// being a described struct (kernel/bpf/map_in_map.c, `bpf_map_meta_equal`; kernel/bpf/btf.c,
/// `btf_find_timer`). Maps that the agent makes describe no types.
#[btf_map]
pub static SEGMENTS: ArrayOfMaps<
    btf_maps::Array<[u32; BLOCK_WORDS], { SEGMENT_BLOCKS as usize }>,
    { MAX_SEGMENTS as usize },
> = ArrayOfMaps::new();

/// PostgreSQL servers.
#[map]
pub static SERVERS: Array<ServerVariables> = Array::with_max_entries(MAX_SERVERS, 0);

/// TCP ports on which they listen: a bit each.
#[map]
pub static SERVER_PORTS: Array<u64> = Array::with_max_entries(65_536 / 64, 0);

/// What a backend says, being built.
#[map]
pub static BACKEND: PerCpuArray<BackendRecord> = PerCpuArray::with_max_entries(1, 0);

/// What is known of backends that were sampled, by pid.
#[map]
pub static KNOWN: LruHashMap<u32, BackendFacts> = LruHashMap::with_max_entries(MAX_BACKENDS, 0);

/// The connection of each backend, for its parallel workers.
#[map]
pub static BACKENDS: LruHashMap<BackendKey, ServedConnection> =
    LruHashMap::with_max_entries(MAX_BACKENDS, 0);

/// The last sends on each connection.
#[map]
pub static CONNECTIONS: LruHashMap<Connection, SendRing> =
    LruHashMap::with_max_entries(MAX_CONNECTIONS, 0);

/// A connection without sends (too large for the programs' stack).
#[map]
pub static NEW_RING: Array<SendRing> = Array::with_max_entries(1, 0);

/// What is left of each CPU's budget of stacks at sends, and how long they took.
#[map]
pub static CALLER_BUDGET: PerCpuArray<Budget> = PerCpuArray::with_max_entries(1, 0);

/// The wall clock, kept true by the agent.
#[map]
pub static WALL_CLOCK: Array<WallClock> = Array::with_max_entries(1, 0);

/// 1: the kernel has `bpf_ktime_get_tai_ns` (Linux 6.1).
#[unsafe(no_mangle)]
pub static HAS_TAI_CLOCK: Global<u8> = Global::new(0);

/// Stacks at sends that a CPU may take in a [`BUDGET_WINDOW`](crate::caller::BUDGET_WINDOW).
#[unsafe(no_mangle)]
pub static CALLERS_PER_WINDOW: Global<u32> = Global::new(0);

/// Nanoseconds between two ticks of a CPU.
#[unsafe(no_mangle)]
pub static PERIOD_NS: Global<u64> = Global::new(0);

/// 1: only [`TARGETS`] and [`TARGET_NAMES`] are sampled.
#[unsafe(no_mangle)]
pub static FILTER: Global<u8> = Global::new(0);
