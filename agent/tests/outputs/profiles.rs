//! Profiles for the tests of outputs, and the comparison with golden files.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use flamestorm::profile::{
    Function, FunctionId, Line, Location, LocationId, Mapping, MappingId, RecordingMeta,
    ResolvedProfile, ResolvedSample,
};

/// Compares with `tests/golden/NAME`, or writes that file if `FLAMESTORM_BLESS=1`.
pub fn assert_golden(name: &str, actual: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("FLAMESTORM_BLESS").is_some_and(|value| value == "1") {
        fs::write(&path, actual).unwrap();
        return;
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    let mut lines = expected.lines().zip(actual.lines()).zip(1..);
    if let Some(((expected, actual), line)) = lines.find(|((e, a), _)| e != a) {
        panic!(
            "{name}, line {line}:\n  expected {expected}\n  actual   {actual}\n\
             (FLAMESTORM_BLESS=1 writes the new text to the golden file)"
        );
    }
    assert!(
        expected == actual,
        "{name}: one text is longer than the other"
    );
}

/// A function: name, module, source file and line.
pub struct At(
    pub &'static str,
    pub &'static str,
    pub &'static str,
    pub u32,
);

/// Builds a profile step by step.
#[derive(Default)]
pub struct Builder {
    pub profile: ResolvedProfile,
}

impl Builder {
    pub fn mapping(&mut self, name: &str, build_id: &str) -> MappingId {
        let mappings = &mut self.profile.mappings;
        let index = mappings.iter().position(|m| &*m.name == name);
        let index = index.unwrap_or_else(|| {
            mappings.push(Mapping {
                name: Arc::from(name),
                build_id: Arc::from(build_id),
                is_kernel: name == "[kernel]",
            });
            mappings.len() - 1
        });
        MappingId(index as u32)
    }

    fn function(&mut self, name: &str, system_name: &str, file: &str) -> FunctionId {
        let function = Function {
            name: Arc::from(name),
            system_name: Arc::from(system_name),
            file: Arc::from(file),
        };
        let functions = &mut self.profile.functions;
        let index = functions.iter().position(|known| *known == function);
        let index = index.unwrap_or_else(|| {
            functions.push(function);
            functions.len() - 1
        });
        FunctionId(index as u32)
    }

    /// A location with its functions, innermost first. Its mapping is the module of the last one.
    pub fn location(&mut self, address: u64, functions: &[At]) -> LocationId {
        let module = functions.last().unwrap().1;
        let mapping = self.mapping(module, "");
        let lines = functions.iter().map(|At(name, _, file, line)| {
            let symbol = if name.contains("+0x") { "" } else { name };
            Line {
                function: self.function(name, symbol, file),
                line: *line,
            }
        });
        let location = Location {
            mapping,
            address,
            lines: lines.collect(),
        };
        let locations = &mut self.profile.locations;
        let index = locations.iter().position(|known| *known == location);
        let index = index.unwrap_or_else(|| {
            locations.push(location);
            locations.len() - 1
        });
        LocationId(index as u32)
    }

    /// Adds samples of a stack, leaf first.
    pub fn sample(&mut self, labels: &[(&str, &str)], stack: &[LocationId], count: u64) {
        self.profile.samples.push(ResolvedSample {
            labels: labels
                .iter()
                .map(|(key, value)| (Arc::from(*key), Arc::from(*value)))
                .collect(),
            stack: Arc::from(stack),
            count,
            cpu_ns: count * self.profile.meta.period_ns(),
            executions: 0,
        });
    }
}

/// A search in a shop: a stripped PostgreSQL, a service with inlined functions, and the kernel.
pub fn shop() -> ResolvedProfile {
    let mut b = Builder::default();
    b.profile.meta = RecordingMeta {
        host: "shop-1".to_owned(),
        kernel: "6.18.0".to_owned(),
        agent_version: "0.1.0".to_owned(),
        target: "whole machine".to_owned(),
        start_unix_ns: 1_767_323_045_000_000_000,
        duration_ns: 10_000_000_000,
        frequency_hz: 99,
        cpus: 2,
    };
    b.profile.runtime.expected_samples = 1980;
    b.profile.runtime.ticks.idle = 1800;
    b.profile.runtime.lost.insert("ring_full".to_owned(), 0);
    b.profile.runtime.stack_copies.sent = 4;
    let refused = &mut b.profile.runtime.stack_copies.refused;
    refused.insert("over_budget".to_owned(), 1);
    let tables = &mut b.profile.runtime.unwind_tables;
    tables.files = 3;
    tables.text_bytes = 8_000_000;
    tables.covered_bytes = 7_900_000;
    tables.frame_pointer_bytes = 40_000;
    let unsupported = [("cfa_expression", 3130), ("malformed", 0)];
    tables.unsupported_bytes = unsupported.map(|(name, n)| (name.to_owned(), n)).into();
    tables.unsupported_share = Some(3130.0 / 8e6);
    b.profile.runtime.steal_seconds = Some(0.1 + 0.2);
    b.profile.runtime.startup_ms = Some(412.5);
    b.profile.runtime.agent.cpu_seconds.startup = 0.31;
    b.profile.runtime.agent.cpu_seconds.recording = 0.04;
    b.profile.runtime.agent.cpu_seconds.symbolising = 0.9;
    b.profile.runtime.agent.max_rss_bytes.recording = 30_000_000;
    b.profile.runtime.agent.max_rss_bytes.peak = 61_000_000;
    b.profile.runtime.kernel.map_bytes = 9_437_184;
    b.profile.runtime.kernel.run_ns_per_sample = Some(6789.0);
    b.mapping("/usr/lib/postgresql/15/bin/postgres", "0123456789abcdef");
    let pg = "/usr/lib/postgresql/15/bin/postgres";
    let libc = "/usr/lib/x86_64-linux-gnu/libc.so.6";
    let shop = "/srv/shop/product";
    let start = b.location(0x1000, &[At("_start", pg, "", 0)]);
    let main = b.location(0x2000, &[At("main", pg, "", 0)]);
    let seqscan = b.location(0x31e810, &[At("postgres+0x31e800", pg, "", 0)]);
    let lower = b.location(0x9000, &[At("towlower", libc, "wctype/towlower.c", 41)]);
    let read = b.location(0xffff_ffff_8123_4567, &[At("ksys_read", "[kernel]", "", 0)]);
    let entry = b.location(
        0xffff_ffff_8100_0010,
        &[At("entry_SYSCALL_64", "[kernel]", "", 0)],
    );
    let backend = [
        ("pid", "4711"),
        ("comm", "postgres"),
        ("tid", "4711"),
        ("thread", "postgres"),
        ("outcome", "complete"),
    ];
    b.sample(&backend, &[lower, seqscan, main, start], 120);
    b.sample(&backend, &[read, entry, seqscan, main, start], 30);
    b.sample(&backend, &[seqscan, main, start], 25);
    let rust_main = b.location(0x100, &[At("product::main", shop, "src/main.rs", 12)]);
    let search = b.location(
        0x200,
        &[
            At("<[T; 4] as product::Fold>::fold", shop, "src/fold.rs", 7),
            At(
                "product::search_products_unindexed",
                shop,
                "src/search.rs",
                33,
            ),
        ],
    );
    let service = |thread, outcome| {
        [
            ("pid", "4800"),
            ("comm", "product"),
            ("tid", "4801"),
            ("thread", thread),
            ("outcome", outcome),
        ]
    };
    b.sample(&service("tokio-rt", "complete"), &[search, rust_main], 8);
    b.sample(&service("tokio-rt", "unreadable_stack"), &[search], 1);
    b.sample(&service("tokio-io", "complete"), &[search, rust_main], 2);
    let kthread = [
        ("pid", "17"),
        ("comm", "kworker/0:1"),
        ("tid", "17"),
        ("thread", "kworker/0:1"),
        ("outcome", "kernel_only"),
    ];
    b.sample(&kthread, &[read], 3);
    b.profile
}
