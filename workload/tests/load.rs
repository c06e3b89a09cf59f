//! `workload load`: honest where the shop is slow, bounded, and on a real shop.

mod common;
#[path = "common/shop.rs"]
mod shop;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::any;
use nix::sys::signal::Signal;
use serde_json::Value;
use shop::Shop;
use tokio::net::TcpListener;
use workload::load::{self, Options, Pace, Report};

/// A server that answers at once, except in the second second after it began: what comes then is answered at its end.
async fn stalling() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("its address");
    let began = Arc::new(Instant::now());
    let answer = move || {
        let began = Arc::clone(&began);
        async move {
            let (from, until) = (Duration::from_secs(1), Duration::from_secs(3));
            let age = began.elapsed();
            if age >= from {
                tokio::time::sleep(until.saturating_sub(age)).await;
            }
            "{}"
        }
    };
    let app = Router::new().fallback(any(answer));
    tokio::spawn(async move { axum::serve(listener, app).await });
    format!("http://{address}")
}

async fn traffic(url: String, pace: Pace, seconds: u64) -> Report {
    let options = Options {
        url,
        pace,
        seed: 1,
        duration: Duration::from_secs(seconds),
    };
    load::run(&options, std::future::pending())
        .await
        .expect("an address")
}

/// Half of the time the server stalls. Requests that are due then have waited, whoever sends them; a client that
/// waits for its answer hardly notices.
#[tokio::test]
async fn an_open_loop_omits_nothing() {
    let open = traffic(stalling().await, Pace::Open { rate: 50.0 }, 4).await;
    assert_eq!(open.due, 200, "{open}");
    assert_eq!((open.completed, open.unanswered), (200, 0), "{open}");
    // Those that were due first have waited for all of it, nearly half have waited for some of it.
    assert!(open.p95_ms.is_some_and(|ms| ms > 1_500.0), "{open}");
    let closed = traffic(stalling().await, Pace::Closed { clients: 1 }, 4).await;
    assert!(closed.max_ms.is_some_and(|ms| ms > 1_500.0), "{closed}");
    assert!(closed.p95_ms < open.p95_ms, "{closed}\n{open}");
}

/// Nobody answers: everything that was due is accounted for, by cause, and the traffic ends.
#[tokio::test]
async fn a_shop_that_is_closed() {
    let url = {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        format!("http://{}", listener.local_addr().expect("its address"))
    };
    let report = traffic(url, Pace::Open { rate: 20.0 }, 1).await;
    assert_eq!((report.due, report.completed), (20, 0), "{report}");
    assert_eq!(report.failures["service_unreachable"], 20, "{report}");
    assert!(report.p95_ms.is_none());
}

/// A server that takes requests and never answers: they are given up at the end, and told.
#[tokio::test]
async fn a_shop_that_is_silent() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("its address"));
    let start = Instant::now();
    let report = traffic(url, Pace::Closed { clients: 3 }, 1).await;
    assert_eq!((report.due, report.completed), (3, 0), "{report}");
    assert_eq!(report.failed + report.unanswered, 3, "{report}");
    assert!(start.elapsed() < Duration::from_secs(20));
    drop(listener);
}

/// A number of the JSON object.
fn number(report: &Value, name: &str) -> f64 {
    report[name]
        .as_f64()
        .unwrap_or_else(|| panic!("no {name} in {report:#}"))
}

/// On a real shop all is answered, and each kind of request has its figures.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_shop() {
    let shop = Shop::open().await;
    for pace in [["--rate", "40"], ["--clients", "2"]] {
        let mut command = common::program("load");
        command.args(["--with-parent", "--duration", "2s", "--json", "--url"]);
        command.arg(&shop.gateway.announced).args(pace);
        let run = move || common::run(&mut command);
        let (status, stdout, stderr) = tokio::task::spawn_blocking(run).await.expect("it ends");
        assert!(status.success(), "{stderr}");
        let report: Value = serde_json::from_str(&stdout).expect("one JSON object");
        assert_eq!(number(&report, "failed"), 0.0, "{report:#}");
        assert!(number(&report, "completed") >= 40.0, "{report:#}");
        assert!(number(&report, "p50_ms") <= number(&report, "p95_ms"));
        let kinds = report["by_kind"].as_array().expect("a list");
        assert!(kinds.len() >= 5, "{report:#}");
    }
}

/// Ctrl-C ends it early, with a report of what there was.
#[tokio::test(flavor = "multi_thread")]
async fn interrupted() {
    let url = stalling().await;
    let mut command = common::program("load");
    command.args(["--rate", "20", "--duration", "10m", "--url", &url]);
    let told = tokio::task::spawn_blocking(move || {
        let child = command
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("started");
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        std::thread::sleep(Duration::from_millis(600));
        nix::sys::signal::kill(pid, Signal::SIGINT).expect("it runs");
        child.wait_with_output().expect("it ends")
    });
    let told = told.await.expect("no panic");
    assert!(told.status.success(), "{told:?}");
    let text = String::from_utf8_lossy(&told.stdout);
    assert!(text.contains("open loop, 20 requests a second"), "{text}");
}

/// What cannot be is refused by name.
#[test]
fn refused() {
    for words in [
        &["--rate", "1", "--clients", "1"][..],
        &["--rate", "0"],
        &["--clients", "0"],
        &["--duration", "0"],
        &["--url", "shop:8010"],
    ] {
        let (status, stdout, stderr) = common::run(common::program("load").args(words));
        assert!(
            !status.success() && stdout.is_empty(),
            "{words:?}: {stderr}"
        );
        assert!(
            stderr.contains(words[0].trim_start_matches('-')) || stderr.contains("http://"),
            "{stderr}"
        );
    }
}
