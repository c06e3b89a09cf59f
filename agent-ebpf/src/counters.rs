//! Counters that the kernel programs keep, one slot a CPU each.

/// Index into the per-CPU counter array. What every sample counts comes first: it shares a cache line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Timer ticks that ran the program, whatever came of them.
    Ticks,
    /// Ticks on an idle CPU.
    Idle,
    /// Ticks in a process that is not a target.
    Filtered,
    /// Samples handed to the ring buffer.
    Sampled,
    /// User frames unwound in the kernel.
    UserFrames,
    /// Nanoseconds spent in the program by ticks that became samples (`bpf_ktime_get_ns` at its
    /// start and end).
    SampleNanos,
    /// Samples of processes of a PostgreSQL server.
    Backends,
    /// Nanoseconds that reading a backend's state took.
    BackendNanos,
    /// Samples that the full ring buffer refused.
    RingFull,
    /// Ticks that did not come: the distance to the tick before was longer than a period and a
    /// half. The timer was late (a stolen or halted virtual CPU, interrupts off), or the kernel
    /// skipped the program because another BPF program or a map system call held the CPU.
    MissedTicks,
    /// Stack copies handed to the ring buffer.
    StackCopies,
    /// Stack copies that the budget per second refused.
    StackCopyBudget,
    /// Stack copies that the full ring buffer refused.
    StackCopyRingFull,
    /// Forked processes for which the process map had no room.
    ProcessMapFull,
    /// Sends to PostgreSQL servers.
    Sends,
    /// Sends that were timed, of those whose stack was not taken.
    TimedSends,
    /// Nanoseconds spent at these.
    SendNanos,
    /// Stacks taken at sends.
    CallerStacks,
    /// Connections and backends for which there was no room.
    ConnectionMapFull,
}

/// How many counters there are.
pub const COUNTERS: u32 = Counter::ConnectionMapFull as u32 + 1;
