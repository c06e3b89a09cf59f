//! Damaged and hostile files: real ELF files with bytes changed, cut and moved, the same ones in every run.
//! None may cause a panic, take too long, or take memory out of proportion.
//!
//! `FLAMESTORM_FUZZ_SECONDS` sets how long files are tried (5 seconds if it is not set),
//! `FLAMESTORM_FUZZ_SEED` the seed of the random numbers.

use crate::inputs::{Random, files};
use flamestorm::object::Object;
use flamestorm::unwind::{Cfi, tree};
use std::time::{Duration, Instant};

/// Longest time for one file, in the debug profile on a busy machine. A mutated file takes some
/// milliseconds; this finds quadratic time.
const PATIENCE: Duration = Duration::from_secs(10);

/// Most bytes of table for each byte of file. An instruction of two bytes can make a row of six bytes, and
/// vectors double their capacity.
const MEMORY_FACTOR: usize = 8;

fn number_from(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().expect("a number"),
        Err(_) => default,
    }
}

/// Files that are small enough for thousands of mutations of each in seconds.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds: Vec<Vec<u8>> = files(512 << 10).into_iter().map(|file| file.1).collect();
    seeds.retain(|data| data.len() < 512 << 10);
    seeds.push(small());
    seeds
}

/// ld.so without section headers.
fn small() -> Vec<u8> {
    let mut data = std::fs::read("/lib64/ld-linux-x86-64.so.2").expect("ld.so");
    data[0x28..0x30].fill(0);
    data[0x3c..0x40].fill(0);
    data
}

/// Ranges of the file in which changes have an effect: headers, notes, unwind sections, code.
fn targets(data: &[u8]) -> Vec<std::ops::Range<usize>> {
    let object = Object::parse(data).expect("a sound file");
    let inside = |section: &[u8]| {
        let start = section.as_ptr() as usize - data.as_ptr() as usize;
        start..start + section.len()
    };
    let mut targets = vec![0..64, 64..64 + 56 * 12];
    targets.extend(object.code.iter().map(|section| inside(section.data)));
    targets.extend(object.eh_frame.map(|section| inside(section.data)));
    targets.extend(object.eh_frame_hdr.map(|section| inside(section.data)));
    targets.extend(object.eh_frame_hdr.map(|section| {
        let start = inside(section.data).start;
        start..start + 12
    }));
    targets.extend(object.build_id.map(|id| {
        let id = inside(id);
        id.start.saturating_sub(16)..id.end
    }));
    let sections = u64::from_le_bytes(data[0x28..0x30].try_into().expect("eight bytes")) as usize;
    if sections > 0 {
        targets.push(sections..data.len());
    }
    targets
}

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 12] = [
    0,
    1,
    4,
    0x7f,
    0x80,
    0xff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];

fn mutate(data: &mut Vec<u8>, targets: &[std::ops::Range<usize>], random: &mut Random) {
    for _ in 0..=random.below(6) {
        let target = &targets[random.below(targets.len() as u64) as usize];
        let end = target.end.min(data.len());
        if target.start + 16 > end {
            continue;
        }
        let at = target.start + random.below((end - target.start - 15) as u64) as usize;
        match random.below(10) {
            0..=3 => data[at] = random.next() as u8,
            4 => data[at] ^= 1 << random.below(8),
            5 | 6 => {
                let width = 1 << random.below(4);
                let edge = EDGES[random.below(EDGES.len() as u64) as usize];
                data[at..at + width].copy_from_slice(&edge.to_le_bytes()[..width]);
            }
            7 => {
                // Copies bytes to another place, which makes entries within entries.
                let length = 16 + random.below(256) as usize;
                let from = target.start + random.below((end - target.start - 15) as u64) as usize;
                let length = length.min(end - at).min(end - from);
                data.copy_within(from..from + length, at);
            }
            8 => {
                let length = random.below(64) as usize;
                let end = (at + length).min(end);
                data[at..end].fill(random.next() as u8);
            }
            _ => {
                let cut = random.below(data.len() as u64) as usize;
                if random.below(8) == 0 {
                    data.truncate(cut.max(64));
                }
            }
        }
    }
}

/// Reads everything that the agent reads of a file. Returns whether there was a table.
fn exercise(data: &[u8], random: &mut Random) -> bool {
    let Ok(object) = Object::parse(data) else {
        return false;
    };
    assert!(object.text_size() <= 64 * data.len() as u64);
    object.bias(random.next(), random.next(), random.next());
    let Ok(cfi) = Cfi::new(&object) else {
        return false;
    };
    let text = object.text();
    let somewhere = |random: &mut Random| match random.below(4) {
        0 => random.next(),
        1 => object.entry,
        _ => text.start + random.below(text.end - text.start),
    };
    let Ok(table) = cfi.compile() else {
        for _ in 0..8 {
            cfi.row_at(somewhere(random));
        }
        return false;
    };
    assert!(table.memory() <= MEMORY_FACTOR * data.len() + (1 << 20));
    for _ in 0..8 {
        let svma = somewhere(random);
        let row = cfi.row_at(svma);
        if text.contains(&svma) {
            let address = (svma - table.base_svma) as u32;
            assert_eq!(row, table.rule_at(address), "{svma:#x}");
        }
        if let Some(start) = cfi.function_start(svma) {
            assert!(start <= svma && text.contains(&start));
        }
    }
    tree::layout(&table).is_ok()
}

/// Thousands of damaged files.
#[test]
fn mutated_files() {
    let seconds = number_from("FLAMESTORM_FUZZ_SECONDS", 5);
    let seed = number_from("FLAMESTORM_FUZZ_SEED", 1);
    let seeds = seeds();
    let targets: Vec<_> = seeds.iter().map(|data| targets(data)).collect();
    let start = Instant::now();
    let (mut tried, mut compiled) = (0u64, 0u64);
    while start.elapsed() < Duration::from_secs(seconds) {
        let which = tried as usize % seeds.len();
        let mut data = seeds[which].clone();
        // A seed for each try, so that one try can be repeated alone.
        let mut random = Random(seed.wrapping_add(tried).wrapping_mul(0x5851_f42d_4c95_7f2d));
        mutate(&mut data, &targets[which], &mut random);
        let before = Instant::now();
        let result = std::panic::catch_unwind(move || exercise(&data, &mut { random }));
        let what = format!("seed {seed}, try {tried}");
        compiled += u64::from(result.unwrap_or_else(|_| panic!("a panic: {what}")));
        assert!(before.elapsed() < PATIENCE, "too slow: {what}");
        tried += 1;
    }
    println!("{tried} files, {compiled} of them still had a table");
    assert!(tried > 10 && compiled > tried / 10);
}

/// Truncations of a small file, from nothing to nearly all of it.
#[test]
fn truncated_files() {
    let data = small();
    let mut random = Random(7);
    let steps = (0..4096).chain((4096..data.len()).step_by(997));
    for length in steps {
        exercise(&data[..length], &mut random);
    }
}

/// Ten thousand entries that each claim the rest of the section. The work would be the square of their
/// number, so it is refused.
#[test]
fn entries_within_entries() {
    const ENTRIES: u32 = 10_000;
    const EH_FRAME: u64 = 0x50_0000;
    const HDR: u64 = 0x40_0000;
    const TEXT: u64 = 0x10_0000;
    let mut eh_frame = vec![
        20, 0, 0, 0, 0, 0, 0, 0, 1, b'z', b'R', 0, 1, 0x78, 16, 1, 0x1b, 0x0c, 7, 8, 0x90, 1, 0, 0,
    ];
    let mut hdr = vec![1, 0x1b, 0x03, 0x3b];
    hdr.extend((EH_FRAME - HDR - 4).to_le_bytes()[..4].iter());
    hdr.extend(ENTRIES.to_le_bytes());
    for n in 0..ENTRIES {
        let at = eh_frame.len() as u32;
        let start = TEXT + u64::from(n) * 16;
        hdr.extend((start.wrapping_sub(HDR) as u32).to_le_bytes());
        hdr.extend(((EH_FRAME - HDR) as u32 + at).to_le_bytes());
        // The entry claims everything up to the section's end.
        let length = (ENTRIES - n) * 20 - 4;
        eh_frame.extend(length.to_le_bytes());
        eh_frame.extend((at + 4).to_le_bytes());
        let pointer = start.wrapping_sub(EH_FRAME + u64::from(at) + 8) as u32;
        eh_frame.extend(pointer.to_le_bytes());
        eh_frame.extend([16, 0, 0, 0, 0, 0, 0, 0]);
    }
    let section = |svma, data| Some(flamestorm::object::Section { svma, data });
    let object = Object {
        segments: vec![flamestorm::object::Segment {
            file_offset: 0,
            svma: TEXT,
            size: 0x10_0000,
        }],
        code: Vec::new(),
        eh_frame: section(EH_FRAME, &eh_frame),
        eh_frame_hdr: section(HDR, &hdr),
        entry: 0,
        build_id: None,
    };
    let start = Instant::now();
    let cfi = Cfi::new(&object).expect("entries");
    let refused = cfi.compile().expect_err("too much work");
    assert!(matches!(refused, flamestorm::unwind::Error::Overlapping(_)));
    cfi.row_at(TEXT + 8);
    assert!(start.elapsed() < PATIENCE);
}
