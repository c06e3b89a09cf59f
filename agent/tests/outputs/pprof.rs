//! The file of record (`.pb.gz`), read back by an independent decoder, by Google's pprof, and by the agent.

use std::fmt::Write;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use flamestorm::encode::pprof::{self, DecodeError};
use flamestorm::profile::{
    Function, FunctionId, Line, Location, LocationId, Mapping, MappingId, ResolvedProfile,
    ResolvedSample,
};
use flamestorm::report::Summary;

use crate::profiles;

/// A reader of the wire format that shares no code with the encoder.
/// <https://protobuf.dev/programming-guides/encoding/>
mod wire {
    pub enum Value<'a> {
        Number(u64),
        Bytes(&'a [u8]),
    }

    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (first, rest) = bytes.split_first().unwrap();
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                return value;
            }
        }
        panic!("a varint of more than ten bytes");
    }

    pub fn fields(mut bytes: &[u8]) -> Vec<(u64, Value<'_>)> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let value = match key & 7 {
                0 => Value::Number(varint(&mut bytes)),
                2 => {
                    let length = varint(&mut bytes) as usize;
                    let (head, tail) = bytes.split_at(length);
                    bytes = tail;
                    Value::Bytes(head)
                }
                other => panic!("wire type {other} is not used in profile.proto"),
            };
            fields.push((key >> 3, value));
        }
        fields
    }

    /// One message: the numbers of each field (packed or not), and its embedded messages.
    pub struct Message<'a>(Vec<(u64, Value<'a>)>);

    impl<'a> Message<'a> {
        pub fn new(bytes: &'a [u8]) -> Self {
            Message(fields(bytes))
        }

        pub fn bytes(&self, field: u64) -> impl Iterator<Item = &'a [u8]> {
            self.0
                .iter()
                .filter_map(move |(number, value)| match value {
                    Value::Bytes(bytes) if *number == field => Some(*bytes),
                    _ => None,
                })
        }

        pub fn messages(&self, field: u64) -> impl Iterator<Item = Message<'a>> {
            self.bytes(field).map(Message::new)
        }

        pub fn numbers(&self, field: u64) -> Vec<u64> {
            let mut numbers = Vec::new();
            for (_, value) in self.0.iter().filter(|(number, _)| *number == field) {
                match value {
                    Value::Number(number) => numbers.push(*number),
                    Value::Bytes(packed) => {
                        let mut packed = *packed;
                        while !packed.is_empty() {
                            numbers.push(varint(&mut packed));
                        }
                    }
                }
            }
            numbers
        }

        pub fn number(&self, field: u64) -> u64 {
            self.numbers(field).first().copied().unwrap_or(0)
        }
    }
}

fn unzipped(gz: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(gz)
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

/// The file as text, field by field, as the independent reader sees it.
fn dump(bytes: &[u8]) -> String {
    let profile = wire::Message::new(bytes);
    let strings: Vec<_> = profile
        .bytes(6)
        .map(|s| std::str::from_utf8(s).unwrap())
        .collect();
    let text = |index: u64| strings[index as usize];
    let mut out = String::new();
    for (title, field) in [("sample_type", 1), ("period_type", 11)] {
        for kind in profile.messages(field) {
            let (name, unit) = (text(kind.number(1)), text(kind.number(2)));
            writeln!(out, "{title} {name}/{unit}").unwrap();
        }
    }
    for (title, field) in [("time", 9), ("duration", 10), ("period", 12)] {
        writeln!(out, "{title} {}", profile.number(field)).unwrap();
    }
    writeln!(out, "default {}", text(profile.number(14))).unwrap();
    for comment in profile.numbers(13) {
        writeln!(out, "comment {}", text(comment)).unwrap();
    }
    for m in profile.messages(3) {
        let flags: Vec<_> = (7..=10).map(|field| m.number(field)).collect();
        let (name, id) = (text(m.number(5)), text(m.number(6)));
        writeln!(
            out,
            "mapping {} {name} build_id={id} has={flags:?}",
            m.number(1)
        )
        .unwrap();
    }
    for f in profile.messages(5) {
        let (name, system, file) = (text(f.number(2)), text(f.number(3)), text(f.number(4)));
        writeln!(out, "function {} {name:?} {system:?} {file:?}", f.number(1)).unwrap();
    }
    for l in profile.messages(4) {
        let lines = l.messages(4).map(|line| (line.number(1), line.number(2)));
        let lines: Vec<_> = lines.collect();
        let (id, mapping, address) = (l.number(1), l.number(2), l.number(3));
        writeln!(
            out,
            "location {id} mapping={mapping} {address:#x} {lines:?}"
        )
        .unwrap();
    }
    for s in profile.messages(2) {
        let labels = s
            .messages(3)
            .map(|l| format!("{}={}", text(l.number(1)), text(l.number(2))));
        let labels: Vec<_> = labels.collect();
        let (values, stack) = (s.numbers(2), s.numbers(1));
        writeln!(out, "sample {values:?} {stack:?} {}", labels.join(" ")).unwrap();
    }
    out
}

#[test]
fn golden() {
    let text = dump(&unzipped(&pprof::encode(&profiles::shop())));
    profiles::assert_golden("shop.pprof.txt", &text);
}

/// Google's pprof, in PATH or where Go installs programs.
fn google_pprof() -> Option<PathBuf> {
    let go = Command::new("go").args(["env", "GOPATH"]).output().ok();
    let go = go.and_then(|output| String::from_utf8(output.stdout).ok());
    let path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = std::env::split_paths(&path).map(|dir| dir.join("pprof"));
    let installed = go.map(|path| PathBuf::from(path.trim()).join("bin/pprof"));
    candidates.chain(installed).find(|path| path.is_file())
}

/// The reference implementation reads the file and finds its content.
#[test]
fn google_reads_it() {
    let Some(pprof) = google_pprof() else {
        eprintln!("skipped: Google's pprof is not installed; the golden test decodes on its own");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("shop.pb.gz");
    fs::write(&file, pprof::encode(&profiles::shop())).unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(&pprof)
            .args(arguments)
            .arg(&file)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{error}");
        String::from_utf8(output.stdout).unwrap()
    };
    let top = run(&["-top", "-sample_index=samples"]);
    for expected in [
        "Showing nodes accounting for 189, 100% of 189 total",
        "120 63.49% 63.49%        120 63.49%  towlower",
        "33 17.46% 80.95%         33 17.46%  ksys_read",
        "product::search_products_unindexed",
        "postgres+0x31e800",
    ] {
        assert!(top.contains(expected), "{expected:?} is missing:\n{top}");
    }
    let raw = run(&["-raw"]);
    assert!(raw.contains("PeriodType: cpu nanoseconds"), "{raw}");
    assert!(raw.contains("0123456789abcdef"), "{raw}");
    let tagged = run(&["-top", "-sample_index=samples", "-tagfocus=comm=product"]);
    assert!(
        tagged.contains("of 189 total") && !tagged.contains("towlower"),
        "{tagged}"
    );
}

/// A profile that is written and read back is unchanged, with its circumstances and figures.
#[test]
fn round_trip() {
    let profile = profiles::shop();
    let back = pprof::decode(&pprof::encode(&profile)).unwrap();
    assert_eq!(back, profile);
    assert_eq!(Summary::of(&back), Summary::of(&profile));
    let plain = unzipped(&pprof::encode(&profile));
    assert_eq!(pprof::decode(&plain).unwrap(), profile);
    let empty = ResolvedProfile::default();
    assert_eq!(pprof::decode(&pprof::encode(&empty)).unwrap(), empty);
}

/// Pseudo-random numbers, the same in every run.
fn random_numbers(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below.max(1)
    }
}

fn random_profile(random: &mut impl FnMut(u64) -> u64) -> ResolvedProfile {
    const NAMES: [&str; 8] = [
        "",
        "a",
        "ß;\n",
        "[kernel]",
        "x+0x1",
        "a/b/c",
        "\u{10ffff}",
        "-",
    ];
    let mut profile = ResolvedProfile::default();
    let name = |number: u64| -> Arc<str> { Arc::from(NAMES[number as usize % NAMES.len()]) };
    profile.mappings.extend((0..1 + random(4)).map(|_| Mapping {
        name: name(random(8)),
        build_id: name(random(8)),
        is_kernel: random(2) == 0,
    }));
    profile
        .functions
        .extend((0..1 + random(6)).map(|_| Function {
            name: name(random(8)),
            system_name: name(random(8)),
            file: name(random(8)),
        }));
    for _ in 0..random(8) {
        let line = |random: &mut dyn FnMut(u64) -> u64| Line {
            function: FunctionId(random(profile.functions.len() as u64) as u32),
            line: random(1 << 32) as u32,
        };
        let lines = (0..1 + random(3)).map(|_| line(random)).collect();
        profile.locations.push(Location {
            mapping: MappingId(random(profile.mappings.len() as u64) as u32),
            address: random(u64::MAX),
            lines,
        });
    }
    for _ in 0..random(6) {
        let places = profile.locations.len() as u64;
        let depth = if places == 0 { 0 } else { random(9) };
        profile.samples.push(ResolvedSample {
            labels: (0..random(4))
                .map(|_| (name(random(8)), name(1 + random(7))))
                .collect(),
            stack: (0..depth)
                .map(|_| LocationId(random(places) as u32))
                .collect(),
            count: random(1 << 63),
            cpu_ns: random(1 << 63),
            executions: random(1 << 63),
        });
    }
    profile.runtime.expected_samples = random(u64::MAX);
    profile.runtime.steal_seconds = Some(random(u64::MAX) as f64 / random(1 << 40).max(1) as f64);
    profile.meta.host = name(random(8)).to_string();
    profile
}

/// Any profile survives the round trip, not only a plausible one.
#[test]
fn round_trip_of_random_profiles() {
    for seed in 0..2000 {
        let profile = random_profile(&mut random_numbers(seed + 1));
        let back = pprof::decode(&pprof::encode(&profile));
        assert_eq!(back.unwrap(), profile, "seed {seed}");
    }
}

/// A file that is truncated anywhere is refused, with a reason.
#[test]
fn truncated_files_are_refused() {
    let whole = pprof::encode(&profiles::shop());
    for length in 0..whole.len() {
        let error = pprof::decode(&whole[..length]).expect_err("a part is no profile");
        assert!(!error.to_string().is_empty());
    }
}

/// Damaged content is refused or read; it never causes a crash or an id without its object.
#[test]
fn damaged_files_do_not_crash() {
    let whole = unzipped(&pprof::encode(&profiles::shop()));
    let mut random = random_numbers(7);
    for _ in 0..5_000 {
        let mut bad = whole.clone();
        for _ in 0..1 + random(4) {
            let at = random(bad.len() as u64) as usize;
            bad[at] = random(256) as u8;
        }
        if let Ok(profile) = pprof::decode(&bad) {
            for sample in &profile.samples {
                assert!(profile.frames(sample).count() >= sample.stack.len());
            }
        }
    }
}

/// A gzip bomb is refused at the limit.
#[test]
fn a_gzip_bomb_is_refused() {
    // Many gzip members, each of which unpacks to a mebibyte of zeros.
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut gzip, &vec![0; 1 << 20]).unwrap();
    let bomb = gzip.finish().unwrap();
    let bomb = bomb.repeat((pprof::MAX_UNPACKED >> 20) as usize + 1);
    assert!(bomb.len() < 4 << 20);
    assert!(matches!(pprof::decode(&bomb), Err(DecodeError::TooLarge)));
}

/// Messages of two bytes in the file take a hundred in memory; they are refused before they are built.
#[test]
fn too_many_entries_are_refused() {
    let bytes: Vec<u8> = [0x12, 0x00].repeat(pprof::MAX_ENTRIES + 1);
    assert!(matches!(pprof::decode(&bytes), Err(DecodeError::TooMany)));
    let labels = [0x1a, 0x00].repeat(pprof::MAX_PARTS + 1);
    let mut bytes = vec![0x12];
    prost::encoding::encode_varint(labels.len() as u64, &mut bytes);
    bytes.extend(labels);
    assert!(matches!(pprof::decode(&bytes), Err(DecodeError::TooMany)));
}

/// A profile of another tool without names, mappings and the agent's comment is read as far as possible.
/// One that does not count CPU time is refused.
#[test]
fn profiles_of_other_tools() {
    use pprof::proto;
    use prost::Message;
    let mut file = proto::Profile {
        sample_type: vec![proto::ValueType { r#type: 1, unit: 2 }],
        sample: vec![proto::Sample {
            location_id: vec![9],
            value: vec![30_000_000],
            label: vec![proto::Label {
                key: 3,
                num: 42,
                ..proto::Label::default()
            }],
        }],
        location: vec![proto::Location {
            id: 9,
            address: 0xabc,
            ..proto::Location::default()
        }],
        string_table: ["", "cpu", "nanoseconds", "bytes"].map(String::from).into(),
        period: 10_000_000,
        ..proto::Profile::default()
    };
    let profile = pprof::decode(&file.encode_to_vec()).unwrap();
    assert_eq!(profile.samples[0].count, 3);
    assert_eq!(profile.samples[0].label("bytes"), Some("42"));
    assert_eq!(profile.meta.frequency_hz, 100);
    let names: Vec<_> = profile
        .frames(&profile.samples[0])
        .map(|f| &*f.function.name)
        .collect();
    assert_eq!(names, ["[no mapping]+0xabc"]);
    file.sample_type[0].unit = 3;
    assert!(matches!(
        pprof::decode(&file.encode_to_vec()),
        Err(DecodeError::NoCpuValues)
    ));
    file.sample_type[0].unit = 77;
    assert!(matches!(
        pprof::decode(&file.encode_to_vec()),
        Err(DecodeError::Dangling {
            what: "string",
            id: 77
        })
    ));
}
