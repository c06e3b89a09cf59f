//! Random call frame information: the compiled table, compared with gimli's rows and with the lookup of a
//! single address.

use crate::inputs::{Random, cursor, read};
use crate::reference::{Slice, check, for_each_row};
use agent_ebpf::unwind::{Cursor, Rule, SAVED, Slot, Step, step};
use flamestorm::object::{Object, Section, Segment};
use flamestorm::unwind::Cfi;
use proptest::prelude::*;

/// Number of random inputs for each property.
const CASES: u32 = 128;

const TEXT: u64 = 0x40_1000;
const TEXT_BYTES: u64 = 0x2000;
const EH_FRAME: u64 = 0x50_0000;
const HDR: u64 = 0x4f_0000;

/// A call frame instruction. Numbers are operands in their encoded form.
#[derive(Clone, Debug)]
enum Instruction {
    Advance(u8),
    Advance2(u16),
    DefCfa(u8, u16),
    DefCfaRegister(u8),
    DefCfaOffset(u16),
    CfaExpression(u8, i16, Option<u16>),
    CfaIndexed(u8, i16, u8, u16),
    Plt(u8),
    Offset(u8, u8),
    OffsetSigned(u8, i8),
    Undefined(u8),
    SameValue(u8),
    Register(u8, u8),
    Restore(u8),
    SavedAt(u8, u8, i16),
    RememberRestore(Vec<Instruction>),
}

fn register() -> impl Strategy<Value = u8> {
    prop_oneof![4 => Just(7), 4 => Just(6), 2 => 0..16u8]
}

fn saved() -> impl Strategy<Value = u8> {
    prop_oneof![8 => prop::sample::select(SAVED.to_vec()), 1 => 0..7u8, 1 => 8..33u8]
        .prop_filter("the return address has its own rule", |r| *r != 16)
}

fn instruction() -> impl Strategy<Value = Instruction> {
    use Instruction::*;
    let one = prop_oneof![
        6 => (1..64u8).prop_map(Advance),
        1 => (1..400u16).prop_map(Advance2),
        4 => (register(), 0..2048u16).prop_map(|(r, o)| DefCfa(r, o)),
        2 => register().prop_map(DefCfaRegister),
        4 => (0..512u16).prop_map(|o| DefCfaOffset(o * 8)),
        2 => (register(), -300..300i16, prop::option::of(0..20_000u16))
            .prop_map(|(r, o, p)| CfaExpression(r, o, p)),
        1 => (register(), -300..300i16, 0..16u8, 0..20_000u16)
            .prop_map(|(r, o, i, p)| CfaIndexed(r, o, i, p)),
        1 => (0..32u8).prop_map(Plt),
        6 => (saved(), 1..150u8).prop_map(|(r, n)| Offset(r, n)),
        2 => (saved(), any::<i8>()).prop_map(|(r, n)| OffsetSigned(r, n)),
        1 => saved().prop_map(Undefined),
        1 => saved().prop_map(SameValue),
        1 => (saved(), 0..16u8).prop_map(|(r, s)| Register(r, s)),
        2 => saved().prop_map(Restore),
        2 => (saved(), register(), -400..400i16).prop_map(|(r, b, o)| SavedAt(r, b, o)),
    ];
    one.prop_recursive(2, 12, 6, |inner| {
        prop::collection::vec(inner, 0..6).prop_map(RememberRestore)
    })
}

fn uleb(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn sleb(out: &mut Vec<u8>, mut value: i64) {
    while !(-0x40..0x40).contains(&value) {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8 & 0x7f);
}

/// Encodes a program. `plain` is whether the CFA is a register and an offset: only then may one of the two
/// be changed alone.
fn encode(program: &[Instruction], plain: &mut bool, out: &mut Vec<u8>) {
    for instruction in program {
        encode_one(instruction, plain, out);
    }
}

fn encode_one(instruction: &Instruction, plain: &mut bool, out: &mut Vec<u8>) {
    use Instruction::*;
    match instruction {
        Advance(delta) => out.push(0x40 | delta),
        Advance2(delta) => {
            out.push(0x03);
            out.extend(delta.to_le_bytes());
        }
        DefCfa(register, offset) => {
            *plain = true;
            out.extend([0x0c, *register]);
            uleb(out, u64::from(*offset));
        }
        DefCfaRegister(register) if *plain => out.extend([0x0d, *register]),
        DefCfaOffset(offset) if *plain => {
            out.push(0x0e);
            uleb(out, u64::from(*offset));
        }
        DefCfaRegister(_) | DefCfaOffset(_) => {}
        CfaExpression(register, offset, plus) => {
            *plain = false;
            let mut expression = vec![0x70 + register];
            sleb(&mut expression, i64::from(*offset) * 8);
            if let Some(plus) = plus {
                expression.push(0x06);
                if *plus > 0 {
                    expression.push(0x23);
                    uleb(&mut expression, u64::from(*plus));
                }
            }
            out.push(0x0f);
            uleb(out, expression.len() as u64);
            out.extend(expression);
        }
        CfaIndexed(register, offset, index, plus) => {
            *plain = false;
            let mut expression = vec![0x70 + register];
            sleb(&mut expression, i64::from(*offset) * 8);
            expression.extend([0x70 + index, 0, 0x38, 0x1e, 0x22, 0x06, 0x23]);
            uleb(&mut expression, u64::from(*plus));
            out.push(0x0f);
            uleb(out, expression.len() as u64);
            out.extend(expression);
        }
        Plt(threshold) => {
            *plain = false;
            out.extend([0x0f, 11, 0x77, 8, 0x80, 0, 0x3f, 0x1a, 0x30 + threshold]);
            out.extend([0x2a, 0x33, 0x24, 0x22]);
        }
        Offset(register, factor) => {
            out.extend([0x05, *register]);
            uleb(out, u64::from(*factor));
        }
        OffsetSigned(register, factor) => {
            out.extend([0x11, *register]);
            sleb(out, i64::from(*factor));
        }
        Undefined(register) => out.extend([0x07, *register]),
        SameValue(register) => out.extend([0x08, *register]),
        Register(register, source) => out.extend([0x09, *register, *source]),
        Restore(register) => out.extend([0x06, *register]),
        SavedAt(register, base, offset) => {
            let mut expression = vec![0x70 + base];
            sleb(&mut expression, i64::from(*offset));
            out.extend([0x10, *register, expression.len() as u8]);
            out.extend(expression);
        }
        RememberRestore(program) => {
            let before = *plain;
            out.push(0x0a);
            encode(program, plain, out);
            out.push(0x0b);
            *plain = before;
        }
    }
}

/// The sections of a file under construction.
struct Sections {
    eh_frame: Vec<u8>,
    /// Start of the function and address of its entry, both svmas.
    entries: Vec<(u64, u64)>,
}

impl Sections {
    /// A section with one CIE: CFA = rsp + 8, the return address below it.
    fn new() -> Sections {
        let mut sections = Sections {
            eh_frame: Vec::new(),
            entries: Vec::new(),
        };
        let mut cie = vec![0, 0, 0, 0, 1, b'z', b'R', 0, 1, 0x78, 16, 1, 0x1b];
        cie.extend([0x0c, 7, 8, 0x90, 1]);
        sections.entry(cie);
        sections
    }

    fn entry(&mut self, mut body: Vec<u8>) {
        while body.len() % 8 != 4 {
            body.push(0);
        }
        self.eh_frame.extend((body.len() as u32).to_le_bytes());
        self.eh_frame.extend(body);
    }

    fn fde(&mut self, start: u64, length: u32, program: &[Instruction]) {
        let at = self.eh_frame.len();
        let mut body = (at as u32 + 4).to_le_bytes().to_vec();
        let pointer = start.wrapping_sub(EH_FRAME + at as u64 + 8) as u32;
        body.extend(pointer.to_le_bytes());
        body.extend(length.to_le_bytes());
        body.push(0);
        encode(program, &mut true, &mut body);
        self.entry(body);
        self.entries.push((start, EH_FRAME + at as u64));
    }

    fn finish(&mut self) -> Vec<u8> {
        self.eh_frame.extend([0; 4]);
        self.entries.sort_unstable();
        let mut hdr = vec![1, 0x1b, 0x03, 0x3b];
        hdr.extend((EH_FRAME.wrapping_sub(HDR + 4) as u32).to_le_bytes());
        hdr.extend((self.entries.len() as u32).to_le_bytes());
        for (start, entry) in &self.entries {
            hdr.extend((start.wrapping_sub(HDR) as u32).to_le_bytes());
            hdr.extend((entry.wrapping_sub(HDR) as u32).to_le_bytes());
        }
        hdr
    }

    fn object<'data>(&'data self, hdr: Option<&'data [u8]>, entry: u64) -> Object<'data> {
        Object {
            segments: vec![Segment {
                file_offset: 0x1000,
                svma: TEXT,
                size: TEXT_BYTES,
            }],
            code: Vec::new(),
            eh_frame: Some(Section {
                svma: EH_FRAME,
                data: &self.eh_frame,
            }),
            eh_frame_hdr: hdr.map(|data| Section { svma: HDR, data }),
            entry,
            build_id: None,
        }
    }
}

fn lost(rule: &Rule) -> Vec<u8> {
    let pairs = SAVED.into_iter().zip(rule.saved);
    let lost = pairs.filter(|(_, slot)| *slot == Slot::UNDEFINED);
    lost.map(|(register, _)| register).collect()
}

/// Whether rules can express everything in the program, so that none of it may be unsupported.
fn must_be_supported(program: &[Instruction]) -> bool {
    use Instruction::*;
    program.iter().all(|instruction| match instruction {
        Offset(6, factor) => *factor <= 127,
        OffsetSigned(6, factor) => *factor > 0,
        OffsetSigned(7, _) | Offset(7, _) | Register(7, _) | SavedAt(7, ..) => false,
        Undefined(7) | SameValue(7) | SavedAt(6, ..) | CfaExpression(..) => false,
        RememberRestore(program) => must_be_supported(program),
        _ => true,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() })]

    /// Random programs have the same caller and saved registers as by gimli's rows, or are reported as
    /// unsupported.
    #[test]
    fn same_caller_as_by_gimlis_rows(
        programs in prop::collection::vec(
            (0..3u32, 1..600u32, prop::collection::vec(instruction(), 0..24)), 1..6),
        with_hdr in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut sections = Sections::new();
        let mut start = TEXT;
        for (gap, length, program) in &programs {
            start += u64::from(gap * 16);
            sections.fde(start, *length, program);
            start += u64::from(*length);
        }
        let hdr = sections.finish();
        let object = sections.object(with_hdr.then_some(&hdr[..]), 0);
        let table = Cfi::new(&object).expect("entries").compile().expect("a table");
        let eh_frame = gimli::EhFrame::from(Slice::new(&sections.eh_frame, gimli::LittleEndian));
        let bases = gimli::BaseAddresses::default().set_eh_frame(EH_FRAME);
        let mut random = Random(seed);
        let sound = programs.iter().all(|(_, _, program)| must_be_supported(program));
        let registers = |at| cursor(at, &mut random).regs;
        for_each_row(&eh_frame, &bases, registers, |at, _, registers, caller| {
            let rule = table.rule_at((at - TEXT) as u32);
            let mut ours = Cursor::new(*registers);
            let context = format!("{at:#x} {rule:?}");
            match step(&mut ours, &rule, read) {
                Step::Caller => check(&ours, &caller, &lost(&rule), &context),
                Step::NoProgress => assert!(caller.cfa < registers.sp(), "{context}"),
                Step::Unsupported => assert!(!sound, "{context}"),
                other => panic!("{other:?}: {context}"),
            }
        });
    }

    /// With entries that overlap, coincide, are empty or lie outside the text, the lookup of one address
    /// and the whole table never disagree, and a function's start is never that of another function.
    #[test]
    fn disordered_entries(
        entries in prop::collection::vec(
            (0..0x2800u64, prop_oneof![Just(0u32), 1..2000u32, Just(u32::MAX)],
             prop::collection::vec(instruction(), 0..6)), 1..12),
        with_hdr in any::<bool>(),
        entry in 0..0x3000u64,
    ) {
        let mut sections = Sections::new();
        for (offset, length, program) in &entries {
            sections.fde(TEXT - 0x400 + offset / 3 * 3, *length, program);
        }
        let hdr = sections.finish();
        let object = sections.object(with_hdr.then_some(&hdr[..]), TEXT - 0x400 + entry);
        let Ok(cfi) = Cfi::new(&object) else {
            // All entries are empty.
            return Ok(());
        };
        let table = cfi.compile().expect("a table");
        prop_assert_eq!(table.text, TEXT_BYTES);
        for svma in (TEXT - 2..TEXT + TEXT_BYTES + 2).step_by(5) {
            let expected = match svma.checked_sub(TEXT) {
                Some(address) if address < TEXT_BYTES => table.rule_at(address as u32),
                _ => Rule::INVALID,
            };
            prop_assert_eq!(cfi.row_at(svma), expected, "{:#x}", svma);
            if let Some(start) = cfi.function_start(svma) {
                prop_assert!(start <= svma);
                let covers = |(offset, length, _): &(u64, u32, Vec<Instruction>)| {
                    let at = TEXT - 0x400 + offset / 3 * 3;
                    at == start && svma < at + u64::from(*length)
                };
                prop_assert!(entries.iter().any(covers), "{:#x} in {:#x}", svma, start);
            }
        }
    }
}
