//! What the tests share: one private PostgreSQL per test program, a database per test, the
//! service as a process, and an HTTP client.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test program uses a part of this, and a failure here is a failed test"
)]

pub mod recording;

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use sqlx::{Connection, Executor, PgConnection};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_workload");

/// A path in the directory for temporary files that no other test uses.
pub fn scratch(name: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let process = std::process::id();
    std::env::temp_dir().join(format!("flamestorm-{name}-{process}-{number}"))
}

/// A child that lives as long as its standard input is open, and what it announced.
pub struct Watched {
    pub child: Child,
    pub announced: String,
    stdin: Option<ChildStdin>,
}

impl Watched {
    /// Starts the program and waits for the line that starts with `prefix`.
    pub fn start(command: &mut Command, prefix: &str) -> Self {
        let mut child = command
            .env_remove("RUST_LOG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let announced = lines
            .find_map(|line| Some(line.unwrap().strip_prefix(prefix)?.to_owned()))
            .unwrap_or_else(|| panic!("{command:?} ended: {:?}", child.wait()));
        Self {
            child,
            announced,
            stdin,
        }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Waits for the end, within reason.
    pub fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        drop(self.stdin.take());
        wait(&mut self.child);
    }
}

/// Waits for a child's end, within reason.
pub fn wait(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + Duration::from_secs(40);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("process {} did not end", child.id());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs the program to its end: status, standard output, standard error.
pub fn run(command: &mut Command) -> (ExitStatus, String, String) {
    let mut child = command
        .env_remove("RUST_LOG")
        // Open until the end: with `--with-parent` a closed one is a reason to stop.
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.take();
    let mut stdout = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        text
    });
    let mut stderr = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    let status = wait(&mut child);
    drop(stdin);
    (status, reader.join().unwrap(), stderr)
}

/// The program, without a DATABASE_URL from outside, and without a place to send telemetry to.
pub fn program(subcommand: &str) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg(subcommand).env_remove("DATABASE_URL");
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"OTEL_") {
            command.env_remove(name);
        }
    }
    command
}

/// `workload postgres` in a directory of its own, with the system's programs: what
/// `scripts/setup.sh test` installs, so that no test needs the network.
pub fn postgres(directory: &PathBuf) -> Command {
    let mut command = program("postgres");
    command.args(["--with-parent", "--temporary", "--source", "system"]);
    command.arg("--directory").arg(directory);
    command
}

/// The URL of a server that all tests of this program share. It ends with the test program,
/// because its standard input does.
fn server() -> &'static str {
    static SERVER: OnceLock<String> = OnceLock::new();
    SERVER.get_or_init(|| {
        let server = Watched::start(&mut postgres(&scratch("cluster")), "DATABASE_URL=");
        let url = server.announced.clone();
        // Never dropped: the pipe closes when this process ends, however it does.
        std::mem::forget(server);
        url
    })
}

/// The URL of a new, empty database.
pub async fn database() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("shop_{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let server = tokio::task::spawn_blocking(server).await.unwrap();
    let mut connection = PgConnection::connect(server).await.unwrap();
    let create = sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}"));
    connection.execute(create).await.unwrap();
    server.replace("productcatalog", &name)
}

/// `workload product` on a free port and a small catalogue.
pub fn product(url: &str) -> Command {
    let mut command = program("product");
    command
        .args(["--with-parent", "--port", "0", "--products", "500"])
        .env("DATABASE_URL", url);
    command
}

/// Starts the product service; `announced` is its address.
pub fn start_product(url: &str) -> Watched {
    Watched::start(&mut product(url), "listening on ")
}

/// An answer: status, media type, body.
pub struct Answer {
    pub status: StatusCode,
    pub kind: String,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    /// Checks that this is a problem with `status` and gives its code.
    #[track_caller]
    pub fn problem(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{:?}", self.body);
        assert_eq!(self.kind, "application/problem+json");
        let json = self.json();
        assert_eq!(json["status"], status);
        for member in ["type", "title", "detail"] {
            assert!(json[member].is_string(), "{json}");
        }
        json["code"].as_str().unwrap().to_owned()
    }
}

/// The longest that an answer may take: a recording of some seconds, and patience for a busy machine. A test
/// that waits for ever tells nobody what it waits for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Sends one request.
pub async fn send(method: &str, uri: &str) -> Result<Answer, String> {
    send_with(method, uri, &[]).await
}

/// Sends one request with headers.
pub async fn send_with(
    method: &str,
    uri: &str,
    headers: &[(&str, String)],
) -> Result<Answer, String> {
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, exchange(method, uri, headers)).await;
    answer.map_err(|_| format!("{uri}: no answer in {ANSWER_TIMEOUT:?}"))?
}

async fn exchange(method: &str, uri: &str, headers: &[(&str, String)]) -> Result<Answer, String> {
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, value);
    }
    let request = request.body(Empty::new()).map_err(|e| e.to_string())?;
    let response = client.request(request).await.map_err(|e| e.to_string())?;
    let kind = response.headers().get("content-type");
    let kind = kind.map_or("", |kind| kind.to_str().unwrap()).to_owned();
    let status = response.status();
    let body = response.into_body().collect().await;
    let body = body.map_err(|e| e.to_string())?.to_bytes();
    Ok(Answer { status, kind, body })
}

/// The status and headers of a page that must answer.
pub async fn head_of(uri: &str) -> (StatusCode, HeaderMap) {
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let response = client.get(uri.parse().unwrap()).await.unwrap();
    (response.status(), response.headers().clone())
}

/// Gets a page that must answer.
pub async fn get(uri: &str) -> Answer {
    send("GET", uri).await.unwrap()
}

/// Processes whose command line contains `text`.
pub fn processes_with(text: &str) -> Vec<String> {
    let own = std::process::id().to_string();
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_str() != Some(&own))
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(text))
        .collect()
}

/// Waits until `condition` holds, within reason.
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
