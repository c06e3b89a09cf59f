//! Frames that are not of the simple kind.

mod common;

use std::fs;

use common::{Recording, Workshop, can_record};

const MILLISECONDS: f64 = 2000.0;

/// `alloca` and aligned locals: the frame hangs on rbp, the saved registers too, and the frame's
/// address is found through memory.
#[test]
fn variable_and_realigned_frames() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("realigned.c", "realigned", &["-mavx"]);
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string()]);
    recording.assert_sound(MILLISECONDS);
    recording
        .profile
        .assert_share(0.95, "the true stack", |stack| {
            stack.has_chain(&["main", "variable", "realigned", "both", "burn"])
                && stack.starts_at_process_start()
        });
}

/// Code with frame pointers in an anonymous mapping, between code without: both directions of the
/// change are followed, and the frames carry the names of the perf map.
#[test]
fn just_in_time_compiled_code() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("jit.c", "jit", &[]);
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string()]);
    let map = recording
        .finished
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("map "))
        .unwrap_or_else(|| panic!("{:#?}", recording.finished));
    fs::remove_file(map).expect("the perf map of the program");
    recording.assert_sound(MILLISECONDS);
    let burning = recording.profile.filtered(|stack| stack.has("burn"));
    burning.assert_share(0.99, "the true stack", |stack| {
        stack.has_chain(&[
            "main",
            "run_jit",
            "jit_outer",
            "jit_inner",
            "callback",
            "burn",
        ]) && stack.starts_at_process_start()
    });
    // Proven by tables on both sides, but not in between: the summary says so.
    let by_frame_pointer = recording.summary.outcome("complete_by_frame_pointer");
    assert!(
        by_frame_pointer >= 0.9 * burning.total() as f64,
        "{by_frame_pointer} of {}",
        burning.total()
    );
}

/// A Rust program: a closure has its name, and so has what was inlined into it.
#[test]
fn rust_closures_and_inlined_functions() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.rustc("closures.rs", "closures");
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string()]);
    recording.assert_sound(MILLISECONDS);
    recording
        .profile
        .assert_share(0.95, "the true stack", |stack| {
            stack.has_in_order(&[
                "main",
                "closures::main",
                "closures::apply",
                "closures::main::{{closure}}",
                "closures::inlined",
                "closures::Burner::burn",
            ]) && stack.starts_at_process_start()
        });
}
