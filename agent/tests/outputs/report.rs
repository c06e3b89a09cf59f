//! The terminal's table, its figures as JSON, filters, and a report from a file.

use std::fs;
use std::path::{Path, PathBuf};

use flamestorm::encode::{folded, pprof};
use flamestorm::profile::ResolvedProfile;
use flamestorm::report::{self, Filter, FilterError, Outputs, Style, Summary};

use crate::profiles;

fn filtered(conditions: &[&str]) -> Result<ResolvedProfile, FilterError> {
    let filters: Vec<Filter> = conditions.iter().map(|c| c.parse().unwrap()).collect();
    report::filter(&profiles::shop(), &filters)
}

fn count(conditions: &[&str]) -> u64 {
    filtered(conditions).unwrap().total_count()
}

#[test]
fn golden_table() {
    let profile = profiles::shop();
    let mut summary = Summary::of(&profile);
    summary.files = vec!["flamestorm.svg".to_owned()];
    summary.notes = vec!["kernel frames have no names".to_owned()];
    let text = report::table(&profile, &summary, Style { colour: false });
    profiles::assert_golden("shop.table.txt", &text);
    assert!(!text.contains('\x1b'));
    let coloured = report::table(&profile, &summary, Style { colour: true });
    assert!(coloured.contains("\x1b[1m"));
}

/// The JSON of `--summary json`, which other programs read.
#[test]
fn golden_summary() {
    let mut text = serde_json::to_string_pretty(&Summary::of(&profiles::shop())).unwrap();
    text.push('\n');
    profiles::assert_golden("shop.summary.json", &text);
    let back: Summary = serde_json::from_str(&text).unwrap();
    assert_eq!(back, Summary::of(&profiles::shop()));
}

/// Kernel threads have no user stack, so they do not count in the share of rooted stacks.
#[test]
fn rooted_share() {
    let summary = Summary::of(&profiles::shop());
    assert_eq!(summary.rooted_share, Some(185.0 / 186.0));
    let of = |name| summary.processes.iter().find(|p| p.name == name).unwrap();
    assert_eq!(of("postgres").rooted_share, Some(1.0));
    assert_eq!(of("product").rooted_share, Some(10.0 / 11.0));
    assert_eq!(of("kworker/0:1").rooted_share, None);
    assert_eq!(Summary::of(&ResolvedProfile::default()).rooted_share, None);
}

/// A process may put escape sequences into its name; they must not reach the terminal.
#[test]
fn hostile_names_do_not_reach_the_terminal() {
    let mut b = profiles::Builder::default();
    let odd = b.location(
        1,
        &[profiles::At("f\x1b[2J", "m\x1b]0;x\x07", "a\x1b.c", 0)],
    );
    b.sample(&[("comm", "c\x1b[31m"), ("outcome", "o\x1b")], &[odd], 5);
    b.profile.runtime.note("n\x1b");
    let summary = Summary::of(&b.profile);
    let text = report::table(&b.profile, &summary, Style { colour: false });
    assert!(
        !text.contains(|c: char| c.is_control() && c != '\n'),
        "{text:?}"
    );
}

#[test]
fn filters() {
    assert_eq!(count(&[]), 189);
    assert_eq!(count(&["comm=postgres"]), 175);
    assert_eq!(count(&["comm=postgres", "comm=product"]), 186);
    assert_eq!(count(&["comm=product", "thread=tokio-io"]), 2);
    assert_eq!(count(&["pid=4711", "function=towlower"]), 120);
    assert_eq!(count(&["module=libc.so.6"]), 120);
    assert_eq!(count(&["module=/usr/lib/x86_64-linux-gnu/libc.so.6"]), 120);
    assert_eq!(count(&["outcome=unreadable_stack"]), 1);
    let error = filtered(&["pod=shop-7"]).unwrap_err().to_string();
    assert_eq!(
        error,
        "no sample has the key \"pod\"; the keys of this profile are comm, function, module, \
         outcome, pid, thread, tid"
    );
    let refused = |conditions: &[&str]| filtered(conditions).unwrap_err().to_string();
    assert_eq!(
        refused(&["comm=nobody", "comm=none"]),
        "no sample has comm=nobody or comm=none; the values of comm are postgres, product, kworker/0:1"
    );
    assert_eq!(
        refused(&["comm=product", "function=strlen"]),
        "no sample has function=strlen; the values of function are _start, main, postgres+0x31e800, towlower, \
         ksys_read, entry_SYSCALL_64, <[T; 4] as product::Fold>::fold, \
         product::search_products_unindexed, and 1 more"
    );
    assert_eq!(
        refused(&["comm=product", "module=libc.so.6"]),
        "no sample fulfils all of comm=product module=libc.so.6, though each by itself is fulfilled by some"
    );
    for wrong in ["comm", "=x", "comm=", ""] {
        assert!(wrong.parse::<Filter>().is_err(), "{wrong:?}");
    }
}

/// A filtered profile contains nothing that belongs to other samples, and a note says that it was filtered.
#[test]
fn a_filtered_profile_is_whole_in_itself() {
    let part = filtered(&["comm=product"]).unwrap();
    let file = pprof::decode(&pprof::encode(&part)).unwrap();
    assert_eq!(file, part);
    assert!(part.functions.iter().all(|f| f.name.contains("product")));
    assert_eq!(part.mappings.len(), 1);
    let note = "filtered by comm=product: 11 of 189 samples";
    assert!(part.runtime.notes[0].starts_with(note));
    let whole = String::from_utf8(folded::encode(&profiles::shop())).unwrap();
    let expected = whole.lines().filter(|line| line.starts_with("product;"));
    let text = String::from_utf8(folded::encode(&part)).unwrap();
    assert!(text.lines().eq(expected));
}

/// A report from a file gives the same table and pictures.
#[test]
fn a_report_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("in.pb.gz"), pprof::encode(&profiles::shop())).unwrap();
    let outputs = Outputs::parse(&["out.svg", "out.folded", "out.pb.gz"].map(path)).unwrap();
    outputs.preflight().unwrap();
    let profile = report::load(&path("in.pb.gz")).unwrap();
    let written = outputs.write(&profile, &profile);
    assert!(written.errors.is_empty() && written.rescued.is_none());
    let mut summary = Summary::of(&profile);
    summary.files = written.files();
    assert_eq!(summary.files.len(), 3);
    let text = report::table(&profile, &summary, Style::default());
    assert!(text.contains("towlower") && text.contains("out.svg"));
    let read = |name| fs::read(path(name)).unwrap();
    assert_eq!(read("out.folded"), folded::encode(&profiles::shop()));
    assert_eq!(read("out.pb.gz"), read("in.pb.gz"));
    assert!(read("out.svg").starts_with(b"<?xml"));
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        4,
        "no other file is left"
    );
}

/// Filters by query, service, database and trace. A query matches by its id or by a part of its text.
#[test]
fn filters_of_database_work() {
    let mut b = profiles::Builder::default();
    let frame = b.location(1, &[profiles::At("f", "f", "f.c", 0)]);
    for (id, text, service, trace, count) in [
        (
            "17",
            "SELECT * FROM products WHERE id = $1",
            "product",
            "0a",
            3,
        ),
        ("18", "SELECT * FROM orders", "order", "0b", 5),
    ] {
        let trace = trace.repeat(16);
        let labels = [
            ("query_id", id),
            ("query", text),
            ("database", "shop"),
            ("service", service),
            ("trace_id", &trace),
        ];
        b.sample(&labels, &[frame], count);
    }
    let count = |condition: &str| {
        let filters = [condition.parse().unwrap()];
        report::filter(&b.profile, &filters).map(|profile| profile.total_count())
    };
    assert_eq!(count("query=17"), Ok(3));
    assert_eq!(count("query=FROM orders"), Ok(5));
    assert_eq!(count("query=SELECT"), Ok(8));
    assert_eq!(count("service=order"), Ok(5));
    assert_eq!(count("database=shop"), Ok(8));
    let trace = "0a".repeat(16);
    assert_eq!(count(&format!("trace={trace}")), Ok(3));
    assert_eq!(count(&format!("trace_id={trace}")), Ok(3));
    assert!(count("query=7").is_err(), "part of an id");
    assert!(count("trace=0a").is_err(), "part of a trace");
}

/// The keys of `queries --json`, which other programs read.
#[test]
fn keys_of_queries() {
    let cost = report::QueryCost {
        callers: vec![report::CallerCost::default()],
        ..report::QueryCost::default()
    };
    let value = serde_json::to_value([cost]).unwrap();
    for key in [
        "query_id",
        "query",
        "database",
        "cpu_seconds",
        "share",
        "samples",
        "executions",
        "callers",
        "caller_share",
        "caller_partial_share",
        "trace_ids",
    ] {
        assert!(value[0].get(key).is_some(), "{key}");
    }
    for key in ["service", "function", "file", "line", "partial", "share"] {
        assert!(value[0]["callers"][0].get(key).is_some(), "{key}");
    }
}

/// Each error names the file and the reason.
#[test]
fn unreadable_files() {
    let dir = tempfile::tempdir().unwrap();
    let error = |name: &str, content: Option<&[u8]>| {
        let path: PathBuf = dir.path().join(name);
        if let Some(content) = content {
            fs::write(&path, content).unwrap();
        }
        let error = report::load(&path).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        error
    };
    assert!(error("none.pb.gz", None).contains("No such file"));
    assert!(error("text.pb.gz", Some(b"hello, world")).contains("expected a .pb.gz"));
    assert!(error("empty.pb.gz", Some(b"")).contains("not a readable profile"));
    let whole = pprof::encode(&profiles::shop());
    let half = &whole[..whole.len() / 2];
    assert!(error("half.pb.gz", Some(half)).contains("cut short"));
    assert!(
        report::load(Path::new("/"))
            .unwrap_err()
            .to_string()
            .contains("/")
    );
}
