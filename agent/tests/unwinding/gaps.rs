//! Rules derived from instructions where no unwind entry covers the code. Tested with small pieces of
//! machine code, random programs on a simulated machine, real files, and code that has entries, for which
//! the derived rules must be the same.

use crate::inputs::{LARGE, Random, files};
use agent_ebpf::unwind::{CfaKind, Cursor, Registers, Rule, SAVED, Slot, Step, reg, step};
use flamestorm::object::{Object, Section, Segment};
use flamestorm::unwind::{Cfi, MIN_FRAME_POINTER_GAP, Table};
use object::LittleEndian as LE;
use object::read::elf::{FileHeader, SectionHeader};
use proptest::prelude::*;
use std::collections::HashMap;
use std::time::{Duration, Instant};

const TEXT: u64 = 0x40_1000;
const EH_FRAME: u64 = 0x60_0000;

/// An `.eh_frame` with one entry, which covers the byte behind the code.
fn entry_behind(end: u64) -> Vec<u8> {
    let mut section = vec![
        20, 0, 0, 0, 0, 0, 0, 0, 1, b'z', b'R', 0, 1, 0x78, 16, 1, 0x1b, 0x0c, 7, 8, 0x90, 1, 0, 0,
    ];
    section.extend([16, 0, 0, 0, 28, 0, 0, 0]);
    section.extend((end.wrapping_sub(EH_FRAME + 32) as u32).to_le_bytes());
    section.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    section.extend([0; 4]);
    section
}

/// Runs `with` on a file that contains only this code at `svma` and one entry behind it.
fn with_code<R>(code: &[u8], svma: u64, with: impl FnOnce(&Cfi<'_>, &Table) -> R) -> R {
    let end = svma + code.len() as u64;
    let eh_frame = entry_behind(end);
    let object = Object {
        segments: vec![Segment {
            file_offset: 0x1000,
            svma,
            size: code.len() as u64 + 1,
        }],
        code: vec![Section { svma, data: code }],
        eh_frame: Some(Section {
            svma: EH_FRAME,
            data: &eh_frame,
        }),
        eh_frame_hdr: None,
        entry: 0,
        build_id: None,
    };
    let cfi = Cfi::new(&object).expect("an entry");
    let table = cfi.compile().expect("a table");
    assert_eq!(cfi.function_start(end), Some(end));
    with(&cfi, &table)
}

/// The CFA's register and offset at some offsets in the code, or `None` where there is no rule.
fn cfas(code: &[u8], offsets: &[u32]) -> Vec<Option<(u8, i32)>> {
    with_code(code, TEXT, |cfi, table| {
        let rule = |offset: &u32| {
            let rule = table.rule_at(*offset);
            assert_eq!(cfi.row_at(TEXT + u64::from(*offset)), rule, "{offset}");
            (rule.kind == CfaKind::Register as u8).then_some((rule.reg, rule.offset))
        };
        offsets.iter().map(rule).collect()
    })
}

fn rsp(offset: i32) -> Option<(u8, i32)> {
    Some((reg::RSP, offset))
}

/// crtstuff's `__do_global_dtors_aux`, with one return: a jump leads over the body to the return, and the
/// next function is behind that.
#[test]
fn code_behind_a_return() {
    let code = [
        0xf3, 0x0f, 0x1e, 0xfa, // endbr64
        0x80, 0x3d, 0x10, 0x00, 0x00, 0x00, 0x00, // cmpb $0, completed(%rip)
        0x75, 0x05, // jne to the return
        0x55, // push %rbp
        0x48, 0x89, 0xe5, // mov %rsp, %rbp
        0x5d, // pop %rbp
        // The jump leads to this return, at the end of the body.
        0xc3, 0x53, // ret; push %rbx: another function
        0x31, 0xc0, // xor %eax, %eax
        0x5b, 0xc3, // pop %rbx; ret
    ];
    let found = cfas(&code, &[0, 11, 13, 14, 17, 18, 19, 20, 23]);
    let expected = [8, 8, 8, 16, 16, 8, 8, 16, 8].map(rsp);
    assert_eq!(found, expected);
}

/// Where the stack pointer is lost (a realigned stack) the frame pointer is used, and the caller's
/// registers are found where they were pushed.
#[test]
fn frame_pointer_when_the_stack_pointer_is_lost() {
    let code = [
        0x55, // push %rbp
        0x48, 0x89, 0xe5, // mov %rsp, %rbp
        0x53, // push %rbx
        0x48, 0x83, 0xe4, 0xe0, // and $-32, %rsp
        0x31, 0xdb, // xor %ebx, %ebx
        0x48, 0x8b, 0x5d, 0xf8, // mov -8(%rbp), %rbx
        0xc9, // leave
        0xc3, // ret
    ];
    let found = cfas(&code, &[0, 1, 4, 5, 9, 15, 16]);
    let expected = [
        rsp(8),
        rsp(16),
        rsp(16),
        rsp(24),
        Some((reg::RBP, 16)),
        Some((reg::RBP, 16)),
        rsp(8),
    ];
    assert_eq!(found, expected);
    with_code(&code, TEXT, |_, table| {
        let saved = table.rule_at(11).saved;
        assert_eq!(saved[..2], [Slot::below_cfa(3), Slot::below_cfa(2)]);
        assert_eq!(table.rule_at(16).saved, [Slot::SAME; 6]);
        assert_eq!(table.analysed, code.len() as u64);
    });
}

/// Registers that are pushed only so that a scan of the stack sees them (V8's conservative stack scan), and
/// then dropped instead of popped.
#[test]
fn pushed_and_not_popped() {
    let code = [
        0x53, // push %rbx
        0x41, 0x54, // push %r12
        0xff, 0xd0, // call *%rax
        0x48, 0x83, 0xc4, 0x10, // add $16, %rsp
        0xc3, // ret
    ];
    assert_eq!(cfas(&code, &[0, 1, 3, 9]), [8, 16, 24, 8].map(rsp));
    with_code(&code, TEXT, |_, table| {
        let saved = table.rule_at(3).saved;
        assert_eq!(
            (saved[0], saved[2]),
            (Slot::below_cfa(2), Slot::below_cfa(3))
        );
        assert_eq!(table.rule_at(9).saved, [Slot::SAME; 6]);
    });
}

/// A jump forward over code, and a jump backward into the middle of a frame.
#[test]
fn jumps_carry_their_frame() {
    let code = [
        0x53, // push %rbx
        0xeb, 0x03, // jmp to the test
        0xff, 0xc8, // body: dec %eax
        0x90, // nop
        0x85, 0xc0, // test %eax, %eax
        0x75, 0xf9, // jne body
        0x5b, // pop %rbx
        0xc3, // ret
    ];
    assert_eq!(
        cfas(&code, &[0, 1, 3, 6, 10, 11]),
        [8, 16, 16, 16, 16, 8].map(rsp)
    );
}

/// The entries of a linkage table with lazy binding. The first entry is reached with one word on the stack.
#[test]
fn lazy_linkage_table() {
    let mut code = vec![
        0xff, 0x35, 0x00, 0x10, 0x00, 0x00, // push GOT+8(%rip)
        0xff, 0x25, 0x00, 0x10, 0x00, 0x00, // jmp *GOT+16(%rip)
        0x0f, 0x1f, 0x40, 0x00,
    ];
    for number in 0..3u8 {
        let back = -(32 + 16 * i32::from(number));
        code.extend([0xff, 0x25, 0x00, 0x10, 0x00, 0x00]); // jmp *GOT(%rip)
        code.extend([0x68, number, 0, 0, 0, 0xe9]); // push $number; jmp to the first
        code.extend(back.to_le_bytes());
    }
    let found = cfas(&code, &[0, 6, 16, 22, 27, 48, 54, 59]);
    assert_eq!(found, [16, 24, 8, 8, 16, 8, 8, 16].map(rsp));
}

/// With indirect-branch tracking the entries begin with `endbr64` and push immediately.
#[test]
fn lazy_linkage_table_with_branch_tracking() {
    let mut code = vec![0xff, 0x35, 0, 0x10, 0, 0]; // push GOT+8(%rip)
    code.extend([0xf2, 0xff, 0x25, 0, 0x10, 0, 0, 0x0f, 0x1f, 0x00]); // bnd jmp *GOT+16(%rip)
    for number in 0..2u8 {
        code.extend([0xf3, 0x0f, 0x1e, 0xfa, 0x68, number, 0, 0, 0, 0xf2, 0xe9]);
        code.extend((-(31 + 16 * i32::from(number))).to_le_bytes());
        code.push(0x90);
    }
    let found = cfas(&code, &[0, 6, 16, 20, 25, 32, 36, 41]);
    assert_eq!(found, [16, 24, 8, 8, 16, 8, 8, 16].map(rsp));
}

/// The cases of a `switch`, which are reached only by a jump through a table, have the frame of that jump.
/// The function behind them has its own frame. Code that could be either has no rule.
#[test]
fn cases_of_a_switch() {
    let mut code = vec![
        0x53, // push %rbx
        0xff, 0x24, 0xc5, 0, 0, 0, 0, // jmp *table(,%rax,8)
        0x31, 0xc0, 0x5b, 0xc3, // case: xor %eax, %eax; pop %rbx; ret
        0xff, 0xc0, 0xff, 0xe1, // or one that jumps on: inc %eax; jmp *%rcx
        0x41, 0x54, 0x41, 0x5c, 0xc3, // push %r12; pop %r12; ret
    ];
    let found = cfas(&code, &[0, 1, 8, 10, 11, 12, 14, 16, 18, 20]);
    let expected = [8, 16, 16, 16, 8].map(rsp).into_iter();
    let expected = expected.chain([None, None]).chain([8, 16, 8].map(rsp));
    assert_eq!(found, expected.collect::<Vec<_>>());
    // Without the push both have the same frame, so all code has a rule.
    code[0] = 0x90;
    code[10] = 0x90;
    assert_eq!(cfas(&code, &[1, 8, 12, 18]), [8, 8, 8, 16].map(rsp));
}

/// A signal trampoline without an entry has its rule, and so has the byte before it, which is where the
/// lookup of a return address lands.
#[test]
fn signal_trampolines() {
    for number in [
        &[0x48, 0xc7, 0xc0, 15, 0, 0, 0][..],
        &[0xb8, 15, 0, 0, 0][..],
    ] {
        let mut code = vec![0x53, 0x5b, 0xc3];
        let start = code.len() as u32;
        code.extend(number);
        code.extend([0x0f, 0x05, 0x53, 0x5b, 0xc3]);
        let end = start + number.len() as u32 + 2;
        let signal = Rule {
            offset: 40,
            kind: CfaKind::Signal as u8,
            reg: reg::RSP,
            ..Rule::INVALID
        };
        with_code(&code, TEXT, |cfi, table| {
            for offset in 0..end + 3 {
                let rule = table.rule_at(offset);
                assert_eq!(rule, cfi.row_at(TEXT + u64::from(offset)));
                assert_eq!(rule == signal, (start - 1..end).contains(&offset));
            }
        });
        assert_eq!(cfas(&code, &[0, 1, end, end + 1]), [8, 16, 8, 16].map(rsp));
    }
}

/// Contradictory code gets no rule: a return with something on the stack, too much taken off the stack, an
/// instruction that no program has, a jump into the middle of an instruction, a `leave` without a frame.
/// The function behind it does get rules.
#[test]
fn contradictions_are_not_covered() {
    let wrong: [&[u8]; 6] = [
        &[0x53, 0x31, 0xc0, 0xc3],
        &[0x48, 0x83, 0xc4, 0x18, 0xc3],
        &[0x53, 0xe4, 0x20, 0x5b, 0xc3],
        &[0x53, 0xeb, 0x01, 0xb8, 0, 0, 0, 0, 0x5b, 0xc3],
        &[0x31, 0xc0, 0xc9, 0xc3],
        &[0x31, 0xc0, 0x00, 0x00],
    ];
    for bytes in wrong {
        let mut code = bytes.to_vec();
        code.resize(16, 0xcc);
        code.extend([0x53, 0x5b, 0xc3]);
        let found = cfas(&code, &[0, 1, 16, 17, 18]);
        assert_eq!(found, [None, None, rsp(8), rsp(16), rsp(8)], "{bytes:x?}");
    }
}

/// Padding alone gives one row for the gap, and none of it counts as derived.
#[test]
fn padding_is_not_code() {
    let code = [
        0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0, 0x0f, 0x1f, 0x44, 0, 0, 0x66, 0x90, 0x0f,
        0x1f, 0x40, 0, 0xcc, 0, 0, 0x90,
    ];
    with_code(&code, TEXT, |_, table| {
        assert_eq!((table.len(), table.analysed), (2, 0));
        assert_eq!(table.rule_at(0), Rule::INVALID);
    });
}

/// A gap that is too long is not analyzed; a frame pointer is assumed there.
#[test]
fn long_stretches_are_a_guess() {
    let code = vec![0x53; MIN_FRAME_POINTER_GAP as usize];
    with_code(&code, TEXT, |_, table| {
        assert_eq!((table.guessed, table.analysed), (code.len() as u64, 0));
    });
}

/// Random bytes, and code that is slow to analyze: it takes limited time, and the lookup of one address
/// gives the rule of the table.
#[test]
fn hostile_code() {
    const BYTES: usize = MIN_FRAME_POINTER_GAP as usize - 1;
    let mut random = Random(11);
    let noise: Vec<u8> = (0..BYTES).map(|_| random.next() as u8).collect();
    // Steps with different stack depths that all jump to one another.
    let ladder = |step: &[u8]| step.iter().copied().cycle().take(BYTES).collect();
    let codes: Vec<Vec<u8>> = vec![
        noise,
        ladder(&[0x53]),
        ladder(&[0x75, 0xfe]),
        ladder(&[0x75, 0x01, 0x53, 0x5b]),
        ladder(&[0x75, 0xfd, 0x53]),
        ladder(&[0x0f, 0x85, 0xf0, 0x7f, 0, 0, 0x48, 0x83, 0xec, 0x10]),
        ladder(&[0x0f, 0x85, 0xf0, 0x7f, 0xff, 0xff, 0x41, 0x54]),
        ladder(&[0xe8, 0, 0, 0, 0, 0x66, 0x90]),
        ladder(&[0xff, 0xe0, 0x53, 0xff, 0xe0]),
    ];
    for (which, code) in codes.iter().enumerate() {
        let start = Instant::now();
        with_code(code, TEXT, |cfi, table| {
            assert!(table.len() <= BYTES + 1);
            for _ in 0..3 {
                let offset = random.below(BYTES as u64);
                let rule = table.rule_at(offset as u32);
                assert_eq!(cfi.row_at(TEXT + offset), rule, "{which} at {offset}");
            }
        });
        // For the debug profile on a busy machine: four evaluations.
        let elapsed = start.elapsed();
        assert!(elapsed < Duration::from_secs(20), "{which}: {elapsed:?}");
    }
}

/// The operations of a random program. The epilogue undoes all of them.
#[derive(Clone, Debug)]
enum Op {
    /// Push of the register with this number in machine code, popped in the epilogue.
    Push(u8),
    /// `sub $n, %rsp`.
    Reserve(u8),
    /// `lea -n(%rsp), %rsp`.
    Lea(u8),
    /// `push %rbp; mov %rsp, %rbp`, undone by `leave`.
    Frame,
    /// `push $n`, followed at once by `pop %rax`.
    Bounce(u8),
    /// `xor` of a register with itself, if it was pushed before.
    Clear(u8),
    /// `jne` to a second epilogue, which is behind the return.
    LeaveEarly,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => prop::sample::select(vec![3u8, 12, 13, 14, 15, 0, 1, 6]).prop_map(Op::Push),
        2 => (1..16u8).prop_map(|n| Op::Reserve(n * 8)),
        1 => (1..16u8).prop_map(|n| Op::Lea(n * 8)),
        1 => Just(Op::Frame),
        1 => any::<u8>().prop_map(Op::Bounce),
        3 => prop::sample::select(vec![3u8, 12, 13, 14, 15]).prop_map(Op::Clear),
        2 => Just(Op::LeaveEarly),
    ]
}

/// The DWARF number of a register, given its number in machine code.
fn dwarf(code: u8) -> usize {
    let low = [0, 2, 1, 3, 7, 6, 4, 5];
    low.get(usize::from(code))
        .copied()
        .unwrap_or(usize::from(code))
}

fn push(code: &mut Vec<u8>, register: u8, opcode: u8) {
    if register >= 8 {
        code.push(0x41);
    }
    code.push(opcode | register & 7);
}

fn epilogue(done: &[Op], code: &mut Vec<u8>) {
    for op in done.iter().rev() {
        match op {
            Op::Push(register) => push(code, *register, 0x58),
            Op::Reserve(n) => code.extend([0x48, 0x83, 0xc4, *n]),
            Op::Lea(n) => {
                code.extend([0x48, 0x8d, 0xa4, 0x24]);
                code.extend(u32::from(*n).to_le_bytes());
            }
            Op::Frame => code.push(0xc9),
            Op::Bounce(_) | Op::Clear(_) | Op::LeaveEarly => {}
        }
    }
    code.push(0xc3);
}

/// The machine code of the program.
fn assemble(ops: &[Op]) -> Vec<u8> {
    let mut code = Vec::new();
    let mut done: Vec<Op> = Vec::new();
    let mut early = Vec::new();
    let mut framed = false;
    for op in ops {
        match op {
            Op::Push(register) => push(&mut code, *register, 0x50),
            Op::Reserve(n) => code.extend([0x48, 0x83, 0xec, *n]),
            Op::Lea(n) => {
                code.extend([0x48, 0x8d, 0xa4, 0x24]);
                code.extend((-i32::from(*n)).to_le_bytes());
            }
            Op::Frame if framed => continue,
            Op::Frame => {
                framed = true;
                code.extend([0x55, 0x48, 0x89, 0xe5]);
            }
            Op::Bounce(n) => code.extend([0x6a, *n, 0x58]),
            Op::Clear(register) => {
                if !done
                    .iter()
                    .any(|op| matches!(op, Op::Push(r) if r == register))
                {
                    continue;
                }
                let high = u8::from(*register >= 8);
                let low = register & 7;
                code.extend([0x40 | high << 2 | high, 0x31, 0xc0 | low << 3 | low]);
            }
            Op::LeaveEarly => {
                code.extend([0x0f, 0x85, 0, 0, 0, 0]);
                early.push((code.len(), done.clone()));
            }
        }
        done.push(op.clone());
    }
    epilogue(&done, &mut code);
    for (after, done) in early {
        let distance = (code.len() - after) as u32;
        code[after - 4..after].copy_from_slice(&distance.to_le_bytes());
        epilogue(&done, &mut code);
    }
    code
}

/// A simulated machine that executes these instructions.
struct Machine<'code> {
    code: &'code [u8],
    at: usize,
    gp: [u64; 16],
    stack: HashMap<u64, u64>,
    /// Bits that say which of the next `jne` are taken, lowest first.
    jumps: u64,
}

impl Machine<'_> {
    fn push(&mut self, value: u64) {
        self.gp[7] -= 8;
        self.stack.insert(self.gp[7], value);
    }

    fn pop(&mut self) -> u64 {
        self.gp[7] += 8;
        self.stack[&(self.gp[7] - 8)]
    }

    /// Executes one instruction. Returns false at the return.
    fn step(&mut self) -> bool {
        let rest = &self.code[self.at..];
        let word = |at: usize| i32::from_le_bytes(rest[at..at + 4].try_into().expect("four bytes"));
        let length = match *rest {
            [0x50..=0x57, ..] => {
                self.push(self.gp[dwarf(rest[0] & 7)]);
                1
            }
            [0x58..=0x5f, ..] => {
                self.gp[dwarf(rest[0] & 7)] = self.pop();
                1
            }
            [0x41, 0x50..=0x57, ..] => {
                self.push(self.gp[usize::from(rest[1] & 7) + 8]);
                2
            }
            [0x41, 0x58..=0x5f, ..] => {
                self.gp[usize::from(rest[1] & 7) + 8] = self.pop();
                2
            }
            [0x48, 0x89, 0xe5, ..] => {
                self.gp[6] = self.gp[7];
                3
            }
            [0x48, 0x83, 0xec, n, ..] => {
                self.gp[7] -= u64::from(n);
                4
            }
            [0x48, 0x83, 0xc4, n, ..] => {
                self.gp[7] += u64::from(n);
                4
            }
            [0x48, 0x8d, 0xa4, 0x24, ..] => {
                self.gp[7] = self.gp[7].wrapping_add_signed(i64::from(word(4)));
                8
            }
            [0x6a, n, ..] => {
                self.push(n as i8 as u64);
                2
            }
            [0x40..=0x45, 0x31, modrm, ..] => {
                let high = rest[0] & 1;
                self.gp[dwarf(modrm & 7 | high << 3)] = 0;
                3
            }
            [0x0f, 0x85, ..] => {
                let taken = self.jumps & 1 == 1;
                self.jumps >>= 1;
                6 + if taken { word(2) as usize } else { 0 }
            }
            [0xc9, ..] => {
                self.gp[7] = self.gp[6];
                self.gp[6] = self.pop();
                1
            }
            [0xc3, ..] => return false,
            _ => panic!("an instruction that is not generated: {rest:x?}"),
        };
        self.at += length;
        true
    }
}

/// Runs the program. Before each instruction the step must find the caller with its registers.
fn caller_everywhere(code: &[u8], jumps: u64, seed: u64) {
    const RETURN: u64 = 0x1234_5678;
    let mut random = Random(seed);
    let mut gp: [u64; 16] = std::array::from_fn(|_| random.next());
    gp[7] = 0x7fff_0000_1000;
    let caller = Registers { gp, ip: RETURN };
    let mut machine = Machine {
        code,
        at: 0,
        gp,
        stack: HashMap::new(),
        jumps,
    };
    machine.push(RETURN);
    with_code(code, TEXT, |cfi, table| {
        loop {
            let context = format!("at {} of {code:x?}", machine.at);
            let rule = table.rule_at(machine.at as u32);
            assert_eq!(cfi.row_at(TEXT + machine.at as u64), rule, "{context}");
            let mut cursor = Cursor::new(Registers {
                gp: machine.gp,
                ip: TEXT + machine.at as u64,
            });
            let result = step(&mut cursor, &rule, |address, words| {
                // Popped words are still in memory; words that were never written read as zero.
                for (index, word) in words.iter_mut().enumerate() {
                    let address = address.wrapping_add(index as u64 * 8);
                    *word = machine.stack.get(&address).copied().unwrap_or(0);
                }
                true
            });
            assert_eq!(result, Step::Caller, "{rule:?} {context}");
            assert_eq!(cursor.regs.ip, RETURN, "{rule:?} {context}");
            assert_eq!(cursor.regs.sp(), caller.sp(), "{rule:?} {context}");
            for register in SAVED.map(usize::from) {
                let (got, expected) = (cursor.regs.gp[register], caller.gp[register]);
                assert_eq!(got, expected, "register {register} {rule:?} {context}");
            }
            if !machine.step() {
                break;
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// In random programs, on several paths, the caller and its registers are found before each
    /// instruction.
    #[test]
    fn random_programs(
        ops in prop::collection::vec(op(), 0..24),
        jumps in prop::collection::vec(any::<u64>(), 4),
        seed in any::<u64>(),
    ) {
        let code = assemble(&ops);
        for jumps in jumps.into_iter().map(|bits| bits & bits >> 8) {
            caller_everywhere(&code, jumps, seed);
        }
    }
}

type Elf = object::elf::FileHeader64<LE>;

/// Address and content of a section.
fn section<'data>(data: &'data [u8], name: &str) -> Option<(u64, &'data [u8])> {
    let header = Elf::parse(data).expect("an ELF file");
    let sections = header.sections(LE, data).expect("sections");
    let (_, section) = sections.section_by_name(LE, name.as_bytes())?;
    Some((section.sh_addr(LE), section.data(LE, data).expect("bytes")))
}

/// `.init` and `.fini` (`sub $8, %rsp; …; add $8, %rsp; ret`) in every file that has them without entries.
#[test]
fn crt_files() {
    let mut tested = 0;
    for (path, data) in files(LARGE) {
        let object = Object::parse(&data).expect("an ELF file");
        let cfi = Cfi::new(&object).expect("entries");
        let table = cfi.compile().expect("a table");
        println!("{}: {} bytes derived", path.display(), table.analysed);
        for name in [".init", ".fini"] {
            let Some((start, code)) = section(&data, name) else {
                continue;
            };
            let sub = code
                .windows(4)
                .position(|four| four == [0x48, 0x83, 0xec, 8]);
            let add = code
                .windows(4)
                .position(|four| four == [0x48, 0x83, 0xc4, 8]);
            let (Some(sub), Some(add)) = (sub, add) else {
                continue;
            };
            for (offset, expected) in [(0, 8), (sub, 8), (sub + 4, 16), (add, 16), (add + 4, 8)] {
                let rule = cfi.row_at(start + offset as u64);
                let context = format!("{} {name} + {offset}", path.display());
                assert_eq!((rule.reg, rule.offset), (reg::RSP, expected), "{context}");
            }
            tested += 1;
        }
    }
    assert!(tested >= 2, "this test program has both");
}

/// A program linked by lld, which writes no entry for its linkage table.
#[test]
fn linkage_table_of_lld() {
    let sysroot = std::process::Command::new("rustc")
        .args(["--print", "sysroot"])
        .output();
    let sysroot = sysroot.expect("rustc").stdout;
    let linker = std::path::Path::new(String::from_utf8_lossy(&sysroot).trim())
        .join("lib/rustlib/x86_64-unknown-linux-gnu/bin/gcc-ld");
    if !linker.join("ld.lld").exists() {
        println!("this Rust brings no lld: not tested");
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let program = directory.path().join("program");
    let source = directory.path().join("program.c");
    std::fs::write(
        &source,
        "#include <stdio.h>\nint main(void) { return puts(\"\") + getchar(); }",
    )
    .expect("a file");
    for binding in ["-Wl,-z,lazy", "-Wl,-z,now"] {
        let linked = std::process::Command::new("cc")
            .arg(format!("-B{}", linker.display()))
            .args(["-fuse-ld=lld", binding, "-o"])
            .args([&program, &source])
            .output()
            .expect("a C compiler");
        assert!(linked.status.success(), "{linked:?}");
        let data = std::fs::read(&program).expect("a program");
        let object = Object::parse(&data).expect("an ELF file");
        let cfi = Cfi::new(&object).expect("entries");
        let (start, code) = section(&data, ".plt").expect("a linkage table");
        assert!(code.len() >= 48, "two functions and what binds them");
        let rsp = |offset: usize| {
            let rule = cfi.row_at(start + offset as u64);
            assert_eq!(rule.kind, CfaKind::Register as u8, "{binding} {offset}");
            (rule.reg == reg::RSP).then_some(rule.offset)
        };
        // The first entry of lld's table: `push; jmp *; nop`, the others: `jmp *; push; jmp`.
        for entry in (16..code.len()).step_by(16) {
            let got = [0, 6, 11].map(|offset| rsp(entry + offset));
            assert_eq!(got, [8, 8, 16].map(Some), "{binding} {entry}");
        }
        assert_eq!([0, 6].map(rsp), [16, 24].map(Some), "{binding}");
    }
}

/// Code that has entries, analyzed as if it had none. Where both find the CFA from the same register, the
/// offsets are the same, with few exceptions: functions that are entered in the middle. Two kinds of code
/// are left out, because only entries describe them: parts of functions that the compiler moved elsewhere,
/// and files that handle exceptions (no instruction leads to the landing pads).
#[test]
fn as_the_entries_say() {
    const WINDOW: u64 = 32 << 10;
    const WINDOWS: u64 = 12;
    for (path, data) in files(LARGE) {
        let object = Object::parse(&data).expect("an ELF file");
        let cfi = Cfi::new(&object).expect("entries");
        let table = cfi.compile().expect("a table");
        let Some((text, code)) = section(&data, ".text") else {
            continue;
        };
        let mut random = Random(5);
        let (mut same, mut other, mut apart, mut unknown) = (0u64, 0u64, 0u64, 0u64);
        for _ in 0..WINDOWS {
            let at = text + random.below((code.len() as u64).saturating_sub(WINDOW).max(1));
            let Some(start) = cfi.function_start(at).filter(|start| *start >= text) else {
                continue;
            };
            let bytes = &code[(start - text) as usize..];
            let bytes = &bytes[..bytes.len().min(WINDOW as usize)];
            with_code(bytes, start, |_, derived| {
                for offset in (0..bytes.len() as u64).step_by(3) {
                    let svma = start + offset;
                    let Some(function) = cfi.function_start(svma) else {
                        continue;
                    };
                    let entry = table.rule_at((function - table.base_svma) as u32);
                    if (entry.reg, entry.offset) != (reg::RSP, 8) {
                        continue;
                    }
                    let rule = table.rule_at((svma - table.base_svma) as u32);
                    if rule.kind != CfaKind::Register as u8 || rule.is_guess() {
                        continue;
                    }
                    let found = derived.rule_at(offset as u32);
                    match found.kind == CfaKind::Register as u8 {
                        false => unknown += 1,
                        true if found.reg != rule.reg => apart += 1,
                        true if found.offset == rule.offset => same += 1,
                        true => other += 1,
                    }
                }
            });
        }
        println!(
            "{}: {same} the same, {other} not, {apart} by another register, {unknown} unknown",
            path.display()
        );
        if section(&data, ".gcc_except_table").is_none() {
            assert!(other * 100 <= same, "{}", path.display());
        }
    }
}
