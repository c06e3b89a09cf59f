//! Lays out the mappings of a process in blocks: space leaves, and one space index above them if there are
//! more than 64 mappings.

use agent_ebpf::limits::MAX_MAPPINGS;
pub use agent_ebpf::table::MappingEntry;
use agent_ebpf::table::{Block, BlockId, SPACE_FANOUT, SPACE_LEAF_MAPPINGS, SpaceIndex, SpaceLeaf};

/// A block of a process's address space.
#[derive(Clone, Copy)]
pub enum SpaceBlock {
    /// Mappings.
    Leaf(SpaceLeaf),
    /// An index over leaves.
    Index(SpaceIndex),
}

impl SpaceBlock {
    /// The block's words, as they are written into the pool.
    pub fn block(&self) -> Block {
        let mut block = Block::ZERO;
        let mut words = block.0.iter_mut();
        let mut put = |word: u32| {
            if let Some(slot) = words.next() {
                *slot = word;
            }
        };
        // Little endian, as x86_64 and aarch64 are.
        let halves = |word: u64| [word as u32, (word >> 32) as u32];
        match self {
            SpaceBlock::Leaf(leaf) => {
                for column in [&leaf.start, &leaf.end, &leaf.bias] {
                    column.iter().flat_map(|w| halves(*w)).for_each(&mut put);
                }
                leaf.tree.iter().chain(&leaf.rules).copied().for_each(put);
            }
            SpaceBlock::Index(index) => {
                index
                    .start
                    .iter()
                    .flat_map(|w| halves(*w))
                    .for_each(&mut put);
                index.child.iter().copied().for_each(put);
            }
        }
        block
    }
}

/// Where an address space was placed, for the fields of the same names in [`agent_ebpf::table::Space`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// The index block, or the only leaf.
    pub root: BlockId,
    /// Index levels above the leaves.
    pub depth: u32,
}

/// The mappings for which there is room: at most the first [`MAX_MAPPINGS`].
pub fn placeable(mappings: &[MappingEntry]) -> &[MappingEntry] {
    &mappings[..mappings.len().min(MAX_MAPPINGS)]
}

/// Number of blocks that [`write()`] needs for this many mappings.
pub fn blocks(mappings: usize) -> usize {
    let leaves = mappings.min(MAX_MAPPINGS).div_ceil(SPACE_LEAF_MAPPINGS);
    if leaves > 1 { leaves + 1 } else { 1 }
}

/// Passes the blocks of an address space to `write`, each with one of the `ids`; the index comes last.
/// `mappings` must be sorted by start and must not overlap.
///
/// # Panics
/// If there are fewer `ids` than [`blocks`] says.
pub fn write(
    mappings: &[MappingEntry],
    ids: &[BlockId],
    mut write: impl FnMut(BlockId, &SpaceBlock),
) -> Root {
    let mappings = placeable(mappings);
    assert!(ids.len() >= blocks(mappings.len()), "one id for each block");
    if mappings.len() <= SPACE_LEAF_MAPPINGS {
        write(ids[0], &SpaceBlock::Leaf(leaf(mappings)));
        return Root {
            root: ids[0],
            depth: 0,
        };
    }
    let mut index = SpaceIndex {
        start: [u64::MAX; SPACE_FANOUT],
        child: [0; SPACE_FANOUT],
        padding: [0; SPACE_FANOUT],
    };
    let chunks = mappings.chunks(SPACE_LEAF_MAPPINGS);
    let leaves = chunks.len();
    for (slot, (chunk, id)) in chunks.zip(ids).enumerate() {
        write(*id, &SpaceBlock::Leaf(leaf(chunk)));
        index.start[slot] = if slot == 0 { 0 } else { chunk[0].start };
        // Unused slots repeat the last child.
        index.child[slot..].fill(*id);
    }
    write(ids[leaves], &SpaceBlock::Index(index));
    Root {
        root: ids[leaves],
        depth: 1,
    }
}

fn leaf(mappings: &[MappingEntry]) -> SpaceLeaf {
    let mut leaf = SpaceLeaf {
        start: [u64::MAX; SPACE_LEAF_MAPPINGS],
        end: [0; SPACE_LEAF_MAPPINGS],
        bias: [0; SPACE_LEAF_MAPPINGS],
        tree: [0; SPACE_LEAF_MAPPINGS],
        rules: [0; SPACE_LEAF_MAPPINGS],
    };
    for (slot, mapping) in mappings.iter().enumerate() {
        leaf.start[slot] = mapping.start;
        leaf.end[slot] = mapping.end;
        leaf.bias[slot] = mapping.bias;
        leaf.tree[slot] = mapping.tree;
        leaf.rules[slot] = mapping.rules;
    }
    leaf
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_ebpf::table::{search_space_index, search_space_leaf};
    use std::collections::HashMap;

    /// Every mapping is found through the blocks, with its own operands, whatever the number of mappings.
    #[test]
    fn every_mapping_is_found() {
        for count in [0usize, 1, 64, 65, 128, 129, MAX_MAPPINGS, MAX_MAPPINGS + 3] {
            let mappings: Vec<MappingEntry> = (0..count as u64)
                .map(|n| MappingEntry {
                    start: 0x40_0000 + n * 0x3000,
                    end: 0x40_0000 + n * 0x3000 + 0x2000,
                    bias: n,
                    tree: n as u32 * 2,
                    rules: n as u32 * 3,
                })
                .collect();
            let ids: Vec<BlockId> = (0..blocks(count) as u32).map(|n| n * 7 + 1).collect();
            let mut pool = HashMap::new();
            let space = write(&mappings, &ids, |id, block| {
                pool.insert(id, *block);
            });
            assert_eq!(pool.len(), ids.len());
            for (index, mapping) in mappings.iter().enumerate() {
                for avma in [mapping.start, mapping.end - 1] {
                    let found = find(&pool, space, avma);
                    let expected = (index < MAX_MAPPINGS).then_some(*mapping);
                    assert_eq!(found, expected, "{count} mappings, number {index}");
                }
                assert_eq!(find(&pool, space, mapping.end), None);
            }
            assert_eq!(find(&pool, space, 0), None);
            assert_eq!(find(&pool, space, 1 << 55), None);
        }
    }

    fn find(pool: &HashMap<BlockId, SpaceBlock>, space: Root, avma: u64) -> Option<MappingEntry> {
        let id = match (space.depth, &pool[&space.root]) {
            (1, SpaceBlock::Index(index)) => search_space_index(index, avma),
            _ => space.root,
        };
        let SpaceBlock::Leaf(leaf) = &pool[&id] else {
            panic!("expected a leaf, found an index");
        };
        search_space_leaf(leaf, avma)
    }

    /// The words of a block are those of the struct [`SpaceLeaf`] in memory.
    #[test]
    fn words_have_the_layout_of_the_struct() {
        let mut one = leaf(&[]);
        one.start[0] = 0x1122_3344_5566_7788;
        one.end[1] = 2 << 32;
        one.bias[63] = 3;
        one.tree[5] = 4;
        one.rules[63] = 5;
        let words = SpaceBlock::Leaf(one).block().0;
        assert_eq!(words[..2], [0x5566_7788, 0x1122_3344]);
        assert_eq!(words[std::mem::offset_of!(SpaceLeaf, end) / 4 + 3], 2);
        assert_eq!(words[std::mem::offset_of!(SpaceLeaf, bias) / 4 + 126], 3);
        assert_eq!(words[std::mem::offset_of!(SpaceLeaf, tree) / 4 + 5], 4);
        assert_eq!(words[511], 5);
    }
}
