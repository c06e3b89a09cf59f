//! Long recordings of processes that live for a short time. At the end the agent holds no more than what
//! belongs to living processes and a fixed rest, and attributes the last minute as well as the first.
//!
//! `FLAMESTORM_SOAK_MINUTES` sets how long each test records; one minute if it is not set.

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

/// New processes per second.
const STORM: u64 = 1_000;
/// The share of the samples in statements whose query and caller must be known.
const KNOWN: f64 = 0.99;
/// The least number of samples of a part: with fewer, a bound of one percent says nothing.
const LEAST: u64 = 100;

/// Entries that each map may hold in addition to one for every living process and thread. Entries of what
/// ended last are kept, because events and samples of it may still arrive, and entries that may be reused
/// are kept for a while before they are freed.
const REST: [(&str, u64); 6] = [
    // In the kernel; a process is removed when it ends.
    ("processes", 512),
    ("known_processes", 1_024 + 512),
    ("ended_processes", 1_024),
    ("given", 4_096),
    ("placed", 4_096),
    // Blocks of 2 KiB with the tables of every mapped file.
    ("blocks", 65_536),
];
/// The same for maps that are not listed: the largest capacity of a map that evicts by itself.
const OTHER_REST: u64 = 8_192;

/// A recording is divided into parts. The clients of each part have their own application name.
struct Parts {
    count: u32,
    each: Duration,
}

impl Parts {
    /// Parts of one minute each, or six parts of ten seconds for a single minute.
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

    /// The first part that is checked; by then the agent has warmed up.
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

/// A recording of the whole machine that lasts until `finish` is called.
struct Soak {
    directory: TempDir,
    running: Running,
}

/// The result of such a recording.
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
        // The test runner shows this when the test fails.
        println!("{summary}sizes: {}", summary.0["sizes"]);
        Soaked {
            directory: self.directory,
            summary,
        }
    }
}

impl Soaked {
    /// The stacks of backends whose samples match all filters.
    fn backends(&self, filters: &[&str]) -> Profile {
        let mut command = agent(["report", "--output", "-", "--frames", "raw"]);
        command.args(["--view", "database"]);
        command.arg(self.directory.path().join("a.pb.gz"));
        for filter in filters {
            command.args(["--filter", filter]);
        }
        let finished = start(command).finish();
        // `flamestorm report` fails when a filter matches no sample; for a test that is an empty profile.
        if finished.stderr.contains("no sample") {
            return Profile(Vec::new());
        }
        Profile::parse(&finished.succeeded().stdout)
    }

    /// Asserts that no map holds more than one entry for each of the `alive` processes and threads, and its
    /// rest.
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

/// The number of entries in each map of the agent and of the kernel at the end of a recording, by name.
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

/// The number of threads of all processes on this machine.
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

/// Connections for one statement each, so every backend is a new process.
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
    // A query that takes long enough to be sampled.
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

/// `pgbench -C` with the application name of a part.
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

/// While one of these functions is on a backend's stack, a statement is open. The server exports them, so
/// they have names in a stripped server too.
fn is_in_statement(stack: &Stack) -> bool {
    stack.comm.starts_with("postgres") && (stack.has("PortalRun") || stack.has("ExecutorRun"))
}

/// Asserts that in one part nearly all samples in statements have a caller.
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

/// Asserts that in the whole recording nearly all samples in statements have a query. (A backend about
/// which nothing is known has no application name, so it is in no part. Other servers on this machine count
/// as well.)
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

/// A thousand new processes per second, half of which execute a program.
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
    // After the storm a new program must be recorded as well as before it.
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
