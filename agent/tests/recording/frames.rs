//! Frames of unusual kinds: alloca and realigned stacks, just-in-time compiled code, inlined functions.

use std::fs;

use crate::common::{Recording, Stack, Workshop, can_record};

const MILLISECONDS: f64 = 2000.0;

/// `alloca` and aligned locals: the CFA and the saved registers are relative to rbp, and in one function
/// the CFA is read from memory.
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

/// Code with frame pointers in an anonymous mapping, between code without. The stack is followed from one
/// kind to the other in both directions, and frames have the names of the perf map.
#[test]
fn just_in_time_compiled_code() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("jit.c", "jit", &[]);
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string()]);
    let map = recording
        .stderr
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
    // The tables prove the stack on both sides of that code, but not within it, so the outcome says so.
    let by_frame_pointer = recording.summary.outcome("complete_by_frame_pointer");
    assert!(
        by_frame_pointer >= 0.9 * burning.total() as f64,
        "{by_frame_pointer} of {}",
        burning.total()
    );
}

/// Code without unwind tables that uses rbp as an ordinary register: rbp may be zero or point anywhere.
/// Nothing proves the end of such a stack, so it is not called complete; the frame that was found is kept.
#[test]
fn just_in_time_compiled_code_without_frame_pointers() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("jit_register.c", "jit_register", &[]);
    for mode in ["register", "return"] {
        let recording = Recording::of(&program, &[&MILLISECONDS.to_string(), mode]);
        let at_leaf = |stack: &Stack| stack.user().last().is_some_and(|f| f.contains("[jit]"));
        let counting = recording.profile.filtered(at_leaf);
        let total = counting.total() as f64;
        assert!(total >= 0.9 * MILLISECONDS / 10.0, "{mode}: {counting}");
        // Outside the loop rbp is the caller's, for about 40 cycles of five million. So more than one of
        // 400 samples falls outside only once in 100,000 runs.
        let in_loop = counting.count(|stack| stack.user().count() == 1) as f64;
        assert!(in_loop >= total - 1.0, "{mode}: {counting}");
        let summary = &recording.summary;
        let guessed = summary.outcome("guessed_end");
        assert!((in_loop..=total).contains(&guessed), "{mode}: {summary}");
        let whole = summary.outcome("complete") + summary.outcome("kernel_only");
        let all = summary.number("/samples");
        assert!(whole <= all - in_loop, "{mode}: {summary}");
        let rooted = summary.number("/rooted_share");
        let rooted_samples = (rooted * all).round();
        assert!(rooted_samples <= all - in_loop, "{mode}: {summary}");
    }
}

/// In a Rust program a closure has its name, and so has a function that was inlined into it.
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
