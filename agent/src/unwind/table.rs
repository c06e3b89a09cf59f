//! A compiled table.

use super::rules::Dictionary;
use agent_ebpf::unwind::{CfaKind, Rule, Unsupported};

/// Number of [`Unsupported`] reasons.
pub const REASONS: usize = Unsupported::ALL.len();

/// From `address` on, up to the next row, `rule` is valid.
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
    /// svma of the table address 0.
    pub base_svma: u64,
    /// Bytes of text that some rule covers, unsupported ones included.
    pub covered: u64,
    /// Bytes of text by the reason why their rule is unsupported, indexed by [`Unsupported`].
    pub unsupported: [u64; REASONS],
    /// Bytes of text where a frame pointer is assumed ([`Rule::FRAME_POINTER`]); not among the
    /// covered.
    pub guessed: u64,
    /// Bytes of text without an entry whose rule was derived from the instructions themselves;
    /// among the covered.
    pub analysed: u64,
    /// Bytes of text from the first row to the end of the last.
    pub text: u64,
    // Two arrays: 6 bytes a row instead of 8, which counts in files with millions of them.
    addresses: Vec<u32>,
    row_rules: Vec<u16>,
    rules: Vec<Rule>,
}

impl Table {
    /// Number of rows; at least one.
    pub fn len(&self) -> usize {
        self.addresses.len()
    }

    /// Whether there are no rows. Never so.
    pub fn is_empty(&self) -> bool {
        self.addresses.is_empty()
    }

    /// The row with this index.
    pub fn row(&self, index: usize) -> Option<Row> {
        Some(Row {
            address: *self.addresses.get(index)?,
            rule: *self.row_rules.get(index)?,
        })
    }

    /// Every row, sorted by address, no two neighbours with the same rule.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Row> + '_ {
        let pairs = self.addresses.iter().zip(&self.row_rules);
        pairs.map(|(&address, &rule)| Row { address, rule })
    }

    /// The file's distinct rules; the first is [`Rule::INVALID`].
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The rule of a table address.
    pub fn rule_at(&self, address: u32) -> Rule {
        let above = self.addresses.partition_point(|first| *first <= address);
        above
            .checked_sub(1)
            .and_then(|index| self.rules.get(usize::from(self.row_rules[index])))
            .copied()
            .unwrap_or(Rule::INVALID)
    }

    /// Bytes of the table in memory.
    pub fn memory(&self) -> usize {
        self.addresses.capacity() * size_of::<u32>()
            + self.row_rules.capacity() * size_of::<u16>()
            + self.rules.capacity() * size_of::<Rule>()
    }
}

/// Takes ranges of addresses in ascending order and makes a [`Table`].
pub(super) struct Builder {
    table: Table,
    dictionary: Dictionary,
    /// What was pushed last, and its index.
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

    /// `rule` is valid from `start` up to `end`, both svmas not below the base; the range follows
    /// the one before without a gap.
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
            // Text spans less than 4 GiB from the base (Object::parse).
            let address = (start - self.table.base_svma) as u32;
            self.table.addresses.push(address);
            self.table.row_rules.push(index);
        }
    }

    /// The last `bytes` that were pushed are or are not counted in [`Table::analysed`].
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
