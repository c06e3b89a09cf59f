//! A machine of many processors made small, so that a storm of 43 queries is one on it as well.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The processors of the demo's PostgreSQL, for which the scenario's figures are made.
pub const DEMO_CPUS: usize = 2;

/// Keeps this thread, and every process that it starts from now on, to the first `cpus` of the
/// processors that it may use.
pub fn pin(cpus: usize) -> Result<(), nix::Error> {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this)?;
    let mut chosen = CpuSet::new();
    let numbers = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    for cpu in numbers.take(cpus.max(1)) {
        chosen.set(cpu)?;
    }
    sched_setaffinity(this, &chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed() -> usize {
        let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
        (0..CpuSet::count())
            .filter(|cpu| set.is_set(*cpu).unwrap())
            .count()
    }

    /// A thread keeps to fewer processors, and never gets more than it had.
    #[test]
    fn a_thread_is_pinned() {
        // Its own thread, so that the other tests keep theirs.
        let pinned = std::thread::spawn(|| {
            let before = allowed();
            pin(before + 1).unwrap();
            assert_eq!(allowed(), before);
            pin(1).unwrap();
            allowed()
        });
        assert_eq!(pinned.join().unwrap(), 1);
    }
}
