//! The command `flamestorm diff`: what it writes, and what it refuses.

use std::fs;

use crate::common::{Finished, Workshop, agent, start};
use flamestorm::encode::{folded, pprof};
use flamestorm::profile::ResolvedProfile;
use serde_json::Value;

use crate::profiles;

/// A directory with recordings `a` and `b` in both formats. `b` is `a` in half the time and without
/// postgres.
fn workshop() -> Workshop {
    let workshop = Workshop::new();
    let before = profiles::shop();
    let mut after = before.clone();
    after.meta.duration_ns /= 2;
    after
        .samples
        .retain(|sample| sample.label("comm") != Some("postgres"));
    for (name, profile) in [("a", &before), ("b", &after)] {
        let path = |extension: &str| workshop.path().join(format!("{name}.{extension}"));
        fs::write(path("pb.gz"), pprof::encode(profile)).unwrap();
        fs::write(path("folded"), folded::encode(profile)).unwrap();
    }
    workshop
}

fn diff(workshop: &Workshop, words: &[&str]) -> Finished {
    let mut command = agent(["diff"]);
    command.args(words).current_dir(workshop.path());
    start(command).finish()
}

/// The output files, the table that names them, and the figures as JSON.
#[test]
fn files_and_figures() {
    let workshop = workshop();
    let outputs = ["--output", "d.svg", "--output", "d.folded"];
    let told = diff(&workshop, &[&["a.pb.gz", "b.pb.gz"], &outputs[..]].concat()).succeeded();
    for word in [
        "shrank",
        "towlower",
        "0.121",
        "wrote   d.svg",
        "normalised by its length",
    ] {
        assert!(told.stdout.contains(word), "no {word:?} in {}", told.stdout);
    }
    let stacks = fs::read_to_string(workshop.path().join("d.folded")).unwrap();
    assert!(stacks.contains("towlower 121212 0\n"), "{stacks}");
    assert!(
        stacks.contains("kworker/0:1;ksys_read_[k] 3030 6061\n"),
        "{stacks}"
    );
    let picture = fs::read_to_string(workshop.path().join("d.svg")).unwrap();
    assert!(picture.contains("a.pb.gz → b.pb.gz") && picture.contains("normalised for duration"));
    let told = diff(&workshop, &["a.pb.gz", "b.pb.gz", "--json"]).succeeded();
    let json: Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(json["unit"], "cpu_seconds_per_second");
    assert_eq!(json["functions"][0]["function"], "towlower");
    assert_eq!(json["functions"][0]["self"]["within_chance"], false);
}

/// With `--output -` folded stacks go to standard output, and the table to standard error.
#[test]
fn folded_stacks() {
    let workshop = workshop();
    let told = diff(&workshop, &["a.folded", "b.folded", "--output", "-"]).succeeded();
    assert_eq!(told.stdout.lines().count(), 6, "{told:#?}");
    assert!(told.stderr.contains("share of all samples"), "{told:#?}");
}

/// A filter may match in only one of the recordings; what it matches there is missing in the other.
#[test]
fn filters() {
    let workshop = workshop();
    let only = |filter| {
        diff(
            &workshop,
            &["a.pb.gz", "b.pb.gz", "--filter", filter, "--json"],
        )
    };
    let json: Value = serde_json::from_str(&only("comm=postgres").succeeded().stdout).unwrap();
    assert_eq!(json["after"]["compared"], 0);
    assert_eq!(json["before"]["compared"], 175);
    only("comm=nobody").failed_saying(&["a.pb.gz", "comm=nobody", "postgres"]);
}

/// The message for each mistake names the file that it is about.
#[test]
fn refused() {
    let workshop = workshop();
    let write = |name: &str, bytes: &[u8]| fs::write(workshop.path().join(name), bytes).unwrap();
    write("text.pb.gz", b"not a profile at all");
    write("text.folded", b"not a profile at all\n");
    write("empty.folded", b"");
    write("none.pb.gz", &pprof::encode(&ResolvedProfile::default()));
    let whole = fs::read(workshop.path().join("a.pb.gz")).unwrap();
    write("half.pb.gz", &whole[..whole.len() / 2]);
    for (words, told) in [
        (
            &["a.pb.gz", "missing.pb.gz"][..],
            &["missing.pb.gz", "No such file"][..],
        ),
        (
            &["missing.folded", "a.folded"],
            &["missing.folded", "No such file"],
        ),
        (
            &["text.pb.gz", "a.pb.gz"],
            &["text.pb.gz", "not a readable profile"],
        ),
        (
            &["a.folded", "text.folded"],
            &["text.folded", "line 1", "does not end in a count"],
        ),
        (&["half.pb.gz", "a.pb.gz"], &["half.pb.gz", "cut short"]),
        (
            &["a.folded", "empty.folded"],
            &["empty.folded", "no stacks"],
        ),
        (
            &["none.pb.gz", "none.pb.gz"],
            &["neither none.pb.gz nor", "sample"],
        ),
        (
            &["a.pb.gz", "b.folded"],
            &["different kinds", "flamestorm report a.pb.gz"],
        ),
        (&["a.pb.gz", "b.svg"], &["b.svg", ".pb.gz or .folded"]),
        (
            &["a.pb.gz", "b.pb.gz", "--output", "d.pb.gz"],
            &["d.pb.gz", "not a recording"],
        ),
        (
            &["a.pb.gz", "b.pb.gz", "--output", "-", "--json"],
            &["both want standard output"],
        ),
        (
            &["a.folded", "b.folded", "--view", "app"],
            &["--view needs two .pb.gz"],
        ),
        (
            &["a.pb.gz", "b.pb.gz", "--output", "no/d.svg"],
            &["no/d.svg", "create its directory"],
        ),
    ] {
        diff(&workshop, words).failed_saying(told);
    }
}
