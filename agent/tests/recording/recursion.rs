//! Deep stacks.

use crate::common::{Profile, Recording, Stack, Workshop, can_record};

const MILLISECONDS: f64 = 2000.0;

fn record(depth: usize) -> Recording {
    let workshop = Workshop::new();
    let program = workshop.cc("recursion.c", "recursion", &[]);
    Recording::of(&program, &[&MILLISECONDS.to_string(), &depth.to_string()])
}

fn calls(stack: &Stack) -> usize {
    stack.user().filter(|frame| *frame == "recurse").count()
}

/// The samples at the end of the recursion.
fn burning(recording: &Recording) -> Profile {
    recording.profile.filtered(|stack| stack.has("burn"))
}

/// All 300 frames of a recursion are in the stack, from the leaf to `_start`.
#[test]
fn three_hundred_frames() {
    if !can_record() {
        return;
    }
    let recording = record(300);
    recording.assert_sound(MILLISECONDS);
    burning(&recording).assert_share(0.99, "all calls", |stack| {
        calls(stack) == 300
            && stack.has_chain(&["main", "recurse", "recurse"])
            && stack.has_chain(&["recurse", "recurse", "burn"])
            && stack.starts_at_process_start()
    });
}

/// 900 frames are within the limit too (documented: 512).
#[test]
fn nine_hundred_frames() {
    if !can_record() {
        return;
    }
    let recording = record(900);
    recording.assert_sound(MILLISECONDS);
    burning(&recording).assert_share(0.99, "all calls", |stack| {
        calls(stack) == 900 && stack.starts_at_process_start()
    });
    assert!(recording.summary.number("/stack_depth/max") >= 900.0);
}

/// 5,000 frames are more than a sample holds: the leaf end is kept, and each sample is marked as truncated.
#[test]
fn five_thousand_frames_are_marked() {
    if !can_record() {
        return;
    }
    let recording = record(5000);
    assert_eq!(recording.finished.code(), 0, "{:#?}", recording.finished);
    recording.profile.assert_named();
    let burning = burning(&recording);
    burning.assert_share(0.99, "the leaf end", |stack| {
        calls(stack) >= 512
            && stack.has_chain(&["recurse", "recurse", "burn"])
            && !stack.starts_at_process_start()
    });
    // While the kernel does not know the process yet, the stack copy is too short; afterwards the record is
    // full. Neither counts as complete.
    let summary = &recording.summary;
    let marked = summary.outcome("too_deep") + summary.outcome("copy_too_short");
    assert!(
        marked >= 0.99 * burning.total() as f64 && summary.outcome("too_deep") > marked / 2.0,
        "{} samples\n{summary}",
        burning.total()
    );
    assert!(summary.complete_share() < 0.05, "{summary}");
    assert_eq!(summary.lost(), 0.0);
}
