//! Files and processes that try to hang the agent, to fill its memory, or to make it report wrong names.
//! Beside each of them the agent must report of honest programs what it reports when they are alone, end in
//! time, and note what it refused.

#[path = "../common/mod.rs"]
mod common;
mod elf;
mod files;
mod fuse;
mod processes;
mod stage;

use common::can_record;
use stage::{Case, Stage};

/// All cases, in groups that are recorded together.
#[test]
fn hostile_files_and_processes() {
    if !can_record() {
        return;
    }
    let stage = Stage::set();
    // To run only some cases: words separated by commas, one of which is in the case's name.
    let only = std::env::var("FLAMESTORM_HOSTILE").ok();
    let mut failures = Vec::new();
    for (group, cases) in groups() {
        let cases: Vec<Case> = cases
            .into_iter()
            .filter(|case| {
                only.as_ref()
                    .is_none_or(|only| only.split(',').any(|word| case.name.contains(word)))
            })
            .collect();
        if !cases.is_empty() {
            failures.extend(stage.judge(group, &cases));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Hostile files and processes add at most five seconds to the time that a recording takes. Run by `make
/// bench`.
#[test]
#[ignore = "a measurement, for a machine that does nothing else"]
fn a_recording_takes_no_longer() {
    if !can_record() {
        return;
    }
    let stage = Stage::set();
    let mut most = 0.0f64;
    for (group, cases) in groups() {
        let (without, with) = stage
            .times(&cases)
            .unwrap_or_else(|error| panic!("{group}: {error}"));
        println!("{group}: {without:?} without, {with:?} with");
        most = most.max(with.as_secs_f64() - without.as_secs_f64());
    }
    println!("seconds_more {most:.2}");
    assert!(most <= 5.0, "{most:.2} s more");
}

/// If the recording process is killed, the front process ends too, even if a thread of the recording
/// process waits for a file system that never answers and therefore cannot end.
#[test]
fn killed_while_a_thread_waits() {
    if !can_record() {
        return;
    }
    let stage = Stage::set();
    stage.kill_while_a_thread_waits();
}

fn groups() -> Vec<(&'static str, Vec<Case>)> {
    vec![
        ("debug links", files::debug_links()),
        ("alternate links and bombs", files::alternates_and_bombs()),
        ("broken executables", files::executables()),
        (
            "perf maps and debug directories",
            files::maps_and_directories(),
        ),
        ("memory that hangs", processes::memory()),
        ("processes", processes::processes()),
        ("false servers", processes::servers()),
    ]
}
