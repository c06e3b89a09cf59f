//! Threads, processes and mappings that come and go.

use std::{fs, process::Command, thread, time::Duration};

use crate::common::{
    HERTZ, MachineLock, Profile, Recording, Running, Stack, Summary, Workshop, agent, can_record,
    start,
};

/// 32 threads at once: each stack ends where the thread began.
#[test]
fn many_threads() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("threads.c", "threads", &["-pthread"]);
    // Alone: while 32 threads want the CPUs, the agents of other tests would wait for theirs.
    let recording = Recording::undisturbed(&program, &["80", "32"]);
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

/// 1,500 processes of a millisecond each, in two kinds: when they are gone, nothing is kept for them but what is
/// stated.
#[test]
fn what_has_ended_is_forgotten() {
    /// Processes of the recording that live at its end: the program, the agent, and what these have just started.
    const LIVING: f64 = 16.0;
    /// Processes that begin or end between the end of the recording and the count here: other tests'.
    const OTHERS: f64 = 64.0;
    /// Processes that the agent remembers after their end.
    const REMEMBERED: f64 = 1024.0;
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let churn = workshop.cc("churn.c", "churn", &[]);
    // The wait is longer than the ten seconds after which the agent looks for what no event told it.
    let recording = Recording::alone(&churn, &["1500", "1", "12000"]);
    let living = pids().count() as f64 + OTHERS;
    assert_eq!(recording.finished.code(), 0);
    let summary = &recording.summary;
    for part in ["forked", "executed"] {
        let of_part = recording.profile.count(|stack| stack.has(part));
        assert!(of_part > 200, "{of_part} samples in {part}: {summary}");
    }
    for (what, bound) in [
        ("processes", LIVING),
        ("targets", LIVING),
        ("known", LIVING),
        ("backends", LIVING),
        ("given", LIVING),
        ("placed", LIVING),
        ("known_processes", living + REMEMBERED),
        ("ended_processes", REMEMBERED),
        ("events", 1000.0),
        ("repairs", living),
        ("missed", living),
    ] {
        let size = summary.number(&format!("/sizes/{what}"));
        assert!(size <= bound, "{what}: {size} > {bound}\n{summary}");
    }
}

/// Processes of the machine.
fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A process whose first thread has ended lives on: its stacks are whole and have names, whether it was recorded from
/// its start or only afterwards.
#[test]
fn a_process_without_its_first_thread() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("leaderless.c", "leaderless", &["-pthread"]);
    let is_true = |stack: &Stack| {
        let user: Vec<&str> = stack.user().collect();
        user.get(2) == Some(&"worker") && user.get(3) == Some(&"burn")
    };
    let recording = Recording::of(&program, &["2000"]);
    recording.assert_sound(2000.0);
    let true_stack = "worker, called by the thread's start";
    recording.profile.assert_share(0.95, true_stack, is_true);

    // Taken before the program starts: it must neither disturb another test that has the machine to itself nor use up
    // its CPU time while this test waits for the lock.
    let lock = MachineLock::exclusive();
    let mut command = Command::new(&program);
    command.arg("120000");
    let mut burning = start(command);
    let pid = burning.pid();
    burning.wait_until("its first thread has ended", |_| {
        fs::read_link(format!("/proc/{pid}/exe")).is_err()
    });
    let (profile, summary) = attached(&lock, &workshop, &mut burning, |_, burning| {
        burning.wait_for_cpu(2000);
    });
    assert!(profile.total() > u64::from(HERTZ), "{profile}");
    assert!(summary.complete_share() >= 0.95, "{summary}\n{profile}");
    profile.assert_share(0.95, true_stack, is_true);
}

/// More is mapped than the buffer of a stopped agent holds, and a library is opened that the agent is not told of:
/// it finds out, and the library's samples have their stacks and names.
#[test]
fn lost_events_are_made_up_for() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let plugin = workshop.cc("plugin.c", "plugin.so", &["-shared", "-fPIC"]);
    let flood = workshop.cc("flood.c", "flood", &[]);
    let lock = MachineLock::exclusive();
    let mut command = Command::new(flood);
    command.args(["20000", "120000"]).arg(&plugin);
    let mut flood = start(command);
    flood.wait_until("ready", |flood| flood.stdout().contains("ready"));
    let (profile, summary) = attached(&lock, &workshop, &mut flood, |agent, flood| {
        agent.signal_worker(libc::SIGSTOP);
        flood.signal(libc::SIGUSR1);
        flood.wait_until("flooded", |flood| flood.stdout().contains("flooded"));
        agent.signal_worker(libc::SIGCONT);
        flood.signal(libc::SIGUSR1);
        flood.wait_for_cpu(4000);
    });
    let lost = summary.number("/lost/process_events_lost");
    assert!(lost > 1000.0, "{summary}");
    let inside = profile.filtered(|stack| !stack.has("some_code"));
    assert!(inside.total() > 3 * u64::from(HERTZ), "{profile}");
    inside.assert_share(0.8, "the true stack", |stack| {
        stack.has_chain(&["main", "use_plugin", "plugin_run", "plugin_inner", "burn"])
            && stack.starts_at_process_start()
    });
}

/// Records a running process while `meanwhile` lasts. What floods the kernel's buffers floods those of every recording,
/// so nobody else records then.
fn attached(
    _alone: &MachineLock,
    workshop: &Workshop,
    running: &mut Running,
    meanwhile: impl FnOnce(&mut Running, &mut Running),
) -> (Profile, Summary) {
    let folded = workshop.path().join("attached.folded");
    let mut command = agent(["record", "--summary", "json", "--frames", "raw"]);
    command.args(["--frequency", &HERTZ.to_string()]);
    command.args(["--pid", &running.pid().to_string()]);
    command.arg("--output").arg(&folded);
    let mut agent = start(command);
    agent.wait_until("recording", |agent| agent.stderr().contains("recording"));
    // It has read what there is.
    thread::sleep(Duration::from_millis(500));
    meanwhile(&mut agent, running);
    agent.signal(libc::SIGINT);
    let finished = agent.finish().succeeded();
    (Profile::read(&folded), Summary::parse(&finished.stdout))
}
