//! Which query and which function a backend's CPU time was for: a client whose queries and callers are
//! known, on a real server.

use std::{fs, path::Path, process::Command};

use crate::attributed::{Recorded, Recorder, WRONG, assert_split, caller, client, printed, query};
use crate::common::{
    Cluster, Finished, MachineLock, Profile, Running, Workshop, agent, can_record, start,
};

/// When a client ends: after this many milliseconds of its backend's CPU time, so that the number of
/// samples does not depend on how busy the machine is.
const UNTIL: &str = "cpu:400";

/// One run of the client `two_queries`: how it connects, how it sends its statements, and how large they
/// are.
struct Way {
    name: &'static str,
    place: Place,
    mode: &'static str,
    heavy: &'static str,
    light: &'static str,
}

#[derive(Clone, Copy)]
enum Place {
    Unix,
    V4,
    V6,
}

/// Every mode of the client, and each kind of socket.
fn ways() -> Vec<Way> {
    use Place::{Unix, V4, V6};
    let way = |(name, place, mode, heavy, light)| Way {
        name,
        place,
        mode,
        heavy,
        light,
    };
    [
        ("simple", Unix, "simple", "16000", "4000"),
        ("extended", Unix, "extended", "16000", "4000"),
        ("prepared", Unix, "prepared", "16000", "4000"),
        ("transaction", V4, "transaction", "16000", "4000"),
        ("cursor", Unix, "cursor", "16000", "4000"),
        ("nested", V6, "nested", "16000", "4000"),
        ("ping", V4, "ping", "16000", "4000"),
        ("error", Unix, "error", "16000", "4000"),
        ("fork", V4, "fork", "16000", "4000"),
        // Here the numbers are divisors in the condition on `large`, not numbers of rows.
        ("workers", Unix, "workers", "7", "5"),
        ("jit", Unix, "jit", "64000", "4000"),
        ("copy in", V4, "copy_in", "16000", "4000"),
        ("copy out", V6, "copy_out", "4000", "1000"),
        ("cancel", V4, "cancel", "8000", "2000"),
        ("reconnect", Unix, "reconnect", "16000", "4000"),
        ("reconnect 4", V4, "reconnect", "16000", "4000"),
        ("ipv4", V4, "simple", "16000", "4000"),
        ("ipv6", V6, "prepared", "16000", "4000"),
    ]
    .map(way)
    .into()
}

impl Way {
    fn start(&self, program: &Path, cluster: &Cluster) -> Running {
        let place = match self.place {
            Place::Unix => cluster.socket(),
            Place::V4 => format!("4:{}", cluster.port),
            Place::V6 => format!("6:{}", cluster.port),
        };
        let args = [&place, self.mode, self.heavy, self.light, UNTIL, self.name];
        client(program, &args)
    }

    fn check(&self, recorded: &Recorded, truth: &Finished) {
        let filter = format!("application={}", self.name);
        if self.mode == "fork" {
            let child = format!("caller_pid={}", printed(&truth.stdout, "child"));
            let of_child = recorded.of(&[&filter, &child]);
            assert!(of_child.total() > 50, "{child}");
        }
        // Samples between two statements belong to the statement before. BEGIN and COMMIT have queries of
        // their own, so they have no `query` here. Code that the server compiled at run time (JIT) has no
        // unwind tables, so its stacks may end there.
        let is_jit = self.mode == "jit";
        recorded.share(&filter, 0.99, "the caller, and both stacks", |stack| {
            query(stack).is_none()
                || stack.has_chain(&["main", "alternate"])
                    && caller(stack).is_some()
                    && stack.has_in_order(&["alternate", "flush", "postgres"])
                    && (is_jit || stack.has_in_order(&["flush", "postgres", "main"]))
        });
        if self.mode != "reconnect" {
            // A backend that starts or ends runs no statement.
            let (all, silent) = (
                recorded.of(&[&filter]),
                recorded.of(&[&filter, "phase=no statement"]),
            );
            let (all, silent) = (all.total() as f64, silent.total() as f64);
            assert!(silent <= 0.01 * all, "{filter}: {silent} of {all}");
        }
        if self.mode == "workers" {
            // The client measured only the leader's CPU time, so the split cannot be compared.
            let workers = recorded.of(&[&filter, "backend_type=parallel worker"]);
            let total = workers.total();
            assert!(total > 50, "parallel workers: {total}");
            workers.assert_share(0.99, "a worker's caller is its leader's", |stack| {
                caller(stack).is_some() && caller(stack) == query(stack)
            });
            return;
        }
        assert_split(self.name, &recorded.of(&[&filter]), &truth.stdout);
    }
}

/// In every mode a client alternates between two functions with a query each, which takes a millisecond or
/// less. No sample of a query has the other query's caller, and the split of CPU time between the two is
/// the true one.
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
         CREATE TABLE c_heavy (n bigint); CREATE TABLE c_light (n bigint); \
         CREATE TABLE large AS SELECT n FROM generate_series(1, 300000) n; ANALYZE large",
    );
    let workshop = Workshop::new();
    let program = workshop.cc("two_queries.c", "two_queries", &[]);
    let _lock = MachineLock::exclusive();
    // A larger budget of callers' stacks than the default, because many clients send often.
    let mut recorder = Recorder::of(
        &["two_queries"],
        &["--caller-stacks", "100000"],
        &[&cluster],
    );
    recorder.learn(&program, &[&cluster.socket(), "simple", "100", "100", "60"]);
    let ways = ways();
    let recorded = ask_and_check(&ways, &program, &cluster, recorder);
    assert_eq!(recorded.summary.lost(), 0.0, "{}", recorded.summary);
    the_table_of_queries(&recorded);
}

/// A few of the modes again with the program attached to every system call, as on kernels that have no
/// better place.
#[test]
fn at_system_calls() {
    if !can_record() {
        return;
    }
    let Some(cluster) = Cluster::start("") else {
        return;
    };
    let workshop = Workshop::new();
    let program = workshop.cc("two_queries.c", "two_queries", &[]);
    let _lock = MachineLock::exclusive();
    let args = ["--callers-at", "system-calls"];
    let mut recorder = Recorder::of(&["two_queries"], &args, &[&cluster]);
    recorder.learn(&program, &[&cluster.socket(), "simple", "100", "100", "60"]);
    let mut ways = ways();
    ways.retain(|way| ["simple", "extended", "ping", "ipv6"].contains(&way.name));
    ask_and_check(&ways, &program, &cluster, recorder);
}

/// Runs all clients at the same time, then checks the recording for each of them.
fn ask_and_check(ways: &[Way], program: &Path, cluster: &Cluster, recorder: Recorder) -> Recorded {
    let start = |way: &Way| way.start(program, cluster);
    let clients: Vec<_> = ways.iter().map(start).collect();
    let finish = |client: Running| client.finish().succeeded();
    let truths: Vec<_> = clients.into_iter().map(finish).collect();
    let recorded = recorder.finish();
    for (way, truth) in ways.iter().zip(&truths) {
        way.check(&recorded, truth);
    }
    recorded
}

fn the_table_of_queries(recorded: &Recorded) {
    // The clients have symbols but no debug information.
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
    // The innermost function of the program itself: without line numbers nothing says which of its
    // functions is the caller.
    assert_eq!(heavy["callers"][0]["function"], "flush");
    assert!(heavy["executions"].as_f64() > Some(10.0), "{heavy:#}");
    assert!(heavy["caller_share"].as_f64() >= Some(0.99), "{heavy:#}");
}

/// Pipelined requests that are in the server at the same time are attributed to "several senders", never to
/// a guess.
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
    let recorder = Recorder::start(&[], &[&cluster]);
    let args = [&cluster.socket(), "pipelined", "16000", "4000", "cpu:400"];
    client(&program, &args).finish().succeeded();
    let recorded = recorder.finish();
    let stacks = recorded.of(&["application=pipelined"]);
    assert!(stacks.total() > 100, "{}", stacks.total());
    let wrong = stacks.filtered(|stack| caller(stack).is_some_and(|who| Some(who) != query(stack)));
    assert!(
        wrong.total() as f64 <= WRONG * stacks.total() as f64,
        "{wrong}"
    );
    let several = recorded.of(&["application=pipelined", "caller=several_sends"]);
    assert!(several.total() > 100, "{}", recorded.stdout);
}

/// When the budget of callers' stacks is used up, the samples whose caller is known are a representative
/// part, and the others say why they have none.
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
    let recorder = Recorder::start(&["--caller-stacks", "150"], &[&cluster]);
    let args = [&cluster.socket(), "prepared", "3000", "1000", "cpu:3000"];
    client(&program, &args).finish().succeeded();
    let recorded = recorder.finish();
    let stacks = recorded.of(&["application=prepared"]);
    let known = stacks.filtered(|stack| caller(stack).is_some());
    let (all, some) = (stacks.total() as f64, known.total() as f64);
    assert!(some > 30.0 && some < all / 2.0, "{some} of {all}");
    let refused = recorded.of(&["application=prepared", "caller=not_captured"]);
    let refused = refused.total() as f64;
    assert!(refused + some >= 0.98 * all, "{refused} + {some} of {all}");
    let share = |profile: &Profile| {
        profile.count(|stack| query(stack) == Some("heavy")) as f64 / profile.total() as f64
    };
    // The samples of one execution are not independent, hence three times the deviation, and three times
    // that as the bound.
    let deviation = (share(&stacks) * (1.0 - share(&stacks)) / some).sqrt();
    assert!(
        (share(&known) - share(&stacks)).abs() <= 9.0 * deviation,
        "{} of the known, {} of all",
        share(&known),
        share(&stacks)
    );
}

/// Attribution survives a restart of the server and backends that come and go. Where the server does not
/// publish the text of statements, there is no guess.
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
    let mut recorder = Recorder::of(&["two_queries"], &[], &[&cluster]);
    let socket = cluster.socket();
    recorder.learn(&program, &[&socket, "simple", "100", "100", "60"]);
    let ask = |mode: &str, name: &str| {
        let args = [&socket, mode, "16000", "4000", UNTIL, name];
        client(&program, &args).finish().succeeded();
    };
    ask("simple", "first");
    cluster.control("restart");
    recorder.wait_for_tables(cluster.postmaster());
    ask("extended", "second");
    cluster.sql("ALTER ROLE test SET track_activities = off");
    ask("simple", "silent");
    cluster.sql("ALTER ROLE test RESET track_activities");
    ask("simple", "last");
    let recorded = recorder.finish();
    for name in ["first", "second", "last"] {
        recorded.share(&format!("application={name}"), 0.99, "caller", |stack| {
            caller(stack).is_some() && caller(stack) == query(stack)
        });
    }
    // `debug_query_string` still holds the text while a statement runs. Without the start time of the
    // statement no caller can be found.
    recorded.share("state=disabled", 0.9, "the text of the query", |stack| {
        query(stack).is_some()
    });
    recorded.share("state=disabled", 1.0, "no guessed caller", |stack| {
        caller(stack).is_none()
    });
    let asked = |filters: &[&str]| recorded.of(filters).count(|stack| query(stack).is_some());
    assert_eq!(
        asked(&["state=disabled", "caller=state_unreadable"]),
        asked(&["state=disabled"])
    );
}

/// No byte of a literal or a comment is in any output of the agent: not in a file, in a log line or in a
/// picture.
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
        // (Not `application_name`, which is a label and appears as it is, if a sample is taken while it is
        // set.)
        format!("SET search_path TO {SECRET}; RESET search_path; {busy}"),
        // The server truncates this text within the literal.
        long,
        format!("{busy} AND '{}' <> '{SECRET}'", "ü".repeat(60_000)),
    ];
    let _lock = MachineLock::shared();
    let recorder = Recorder::start(&[], &[&cluster]);
    for text in &texts {
        cluster.sql(text);
    }
    let recorded = recorder.finish();
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
            // Command lines are not recorded, so the secret on psql's command line cannot appear here; only
            // the program's name can.
            if let Some(at) = text.find(piece) {
                let around = &text.as_bytes()[at.saturating_sub(200)..at];
                panic!("{piece} in {name}: {}", String::from_utf8_lossy(around));
            }
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

/// The three views of one recording: application, database, and both joined.
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
    let mut recorder = Recorder::of(&["two_queries"], &[], &[&cluster]);
    let socket = cluster.socket();
    recorder.learn(&program, &[&socket, "simple", "100", "100", "60"]);
    let args = [&socket, "simple", "16000", "4000", UNTIL, "views"];
    client(&program, &args).finish().succeeded();
    let recorded = recorder.finish();
    let view = |name| recorded.folded(&["application=views"], &["--view", name]);
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
        .assert_share(0.99, "contains both stacks", |stack| {
            stack.has_in_order(&["_start", "alternate", "postgres", "PostgresMain"])
        });
}

/// Samples of a thread and of the backend that runs its statements carry the trace id of the thread's work,
/// and the service name that the process publishes.
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
    let mut recorder = Recorder::of(&["traced"], &[], &[&cluster]);
    let socket = cluster.socket();
    recorder.learn(&program, &[&socket, "60", "learnt"]);
    let running = client(&program, &[&socket, "3"]);
    let pid = format!("pid={}", running.pid());
    running.finish().succeeded();
    let recorded = recorder.finish();
    let of = |filters: &[&str]| recorded.of(filters);
    for (trace, span, application) in [("11", "12", "eleven"), ("22", "23", "twentytwo")] {
        let trace = format!("trace_id={}", trace.repeat(16));
        let span = format!("span_id={}", span.repeat(8));
        let own = of(&[&pid, &trace, &span]);
        assert!(own.total() > 50, "{own}");
        own.assert_share(0.99, "the thread's own", |stack| stack.has("worker"));
        let application = format!("application={application}");
        let (all, traced) = (of(&[&application]), of(&[&application, &trace, &span]));
        assert!(all.total() > 50, "{all}");
        // A backend that starts or ends runs no statement.
        let all = all.filtered(|stack| stack.frames.iter().any(|frame| frame.contains("SELECT")));
        assert!(
            traced.total() as f64 >= 0.99 * all.total() as f64,
            "{} of {}",
            traced.total(),
            all.total()
        );
        // The service belongs to the caller, so samples without a caller have none.
        let service = of(&[&application, "caller=known", "service=ground-truth"]);
        assert_eq!(service.total(), of(&[&application, "caller=known"]).total());
        assert!(service.total() as f64 >= 0.99 * all.total() as f64);
    }
    // The table of queries has the same trace and service.
    let queries = recorded.queries(&["application=eleven"]);
    assert_eq!(queries[0]["trace_ids"][0], "11".repeat(16));
    assert_eq!(queries[0]["callers"][0]["service"], "ground-truth");
}

/// A program that exports a server's symbols and names a port of another process must not make that port's
/// clients be traced: a port counts only if the server itself listens on it. A true server beside it is
/// accepted.
#[test]
fn a_false_server_is_not_believed() {
    if !can_record() {
        return;
    }
    let Some(cluster) = Cluster::start("") else {
        return;
    };
    let workshop = Workshop::new();
    let program = workshop.cc("false_server.c", "false_server", &["-rdynamic"]);
    let _lock = MachineLock::shared();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port of somebody else");
    let port = listener.local_addr().expect("its address").port();
    let mut command = Command::new(&program);
    command.arg(port.to_string()).current_dir(workshop.path());
    let mut server = start(command);
    server.wait_until("it is ready", |server| server.stdout().contains("ready"));
    let mut command = agent(["record", "--summary", "json", "--output"]);
    command.arg(workshop.path().join("a.folded"));
    command.args(["--pid", &server.pid().to_string()]);
    command.env("RUST_LOG", "debug");
    let mut recording = start(command);
    let found = format!("pid {} runs what looks like PostgreSQL", server.pid());
    recording.wait_until("it looks like a server", |agent| {
        agent.stderr().contains(&found)
    });
    let believed = format!("pid {}, port {}", cluster.postmaster(), cluster.port);
    recording.wait_until("the true server is accepted", |agent| {
        agent.stderr().contains(&believed)
    });
    // Meanwhile the agent looks at the false server ten times a second.
    server.wait_for_cpu(1000);
    recording.signal(libc::SIGINT);
    let finished = recording.finish().succeeded();
    assert!(
        !finished.stderr.contains(&format!("port {port}")),
        "{}",
        finished.stderr
    );
}
