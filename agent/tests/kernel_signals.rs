//! Stacks through signal frames.

mod common;

use common::{Recording, Workshop, can_record};

const MILLISECONDS: f64 = 2000.0;

fn check(stack: &str, whole: f64) {
    let workshop = Workshop::new();
    let program = workshop.cc("signal.c", "signal", &[]);
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string(), stack]);
    assert_eq!(recording.finished.code(), 0, "{:#?}", recording.finished);
    assert!(
        recording.summary.complete_share() >= whole,
        "{}\n{}",
        recording.summary,
        recording.profile
    );
    recording.profile.assert_named();
    assert_eq!(recording.summary.lost(), 0.0);
    let profile = &recording.profile;
    let handled = profile.filtered(|stack| stack.has("on_alarm"));
    assert!(
        handled.total() * 3 > profile.total(),
        "the handler runs for two thirds of the time, {} of {} samples are in it:\n{profile}",
        handled.total(),
        profile.total()
    );
    handled.assert_share(whole, "from the handler to the start", |stack| {
        stack.has_in_order(&["main", "interrupted", "on_alarm"]) && stack.starts_at_process_start()
    });
    // The handler was called by the kernel, not by the interrupted function: the frame between is
    // the return trampoline.
    handled.assert_share(1.0, "the trampoline is a frame", |stack| {
        !stack.has_chain(&["inner", "on_alarm"]) && !stack.has_chain(&["outer", "on_alarm"])
    });
    // What a signal interrupts is mostly in the functions called all the time, at any instruction
    // of theirs; each has its caller.
    let inner = handled.filtered(|stack| stack.has("inner"));
    assert!(inner.total() > 0, "{handled}");
    inner.assert_share(whole, "callers of the interrupted function", |stack| {
        stack.has_chain(&["main", "interrupted", "outer", "inner"])
    });
}

/// A handler on the normal stack: the stack goes on below it, through the signal frame.
#[test]
fn handler_on_the_normal_stack() {
    if can_record() {
        check("normal", 0.99);
    }
}

/// A handler on an alternate stack: the interrupted frames lie elsewhere, even below. While the
/// kernel does not know the process yet, the copy of the stack that goes up has the alternate one
/// alone, so that the first tenth of a second is not whole.
#[test]
fn handler_on_an_alternate_stack() {
    if can_record() {
        check("alternate", 0.9);
    }
}
