//! Every map, and the constants that the agent sets before loading.

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
    postgres::{BackendKey, Budget, Connection, Served, Server, WallClock},
    table::Space,
};

use crate::{
    backend::{Backend, Known},
    caller::Ring,
    sampling::StackCopy,
    walk::{Cache, SLOTS, Walk},
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
pub static STACK_COPY: Array<StackCopy> = Array::with_max_entries(1, 0);

/// [`CACHES`] for each walk of each CPU, one after the other. The agent sets the number.
#[map]
pub static CACHE: Array<Cache> = Array::with_max_entries(CACHES, 0);

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
pub static SERVERS: Array<Server> = Array::with_max_entries(MAX_SERVERS, 0);

/// TCP ports on which they listen: a bit each.
#[map]
pub static SERVER_PORTS: Array<u64> = Array::with_max_entries(65_536 / 64, 0);

/// What a backend says, being built.
#[map]
pub static BACKEND: PerCpuArray<Backend> = PerCpuArray::with_max_entries(1, 0);

/// What is known of backends that were sampled, by pid.
#[map]
pub static KNOWN: LruHashMap<u32, Known> = LruHashMap::with_max_entries(MAX_BACKENDS, 0);

/// The connection of each backend, for its parallel workers.
#[map]
pub static BACKENDS: LruHashMap<BackendKey, Served> = LruHashMap::with_max_entries(MAX_BACKENDS, 0);

/// The last sends on each connection.
#[map]
pub static CONNECTIONS: LruHashMap<Connection, Ring> =
    LruHashMap::with_max_entries(MAX_CONNECTIONS, 0);

/// A connection without sends (too large for the programs' stack).
#[map]
pub static NEW_RING: Array<Ring> = Array::with_max_entries(1, 0);

/// What is left of each CPU's budget of stacks at sends, and how long they took.
#[map]
pub static CALLER_BUDGET: PerCpuArray<Budget> = PerCpuArray::with_max_entries(1, 0);

/// The wall clock, kept true by the agent.
#[map]
pub static WALL_CLOCK: Array<WallClock> = Array::with_max_entries(1, 0);

/// 1: the kernel has `bpf_ktime_get_tai_ns` (Linux 6.1).
#[unsafe(no_mangle)]
pub static HAS_TAI_CLOCK: Global<u8> = Global::new(0);

/// Stacks at sends that a CPU may take in a [`crate::caller::WINDOW`].
#[unsafe(no_mangle)]
pub static CALLERS_PER_WINDOW: Global<u32> = Global::new(0);

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
/// Offset of `start_time` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_START_TIME: Global<u32> = Global::new(0);
/// Offset of `files` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_FILES: Global<u32> = Global::new(0);
/// Offset of `thread.fsbase` in `struct task_struct`.
#[unsafe(no_mangle)]
pub static TASK_FSBASE: Global<u32> = Global::new(0);
/// Offset of `fdt` in `struct files_struct`.
#[unsafe(no_mangle)]
pub static FILES_FDT: Global<u32> = Global::new(0);
/// Offset of `max_fds` in `struct fdtable`.
#[unsafe(no_mangle)]
pub static FDTABLE_MAX_FDS: Global<u32> = Global::new(0);
/// Offset of `fd` in `struct fdtable`.
#[unsafe(no_mangle)]
pub static FDTABLE_FD: Global<u32> = Global::new(0);
/// Offset of `f_inode` in `struct file`.
#[unsafe(no_mangle)]
pub static FILE_INODE: Global<u32> = Global::new(0);
/// Offset of `private_data` in `struct file`.
#[unsafe(no_mangle)]
pub static FILE_PRIVATE_DATA: Global<u32> = Global::new(0);
/// Offset of `i_mode` in `struct inode`.
#[unsafe(no_mangle)]
pub static INODE_MODE: Global<u32> = Global::new(0);
/// Offset of `sk` in `struct socket`.
#[unsafe(no_mangle)]
pub static SOCKET_SK: Global<u32> = Global::new(0);
/// Offset of `skc_family` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_FAMILY: Global<u32> = Global::new(0);
/// Offset of `skc_num` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_NUM: Global<u32> = Global::new(0);
/// Offset of `skc_dport` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_DPORT: Global<u32> = Global::new(0);
/// Offset of `skc_rcv_saddr` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_RCV_SADDR: Global<u32> = Global::new(0);
/// Offset of `skc_daddr` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_DADDR: Global<u32> = Global::new(0);
/// Offset of `skc_v6_rcv_saddr` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_V6_RCV_SADDR: Global<u32> = Global::new(0);
/// Offset of `skc_v6_daddr` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_V6_DADDR: Global<u32> = Global::new(0);
/// Offset of `skc_net` in `struct sock_common`.
#[unsafe(no_mangle)]
pub static SOCK_NET: Global<u32> = Global::new(0);
/// Offset of `ns.inum` in `struct net`.
#[unsafe(no_mangle)]
pub static NET_NS_INUM: Global<u32> = Global::new(0);
/// Offset of `peer` in `struct unix_sock`.
#[unsafe(no_mangle)]
pub static UNIX_SOCK_PEER: Global<u32> = Global::new(0);
/// Offset of `addr` in `struct unix_sock`.
#[unsafe(no_mangle)]
pub static UNIX_SOCK_ADDR: Global<u32> = Global::new(0);
/// Offset of `len` in `struct unix_address`.
#[unsafe(no_mangle)]
pub static UNIX_ADDRESS_LENGTH: Global<u32> = Global::new(0);
/// Offset of `name` in `struct unix_address`.
#[unsafe(no_mangle)]
pub static UNIX_ADDRESS_NAME: Global<u32> = Global::new(0);
/// Offset of `pids` in `struct signal_struct`.
#[unsafe(no_mangle)]
pub static SIGNAL_PIDS: Global<u32> = Global::new(0);
/// Offset of `level` in `struct pid`.
#[unsafe(no_mangle)]
pub static PID_LEVEL: Global<u32> = Global::new(0);
/// Offset of `numbers` in `struct pid`.
#[unsafe(no_mangle)]
pub static PID_NUMBERS: Global<u32> = Global::new(0);
/// Offset of `arg_start` in `struct mm_struct`.
#[unsafe(no_mangle)]
pub static MM_ARG_START: Global<u32> = Global::new(0);
