//! Layout of the tables that the kernel programs search, and the searches themselves. Everything is made of
//! 2 KiB blocks from one pool. A block is identified by its [`BlockId`].
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
//! A *table address* is `avma - mapping.bias`, which is svma minus the svma of the table's first row; it
//! fits in 32 bits. Every search finds the last entry that is not above the key. So that a search needs no
//! count of entries, the unused slots at the end of a leaf block repeat its last row, and those of an index
//! block have the greatest key and repeat the last child.

use crate::{limits::BLOCK_WORDS, postgres::StatusRevision};

/// Number of a block in the pool: segment × [`crate::limits::SEGMENT_BLOCKS`] + slot.
pub type BlockId = u32;

/// A block of the pool.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct Block(pub [u32; BLOCK_WORDS]);

const _: () = assert!(size_of::<Block>() == 2048);

/// Children of an index block: its first 256 words are the keys, the other 256 the children.
pub const INDEX_FANOUT: usize = 256;
/// Rows of a leaf block.
pub const LEAF_ROWS: usize = 512;
/// Rules of a rule block.
pub const RULES_PER_BLOCK: usize = 128;
/// Mappings of a space leaf block.
pub const SPACE_LEAF_MAPPINGS: usize = 64;
/// Children of a space index block: 128 starts (u64) and then 128 children (u32).
pub const SPACE_FANOUT: usize = 128;

/// Packs a row for a leaf block: its address relative to the leaf's first row, and the number of its rule.
pub const fn pack_row(offset: u16, rule: u16) -> u32 {
    (offset as u32) << 16 | rule as u32
}

/// Address space of a process: the value of the process map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Space {
    /// Identity of the address space that this describes (see [`crate::sample::SampleHeader::mm`]). 0 if
    /// the process was never sampled: then the entry only serves to be inherited by its children.
    pub mm: u64,
    /// A space leaf (`depth` 0) or a space index block (`depth` 1).
    pub root: BlockId,
    /// Index levels above the leaves.
    pub depth: u32,
    /// Number of this version of the space's blocks; never 0. The blocks are written once, and a new
    /// version gets a new number, so results of searches may be cached under the number.
    pub number: u32,
    /// 1 + index of the PostgreSQL server that the process belongs to; 0 if it belongs to none.
    pub server: u32,
    /// Where the process's threads publish their trace context: offset in bytes of the variable
    /// `otel_thread_ctx_v1` from the thread pointer; 0 if they do not.
    pub trace_offset: i32,
    /// Unused, zero.
    pub padding: u32,
    /// The sampling program stores here which revision of a backend's status it sent. The agent writes it
    /// as zero.
    pub revision: StatusRevision,
}

const _: () = assert!(size_of::<Space>() == 56);

/// What the kernel does with an address in a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MappingKind {
    /// Search the file's table.
    Table = 0,
    /// Follow the frame pointer, because no tables exist for this code (just-in-time compiled, or a file
    /// without `.eh_frame`).
    FramePointer = 1,
    /// Leave the sample to user space, because the file's table is not in the kernel (yet).
    Pending = 2,
}

/// Packs the `tree` word of a mapping: its kind in bits 31–30, the index levels in bits 29–28, the root
/// block below.
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

/// A mapping, as it is stored in a slot of a [`SpaceLeaf`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct MappingEntry {
    /// First avma of the mapping.
    pub start: u64,
    /// First avma after the mapping.
    pub end: u64,
    /// avma minus table address.
    pub bias: u64,
    /// See [`pack_tree`].
    pub tree: u32,
    /// Directory block of the file's rules.
    pub rules: BlockId,
}

/// A leaf of a process's address space: parallel arrays, sorted by start. Unused slots at the end have
/// `start` = `u64::MAX` and `end` = 0.
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

/// An index over space leaves. Unused slots at the end have `start` = `u64::MAX` and repeat the last child.
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

/// One step of a search for the last entry that is not above the key. It advances `position` by `stride` (a
/// power of two below 2¹²) unless the entry there is above the key. `difference` is key − entry, and its
/// upper twelve bits are its sign.
///
/// It contains no comparison: BPF has no conditional move, and every branch of an unrolled search doubles
/// the number of paths that the verifier follows. The twelve sign bits are used as a mask for `stride`,
/// because compilers recognize a test of bit 63 alone and turn it into a branch.
#[inline(always)]
const fn advance(position: u64, stride: u64, difference: u64) -> u64 {
    position | (stride & !(difference >> 52))
}

/// Hides from the compiler that `key` has only 32 bits. If the compiler knew, it could turn [`advance`]
/// into a branch again.
#[inline(always)]
fn opaque(key: u32) -> u64 {
    core::hint::black_box(key as u64)
}

/// The mask for an index into `entries`, whose number is a power of two. It is hidden from the compiler,
/// which would otherwise prove that the mask changes nothing and drop it. The verifier of older kernels
/// (6.1) needs the mask: it follows the bounds of an AND, but not those of an OR of two unknown numbers
/// (kernel/bpf/verifier.c, `adjust_scalar_min_max_vals`).
#[inline(always)]
fn mask<T>(entries: &[T]) -> u64 {
    assert!(entries.len().is_power_of_two());
    core::hint::black_box(entries.len() as u64 - 1)
}

/// The entry at `position` modulo the number of entries.
#[inline(always)]
fn entry<T: Copy>(entries: &[T], position: u64, mask: u64) -> T {
    // SAFETY: `mask` is that of [`mask`] for an array of this length, so the index is below the length.
    unsafe { *entries.get_unchecked((position & mask) as usize) }
}

/// A row of a leaf block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Number of its rule in the file's dictionary.
    pub rule: u16,
    /// Bytes from the leaf's first row to this one.
    pub offset: u32,
    /// Bytes for which the row is valid. 0 for the last row of a leaf, which is valid up to the next leaf;
    /// the distance to that is not known here.
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
    // For the last row this is the same row (a repeated one) or, after the last slot, the leaf's first row.
    // In both cases the length comes out as 0.
    let next = entry(rows, position + 1, mask);
    Row {
        rule: row as u16,
        offset: row >> 16,
        length: (next >> 16).saturating_sub(row >> 16),
    }
}

/// The result of [`search_index`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    /// The child block.
    pub child: BlockId,
    /// Table address of the child's first row.
    pub first: u32,
}

/// The child of an index block that covers the table address `key`. The key must be below `u32::MAX`, which
/// is the key of unused slots; no file's text spans that much.
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

/// Key minus entry for the starts of mappings. Both are in pages, which leaves the upper twelve bits for
/// the sign.
#[inline(always)]
const fn page_difference(avma: u64, start: u64) -> u64 {
    (avma >> 12).wrapping_sub(start >> 12)
}

/// The mapping in a space leaf that covers `avma`, if there is one. The starts must be multiples of the
/// page size (4 KiB), as those of mappings are.
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

/// The space leaf with the last mapping that does not start above `avma`.
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
    /// A block of zeros. Read as a leaf, it maps every address to rule 0, which is always
    /// [`crate::unwind::Rule::INVALID`].
    pub const ZERO: Block = Block([0; BLOCK_WORDS]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A leaf of `used` rows, 3 bytes apart, whose unused slots repeat the last row.
    fn leaf(used: usize) -> Block {
        let mut block = Block::ZERO;
        for (slot, word) in block.0.iter_mut().enumerate() {
            let row = slot.min(used - 1) as u16;
            *word = pack_row(row * 3, row + 1);
        }
        block
    }

    /// Every address finds the last row not above it, whatever the number of rows in the leaf.
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

    /// A row at the greatest possible offset is found like any other.
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

    /// Every key finds the last child not above it, and never an unused slot.
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

    /// A mapping is found by every address in it, and none is found by an address between two mappings.
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
