//! The tables of real files, compared with gimli's rows for every saved register, with the lookup of a
//! single address, and through the blocks that the kernel searches.

use crate::inputs::{LARGE, Random, cursor, files, read, word};
use crate::reference::{Slice, check, for_each_row};
use agent_ebpf::table::Block;
use agent_ebpf::unwind::{CfaKind, Cursor, Rule, SAVED, Slot, Step, Unsupported, reg, step};
use flamestorm::object::Object;
use flamestorm::unwind::{Cfi, Table, tree};
use std::collections::HashMap;

/// The share of the text that may be unsupported in a file, per mille.
const UNSUPPORTED_PER_MILLE: u64 = 2;

/// For every row of every FDE the step finds the same caller with the same saved registers.
#[test]
fn every_row_has_the_caller_that_gimli_says() {
    for (path, data) in files(LARGE) {
        let object = Object::parse(&data).expect("an ELF file");
        let table = Cfi::new(&object)
            .expect("entries")
            .compile()
            .expect("a table");
        let section = object.eh_frame.expect("an .eh_frame");
        let eh_frame = gimli::EhFrame::from(Slice::new(section.data, gimli::LittleEndian));
        let bases = gimli::BaseAddresses::default().set_eh_frame(section.svma);
        let mut random = Random(2);
        let (mut rows, mut lost_rows, mut unsupported) = (0, 0, 0);
        let registers = |start| cursor(start, &mut random).regs;
        for_each_row(
            &eh_frame,
            &bases,
            registers,
            |start, _, registers, caller| {
                let rule = table.rule_at((start - table.base_svma) as u32);
                let context = format!("{} at {start:#x}: {rule:?}", path.display());
                let mut ours = Cursor::new(*registers);
                match step(&mut ours, &rule, read) {
                    Step::Caller => {
                        let lost = lost(&rule);
                        lost_rows += u32::from(!lost.is_empty());
                        check(&ours, &caller, &lost, &context);
                    }
                    Step::End => assert_eq!(caller.ip, None, "{context}"),
                    Step::Unsupported => unsupported += 1,
                    Step::NoProgress => assert!(caller.cfa < registers.sp(), "{context}"),
                    other => panic!("{other:?}: {context}"),
                }
                rows += 1;
            },
        );
        println!(
            "{}: {rows} rows, {unsupported} unsupported, {lost_rows} with a lost register",
            path.display()
        );
        assert!(unsupported * 500 <= rows && lost_rows * 500 <= rows);
    }
}

/// Saved registers that the rule does not restore.
fn lost(rule: &Rule) -> Vec<u8> {
    let pairs = SAVED.into_iter().zip(rule.saved);
    let lost = pairs.filter(|(_, slot)| *slot == Slot::UNDEFINED);
    lost.map(|(register, _)| register).collect()
}

/// The lookup of one address gives the table's rule, at the edges of rows and anywhere else.
#[test]
fn row_at_is_the_table() {
    for (path, data) in files(LARGE) {
        let object = Object::parse(&data).expect("an ELF file");
        let cfi = Cfi::new(&object).expect("unwind entries");
        let table = cfi.compile().expect("a table");
        let mut random = Random(3);
        for svma in addresses(&table, &mut random) {
            let expected = table.rule_at((svma - table.base_svma) as u32);
            assert_eq!(cfi.row_at(svma), expected, "{} {svma:#x}", path.display());
            let covered = cfi.function_start(svma).is_some();
            let invalid = expected.kind == CfaKind::Invalid as u8;
            assert!(!(covered && invalid), "{} {svma:#x}", path.display());
        }
        for svma in [0, table.base_svma - 1, object.text().end, u64::MAX] {
            assert_eq!(cfi.row_at(svma), Rule::INVALID);
            assert_eq!(cfi.function_start(svma), None);
        }
    }
}

/// The edges of many rows, and random addresses in the text.
fn addresses(table: &Table, random: &mut Random) -> Vec<u64> {
    let rows = table.rows().step_by(1 + table.len() / 10_000);
    let edges = rows.flat_map(|row| [row.address, row.address.saturating_sub(1)]);
    let mut all: Vec<u64> = edges.map(u64::from).collect();
    all.extend((0..10_000).map(|_| random.below(table.text)));
    all.iter()
        .map(|address| table.base_svma + address)
        .collect()
}

/// Without the search table (`.eh_frame_hdr`) the table is the same. Without section headers too, except
/// that in code without entries the borders of code sections are unknown.
#[test]
fn stripped_of_section_headers() {
    for (path, mut data) in files(LARGE) {
        let object = Object::parse(&data).expect("an ELF file");
        let table = Cfi::new(&object)
            .expect("entries")
            .compile()
            .expect("a table");
        let without_hdr = Object {
            eh_frame_hdr: None,
            ..object.clone()
        };
        let scanned = Cfi::new(&without_hdr).expect("entries").compile();
        same_rules(&table, &scanned.expect("a table"), &path);
        // e_shoff, e_shnum and e_shstrndx.
        data[0x28..0x30].fill(0);
        data[0x3c..0x40].fill(0);
        let object = Object::parse(&data).expect("an ELF file");
        let cfi = Cfi::new(&object).expect("entries");
        let stripped = cfi.compile().expect("a table");
        let rows = table.rows().chain(stripped.rows());
        for address in rows.map(|row| row.address) {
            let (ours, other) = (table.rule_at(address), stripped.rule_at(address));
            let covered = cfi
                .function_start(table.base_svma + u64::from(address))
                .is_some();
            let known = ours != Rule::INVALID && other != Rule::INVALID;
            if covered || known {
                assert_eq!(ours, other, "{} {address:#x}", path.display());
            }
        }
        let difference = table.analysed.abs_diff(stripped.analysed);
        assert!(difference <= 64, "{}: {difference} bytes", path.display());
    }
}

fn same_rules(one: &Table, other: &Table, path: &std::path::Path) {
    assert_eq!(one.rules(), other.rules(), "{}", path.display());
    assert!(one.rows().eq(other.rows()), "{}", path.display());
}

/// The kernel's search finds the rule of every row in the blocks of a table.
#[test]
fn through_the_blocks() {
    for (path, data) in files(LARGE) {
        let object = Object::parse(&data).expect("an ELF file");
        let table = Cfi::new(&object)
            .expect("entries")
            .compile()
            .expect("a table");
        let layout = tree::layout(&table).expect("a layout");
        let ids: Vec<u32> = (0..layout.blocks() as u32).map(|n| n * 3 + 5).collect();
        let mut pool: HashMap<u32, Block> = HashMap::new();
        let placement = layout.write(&ids, |id, block| {
            assert!(pool.insert(id, *block).is_none());
        });
        assert_eq!(pool.len(), ids.len());
        let mut random = Random(4);
        for svma in addresses(&table, &mut random) {
            let address = (svma - table.base_svma) as u32;
            let found = tree::find_rule(&placement, address, |id| &pool[&id]);
            assert_eq!(
                found,
                table.rule_at(address),
                "{} {svma:#x}",
                path.display()
            );
        }
    }
}

/// The table's figures of its own coverage add up, and little is unsupported.
#[test]
fn coverage() {
    for (path, data) in files(u64::MAX) {
        let object = Object::parse(&data).expect("an ELF file");
        let table = Cfi::new(&object)
            .expect("entries")
            .compile()
            .expect("a table");
        let range = object.text();
        assert_eq!(table.text, range.end - range.start);
        assert!(table.covered + table.guessed <= table.text);
        let unsupported: u64 = table.unsupported.iter().sum();
        let limit = table.text * UNSUPPORTED_PER_MILLE / 1000;
        assert!(
            unsupported <= limit,
            "{}: {unsupported} bytes",
            path.display()
        );
        let expressions = table.unsupported[Unsupported::CfaExpression as usize];
        assert_eq!(unsupported, expressions, "{}", path.display());
        let rules = table.rules();
        assert!(table.rows().all(|row| usize::from(row.rule) < rules.len()));
        let unsorted = table.rows().zip(table.rows().skip(1));
        let sorted = unsorted
            .into_iter()
            .all(|(a, b)| a.address < b.address && a.rule != b.rule);
        assert!(sorted, "{}", path.display());
    }
}

/// glibc's signal return, which every libc must have, is a signal frame. Its `sigcontext` is where the
/// kernel puts it: behind `uc_flags`, `uc_link` and `uc_stack`, at 40 bytes (asm-generic/ucontext.h).
#[test]
fn signal_frame_of_libc() {
    let data = std::fs::read("/lib/x86_64-linux-gnu/libc.so.6").expect("libc");
    let object = Object::parse(&data).expect("an ELF file");
    let table = Cfi::new(&object)
        .expect("entries")
        .compile()
        .expect("a table");
    let signal = |rule: &&Rule| rule.kind == CfaKind::Signal as u8 && rule.reg == 7;
    let rule = table.rules().iter().find(signal).expect("a signal frame");
    assert_eq!(rule.offset, 40);
    let plt = |rule: &&Rule| rule.kind == CfaKind::Plt as u8;
    let rule = table.rules().iter().find(plt).expect("a linkage table");
    assert_eq!((rule.offset, rule.aux, rule.reg), (8, 11, 7));
}

/// OpenSSL's Montgomery multiplication, in which TLS servers spend their time, saves the old stack pointer
/// behind an array of r9 words.
#[test]
fn index_register_of_libcrypto() {
    let Ok(data) = std::fs::read("/lib/x86_64-linux-gnu/libcrypto.so.3") else {
        println!("libcrypto is not installed here: not tested");
        return;
    };
    let object = Object::parse(&data).expect("an ELF file");
    let table = Cfi::new(&object)
        .expect("entries")
        .compile()
        .expect("a table");
    let indexed = |rule: &&Rule| rule.index != 0;
    let rule = table
        .rules()
        .iter()
        .find(indexed)
        .expect("an index register");
    assert_eq!(rule.kind, CfaKind::Deref as u8);
    assert_eq!((rule.reg, rule.offset, rule.aux), (reg::RSP, 8, 8));
    assert_eq!(rule.index, reg::R9 + 1);
    assert_eq!(table.unsupported.iter().sum::<u64>(), 0);
}

/// The end of the stack is proven where threads and processes begin: at `_start` of ld.so, which has no
/// entry of its own, and at that of this program, whose return address is undefined.
#[test]
fn stacks_end_at_the_entry_point() {
    for path in ["/lib64/ld-linux-x86-64.so.2", "/proc/self/exe"] {
        let data = std::fs::read(path).expect("a file");
        let object = Object::parse(&data).expect("an ELF file");
        let cfi = Cfi::new(&object).expect("unwind entries");
        // Also behind the first instructions, where calls return to.
        for offset in [0, 8, 20] {
            assert_eq!(
                cfi.row_at(object.entry + offset),
                Rule::END,
                "{path} + {offset}"
            );
        }
    }
}

/// The vDSO, which exists in memory only.
#[test]
fn vdso() {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let Some(line) = maps.lines().find(|line| line.ends_with("[vdso]")) else {
        println!("this process has no vDSO: not tested");
        return;
    };
    let (start, rest) = line.split_once('-').expect("a range");
    let end = rest.split_once(' ').expect("an end").0;
    let address = |text| u64::from_str_radix(text, 16).expect("an address");
    let (start, end) = (address(start), address(end));
    let mut data = vec![0; (end - start) as usize];
    let memory = std::fs::File::open("/proc/self/mem").expect("memory");
    std::os::unix::fs::FileExt::read_exact_at(&memory, &mut data, start).expect("the vDSO");
    let object = Object::parse(&data).expect("an ELF file");
    let table = Cfi::new(&object)
        .expect("entries")
        .compile()
        .expect("a table");
    assert_eq!(table.unsupported.iter().sum::<u64>(), 0);
    assert!(table.covered > 100);
    let bias = object
        .bias(start, 0, end - start)
        .expect("an executable segment");
    assert_eq!(bias, start.wrapping_sub(object.base_svma() & !0xfff));
}

/// The bias follows from a mapping of a file's code, whatever part of the segment it covers.
#[test]
fn bias_of_a_mapping() {
    let data = std::fs::read("/lib/x86_64-linux-gnu/libc.so.6").expect("libc");
    let object = Object::parse(&data).expect("an ELF file");
    let segment = object.segments[0];
    let whole = object.bias(0x7f00_0000_0000, segment.file_offset, segment.size);
    let bias = whole.expect("a mapping of code");
    assert_eq!(bias.wrapping_add(segment.svma), 0x7f00_0000_0000);
    let part = object.bias(0x7f00_0000_3000, segment.file_offset + 0x3000, 0x1000);
    assert_eq!(part, Some(bias));
    assert_eq!(object.bias(0x7f00_0000_0000, 0, 0x1000), None);
    assert_eq!(object.bias(0, u64::MAX - 5, 100), None);
    assert!(object.build_id.is_some());
}

/// A word of the simulated stack is never zero, because zero would end a walk.
#[test]
fn words() {
    assert!((0..1000).all(|n| word(n * 8) != 0));
}
