//! Every bound that the kernel programs and the agent share, with its reason.

/// User frames that one sample can hold.
///
/// The deepest stacks seen in practice (recursive parsers, interpreters) have fewer frames. With this bound
/// a sample takes at most about 9 KiB of the ring buffer. A deeper stack loses its root end and is marked
/// [`crate::sample::Outcome::TooDeep`].
pub const MAX_USER_FRAMES: u32 = 1024;

/// Kernel frames that one sample can hold. This is the kernel's own default limit, `PERF_MAX_STACK_DEPTH`
/// (`kernel.perf_event_max_stack` = 127).
pub const MAX_KERNEL_FRAMES: u32 = 127;

/// Number of 32-bit words in a block (2 KiB). A block is small enough that a small file wastes little
/// memory, and large enough that nine steps of binary search need only the one helper call that reaches the
/// block.
pub const BLOCK_WORDS: usize = 512;

/// Blocks in one segment (1 MiB). Kernel memory for tables grows by whole segments.
pub const SEGMENT_BLOCKS: u32 = 512;

/// Most segments (256 MiB of tables). Chromium needs about 20; PostgreSQL and libc together need 1.
pub const MAX_SEGMENTS: u32 = 256;

/// Most index levels above the leaves of a file's table. Two levels allow 256 × 256 × 512 rows, more than
/// the largest binaries have (Chromium: about 4 million).
pub const MAX_TABLE_DEPTH: u32 = 2;

/// Most distinct rules of one file: 512 blocks of 128 rules, since their directory is one block of 512
/// entries.
pub const MAX_RULES: usize = 65_536;

/// Most executable mappings of one process: one index block of 128 leaves, each with 64 mappings.
pub const MAX_MAPPINGS: usize = 128 * 64;

/// Most processes whose tables the kernel has at the same time. Samples of further processes are not lost:
/// each carries a copy of the top of its stack, from which user space unwinds it.
pub const MAX_PROCESSES: u32 = 16_384;

/// Most processes that `--pid`, `--comm` and `-- COMMAND` can select, including their descendants.
pub const MAX_TARGETS: u32 = 16_384;

/// Most names that `--comm` can select.
pub const MAX_TARGET_NAMES: u32 = 64;

/// Most bytes of user stack that are copied with a sample that the kernel could not unwind to its end; a
/// multiple of [`STACK_CHUNK`]. Only the live part of the stack is copied. It is a few KiB in most
/// programs, and more in recursive ones such as compilers.
pub const MAX_STACK_COPY: usize = 64 * 1024;

/// Bytes that are copied at once (a page). Copying in pieces lets the copy end where the mapping of the
/// stack ends.
pub const STACK_CHUNK: usize = 4096;

/// Smallest size of the ring buffer between kernel and agent, bytes.
pub const MIN_RING_BYTES: u32 = 1024 * 1024;

/// Largest size of the ring buffer, bytes.
pub const MAX_RING_BYTES: u32 = 64 * 1024 * 1024;

/// Size of the ring buffer in bytes, for this many CPUs and this many samples per second and CPU. It has
/// room for an eighth of a second in which samples, and sends of a program that the agent does not know
/// yet, carry the largest stack copies as often as the budget allows. The agent reads ten times a second,
/// and at once when there is a stack copy.
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

/// Most stack copies that a CPU may send in one second for samples, and as many again for sends. At the
/// default 99 Hz samples never reach it; at 10 kHz it keeps the copies from flooding the ring buffer.
/// Refused copies are counted.
pub const STACK_COPIES_PER_SECOND: u32 = 256;

/// Rule caches for each walk of a CPU, 8.3 KiB each. An address space uses the one that the hash of its
/// number selects. The caches pay off because the callers near the root are the same in sample after
/// sample, and a search for a rule touches some fifteen cache lines.
pub const CACHES: u32 = 8;

/// Most PostgreSQL servers that are known at the same time. Processes of further servers are sampled like
/// those of any other program.
pub const MAX_SERVERS: u32 = 256;

/// Most connections to servers whose last sends are remembered. The least recently used one is evicted first.
pub const MAX_CONNECTIONS: u32 = 1024;

/// Sends that each connection remembers. Of the sends before an answer (pipelining) at most half as many
/// are kept; the last of those slots is overwritten by each further send.
pub const SENDS: usize = 8;

/// Most frames of a caller's stack; a deeper one loses its root end. Stacks of async Rust services have
/// about forty frames.
pub const MAX_CALLER_FRAMES: usize = 128;

/// Most server processes whose facts are cached, and whose connection is remembered for their parallel
/// workers. The least recently used ones are evicted first.
pub const MAX_BACKENDS: u32 = 8192;

/// Default number of stacks at sends that each CPU may take in one second (`--caller-stacks`). At two sends
/// for each query it suffices for 2,000 queries a second on one CPU.
pub const CALLER_STACKS_PER_SECOND: u32 = 4096;

/// Stands for the offset of a member that the running kernel's struct does not have.
pub const ABSENT_FIELD: u32 = u32::MAX;
