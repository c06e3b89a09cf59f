//! Every map, and the constants that the agent sets before loading.

use aya_ebpf::{
    Global,
    btf_maps::{self, ArrayOfMaps},
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, RingBuf},
};

use agent_ebpf::{
    counters::COUNTERS,
    limits::{
        BLOCK_WORDS, CACHED_RULES, MAX_PROCESSES, MAX_SEGMENTS, MAX_TARGET_NAMES, MAX_TARGETS,
        MIN_RING_BYTES, SEGMENT_BLOCKS,
    },
    table::Space,
};

use crate::{
    sampling::{Clock, StackCopy},
    walk::{CachedRule, Walk},
};

/// Samples and stack copies on their way to the agent, which sets its size.
#[map]
pub static RING: RingBuf = RingBuf::with_byte_size(MIN_RING_BYTES, 0);

/// One slot a [`agent_ebpf::counters::Counter`].
#[map]
pub static COUNTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS, 0);

/// The state of the walk and the sample being built.
#[map]
pub static WALK: PerCpuArray<Walk> = PerCpuArray::with_max_entries(1, 0);

/// The stack copy that each CPU is building (too large for a per-CPU map). The agent sets the number
/// of CPUs.
#[map]
pub static STACK_COPY: Array<StackCopy> = Array::with_max_entries(1, 0);

/// When this CPU ticked last.
#[map]
pub static CLOCK: PerCpuArray<Clock> = PerCpuArray::with_max_entries(1, 0);

/// [`CACHED_RULES`] for each CPU, one after the other. The agent sets the number of CPUs.
#[map]
pub static CACHE: Array<CachedRule> = Array::with_max_entries(CACHED_RULES, 0);

/// Changes whenever a block may have come to hold something else: what was cached before is void.
#[map]
pub static GENERATION: Array<u32> = Array::with_max_entries(1, 0);

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

/// Nanoseconds between two ticks of a CPU.
#[unsafe(no_mangle)]
pub static PERIOD_NS: Global<u64> = Global::new(0);

/// 1: only [`TARGETS`] and [`TARGET_NAMES`] are sampled.
#[unsafe(no_mangle)]
pub static FILTER: Global<u8> = Global::new(0);

/// Offset of `tgid` in `struct task_struct`, bytes, from the kernel's BTF, as are the following.
#[unsafe(no_mangle)]
pub static TASK_TGID: Global<u32> = Global::new(0);
/// Offset of `flags` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_FLAGS: Global<u32> = Global::new(0);
/// Offset of `mm` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_MM: Global<u32> = Global::new(0);
/// Offset of the byte of `struct task_struct` that holds the bit field `in_execve`.
#[unsafe(no_mangle)]
pub static TASK_IN_EXECVE: Global<u32> = Global::new(0);
/// The bit in that byte; 0 where the kernel has no such field.
#[unsafe(no_mangle)]
pub static TASK_IN_EXECVE_MASK: Global<u8> = Global::new(0);
/// Offset of `signal` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_SIGNAL: Global<u32> = Global::new(0);
/// Offset of `live` in `struct signal_struct`.
#[unsafe(no_mangle)]
pub static SIGNAL_LIVE: Global<u32> = Global::new(0);
