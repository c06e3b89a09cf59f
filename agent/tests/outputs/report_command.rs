//! The command `flamestorm report`: the table and the pictures of a recording again.

use std::{fs, path::Path};

use crate::common::{MachineLock, Profile, Summary, Workshop, agent, can_record, start};

/// Makes a recording. Returns the path of its `.pb.gz` and its folded stacks.
fn record(workshop: &Workshop) -> (String, Profile) {
    let _lock = MachineLock::shared();
    let program = workshop.cc("chain.c", "reported", &[]);
    let pprof = workshop.path().join("out.pb.gz");
    let folded = workshop.path().join("out.folded");
    let mut command = agent(["record", "--frequency", "499"]);
    command.arg("--output").arg(&pprof);
    command.arg("--output").arg(&folded);
    command.arg("--").arg(&program).arg("500");
    start(command).finish().succeeded();
    let pprof = pprof.to_str().expect("a path of ours").to_owned();
    (pprof, Profile::read(&folded))
}

fn sorted(profile: &Profile) -> Vec<(String, Vec<String>, u64)> {
    let mut stacks: Vec<_> = profile
        .0
        .iter()
        .map(|stack| (stack.comm.clone(), stack.frames.clone(), stack.count))
        .collect();
    stacks.sort();
    stacks
}

/// The file of record contains everything that is in the folded file.
#[test]
fn the_same_profile_again() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let (pprof, recorded) = record(&workshop);
    let again = start(agent(["report", &pprof, "--output", "-"]))
        .finish()
        .succeeded();
    assert_eq!(sorted(&Profile::parse(&again.stdout)), sorted(&recorded));
    let summary = start(agent(["report", &pprof, "--summary", "json"]))
        .finish()
        .succeeded();
    let summary = Summary::parse(&summary.stdout);
    assert_eq!(summary.number("/samples"), recorded.total() as f64);
}

/// A filter keeps the samples with its label and drops all others.
#[test]
fn filters() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let (pprof, recorded) = record(&workshop);
    let only = |filter: &str| {
        let words = ["report", &pprof, "--filter", filter, "--output", "-"];
        start(agent(words)).finish()
    };
    let kept = Profile::parse(&only("comm=reported").succeeded().stdout);
    assert_eq!(kept.total(), recorded.of("reported").total());
    let kept = Profile::parse(&only("function=second").succeeded().stdout);
    assert_eq!(kept.total(), recorded.count(|stack| stack.has("second")));
    only("comm=nobody").failed_saying(&["comm=nobody", "reported"]);
}

/// A file that is truncated anywhere gives an error that names it.
#[test]
fn truncated_file() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let (pprof, _) = record(&workshop);
    let whole = fs::read(&pprof).expect("the recording");
    for length in [
        0,
        1,
        10,
        20,
        whole.len() / 2,
        whole.len() - 9,
        whole.len() - 1,
    ] {
        fs::write(&pprof, &whole[..length]).expect("a file of ours");
        start(agent(["report", &pprof]))
            .finish()
            .failed_saying(&[&pprof]);
    }
}

/// A file that is no recording, or does not exist, gives an error that names it.
#[test]
fn no_recording() {
    let workshop = Workshop::new();
    let other = workshop.path().join("other.pb.gz");
    fs::write(&other, "not a profile at all").expect("a file of ours");
    for file in [
        other.as_path(),
        Path::new("/nonexistent.pb.gz"),
        workshop.path(),
    ] {
        let file = file.to_str().expect("a path of ours");
        start(agent(["report", file]))
            .finish()
            .failed_saying(&[file]);
    }
}
