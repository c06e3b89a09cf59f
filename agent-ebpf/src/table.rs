//! Layout of the tables that the kernel programs search: everything is made of 2 KiB blocks from one
//! pool, named by a [`BlockId`].
//!
//! ```text
//! process map: pid → Space { root, depth }
//!   space index block   128 × (start avma, child)          only with more than 64 mappings
//!   space leaf block    64 × Mapping (start, end, bias, tree, rules)
//!     tree: index blocks 256 × (first table address, child), `depth` levels of them
//!       leaf block      512 rows: table address (relative to the leaf's first) << 16 | rule
//!     rules: directory  512 × block of rules
//!       rule block      128 × Rule
//! ```
//!
//! A *table address* is `avma - mapping.bias`, which is svma minus the svma of the table's first
//! row; it fits in 32 bits. Every search is "the last entry not above the key", and unused slots at
//! a block's end repeat its last entry (rows) or hold the greatest key (indices), so that a search
//! needs no count.

use crate::limits::BLOCK_WORDS;

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
    /// A space leaf (`depth` 0) or a space index block (`depth` 1).
    pub root: BlockId,
    /// Index levels above the leaves.
    pub depth: u32,
}

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

/// A leaf of a process's address space: parallel arrays, sorted by start, unused slots at the end
/// with `start` = `u64::MAX`.
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

/// An index over space leaves, unused slots at the end with `start` = `u64::MAX`.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub struct SpaceIndex {
    /// First avma of each child's first mapping; slot 0 holds 0.
    pub start: [u64; SPACE_FANOUT],
    /// The space leaves. (Unused slots are never found.)
    pub child: [BlockId; SPACE_FANOUT],
    /// Unused, zero.
    pub padding: [u32; SPACE_FANOUT],
}

const _: () = assert!(size_of::<SpaceIndex>() == size_of::<Block>());

/// Position of the last of `N` ascending keys that is not above the wanted one, or 0 when all are.
///
/// `N` is a power of two. The number of steps is fixed and no step branches on data: what the kernel's
/// verifier follows in one pass, and what a processor does not mispredict.
#[inline(always)]
fn last_not_above<const N: usize>(is_above: impl Fn(usize) -> bool) -> usize {
    let mut at = 0;
    let mut width = N / 2;
    while width > 0 {
        let candidate = (at | width) & (N - 1);
        at |= width & (is_above(candidate) as usize).wrapping_sub(1);
        width /= 2;
    }
    at & (N - 1)
}

/// Child of an index block that holds `key`: the first table address in it, and its block.
#[inline(always)]
pub fn search_index(block: &Block, key: u32) -> (u32, BlockId) {
    let at = last_not_above::<INDEX_FANOUT>(|i| block.0[i] > key);
    (block.0[at], block.0[at | INDEX_FANOUT])
}

/// Row of a leaf block for the offset of an address from the leaf's first: see [`pack_row`]. An
/// offset beyond 16 bits belongs to the last row.
#[inline(always)]
pub fn search_rows(block: &Block, offset: u32) -> u32 {
    let offset = if offset > 0xffff { 0xffff } else { offset };
    let at = last_not_above::<LEAF_ROWS>(|i| block.0[i] >> 16 > offset);
    block.0[at]
}

/// Leaf of a space that holds `address`.
#[inline(always)]
pub fn search_space_index(index: &SpaceIndex, address: u64) -> BlockId {
    index.child[last_not_above::<SPACE_FANOUT>(|i| index.start[i] > address)]
}

/// Slot of the only mapping of a leaf that can hold `address`; the caller compares the bounds.
#[inline(always)]
pub fn search_space_leaf(leaf: &SpaceLeaf, address: u64) -> usize {
    last_not_above::<SPACE_LEAF_MAPPINGS>(|i| leaf.start[i] > address)
}
