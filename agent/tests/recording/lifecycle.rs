//! Threads, processes and mappings that begin and end during a recording.

use std::{fs, process::Command, thread, time::Duration};

use crate::common::{
    HERTZ, MachineLock, Profile, Recording, Running, Stack, Summary, Workshop, agent, can_record,
    start,
};

/// The stacks of 32 concurrent threads end where each thread began.
#[test]
fn many_threads() {
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let program = workshop.cc("threads.c", "threads", &["-pthread"]);
    // As exclusive: while 32 threads want the CPUs, the agents of other tests would have to wait for a CPU.
    let recording = Recording::undisturbed(&program, &["80", "32"]);
    recording.assert_sound(80.0 * 32.0);
    recording
        .profile
        .assert_share(0.95, "worker, called by the thread's start", |stack| {
            let user: Vec<&str> = stack.user().collect();
            // The two frames below are libc's start of a thread (clone3 and start_thread, with or without
            // names).
            user.get(2) == Some(&"worker") && user.get(3) == Some(&"burn")
        });
}

/// A process that executes two further programs. The samples of each part have the stacks of its own
/// program.
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

/// 1,000 processes of a few milliseconds each, one after the other, are sampled with complete stacks and
/// names.
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
        // About a tenth of the time is spent in execve. In the middle of it a process has the new address
        // space and the registers of the old one, hence no user stack.
        assert!(
            recording.summary.complete_share() >= 0.99,
            "{}\n{}",
            recording.summary,
            recording.profile
        );
    }
}

/// A library that is opened and closed again and again, each time as another file. No stack through it is
/// lost, not even the first, and its functions have names after it was closed.
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

/// 1,500 processes of a millisecond each, in two kinds. When they have ended, the agent keeps nothing for
/// them beyond the stated bounds.
#[test]
fn what_has_ended_is_forgotten() {
    /// Processes of the recording that are alive at its end: the program, the agent, and children that
    /// these have just started.
    const LIVING: f64 = 16.0;
    /// Processes of other tests that may begin or end between the end of the recording and the count below.
    const OTHERS: f64 = 64.0;
    /// Processes that the agent remembers after their end.
    const REMEMBERED: f64 = 1024.0;
    if !can_record() {
        return;
    }
    let workshop = Workshop::new();
    let churn = workshop.cc("churn.c", "churn", &[]);
    // The wait is longer than the ten seconds after which the agent looks for changes that no event
    // reported.
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

/// Pids of all processes of the machine.
fn pids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A process continues when its first thread has ended. Its stacks are complete and have names, whether it
/// was recorded from its start or attached to later.
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

/// While the agent is stopped a process maps more than the agent's event buffer holds, and then opens a
/// library, of which the agent gets no event. The agent notices the loss, and the samples in the library
/// have their stacks and names.
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

/// Records a running process while `meanwhile` runs. The caller holds the lock as exclusive, because what
/// floods the kernel's event buffers floods those of every recording.
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
    // By now the agent has read the existing processes and mappings.
    thread::sleep(Duration::from_millis(500));
    meanwhile(&mut agent, running);
    agent.signal(libc::SIGINT);
    let finished = agent.finish().succeeded();
    (Profile::read(&folded), Summary::parse(&finished.stdout))
}
