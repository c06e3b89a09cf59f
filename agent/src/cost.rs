//! Resources that the agent itself uses, the priorities of its threads, and CPU time that the hypervisor
//! took from the machine.

use std::fs;

/// A thread's priority while a recording runs. On an overloaded machine dozens of tasks wait for every CPU,
/// and a profiler with the same priority would lose samples exactly when they matter. The CPU time that the
/// agent takes is bounded and reported in the summary.
#[derive(Clone, Copy, Debug)]
pub enum Priority {
    /// For the thread that reads the samples, where no ordinary task may run in the middle of its system
    /// calls on maps: until such a call ends, the kernel skips kprobes on that CPU (kernel/bpf/syscall.c,
    /// `bpf_disable_instrumentation`), so that a send goes unnoted. The real-time policy that this needs
    /// leaves a twentieth of the CPU to others whatever the thread does (`sched_rt_runtime_us`).
    UnpreemptedReader,
    /// For the thread that reads the samples, which loses some if it waits for the CPU too long, and for the
    /// threads whose answers it waits for.
    Reader,
    /// For the thread that compiles tables, which at the start takes seconds.
    Compiler,
    /// That of other programs.
    Normal,
}

impl Priority {
    /// Gives this thread the priority. Without `CAP_SYS_NICE` this has no effect.
    pub fn apply(self) {
        let (policy, real_time, nice) = match self {
            // Threads and programs that this thread starts have the normal policy.
            Priority::UnpreemptedReader => (libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 1, -15),
            Priority::Reader => (libc::SCHED_OTHER, 0, -15),
            Priority::Compiler => (libc::SCHED_OTHER, 0, -10),
            Priority::Normal => (libc::SCHED_OTHER, 0, 0),
        };
        // SAFETY: the struct may be zero, because all of its members are numbers.
        let mut parameters: libc::sched_param = unsafe { std::mem::zeroed() };
        parameters.sched_priority = real_time;
        // SAFETY: both calls change only this thread's priority (Linux: 0 is the calling thread).
        unsafe {
            libc::sched_setscheduler(0, policy, &raw const parameters);
            libc::setpriority(libc::PRIO_PROCESS, 0, nice);
        }
    }
}

/// Does work that may take long, in which a real-time thread would keep other tasks from its CPU.
pub fn without_real_time<T>(work: impl FnOnce() -> T) -> T {
    let is_real_time = has_real_time();
    if is_real_time {
        Priority::Reader.apply();
    }
    let result = work();
    if is_real_time {
        Priority::UnpreemptedReader.apply();
    }
    result
}

fn has_real_time() -> bool {
    // SAFETY: a query without side effects.
    let policy = unsafe { libc::sched_getscheduler(0) };
    policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_FIFO
}

/// CPU time of this process so far, seconds: user and system time of all threads.
pub fn cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the struct is valid and is only written to; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Highest resident memory of this process so far, bytes (`VmHWM`).
pub fn max_rss_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| {
        line.trim()
            .trim_end_matches("kB")
            .trim()
            .parse::<u64>()
            .ok()
    });
    kib.unwrap_or(0) * 1024
}

/// CPU time that the hypervisor has taken from this machine since it started, seconds (the eighth
/// figure of the first line of `/proc/stat`, in clock ticks). `None` if it cannot be read.
pub fn steal_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let ticks: f64 = stat
        .lines()
        .next()?
        .split_whitespace()
        .nth(8)?
        .parse()
        .ok()?;
    // SAFETY: a query without side effects.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    (per_second > 0).then(|| ticks / per_second as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::now;

    /// A reader that is not to be preempted has a real-time policy, except during long work, and threads
    /// that it starts have none.
    #[test]
    fn real_time() {
        let test = || {
            Priority::UnpreemptedReader.apply();
            if !has_real_time() {
                eprintln!("skipped: real-time priority is not permitted (CAP_SYS_NICE)");
                return;
            }
            assert!(!without_real_time(has_real_time));
            assert!(has_real_time());
            assert!(!std::thread::spawn(has_real_time).join().unwrap());
            Priority::Normal.apply();
            assert!(!has_real_time());
            assert!(!without_real_time(has_real_time));
            assert!(!has_real_time());
        };
        // In a thread of its own, so that the priority ends with it.
        std::thread::spawn(test).join().unwrap();
    }

    /// Every figure can be read, and the clocks advance.
    #[test]
    fn own_figures() {
        let (time, cpu) = (now(), cpu_seconds());
        let memory = max_rss_bytes();
        assert!(memory > 100_000);
        let mut sum = 0u64;
        while cpu_seconds() <= cpu {
            sum = sum.wrapping_add(1);
        }
        assert!(now() > time);
        assert!(steal_seconds().is_some());
    }
}
