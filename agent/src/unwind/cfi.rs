//! The call frame information of one file: all of it, or that of one address.

use super::Error;
use super::fdes::{Cies, Fdes, Reader};
use super::sweep::sweep;
use super::table::{Builder, Table};
use super::x86_64;
use crate::object::{Object, Section};
use agent_ebpf::unwind::{Rule, Unsupported};
use gimli::{
    BaseAddresses, EhFrame, FrameDescriptionEntry, LittleEndian, Register, RegisterRule,
    UnwindContext, UnwindContextStorage, UnwindSection, UnwindTableRow,
};
use std::ops::{ControlFlow, Range};

/// Bytes of a CIE at most; it is evaluated again for each of its FDEs. The longest in
/// Debian's libc, node and Chromium has 36; a longer one makes its FDEs malformed.
pub const MAX_CIE_BYTES: usize = 512;

/// Bytes of an FDE at most; a single look-up evaluates up to all of it. The longest in Debian's
/// Chromium, node and PostgreSQL has 3,144; a longer one is malformed.
pub const MAX_FDE_BYTES: usize = 64 * 1024;

/// Bytes after an entry point without unwind entry that are taken for the entry code. That of
/// Debian's ld.so, with `_dl_start_user` behind it, has 61.
pub const MAX_ENTRY_BYTES: u64 = 256;

/// From this many bytes on, a stretch of code without any FDE was generated, or compiled without
/// unwind tables, on purpose: V8's builtins in node (1.6 MiB), nearly all of Chromium. Such code
/// keeps frame pointers. Assembly that somebody forgot to annotate is much shorter; its rules are
/// derived from its instructions (the module `sweep`), so this is also the most that is decoded at
/// once.
pub const MIN_FRAME_POINTER_GAP: u64 = 64 * 1024;

/// The call frame information of one file.
#[derive(Debug)]
pub struct Cfi<'data> {
    fdes: Fdes<'data>,
    section: EhFrame<Reader<'data>>,
    section_bytes: u64,
    bases: BaseAddresses,
    text: Range<u64>,
    code: Vec<Section<'data>>,
    /// Code at the entry point that no FDE covers: the end of the stack.
    entry: Range<u64>,
}

/// What evaluation needs again and again.
struct Scratch<'data> {
    context: Box<UnwindContext<usize, Storage>>,
    cies: Cies<'data>,
}

impl Scratch<'_> {
    fn new() -> Self {
        Scratch {
            context: Box::new(UnwindContext::new_in()),
            cies: Cies::default(),
        }
    }
}

/// Room for the rules of a row and for remembered rows, without allocation. There are 17 registers
/// that count and 16 vector registers that some code saves; gimli itself keeps four rows.
struct Storage;

impl UnwindContextStorage<usize> for Storage {
    type Rules = [(Register, RegisterRule<usize>); 64];
    type Stack = [UnwindTableRow<usize, Self>; 8];
}

type Fde<'data> = FrameDescriptionEntry<Reader<'data>>;

impl<'data> Cfi<'data> {
    /// Finds a file's unwind entries. Where the linker's search table is missing or broken,
    /// `.eh_frame` is read once from end to end.
    ///
    /// # Errors
    /// [`Error::NoUnwindInformation`].
    pub fn new(object: &Object<'data>) -> Result<Cfi<'data>, Error> {
        let eh_frame = object.eh_frame.ok_or(Error::NoUnwindInformation)?;
        let text = object.text();
        let bases = BaseAddresses::default()
            .set_eh_frame(eh_frame.svma)
            .set_text(text.start);
        let fdes = Fdes::new(eh_frame, object.eh_frame_hdr, &bases);
        if fdes.len() == 0 {
            return Err(Error::NoUnwindInformation);
        }
        let mut cfi = Cfi {
            fdes,
            section: EhFrame::new(eh_frame.data, LittleEndian),
            section_bytes: eh_frame.data.len() as u64,
            bases,
            text,
            code: object.code.clone(),
            entry: 0..0,
        };
        cfi.entry = cfi.uncovered_entry(object.entry);
        Ok(cfi)
    }

    /// The code of the entry point, if no FDE covers it: up to the next FDE, at most
    /// [`MAX_ENTRY_BYTES`]. (ld.so's `_start`, that of static musl programs.)
    fn uncovered_entry(&self, entry: u64) -> Range<u64> {
        if !self.text.contains(&entry) || self.function_range(entry).is_some() {
            return 0..0;
        }
        let next = self.fdes.last_not_above(entry).map_or(0, |last| last + 1);
        let end = self
            .fdes
            .start(next)
            .min(entry.saturating_add(MAX_ENTRY_BYTES));
        entry..end.min(self.text.end)
    }

    /// Start (svma) of the FDE that covers the address. `None` where none does: then the function
    /// before it is not the right one.
    pub fn function_start(&self, svma: u64) -> Option<u64> {
        Some(self.function_range(svma)?.start)
    }

    fn function_range(&self, svma: u64) -> Option<Range<u64>> {
        let index = self.fdes.last_not_above(svma)?;
        let (_, range) = self.entry_at(index, &mut Cies::default())?;
        range.contains(&svma).then_some(range)
    }

    /// The rule of one svma, the same that the compiled table has for it.
    pub fn row_at(&self, svma: u64) -> Rule {
        let mut scratch = Scratch::new();
        if !self.text.contains(&svma) {
            return Rule::INVALID;
        }
        let index = self.fdes.last_not_above(svma);
        let gap_start = match index.and_then(|index| self.entry_at(index, &mut scratch.cies)) {
            Some((fde, range)) if range.contains(&svma) => {
                return self.rule_in(&fde, range, svma, &mut scratch);
            }
            Some((_, range)) => range.end,
            None => index.map_or(self.text.start, |index| self.fdes.start(index)),
        };
        let gap_end = self.fdes.start(index.map_or(0, |index| index + 1));
        let mut found = Rule::INVALID;
        self.gap(gap_start..gap_end, Some(svma), |start, end, rule, _| {
            if (start..end).contains(&svma) {
                found = rule;
            }
        });
        found
    }

    fn rule_in(
        &self,
        fde: &Fde<'data>,
        range: Range<u64>,
        svma: u64,
        scratch: &mut Scratch<'data>,
    ) -> Rule {
        let mut found = Rule::INVALID;
        self.evaluate(fde, range, &mut scratch.context, |_, end, rule| {
            if svma < end {
                found = rule;
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        });
        found
    }

    /// Evaluates everything into a table.
    ///
    /// # Errors
    /// [`Error::Overlapping`], for a file that is made to be slow.
    pub fn compile(&self) -> Result<Table, Error> {
        self.compile_while(&|| true)
    }

    /// The same as long as `go_on` says so, which is asked at each entry and each gap.
    ///
    /// # Errors
    /// As [`Cfi::compile`], and [`Error::TooSlow`].
    pub fn compile_while(&self, go_on: &dyn Fn() -> bool) -> Result<Table, Error> {
        // Debian's binaries have six to eight rows for each entry.
        let expected = self.fdes.len().saturating_mul(8).min(1 << 16);
        let mut table = Builder::new(self.text.start, expected);
        let mut scratch = Scratch::new();
        // In a sound file no byte of the section belongs to two entries.
        let mut budget = self.section_bytes * 2;
        let mut position = self.text.start;
        let gap_to = |end: u64, position: &mut u64, table: &mut Builder| {
            self.gap(*position..end, None, |start, end, rule, derived| {
                table.push(start, end, &rule);
                table.derived(end - start, derived && rule != Rule::INVALID);
            });
            *position = end.clamp(*position, self.text.end);
        };
        for index in 0..self.fdes.len() {
            if !go_on() {
                return Err(Error::TooSlow);
            }
            let start = self.fdes.start(index);
            let Some((fde, range)) = self.entry_at(index, &mut scratch.cies) else {
                // It covers nothing, but it bounds the gap before it.
                gap_to(start, &mut position, &mut table);
                continue;
            };
            let size = fde.entry_len() as u64;
            budget = budget.checked_sub(size).ok_or(Error::Overlapping(size))?;
            gap_to(start, &mut position, &mut table);
            position = range.end;
            self.evaluate(&fde, range, &mut scratch.context, |start, end, rule| {
                table.push(start, end, &rule);
                ControlFlow::Continue(())
            });
        }
        gap_to(self.text.end, &mut position, &mut table);
        Ok(table.finish())
    }

    /// Calls `row` with the rows of a range that no FDE covers, between an entry and the next: start,
    /// end, rule, and whether it was derived from instructions. With `only`, code that is not around
    /// that address is left out.
    fn gap(&self, range: Range<u64>, only: Option<u64>, mut row: impl FnMut(u64, u64, Rule, bool)) {
        let range = range.start.max(self.text.start)..range.end.min(self.text.end);
        if range.is_empty() {
            return;
        }
        let start = self.entry.start.clamp(range.start, range.end);
        let end = self.entry.end.clamp(start, range.end);
        // Where the bytes are not known to be code, the whole gap tells what it may be.
        let elsewhere = guess(range.end - range.start);
        self.uncovered(range.start..start, elsewhere, only, &mut row);
        if start < end {
            row(start, end, Rule::END, false);
        }
        self.uncovered(end..range.end, elsewhere, only, &mut row);
    }

    /// [`Self::gap`], before or behind the entry point's code.
    fn uncovered(
        &self,
        range: Range<u64>,
        elsewhere: Rule,
        only: Option<u64>,
        row: &mut impl FnMut(u64, u64, Rule, bool),
    ) {
        let mut position = range.start;
        let first = self
            .code
            .partition_point(|code| code.svma + code.data.len() as u64 <= range.start);
        for code in &self.code[first..] {
            let start = code.svma.max(position);
            let end = (code.svma + code.data.len() as u64).min(range.end);
            if code.svma >= range.end {
                break;
            }
            if position < start {
                row(position, start, elsewhere, false);
            }
            position = end;
            let asked = only.is_none_or(|svma| (start..end).contains(&svma));
            let guess = guess(end - start);
            if guess != Rule::INVALID || !asked {
                row(start, end, guess, false);
                continue;
            }
            let offset = (start - code.svma) as usize;
            let bytes = &code.data[offset..offset + (end - start) as usize];
            sweep(bytes, start, |start, end, rule| row(start, end, rule, true));
        }
        if position < range.end {
            row(position, range.end, elsewhere, false);
        }
    }

    /// Entry `index` and the part of the text that is its own: from its start up to its end, the
    /// next entry's start, or the text's end, whichever comes first. `None` when the entry cannot be
    /// read, when it does not start where the search table says, or when nothing is its own.
    fn entry_at(&self, index: usize, cies: &mut Cies<'data>) -> Option<(Fde<'data>, Range<u64>)> {
        let start = self.fdes.start(index);
        let next = self.fdes.start(index + 1);
        if start < self.text.start || start >= self.text.end || next <= start {
            return None;
        }
        let offset = gimli::EhFrameOffset(self.fdes.offset(index)?);
        let fde = self
            .section
            .fde_from_offset(&self.bases, offset, |section, bases, offset| {
                cies.get(section, bases, offset)
            })
            .ok()?;
        let length = fde.len();
        let end = start.saturating_add(length).min(next).min(self.text.end);
        (fde.initial_address() == start && start < end).then_some((fde, start..end))
    }

    /// Calls `row` with start, end and rule of consecutive rows that cover `range` without a gap.
    fn evaluate(
        &self,
        fde: &Fde<'data>,
        range: Range<u64>,
        context: &mut UnwindContext<usize, Storage>,
        mut row: impl FnMut(u64, u64, Rule) -> ControlFlow<()>,
    ) {
        let mut position = range.start;
        let small = fde.entry_len() <= MAX_FDE_BYTES && fde.cie().entry_len() <= MAX_CIE_BYTES;
        if small && let Ok(mut rows) = fde.rows(&self.section, &self.bases, context) {
            while let Ok(Some(next)) = rows.next_row() {
                let end = next.end_address().min(range.end);
                if end <= position {
                    continue;
                }
                let rule = x86_64::rule(next, fde.cie(), &self.section);
                if row(position, end, rule).is_break() {
                    return;
                }
                position = end;
                if end == range.end {
                    return;
                }
            }
        }
        if position < range.end {
            let malformed = Rule::unsupported(Unsupported::Malformed);
            // The last row of the range: nothing is left to break off.
            let _ = row(position, range.end, malformed);
        }
    }
}

/// What may be in so many bytes that no FDE covers, before a look at them.
fn guess(bytes: u64) -> Rule {
    if bytes >= MIN_FRAME_POINTER_GAP {
        Rule::FRAME_POINTER
    } else {
        Rule::INVALID
    }
}
