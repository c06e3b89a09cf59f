//! An agent that records for long among processes that live for short: what it holds at the end is what lives then and
//! a stated rest, and of the last minute it knows what it knew of the first.
//!
//! `FLAMESTORM_SOAK_MINUTES` says for how long each test records; one minute when it is not set.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::common::{
    Cluster, HERTZ, MachineLock, Profile, Running, Stack, Summary, Workshop, agent, can_record,
    start,
};
use tempfile::TempDir;

/// New processes a second.
const STORM: u64 = 1_000;
/// Of the samples of a statement, those whose query and caller must be known.
const KNOWN: f64 = 0.99;
/// Samples of a part at least: fewer tell nothing about a hundredth.
const LEAST: u64 = 100;

/// What may be held beside one entry for each process and thread that lives: what ended last is kept, because events
/// and samples of it may still come, and what may be used again rests before it goes.
const REST: [(&str, u64); 6] = [
    // In the kernel: a process is removed as it ends.
    ("processes", 512),
    ("known_processes", 1_024 + 512),
    ("ended_processes", 1_024),
    ("given", 4_096),
    ("placed", 4_096),
    // 2 KiB each: the tables of every file that is mapped.
    ("blocks", 65_536),
];
/// The same for what is not listed: the largest bound of a map that evicts by itself.
const OTHER_REST: u64 = 8_192;

/// Recordings are cut into parts, each with clients of its own name.
struct Parts {
    count: u32,
    each: Duration,
}

impl Parts {
    /// Parts of a minute, or six for a single minute.
    fn of(minutes: u32) -> Self {
        if minutes > 1 {
            Self {
                count: minutes,
                each: Duration::from_secs(60),
            }
        } else {
            Self {
                count: 6,
                each: Duration::from_secs(10),
            }
        }
    }

    /// The first one that is compared: the agent is warm.
    fn first(&self) -> u32 {
        self.count.div_ceil(6)
    }

    fn last(&self) -> u32 {
        self.count - 1
    }
}

fn minutes() -> u32 {
    let Ok(minutes) = env::var("FLAMESTORM_SOAK_MINUTES") else {
        return 1;
    };
    let parsed = minutes.parse().ok().filter(|minutes| *minutes > 0);
    parsed.unwrap_or_else(|| panic!("FLAMESTORM_SOAK_MINUTES={minutes}"))
}

/// A recording of the whole machine that lasts until it is told to end.
struct Soak {
    directory: TempDir,
    running: Running,
}

/// What it told.
struct Soaked {
    directory: TempDir,
    summary: Summary,
}

impl Soak {
    fn start() -> Self {
        let directory = TempDir::new().expect("temporary directory");
        let mut command = agent(["record", "--summary", "json", "--frequency"]);
        command.arg(HERTZ.to_string());
        command
            .arg("--output")
            .arg(directory.path().join("a.pb.gz"));
        let mut running = start(command);
        running.wait_until("it records", |agent| agent.stderr().contains("recording"));
        Self { directory, running }
    }

    fn finish(self) -> Soaked {
        self.running.signal(libc::SIGINT);
        let finished = self.running.finish().succeeded();
        let summary = Summary::parse(&finished.stdout);
        // Shown when the test fails.
        println!("{summary}sizes: {}", summary.0["sizes"]);
        Soaked {
            directory: self.directory,
            summary,
        }
    }
}

impl Soaked {
    /// The backends' stacks with these labels.
    fn backends(&self, filters: &[&str]) -> Profile {
        let mut command = agent(["report", "--output", "-", "--frames", "raw"]);
        command.args(["--view", "database"]);
        command.arg(self.directory.path().join("a.pb.gz"));
        for filter in filters {
            command.args(["--filter", filter]);
        }
        let finished = start(command).finish();
        // Filters without a match are an error to who typed them.
        if finished.stderr.contains("no sample") {
            return Profile(Vec::new());
        }
        Profile::parse(&finished.succeeded().stdout)
    }

    /// Asserts that what is held at the end is what lives and a rest.
    #[track_caller]
    fn assert_small(&self, alive: u64) {
        let sizes = sizes(&self.summary);
        let rest: BTreeMap<&str, u64> = REST.into();
        let large: Vec<String> = sizes
            .iter()
            .filter(|(name, size)| {
                **size > alive + rest.get(name.as_str()).copied().unwrap_or(OTHER_REST)
            })
            .map(|(name, size)| format!("{name}: {size}"))
            .collect();
        assert!(large.is_empty(), "{alive} live; {}", large.join(", "));
    }
}

/// What the agent and its maps hold at the end of a recording, by name.
#[track_caller]
fn sizes(summary: &Summary) -> BTreeMap<String, u64> {
    let sizes = summary.0["sizes"]
        .as_object()
        .unwrap_or_else(|| panic!("no sizes in {:#}", summary.0));
    assert!(sizes.contains_key("processes"), "{sizes:?}");
    sizes
        .iter()
        .map(|(name, size)| (name.clone(), size.as_u64().expect("a count")))
        .collect()
}

/// Processes and threads on this machine.
fn alive() -> u64 {
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let is_process = |name: &std::ffi::OsStr| name.as_encoded_bytes()[0].is_ascii_digit();
    let threads = |process: fs::DirEntry| {
        fs::read_dir(process.path().join("task")).map_or(0, |threads| threads.count() as u64)
    };
    processes
        .filter(|entry| is_process(&entry.file_name()))
        .map(threads)
        .sum()
}

/// Connections that live for one statement each: every backend is a new process.
#[test]
fn connections_for_one_statement_each() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::exclusive();
    let Some(cluster) = Cluster::start("") else {
        return;
    };
    cluster.sql("CREATE TABLE pgbench_accounts (aid int PRIMARY KEY, abalance int)");
    cluster.sql("INSERT INTO pgbench_accounts SELECT n, 0 FROM generate_series(1, 100000) n");
    let script = cluster.path().join("select.sql");
    // Long enough that samples fall into it.
    let query = "SELECT sum(abalance + aid % 7) FROM pgbench_accounts WHERE aid < 20000;\n";
    fs::write(&script, query).expect("a file of ours");
    let parts = Parts::of(minutes());
    let soak = Soak::start();
    for part in 0..parts.count {
        start(pgbench(&cluster, &script, part, parts.each))
            .finish_within(parts.each * 2 + Duration::from_secs(60))
            .succeeded();
    }
    let soaked = soak.finish();
    for part in [parts.first(), parts.last()] {
        assert_known(&soaked, part);
    }
    assert_attributed(&soaked);
    soaked.assert_small(alive());
}

/// `pgbench -C` with a part's name.
fn pgbench(cluster: &Cluster, script: &Path, part: u32, each: Duration) -> Command {
    let mut command = cluster.command("pgbench");
    command.args(["-n", "-C", "-c", "2", "-j", "1", "-U", "test", "-h"]);
    command.arg(cluster.path());
    command.args(["-p", &cluster.port.to_string()]);
    command.args(["-T", &each.as_secs().to_string(), "-f"]);
    command.arg(script).arg("postgres");
    command.env("PGAPPNAME", part_name(part));
    command
}

fn part_name(part: u32) -> String {
    format!("part{part:03}")
}

/// While a backend is in one of these functions of its own, a statement is open. They are exported, so a stripped
/// server has their names as well.
fn is_in_statement(stack: &Stack) -> bool {
    stack.comm.starts_with("postgres") && (stack.has("PortalRun") || stack.has("ExecutorRun"))
}

/// Asserts that in a part nearly all samples of statements have a caller.
#[track_caller]
fn assert_known(soaked: &Soaked, part: u32) {
    let application = format!("application={}", part_name(part));
    let open = |filters: &[&str]| soaked.backends(filters).count(is_in_statement);
    let all = open(&[&application]);
    let known = open(&[&application, "caller=known"]);
    println!("{}: {known} of {all} with a caller", part_name(part));
    assert!(all >= LEAST, "{application}: {all} samples");
    assert!(
        known as f64 >= KNOWN * all as f64,
        "{application}: {known} of {all}"
    );
}

/// Asserts that over the whole recording nearly all samples in statements have a query. A backend of which nothing is
/// known has no application's name, so it is in no part. (Other servers of this machine count as well.)
#[track_caller]
fn assert_attributed(soaked: &Soaked) {
    let all = soaked.backends(&[]).count(is_in_statement);
    let phases = ["phase=executing", "phase=between statements"];
    let named = soaked.backends(&phases).count(is_in_statement);
    println!("{named} of {all} samples in statements with a query");
    assert!(named as f64 >= KNOWN * all as f64, "{named} of {all}");
    let processes = soaked.summary.0["processes"].as_array().expect("processes");
    let server = processes
        .iter()
        .find(|process| process["name"].as_str() == Some("postgres"));
    let server = server.unwrap_or_else(|| panic!("no postgres in {processes:#?}"));
    let share = server["rooted_share"].as_f64().expect("a share");
    assert!(share >= 0.98, "rooted: {share}");
}

/// A thousand new processes a second, every other one of which runs a program.
#[test]
fn a_thousand_new_processes_a_second() {
    if !can_record() {
        return;
    }
    let _lock = MachineLock::exclusive();
    let workshop = Workshop::new();
    let storm = workshop.cc("hostile.c", "storm", &["-pthread"]);
    let tiny = workshop.cc("chain.c", "storm_tiny", &["-static"]);
    let honest = workshop.cc("chain.c", "honest", &[]);
    let time = Duration::from_secs(60) * minutes();
    let soak = Soak::start();
    let storming = run(
        &storm,
        &[
            "storm",
            &STORM.to_string(),
            &time.as_secs().to_string(),
            tiny.to_str().expect("UTF-8"),
        ],
    );
    let finished = storming
        .finish_within(time + Duration::from_secs(120))
        .succeeded();
    // Known after the storm as a program is before it.
    let after = run(&honest, &["3000"]).finish_within(Duration::from_secs(120));
    after.succeeded();
    let soaked = soak.finish();
    let began = finished.stdout.trim().strip_prefix("began ");
    let began: u64 = began.and_then(|count| count.parse().ok()).expect("a count");
    println!("{began} processes");
    assert!(
        began >= STORM * time.as_secs() * 9 / 10,
        "{began} processes"
    );
    soaked.assert_small(alive());
    assert_honest(&soaked);
}

fn run(program: &PathBuf, args: &[&str]) -> Running {
    let mut command = Command::new(program);
    command.args(args);
    start(command)
}

#[track_caller]
fn assert_honest(soaked: &Soaked) {
    let mut command = agent(["report", "--output", "-", "--frames", "raw"]);
    command.arg(soaked.directory.path().join("a.pb.gz"));
    let profile = Profile::parse(&start(command).finish().succeeded().stdout).of("honest");
    assert!(profile.total() >= LEAST, "{} samples", profile.total());
    profile.assert_share(0.98, "the true stack", |stack| {
        stack.has_chain(&["main", "first", "second", "third", "burn"])
            && stack.starts_at_process_start()
    });
}
