//! Allocation of the blocks of the kernel's pool.

use std::collections::VecDeque;

use agent_ebpf::{
    limits::{MAX_SEGMENTS, SEGMENT_BLOCKS},
    table::BlockId,
};

/// Allocator of block ids. It does no I/O: the blocks themselves are written by
/// [`Kernel::write_block`](super::Kernel::write_block).
///
/// A block that is retired is used again only after every event up to that moment is known to have been
/// seen, because a process that was forked just before may still use it (see [`BlockPool::settle`]).
#[derive(Debug, Default)]
pub struct BlockPool {
    free: Vec<BlockId>,
    /// Retired blocks, with the time of their retirement in nanoseconds, oldest first.
    resting: VecDeque<(u64, Vec<BlockId>)>,
    next: BlockId,
}

impl BlockPool {
    /// Allocates `count` blocks; `None` if the pool is exhausted.
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

    /// Retires blocks at `time` (nanoseconds).
    pub fn retire(&mut self, time: u64, blocks: Vec<BlockId>) {
        if !blocks.is_empty() {
            self.resting.push_back((time, blocks));
        }
    }

    /// Frees blocks at once, to which nothing in the kernel ever referred.
    pub fn give_back(&mut self, blocks: Vec<BlockId>) {
        self.free.extend(blocks);
    }

    /// Frees the blocks that were retired before `time` (nanoseconds). To be called when every
    /// event before `time` has been seen.
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

    /// The number of blocks that are in use, or retired and not yet free.
    pub fn in_use(&self) -> usize {
        self.next as usize - self.free.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Retired blocks are used again only after [`BlockPool::settle`].
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
        pool.give_back(again);
        assert_eq!(pool.in_use(), 2);
    }

    /// No more blocks are allocated than the pool has.
    #[test]
    fn bounded() {
        let mut pool = BlockPool::default();
        let all = (MAX_SEGMENTS * SEGMENT_BLOCKS) as usize;
        assert!(pool.allocate(all + 1).is_none());
        assert!(pool.allocate(all).is_some());
        assert!(pool.allocate(1).is_none());
    }
}
