//! The compiled unwind table of a file, and its builder.

use super::rules::Dictionary;
use agent_ebpf::unwind::{CfaKind, Rule, Unsupported};

/// Number of [`Unsupported`] reasons.
pub const REASONS: usize = Unsupported::ALL.len();

/// A row of a table: `rule` is valid from `address` up to the next row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Table address: svma − [`Table::base_svma`].
    pub address: u32,
    /// Index into [`Table::rules`].
    pub rule: u16,
}

/// The unwind table of one file.
#[derive(Clone, Debug)]
pub struct Table {
    /// The svma that corresponds to table address 0.
    pub base_svma: u64,
    /// Bytes of text that a rule covers, including unsupported rules.
    pub covered: u64,
    /// Bytes of text with an unsupported rule, by the reason; indexed by [`Unsupported`].
    pub unsupported: [u64; REASONS],
    /// Bytes of text where a frame pointer is assumed ([`Rule::FRAME_POINTER`]). They are not counted in
    /// `covered`.
    pub guessed: u64,
    /// Bytes of text that no unwind entry covers and whose rule was derived from the instructions. They are
    /// counted in `covered` as well.
    pub analysed: u64,
    /// Bytes of text from the first row to the end of the last.
    pub text: u64,
    // Two arrays instead of one take 6 bytes for each row instead of 8, which matters in files with
    // millions of rows.
    addresses: Vec<u32>,
    row_rules: Vec<u16>,
    rules: Vec<Rule>,
}

impl Table {
    /// Number of rows; at least one.
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    /// Whether there are no rows; always false.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// The row with this index, `None` if there are fewer.
    pub fn row(&self, index: usize) -> Option<Row> {
        Some(Row {
            address: *self.addresses.get(index)?,
            rule: *self.row_rules.get(index)?,
        })
    }

    /// All rows, sorted by address. No two neighboring rows have the same rule.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Row> + '_ {
        let pairs = self.addresses.iter().zip(&self.row_rules);
        pairs.map(|(&address, &rule)| Row { address, rule })
    }

    /// The file's distinct rules; the first is [`Rule::INVALID`].
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The rule that is valid at a table address.
    pub fn rule_at(&self, address: u32) -> Rule {
        let above = self.addresses.partition_point(|first| *first <= address);
        above
            .checked_sub(1)
            .and_then(|index| self.rules.get(usize::from(self.row_rules[index])))
            .copied()
            .unwrap_or(Rule::INVALID)
    }

    /// Memory that the table occupies, in bytes.
    pub fn memory(&self) -> usize {
        self.addresses.capacity() * size_of::<u32>()
            + self.row_rules.capacity() * size_of::<u16>()
            + self.rules.capacity() * size_of::<Rule>()
    }
}

/// Builds a [`Table`] from ranges of addresses, which are added in ascending order.
pub(super) struct Builder {
    table: Table,
    dictionary: Dictionary,
    /// The rule that was pushed last, and its number.
    last: Option<(Rule, u16)>,
}

impl Builder {
    pub(super) fn new(base_svma: u64, expected_rows: usize) -> Builder {
        Builder {
            table: Table {
                base_svma,
                covered: 0,
                unsupported: [0; REASONS],
                guessed: 0,
                analysed: 0,
                text: 0,
                addresses: Vec::with_capacity(expected_rows),
                row_rules: Vec::with_capacity(expected_rows),
                rules: Vec::new(),
            },
            dictionary: Dictionary::new(),
            last: None,
        }
    }

    /// Adds a range: `rule` is valid from `start` up to `end`. Both are svmas and not below the base, and
    /// the range follows the previous one without a gap.
    pub(super) fn push(&mut self, start: u64, end: u64, rule: &Rule) {
        let bytes = end - start;
        self.table.text += bytes;
        let index = match self.last {
            Some((last, index)) if last == *rule => index,
            _ => self.dictionary.index(rule),
        };
        let stored = self.dictionary.rule(index);
        if stored.is_guess() {
            self.table.guessed += bytes;
        } else if stored.kind != CfaKind::Invalid as u8 {
            self.table.covered += bytes;
        }
        if stored.kind == CfaKind::Unsupported as u8
            && let Some(count) = self.table.unsupported.get_mut(usize::from(stored.reg))
        {
            *count += bytes;
        }
        let previous = self.last.replace((*rule, index));
        if previous.is_none_or(|(_, previous)| previous != index) {
            // The cast keeps the value, because `Object::parse` rejects text that spans 4 GiB or more.
            let address = (start - self.table.base_svma) as u32;
            self.table.addresses.push(address);
            self.table.row_rules.push(index);
        }
    }

    /// Counts the last `bytes` that were pushed in [`Table::analysed`], if their rule was `derived`.
    pub(super) fn derived(&mut self, bytes: u64, derived: bool) {
        self.table.analysed += u64::from(derived) * bytes;
    }

    pub(super) fn finish(mut self) -> Table {
        self.table.rules = self.dictionary.into_rules();
        self.table.addresses.shrink_to_fit();
        self.table.row_rules.shrink_to_fit();
        self.table
    }
}
