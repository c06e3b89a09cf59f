//! Derives rules from the instructions of code that has no unwind entry.
//!
//! Crt files (`__do_global_dtors_aux`, `_init`), linkage tables of linkers that write no entries for them,
//! hand-written assembly and signal trampolines come without call frame information. But their instructions
//! show what they do to the stack. The bytes are decoded from first to last, and the distance from the
//! stack pointer to the CFA is followed along all paths through them (pushes and pops, constants added to
//! rsp, frame pointers and other copies of rsp, saved registers).
//!
//! # How far to trust it
//! An unwind entry is a statement by the code's author; a derived rule is only a conclusion. It rests on
//! these assumptions:
//! - An instruction that follows a return, a jump, a trap or padding, and is not the target of a jump, is
//!   the first one of a function: CFA = rsp + 8. So is the next entry of a linkage table, which follows the
//!   indirect jump of the previous one.
//! - Called functions return, leave rsp as they found it, and preserve rbx, rbp and r12 to r15.
//! - Memory where a register was saved is changed only through rsp or a copy of it.
//! - Only code in the same stretch jumps into the middle of these functions. (Compilers move parts of
//!   functions elsewhere, and exceptions enter at landing pads, but both of these have unwind entries.)
//!
//! After a jump through a table in the middle of a frame, code that no other jump leads to may be one of
//! the table's cases or a new function. Both readings are tried; if both are possible, neither is used.
//!
//! A function that contradicts itself is dropped as a whole. Contradictions are: a return with something
//! left on the stack, more taken off the stack than was put there, a jump between two instructions, an
//! instruction that no program uses, the end of the bytes in the middle of a frame, or a stack depth other
//! than the one that an already understood function has at the same place. This also rules out data between
//! the code. If only the stack pointer is lost (another value is loaded into it, or two paths bring
//! different depths), the rule uses rbp or another copy of the stack pointer; if there is none, the address
//! is not covered.

mod decode;
mod flow;
mod state;

use agent_ebpf::unwind::{CfaKind, Rule, reg};
use decode::{Instruction, decode, filler};

/// Bytes from the stack pointer to the `sigcontext` when `rt_sigreturn` is called. The `ucontext` begins
/// with `uc_flags`, `uc_link` and `uc_stack` (Linux, asm-generic/ucontext.h).
const SIGCONTEXT_OFFSET: i32 = 40;

const SIGNAL: Rule = Rule {
    offset: SIGCONTEXT_OFFSET,
    kind: CfaKind::Signal as u8,
    reg: reg::RSP,
    ..Rule::INVALID
};

/// Calls `row` with start, end and rule of consecutive rows that cover the code, which begins at `svma`.
/// The rule is [`Rule::INVALID`] where nothing is known, and for padding before and after the code.
///
/// The cost is linear: each byte is decoded once, and each instruction is followed
/// [`flow::MAX_STEPS_PER_INSTRUCTION`] times on average at most. It takes some 300 bytes of memory for each
/// instruction.
pub(super) fn sweep(code: &[u8], svma: u64, mut row: impl FnMut(u64, u64, Rule)) {
    let mut emit = |start: usize, end: usize, rule| {
        if start < end {
            row(svma + start as u64, svma + end as u64, rule);
        }
    };
    // Nearly all stretches without an entry are only the padding between two functions.
    let mut padding = 0;
    while padding < code.len() {
        match filler(&code[padding..]) {
            0 => break,
            length => padding += length,
        }
    }
    emit(0, padding, Rule::INVALID);
    if padding == code.len() {
        return;
    }
    let instructions = decode(&code[padding..], svma + padding as u64);
    let states = flow::states(&instructions, svma + padding as u64);
    let mut last = Rule::INVALID;
    let rules: Vec<Rule> = instructions
        .iter()
        .zip(states)
        .map(|(instruction, state)| {
            let calls = matches!(instruction.flow, decode::Flow::Call(_));
            last = match state {
                Some(state) => state.rule(calls).unwrap_or(Rule::INVALID),
                // Padding between two functions is never executed, so it needs no row of its own.
                None if instruction.padding => last,
                None => Rule::INVALID,
            };
            last
        })
        .collect();
    rows(&instructions, rules, padding, emit);
}

/// Emits the rows of the instructions, the first of which is at offset `base`. Adds the rules of signal
/// trampolines.
fn rows(
    instructions: &[Instruction],
    mut rules: Vec<Rule>,
    base: usize,
    mut emit: impl FnMut(usize, usize, Rule),
) {
    for index in 1..instructions.len() {
        if instructions[index].sigreturn {
            rules[index - 1] = SIGNAL;
            rules[index] = SIGNAL;
        }
    }
    let used = instructions.iter().rposition(|i| !i.padding);
    let used = used.map_or(0, |last| last + 1);
    for (index, instruction) in instructions.iter().enumerate() {
        let start = base + instruction.start as usize;
        let end = start + instruction.length as usize;
        let rule = if index < used {
            rules[index]
        } else {
            Rule::INVALID
        };
        // A signal handler returns to the trampoline's first byte, and a return address is looked up one
        // byte before. So the byte before the trampoline gets its rule as well, whatever code it belongs
        // to. (glibc's own unwind entry also begins there.) Only a sample in an instruction of one byte at
        // that place is unwound wrongly.
        let before_signal = rule != SIGNAL && rules.get(index + 1) == Some(&SIGNAL);
        let own = end - usize::from(before_signal);
        emit(start, own, rule);
        emit(own, end, SIGNAL);
    }
}
