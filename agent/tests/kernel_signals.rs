//! Stacks through signal frames.

mod common;

use common::{Recording, Workshop, can_record};

const MILLISECONDS: f64 = 1500.0;

fn check(stack: &str) {
    let workshop = Workshop::new();
    let program = workshop.cc("signal.c", "signal", &[]);
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string(), stack]);
    recording.assert_sound(MILLISECONDS);
    let profile = &recording.profile;
    let handled = profile.filtered(|stack| stack.has("on_alarm"));
    assert!(
        handled.total() * 3 > profile.total(),
        "the handler runs for two thirds of the time, {} of {} samples are in it:\n{profile}",
        handled.total(),
        profile.total()
    );
    handled.assert_share(0.99, "from the handler to the start", |stack| {
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
    inner.assert_share(0.99, "callers of the interrupted function", |stack| {
        stack.has_chain(&["main", "interrupted", "outer", "inner"])
    });
}

/// A handler on the normal stack: the stack goes on below it, through the signal frame.
#[test]
fn handler_on_the_normal_stack() {
    if can_record() {
        check("normal");
    }
}

/// A handler on an alternate stack: the interrupted frames lie elsewhere, even below.
#[test]
fn handler_on_an_alternate_stack() {
    if can_record() {
        check("alternate");
    }
}
