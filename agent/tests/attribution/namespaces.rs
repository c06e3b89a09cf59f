//! Two servers with the same addresses, ports, paths and process ids. Each is in namespaces of its own, as
//! in a container.

use std::path::Path;

use crate::attributed::{Recorded, Recorder, WRONG, assert_split, caller, printed, query};
use crate::common::{
    Cluster, MachineLock, Namespace, Running, Workshop, can_record, cluster_directory, start,
};

/// Both servers and their clients use these ports.
const SERVER_PORT: u16 = 5432;
const CLIENT_PORT: u16 = 40_001;

/// A client of one of the servers, in the same namespaces.
struct Client {
    /// The name of its program, which is also in its application name.
    name: &'static str,
    mode: &'static str,
    running: Running,
}

impl Client {
    fn start(cluster: &Cluster, program: &Path, name: &'static str, mode: &'static str) -> Client {
        let place = match mode {
            "simple" => format!("4:{SERVER_PORT}:{CLIENT_PORT}"),
            _ => cluster.socket(),
        };
        let (heavy, light) = match mode {
            // Here the numbers are divisors in the condition on `large`, not numbers of rows.
            "workers" => ("7", "5"),
            _ => ("16000", "4000"),
        };
        let mut command = cluster.beside(program);
        command.args([&place, mode, heavy, light, "cpu:400"]);
        command.arg(format!("{name} {mode}"));
        Client {
            name,
            mode,
            running: start(command),
        }
    }

    /// Waits until the client has ended. Returns its name, its mode and what it printed.
    fn finish(self) -> (&'static str, &'static str, String) {
        let stdout = self.running.finish().succeeded().stdout;
        (self.name, self.mode, stdout)
    }
}

/// No statement of one server has a caller in the other server's namespaces, although connections, sockets,
/// processes and statements have the same names. A new backend that has the pid of an ended one does not
/// inherit its caller.
#[test]
fn twins() {
    // SAFETY: a query without side effects.
    if !can_record() || unsafe { libc::geteuid() } != 0 {
        return;
    }
    let directory = cluster_directory();
    let settings = "max_parallel_workers_per_gather = 2\nmax_worker_processes = 16";
    let cluster = || {
        let namespace = Namespace::new(directory.path());
        Cluster::start_in(namespace, directory.path(), SERVER_PORT, settings)
    };
    let (Some(first), Some(second)) = (cluster(), cluster()) else {
        return;
    };
    for cluster in [&first, &second] {
        cluster
            .sql("CREATE TABLE large AS SELECT n FROM generate_series(1, 300000) n; ANALYZE large");
    }
    let workshop = Workshop::new();
    let programs = ["first", "second"].map(|name| workshop.cc("two_queries.c", name, &[]));
    let _lock = MachineLock::exclusive();
    let recorder = Recorder::of(&["first", "second"], &[], &[&first, &second]);
    let clients = [
        Client::start(&first, &programs[0], "first", "simple"),
        Client::start(&second, &programs[1], "second", "simple"),
        Client::start(&first, &programs[0], "first", "reuse"),
        Client::start(&second, &programs[1], "second", "workers"),
    ];
    let truths = clients.map(Client::finish);
    let recorded = recorder.finish();
    for (name, mode, truth) in &truths {
        check(&recorded, name, mode, truth);
    }
}

fn check(recorded: &Recorded, name: &str, mode: &str, truth: &str) {
    let application = format!("application={name} {mode}");
    let all = recorded.of(&[&application]);
    let asked = all.filtered(|stack| query(stack).is_some());
    asked.assert_share(
        0.99,
        &format!("{application}: the caller in the same namespaces"),
        |stack| {
            stack.comm == name && stack.has_in_order(&["alternate", "flush", "postgres", "main"])
        },
    );
    let other = asked.count(|stack| caller(stack).is_some() && stack.comm != name);
    assert!(
        other as f64 <= WRONG * asked.total() as f64,
        "{application}: {other}"
    );
    match mode {
        "workers" => {
            let workers = recorded.of(&[&application, "backend_type=parallel worker"]);
            assert!(workers.total() > 50, "{}", workers.total());
        }
        _ => assert_split(&application, &all, truth),
    }
    if mode == "reuse" {
        let reused = printed(truth, "reused");
        assert!(reused > 10.0, "{truth}");
    }
}
