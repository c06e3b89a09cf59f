//! Threads, processes and mappings that come and go.

mod common;

use common::{HERTZ, Recording, Workshop, can_record};

/// 32 threads at once: each stack ends where the thread began.
#[test]
fn many_threads() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("threads.c", "threads", &["-pthread"]);
    let recording = Recording::of(&program, &["80", "32"]);
    recording.assert_sound(80.0 * 32.0);
    recording
        .profile
        .assert_share(0.95, "worker, called by the thread's start", |stack| {
            let user: Vec<&str> = stack.user().collect();
            // libc: clone3, start_thread; whatever they are called, two frames and no more.
            user.get(2) == Some(&"worker") && user.get(3) == Some(&"burn")
        });
}

/// A process that becomes another program, twice: each part has the stacks of its own program.
#[test]
fn exec_chain() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let programs = ["stage_a", "stage_b", "stage_c"]
        .map(|stage| workshop.cc("exec_chain.c", stage, &[&format!("-DSTAGE={stage}")]));
    let [_, b, c] = programs
        .each_ref()
        .map(|program| program.to_str().expect("a path of ours"));
    let recording = Recording::of(&programs[0], &["700", b, c]);
    recording.assert_sound(3.0 * 700.0);
    for stage in ["stage_a", "stage_b", "stage_c"] {
        let of_stage = recording.profile.of(stage);
        assert!(
            of_stage.total() as f64 > 0.35 * f64::from(HERTZ),
            "{stage}: {}",
            recording.profile
        );
        of_stage.assert_share(0.95, "the true stack", |stack| {
            stack.has_chain(&["main", stage, "burn"]) && stack.starts_at_process_start()
        });
    }
}

/// 1,000 processes of some milliseconds each, one after the other: they are there, with whole
/// stacks and names.
#[test]
fn a_thousand_short_lived_processes() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let starter = workshop.cc("short_lived.c", "short_lived", &[]);
    for (name, flags) in [
        ("tiny_dynamic", [].as_slice()),
        ("tiny_static", &["-static"]),
    ] {
        let tiny = workshop.cc("chain.c", name, flags);
        let tiny = tiny.to_str().expect("a path of ours");
        let recording = Recording::of(&starter, &["500", tiny, "3"]);
        let cpu_ms = recording.printed("cpu_ms");
        assert_eq!(recording.printed("succeeded"), 500.0);
        assert_eq!(recording.finished.code(), 0);
        recording.profile.assert_named();
        assert_eq!(recording.summary.lost(), 0.0);
        let tiny = recording.profile.of(name);
        let expected = recording.expected(cpu_ms);
        assert!(
            tiny.total() as f64 > expected / 2.0,
            "{name}: {} of about {expected} samples",
            tiny.total()
        );
        tiny.filtered(|stack| stack.has("burn"))
            .assert_share(0.99, "the true stack", |stack| {
                stack.has_chain(&["main", "first", "second", "third", "burn"])
                    && stack.starts_at_process_start()
            });
        assert!(
            tiny.count(|stack| stack.has("burn")) * 2 > tiny.total(),
            "most of a process's life is spent in burn:\n{tiny}"
        );
        // A tenth of all this is execve, in the middle of which a process has its new address space
        // and still the registers of the old: it has no user stack.
        assert!(
            recording.summary.complete_share() >= 0.99,
            "{}\n{}",
            recording.summary,
            recording.profile
        );
    }
}

/// A library opened and closed again and again, each time as another file: no stack through it is
/// lost, not even the first, and its functions have names after it has been closed.
#[test]
fn dlopen_in_flight() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let plugin = workshop.cc("plugin.c", "plugin.so", &["-shared", "-fPIC"]);
    let plugin = plugin.to_str().expect("a path of ours");
    let program = workshop.cc("dlopen.c", "dlopen", &[]);
    let directory = workshop.path().to_str().expect("a path of ours");
    let recording = Recording::of(&program, &["40", plugin, "50", directory]);
    recording.assert_sound(40.0 * 50.0);
    let inside = recording.profile.filtered(|stack| stack.has("burn"));
    assert!(
        inside.total() * 2 > recording.profile.total(),
        "{}",
        recording.profile
    );
    inside.assert_share(0.99, "the true stack", |stack| {
        stack.has_chain(&["main", "use_plugin", "plugin_run", "plugin_inner", "burn"])
            && stack.starts_at_process_start()
    });
}
