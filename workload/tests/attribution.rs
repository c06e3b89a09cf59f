//! Who asked, when many tasks share few connections: this test is the client, an asynchronous program on
//! sqlx's pool, and its functions and their queries are known.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::recording::{MachineLock, Recording, Stack, can_record, count};
use serde_json::Value;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, PgPool};

/// Tasks that ask, and the connections that they share: each connection serves another task and another
/// function at every turn.
const TASKS: u64 = 50;
const CONNECTIONS: u32 = 8;

/// What the tasks' connections call themselves.
const APPLICATION: &str = "tasks";

/// For how long they ask; before that, until the agent knows this program; and how long is recorded.
const ASKING: Duration = Duration::from_secs(7);
const WARMING_UP: Duration = Duration::from_secs(2);
const RECORDED: u32 = 10;

/// Samples of one function's query under another function at most.
const WRONG: f64 = 0.005;

/// Samples with a query whose caller is known, at least.
const KNOWN: f64 = 0.97;

/// The functions that ask, each with a word that only its own query's text has.
const ASKED: [(&str, &str); 5] = [
    ("ask_heavy", "AS heavy"),
    ("ask_light", "AS light"),
    ("ask_thoughtfully", "AS thoughtful"),
    ("ask_wrongly", "AS wrong"),
    ("ask_too_much", "AS excessive"),
];

async fn ask_heavy(pool: &PgPool) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT count(*) AS heavy FROM generate_series(1, $1) n WHERE n % 7 = 3")
        .bind(40_000)
        .fetch_one(pool)
        .await
}

async fn ask_light(pool: &PgPool) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT count(*) AS light FROM generate_series(1, $1) n WHERE n % 5 = 2")
        .bind(10_000)
        .fetch_one(pool)
        .await
}

/// Two statements in a transaction, and time to think between them.
async fn ask_thoughtfully(pool: &PgPool) -> Result<(), sqlx::Error> {
    let mut transaction = pool.begin().await?;
    for rows in [20_000, 10_000] {
        sqlx::query("SELECT count(*) AS thoughtful FROM generate_series(1, $1) n WHERE n % 3 = 1")
            .bind(rows)
            .execute(&mut *transaction)
            .await?;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    transaction.commit().await
}

/// A statement that fails at its end.
async fn ask_wrongly(pool: &PgPool) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT count(*) / (count(*) * 0) AS wrong FROM generate_series(1, $1) n")
        .bind(20_000)
        .fetch_one(pool)
        .await
}

/// A statement that the server cancels.
async fn ask_too_much(pool: &PgPool) -> Result<i64, sqlx::Error> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin().await?;
    sqlx::query("SET LOCAL statement_timeout = '20ms'")
        .execute(&mut *transaction)
        .await?;
    sqlx::query_scalar("SELECT count(*) AS excessive FROM generate_series(1, $1) n")
        .bind(50_000_000)
        .fetch_one(&mut *transaction)
        .await
}

/// What became of the requests.
#[derive(Debug, Default)]
struct Tally {
    answered: AtomicU64,
    abandoned: AtomicU64,
    thought: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
}

/// One task: every function in turn, the first of them differs from task to task.
async fn ask(task: u64, pool: PgPool, tally: Arc<Tally>, until: Instant) {
    for turn in task.. {
        if Instant::now() >= until {
            return;
        }
        let add = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        // A patience that ends in the middle of many a query, whatever the machine's speed.
        let patience = Duration::from_micros(500 * (turn % 40));
        match turn % 8 {
            // An abandoned request's connection goes back to the pool in a task of its own, which asks
            // the server for a sign of life while the query still runs.
            0 => match tokio::time::timeout(patience, ask_heavy(&pool)).await {
                Ok(answer) => drop(answer.unwrap()),
                Err(_) => drop(add(&tally.abandoned)),
            },
            1 => match tokio::time::timeout(patience, ask_light(&pool)).await {
                Ok(answer) => drop(answer.unwrap()),
                Err(_) => drop(add(&tally.abandoned)),
            },
            2 | 4 => {
                ask_heavy(&pool).await.unwrap();
                add(&tally.answered);
            }
            3 | 5 => {
                ask_light(&pool).await.unwrap();
                add(&tally.answered);
            }
            6 if task.is_multiple_of(2) => {
                ask_thoughtfully(&pool).await.unwrap();
                add(&tally.thought);
            }
            6 => {
                ask_wrongly(&pool).await.unwrap_err();
                add(&tally.failed);
            }
            _ if task.is_multiple_of(10) => {
                ask_too_much(&pool).await.unwrap_err();
                add(&tally.cancelled);
            }
            _ => {}
        }
    }
}

/// All tasks on one pool, until the time is over.
async fn ask_all(url: &str, application: &str, time: Duration) -> Tally {
    let options: PgConnectOptions = url.parse().unwrap();
    let pool = PgPoolOptions::new()
        .max_connections(CONNECTIONS)
        .connect_with(options.application_name(application))
        .await
        .unwrap();
    let tally = Arc::new(Tally::default());
    let until = Instant::now() + time;
    let tasks: Vec<_> = (0..TASKS)
        .map(|task| tokio::spawn(ask(task, pool.clone(), Arc::clone(&tally), until)))
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    pool.close().await;
    Arc::into_inner(tally).unwrap()
}

/// The function whose query a stack is of.
fn asked(stack: &Stack) -> Option<&'static str> {
    let found = ASKED.iter().find(|(_, text)| stack.has(text));
    found.map(|(function, _)| *function)
}

/// The functions of ours that a stack has.
fn askers(stack: &Stack) -> Vec<&'static str> {
    let names = ASKED.iter().map(|(function, _)| *function);
    names
        .filter(|name| stack.has(&format!("attribution::{name}")))
        .collect()
}

/// Whatever happens on a connection between two tasks, a query is never given to another's function.
#[tokio::test(flavor = "multi_thread")]
async fn tasks_on_one_pool() {
    if !can_record() {
        return;
    }
    let url = common::database().await;
    let _lock = MachineLock::exclusive();
    let recording = Recording::start(RECORDED);
    // Until the unwind tables of a new program are made, its stacks are copied, a few hundred a second: less
    // than it sends here.
    ask_all(&url, "warming-up", WARMING_UP).await;
    let tally = ask_all(&url, APPLICATION, ASKING).await;
    let recorded = tokio::task::spawn_blocking(|| recording.finish())
        .await
        .unwrap();
    for (what, counter, least) in [
        ("answered", &tally.answered, 200),
        ("abandoned", &tally.abandoned, 100),
        ("thought", &tally.thought, 20),
        ("failed", &tally.failed, 20),
        ("cancelled", &tally.cancelled, 10),
    ] {
        let counter = counter.load(Ordering::Relaxed);
        assert!(counter >= least, "{what}: {counter}");
    }
    let filter = format!("application={APPLICATION}");
    let stacks = recorded.stacks(&[&filter]);
    for (function, text) in ASKED {
        check_stacks(function, text, &stacks);
        check_queries(function, text, &recorded.queries(&[&filter]));
    }
}

/// The stacks of one function's query: whose they are.
fn check_stacks(function: &str, text: &str, stacks: &[Stack]) {
    let of = |holds: &dyn Fn(&Stack) -> bool| {
        count(stacks, |stack| {
            asked(stack) == Some(function) && holds(stack)
        })
    };
    let all = of(&|_| true);
    assert!(all > 100, "{function}: {all} samples");
    let wrong = of(&|stack| askers(stack).iter().any(|asker| *asker != function));
    assert!(
        wrong as f64 <= WRONG * all as f64,
        "{function}: {wrong} of {all} samples are another's"
    );
    let known = of(&|stack| stack.has_in_order(&[function, text, "postgres", "PostgresMain"]));
    assert!(
        known as f64 >= KNOWN * all as f64,
        "{function}: {known} of {all} samples lead to it"
    );
}

/// The table says the same, with the place in this file.
fn check_queries(function: &str, text: &str, queries: &[Value]) {
    let is_ours = |query: &&Value| query["query"].as_str().unwrap().contains(text);
    let query = queries.iter().find(is_ours).unwrap();
    let callers = query["callers"].as_array().unwrap();
    let own: f64 = callers
        .iter()
        .filter(|caller| {
            caller["function"].as_str() == Some(&format!("attribution::{function}"))
                && caller["file"].as_str().unwrap().ends_with(file!())
                && lines(function).contains(&caller["line"].as_u64().unwrap())
        })
        .map(|caller| caller["share"].as_f64().unwrap())
        .sum();
    assert!(own >= KNOWN, "{function}: {query:#}");
    assert!(query["executions"].as_u64() >= Some(10), "{query:#}");
}

/// Where a function stands in this file.
fn lines(function: &str) -> std::ops::RangeInclusive<u64> {
    let start = format!("async fn {function}(");
    let mut lines = include_str!("attribution.rs").lines().zip(1..);
    let (_, first) = lines.find(|(line, _)| line.starts_with(&start)).unwrap();
    let (_, last) = lines.find(|(line, _)| *line == "}").unwrap();
    first..=last
}
