//! Chooses the processes that are read again from `/proc`, because events of them were missed, or because
//! samples of them lie where no mapping is known.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::process::Registry;

/// Maximum number of processes that are read again in one cycle; together they take some milliseconds.
const A_CYCLE: usize = 16;

/// Number of samples at unknown addresses after which their process is read again. A single one proves
/// nothing: broken stacks lead to such an address now and then.
const MISSES: u32 = 4;

/// Shortest time between two reads of a process because of such samples, nanoseconds. The time doubles each
/// time that nothing new is found.
const REST: u64 = 1_000_000_000;

/// The longest time between two reads, nanoseconds.
const LONGEST_REST: u64 = 256 * REST;

/// Maximum number of processes whose misses are counted. When it is reached, all counts are cleared.
const MAX_MISSED: usize = 4096;

/// Evidence that mappings of a process are not known.
#[derive(Clone, Copy, Debug)]
struct MissCount {
    /// Samples at unknown addresses since the process was last read.
    samples: u32,
    /// When the process may be read again, nanoseconds.
    next: u64,
    /// The present minimum time between two reads, nanoseconds.
    rest: u64,
}

impl MissCount {
    /// No misses so far; the process may be read at once.
    const NOTHING: MissCount = MissCount {
        samples: 0,
        next: 0,
        rest: REST,
    };
}

/// The processes that are to be read again.
#[derive(Debug, Default)]
pub struct Repair {
    queue: VecDeque<u32>,
    queued: HashSet<u32>,
    missed: HashMap<u32, MissCount>,
}

impl Repair {
    /// Events were lost, and it is not known of which processes. All processes are read again: those that
    /// are being sampled first (see [`Repair::missed`]), then the youngest.
    pub fn everything(&mut self, registry: &Registry) {
        for pid in registry.youngest_first() {
            if self.queued.insert(pid) {
                self.queue.push_back(pid);
            }
        }
    }

    /// Counts a sample at an address where no mapping is known, or in a process that is known to have
    /// ended.
    pub fn missed(&mut self, pid: u32, time: u64) {
        // The process waits in the queue already. It is being sampled, so it moves to the front.
        if self.queued.contains(&pid) {
            if self.queue.front() != Some(&pid) {
                self.queue.retain(|queued| *queued != pid);
                self.queue.push_front(pid);
            }
            return;
        }
        if self.missed.len() >= MAX_MISSED {
            self.missed.clear();
        }
        let missed = self.missed.entry(pid).or_insert(MissCount::NOTHING);
        missed.samples = missed.samples.saturating_add(1);
        if missed.samples >= MISSES && time >= missed.next {
            missed.samples = 0;
            self.queued.insert(pid);
            self.queue.push_front(pid);
        }
    }

    /// Queues a process whose known mappings may be incomplete or outdated, behind those that are being
    /// sampled. If too many processes are counted already, it waits.
    pub fn incomplete(&mut self, pid: u32, time: u64) {
        let is_counted = self.missed.contains_key(&pid);
        if self.queued.contains(&pid) || !is_counted && self.missed.len() >= MAX_MISSED {
            return;
        }
        let missed = self.missed.entry(pid).or_insert(MissCount::NOTHING);
        if time >= missed.next {
            self.queued.insert(pid);
            self.queue.push_back(pid);
        }
    }

    /// Takes the processes that are to be read in this cycle.
    pub fn due(&mut self) -> Vec<u32> {
        let due: Vec<u32> = self.queue.drain(..self.queue.len().min(A_CYCLE)).collect();
        for pid in &due {
            self.queued.remove(pid);
        }
        due
    }

    /// Notes that a process was read again at `time` (nanoseconds), and whether its mappings had changed.
    pub fn done(&mut self, pid: u32, changed: bool, time: u64) {
        if let Some(missed) = self.missed.get_mut(&pid) {
            missed.rest = match changed {
                true => REST,
                false => (2 * missed.rest).min(LONGEST_REST),
            };
            missed.next = time + missed.rest;
        }
    }

    /// Forgets a process that has ended.
    pub fn forget(&mut self, pid: u32) {
        self.missed.remove(&pid);
    }

    /// Forgets processes that have ended, and were entered again by samples that were read late.
    pub fn forget_ended(&mut self, registry: &Registry) {
        self.missed.retain(|pid, _| registry.living(*pid).is_some());
    }

    /// The numbers of queued processes, and of processes whose misses are counted.
    pub fn sizes(&self) -> (usize, usize) {
        (self.queue.len(), self.missed.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process is read after some misses, not again at once, and at growing intervals while nothing new
    /// is found.
    #[test]
    fn repeated_misses() {
        let mut repair = Repair::default();
        let misses = |repair: &mut Repair, time| {
            for _ in 0..MISSES {
                repair.missed(7, time);
            }
            repair.due()
        };
        repair.missed(7, 0);
        assert!(repair.due().is_empty());
        assert_eq!(misses(&mut repair, 0), [7]);
        repair.done(7, false, 0);
        assert!(misses(&mut repair, REST).is_empty());
        assert_eq!(misses(&mut repair, 2 * REST), [7]);
        repair.done(7, false, 2 * REST);
        assert!(misses(&mut repair, 5 * REST).is_empty());
        assert_eq!(misses(&mut repair, 6 * REST), [7]);
        repair.done(7, true, 6 * REST);
        assert_eq!(misses(&mut repair, 7 * REST), [7]);
        repair.forget(7);
        assert_eq!(repair.sizes(), (0, 0));
    }

    /// After a loss a few processes are read in each cycle, beginning with the one that is sampled.
    #[test]
    fn a_loss() {
        let mut repair = Repair::default();
        for pid in 0..40 {
            repair.queued.insert(pid);
            repair.queue.push_back(pid);
        }
        repair.missed(33, 0);
        let due = repair.due();
        assert_eq!((due.len(), due[0], due[1]), (A_CYCLE, 33, 0));
        assert_eq!(repair.due().len() + repair.due().len(), 40 - A_CYCLE);
        assert!(repair.due().is_empty());
    }
}
