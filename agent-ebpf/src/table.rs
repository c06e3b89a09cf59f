//! Layout of the tables that the kernel programs search: everything is made of 2 KiB blocks from one
//! pool, named by a [`BlockId`].
//!
//! ```text
//! process map: pid → Space { mm, root, depth }
//!   space index block   128 × (start avma, child)          only with more than 64 mappings
//!   space leaf block    64 × MappingEntry (start, end, bias, tree, rules)
//!     tree: index blocks 256 × (first table address, child), `depth` levels of them
//!       leaf block      512 rows: table address (relative to the leaf's first) << 16 | rule
//!     rules: directory  512 × block of rules
//!       rule block      128 × Rule
//! ```
//!
//! A *table address* is `avma - mapping.bias`, which is svma minus the svma of the table's first
//! row; it fits in 32 bits. Every search is "the last entry not above the key", and unused slots at
//! a block's end repeat its last entry (rows) or hold the greatest key (indices) and repeat the last
//! child, so that a search needs no count.

use crate::{limits::BLOCK_WORDS, postgres::StatusRevision};

/// Number of a block in the pool: segment × [`crate::limits::SEGMENT_BLOCKS`] + slot.
pub type BlockId = u32;

/// A block of the pool.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Block(pub [u32; BLOCK_WORDS]);

const _: () = assert!(size_of::<Block>() == 2048);

/// Keys of an index block: its first 256 words are keys, the other 256 the children.
pub const INDEX_FANOUT: usize = 256;
/// Rows of a leaf block.
pub const LEAF_ROWS: usize = 512;
/// Rules of a rule block.
pub const RULES_PER_BLOCK: usize = 128;
/// Mappings of a space leaf block.
pub const SPACE_LEAF_MAPPINGS: usize = 64;
/// Children of a space index block: 128 starts (u64) and then 128 children (u32).
pub const SPACE_FANOUT: usize = 128;

/// A row packed for a leaf block: the address relative to the leaf's first row, and the rule.
pub const fn pack_row(offset: u16, rule: u16) -> u32 {
    (offset as u32) << 16 | rule as u32
}

/// Address space of a process: the value of the process map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Space {
    /// Identity of the address space that this describes (see [`crate::sample::SampleHeader::mm`]).
    pub mm: u64,
    /// A space leaf (`depth` 0) or a space index block (`depth` 1).
    pub root: BlockId,
    /// Index levels above the leaves.
    pub depth: u32,
    /// Number of this description; never 0. It is written once, and another has another number: what was found by it
    /// may be remembered under its number.
    pub number: u32,
    /// 1 + index of the PostgreSQL server that the process belongs to; 0: none.
    pub server: u32,
    /// Where its threads publish their trace context: offset of the variable `otel_thread_ctx_v1` from the
    /// thread pointer, bytes; 0: nowhere.
    pub trace_offset: i32,
    /// Unused, zero.
    pub padding: u32,
    /// What the sampling program notes of a backend; nothing when the agent writes.
    pub revision: StatusRevision,
}

const _: () = assert!(size_of::<Space>() == 56);

/// What the kernel does with an address in a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MappingKind {
    /// Search the file's table.
    Table = 0,
    /// No tables exist for this code (just-in-time compiled, or a file without `.eh_frame`):
    /// follow the frame pointer.
    FramePointer = 1,
    /// The file's table is not in the kernel (yet): leave the sample to user space.
    Pending = 2,
}

/// `tree` word of a mapping: kind in bits 31–30, index levels in bits 29–28, root block below.
pub const fn pack_tree(kind: MappingKind, depth: u32, root: BlockId) -> u32 {
    (kind as u32) << 30 | (depth & 3) << 28 | root & 0x0fff_ffff
}

/// Kind bits of a mapping's `tree` word.
pub const fn tree_kind(tree: u32) -> u32 {
    tree >> 30
}

/// Index levels of a mapping's `tree` word.
pub const fn tree_depth(tree: u32) -> u32 {
    tree >> 28 & 3
}

/// Root block of a mapping's `tree` word.
pub const fn tree_root(tree: u32) -> BlockId {
    tree & 0x0fff_ffff
}

/// A mapping, as a slot of a [`SpaceLeaf`] holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct MappingEntry {
    /// First avma.
    pub start: u64,
    /// First avma after it.
    pub end: u64,
    /// avma minus table address.
    pub bias: u64,
    /// See [`pack_tree`].
    pub tree: u32,
    /// Directory block of the file's rules.
    pub rules: BlockId,
}

/// A leaf of a process's address space: parallel arrays, sorted by start, unused slots at the end
/// with `start` = `u64::MAX` and `end` = 0.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct SpaceLeaf {
    /// First avma of each mapping.
    pub start: [u64; SPACE_LEAF_MAPPINGS],
    /// First avma after each mapping.
    pub end: [u64; SPACE_LEAF_MAPPINGS],
    /// avma minus table address.
    pub bias: [u64; SPACE_LEAF_MAPPINGS],
    /// See [`pack_tree`].
    pub tree: [u32; SPACE_LEAF_MAPPINGS],
    /// Directory block of the file's rules.
    pub rules: [BlockId; SPACE_LEAF_MAPPINGS],
}

const _: () = assert!(size_of::<SpaceLeaf>() == size_of::<Block>());

/// An index over space leaves, unused slots at the end with `start` = `u64::MAX` and the last child.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct SpaceIndex {
    /// First avma of each child's first mapping; slot 0 holds 0.
    pub start: [u64; SPACE_FANOUT],
    /// The space leaves.
    pub child: [BlockId; SPACE_FANOUT],
    /// Unused, zero.
    pub padding: [u32; SPACE_FANOUT],
}

const _: () = assert!(size_of::<SpaceIndex>() == size_of::<Block>());

/// One step of a search for "the last entry not above the key": from `position`, goes `stride`
/// (a power of two below 2¹²) on unless the entry there is above the key, told by `difference` =
/// key − entry, whose upper twelve bits are its sign.
///
/// There is no comparison in it: BPF has no conditional move, and every branch of an unrolled search
/// doubles the verifier's paths. The sign is taken as a mask of the bit that is wanted, because a
/// test of bit 63 alone is what compilers recognise and turn into a branch.
#[inline(always)]
const fn advance(position: u64, stride: u64, difference: u64) -> u64 {
    position | (stride & !(difference >> 52))
}

/// `key` as a number of which the compiler knows nothing: were it known to have 32 bits, the
/// compiler could turn [`advance`] into a branch again.
#[inline(always)]
fn opaque(key: u32) -> u64 {
    core::hint::black_box(key as u64)
}

/// Number of entries of a power of two, minus one, unknown to the compiler: it would otherwise prove
/// that the mask changes nothing and drop it. Older kernels (6.1) follow the bounds of an AND, but
/// not those of an OR of two unknown numbers (kernel/bpf/verifier.c, adjust_scalar_min_max_vals), so
/// they need to see it.
#[inline(always)]
fn mask<T>(entries: &[T]) -> u64 {
    assert!(entries.len().is_power_of_two());
    core::hint::black_box(entries.len() as u64 - 1)
}

/// The entry at `position`, which counts modulo the number of entries.
#[inline(always)]
fn entry<T: Copy>(entries: &[T], position: u64, mask: u64) -> T {
    // SAFETY: `mask` comes from the function above, so the index is below the length.
    unsafe { *entries.get_unchecked((position & mask) as usize) }
}

/// A row of a leaf block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Number of its rule.
    pub rule: u16,
    /// Bytes from the leaf's first row to this one.
    pub offset: u32,
    /// Bytes for which the leaf says that it is valid; 0: up to the next leaf, however far that is.
    pub length: u32,
}

/// The row of a leaf block that is valid `offset` bytes after the leaf's first row.
#[inline(always)]
pub fn search_rows(leaf: &Block, offset: u32) -> Row {
    let offset = if offset > 0xffff { 0xffff } else { offset };
    let key = opaque(offset << 16 | 0xffff);
    let rows = &leaf.0;
    let mask = mask(rows);
    let mut position = 0u64;
    let mut stride = LEAF_ROWS as u64 / 2;
    while stride > 0 {
        let row = entry(rows, position + stride, mask);
        position = advance(position, stride, key.wrapping_sub(row as u64));
        stride /= 2;
    }
    let row = entry(rows, position, mask);
    // The row after the last slot's is the first, which is not above it, and unused slots repeat the last row.
    let next = entry(rows, position + 1, mask);
    Row {
        rule: row as u16,
        offset: row >> 16,
        length: (next >> 16).saturating_sub(row >> 16),
    }
}

/// What [`search_index`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// The child block.
    pub child: BlockId,
    /// Table address of the child's first row.
    pub first: u32,
}

/// The child of an index block that covers the table address `key`, which is below `u32::MAX`, the
/// key of unused slots. (Text spans less.)
#[inline(always)]
pub fn search_index(index: &Block, key: u32) -> IndexEntry {
    let key = opaque(key);
    let (keys, children) = index.0.split_at(INDEX_FANOUT);
    let mask = mask(keys);
    let mut position = 0u64;
    let mut stride = INDEX_FANOUT as u64 / 2;
    while stride > 0 {
        let first = entry(keys, position + stride, mask);
        position = advance(position, stride, key.wrapping_sub(first as u64));
        stride /= 2;
    }
    IndexEntry {
        child: entry(children, position, mask),
        first: entry(keys, position, mask),
    }
}

/// Key minus entry for starts of mappings: in pages, which leaves twelve bits for the sign.
#[inline(always)]
const fn page_difference(avma: u64, start: u64) -> u64 {
    (avma >> 12).wrapping_sub(start >> 12)
}

/// The mapping in a space leaf that covers `avma`, if one does. Starts are multiples of
/// the page size (4 KiB), as mappings' are.
#[inline(always)]
pub fn search_space_leaf(leaf: &SpaceLeaf, avma: u64) -> Option<MappingEntry> {
    let mask = mask(&leaf.start);
    let mut position = 0u64;
    let mut stride = SPACE_LEAF_MAPPINGS as u64 / 2;
    while stride > 0 {
        let start = entry(&leaf.start, position + stride, mask);
        position = advance(position, stride, page_difference(avma, start));
        stride /= 2;
    }
    let mapping = MappingEntry {
        start: entry(&leaf.start, position, mask),
        end: entry(&leaf.end, position, mask),
        bias: entry(&leaf.bias, position, mask),
        tree: entry(&leaf.tree, position, mask),
        rules: entry(&leaf.rules, position, mask),
    };
    (mapping.start <= avma && avma < mapping.end).then_some(mapping)
}

/// The space leaf that holds the last mapping not above `avma`.
#[inline(always)]
pub fn search_space_index(index: &SpaceIndex, avma: u64) -> BlockId {
    let mask = mask(&index.start);
    let mut position = 0u64;
    let mut stride = SPACE_FANOUT as u64 / 2;
    while stride > 0 {
        let start = entry(&index.start, position + stride, mask);
        position = advance(position, stride, page_difference(avma, start));
        stride /= 2;
    }
    entry(&index.child, position, mask)
}

impl Block {
    /// A block of zeros: as a leaf, every address is invalid.
    pub const ZERO: Block = Block([0; BLOCK_WORDS]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A leaf of `used` rows, 3 bytes apart, padded as the layout says.
    fn leaf(used: usize) -> Block {
        let mut block = Block::ZERO;
        for (slot, word) in block.0.iter_mut().enumerate() {
            let row = slot.min(used - 1) as u16;
            *word = pack_row(row * 3, row + 1);
        }
        block
    }

    /// Every address finds the last row not above it, at every fill.
    #[test]
    fn rows() {
        for used in [1, 2, 3, 255, 256, 257, 511, 512] {
            let block = leaf(used);
            for offset in (0..used as u32 * 3 + 5).chain([0xfffe, 0xffff, 0x10000, u32::MAX]) {
                let expected = (offset / 3).min(used as u32 - 1) as u16 + 1;
                let row = search_rows(&block, offset);
                let is_last = usize::from(expected) == used;
                let expected = Row {
                    rule: expected,
                    offset: u32::from(expected - 1) * 3,
                    length: if is_last { 0 } else { 3 },
                };
                assert_eq!(row, expected, "{used} rows, offset {offset}");
            }
        }
    }

    /// The greatest offset is a row like any other.
    #[test]
    fn row_at_the_last_offset() {
        let mut block = leaf(1);
        for word in &mut block.0[1..] {
            *word = pack_row(0xffff, 7);
        }
        assert_eq!(search_rows(&block, 0xfffe).rule, 1);
        assert_eq!(search_rows(&block, 0xffff).rule, 7);
        assert_eq!(search_rows(&block, 0x1_0000).rule, 7);
    }

    /// Every key finds the last child not above it; unused slots are never found.
    #[test]
    fn index() {
        for used in [1usize, 2, 128, 255, 256] {
            let mut block = Block::ZERO;
            for slot in 0..INDEX_FANOUT {
                block.0[slot] = if slot < used {
                    slot as u32 * 1000
                } else {
                    u32::MAX
                };
                block.0[slot + INDEX_FANOUT] = slot as u32 + 5;
            }
            for key in (0..used as u32 * 1000 + 10)
                .step_by(37)
                .chain([999, 1000, u32::MAX - 1])
            {
                let slot = (key / 1000).min(used as u32 - 1);
                let expected = IndexEntry {
                    child: slot + 5,
                    first: slot * 1000,
                };
                assert_eq!(search_index(&block, key), expected, "{used}, key {key}");
            }
        }
    }

    /// A mapping is found from its first byte to its last, and nothing between two mappings.
    #[test]
    fn space() {
        for used in [0usize, 1, 2, 63, 64] {
            let mut leaf = SpaceLeaf {
                start: [u64::MAX; SPACE_LEAF_MAPPINGS],
                end: [0; SPACE_LEAF_MAPPINGS],
                bias: [0; SPACE_LEAF_MAPPINGS],
                tree: [0; SPACE_LEAF_MAPPINGS],
                rules: [0; SPACE_LEAF_MAPPINGS],
            };
            let first = 0x7f00_0000_0000u64;
            for slot in 0..used {
                leaf.start[slot] = first + slot as u64 * 0x3000;
                leaf.end[slot] = leaf.start[slot] + 0x1000;
            }
            for slot in 0..used {
                let start = leaf.start[slot];
                let found = search_space_leaf(&leaf, start).map(|mapping| mapping.start);
                assert_eq!(found, Some(leaf.start[slot]));
                let found = search_space_leaf(&leaf, start + 0xfff).map(|mapping| mapping.start);
                assert_eq!(found, Some(leaf.start[slot]));
                assert_eq!(search_space_leaf(&leaf, start + 0x1000), None);
            }
            for avma in [0, 1, first - 1, first + 64 * 0x3000, u64::MAX, 1 << 63] {
                assert_eq!(search_space_leaf(&leaf, avma), None, "{used}, {avma:#x}");
            }
        }
    }

    /// The child is the one with the last start not above the address.
    #[test]
    fn space_index() {
        let mut index = SpaceIndex {
            start: [u64::MAX; SPACE_FANOUT],
            child: [0; SPACE_FANOUT],
            padding: [0; SPACE_FANOUT],
        };
        for slot in 0..70 {
            index.start[slot] = slot as u64 * 0x10_0000;
            index.child[slot] = slot as u32 + 1;
        }
        assert_eq!(search_space_index(&index, 0), 1);
        assert_eq!(search_space_index(&index, 0xf_ffff), 1);
        assert_eq!(search_space_index(&index, 0x10_0000), 2);
        assert_eq!(search_space_index(&index, 69 * 0x10_0000), 70);
        assert_eq!(search_space_index(&index, (1 << 56) - 1), 70);
    }
}
