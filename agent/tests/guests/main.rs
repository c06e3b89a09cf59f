//! Other kernels: the agent records programs whose true stacks are known under Debian's 6.1 and 6.12 in
//! qemu (`scripts/qemu.sh`). The verifier and the kernel's structures differ from kernel to kernel. Every
//! guest runs while the test holds the machine's lock as exclusive.
//!
//! Without qemu, or without the kernels and the means to fetch them, a test says so and passes. With
//! `FLAMESTORM_REQUIRE_QEMU=1` it fails instead.

#[path = "../common/mod.rs"]
mod common;

use std::{
    env,
    io::{self, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use common::{Cluster, Finished, MachineLock, Profile, Summary, Workshop, start};

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/qemu.sh")
}

/// The image of a kernel, which is fetched if necessary, or the reason why there is none.
fn image(kernel: &str) -> Result<String, String> {
    let present = |tool: &str| {
        let found = Command::new("sh")
            .args(["-c", "command -v \"$0\"", tool])
            .output();
        found.is_ok_and(|output| output.status.success())
    };
    for tool in ["qemu-system-x86_64", "busybox"] {
        if !present(tool) {
            return Err(format!("{tool} is not installed"));
        }
    }
    let output = Command::new(script())
        .args(["--fetch", kernel])
        .output()
        .map_err(|error| format!("{}: {error}", script().display()))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Runs a shell command under a kernel, with options for `qemu.sh`. The agent is in the guest's PATH.
/// `files` are in the guest's root directory, or at their own path if that begins with /usr. If the kernel
/// is not available, prints that and returns `None`.
fn under(kernel: &str, options: &[&str], files: &[&Path], shell: &str) -> Option<Finished> {
    // One guest at a time: two emulated guests of two processors each are more than a small machine can
    // run.
    let _lock = MachineLock::exclusive();
    let image = match image(kernel) {
        Ok(image) => image,
        Err(why) => {
            let required = env::var_os("FLAMESTORM_REQUIRE_QEMU").is_some_and(|v| v == "1");
            assert!(!required, "FLAMESTORM_REQUIRE_QEMU=1, but: {why}");
            writeln!(io::stderr(), "qemu, Linux {kernel}: SKIPPED, {why}").expect("standard error");
            return None;
        }
    };
    let mut command = Command::new(script());
    // Without its debug information, which an emulated machine would take half a minute to read.
    let workshop = Workshop::new();
    let agent = workshop.path().join("flamestorm");
    let mut strip = Command::new("strip");
    strip.args(["--strip-debug", env!("CARGO_BIN_EXE_flamestorm"), "-o"]);
    assert!(
        strip
            .arg(&agent)
            .status()
            .is_ok_and(|status| status.success())
    );
    let agent = format!("{}:/bin/flamestorm", agent.display());
    command.args(["--file", &agent]);
    for file in files {
        let name = file.file_name().expect("a file").to_string_lossy();
        let target = match file.starts_with("/usr") {
            true => file.display().to_string(),
            false => format!("/{name}"),
        };
        command
            .arg("--file")
            .arg(format!("{}:{target}", file.display()));
    }
    command.args(["--memory", "1024", "--seconds", "300"]);
    command.args(options);
    command.args([&image, "--", "sh", "-c", shell]);
    Some(start(command).finish())
}

/// The exit status of qemu.sh when the guest's kernel has died.
const GUEST_DIED: i32 = 125;

/// Like [`under`], but starts a guest that died without any output once more. With several processors,
/// qemu's emulation occasionally lets a guest run code that it is just patching (`sched_clock_cpu`, when
/// its clock turns out to be unstable, four seconds after the start). A guest that dies because of the
/// agent dies again.
fn under_again(kernel: &str, options: &[&str], files: &[&Path], shell: &str) -> Option<Finished> {
    let finished = under(kernel, options, files, shell)?;
    if finished.code() != GUEST_DIED || !finished.stdout.is_empty() {
        return Some(finished);
    }
    writeln!(
        io::stderr(),
        "qemu, Linux {kernel}: the guest died and is started again: {}",
        finished.stderr
    )
    .expect("standard error");
    under(kernel, options, files, shell)
}

const MARK: &str = "--- folded";

/// Records programs under a kernel: every stack is complete and true.
fn check(kernel: &str) {
    let workshop = Workshop::new();
    let chain = workshop.cc("chain.c", "chain", &[]);
    let signal = workshop.cc("signal.c", "signal", &[]);
    let shell = format!(
        "flamestorm record --frequency 199 --summary json --output out.folded -- \
         sh -c '/chain 3000; /signal 3000 normal' && echo '{MARK}' && cat out.folded"
    );
    let Some(finished) = under_again(kernel, &[], &[&chain, &signal], &shell) else {
        return;
    };
    assert_eq!(finished.code(), 0, "{finished:#?}");
    let (summary, folded) = finished
        .stdout
        .split_once(MARK)
        .unwrap_or_else(|| panic!("no profile: {finished:#?}"));
    let summary = Summary::parse(summary);
    let profile = Profile::parse(folded.trim());
    assert!(
        summary.0["kernel_release"]
            .as_str()
            .is_some_and(|release| release.starts_with(kernel)),
        "{:#}",
        summary.0
    );
    assert_eq!(summary.lost(), 0.0);
    profile.assert_named();
    // busybox is stripped and static, but has unwind tables.
    assert!(
        summary.complete_share() >= 0.99,
        "complete: {}\n{summary}\n{profile}",
        summary.complete_share()
    );
    let chain = profile.of("chain").filtered(|stack| stack.has("burn"));
    assert!(chain.total() > 100, "{profile}");
    chain.assert_share(1.0, "the true stack", |stack| {
        stack.has_chain(&["main", "first", "second", "third", "burn"])
            && stack.starts_at_process_start()
    });
    let handled = profile.filtered(|stack| stack.has("on_alarm"));
    assert!(handled.total() > 50, "{profile}");
    handled.assert_share(0.99, "through the signal frame", |stack| {
        stack.has_in_order(&["main", "interrupted", "on_alarm"]) && stack.starts_at_process_start()
    });
}

/// Debian 12's own kernel.
#[test]
fn linux_6_1() {
    check("6.1");
}

/// Debian 13's kernel, which Debian 12 has as a backport.
#[test]
fn linux_6_12() {
    check("6.12");
}

/// A CPU that is offline at the start comes online, goes offline and comes online again. What runs on it is
/// sampled.
#[test]
fn a_cpu_that_comes_and_goes() {
    /// CPU time of each of the two runs, milliseconds.
    const BURNT: f64 = 3000.0;
    const FREQUENCY: f64 = 199.0;
    let workshop = Workshop::new();
    let chain = workshop.cc("chain.c", "chain", &["-static"]);
    let cpu = "/sys/devices/system/cpu/cpu1/online";
    // The agent looks for new CPUs once a second; a run begins when it must have found this one.
    let run = format!("echo 1 >{cpu}; sleep 2.5; taskset 2 /chain {BURNT}");
    let shell = format!(
        "echo 0 >{cpu} && flamestorm record --frequency {FREQUENCY} --summary json --output out.folded -- \
         sh -c '{run}; echo 0 >{cpu}; sleep 2.5; {run}' && echo '{MARK}' && cat out.folded"
    );
    let Some(finished) = under_again("6.12", &[], &[&chain], &shell) else {
        return;
    };
    assert_eq!(finished.code(), 0, "{finished:#?}");
    let (_, folded) = finished
        .stdout
        .split_once(MARK)
        .unwrap_or_else(|| panic!("no profile: {finished:#?}"));
    let burnt = Profile::parse(folded.trim()).filtered(|stack| stack.has("burn"));
    // Ticks of an emulated CPU come late when the host is busy, and a late tick counts as missed.
    let of_one_run = BURNT / 1000.0 * FREQUENCY;
    assert!(
        burnt.total() as f64 > 1.2 * of_one_run,
        "{} samples of two runs of {of_one_run}\n{burnt}",
        burnt.total()
    );
}

/// A guest with a PostgreSQL server, and its load.
struct Guest {
    kernel: &'static str,
    /// Options for `qemu.sh`.
    options: &'static [&'static str],
    /// The last arguments for `guest_server.sh`.
    load: &'static str,
}

/// A small load: two functions take turns, a few statements a second.
const CALM: &str = "40000 10000 1 5000 199 0";

/// A PostgreSQL server and its clients in a guest. Every sample of a statement of any connection has the
/// statement's own function above it, except for as many samples as the agent says that it took while the
/// status was changing, and no sample has the other function.
fn check_callers(guest: &Guest) {
    let Some(cluster) = Cluster::start("") else {
        return;
    };
    cluster.control("stop");
    let workshop = Workshop::new();
    let client = workshop.cc("two_queries.c", "two_queries", &["-static"]);
    let postgres = PathBuf::from(cluster.command("postgres").get_program());
    let archive = workshop.path().join("server.tgz");
    pack(&archive, &cluster, &postgres);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/programs/guest_server.sh");
    let shell = format!("sh /guest_server.sh {} {}", postgres.display(), guest.load);
    let set_clock = workshop.cc("set_clock.c", "set_clock", &["-static"]);
    let files = [&archive, &client, &set_clock, &script, &postgres].map(PathBuf::as_path);
    let Some(finished) = under_again(guest.kernel, guest.options, &files, &shell) else {
        return;
    };
    assert_eq!(finished.code(), 0, "{finished:#?}");
    let part = |name: &str| {
        let parts = finished.stdout.split("--- ");
        let mut parts = parts.filter_map(|part| part.strip_prefix(name)?.strip_prefix('\n'));
        parts
            .next()
            .unwrap_or_else(|| panic!("no {name}: {finished:#?}"))
    };
    // These kernels have no tracepoint for sends.
    assert!(
        part("doctor").contains("functions tcp_sendmsg, unix_stream_sendmsg"),
        "{finished:#?}"
    );
    let summary = Summary::parse(part("summary"));
    // The test runner shows this when the test fails.
    println!("{}", summary.0);
    assert_eq!(summary.lost(), 0.0);
    let of_sends = |program: &str| summary.0["skipped_runs"][program].as_u64().unwrap_or(0);
    let skipped = of_sends("flamestorm_tcp_call") + of_sends("flamestorm_unix_call");
    // While the kernel skips no run at a send, no send goes unnoted, so no statement can have the caller of
    // another one. It would skip runs if other tasks ran in the middle of the agent's calls on maps.
    assert_eq!(skipped, 0, "{}", summary.0["skipped_runs"]);
    let attribution = &summary.0["attribution"];
    let with_query = attribution["with_query"].as_u64().expect("a count");
    // The agent does not use a status that the backend was changing at the tick, for a small part of each
    // statement, because the start of the statement may not belong to its text. It counts these samples.
    let changing = &attribution["without_caller"]["state_unreadable"];
    let changing = changing.as_u64().expect("a count");
    assert!(changing <= with_query / 100, "{changing} of {with_query}");
    let mut missing = 0;
    for socket in ["by_unix", "by_tcp"] {
        let profile = Profile::parse(part(socket).trim());
        for (function, other, text) in [
            ("ask_heavy", "ask_light", "AS heavy"),
            ("ask_light", "ask_heavy", "AS light"),
        ] {
            // `main` itself prepares a statement of the same text, which is not meant.
            let stacks = profile.filtered(|stack| {
                stack.user().any(|frame| frame.contains(text))
                    && !stack.has_chain(&["main", "flush"])
            });
            assert!(stacks.total() > 20, "{socket}, {text}: {profile}");
            stacks.assert_share(1.0, "not the other function's caller", |stack| {
                !stack.has(other)
            });
            let others = stacks.filtered(|stack| !stack.has(function));
            println!("{socket}, {text}: without its function:\n{others}");
            missing += others.total();
        }
    }
    assert!(
        missing <= changing,
        "{missing} samples without their function, {changing} while the status was changing"
    );
}

/// Packs the server's data, and what it reads of its share directory, with their paths in the guest.
fn pack(archive: &Path, cluster: &Cluster, postgres: &Path) {
    let version = postgres.ancestors().nth(2).and_then(Path::file_name);
    let version = version.expect("/usr/lib/postgresql/VERSION/bin/postgres");
    let share = Path::new("usr/share/postgresql").join(version);
    let status = Command::new("tar")
        .arg("--create")
        .arg("--gzip")
        .arg("--file")
        .arg(archive)
        .args(["--transform", "s,^data,tmp/data,"])
        .args(["--directory", "/"])
        .arg(share.join("timezonesets"))
        .arg("usr/share/zoneinfo/Etc/UTC")
        .arg("usr/share/zoneinfo/UTC")
        .arg("usr/lib/locale/C.utf8")
        .arg("--directory")
        .arg(cluster.path())
        .arg("data")
        .status()
        .expect("tar");
    assert!(status.success(), "tar: {status}");
}

/// Debian 12's own kernel.
#[test]
fn callers_on_linux_6_1() {
    check_callers(&Guest {
        kernel: "6.1",
        options: &[],
        load: CALM,
    });
}

/// Debian 13's kernel.
#[test]
fn callers_on_linux_6_12() {
    check_callers(&Guest {
        kernel: "6.12",
        options: &[],
        load: CALM,
    });
}

/// Many clients on a CPU whose kernel can be preempted nearly everywhere, also where the programs at sends
/// run.
#[test]
fn callers_where_the_kernel_is_preempted() {
    check_callers(&Guest {
        kernel: "6.12",
        options: &["--cpus", "1", "--append", "preempt=full"],
        load: "300 200 2 2000 499 0",
    });
}

/// The wall clock, which PostgreSQL uses for the start of its statements, is set by an hour again and
/// again.
#[test]
fn callers_when_the_clock_is_set() {
    check_callers(&Guest {
        kernel: "6.12",
        options: &[],
        load: "20000 10000 1 5000 199 3600",
    });
}
