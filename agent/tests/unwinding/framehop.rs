//! The step by the agent's tables, compared with framehop, an independent unwinder, on real files.

use crate::inputs::{LARGE, Random, cursor, files, read, word};
use agent_ebpf::unwind::{CfaKind, Rule, SAVED, Slot, Step, Unsupported, reg, step};
use flamestorm::object::Object;
use flamestorm::unwind::{Cfi, MAX_ENTRY_BYTES};
use framehop::x86_64::{CacheX86_64, UnwindRegsX86_64, UnwinderX86_64};
use framehop::{ExplicitModuleSectionInfo, FrameAddress, Module, Unwinder};
use std::collections::BTreeMap;

/// Number of addresses that are tried in each file.
const ADDRESSES: u64 = 20_000;

type Hop<'data> = UnwinderX86_64<&'data [u8]>;

fn framehop<'data>(object: &Object<'data>) -> Hop<'data> {
    let range = |section: flamestorm::object::Section<'_>| {
        section.svma..section.svma + section.data.len() as u64
    };
    let eh_frame = object.eh_frame.expect("an .eh_frame");
    let hdr = object.eh_frame_hdr.expect("an .eh_frame_hdr");
    let info = ExplicitModuleSectionInfo {
        base_svma: 0,
        text_svma: Some(object.text()),
        eh_frame_svma: Some(range(eh_frame)),
        eh_frame: Some(eh_frame.data),
        eh_frame_hdr_svma: Some(range(hdr)),
        eh_frame_hdr: Some(hdr.data),
        ..ExplicitModuleSectionInfo::default()
    };
    let mut unwinder = UnwinderX86_64::new();
    unwinder.add_module(Module::new("file".into(), 0..object.text().end, 0, info));
    unwinder
}

/// The reason why framehop cannot be compared for a rule, if there is one.
fn explained(rule: &Rule) -> Option<&'static str> {
    let kind = |kind: CfaKind| rule.kind == kind as u8;
    if kind(CfaKind::Unsupported) {
        assert_eq!(rule.reg, Unsupported::CfaExpression as u8, "{rule:?}");
        return Some("an expression over registers that framehop does not have");
    }
    if kind(CfaKind::Deref) || kind(CfaKind::Signal) {
        return Some("framehop's expressions read no memory");
    }
    let has = |register| register == reg::RSP || register == reg::RBP;
    if !kind(CfaKind::End) && !has(rule.reg) {
        return Some("framehop has rsp, rbp and rip only");
    }
    let lost = |slot: Slot| slot.0 >= 192 && !has(slot.0 & 15);
    if lost(rule.ra)
        || SAVED
            .iter()
            .zip(rule.saved)
            .any(|(r, s)| *r == reg::RBP && lost(s))
    {
        return Some("in a register that framehop does not have");
    }
    None
}

/// The caller (ip, sp, fp) is the same for thousands of addresses of each file.
#[test]
fn same_caller() {
    for (path, data) in files(LARGE) {
        let object = Object::parse(&data).expect("an ELF file");
        let cfi = Cfi::new(&object).expect("unwind entries");
        let table = cfi.compile().expect("a table");
        let unwinder = framehop(&object);
        let mut cache = CacheX86_64::new();
        let mut random = Random(1);
        let mut apart: BTreeMap<&str, u32> = BTreeMap::new();
        let mut same = 0;
        for _ in 0..ADDRESSES {
            let svma = object.base_svma() + random.below(object.text().end - object.base_svma());
            let rule = table.rule_at((svma - table.base_svma) as u32);
            if cfi.function_start(svma).is_none() {
                // No entry covers the address, so its rule is that of the entry point's code or derived
                // from instructions.
                let entry = (object.entry..object.entry + MAX_ENTRY_BYTES).contains(&svma);
                assert!(rule != Rule::END || entry);
                *apart.entry("not covered: framehop guesses").or_default() += 1;
            } else if let Some(why) = explained(&rule) {
                *apart.entry(why).or_default() += 1;
            } else {
                compare(&unwinder, &mut cache, svma, &rule, &mut random);
                same += 1;
            }
        }
        println!("{}: {same} the same, {apart:?}", path.display());
        assert!(same > ADDRESSES / 4, "{}: {apart:?}", path.display());
    }
}

fn compare(
    unwinder: &Hop<'_>,
    cache: &mut CacheX86_64,
    svma: u64,
    rule: &Rule,
    random: &mut Random,
) {
    let mut ours = cursor(svma, random);
    let before = ours.regs;
    let mut theirs = UnwindRegsX86_64::new(before.ip, before.sp(), before.fp());
    let address = FrameAddress::from_instruction_pointer(svma);
    let caller = unwinder.unwind_frame(address, &mut theirs, cache, &mut |a| Ok(word(a)));
    let result = step(&mut ours, rule, read);
    match caller {
        Ok(None) => assert_eq!(result, Step::End, "{svma:#x} {rule:?}"),
        Ok(Some(ip)) => {
            assert_eq!(result, Step::Caller, "{svma:#x} {rule:?}");
            let expected = (ip, theirs.sp(), theirs.bp());
            let got = (ours.regs.ip, ours.regs.sp(), ours.regs.fp());
            assert_eq!(got, expected, "{svma:#x} {rule:?}");
        }
        Err(error) => panic!("{svma:#x} {rule:?}: framehop says {error}, we {result:?}"),
    }
}
