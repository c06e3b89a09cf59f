//! Samples in the kernel, and in the vDSO, the kernel's own page of user code.

use crate::common::{Recording, Workshop, can_record};

const MILLISECONDS: f64 = 2000.0;

/// A sample in a system call has the kernel's frames, and below them the complete user stack.
#[test]
fn user_stack_below_a_system_call() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("system_call.c", "system_call", &[]);
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string()]);
    recording.assert_sound(MILLISECONDS);
    let profile = &recording.profile;
    let reading = profile.filtered(|stack| stack.in_kernel() && stack.has("drink"));
    assert!(
        reading.total() * 10 > profile.total() * 8,
        "reading random bytes is the kernel's work:\n{profile}"
    );
    reading.assert_share(0.99, "the true stack", |stack| {
        stack.has_chain(&["main", "drink", "sip"]) && stack.starts_at_process_start()
    });
    // Kernel frames follow the user's frames and are nowhere else.
    reading.assert_share(1.0, "user frames, then kernel frames", |stack| {
        let user = stack.user().count();
        stack.frames[user..]
            .iter()
            .all(|frame| frame.ends_with("_[k]"))
    });
    reading.assert_share(0.9, "the call's own name", |stack| {
        stack.frames.iter().any(|frame| frame.ends_with("read_[k]"))
    });
}

/// The vDSO has no file on disk; its functions still have names and callers.
#[test]
fn vdso() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("vdso.c", "vdso", &[]);
    let recording = Recording::of(&program, &[&MILLISECONDS.to_string()]);
    recording.assert_sound(MILLISECONDS);
    let profile = &recording.profile;
    profile.assert_share(0.9, "the true stack", |stack| {
        stack.has_chain(&["main", "ask_time"]) && stack.starts_at_process_start()
    });
    // libc's function, then the vDSO's, which has two names for one address.
    profile.assert_share(0.5, "the vDSO's function", |stack| {
        let user: Vec<&str> = stack.user().collect();
        let caller = user.iter().position(|frame| *frame == "ask_time");
        caller.is_some_and(|caller| user.len() == caller + 3)
            && ["clock_gettime", "__vdso_clock_gettime"].contains(&user[user.len() - 1])
    });
}
