//! What the agent itself consumes, and what the machine lost meanwhile.

use std::fs;

/// Nice value of the threads that read and compile while a recording runs. On a machine on fire dozens
/// of tasks wait for every CPU; a profiler that waits in the same queue loses what it is there to see.
/// What it takes is bounded and told in the summary.
const RECORDING_NICE: i32 = -10;

/// Lets this thread go before others while it records, where that is allowed (`CAP_SYS_NICE`).
pub fn go_first() {
    set_nice(RECORDING_NICE);
}

/// Takes [`go_first`] back.
pub fn go_as_usual() {
    set_nice(0);
}

fn set_nice(nice: i32) {
    // SAFETY: changes only this thread's priority (Linux: who 0 is the calling thread).
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
}

/// CPU time of this process so far, user and system, all threads, seconds.
pub fn cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: as above.
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

/// CPU time that the hypervisor took from this machine since it started, seconds (the eighth figure
/// of the first line of `/proc/stat`, in clock ticks).
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

    /// The figures are there and grow.
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
