//! Clients that people use (psql, pgbench, psycopg2), a connection pooler between client and server, and
//! work that the server does in workers of its own.

use std::{
    ffi::OsStr,
    fs,
    path::Path,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::attributed::{Recorded, Recorder, client};
use crate::common::{
    Cluster, MachineLock, Profile, Running, Stack, Workshop, agent, can_record, free_port, start,
    tool, unprivileged,
};

/// The client programs, and the pooler.
const PROGRAMS: [&str; 4] = ["psql", "pgbench", "python", "pgbouncer"];

/// A running client. Its application name is unique, and its queries have a column of that name.
struct Asking {
    name: &'static str,
    /// Parts of the names of frames on its stack at the send, outer frames first. (Exported functions of a
    /// library end in tail calls to functions that are not exported, so little more than a stripped
    /// library's name is on a stack.)
    frames: &'static [&'static str],
    running: Running,
}

impl Asking {
    fn start(name: &'static str, frames: &'static [&'static str], mut command: Command) -> Asking {
        command.env("PGAPPNAME", name);
        Asking {
            name,
            frames,
            running: start(command),
        }
    }

    /// Waits until the client has ended. Returns its name, its frames and its pid.
    fn finish(self) -> (&'static str, &'static [&'static str], u32) {
        let pid = self.running.pid();
        self.running.finish().succeeded();
        (self.name, self.frames, pid)
    }
}

/// A query that takes a millisecond or two for every ten thousand rows.
fn counting(name: &str, rows: u32) -> String {
    format!("SELECT count(*) AS {name} FROM generate_series(1, {rows}) n WHERE n % 7 = 3")
}

fn pgbench(cluster: &Cluster, scripts: &Path, name: &'static str, mode: &str) -> Command {
    let query = counting(name, 10_000);
    let script = match mode {
        "pipeline" => format!("\\startpipeline\n{query};\n{query};\n{query};\n\\endpipeline\n"),
        _ => format!("{query};\n"),
    };
    let path = scripts.join(name);
    fs::write(&path, script).expect("a script");
    let (mode, transactions) = match mode {
        "pipeline" => ("extended", "50"),
        mode => (mode, "150"),
    };
    let mut command = cluster.command("pgbench");
    command
        .args(["-n", "-c", "2", "-j", "1", "-U", "test", "-M", mode])
        .args(["-t", transactions, "-h"])
        .arg(cluster.path())
        .args(["-p", &cluster.port.to_string(), "-f"])
        .arg(path)
        .arg("postgres");
    command
}

fn psql(host: impl AsRef<OsStr>, port: u16, cluster: &Cluster, sql: &str) -> Command {
    let mut command = cluster.command("psql");
    command.args(["-qAtX", "-v", "ON_ERROR_STOP=1", "-U", "test", "-h"]);
    command.arg(host);
    command.args(["-p", &port.to_string(), "postgres", "-c", sql]);
    command
}

/// A Python program with psycopg2 from PyPI, if that is installed.
fn psycopg2(cluster: &Cluster, name: &'static str) -> Option<Command> {
    let python = tool("python/bin/python")?;
    let program = format!(
        "import psycopg2\n\
         connection = psycopg2.connect(host='127.0.0.1', port={}, user='test', dbname='postgres')\n\
         cursor = connection.cursor()\n\
         for _ in range(200):\n    \
             cursor.execute('{}', (10000,))\n    \
             cursor.fetchall()\n",
        cluster.port,
        counting(name, 0)
            .replace('%', "%%")
            .replace("(1, 0)", "(1, %s)")
    );
    let mut command = Command::new(python);
    command.args(["-c", &program]);
    Some(command)
}

/// Starts a pooler for this cluster, if pgbouncer is installed. Returns it with its port.
fn pgbouncer(cluster: &Cluster, directory: &Path) -> Option<(Running, u16)> {
    let program = tool("pgbouncer/usr/sbin/pgbouncer")?;
    let port = free_port();
    let (user, _, _) = unprivileged();
    let configuration = directory.join("pgbouncer.ini");
    fs::write(
        &configuration,
        format!(
            "[databases]\npostgres = host={} port={} user=test\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {port}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\n",
            cluster.path().display(),
            cluster.port
        ),
    )
    .expect("configuration");
    let mut command = Command::new(program);
    // SAFETY: a query without side effects.
    if unsafe { libc::geteuid() } == 0 {
        command.args(["-u", user]);
    }
    command.arg(configuration);
    let mut running = start(command);
    running.wait_until("pgbouncer listens", |_| {
        std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    Some((running, port))
}

/// For the samples of each client the caller is the client's process, with the functions of its library on
/// the stack. The pooler is the caller of statements that come through it, and a note calls it a pooler.
/// Workers have the caller of the statement that they work for, or none where no client asked (autovacuum).
#[test]
fn clients() {
    if !can_record() {
        return;
    }
    let settings = "autovacuum = on\nautovacuum_naptime = 1\nmax_worker_processes = 16\n\
                    max_parallel_workers = 16\nmin_parallel_table_scan_size = 0";
    let Some(cluster) = Cluster::start(settings) else {
        return;
    };
    cluster.sql("CREATE TABLE large AS SELECT n FROM generate_series(1, 150000) n");
    let workshop = Workshop::new();
    let _lock = MachineLock::exclusive();
    let recorder = Recorder::of(&PROGRAMS, &[], &[&cluster]);
    let scripts = workshop.path();
    // Enough dead rows that an autovacuum worker starts by itself.
    cluster.sql(
        "CREATE TABLE churn AS SELECT n, repeat('x', 100) t FROM generate_series(1, 100000) n; \
         UPDATE churn SET n = n + 1",
    );
    let indexed =
        "SET max_parallel_maintenance_workers = 2; CREATE INDEX by_index ON large (md5(n::text))";
    let local = |sql: &str| psql(cluster.path(), cluster.port, &cluster, sql);
    let mut asking = vec![
        Asking::start(
            "by_psql",
            &["psql+0x", "libpq", "send"],
            local(&counting("by_psql", 3_000_000)),
        ),
        Asking::start("by_index", &["psql+0x", "libpq", "send"], local(indexed)),
    ];
    for (name, mode) in [
        ("by_simple", "simple"),
        ("by_extended", "extended"),
        ("by_prepared", "prepared"),
        ("by_pipeline", "pipeline"),
    ] {
        let command = pgbench(&cluster, scripts, name, mode);
        let frames = &["pgbench+0x", "libpq", "send"];
        asking.push(Asking::start(name, frames, command));
    }
    if let Some(command) = psycopg2(&cluster, "by_python") {
        let frames = &["_PyEval_EvalFrameDefault", "_psycopg", "libpq", "send"];
        asking.push(Asking::start("by_python", frames, command));
    }
    let pooled = pgbouncer(&cluster, scripts).map(|(pooler, port)| {
        let query = counting("pooled", 3_000_000);
        let command = psql("127.0.0.1", port, &cluster, &query);
        Asking::start("pooled", &[], command).finish();
        pooler.pid()
    });
    let asked: Vec<_> = asking.into_iter().map(Asking::finish).collect();
    wait_for_autovacuum(&cluster);
    let recorded = recorder.finish();
    for (name, frames, pid) in asked {
        check_client(&recorded, name, frames, pid);
    }
    check_index(&recorded);
    check_autovacuum(&recorded);
    if let Some(pid) = pooled {
        check_pooler(&recorded, pid);
    }
}

/// A statement so short that many samples are taken while the backend changes its status is still one
/// query.
#[test]
fn short_statements() {
    if !can_record() {
        return;
    }
    let Some(cluster) = Cluster::start("compute_query_id = on") else {
        return;
    };
    let _lock = MachineLock::exclusive();
    let recorder = Recorder::of(&PROGRAMS, &[], &[&cluster]);
    let workshop = Workshop::new();
    let script = workshop.path().join("short");
    fs::write(&script, "SELECT 1 AS short;\n").expect("a script");
    let mut command = cluster.command("pgbench");
    command.args([
        "-n", "-c", "2", "-t", "120000", "-M", "prepared", "-U", "test", "-h",
    ]);
    command.arg(cluster.path()).arg("-f").arg(script);
    command.args(["-p", &cluster.port.to_string(), "postgres"]);
    start(command).finish().succeeded();
    // Samples taken during a change of the status have no application name either, hence no filter.
    let queries = recorder.finish().queries(&[]);
    let is_ours = |query: &&Value| {
        let text = query["query"].as_str();
        text.is_some_and(|text| text.contains("AS short"))
    };
    let ours: Vec<_> = queries.iter().filter(is_ours).collect();
    let [query] = &ours[..] else {
        panic!("{queries:#?}");
    };
    assert!(query["samples"].as_u64() > Some(1000), "{query:#}");
    let id = query["query_id"].as_str().expect("an id");
    assert!(id.parse::<i64>().is_ok(), "{id}");
}

/// A client that sends from just-in-time compiled code. If that code keeps frame pointers, the caller is
/// known. If not, the part of the stack that was found stands above the query, under a frame that says that
/// the rest is missing.
#[test]
fn partial_callers() {
    if !can_record() {
        return;
    }
    let Some(cluster) = Cluster::start("") else {
        return;
    };
    let workshop = Workshop::new();
    let program = workshop.cc("jit_client.c", "jit_client", &[]);
    let _lock = MachineLock::exclusive();
    let recorder = Recorder::of(&["jit_client"], &[], &[&cluster]);
    let place = cluster.socket();
    for mode in ["kept", "lost"] {
        let query = counting(&format!("by_{mode}"), 50_000);
        let asking = client(&program, &[&place, mode, "120", &query, mode]);
        asking.finish().succeeded();
    }
    let recorded = recorder.finish();
    let missing = "[caller's stack incomplete: guessed_end]";
    let is_query = |stack: &Stack| stack.frames.iter().any(|f| f.contains("AS by_"));
    let of = |labels: &[&str]| recorded.of(labels).filtered(is_query);
    let kept = of(&["application=kept"]);
    assert!(kept.total() > 50, "{kept}");
    kept.assert_share(0.99, "kept: the whole stack", |stack| {
        stack.has_in_order(&["main", "ask"]) && has_in_order(stack, &["ask", "[jit]", "flush"])
    });
    let lost = of(&["application=lost"]);
    let total = lost.total() as f64;
    assert!(total > 50.0, "{lost}");
    lost.assert_share(0.99, "lost: a part of the stack", |stack| {
        stack.frames[0] == missing && has_in_order(stack, &["[jit]", "flush"]) && !stack.has("ask")
    });
    let labels = [
        "application=lost",
        "caller=partial",
        "caller_outcome=guessed_end",
    ];
    let partial = of(&labels).total();
    assert!(partial as f64 >= 0.99 * total, "{lost}");
    assert_eq!(of(&["application=lost", "caller=known"]).total(), 0);
    assert!(recorded.number("with_partial_caller") >= partial as f64);
    let with_query = recorded.number("with_query");
    assert!(recorded.number("with_caller") <= with_query - partial as f64);
    check_partial_query(&recorded);
}

/// The table of queries names the function that was found, and marks the stack as incomplete.
fn check_partial_query(recorded: &Recorded) {
    let queries = recorded.queries(&["application=lost"]);
    let is_ours = |query: &&Value| {
        let text = query["query"].as_str();
        text.is_some_and(|text| text.contains("AS by_lost"))
    };
    let query = queries.iter().find(is_ours);
    let query = query.unwrap_or_else(|| panic!("{queries:#?}"));
    assert_eq!(query["caller_share"], 0.0, "{query:#}");
    assert!(query["caller_partial_share"].as_f64() >= Some(0.99));
    assert_eq!(query["callers"][0]["service"], "jit_client");
    assert_eq!(query["callers"][0]["function"], "flush");
    assert_eq!(query["callers"][0]["partial"], true);
    let mut command = agent(["queries"]);
    command.arg(recorded.path("a.pb.gz"));
    let table = start(command).finish().succeeded().stdout;
    let marked = |line: &str| line.contains("flush") && line.ends_with("(stack incomplete)");
    assert!(table.lines().any(marked), "{table}");
}

fn wait_for_autovacuum(cluster: &Cluster) {
    let start = Instant::now();
    let sql = "SELECT last_autovacuum IS NOT NULL FROM pg_stat_user_tables WHERE relname = 'churn'";
    while cluster.sql(sql) != "t" {
        assert!(start.elapsed() < Duration::from_secs(120), "no autovacuum");
        thread::sleep(Duration::from_millis(200));
    }
}

/// Whether the stack contains frames with these parts of names in this order. Other frames may be between
/// them.
fn has_in_order(stack: &Stack, parts: &[&str]) -> bool {
    let mut user = stack.user();
    parts
        .iter()
        .all(|part| user.any(|frame| frame.contains(part)))
}

fn check_client(recorded: &Recorded, name: &str, frames: &[&str], pid: u32) {
    let application = format!("application={name}");
    // Statements that a session runs at its start (SET, SHOW) are queries of their own, and not meant.
    let is_query = |frame: &String| frame.contains(name);
    let all = recorded.of(&[&application]);
    let of_query = all.filtered(|stack| stack.frames.iter().any(is_query));
    assert!(of_query.total() > 50, "{name}: {all}");
    of_query.assert_share(0.99, &format!("{name}: the stack at the send"), |stack| {
        has_in_order(stack, frames)
    });
    let by = recorded.of(&[&application, &format!("caller_pid={pid}")]);
    let by_client = by.count(|stack| stack.frames.iter().any(is_query));
    assert!(
        by_client as f64 >= 0.99 * of_query.total() as f64,
        "{name}: {by_client} of {} by its process",
        of_query.total()
    );
}

fn check_index(recorded: &Recorded) {
    let workers = recorded.of(&["application=by_index", "backend_type=parallel worker"]);
    assert!(workers.total() > 50, "{}", workers.total());
    workers.assert_share(0.99, "a worker of CREATE INDEX", |stack| {
        has_in_order(stack, &["psql+0x", "send", "CREATE INDEX", "postgres"])
    });
}

fn check_autovacuum(recorded: &Recorded) {
    let of_table = |frame: &String| frame.contains("autovacuum:") && frame.contains("churn");
    let worker = recorded.of(&["backend_type=autovacuum worker"]);
    let at_work = worker.filtered(|stack| stack.frames.iter().any(of_table));
    assert!(at_work.total() > 10, "{worker}");
    // No client asked: the server's own stack follows the query directly, and no caller is reported as
    // missing.
    at_work.assert_share(1.0, "no caller", |stack| of_table(&stack.frames[0]));
    assert_eq!(
        recorded
            .of(&["backend_type=autovacuum worker", "caller=no_send_seen"])
            .total(),
        0
    );
}

fn check_pooler(recorded: &Recorded, pid: u32) {
    let (pooled, pooler) = ("application=pooled", format!("caller_pid={pid}"));
    let (all, by) = (recorded.of(&[pooled]), recorded.of(&[pooled, &pooler]));
    let is_query = |frame: &String| frame.contains("SELECT count(*) AS");
    let asked = |stacks: &Profile| stacks.count(|stack| stack.frames.iter().any(is_query));
    assert!(asked(&all) > 50, "{all}");
    assert!(asked(&by) as f64 >= 0.99 * asked(&all) as f64, "{all}");
    let queries = recorded.queries(&[pooled]);
    let query = queries
        .iter()
        .find(|query| {
            query["query"]
                .as_str()
                .is_some_and(|text| text.contains("AS pooled"))
        })
        .unwrap_or_else(|| panic!("{queries:#?}"));
    assert_eq!(query["callers"][0]["service"], "pgbouncer");
    assert_eq!(query["callers"][0]["pooler"], true);
    let notes = recorded.summary.0["notes"].to_string();
    assert!(
        notes.contains("pgbouncer is a connection pooler"),
        "{notes}"
    );
}
