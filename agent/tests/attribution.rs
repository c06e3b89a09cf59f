//! Which query and which function a PostgreSQL backend's CPU time was for: clients whose queries and
//! callers are known, on a real server.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use common::{
    Cluster, MANY_HERTZ, MachineLock, Profile, Running, Stack, Summary, Workshop, agent,
    can_record, start,
};
use serde_json::Value;
use tempfile::TempDir;

/// Wrong attributions at most, of all samples of a query.
const WRONG: f64 = 0.005;

/// A recording of the whole machine while clients are at work.
struct Recorded {
    directory: TempDir,
    summary: Summary,
    stdout: String,
    stderr: String,
}

impl Recorded {
    /// Records for so many seconds; `during` is called when samples are being taken.
    fn new(seconds: u32, args: &[&str], during: impl FnOnce()) -> Recorded {
        let directory = TempDir::new().expect("temporary directory");
        let file = |name: &str| directory.path().join(name).display().to_string();
        let mut command = agent(["record", "--summary", "json", "--duration"]);
        command.arg(format!("{seconds}s"));
        command
            .args(["--frequency", &MANY_HERTZ.to_string()])
            .args(args);
        for name in ["a.pb.gz", "a.folded", "a.svg"] {
            command.args(["--output", &file(name)]);
        }
        command.env("RUST_LOG", "debug");
        let mut running = start(command);
        running.wait_until("it records", |agent| agent.stderr().contains("recording"));
        // Until it knows the programs that are there.
        std::thread::sleep(Duration::from_millis(700));
        during();
        let finished = running.finish().succeeded();
        Recorded {
            summary: Summary::parse(&finished.stdout),
            stdout: finished.stdout,
            stderr: finished.stderr,
            directory,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The folded stacks of samples with these labels.
    fn folded(&self, args: &[&str]) -> Profile {
        let mut command = agent(["report"]);
        command
            .arg(self.path("a.pb.gz"))
            .args(["--output", "-", "--frames", "raw"]);
        for arg in args {
            command.arg(arg);
        }
        Profile::parse(&start(command).finish().succeeded().stdout)
    }

    fn queries(&self, filters: &[&str]) -> Vec<Value> {
        let mut command = agent(["queries", "--json"]);
        command.arg(self.path("a.pb.gz"));
        for filter in filters {
            command.args(["--filter", filter]);
        }
        let stdout = start(command).finish().succeeded().stdout;
        serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}"))
    }

    fn number(&self, name: &str) -> f64 {
        self.summary.number(&format!("/attribution/{name}"))
    }

    /// Of the samples of an application, those of which something is true: the labels of the `.pb.gz`.
    fn share(&self, application: &str, least: f64, what: &str, holds: impl Fn(&Stack) -> bool) {
        let profile = self.folded(&["--filter", &format!("application={application}")]);
        let why = &self.summary.0["attribution"]["without_caller"];
        assert!(
            profile.total() > 50,
            "{application}: {} samples",
            profile.total()
        );
        profile.assert_share(
            least,
            &format!("{application}: {what} (unknown callers: {why})"),
            holds,
        );
    }
}

/// What a client printed as `name value`.
fn printed(stdout: &str, name: &str) -> f64 {
    let mut lines = stdout.lines();
    lines
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        .unwrap_or_else(|| panic!("no {name} in {stdout:?}"))
}

/// Which of the two queries a stack is of.
fn query(stack: &Stack) -> Option<&'static str> {
    let frame = |text: &str| stack.frames.iter().any(|frame| frame.contains(text));
    match () {
        () if frame("AS heavy") || frame("c_heavy") => Some("heavy"),
        () if frame("AS light") || frame("c_light") => Some("light"),
        () => None,
    }
}

/// Which of the two functions asked.
fn caller(stack: &Stack) -> Option<&'static str> {
    match (stack.has("ask_heavy"), stack.has("ask_light")) {
        (true, false) => Some("heavy"),
        (false, true) => Some("light"),
        _ => None,
    }
}

fn client(program: &Path, args: &[&str]) -> Running {
    let mut command = Command::new(program);
    command.args(args);
    start(command)
}

/// Every way to ask: each client alternates between two functions with a query each, a millisecond or less
/// long. No sample of a query has the other's caller, and the split between the two is the true one, over
/// Unix sockets, IPv4 and IPv6.
#[test]
fn two_queries() {
    if !can_record() {
        return;
    }
    let Some(cluster) =
        Cluster::start("max_parallel_workers_per_gather = 2\nmax_worker_processes = 16")
    else {
        return;
    };
    cluster.sql(
        "CREATE FUNCTION counted(rows bigint) RETURNS bigint LANGUAGE plpgsql AS $$ \
         DECLARE result bigint; BEGIN \
         SELECT count(*) INTO result FROM generate_series(1, rows) n WHERE n % 7 = 3; RETURN result; END $$; \
         CREATE TABLE large AS SELECT n FROM generate_series(1, 300000) n; ANALYZE large",
    );
    let workshop = Workshop::new();
    let program = workshop.cc("two_queries.c", "two_queries", &[]);
    let _lock = MachineLock::exclusive();
    let (v4, v6) = (format!("4:{}", cluster.port), format!("6:{}", cluster.port));
    let socket = cluster.socket();
    let ways: [(&str, &str, &str, &str); 12] = [
        ("simple", &socket, "simple", "4000"),
        ("extended", &socket, "extended", "4000"),
        ("prepared", &socket, "prepared", "4000"),
        ("transaction", &v4, "transaction", "4000"),
        ("cursor", &socket, "cursor", "4000"),
        ("nested", &v6, "nested", "4000"),
        ("ping", &v4, "ping", "4000"),
        ("error", &socket, "error", "4000"),
        ("fork", &v4, "fork", "4000"),
        ("workers", &socket, "workers", "5"),
        ("ipv4", &v4, "simple", "4000"),
        ("ipv6", &v6, "prepared", "4000"),
    ];
    let mut clients = BTreeMap::new();
    // More stacks than by default: in an unoptimised world eleven clients ask often.
    let recorded = Recorded::new(9, &["--caller-stacks", "100000"], || {
        for (name, place, mode, light) in ways {
            let heavy = if mode == "workers" { "7" } else { "16000" };
            let args = [place, mode, heavy, light, "6", name];
            clients.insert(name, client(&program, &args));
        }
    });
    for (name, _, mode, _) in ways {
        let truth = clients
            .remove(name)
            .expect("started")
            .finish()
            .succeeded()
            .stdout;
        if mode == "fork" {
            let child = format!("caller_pid={}", printed(&truth, "child"));
            let of_child = recorded.folded(&["--filter", "application=fork", "--filter", &child]);
            assert!(of_child.total() > 50, "{child}");
        }
        // What stands between two statements belongs to the one before; BEGIN and COMMIT have queries of
        // their own.
        let filter = format!("application={name}");
        let stacks = recorded.folded(&["--filter", &filter]);
        let of_a_query = stacks.filtered(|stack| query(stack).is_some());
        let total = of_a_query.total() as f64;
        assert!(total >= 100.0, "{name}: {total} samples\n{stacks}");
        let wrong =
            of_a_query.filtered(|stack| caller(stack).is_some_and(|who| Some(who) != query(stack)));
        assert!(
            wrong.total() as f64 <= WRONG * total,
            "{name}: {} of {total} wrong:\n{wrong}",
            wrong.total()
        );
        // Eleven new programs at once send faster than the agent may learn them.
        recorded.share(
            name,
            0.95,
            "whole from the client's start to the server's",
            |stack| {
                query(stack).is_none()
                    || stack.has_chain(&["main", "alternate"])
                        && caller(stack).is_some()
                        && stack.has_in_order(&["alternate", "flush", "postgres", "main"])
            },
        );
        if mode == "workers" {
            // The client's clock is the leader's.
            let worker = "backend_type=parallel worker";
            let workers = recorded.folded(&["--filter", &filter, "--filter", worker]);
            assert!(
                workers.total() > 50,
                "parallel workers: {}",
                workers.total()
            );
            workers.assert_share(0.95, "a worker's caller is its leader's", |stack| {
                caller(stack).is_some() && caller(stack) == query(stack)
            });
            continue;
        }
        let (heavy, light) = (printed(&truth, "heavy_us"), printed(&truth, "light_us"));
        let truth = heavy / (heavy + light);
        let sampled = of_a_query.count(|stack| query(stack) == Some("heavy")) as f64 / total;
        let deviation = (truth * (1.0 - truth) / total).sqrt();
        assert!(
            (sampled - truth).abs() <= 4.0 * deviation + 0.02,
            "{name}: the truth is {truth:.3}, the profile says {sampled:.3} of {total}"
        );
    }
    let had_a_query = recorded.number("backend_samples") - recorded.number("starting_workers");
    assert!(
        recorded.number("with_query") >= 0.99 * had_a_query,
        "{}",
        recorded.stdout
    );
    assert_eq!(recorded.summary.lost(), 0.0, "{}", recorded.summary);
    // The clients have symbols and no debug information.
    let notes = recorded.summary.0["notes"].to_string();
    assert!(
        notes.contains("the callers in two_queries have no debug information"),
        "{notes}"
    );
    let queries = recorded.queries(&["application=simple"]);
    let heavy = queries
        .iter()
        .find(|query| {
            query["query"]
                .as_str()
                .is_some_and(|text| text.contains("AS heavy"))
        })
        .unwrap_or_else(|| panic!("{queries:#?}"));
    assert_eq!(heavy["database"], "postgres");
    assert_eq!(heavy["callers"][0]["service"], "two_queries");
    assert!(heavy["executions"].as_f64() > Some(10.0), "{heavy:#}");
    assert!(heavy["caller_share"].as_f64() >= Some(0.99), "{heavy:#}");
}

/// Requests that wait in the server together are one of several callers', never a guess.
#[test]
fn pipelined() {
    if !can_record() {
        return;
    }
    let Some(cluster) = Cluster::start("") else {
        return;
    };
    let workshop = Workshop::new();
    let program = workshop.cc("two_queries.c", "two_queries", &[]);
    let _lock = MachineLock::exclusive();
    let mut running = None;
    let recorded = Recorded::new(3, &[], || {
        let args = [&cluster.socket(), "pipelined", "16000", "4000", "2"];
        running = Some(client(&program, &args));
    });
    running.expect("started").finish().succeeded();
    let stacks = recorded.folded(&["--filter", "application=pipelined"]);
    assert!(stacks.total() > 100, "{}", stacks.total());
    let wrong = stacks.filtered(|stack| caller(stack).is_some_and(|who| Some(who) != query(stack)));
    assert!(
        wrong.total() as f64 <= WRONG * stacks.total() as f64,
        "{wrong}"
    );
    assert!(
        recorded.number("without_caller/several_sends") > 100.0,
        "{}",
        recorded.stdout
    );
}

/// With the budget spent, the samples whose caller is known are a fair sample, and the others say so.
#[test]
fn budget() {
    if !can_record() {
        return;
    }
    let Some(cluster) = Cluster::start("") else {
        return;
    };
    let workshop = Workshop::new();
    let program = workshop.cc("two_queries.c", "two_queries", &[]);
    let _lock = MachineLock::exclusive();
    let mut running = None;
    let recorded = Recorded::new(5, &["--caller-stacks", "100"], || {
        let args = [&cluster.socket(), "prepared", "3000", "1000", "4"];
        running = Some(client(&program, &args));
    });
    running.expect("started").finish().succeeded();
    let stacks = recorded.folded(&["--filter", "application=prepared"]);
    let known = stacks.filtered(|stack| caller(stack).is_some());
    let (all, some) = (stacks.total() as f64, known.total() as f64);
    assert!(some > 30.0 && some < all / 2.0, "{some} of {all}");
    let refused = recorded.number("without_caller/not_captured");
    assert!(
        (refused + some - all).abs() <= 0.02 * all,
        "{refused} + {some} of {all}"
    );
    let share = |profile: &Profile| {
        profile.count(|stack| query(stack) == Some("heavy")) as f64 / profile.total() as f64
    };
    // Samples of one execution are not independent: three times the deviation, and three times that.
    let deviation = (share(&stacks) * (1.0 - share(&stacks)) / some).sqrt();
    assert!(
        (share(&known) - share(&stacks)).abs() <= 9.0 * deviation,
        "{} of the known, {} of all",
        share(&known),
        share(&stacks)
    );
}

/// A server that restarts, backends that come and go, a statement text that the server does not publish.
#[test]
fn restart() {
    if !can_record() {
        return;
    }
    let Some(cluster) = Cluster::start("") else {
        return;
    };
    let workshop = Workshop::new();
    let program = workshop.cc("two_queries.c", "two_queries", &[]);
    let _lock = MachineLock::exclusive();
    let recorded = Recorded::new(9, &[], || {
        let socket = cluster.socket();
        let ask = |mode: &str, name: &str| {
            let args = [&socket, mode, "16000", "4000", "1", name];
            client(&program, &args).finish().succeeded();
        };
        ask("simple", "first");
        cluster.control("restart");
        ask("extended", "second");
        cluster.sql("ALTER ROLE test SET track_activities = off");
        ask("simple", "silent");
        cluster.sql("ALTER ROLE test RESET track_activities");
        ask("simple", "last");
    });
    for name in ["first", "second", "last"] {
        recorded.share(name, 0.99, "caller", |stack| {
            caller(stack).is_some() && caller(stack) == query(stack)
        });
    }
    // `debug_query_string` has the text; without a start there is no caller.
    let silent = recorded.folded(&["--filter", "state=disabled"]);
    assert!(silent.total() > 50);
    silent.assert_share(0.9, "the text", |stack| query(stack).is_some());
    silent.assert_share(1.0, "no guess", |stack| caller(stack).is_none());
}

/// No byte of a literal or a comment leaves the agent: not in a file, not in a log line, not on a page.
#[test]
fn secrets() {
    const SECRET: &str = "hunter2xyzzy";
    if !can_record() {
        return;
    }
    let Some(cluster) = Cluster::start("track_activity_query_size = 256") else {
        return;
    };
    let busy = "SELECT count(*) FROM generate_series(1, 3000000) n WHERE n % 7 = 3";
    let long = format!("{busy} AND '{}{SECRET}' <> ''", "x".repeat(160));
    let texts = [
        format!("{busy} AND '{SECRET}' <> ''"),
        format!("{busy} AND E'a\\'{SECRET}' <> ''"),
        format!("{busy} AND $tag${SECRET}$tag$ <> ''"),
        format!("/* {SECRET} /* nested {SECRET} */ */ {busy} -- {SECRET}"),
        format!("{busy} AND U&'{SECRET}' <> ''"),
        format!("SET application_name TO {SECRET}; RESET application_name; {busy}"),
        // Cut within the literal by the server itself.
        long,
        format!("{busy} AND '{}' <> '{SECRET}'", "ü".repeat(60_000)),
    ];
    let _lock = MachineLock::shared();
    let recorded = Recorded::new(6, &[], || {
        for text in &texts {
            cluster.sql(text);
        }
    });
    let mut everything = vec![
        ("stdout", recorded.stdout.clone().into_bytes()),
        ("stderr", recorded.stderr.clone().into_bytes()),
        (
            "queries",
            start({
                let mut command = agent(["queries"]);
                command.arg(recorded.path("a.pb.gz"));
                command
            })
            .finish()
            .stdout
            .into_bytes(),
        ),
    ];
    for name in ["a.folded", "a.svg"] {
        everything.push((name, fs::read(recorded.path(name)).expect("an output")));
    }
    let mut gunzip = Command::new("gzip");
    gunzip.arg("-dc").arg(recorded.path("a.pb.gz"));
    let unpacked = gunzip.output().expect("gzip").stdout;
    assert!(unpacked.len() > 1000);
    everything.push(("a.pb.gz", unpacked));
    for (name, bytes) in everything {
        let text = String::from_utf8_lossy(&bytes);
        for piece in [SECRET, &SECRET[..6], &SECRET[6..]] {
            // The password of a psql command line is in no frame; the program's name is.
            assert!(!text.contains(piece), "{piece} in {name}");
        }
    }
    let queries = recorded.queries(&[]);
    let seen = |part: &str| {
        queries.iter().any(|query| {
            query["query"]
                .as_str()
                .is_some_and(|text| text.contains(part))
        })
    };
    assert!(seen("generate_series(?, ?)"), "{queries:#?}");
}

/// The three views of one recording.
#[test]
fn views() {
    if !can_record() {
        return;
    }
    let Some(cluster) = Cluster::start("") else {
        return;
    };
    let workshop = Workshop::new();
    let program = workshop.cc("two_queries.c", "two_queries", &[]);
    let _lock = MachineLock::shared();
    let mut running = None;
    let recorded = Recorded::new(3, &[], || {
        let args = [&cluster.socket(), "simple", "16000", "4000", "2", "views"];
        running = Some(client(&program, &args));
    });
    running.expect("started").finish().succeeded();
    let filter = ["--filter", "application=views", "--view"];
    let view = |name: &'static str| recorded.folded(&[filter[0], filter[1], filter[2], name]);
    let (app, database, stitched) = (view("app"), view("database"), view("stitched"));
    let is_query =
        |frame: Option<&str>| frame.is_some_and(|frame| frame.starts_with("SELECT count(*)"));
    assert!(stitched.total() > 100);
    assert_eq!(stitched.total(), database.total());
    app.of("two_queries")
        .assert_share(0.99, "ends in the query", |stack| {
            is_query(stack.user().last()) && stack.has("alternate") && !stack.has("PostgresMain")
        });
    database
        .of("postgres")
        .assert_share(0.99, "begins with the query", |stack| {
            is_query(stack.user().next()) && !stack.has("alternate") && stack.has("PostgresMain")
        });
    stitched
        .of("two_queries")
        .assert_share(0.99, "is both", |stack| {
            stack.has_in_order(&["_start", "alternate", "postgres", "PostgresMain"])
        });
}

/// What a thread worked for: its own samples and those of the backend that it asked carry the trace, and the
/// service that the process says it is.
#[test]
fn traces() {
    if !can_record() {
        return;
    }
    let Some(cluster) = Cluster::start("") else {
        return;
    };
    let workshop = Workshop::new();
    let flags = ["-pthread", "-Wl,--export-dynamic-symbol=otel_thread_ctx_v1"];
    let program = workshop.cc("traced.c", "traced", &flags);
    let _lock = MachineLock::exclusive();
    let mut running = None;
    let recorded = Recorded::new(4, &[], || {
        running = Some(client(&program, &[&cluster.socket(), "3"]));
    });
    running.expect("started").finish().succeeded();
    let of = |filters: &[&str]| {
        let words: Vec<_> = filters
            .iter()
            .flat_map(|filter| ["--filter", filter])
            .collect();
        recorded.folded(&words)
    };
    for (trace, span, application) in [("11", "12", "eleven"), ("22", "23", "twentytwo")] {
        let trace = format!("trace_id={}", trace.repeat(16));
        let span = format!("span_id={}", span.repeat(8));
        let own = of(&["comm=traced", &trace, &span]);
        assert!(own.total() > 50, "{own}");
        own.assert_share(0.98, "the thread's own", |stack| stack.has("worker"));
        let application = format!("application={application}");
        let (all, traced) = (of(&[&application]), of(&[&application, &trace, &span]));
        assert!(all.total() > 50, "{all}");
        assert!(
            traced.total() as f64 >= 0.9 * all.total() as f64,
            "{} of {}",
            traced.total(),
            all.total()
        );
        // Without a caller there is no service.
        let service = of(&[&application, "caller=known", "service=ground-truth"]);
        assert_eq!(service.total(), of(&[&application, "caller=known"]).total());
        assert!(service.total() as f64 >= 0.9 * all.total() as f64);
    }
    // The threads' own burning, and little else of the process, has a trace.
    let queries = recorded.queries(&["application=eleven"]);
    assert_eq!(queries[0]["trace_ids"][0], "11".repeat(16));
    assert_eq!(queries[0]["callers"][0]["service"], "ground-truth");
}
