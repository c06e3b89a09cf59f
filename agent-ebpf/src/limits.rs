//! Every bound that the kernel side and the agent share, with its reason.

/// User frames that one sample can hold.
///
/// The deepest stacks seen in practice (recursive parsers, interpreters) stay under this; a sample
/// then takes at most about 9 KiB of the ring buffer. A deeper stack loses its root end and is
/// marked [`crate::sample::Outcome::TooDeep`].
pub const MAX_USER_FRAMES: u32 = 1024;

/// Kernel frames that one sample can hold: `PERF_MAX_STACK_DEPTH` is the kernel's own default limit
/// (`kernel.perf_event_max_stack` = 127).
pub const MAX_KERNEL_FRAMES: u32 = 127;

/// Words of a 2 KiB block: small enough that a small file wastes little, large enough that a
/// binary search inside it (nine steps) needs no helper call.
pub const BLOCK_WORDS: usize = 512;

/// Blocks in one segment (1 MiB), the unit in which kernel memory for tables grows.
pub const SEGMENT_BLOCKS: u32 = 512;

/// Segments at most (256 MiB of tables): Chromium needs about 20, PostgreSQL and libc together 1.
pub const MAX_SEGMENTS: u32 = 256;

/// Index levels above a leaf of a file's table: 256 × 256 × 512 rows are more than the largest
/// binaries have (Chromium: about 4 million).
pub const MAX_TABLE_DEPTH: u32 = 2;

/// Distinct rules of one file: 512 blocks of 128 (the directory is one block).
pub const MAX_RULES: usize = 65_536;

/// Executable mappings of one process: one index block over leaves of 64.
pub const MAX_MAPPINGS: usize = 128 * 64;

/// Processes whose tables the kernel knows at the same time. One more is not lost: its samples
/// carry the top of their stack and are unwound in user space.
pub const MAX_PROCESSES: u32 = 16_384;

/// Processes that `--pid`, `--comm` and `-- COMMAND` can select, with their descendants.
pub const MAX_TARGETS: u32 = 16_384;

/// Names that `--comm` can select.
pub const MAX_TARGET_NAMES: u32 = 64;

/// Bytes of user stack that accompany a sample which the kernel could not unwind to its end. A
/// multiple of [`STACK_CHUNK`]. What is copied is the live part of the stack, a few KiB in most
/// programs; a compiler's recursion takes more.
pub const MAX_STACK_COPY: usize = 64 * 1024;

/// The copy is made in pieces of this size (a page), so that it can end where the stack's mapping
/// ends.
pub const STACK_CHUNK: usize = 4096;

/// Bytes of the ring buffer between kernel and agent, at least.
pub const MIN_RING_BYTES: u32 = 1024 * 1024;

/// Bytes of the ring buffer, at most.
pub const MAX_RING_BYTES: u32 = 64 * 1024 * 1024;

/// Bytes of the ring buffer for this many CPUs and samples per second and CPU: room for an eighth of a
/// second in which every sample carries the largest stack copy, and so do the sends of a new program to a
/// server. The agent reads ten times a second, and at once when there is a stack copy.
pub const fn ring_bytes(cpus: u32, frequency: u32) -> u32 {
    let of_samples = if frequency < STACK_COPIES_PER_SECOND {
        frequency
    } else {
        STACK_COPIES_PER_SECOND
    };
    let copies = of_samples + STACK_COPIES_PER_SECOND;
    let a_second = cpus as u64 * (frequency as u64 * 1024 + copies as u64 * MAX_STACK_COPY as u64);
    let bytes = (a_second / 8).next_power_of_two();
    if bytes < MIN_RING_BYTES as u64 {
        MIN_RING_BYTES
    } else if bytes > MAX_RING_BYTES as u64 {
        MAX_RING_BYTES
    } else {
        bytes as u32
    }
}

/// Stack copies a CPU may send in one second, of samples and as many of sends: at the default 99 Hz it is never reached, at 10 kHz it
/// keeps broken stacks from flooding the ring buffer. What is refused is counted.
pub const STACK_COPIES_PER_SECOND: u32 = 256;

/// Caches of rules that each walk of a CPU has, 8.3 KiB each: address spaces share them by their numbers' hash. The
/// callers near the root are the same in sample after sample, and a search for a rule is some fifteen cache lines.
pub const CACHES: u32 = 8;

/// PostgreSQL servers known at the same time. The processes of one more are sampled like any others.
pub const MAX_SERVERS: u32 = 256;

/// Connections to servers whose last sends are remembered; the least recently used goes first.
pub const MAX_CONNECTIONS: u32 = 1024;

/// Sends that each connection remembers. A client that asks for more before the first is answered
/// (pipelining) loses the first's caller.
pub const SENDS: usize = 8;

/// Frames of a caller's stack: the root end of a deeper one is missing. Stacks of async Rust services have
/// about forty.
pub const MAX_CALLER_FRAMES: usize = 128;

/// Processes of servers whose connection is remembered for their parallel workers.
pub const MAX_BACKENDS: u32 = 8192;

/// Stacks at sends that each CPU may take in one second, when nothing else is asked for: at two sends a
/// query it suffices for 2,000 queries a second on one CPU.
pub const CALLER_STACKS_PER_SECOND: u32 = 4096;

/// Stands for the offset of a member that a kernel struct lacks.
pub const ABSENT_FIELD: u32 = u32::MAX;
