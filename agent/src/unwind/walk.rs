//! The walk in user space. It does the same as the loop of the kernel program, on a copy of the stack.

use agent_ebpf::limits::MAX_USER_FRAMES;
use agent_ebpf::sample::{Outcome, SIGNAL_FRAME_BIT};
use agent_ebpf::unwind::{CfaKind, Cursor, Rule, Slot, Step, reg, step};

/// The result of looking up the rule for an address of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuleLookup {
    /// The rule that the address's file has for it.
    Rule(Rule),
    /// The address lies in an executable mapping without unwind tables (just-in-time compiled code, Go).
    FramePointer,
    /// The address lies in no known executable mapping.
    UnknownMapping,
    /// The address's file cannot be read now, so its rule is not known.
    TablesPending,
}

/// A copy of the top of a stack.
#[derive(Clone, Copy, Debug)]
pub struct StackBytes<'data> {
    /// avma of the first byte.
    pub base: u64,
    /// The bytes of the stack from there on.
    pub bytes: &'data [u8],
}

impl StackBytes<'_> {
    /// Fills `words` from the memory at `address`. Returns false if they are not all in the copy.
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

/// Walks from `cursor` to the end of the stack, and appends each frame to `frames` in the form that samples
/// have (`agent_ebpf::sample`). If `frames` is not empty, the walk continues from these frames.
///
/// `guessed` says whether a frame pointer was followed on the way to the frames that are there already.
/// `resolve` is called with the address to look up; for a return address that is the byte before it. A word
/// that is not in the stack copy ends the walk: with [`Outcome::CopyTooShort`] if it lies above the copy,
/// and with [`Outcome::UnreadableStack`] if it lies below, where there is no live stack.
pub fn walk(
    cursor: &mut Cursor,
    mut guessed: bool,
    mut resolve: impl FnMut(u64) -> RuleLookup,
    stack: &StackBytes<'_>,
    frames: &mut Vec<u64>,
) -> Outcome {
    loop {
        if frames.len() >= MAX_USER_FRAMES as usize {
            return Outcome::TooDeep;
        }
        let interrupted = cursor.exact_ip != 0 && !frames.is_empty();
        frames.push(cursor.regs.ip | if interrupted { SIGNAL_FRAME_BIT } else { 0 });
        let (rule, has_table) = match resolve(cursor.lookup_ip()) {
            RuleLookup::Rule(rule) => (rule, !rule.is_guess()),
            RuleLookup::FramePointer => (Rule::FRAME_POINTER, false),
            RuleLookup::UnknownMapping => return Outcome::UnknownMapping,
            RuleLookup::TablesPending => return Outcome::TablesPending,
        };
        guessed |= !has_table;
        if !has_table && cursor.regs.fp() == 0 {
            // The psABI marks the deepest frame by a frame pointer of zero (3.2.2, 3.4.1), but code without
            // tables may use the register for anything.
            return Outcome::GuessedEnd;
        }
        let mut missing = 0;
        let mut result = step_on(cursor, &rule, stack, &mut missing);
        if result == Step::Unreadable && cursor.exact_ip != 0 && missing < stack.base {
            result = step_on(cursor, &after_epilogue(rule), stack, &mut missing);
        }
        let above = missing >= stack.base;
        match result {
            Step::Caller => {}
            Step::End => return Outcome::of_end(true, guessed),
            Step::ZeroReturn => return Outcome::of_end(false, guessed),
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

/// Makes one step on the copy. Stores in `missing` the address of the last read that failed.
fn step_on(cursor: &mut Cursor, rule: &Rule, stack: &StackBytes<'_>, missing: &mut u64) -> Step {
    step(cursor, rule, |address, words| {
        let inside = stack.read(address, words);
        if !inside {
            *missing = address;
        }
        inside
    })
}

/// Changes a rule so that registers that were saved below the stack pointer keep their value.
///
/// In an epilogue, compilers do not declare that a register has been popped. The unwind information still
/// says where it was saved, which is now below the stack pointer and therefore possibly not in the copy of
/// the stack. The popped register itself has the same value.
fn after_epilogue(mut rule: Rule) -> Rule {
    if rule.kind == CfaKind::Register as u8 && rule.reg == reg::RSP {
        for slot in &mut rule.saved {
            if slot.0 < 128 && i32::from(slot.0) * 8 > rule.offset {
                *slot = Slot::SAME;
            }
        }
    }
    rule
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_ebpf::unwind::Registers;

    fn at(ip: u64, sp: u64, fp: u64) -> Cursor {
        let mut regs = Registers {
            ip,
            ..Registers::default()
        };
        regs.gp[reg::RSP as usize] = sp;
        regs.gp[reg::RBP as usize] = fp;
        Cursor::new(regs)
    }

    fn bytes(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    /// CFA = rsp + `offset`.
    fn sp_rule(offset: i32) -> Rule {
        Rule {
            offset,
            kind: CfaKind::Register as u8,
            reg: reg::RSP,
            ra: Slot::below_cfa(1),
            ..Rule::INVALID
        }
    }

    fn run(cursor: Cursor, words: &[u64], resolve: fn(u64) -> RuleLookup) -> (Vec<u64>, Outcome) {
        let bytes = bytes(words);
        let stack = StackBytes {
            base: cursor.regs.sp(),
            bytes: &bytes,
        };
        let mut frames = Vec::new();
        let outcome = walk(&mut { cursor }, false, resolve, &stack, &mut frames);
        (frames, outcome)
    }

    /// The rule of the first of three frames is looked up at its address, those of the others one byte
    /// before.
    #[test]
    fn to_the_end() {
        let resolve = |avma| match avma {
            0x1000 => RuleLookup::Rule(sp_rule(8)),
            0x1fff => RuleLookup::Rule(sp_rule(16)),
            0x2fff => RuleLookup::Rule(Rule::END),
            _ => RuleLookup::UnknownMapping,
        };
        let (frames, outcome) = run(at(0x1000, 0x8000, 0), &[0x2000, 7, 0x3000], resolve);
        assert_eq!(frames, [0x1000, 0x2000, 0x3000]);
        assert_eq!(outcome, Outcome::Complete);
    }

    /// A read above the end of the copy is distinguished from a read below its start.
    #[test]
    fn copy_too_short_and_unreadable() {
        let resolve = |_| RuleLookup::Rule(sp_rule(16));
        let (frames, outcome) = run(at(0x1000, 0x8000, 0), &[0, 0x2000], resolve);
        assert_eq!((frames.len(), outcome), (2, Outcome::CopyTooShort));
        let resolve = |_| {
            RuleLookup::Rule(Rule {
                kind: CfaKind::Deref as u8,
                offset: -4096,
                ..sp_rule(0)
            })
        };
        let (_, outcome) = run(at(0x1000, 0x8000, 0), &[0; 4], resolve);
        assert_eq!(outcome, Outcome::UnreadableStack);
    }

    /// In an epilogue the rule says that rbx was saved below the stack pointer, which is not in the copy.
    #[test]
    fn popped_register_in_an_epilogue() {
        let resolve = |avma| {
            let mut rule = sp_rule(8);
            rule.saved[0] = Slot::below_cfa(2);
            RuleLookup::Rule(if avma == 0x1000 { rule } else { Rule::END })
        };
        let mut cursor = at(0x1000, 0x8000, 0);
        cursor.regs.gp[reg::RBX as usize] = 77;
        let bytes = bytes(&[0x2000]);
        let stack = StackBytes {
            base: 0x8000,
            bytes: &bytes,
        };
        let outcome = walk(&mut cursor, false, resolve, &stack, &mut Vec::new());
        assert_eq!(outcome, Outcome::Complete);
        assert_eq!(cursor.regs.gp[reg::RBX as usize], 77);
    }

    /// The frame that a signal interrupted is marked; the first frame of a sample is not.
    #[test]
    fn signal_frames_are_marked() {
        let resolve = |avma| match avma {
            0x1000 => RuleLookup::Rule(Rule {
                kind: CfaKind::Signal as u8,
                ..sp_rule(0)
            }),
            0x5000 => RuleLookup::Rule(Rule::END),
            _ => RuleLookup::UnknownMapping,
        };
        let mut context = [0x9000u64; 17];
        context[16] = 0x5000;
        let (frames, outcome) = run(at(0x1000, 0x8000, 0), &context, resolve);
        assert_eq!(frames, [0x1000, 0x5000 | SIGNAL_FRAME_BIT]);
        assert_eq!(outcome, Outcome::Complete);
    }

    /// Without tables the chain of frame pointers is followed to a zero, which proves nothing, or until it
    /// is broken.
    #[test]
    fn frame_pointers() {
        let resolve = |_| RuleLookup::FramePointer;
        let words = [0x8010, 0x2000, 0, 0x3000];
        let (frames, outcome) = run(at(0x1000, 0x8000, 0x8000), &words, resolve);
        assert_eq!(frames, [0x1000, 0x2000, 0x3000]);
        assert_eq!(outcome, Outcome::GuessedEnd);
        let (_, outcome) = run(at(0x1000, 0x8000, 0x10), &words, resolve);
        assert_eq!(outcome, Outcome::BrokenFramePointer);
        let guessed = |_| RuleLookup::Rule(Rule::FRAME_POINTER);
        let (_, outcome) = run(at(0x1000, 0x8000, 0x8000), &words, guessed);
        assert_eq!(outcome, Outcome::GuessedEnd);
        // The frame pointer leads to a return address of zero.
        let (frames, outcome) = run(at(0x1000, 0x8000, 0x8000), &[0x8010, 0], resolve);
        assert_eq!((frames.len(), outcome), (1, Outcome::GuessedEnd));
    }

    /// After a guess, the end is proven if a table says that there is no caller. A return address of zero
    /// does not prove it, because the guess may have left the stack.
    #[test]
    fn tables_behind_a_guess() {
        let resolve = |avma| match avma {
            0x1000 => RuleLookup::FramePointer,
            0x1fff => RuleLookup::Rule(sp_rule(16)),
            0x2fff => RuleLookup::Rule(Rule::END),
            _ => RuleLookup::UnknownMapping,
        };
        let cursor = at(0x1000, 0x8000, 0x8000);
        let (frames, outcome) = run(cursor, &[0, 0x2000, 7, 0x3000], resolve);
        assert_eq!(frames, [0x1000, 0x2000, 0x3000]);
        assert_eq!(outcome, Outcome::CompleteByFramePointer);
        let (frames, outcome) = run(cursor, &[0, 0x2000, 7, 0], resolve);
        assert_eq!(frames, [0x1000, 0x2000]);
        assert_eq!(outcome, Outcome::GuessedEnd);
    }

    /// A guess that the kernel made before it stopped counts like one made here.
    #[test]
    fn guessed_before() {
        let outcome = |rule: Rule| {
            let bytes = bytes(&[0]);
            let stack = StackBytes {
                base: 0x8000,
                bytes: &bytes,
            };
            let mut cursor = at(0x1000, 0x8000, 0);
            let resolve = |_| RuleLookup::Rule(rule);
            walk(&mut cursor, true, resolve, &stack, &mut Vec::new())
        };
        assert_eq!(outcome(Rule::END), Outcome::CompleteByFramePointer);
        assert_eq!(outcome(sp_rule(8)), Outcome::GuessedEnd);
    }

    /// A stack that is deeper than a sample can hold is truncated.
    #[test]
    fn too_deep() {
        let resolve = |_| RuleLookup::Rule(sp_rule(8));
        let (frames, outcome) = run(at(0x1000, 0x8000, 0), &[0x2000; 2000], resolve);
        assert_eq!(frames.len(), MAX_USER_FRAMES as usize);
        assert_eq!(outcome, Outcome::TooDeep);
    }
}
