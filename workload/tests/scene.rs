//! The investigator's script: what it needs, what it says when that is missing, and its end, whatever happens.
//! The whole story on a machine that can record is in `end_to_end.rs`.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;
#[path = "common/shop.rs"]
mod shop;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use common::{Watched, eventually, get, processes_with, program, run, scratch, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::sync::{Mutex, MutexGuard};

/// Two shops would need more connections than the server has.
static ONE_SHOP: Mutex<()> = Mutex::const_new(());

/// A shop that is open already, and a directory for pictures and agents.
struct Stage {
    url: String,
    database: String,
    directory: PathBuf,
    _shop: Watched,
    _alone: MutexGuard<'static, ()>,
}

impl Stage {
    async fn open(arguments: &[&str]) -> Self {
        let alone = ONE_SHOP.lock().await;
        let database = common::database().await;
        let mut command = program("all");
        command
            .args(["--with-parent", "--port", "0", "--products", "500"])
            .args(arguments)
            .env("DATABASE_URL", &database);
        let start = move || Watched::start(&mut command, "listening on ");
        let shop = tokio::task::spawn_blocking(start).await.unwrap();
        let directory = scratch("scene");
        fs::create_dir(&directory).unwrap();
        Self {
            url: shop.announced.clone(),
            database,
            directory,
            _shop: shop,
            _alone: alone,
        }
    }

    /// `workload scene ACT --yes` on this shop.
    fn scene(&self, act: &str) -> Command {
        self.long_scene(act, 1)
    }

    fn long_scene(&self, act: &str, rounds: u32) -> Command {
        let mut command = program("scene");
        command.args([act, "--yes", "--url", &self.url]);
        command.args(["--rounds", &rounds.to_string()]);
        command
            .arg("--output-dir")
            .arg(self.directory.join("pictures"));
        command
    }

    /// A program that is asked what the agent is asked: the doctor is content, a recording is `record`.
    fn agent(&self, record: &str) -> PathBuf {
        let agent = self.directory.join("agent");
        let script = format!("#!/bin/sh\n[ \"$1\" = doctor ] && exit 0\n{record}\n");
        fs::write(&agent, script).unwrap();
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755)).unwrap();
        agent
    }

    /// An agent that records for ever, and the file that tells when it began.
    fn endless(&self) -> (PathBuf, PathBuf) {
        let began = self.directory.join("began");
        let record = format!(
            "echo 'recording whole machine' >&2\ntouch {}\nexec sleep 987",
            began.display()
        );
        (self.agent(&record), began)
    }

    async fn status(&self) -> Value {
        get(&format!("{}/api/status", self.url)).await.json()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

async fn run_to_end(mut command: Command) -> (bool, String, String) {
    let ended = tokio::task::spawn_blocking(move || run(&mut command));
    let (status, stdout, stderr) = ended.await.unwrap();
    (status.success(), stdout, stderr)
}

/// Where there is no shop, it says where it looked and how to open one.
#[tokio::test]
async fn without_a_shop() {
    let mut command = program("scene");
    command.args(["9", "--yes", "--url", "http://127.0.0.1:9"]);
    let (success, stdout, stderr) = run_to_end(command).await;
    assert!(!success);
    for part in [
        "http://127.0.0.1:9",
        "refused",
        "workload all --demo",
        "--open",
    ] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    assert_eq!(stdout, "");
}

/// Somebody has to press Enter, or to say that nobody will.
#[tokio::test]
async fn nobody_to_press_enter() {
    let mut command = program("scene");
    command.args(["9", "--url", "http://127.0.0.1:9"]);
    let (success, _, stderr) = run_to_end(command).await;
    assert!(!success && stderr.contains("--yes"), "{stderr}");
}

/// A missing agent and a directory that cannot be written to are told before anything is opened.
#[tokio::test]
async fn what_is_missing_is_told_first() {
    let cluster = scratch("never");
    let missing = |agent: &str, output: &str| {
        let mut command = program("scene");
        command
            .args([
                "9.5",
                "--open",
                "--yes",
                "--agent",
                agent,
                "--output-dir",
                output,
            ])
            .arg("--directory")
            .arg(&cluster);
        run_to_end(command)
    };
    let pictures = scratch("pictures");
    let (success, _, stderr) = missing("/nowhere/flamestorm", pictures.to_str().unwrap()).await;
    assert!(!success);
    assert!(
        stderr.contains("/nowhere/flamestorm") && stderr.contains("make build"),
        "{stderr}"
    );
    let (success, _, stderr) = missing("/bin/true", "/proc/pictures").await;
    assert!(!success);
    assert!(
        stderr.contains("/proc/pictures") && stderr.contains("--output-dir"),
        "{stderr}"
    );
    assert!(!cluster.exists());
    let _ = fs::remove_dir_all(pictures);
}

/// A rehearsal looks at everything, and begins nothing.
#[tokio::test]
async fn a_rehearsal() {
    let stage = Stage::open(&["--demo"]).await;
    let mut command = stage.scene("all");
    command.args(["--rehearse", "--json", "--agent", "/bin/true"]);
    let (success, stdout, stderr) = run_to_end(command).await;
    assert!(success, "{stderr}");
    let told: Value = serde_json::from_str(&stdout).unwrap();
    let checks = told["checks"].as_array().unwrap();
    let names: Vec<&str> = checks
        .iter()
        .map(|it| it["name"].as_str().unwrap())
        .collect();
    for name in [
        "profiler",
        "pictures",
        "gateway",
        "product-service",
        "database",
        "demo",
        "log",
    ] {
        assert!(names.contains(&name), "{names:?}");
    }
    assert!(checks.iter().all(|check| check["ok"] == true), "{checks:?}");
    assert!(told["p95_ms"].is_null());
    assert!(stage.status().await["storm"].is_null());
    // What is missing is named, and is no success.
    let mut command = stage.scene("all");
    command.args(["--rehearse", "--json", "--agent", "/bin/false"]);
    let (success, stdout, stderr) = run_to_end(command).await;
    assert!(
        !success && stderr.contains("not ready: profiler"),
        "{stderr}"
    );
    let told: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(told["success"], false);
}

/// A shop that may not be taken down is left alone.
#[tokio::test]
async fn a_shop_without_demo() {
    let stage = Stage::open(&[]).await;
    let (success, _, stderr) = run_to_end(stage.scene("9")).await;
    assert!(!success && stderr.contains("without --demo"), "{stderr}");
}

/// A storm in a small shop is none: its figures are told all the same, and it is no success. Scene 10 reads what the
/// last one left.
#[tokio::test]
async fn a_storm_in_a_teacup() {
    let stage = Stage::open(&["--demo"]).await;
    // From an earlier time: the story begins without.
    let index = format!("{}/api/demo/index", stage.url);
    let client = |action: &str| {
        let mut command = program("index");
        command.arg(action).env("DATABASE_URL", &stage.database);
        run_to_end(command)
    };
    assert!(client("create").await.0, "{index}");
    let mut command = stage.scene("9");
    command.arg("--json");
    let (success, stdout, stderr) = run_to_end(command).await;
    let told: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(
        stage.status().await["database"]["search_index"],
        false,
        "{stderr}"
    );
    for figure in [
        "baseline_p95_ms",
        "p50_ms",
        "p95_ms",
        "p99_ms",
        "failed_percent",
    ] {
        assert!(told[figure].is_number(), "{figure}: {told}");
    }
    assert_eq!(
        (&told["queries"], &told["executed"]),
        (&43.into(), &43.into())
    );
    assert!(told["traffic"]["completed"].as_u64() > Some(100), "{told}");
    assert!(told["failures"].is_object() && told["active_max"].is_number());
    // Whether 500 products can exhaust anything depends on the machine, and the verdict on the figures.
    let is_one = told["problems"].as_array().unwrap().is_empty();
    assert_eq!(told["success"], is_one);
    assert_eq!(success, is_one, "{stderr}");

    let mut command = stage.scene("10");
    command.arg("--json");
    let (success, stdout, stderr) = run_to_end(command).await;
    let read: Value = serde_json::from_str(&stdout).unwrap();
    assert!(!read["errors"]["diagnosis"].as_array().unwrap().is_empty());
    // A storm without errors leaves nothing to read, and another one is had.
    assert_eq!(success, read["failed"].as_u64() > Some(0), "{stderr}");
    assert_eq!(
        read["p95_ms"] == told["p95_ms"],
        told["failed"].as_u64() > Some(0)
    );
    assert_eq!(stage.status().await["storm"]["running"], false);
}

/// An agent that fails, and one that writes nothing, fail the scene, in the agent's own words.
#[tokio::test]
async fn a_failing_agent() {
    let stage = Stage::open(&["--demo"]).await;
    let mut command = stage.scene("9.5");
    command
        .arg("--agent")
        .arg(stage.agent("echo 'flamestorm: no room' >&2; exit 1"));
    let (success, _, stderr) = run_to_end(command).await;
    assert!(!success && stderr.contains("no room"), "{stderr}");

    let idle = "echo recording >&2\ntrap 'echo \"{}\"; exit 0' INT\nwhile :; do sleep 0.05; done";
    let mut command = stage.scene("9.5");
    command.arg("--agent").arg(stage.agent(idle));
    let (success, _, stderr) = run_to_end(command).await;
    assert!(!success, "{stderr}");
    assert!(
        stderr.contains("did not write") && stderr.contains("baseline.svg"),
        "{stderr}"
    );
}

/// Ctrl-C, SIGTERM and SIGKILL in the middle of a recording: nothing is left.
#[tokio::test]
async fn an_interrupted_scene_leaves_nothing() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let stage = Stage::open(&["--demo"]).await;
        let (agent, began) = stage.endless();
        let mut command = stage.scene("9.5");
        command
            .arg("--agent")
            .arg(&agent)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut scene = command.spawn().unwrap();
        eventually("the agent records", || began.exists());
        let children = children_of(scene.id());
        assert_eq!(children.len(), 1, "the agent");
        kill(Pid::from_raw(scene.id().cast_signed()), signal).unwrap();
        assert!(!wait(&mut scene).success());
        eventually("the agent has gone", || !is_running(children[0]));
        if signal != Signal::SIGKILL {
            let said = std::io::read_to_string(scene.stderr.take().unwrap()).unwrap();
            assert!(said.contains("interrupted"), "{said}");
        }
        assert_eq!(stage.status().await["storm"], Value::Null);
    }
}

/// Ctrl-C in the middle of a storm: it ends with its round, and the index that was made meanwhile goes. A scene that
/// finds a storm under way leaves it alone.
#[tokio::test]
async fn an_interrupted_storm() {
    let stage = Stage::open(&["--demo"]).await;
    // Long enough to be interrupted: each statement sleeps in the database.
    let mut command = stage.long_scene("9", 20);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut scene = command.spawn().unwrap();
    let slow = format!("{}/api/demo/enable-slow-queries", stage.url);
    // After the scene's own reset.
    let mut said = std::io::BufReader::new(scene.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("visitors browse") {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut said, &mut line).unwrap() > 0);
    }
    let slowed = shop::post(&slow, &serde_json::json!({"delay_ms": 700})).await;
    assert_eq!(slowed.status, 200);
    while !line.contains("the storm begins") {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut said, &mut line).unwrap() > 0);
    }
    shop::until(&format!("{}/api/demo/storm", stage.url), "a round", |it| {
        it["round"].as_u64() >= Some(1)
    })
    .await;
    let (success, _, stderr) = run_to_end(stage.scene("9")).await;
    assert!(!success && stderr.contains("not ready: storm"), "{stderr}");
    let mut index = program("index");
    index.arg("create").env("DATABASE_URL", &stage.database);
    assert!(run_to_end(index).await.0);
    kill(Pid::from_raw(scene.id().cast_signed()), Signal::SIGINT).unwrap();
    assert!(!wait(&mut scene).success());
    let storm = shop::until(&format!("{}/api/demo/storm", stage.url), "the end", |it| {
        it["running"] == false
    })
    .await;
    assert!(storm["report"]["rounds"].as_u64() < Some(20), "{storm}");
    assert_eq!(stage.status().await["database"]["search_index"], false);
}

/// A shop that was opened for the scene goes with it, however that ends.
#[tokio::test]
async fn an_opened_shop_goes_with_the_scene() {
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let stage = Stage::open(&["--demo"]).await;
        let (agent, began) = stage.endless();
        let cluster = scratch("opened");
        let mut command = program("scene");
        command
            .args([
                "9.5",
                "--open",
                "--yes",
                "--products",
                "500",
                "--source",
                "system",
            ])
            .arg("--directory")
            .arg(&cluster)
            .arg("--output-dir")
            .arg(stage.directory.join("pictures"))
            .arg("--agent")
            .arg(&agent)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut scene: Child = command.spawn().unwrap();
        eventually("the agent records", || began.exists());
        assert!(!belongings(&cluster).is_empty());
        kill(Pid::from_raw(scene.id().cast_signed()), signal).unwrap();
        assert!(!wait(&mut scene).success());
        eventually("everything has gone", || belongings(&cluster).is_empty());
        let _ = fs::remove_dir_all(cluster);
    }
}

/// The processes of a private PostgreSQL, its supervisor, and the shop that has it.
fn belongings(cluster: &Path) -> Vec<String> {
    processes_with(cluster.to_str().unwrap())
}

fn children_of(parent: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{parent}/task"))
        .unwrap()
        .flatten();
    tasks
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .map(|pid| pid.parse().unwrap())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Whether a process is there and not merely waiting to be reaped.
fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')')
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}
