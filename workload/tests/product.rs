//! The product service on a real PostgreSQL, through HTTP.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Watched, get, product, send, start_product};
use flate2::read::GzDecoder;
use nix::sys::signal::Signal;
use pprof::protos::{Message, Profile};
use sqlx::{Connection, Executor, PgConnection, Row};
use workload::db::{self, Database, POOL_MAX};
use workload::services::product::SEARCH;

async fn shop() -> (String, Watched) {
    let url = common::database().await;
    let service = tokio::task::spawn_blocking({
        let url = url.clone();
        move || start_product(&url)
    });
    (url, service.await.unwrap())
}

/// A search finds what the description says, in any case, and no more than a page of it.
#[tokio::test]
async fn search_finds_descriptions() {
    let (_, service) = shop().await;
    let search = format!("{}/products/search", service.announced);

    let found = get(&format!("{search}?q=WIRELESS")).await;
    assert_eq!(found.status, 200);
    let found = found.json();
    let products = found["products"].as_array().unwrap();
    assert!(!products.is_empty() && products.len() <= 20);
    assert_eq!(found["count"], products.len());
    for product in products {
        let description = product["description"].as_str().unwrap();
        assert!(
            description.to_lowercase().contains("wireless"),
            "{description}"
        );
    }

    let limited = get(&format!("{search}?q=the&limit=3")).await.json();
    assert_eq!(limited["count"], 3);
    let none = get(&format!("{search}?q=nothing%20like%20this"))
        .await
        .json();
    assert_eq!(none["count"], 0);
    // LIKE's own characters are searched for, not obeyed.
    assert_eq!(get(&format!("{search}?q=%25%25")).await.json()["count"], 0);
    assert_eq!(get(&format!("{search}?q=__")).await.json()["count"], 0);
    assert_eq!(get(&format!("{search}?q=%5C%5C")).await.json()["count"], 0);
    // A quote is data.
    let quote = get(&format!("{search}?q=%27%3B%20DROP%20TABLE%20products")).await;
    assert_eq!(quote.json()["count"], 0);
}

/// Each wrong request is answered with a problem of its own.
#[tokio::test]
async fn wrong_requests_are_explained() {
    let (_, service) = shop().await;
    let at = |path: &str| format!("{}{path}", service.announced);
    let long = "x".repeat(101);
    for (path, status, code) in [
        ("/products/search", 400, "q_missing"),
        ("/products/search?q=%20", 400, "q_missing"),
        ("/products/search?q=x", 400, "q_too_short"),
        (&format!("/products/search?q={long}"), 400, "q_too_long"),
        ("/products/search?q=a%00b", 400, "q_invalid"),
        ("/products/search?q=word&limit=0", 400, "limit_out_of_range"),
        (
            "/products/search?q=word&limit=101",
            400,
            "limit_out_of_range",
        ),
        ("/products/search?q=word&limit=many", 400, "bad_query"),
        ("/products/abc", 400, "bad_id"),
        ("/products/99999999999999999999", 400, "bad_id"),
        ("/products/501", 404, "no_such_product"),
        ("/products/-1", 404, "no_such_product"),
        ("/nothing", 404, "no_such_page"),
        (
            "/debug/pprof/profile?seconds=0",
            400,
            "seconds_out_of_range",
        ),
        (
            "/debug/pprof/profile?seconds=61",
            400,
            "seconds_out_of_range",
        ),
        (
            "/debug/pprof/profile?seconds=1&frequency=0",
            400,
            "frequency_out_of_range",
        ),
        ("/debug/pprof/profile?seconds=x", 400, "bad_query"),
    ] {
        assert_eq!(get(&at(path)).await.problem(status), code, "{path}");
    }
    let posted = send("POST", &at("/products/search?q=word")).await.unwrap();
    assert_eq!(posted.problem(405), "no_such_method");
}

/// A product by its id, and the pool's state.
#[tokio::test]
async fn product_and_health() {
    let (_, service) = shop().await;
    let product = get(&format!("{}/products/42", service.announced))
        .await
        .json();
    assert_eq!(product["id"], 42);
    for member in ["name", "department", "description"] {
        assert!(!product[member].as_str().unwrap().is_empty());
    }
    assert!(product["price_cents"].as_i64().unwrap() > 0);

    let health = get(&format!("{}/health", service.announced)).await.json();
    assert_eq!(health["status"], "ok");
    assert_eq!(health["service"], "product-service");
    assert_eq!(health["pool"]["max"], 15);
    assert!(health["pool"]["active"].as_u64().unwrap() <= 15);
    assert!(health["pool"]["utilization_percent"].is_number());
}

/// The search's plan is a scan of the whole table, and the service's sessions have the timeout.
#[tokio::test]
async fn the_search_is_a_sequential_scan() {
    let (url, _service) = shop().await;
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let explain = sqlx::AssertSqlSafe(format!("EXPLAIN {SEARCH}"));
    let plan = sqlx::query(explain).bind("zither").bind(20_i64);
    let plan: Vec<String> = plan
        .fetch_all(&mut connection)
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    let plan = plan.join("\n");
    assert!(plan.contains("Seq Scan on products"), "{plan}");
    assert!(!plan.contains("Index"), "{plan}");
}

/// A statement that takes too long is cancelled by PostgreSQL, and the client is told so, without
/// PostgreSQL's words.
#[tokio::test]
async fn a_slow_statement_times_out() {
    let (url, service) = shop().await;
    let mut blocker = PgConnection::connect(&url).await.unwrap();
    let mut lock = blocker.begin().await.unwrap();
    lock.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    let start = Instant::now();
    let answer = get(&format!("{}/products/search?q=zither", service.announced)).await;
    assert_eq!(answer.problem(503), "statement_timeout");
    assert!(
        start.elapsed() >= Duration::from_millis(3100),
        "{:?}",
        start.elapsed()
    );
    let text = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(!text.contains("canceling"), "{text}");
}

/// When others hold all connections, a request is told that, and health shows it.
#[tokio::test]
async fn an_exhausted_pool_has_its_own_error() {
    let (url, service) = shop().await;
    let mut blocker = PgConnection::connect(&url).await.unwrap();
    let mut lock = blocker.begin().await.unwrap();
    lock.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    let search = format!("{}/products/search?q=zither", service.announced);
    let holders: Vec<_> = (0..15)
        .map(|_| {
            tokio::spawn({
                let search = search.clone();
                async move { get(&search).await }
            })
        })
        .collect();
    let health = format!("{}/health", service.announced);
    let deadline = Instant::now() + Duration::from_secs(2);
    while get(&health).await.json()["pool"]["active"] != 15 {
        assert!(Instant::now() < deadline, "the pool did not fill");
    }
    assert_eq!(
        get(&health).await.json()["pool"]["utilization_percent"],
        100.0
    );
    // Whoever comes now waits 3 s; the holders are cancelled 3.2 s after their own starts, which
    // is when the waiter may still get one. Both are honest answers; nothing else is.
    let waited = get(&search).await;
    let code = waited.problem(503);
    assert!(
        ["pool_exhausted", "statement_timeout"].contains(&code.as_str()),
        "{code}"
    );
    for holder in holders {
        assert_eq!(holder.await.unwrap().problem(503), "statement_timeout");
    }
    lock.rollback().await.unwrap();
    assert_eq!(get(&search).await.status, 200);
}

/// The in-process profile can be decoded, names this program's functions, and is made one at a
/// time.
#[tokio::test]
async fn the_profile_is_a_profile() {
    let (_, service) = shop().await;
    let profile = format!(
        "{}/debug/pprof/profile?seconds=4&frequency=500",
        service.announced
    );
    let first = tokio::spawn(async move { get(&profile).await });
    let search = format!("{}/products/search?q=wireless", service.announced);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let second = get(&format!(
        "{}/debug/pprof/profile?seconds=1",
        service.announced
    ))
    .await;
    assert_eq!(second.problem(409), "profile_running");
    // On a busy machine the service gets little of the CPU: it has something to do all the time.
    while !first.is_finished() {
        let searches: Vec<_> = (0..4)
            .map(|_| {
                let search = search.clone();
                tokio::spawn(async move { get(&search).await })
            })
            .collect();
        for search in searches {
            assert_eq!(search.await.unwrap().status, 200);
        }
    }
    let first = first.await.unwrap();
    assert_eq!(first.status, 200);
    let mut bytes = Vec::new();
    GzDecoder::new(first.body.as_ref())
        .read_to_end(&mut bytes)
        .unwrap();
    let profile = Profile::decode(bytes.as_slice()).unwrap();
    assert!(!profile.sample.is_empty());
    let names = profile.function.iter();
    let mut names = names.map(|f| &profile.string_table[usize::try_from(f.name).unwrap()]);
    assert!(names.any(|name| name.contains("search_products_unindexed")));
    // It can be made again.
    let again = get(&format!(
        "{}/debug/pprof/profile?seconds=1",
        service.announced
    ))
    .await;
    assert_eq!(again.status, 200);
}

/// After SIGTERM a request in flight is answered, new ones are refused, and the exit is clean.
#[tokio::test]
async fn shutdown_is_graceful() {
    let (url, mut service) = shop().await;
    let mut blocker = PgConnection::connect(&url).await.unwrap();
    let mut lock = blocker.begin().await.unwrap();
    lock.execute("LOCK TABLE products IN ACCESS EXCLUSIVE MODE")
        .await
        .unwrap();
    let search = format!("{}/products/search?q=zither", service.announced);
    let in_flight = tokio::spawn({
        let search = search.clone();
        async move { get(&search).await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    service.signal(Signal::SIGTERM);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(
        send("GET", &search).await.is_err(),
        "a new request was taken"
    );
    lock.rollback().await.unwrap();
    assert_eq!(in_flight.await.unwrap().status, 200);
    assert!(service.wait().success());
}

/// A client that sends no request, or half of one, is cut off.
#[tokio::test]
async fn a_silent_client_is_cut_off() {
    let (_, service) = shop().await;
    let address = service
        .announced
        .strip_prefix("http://")
        .unwrap()
        .to_owned();
    let cut_off = tokio::task::spawn_blocking(move || {
        let mut client = TcpStream::connect(address).unwrap();
        client
            .write_all(b"GET /health HTTP/1.1\r\nHost: x\r\n")
            .unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(15)))
            .unwrap();
        // Whatever is answered, the connection must end.
        client.read_to_end(&mut Vec::new()).unwrap();
    });
    cut_off.await.unwrap();
}

/// The server goes away and comes back: an error that says so, then answers again.
#[tokio::test]
async fn lost_connections_are_replaced() {
    let (url, service) = shop().await;
    let search = format!("{}/products/search?q=zither", service.announced);
    assert_eq!(get(&search).await.status, 200);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    connection
        .execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
             WHERE application_name = 'product-service' AND datname = current_database()",
        )
        .await
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while get(&search).await.status != 200 {
        assert!(Instant::now() < deadline, "the service did not recover");
    }
}

/// A service without a usable database or address ends with an error that says what to do.
#[tokio::test]
async fn a_service_that_cannot_start_says_why() {
    let fails = |command: &mut Command| {
        let (status, _, stderr) = common::run(command);
        assert!(!status.success());
        stderr
    };
    let stderr = fails(&mut product(
        "postgresql://shop:s3cret@127.0.0.1:1/productcatalog",
    ));
    assert!(stderr.contains("127.0.0.1:1/productcatalog"), "{stderr}");
    assert!(
        stderr.contains("DATABASE_URL") && !stderr.contains("s3cret"),
        "{stderr}"
    );

    let stderr = fails(&mut product("mysql://somewhere"));
    assert!(stderr.contains("postgresql://"), "{stderr}");

    let url = common::database().await;
    let wrong = url.replace("shop:", "shop:not");
    let stderr = fails(&mut product(&wrong));
    assert!(
        stderr.contains("password authentication failed"),
        "{stderr}"
    );

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let mut command = common::program("product");
    command.args(["--port", &port]).env("DATABASE_URL", &url);
    let stderr = fails(&mut command);
    assert!(
        stderr.contains(&port) && stderr.contains("--port"),
        "{stderr}"
    );

    let stderr = fails(&mut common::program("product"));
    assert!(stderr.contains("--database-url"), "{stderr}");
}

/// The error of an emptied pool, by itself: fifteen connections are held, the next is refused.
#[tokio::test]
async fn the_sixteenth_connection_is_refused() {
    let database = Database::from_url(&common::database().await).unwrap();
    let pool = database.pool("test").await.unwrap();
    let mut held = Vec::new();
    for _ in 0..POOL_MAX {
        held.push(db::acquire(&pool).await.unwrap());
    }
    let refused = db::acquire(&pool).await.unwrap_err();
    assert_eq!(
        (refused.status().as_u16(), refused.code),
        (503, "pool_exhausted")
    );
    held.pop();
    assert!(db::acquire(&pool).await.is_ok());
}
