//! The walk in user space: what the kernel program does in its loop, on a copy of the stack.

use super::GUESSED_FRAME_POINTER;
use agent_ebpf::limits::MAX_USER_FRAMES;
use agent_ebpf::sample::{Outcome, SIGNAL_FRAME_BIT};
use agent_ebpf::unwind::{Cursor, Rule, Step, step};

/// What is known about an address of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// Its file's rule for it.
    Rule(Rule),
    /// It lies in an executable mapping without unwind tables (just-in-time compiled code, Go).
    FramePointer,
    /// It lies in no executable mapping.
    UnknownMapping,
    /// Its file has no table yet, and it cannot be had now.
    TablesPending,
}

/// A copy of the top of a stack.
#[derive(Clone, Copy, Debug)]
pub struct StackCopy<'data> {
    /// avma of the first byte.
    pub base: u64,
    /// What follows there.
    pub bytes: &'data [u8],
}

impl StackCopy<'_> {
    /// Fills the words from the address, or returns false when they are not all in the copy.
    pub fn read(&self, address: u64, words: &mut [u64]) -> bool {
        let read = |address: u64, words: &mut [u64]| {
            let skip = usize::try_from(address.checked_sub(self.base)?).ok()?;
            let (chunks, _) = self.bytes.get(skip..)?.as_chunks::<8>();
            let chunks = chunks.get(..words.len())?;
            for (word, bytes) in words.iter_mut().zip(chunks) {
                *word = u64::from_ne_bytes(*bytes);
            }
            Some(())
        };
        read(address, words).is_some()
    }
}

/// Walks from `cursor` to the end of the stack and appends each frame to `frames` in the form that
/// samples have (`agent_ebpf::sample`). When frames are there already, the walk goes on from them.
///
/// `resolve` is asked for the address to look up: for a return address that is the byte before it.
/// A word that the stack copy does not hold ends the walk: above the copy it is
/// [`Outcome::CopyTooShort`], below it, where no live stack can be, [`Outcome::UnreadableStack`].
pub fn walk(
    cursor: &mut Cursor,
    mut resolve: impl FnMut(u64) -> Resolved,
    stack: &StackCopy<'_>,
    frames: &mut Vec<u64>,
) -> Outcome {
    let mut by_frame_pointer = false;
    loop {
        if frames.len() >= MAX_USER_FRAMES as usize {
            return Outcome::TooDeep;
        }
        let interrupted = cursor.exact_ip != 0 && !frames.is_empty();
        frames.push(cursor.regs.ip | if interrupted { SIGNAL_FRAME_BIT } else { 0 });
        let (rule, has_table) = match resolve(cursor.lookup_ip()) {
            Resolved::Rule(rule) => (rule, rule != GUESSED_FRAME_POINTER),
            Resolved::FramePointer => (Rule::FRAME_POINTER, false),
            Resolved::UnknownMapping => return Outcome::UnknownMapping,
            Resolved::TablesPending => return Outcome::TablesPending,
        };
        by_frame_pointer |= !has_table;
        if !has_table && cursor.regs.fp() == 0 {
            // The psABI marks the deepest frame this way (3.2.2, 3.4.1).
            return Outcome::CompleteByFramePointer;
        }
        let mut above = false;
        let result = step(cursor, &rule, |address, words| {
            let inside = stack.read(address, words);
            above = !inside && address >= stack.base;
            inside
        });
        match result {
            Step::Caller => {}
            Step::End if by_frame_pointer => return Outcome::CompleteByFramePointer,
            Step::End => return Outcome::Complete,
            Step::Unreadable if above => return Outcome::CopyTooShort,
            Step::Unreadable | Step::NoProgress if !has_table => {
                return Outcome::BrokenFramePointer;
            }
            Step::Unreadable => return Outcome::UnreadableStack,
            Step::NoProgress => return Outcome::NoProgress,
            Step::NotCovered => return Outcome::NotCovered,
            Step::Unsupported => return Outcome::UnsupportedRule,
        }
    }
}
