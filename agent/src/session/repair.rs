//! Which processes are read again, because events of theirs were missed or because their samples are where nothing
//! is known to be mapped.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::process::Registry;

/// Processes that are read again in one cycle: some milliseconds of work.
const A_CYCLE: usize = 16;

/// Samples of a process at unknown addresses after which it is read again: a stack that is broken has one now and
/// then.
const MISSES: u32 = 4;

/// Shortest time between two readings of a process for that, nanoseconds. It doubles when nothing new was found.
const REST: u64 = 1_000_000_000;

/// It doubles up to this.
const LONGEST_REST: u64 = 256 * REST;

/// Processes whose misses are counted. When there are more, counting begins anew.
const MAX_MISSED: usize = 4096;

/// What a process has missed.
#[derive(Clone, Copy, Debug)]
struct MissCount {
    /// Samples at unknown addresses since it was read.
    samples: u32,
    /// When it may be read again, nanoseconds.
    next: u64,
    rest: u64,
}

impl MissCount {
    /// No sample missed so far; it may be read at once.
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
    /// Events were missed, of nobody knows which process: all are read, those that are sampled and the youngest
    /// first.
    pub fn everything(&mut self, registry: &Registry) {
        for pid in registry.youngest_first() {
            if self.queued.insert(pid) {
                self.queue.push_back(pid);
            }
        }
    }

    /// A sample was taken at an address where nothing is known to be mapped, or in a process that is known to have
    /// ended.
    pub fn missed(&mut self, pid: u32, time: u64) {
        // Events were missed: it is in the queue, and is sampled, so it comes first.
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

    /// The mappings of a process are not all known, or not all of those that are known are there any more: it is read
    /// again after those that are sampled. While too many are counted it waits.
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

    /// Those to read in this cycle.
    pub fn due(&mut self) -> Vec<u32> {
        let due: Vec<u32> = self.queue.drain(..self.queue.len().min(A_CYCLE)).collect();
        for pid in &due {
            self.queued.remove(pid);
        }
        due
    }

    /// A process was read again at `time` (nanoseconds), and had or had not changed.
    pub fn done(&mut self, pid: u32, changed: bool, time: u64) {
        if let Some(missed) = self.missed.get_mut(&pid) {
            missed.rest = match changed {
                true => REST,
                false => (2 * missed.rest).min(LONGEST_REST),
            };
            missed.next = time + missed.rest;
        }
    }

    /// A process has ended.
    pub fn forget(&mut self, pid: u32) {
        self.missed.remove(&pid);
    }

    /// Forgets those that live no more, though samples of theirs came late.
    pub fn forget_ended(&mut self, registry: &Registry) {
        self.missed.retain(|pid, _| registry.living(*pid).is_some());
    }

    /// Processes that wait to be read, and those whose misses are counted.
    pub fn sizes(&self) -> (usize, usize) {
        (self.queue.len(), self.missed.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A process is read after some misses, then not again at once, and less and less often while nothing is found.
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

    /// After a loss a few are read in each cycle, the one that is sampled first.
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
