//! What goes wrong in a shop, on purpose and otherwise, and how it comes back.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;
#[path = "common/shop.rs"]
mod shop;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Answer, Watched, eventually, get, processes_with, scratch, send};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use shop::{SERVICES, Shop, post, service, start, start_demo, until};
use sqlx::{Connection, Executor, PgConnection};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Keeps every statement on `products` waiting until it is dropped or rolled back.
struct Blocked(PgConnection);

impl Blocked {
    async fn new(url: &str) -> Self {
        let mut connection = PgConnection::connect(url).await.unwrap();
        for statement in ["BEGIN", "LOCK TABLE products IN ACCESS EXCLUSIVE MODE"] {
            connection.execute(statement).await.unwrap();
        }
        Self(connection)
    }

    async fn release(mut self) {
        self.0.execute("ROLLBACK").await.unwrap();
    }
}

/// Sends requests that are under way together.
fn together(uri: &str, count: usize) -> Vec<JoinHandle<Answer>> {
    let one = || {
        let uri = uri.to_owned();
        tokio::spawn(async move { get(&uri).await })
    };
    (0..count).map(|_| one()).collect()
}

/// Backends of the service in this database that do something.
async fn at_work(connection: &mut PgConnection, service: &str) -> i64 {
    sqlx::query_scalar(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 \
         AND datname = current_database() AND state <> 'idle'",
    )
    .bind(service)
    .fetch_one(connection)
    .await
    .unwrap()
}

/// Waits until so many backends of the service do something.
async fn until_at_work(connection: &mut PgConnection, service: &str, count: i64) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while at_work(connection, service).await < count {
        assert!(
            Instant::now() < deadline,
            "fewer than {count} of the {service} work"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A simulated delay is slept in the database, by what reads, and is told to everybody.
#[tokio::test]
async fn slow_queries_sleep_in_the_database() {
    let url = common::database().await;
    let service = start_demo("order", &url).await;
    let at = |path: &str| format!("{}{path}", service.announced);
    let history = at("/orders/history?customer_id=1");
    for body in [json!({"delay_ms": 0}), json!({"delay_ms": 10_001})] {
        let answer = post(&at("/demo/enable-slow-queries"), &body).await;
        assert_eq!(answer.problem(400), "delay_out_of_range");
    }
    for body in [
        json!({}),
        json!({"delay_ms": "x"}),
        json!({"delay_ms": 5, "x": 1}),
    ] {
        let answer = post(&at("/demo/enable-slow-queries"), &body).await;
        assert_eq!(answer.problem(400), "bad_body");
    }
    let plain = get(&history).await.json();

    let enabled = post(&at("/demo/enable-slow-queries"), &json!({"delay_ms": 1500})).await;
    assert_eq!(enabled.json()["simulation"]["slow_queries_ms"], 1500);
    let health = get(&at("/health")).await.json();
    assert_eq!(health["simulation"]["slow_queries_ms"], 1500);
    let start = Instant::now();
    let slow = tokio::spawn({
        let history = history.clone();
        async move { get(&history).await.json() }
    });
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' \
         AND application_name = 'order-service' AND datname = current_database() \
         AND query LIKE '%simulated_slow_query%'";
    let deadline = Instant::now() + Duration::from_secs(10);
    while sqlx::query_scalar::<_, i64>(asleep)
        .fetch_one(&mut connection)
        .await
        .unwrap()
        == 0
    {
        assert!(
            Instant::now() < deadline && !slow.is_finished(),
            "nobody sleeps"
        );
    }
    assert_eq!(slow.await.unwrap(), plain);
    assert!(
        start.elapsed() >= Duration::from_millis(1500),
        "{:?}",
        start.elapsed()
    );

    // Longer than a statement may take: a real timeout.
    post(&at("/demo/enable-slow-queries"), &json!({"delay_ms": 5000})).await;
    assert_eq!(get(&history).await.problem(503), "statement_timeout");
    let health = get(&at("/health")).await.json();
    assert_eq!(health["queries"]["failed"]["statement_timeout"], 1);
    assert!(
        health["latency"]["p95_ms"].as_f64() >= Some(3200.0),
        "{health}"
    );

    let reset = post(&at("/demo/reset"), &json!({})).await.json();
    assert_eq!(reset["simulation"]["slow_queries_ms"], Value::Null);
    assert_eq!(get(&history).await.json(), plain);
}

/// A simulated exhaustion works with the connections that it holds, and ends by itself.
#[tokio::test]
async fn held_connections_work() {
    let url = common::database().await;
    let service = start_demo("inventory", &url).await;
    let at = |path: &str| format!("{}{path}", service.announced);
    for (body, code) in [
        (json!({"hold_seconds": 0}), "hold_out_of_range"),
        (json!({"hold_seconds": 121}), "hold_out_of_range"),
        (json!({"hold_seconds": true}), "bad_body"),
    ] {
        let answer = post(&at("/demo/enable-pool-exhaustion"), &body).await;
        assert_eq!(answer.problem(400), code, "{body}");
    }
    let enabled = post(
        &at("/demo/enable-pool-exhaustion"),
        &json!({"hold_seconds": 3}),
    )
    .await;
    assert_eq!(enabled.json()["simulation"]["pool_exhaustion"], true);
    let is_full = |health: &Value| health["simulation"]["connections_held"] == 14;
    let health = until(&at("/health"), "fourteen are held", is_full).await;
    assert!(health["pool"]["active"].as_u64() >= Some(14), "{health}");
    let done = |health: &Value| health["queries"]["completed"].as_u64().unwrap();
    let before = done(&health);
    until(&at("/health"), "they work", |health| {
        done(health) > before + 14
    })
    .await;
    let traces = get(&at("/debug/traces?limit=500")).await.json();
    let mut traces = traces.as_array().unwrap().iter();
    assert!(traces.any(|trace| trace["root"] == "simulated pool exhaustion"));
    // One is left for a visitor.
    assert_eq!(get(&at("/inventory/check/1")).await.status, 200);
    let is_over = |health: &Value| {
        health["simulation"]["pool_exhaustion"] == false
            && health["simulation"]["connections_held"] == 0
            && health["pool"]["active"] == 0
    };
    let health = until(&at("/health"), "it ends", is_over).await;
    assert_eq!(health["queries"]["active"], 0, "{health}");
}

/// With connections held, visitors wait in vain, are told so, and a reset lets all of them go.
#[tokio::test]
async fn an_exhausted_pool_refuses_and_is_reset() {
    let url = common::database().await;
    let service = start_demo("product", &url).await;
    let at = |path: &str| format!("{}{path}", service.announced);
    let blocked = Blocked::new(&url).await;
    // By no body at all: the default.
    let enabled = send("POST", &at("/demo/enable-pool-exhaustion"))
        .await
        .unwrap();
    assert_eq!(enabled.status, 200);
    let is_full = |health: &Value| health["simulation"]["connections_held"] == 14;
    until(&at("/health"), "fourteen are held", is_full).await;
    let start = Instant::now();
    let waiting = together(&at("/products/search?q=zither"), 3);
    let mut codes = BTreeMap::new();
    for answer in waiting {
        *codes.entry(answer.await.unwrap().problem(503)).or_insert(0) += 1;
    }
    // One had the last connection and ran into its timeout. The others waited for that one: 3 s
    // in vain, as a rule, and on a busy machine one of them may get it just then.
    assert!(codes["pool_exhausted"] >= 1, "{codes:?}");
    assert!(codes["statement_timeout"] >= 1, "{codes:?}");
    assert_eq!(codes.values().sum::<i32>(), 3, "{codes:?}");
    assert!(
        start.elapsed() >= Duration::from_secs(3),
        "{:?}",
        start.elapsed()
    );
    let health = get(&at("/health")).await.json();
    assert!(
        health["queries"]["failed"]["pool_exhausted"].as_u64() >= Some(1),
        "{health}"
    );

    let visitor = together(&at("/products/search?q=zither"), 1).remove(0);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    until_at_work(&mut connection, "product-service", 15).await;
    let reset = post(&at("/demo/reset"), &json!({})).await.json();
    assert!(
        reset["statements_cancelled"].as_u64() >= Some(10),
        "{reset}"
    );
    assert_eq!(reset["simulation"]["pool_exhaustion"], false);
    assert_eq!(at_work(&mut connection, "product-service").await, 0);
    let answer = visitor.await.unwrap().problem(503);
    assert!(
        ["statement_cancelled", "statement_timeout"].contains(&answer.as_str()),
        "{answer}"
    );
    blocked.release().await;
    assert_eq!(get(&at("/products/search?q=zither")).await.status, 200);
    let is_idle = |health: &Value| health["pool"]["active"] == 0;
    until(&at("/health"), "all connections are back", is_idle).await;
}

/// A service is killed while its statements run: its backends know nothing of that. A reset of
/// the one that takes its place ends them.
#[tokio::test]
async fn a_reset_ends_what_a_killed_service_left() {
    let url = common::database().await;
    let mut first = start_demo("product", &url).await;
    let second = start_demo("product", &url).await;
    let blocked = Blocked::new(&url).await;
    let search = format!("{}/products/search?q=zither", first.announced);
    let lost: Vec<_> = (0..5)
        .map(|_| {
            let search = search.clone();
            tokio::spawn(async move { send("GET", &search).await.is_err() })
        })
        .collect();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    until_at_work(&mut connection, "product-service", 5).await;
    first.signal(Signal::SIGKILL);
    first.wait();
    for lost in lost {
        assert!(lost.await.unwrap(), "an answer of a dead service");
    }
    let reset = post(&format!("{}/demo/reset", second.announced), &json!({})).await;
    let reset = reset.json();
    assert!(reset["statements_cancelled"].as_u64() >= Some(1), "{reset}");
    assert_eq!(at_work(&mut connection, "product-service").await, 0);
    blocked.release().await;
}

/// Visitors who give up free their connections, through the gateway as well.
#[tokio::test]
async fn abandoned_requests_free_their_connections() {
    let shop = Shop::open().await;
    let blocked = Blocked::new(&shop.url).await;
    let visitors = together(&shop.at("/api/products/search?q=zither"), 15);
    let health = format!("{}/health", shop.product.announced);
    until(&health, "all wait", |health| {
        health["queries"]["active"] == 15
    })
    .await;
    for visitor in &visitors {
        visitor.abort();
    }
    let given_up =
        |health: &Value| health["queries"]["abandoned"] == 15 && health["queries"]["active"] == 0;
    until(&health, "all are given up", given_up).await;
    blocked.release().await;
    let is_idle = |health: &Value| health["pool"]["active"] == 0;
    until(&health, "all connections are back", is_idle).await;
    assert_eq!(shop.get("/api/products/search?q=zither").await.status, 200);
}

/// After SIGTERM what is under way is answered, by each service and by the gateway.
#[tokio::test]
async fn all_end_gracefully() {
    let mut shop = Shop::open().await;
    let blocked = Blocked::new(&shop.url).await;
    let answers: Vec<_> = [
        "/api/products/search?q=kite",
        "/api/orders/popular-products?q=kite",
        "/api/inventory/low-stock?q=kite",
    ]
    .iter()
    .map(|path| together(&shop.at(path), 1).remove(0))
    .collect();
    for service in [&shop.product, &shop.order, &shop.inventory] {
        let health = format!("{}/health", service.announced);
        until(&health, "it waits", |health| {
            health["queries"]["active"] == 1
        })
        .await;
    }
    for service in [&shop.gateway, &shop.product, &shop.order, &shop.inventory] {
        service.signal(Signal::SIGTERM);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(
        send("GET", &shop.at("/health")).await.is_err(),
        "still open"
    );
    blocked.release().await;
    for answer in answers {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    for service in [
        &mut shop.gateway,
        &mut shop.product,
        &mut shop.order,
        &mut shop.inventory,
    ] {
        assert!(service.wait().success());
    }
}

/// Hands connections on to a server whose port may change.
struct Forwarder {
    port: u16,
    target: Arc<AtomicU16>,
}

impl Forwarder {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let target = Arc::new(AtomicU16::new(0));
        let to = Arc::clone(&target);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let port = to.load(Ordering::Relaxed);
                tokio::spawn(async move {
                    if let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await {
                        let _ = copy_bidirectional(&mut client, &mut server).await;
                    }
                });
            }
        });
        Self { port, target }
    }

    /// Sends new connections to the server of `url`; gives the URL by way of this.
    fn lead_to(&self, url: &str) -> String {
        let (before, after) = url.rsplit_once(':').unwrap();
        let (port, database) = after.split_once('/').unwrap();
        self.target.store(port.parse().unwrap(), Ordering::Relaxed);
        format!("{before}:{}/{database}", self.port)
    }
}

/// A PostgreSQL whose data outlives its process.
async fn lasting_postgres(directory: &PathBuf) -> Watched {
    let mut command = common::program("postgres");
    command.args(["--with-parent", "--source", "system"]);
    command.arg("--directory").arg(directory);
    let start = move || Watched::start(&mut command, "DATABASE_URL=");
    tokio::task::spawn_blocking(start).await.unwrap()
}

/// PostgreSQL is restarted while visitors come: they are told, and all services recover by
/// themselves.
#[tokio::test]
async fn services_survive_a_restart_of_postgresql() {
    let directory = scratch("restarted");
    let forwarder = Forwarder::start().await;
    let postgres = lasting_postgres(&directory).await;
    let url = forwarder.lead_to(&postgres.announced);
    let shop = Shop::open_on(&url).await;
    let paths = [
        "/api/products/search?q=zither",
        "/api/orders/popular-products?q=zither",
        "/api/inventory/low-stock?q=zither",
    ];
    let visitors = Visitors::start(paths.map(|path| shop.at(path)).to_vec());
    visitors.answered(50).await;
    let stop = move || drop(postgres);
    tokio::task::spawn_blocking(stop).await.unwrap();
    visitors.refused(3).await;
    assert_eq!(shop.get("/health").await.json()["status"], "ok");
    assert_eq!(
        shop.get("/api/status").await.json()["database"],
        Value::Null
    );

    let postgres = lasting_postgres(&directory).await;
    forwarder.lead_to(&postgres.announced);
    for path in paths {
        let deadline = Instant::now() + Duration::from_secs(20);
        while shop.get(path).await.status != 200 {
            assert!(Instant::now() < deadline, "{path} does not recover");
        }
    }
    visitors.answered(50).await;
    let codes = visitors.stop().await;
    // A pool that is opened anew by many at once may also look full for a moment.
    for code in codes.keys() {
        let known = ["database_unreachable", "pool_exhausted"].contains(&code.as_str());
        assert!(known, "{codes:?}");
    }
    assert!(codes["database_unreachable"] >= 3, "{codes:?}");
    for service in [&shop.product, &shop.order, &shop.inventory] {
        let health = format!("{}/health", service.announced);
        let is_idle = |health: &Value| health["pool"]["active"] == 0;
        until(&health, "all connections are back", is_idle).await;
    }
    drop(shop);
    tokio::task::spawn_blocking(move || drop(postgres))
        .await
        .unwrap();
    fs::remove_dir_all(directory).unwrap();
}

/// Visitors who come and come again.
struct Visitors {
    answered: Arc<AtomicU64>,
    refused: Arc<Mutex<BTreeMap<String, u64>>>,
    leave: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Visitors {
    /// Two for each page.
    fn start(pages: Vec<String>) -> Self {
        let mut visitors = Self {
            answered: Arc::default(),
            refused: Arc::default(),
            leave: Arc::default(),
            tasks: Vec::new(),
        };
        for page in pages.iter().chain(&pages) {
            visitors.tasks.push(visitors.visitor(page.clone()));
        }
        visitors
    }

    fn visitor(&self, page: String) -> JoinHandle<()> {
        let (answered, refused) = (Arc::clone(&self.answered), Arc::clone(&self.refused));
        let leave = Arc::clone(&self.leave);
        tokio::spawn(async move {
            while !leave.load(Ordering::Relaxed) {
                let answer = get(&page).await;
                if answer.status == 200 {
                    answered.fetch_add(1, Ordering::Relaxed);
                } else {
                    let code = answer.problem(503);
                    *refused.lock().unwrap().entry(code).or_insert(0) += 1;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
    }

    /// Waits until `more` of them were answered.
    async fn answered(&self, more: u64) {
        let count = || self.answered.load(Ordering::Relaxed);
        let (deadline, goal) = (Instant::now() + Duration::from_secs(20), count() + more);
        while count() < goal {
            assert!(Instant::now() < deadline, "no answers");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until `count` of them were refused.
    async fn refused(&self, count: u64) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.refused.lock().unwrap().values().sum::<u64>() < count {
            assert!(Instant::now() < deadline, "nobody was refused");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Sends them home; gives why they were refused.
    async fn stop(self) -> BTreeMap<String, u64> {
        self.leave.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        Arc::into_inner(self.refused).unwrap().into_inner().unwrap()
    }
}

/// `workload all` in directories of its own.
struct All {
    directory: PathBuf,
    log: PathBuf,
    process: Watched,
}

impl All {
    async fn start() -> Self {
        let (directory, log) = (scratch("all"), scratch("all-log"));
        let mut command = common::program("all");
        command
            .args(["--with-parent", "--port", "0", "--demo"])
            .args(["--products", "500", "--source", "system"])
            .arg("--directory")
            .arg(&directory)
            .stderr(fs::File::create(&log).unwrap());
        Self {
            process: start(command).await,
            directory,
            log,
        }
    }

    /// The pid of its child that was started by `subcommand`.
    fn child(&self, subcommand: &str) -> Pid {
        let pid = self.process.child.id();
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
        let children = tasks.filter_map(|t| fs::read_to_string(t.path().join("children")).ok());
        let children = children.collect::<Vec<_>>().join(" ");
        let mut children = children.split_whitespace();
        let found = children.find(|child| {
            let line = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
            line.split(|b| *b == 0).nth(1) == Some(subcommand.as_bytes())
        });
        Pid::from_raw(found.unwrap().parse().unwrap())
    }

    fn children(&self) -> [Pid; 5] {
        ["postgres", "product", "order", "inventory", "gateway"].map(|name| self.child(name))
    }

    /// Waits until nothing of it runs any more.
    fn is_gone(&self, children: &[Pid]) {
        eventually("everything has gone", || {
            let is_running = |pid: &Pid| {
                let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                let state = stat.rsplit(')').next().unwrap_or_default();
                !state.is_empty() && !state.starts_with(" Z")
            };
            !children.iter().any(is_running)
                && processes_with(self.directory.to_str().unwrap()).is_empty()
        });
    }
}

impl Drop for All {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
        let _ = fs::remove_file(&self.log);
    }
}

/// The whole shop by one command: it answers, and ends in order when it is told to.
#[tokio::test(flavor = "multi_thread")]
async fn all_is_opened_and_closed() {
    let mut all = All::start().await;
    let at = |path: &str| format!("{}{path}", all.process.announced);
    let health = get(&at("/health")).await.json();
    assert_eq!(health["status"], "ok", "{health}");
    for path in [
        "/api/products/search?q=wireless",
        "/api/orders/popular-products?q=wireless",
        "/api/inventory/low-stock?q=wireless",
    ] {
        assert_ne!(get(&at(path)).await.json()["count"], 0, "{path}");
    }
    let children = all.children();
    all.process.signal(Signal::SIGTERM);
    assert!(all.process.wait().success());
    all.is_gone(&children);
}

/// One of the services dies: it is named, and nothing goes on as if nothing had happened.
#[tokio::test(flavor = "multi_thread")]
async fn who_died_is_named() {
    for (subcommand, name) in [
        ("order", "order-service"),
        ("gateway", "api-gateway"),
        ("postgres", "postgresql"),
    ] {
        let mut all = All::start().await;
        let children = all.children();
        kill(all.child(subcommand), Signal::SIGKILL).unwrap();
        assert!(!all.process.wait().success());
        let log = fs::read_to_string(&all.log).unwrap();
        let named = format!("workload: {name} ended by itself (signal: 9 (SIGKILL))");
        assert!(log.contains(&named), "{log}");
        all.is_gone(&children);
    }
}

/// The supervisor dies: its children notice by themselves.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_supervisor_leaves_nothing() {
    let mut all = All::start().await;
    let children = all.children();
    all.process.signal(Signal::SIGKILL);
    all.process.wait();
    all.is_gone(&children);
}

/// A service that cannot start keeps the shop closed, and is named.
#[tokio::test]
async fn a_taken_port_keeps_the_shop_closed() {
    // Below the ports that the system gives away, so that only this one is taken.
    let first = 20_000 + u16::try_from(std::process::id() % 1000).unwrap() * 10;
    let bind = |port| std::net::TcpListener::bind(("127.0.0.1", port)).ok();
    let taken = (first..first + 100).step_by(10).find_map(bind).unwrap();
    let port = taken.local_addr().unwrap().port();
    let url = common::database().await;
    let mut command = common::program("all");
    command
        .args(["--with-parent", "--products", "500"])
        .args(["--port", &(port - 5).to_string()])
        .env("DATABASE_URL", &url);
    let ran = tokio::task::spawn_blocking(move || common::run(&mut command));
    let (status, _, stderr) = ran.await.unwrap();
    assert!(!status.success());
    assert!(stderr.contains("order-service did not start"), "{stderr}");
    assert!(stderr.contains(&format!("127.0.0.1:{port}")), "{stderr}");
}

/// Each service keeps to its share of the connections and has its name and its timeout on them.
#[tokio::test]
async fn connections_are_shared_out() {
    let url = common::database().await;
    let mut connection = PgConnection::connect(&url).await.unwrap();
    for name in SERVICES {
        let service = start(service(name, &url)).await;
        let path = match name {
            "product" => "/products/search?q=zither",
            "order" => "/orders/popular-products?q=zither",
            _ => "/inventory/low-stock?q=zither",
        };
        let blocked = Blocked::new(&url).await;
        let waiting = together(&format!("{}{path}", service.announced), 20);
        let health = format!("{}/health", service.announced);
        until(&health, "it is full", |health| {
            health["queries"]["active"] == 15
        })
        .await;
        until_at_work(&mut connection, &format!("{name}-service"), 15).await;
        let mut codes = BTreeMap::new();
        for answer in waiting {
            *codes.entry(answer.await.unwrap().problem(503)).or_insert(0) += 1;
        }
        assert!(codes["statement_timeout"] >= 15, "{codes:?}");
        assert_eq!(codes.values().sum::<i32>(), 20, "{codes:?}");
        blocked.release().await;
    }
}
