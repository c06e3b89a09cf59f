//! Evaluates the call frame information of a file, for a whole table or for one address.

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

/// Most bytes of a CIE. It is bounded because it is evaluated again for each of its FDEs; a longer CIE
/// makes its FDEs malformed. The longest in Debian's libc, node and Chromium has 36.
pub const MAX_CIE_BYTES: usize = 512;

/// Most bytes of an FDE. It is bounded because a single lookup may evaluate all of it; a longer FDE is
/// malformed. The longest in Debian's Chromium, node and PostgreSQL has 3,144.
pub const MAX_FDE_BYTES: usize = 64 * 1024;

/// Most bytes from an entry point without unwind entry that are taken for the entry code. That of Debian's
/// ld.so, together with the following `_dl_start_user`, has 61.
pub const MAX_ENTRY_BYTES: u64 = 256;

/// A stretch of code without any FDE that has at least this many bytes is taken for code that was generated
/// or compiled without unwind tables on purpose, as V8's builtins in node (1.6 MiB) or nearly all of
/// Chromium. Such code usually keeps frame pointers. Assembly without annotations is much shorter, and its
/// rules are derived from its instructions by the module `sweep`. So this is also the most code that is
/// decoded at once.
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
    /// The code at the entry point, if no FDE covers it (else empty). Its frame is the end of the stack.
    entry: Range<u64>,
}

/// Buffers that are reused from one evaluation to the next.
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

/// Fixed storage for the rules of a row and for the stack of remembered rows, so that evaluation does not
/// allocate. Rows have rules for up to 17 registers that matter and 16 vector registers that some code
/// saves. gimli's own fixed storage has four rows.
struct Storage;

impl UnwindContextStorage<usize> for Storage {
    type Rules = [(Register, RegisterRule<usize>); 64];
    type Stack = [UnwindTableRow<usize, Self>; 8];
}

type Fde<'data> = FrameDescriptionEntry<Reader<'data>>;

impl<'data> Cfi<'data> {
    /// Finds a file's unwind entries. If the linker's search table is missing or broken, `.eh_frame` is
    /// scanned once from start to end.
    ///
    /// # Errors
    /// [`Error::NoUnwindInformation`] if the file has no `.eh_frame` or no entries in it.
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

    /// The code of the entry point if no FDE covers it, as `_start` in ld.so and in static musl programs:
    /// up to the next FDE, at most [`MAX_ENTRY_BYTES`]. Empty if an FDE covers it.
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

    /// Start (svma) of the FDE that covers the address. `None` if none does; the address then does not
    /// belong to the function before it either.
    pub fn function_start(&self, svma: u64) -> Option<u64> {
        Some(self.function_range(svma)?.start)
    }

    fn function_range(&self, svma: u64) -> Option<Range<u64>> {
        let index = self.fdes.last_not_above(svma)?;
        let (_, range) = self.entry_at(index, &mut Cies::default())?;
        range.contains(&svma).then_some(range)
    }

    /// The rule of one svma. It is the same that the compiled table has for that address.
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

    /// Compiles all entries, and the gaps between them, into a table.
    ///
    /// # Errors
    /// [`Error::Overlapping`], for a file that was crafted to make this slow.
    pub fn compile(&self) -> Result<Table, Error> {
        self.compile_while(&|| true)
    }

    /// As [`Cfi::compile`], but gives up when `go_on` returns false. It is called before each entry.
    ///
    /// # Errors
    /// As [`Cfi::compile`], and [`Error::TooSlow`].
    pub fn compile_while(&self, go_on: &dyn Fn() -> bool) -> Result<Table, Error> {
        // Debian's binaries have six to eight rows for each entry.
        let expected = self.fdes.len().saturating_mul(8).min(1 << 16);
        let mut table = Builder::new(self.text.start, expected);
        let mut scratch = Scratch::new();
        // In a sound file the entries together have at most the size of the section, because no byte
        // belongs to two of them. Twice that much is allowed.
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
                // A broken entry covers nothing, but its start ends the gap before it.
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

    /// Calls `row` with consecutive rows for a range between two entries, which no FDE covers: start, end,
    /// rule, and whether the rule may have been derived from instructions. With `only`, just the rows
    /// around that address need to be right; the instructions of other code are not decoded.
    fn gap(&self, range: Range<u64>, only: Option<u64>, mut row: impl FnMut(u64, u64, Rule, bool)) {
        let range = range.start.max(self.text.start)..range.end.min(self.text.end);
        if range.is_empty() {
            return;
        }
        let start = self.entry.start.clamp(range.start, range.end);
        let end = self.entry.end.clamp(start, range.end);
        // For bytes that are in no code section, the size of the whole gap decides.
        let elsewhere = guess(range.end - range.start);
        self.uncovered(range.start..start, elsewhere, only, &mut row);
        if start < end {
            row(start, end, Rule::END, false);
        }
        self.uncovered(end..range.end, elsewhere, only, &mut row);
    }

    /// As [`Self::gap`], for the part of it before or after the entry point's code. `elsewhere` is the rule
    /// for bytes that are in no code section.
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

    /// Entry `index` and the part of the text that belongs to it: from its start up to its end, the next
    /// entry's start, or the text's end, whichever comes first. `None` if the entry cannot be read, if it
    /// does not start where the search table says, or if no text belongs to it.
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

    /// Evaluates an entry. Calls `row` with start, end and rule of consecutive rows that cover `range`
    /// without a gap, until it returns `Break`. What cannot be evaluated is covered by a row with the
    /// reason [`Unsupported::Malformed`].
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
            // This is the last row of the range, so it does not matter whether `row` returns `Break`.
            let _ = row(position, range.end, malformed);
        }
    }
}

/// The rule to assume for this many bytes that no FDE covers, before their instructions are decoded. If it is
/// [`Rule::INVALID`], decoding may find a better one.
fn guess(bytes: u64) -> Rule {
    if bytes >= MIN_FRAME_POINTER_GAP {
        Rule::FRAME_POINTER
    } else {
        Rule::INVALID
    }
}
