//! Which blocks of the kernel's pool are in use.

use std::collections::VecDeque;

use agent_ebpf::{
    limits::{MAX_SEGMENTS, SEGMENT_BLOCKS},
    table::BlockId,
};

/// Allocator of block ids. Pure: the blocks themselves are written elsewhere.
///
/// A block that is given back is used again only after every event up to that moment is known to
/// have been seen: a process forked just before may still use it (see [`BlockPool::settle`]).
#[derive(Debug, Default)]
pub struct BlockPool {
    free: Vec<BlockId>,
    /// Blocks given back, with the time of it in nanoseconds, oldest first.
    resting: VecDeque<(u64, Vec<BlockId>)>,
    next: BlockId,
}

impl BlockPool {
    /// Takes `count` blocks; `None` when the pool's bound is reached.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<BlockId>> {
        let left = (MAX_SEGMENTS * SEGMENT_BLOCKS - self.next) as usize;
        if self.free.len() + left < count {
            return None;
        }
        let reused = self.free.len().saturating_sub(count);
        let mut blocks = self.free.split_off(reused);
        while blocks.len() < count {
            blocks.push(self.next);
            self.next += 1;
        }
        Some(blocks)
    }

    /// Gives blocks back at `time` (nanoseconds).
    pub fn retire(&mut self, time: u64, blocks: Vec<BlockId>) {
        if !blocks.is_empty() {
            self.resting.push_back((time, blocks));
        }
    }

    /// Every event before `time` has been seen: what was given back before it is free.
    pub fn settle(&mut self, time: u64) {
        while let Some((retired, _)) = self.resting.front() {
            if *retired >= time {
                break;
            }
            if let Some((_, blocks)) = self.resting.pop_front() {
                self.free.extend(blocks);
            }
        }
    }

    /// Blocks in use or resting.
    pub fn in_use(&self) -> usize {
        self.next as usize - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks come back only after they have rested.
    #[test]
    fn rest() {
        let mut pool = BlockPool::default();
        let first = pool.allocate(3).unwrap();
        assert_eq!(first, [0, 1, 2]);
        pool.retire(10, first);
        assert_eq!(pool.allocate(1).unwrap(), [3]);
        pool.settle(10);
        assert_eq!(pool.allocate(1).unwrap(), [4]);
        pool.settle(11);
        let mut again = pool.allocate(4).unwrap();
        again.sort_unstable();
        assert_eq!(again, [0, 1, 2, 5]);
        assert_eq!(pool.in_use(), 6);
    }

    /// The bound is a bound.
    #[test]
    fn bounded() {
        let mut pool = BlockPool::default();
        let all = (MAX_SEGMENTS * SEGMENT_BLOCKS) as usize;
        assert!(pool.allocate(all + 1).is_none());
        assert!(pool.allocate(all).is_some());
        assert!(pool.allocate(1).is_none());
    }
}
