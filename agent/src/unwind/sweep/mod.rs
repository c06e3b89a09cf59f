//! Rules for code that has no unwind entry, derived from its instructions.
//!
//! Crt files (`__do_global_dtors_aux`, `_init`), linkage tables of linkers that write no entries
//! for them, hand-written assembly and signal trampolines come without call frame information. What
//! such code does to the stack can be read: the bytes are decoded from first to last, and the
//! distance from the stack pointer to the CFA is followed along the paths through them (pushes and
//! pops, constants added to rsp, frame pointers and other copies of rsp, saved registers).
//!
//! # Whether to trust it
//! A derived rule is a conclusion, where an unwind entry is the author's statement. It rests on
//! these assumptions:
//! - What follows a return, a jump, a trap or padding, and is not the target of a jump, is the first
//!   instruction of a function: CFA = rsp + 8. The entry of a linkage table that comes after the
//!   indirect jump is too.
//! - Called functions return, leave rsp as they found it and preserve rbx, rbp and r12 to r15.
//! - Memory where a register was saved is changed through rsp, or a copy of it, only.
//! - Only the code in the same stretch jumps into the middle of these functions. (Compilers move
//!   parts of functions elsewhere, and exceptions enter at landing pads; both have entries.)
//!
//! After a jump through a table out of the middle of a frame, what no other jump leads to may be one
//! of its cases: both readings are tried, and where both are possible neither is taken.
//!
//! What contradicts itself is dropped, the whole function with it: a return with something left on
//! the stack, more taken off than was put there, a jump between two instructions, an instruction
//! that no program has, the end of the bytes in the middle of a frame, another stack depth than a
//! function already understood has at the same place. This also sorts out data between the code.
//! Where only the stack pointer is lost (another value is loaded into it, two paths bring different
//! depths), the rule goes by rbp or another copy, and if there is none, the address is not covered.

mod decode;
mod flow;
mod state;

use agent_ebpf::unwind::{CfaKind, Rule, reg};
use decode::{Instruction, decode, filler};

/// Bytes from the stack pointer to the `sigcontext` when `rt_sigreturn` is called: `uc_flags`,
/// `uc_link` and `uc_stack` of the `ucontext` lie before it (Linux, asm-generic/ucontext.h).
const SIGCONTEXT_OFFSET: i32 = 40;

const SIGNAL: Rule = Rule {
    offset: SIGCONTEXT_OFFSET,
    kind: CfaKind::Signal as u8,
    reg: reg::RSP,
    ..Rule::INVALID
};

/// Calls `row` with start, end and rule of consecutive rows that cover the code, which begins at
/// `svma`. Where nothing is known, and for padding before and after the code, it is
/// [`Rule::INVALID`].
///
/// Each byte is decoded once, and each instruction followed at most
/// [`flow::MAX_STEPS_PER_INSTRUCTION`] times: the cost is linear, and some 300 bytes of memory for
/// an instruction.
pub(super) fn sweep(code: &[u8], svma: u64, mut row: impl FnMut(u64, u64, Rule)) {
    let mut emit = |start: usize, end: usize, rule| {
        if start < end {
            row(svma + start as u64, svma + end as u64, rule);
        }
    };
    // Nearly all of these stretches are nothing but the padding between two functions.
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
                // Padding between two functions is never executed: it needs no row of its own.
                None if instruction.padding => last,
                None => Rule::INVALID,
            };
            last
        })
        .collect();
    rows(&instructions, rules, padding, emit);
}

/// Hands out the rows of the instructions, which begin at the offset `base`.
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
        // The handler's return address is the trampoline's first byte, and is looked up a byte
        // before: that byte is the trampoline's too, whatever it is. (glibc's own entry begins
        // there. An instruction of one byte, sampled exactly there, is misread.)
        let before_signal = rule != SIGNAL && rules.get(index + 1) == Some(&SIGNAL);
        let own = end - usize::from(before_signal);
        emit(start, own, rule);
        emit(own, end, SIGNAL);
    }
}
