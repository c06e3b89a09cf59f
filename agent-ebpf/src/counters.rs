//! Counters that the kernel programs keep, with one slot for each CPU.

/// Index into the per-CPU array of counters. The counters that every sample updates come first, so that
/// they share a cache line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Counter {
    /// Timer ticks that ran the sampling program, whatever their result.
    Ticks,
    /// Ticks on an idle CPU.
    Idle,
    /// Ticks in a task that is not selected.
    Filtered,
    /// Samples handed to the ring buffer.
    Sampled,
    /// User frames unwound in the kernel.
    UserFrames,
    /// Nanoseconds that the sampling program took for ticks that became samples, from `bpf_ktime_get_ns` at
    /// its start and at its end.
    SampleNanos,
    /// Samples of processes of a PostgreSQL server.
    Backends,
    /// Nanoseconds spent on reading the state of backends.
    BackendNanos,
    /// Samples that were lost because the ring buffer was full.
    RingFull,
    /// Ticks that did not happen, counted when more than one and a half periods have passed since the
    /// previous tick. Either the timer was late (a stolen or halted virtual CPU, interrupts off), or the
    /// kernel skipped the program because another BPF program or a map system call was running on the CPU.
    MissedTicks,
    /// Stack copies handed to the ring buffer.
    StackCopies,
    /// Stack copies that were refused because this second's budget was spent.
    StackCopyBudget,
    /// Stack copies that were refused because the ring buffer was full, or half full in the case of a send.
    StackCopyRingFull,
    /// Forked processes for which the map of address spaces had no room.
    ProcessMapFull,
    /// Sends to PostgreSQL servers that were noted.
    Sends,
    /// Sends without a stack that were timed, one in sixteen.
    TimedSends,
    /// Nanoseconds spent on the sends counted by [`Counter::TimedSends`].
    SendNanos,
    /// Sends for which a stack was to be taken, within the budget.
    CallerStacks,
    /// Connections and backends for which a map had no room.
    ConnectionMapFull,
}

/// Number of counters.
pub const COUNTERS: u32 = Counter::ConnectionMapFull as u32 + 1;
