//! What a service publishes for profilers, read by the agent: a recording of the machine knows
//! which service asked, and for which trace, in PostgreSQL's stacks as well.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;

use std::time::{Duration, Instant};

use common::recording::{MachineLock, Recorded, Recording, can_record, count};
use common::{Watched, program, send_with};

const RECORDED: u32 = 8;

/// Requests begin after the recording has, and end before it does.
const ASKING: Duration = Duration::from_secs(6);

/// Two traces, what each of them asks for, and a word of its statement.
const TRACES: [(&str, &str, &str); 2] = [
    (
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "/products/search?q=zither",
        "ILIKE",
    ),
    (
        "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb",
        "/products/17",
        "WHERE id = ",
    ),
];

/// Asks for one thing over and over, always in the same trace.
async fn ask(uri: String, trace: &'static str) -> u64 {
    let until = Instant::now() + ASKING;
    let mut answers = 0;
    while Instant::now() < until {
        let header = format!("00-{trace}-b7ad6b7169203331-01");
        let answer = send_with("GET", &uri, &[("traceparent", header)]).await;
        assert_eq!(answer.unwrap().status, 200);
        answers += 1;
    }
    answers
}

/// Two traces on the same threads and connections stay apart: each leads to its own statement, and
/// to the service by the name that it gives itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_recording_knows_service_and_trace() {
    if !can_record() {
        return;
    }
    let url = common::database().await;
    let service = tokio::task::spawn_blocking(move || {
        let mut command = program("product");
        command
            .args(["--with-parent", "--port", "0", "--products", "20000"])
            .env("DATABASE_URL", url);
        Watched::start(&mut command, "listening on ")
    });
    let service = service.await.unwrap();
    let _lock = MachineLock::exclusive();
    let recording = tokio::task::spawn_blocking(|| Recording::start(RECORDED));
    let recording = recording.await.unwrap();
    let asking = TRACES.map(|(trace, path, _)| {
        let uri = format!("{}{path}", service.announced);
        tokio::spawn(ask(uri, trace))
    });
    for task in asking {
        assert!(task.await.unwrap() >= 10);
    }
    let recorded = tokio::task::spawn_blocking(|| recording.finish());
    let recorded = recorded.await.unwrap();
    for (trace, _, word) in TRACES {
        check(&recorded, trace, word);
    }
    // How soon the agent can walk a new program's stacks is tested elsewhere: those that it has.
    let search = recorded.stacks(&[&format!("trace_id={}", TRACES[0].0)]);
    let stitched = count(&search, |stack| {
        stack.has_in_order(&["search_products_unindexed", "ILIKE", "PostgresMain"])
    });
    assert!(stitched >= 20, "{stitched} of {}", count(&search, |_| true));
    let wrong = count(&search, |stack| stack.has("product_by_id"));
    assert_eq!(wrong, 0);
}

/// The queries of one trace: its own statement, asked for by the service.
fn check(recorded: &Recorded, trace: &str, word: &str) {
    let queries = recorded.queries(&[&format!("trace_id={trace}")]);
    assert!(!queries.is_empty(), "no query of {trace}");
    for query in &queries {
        let text = query["query"].as_str().unwrap();
        assert!(text.contains(word), "{trace} did not ask: {query:#}");
        for caller in query["callers"].as_array().unwrap() {
            assert_eq!(caller["service"], "product-service", "{query:#}");
        }
        assert_eq!(query["trace_ids"], serde_json::json!([trace]));
    }
}
