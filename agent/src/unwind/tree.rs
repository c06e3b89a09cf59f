//! Lays out a table in blocks, as described in `agent_ebpf::table`. Also contains the user-space version of
//! the kernel program's search through them.

use super::{Error, Row, Table};
use agent_ebpf::limits::{BLOCK_WORDS, MAX_TABLE_DEPTH};
use agent_ebpf::table::{
    Block, BlockId, INDEX_FANOUT, LEAF_ROWS, RULES_PER_BLOCK, pack_row, search_index, search_rows,
};
use agent_ebpf::unwind::{Rule, Slot};

/// Where a table was placed. The mappings of its file refer to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The topmost index block, or the only leaf.
    pub root: BlockId,
    /// Index levels above the leaves.
    pub depth: u32,
    /// Directory block of the rules.
    pub rules_directory: BlockId,
}

/// The plan for the blocks of a table.
#[derive(Debug)]
pub struct Layout<'table> {
    table: &'table Table,
    /// Index of each leaf's first row.
    leaves: Vec<u32>,
    /// Index levels above the leaves.
    depth: u32,
}

/// Plans the blocks of a table. First come the leaves, in order, then the index levels from the lowest to
/// the highest, then the blocks of rules, and then their directory.
///
/// # Errors
/// [`Error::TooLarge`] if [`MAX_TABLE_DEPTH`] levels are not enough, or if the table has no rows.
pub fn layout(table: &Table) -> Result<Layout<'_>, Error> {
    let mut leaves = Vec::with_capacity(table.len() / LEAF_ROWS + 1);
    let mut first = None;
    for (index, row) in table.rows().enumerate() {
        let fits = first.is_some_and(|(start, address): (usize, u32)| {
            index - start < LEAF_ROWS && row.address - address <= u32::from(u16::MAX)
        });
        if !fits {
            first = Some((index, row.address));
            leaves.push(index as u32);
        }
    }
    let mut depth = 0;
    let mut width = leaves.len();
    while width > 1 {
        width = width.div_ceil(INDEX_FANOUT);
        depth += 1;
    }
    if depth > MAX_TABLE_DEPTH || leaves.is_empty() {
        return Err(Error::TooLarge(leaves.len()));
    }
    Ok(Layout {
        table,
        leaves,
        depth,
    })
}

impl Layout<'_> {
    /// Number of blocks that [`Self::write`] needs.
    pub fn blocks(&self) -> usize {
        let mut blocks = self.leaves.len();
        let mut width = self.leaves.len();
        for _ in 0..self.depth {
            width = width.div_ceil(INDEX_FANOUT);
            blocks += width;
        }
        blocks + self.rule_blocks() + 1
    }

    fn rule_blocks(&self) -> usize {
        self.table.rules().len().div_ceil(RULES_PER_BLOCK)
    }

    /// Passes every block to `write`, each with one of the `ids`, which are at least [`Self::blocks`]
    /// allocated numbers in any order. A block comes after the blocks that it refers to, so a reader that
    /// starts at the placement never meets an unwritten block.
    ///
    /// # Panics
    /// If there are fewer `ids` than [`Self::blocks`].
    pub fn write(&self, ids: &[BlockId], mut write: impl FnMut(BlockId, &Block)) -> Placement {
        assert!(ids.len() >= self.blocks(), "one id for each block");
        let (leaf_ids, mut ids) = ids.split_at(self.leaves.len());
        let mut level: Vec<(u32, BlockId)> = Vec::with_capacity(leaf_ids.len());
        for (index, id) in leaf_ids.iter().enumerate() {
            let (first, block) = self.leaf(index);
            write(*id, &block);
            level.push((first, *id));
        }
        for _ in 0..self.depth {
            let (index_ids, rest) = ids.split_at(level.len().div_ceil(INDEX_FANOUT));
            let children = level.chunks(INDEX_FANOUT);
            let above = children.zip(index_ids).map(|(children, id)| {
                write(*id, &index_block(children));
                (children[0].0, *id)
            });
            level = above.collect();
            ids = rest;
        }
        let (rule_ids, rest) = ids.split_at(self.rule_blocks());
        for (rules, id) in self.table.rules().chunks(RULES_PER_BLOCK).zip(rule_ids) {
            write(*id, &rule_block(rules));
        }
        let mut directory = Block::ZERO;
        directory.0[..rule_ids.len()].copy_from_slice(rule_ids);
        write(rest[0], &directory);
        Placement {
            root: level[0].1,
            depth: self.depth,
            rules_directory: rest[0],
        }
    }

    /// Leaf `index`, and the table address of its first row.
    fn leaf(&self, index: usize) -> (u32, Block) {
        let start = self.leaves[index] as usize;
        let end = self.leaves.get(index + 1);
        let end = end.map_or(self.table.len(), |end| *end as usize);
        let row = |index| {
            self.table.row(index).unwrap_or(Row {
                address: 0,
                rule: 0,
            })
        };
        let first = row(start).address;
        let mut block = Block::ZERO;
        let mut last = 0;
        for (slot, word) in block.0.iter_mut().enumerate() {
            if start + slot < end {
                let row = row(start + slot);
                last = pack_row((row.address - first) as u16, row.rule);
            }
            *word = last;
        }
        (first, block)
    }
}

/// An index block over these children, each given by its first table address and its block.
fn index_block(children: &[(u32, BlockId)]) -> Block {
    let mut block = Block([u32::MAX; BLOCK_WORDS]);
    let last = children[children.len() - 1];
    for slot in 0..INDEX_FANOUT {
        let (first, child) = *children.get(slot).unwrap_or(&(u32::MAX, last.1));
        block.0[slot] = first;
        block.0[slot + INDEX_FANOUT] = child;
    }
    block
}

/// Number of 32-bit words in a [`Rule`].
const RULE_WORDS: usize = size_of::<Rule>() / 4;

fn rule_block(rules: &[Rule]) -> Block {
    let mut block = Block::ZERO;
    for (words, rule) in block.0.chunks_exact_mut(RULE_WORDS).zip(rules) {
        let [s0, s1, s2, s3, s4, s5] = rule.saved.map(|slot| slot.0);
        let [a0, a1] = rule.aux.to_ne_bytes();
        words[0] = rule.offset as u32;
        words[1] = u32::from_ne_bytes([a0, a1, rule.kind, rule.reg]);
        words[2] = u32::from_ne_bytes([rule.ra.0, s0, s1, s2]);
        words[3] = u32::from_ne_bytes([s3, s4, s5, rule.index]);
    }
    block
}

fn rule_in(block: &Block, slot: usize) -> Rule {
    let words = &block.0[slot * RULE_WORDS..][..RULE_WORDS];
    let [a0, a1, kind, reg] = words[1].to_ne_bytes();
    let [ra, s0, s1, s2] = words[2].to_ne_bytes();
    let [s3, s4, s5, index] = words[3].to_ne_bytes();
    Rule {
        offset: words[0] as i32,
        aux: i16::from_ne_bytes([a0, a1]),
        kind,
        reg,
        ra: Slot(ra),
        saved: [s0, s1, s2, s3, s4, s5].map(Slot),
        index,
    }
}

/// Finds the rule of a table address by the same searches as the kernel program. `address` must be below
/// `u32::MAX`; text spans less. `block` returns the contents of a block.
pub fn find_rule<'blocks>(
    placement: &Placement,
    address: u32,
    block: impl Fn(BlockId) -> &'blocks Block,
) -> Rule {
    let mut node = placement.root;
    let mut first = 0;
    for _ in 0..placement.depth {
        let entry = search_index(block(node), address);
        node = entry.child;
        first = entry.first;
    }
    let row = search_rows(block(node), address.saturating_sub(first));
    let rule = usize::from(row.rule);
    let rules = block(placement.rules_directory).0[rule / RULES_PER_BLOCK];
    rule_in(block(rules), rule % RULES_PER_BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unwind::table::Builder;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// A table with rows of these lengths and rules of these numbers.
    fn table(rows: impl IntoIterator<Item = (u32, u16)>) -> Table {
        let base = 0x40_0000u64;
        let mut builder = Builder::new(base, 0);
        let mut start = base;
        for (length, number) in rows {
            let end = start + u64::from(length);
            if end - base > u64::from(u32::MAX) {
                break;
            }
            builder.push(start, end, &rule(number));
            start = end;
        }
        builder.finish()
    }

    fn rule(number: u16) -> Rule {
        match number {
            0 => Rule::INVALID,
            1 => Rule::END,
            _ => Rule {
                offset: i32::from(number) - 300,
                aux: number as i16,
                ..Rule::FRAME_POINTER
            },
        }
    }

    /// Writes the blocks with scattered ids, and returns them.
    fn placed(table: &Table) -> (Placement, HashMap<BlockId, Block>) {
        let layout = layout(table).expect("a layout");
        let ids: Vec<BlockId> = (1..=layout.blocks() as u32)
            .map(|n| n.wrapping_mul(0x9e37_79b1) & 0x0fff_ffff)
            .collect();
        let mut pool = HashMap::new();
        let placement = layout.write(&ids, |id, block| {
            assert!(pool.insert(id, *block).is_none(), "a block written twice");
        });
        assert_eq!(pool.len(), layout.blocks());
        (placement, pool)
    }

    /// Finds the rule by a linear search.
    fn linear(table: &Table, address: u32) -> Rule {
        let row = table.rows().take_while(|row| row.address <= address).last();
        row.map_or(Rule::INVALID, |row| table.rules()[usize::from(row.rule)])
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// For any rows, the search through the blocks finds the same as a linear search.
        #[test]
        fn equal_to_a_linear_search(
            rows in prop::collection::vec((prop_oneof![
                8 => 1..40u32, 2 => 1..5000u32, 1 => 60_000..200_000u32, 1 => 1..100_000_000u32,
            ], 0..600u16), 1..3000),
            anywhere in prop::collection::vec(0..u32::MAX, 50),
            at_rows in prop::collection::vec(any::<prop::sample::Index>(), 100),
        ) {
            let table = table(rows);
            prop_assume!(!table.is_empty());
            let (placement, pool) = placed(&table);
            let edges = at_rows.iter().flat_map(|index| {
                let address = table.row(index.index(table.len())).expect("a row").address;
                [address.saturating_sub(1), address, address.saturating_add(1).min(u32::MAX - 1)]
            });
            for address in edges.chain(anywhere) {
                let found = find_rule(&placement, address, |id| &pool[&id]);
                prop_assert_eq!(found, linear(&table, address), "{:#x}", address);
                prop_assert_eq!(found, table.rule_at(address));
            }
        }
    }

    /// The depth changes exactly at the numbers of rows that fill a level.
    #[test]
    fn levels() {
        let full = INDEX_FANOUT * LEAF_ROWS;
        for (rows, depth) in [
            (1, 0),
            (LEAF_ROWS, 0),
            (LEAF_ROWS + 1, 1),
            (full, 1),
            (full + 1, 2),
        ] {
            let table = table((0..rows).map(|n| (1, 2 + (n % 2) as u16)));
            assert_eq!(table.len(), rows);
            let (placement, pool) = placed(&table);
            assert_eq!(placement.depth, depth, "{rows} rows");
            for address in (0..rows as u32).step_by(251).chain([rows as u32 - 1]) {
                let found = find_rule(&placement, address, |id| &pool[&id]);
                assert_eq!(found, table.rule_at(address), "{rows} rows, {address}");
            }
        }
    }

    /// A row that is too far from the first row of its leaf begins a new leaf.
    #[test]
    fn leaves_end_where_offsets_do() {
        let table = table([(0x1_0000, 2), (0xffff, 3), (1, 4), (0x1000_0000, 5), (1, 6)]);
        let layout = layout(&table).expect("a layout");
        assert_eq!(layout.leaves, [0, 1, 3, 4]);
        let (placement, pool) = placed(&table);
        for row in table.rows() {
            let found = find_rule(&placement, row.address, |id| &pool[&id]);
            assert_eq!(found, table.rules()[usize::from(row.rule)]);
        }
    }

    /// The words of a rule block are those of the struct [`Rule`] in memory, and can be read back.
    #[test]
    fn rules_have_the_layout_of_the_struct() {
        let rule = Rule {
            offset: -2,
            aux: 0x0201,
            kind: 3,
            reg: 4,
            ra: Slot(5),
            saved: [6, 7, 8, 9, 10, 11].map(Slot),
            index: 12,
        };
        let block = rule_block(&[Rule::END, rule]);
        assert_eq!(rule_in(&block, 0), Rule::END);
        assert_eq!(rule_in(&block, 1), rule);
        let bytes: Vec<u8> = block.0[4..8].iter().flat_map(|w| w.to_ne_bytes()).collect();
        assert_eq!(bytes[..4], (-2i32).to_ne_bytes());
        assert_eq!(bytes[std::mem::offset_of!(Rule, kind)], 3);
        assert_eq!(bytes[std::mem::offset_of!(Rule, reg)], 4);
        assert_eq!(bytes[std::mem::offset_of!(Rule, ra)], 5);
        let saved = std::mem::offset_of!(Rule, saved);
        assert_eq!(bytes[saved..saved + 6], [6, 7, 8, 9, 10, 11]);
        assert_eq!(bytes[std::mem::offset_of!(Rule, index)], 12);
    }
}
