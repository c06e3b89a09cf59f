//! The private PostgreSQL: its end, its locks, and its repair.

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Watched, eventually, postgres, processes_with, run, scratch};
use nix::sys::signal::Signal;
use sqlx::{Connection, PgConnection};

const READY: &str = "DATABASE_URL=";

/// A cluster that stays when its supervisor ends, for the tests that start it again.
fn lasting(directory: &PathBuf) -> Command {
    let mut command = common::program("postgres");
    command.args(["--with-parent", "--source", "system", "--directory"]);
    command.arg(directory);
    command
}

fn servers(directory: &Path) -> Vec<String> {
    processes_with(&format!("-D {}/data", directory.display()))
}

/// The supervisor is killed: PostgreSQL goes with it.
#[test]
fn postgres_dies_with_its_supervisor() {
    let directory = scratch("killed");
    let mut server = Watched::start(&mut lasting(&directory), READY);
    assert_eq!(servers(&directory).len(), 1);
    server.signal(Signal::SIGKILL);
    server.wait();
    eventually("PostgreSQL has gone", || servers(&directory).is_empty());
    // What the kill left behind recovers.
    let mut again = Watched::start(&mut lasting(&directory), READY);
    again.signal(Signal::SIGTERM);
    assert!(again.wait().success());
    assert!(servers(&directory).is_empty());
    fs::remove_dir_all(directory).unwrap();
}

/// The supervisor's parent is killed: both go.
#[test]
fn postgres_dies_with_its_grandparent() {
    let directory = scratch("orphaned");
    let command = lasting(&directory);
    // A shell stands for the demo: it holds the other end of the pipe, and is killed.
    let mut shell = Command::new("sh");
    shell
        .arg("-c")
        .arg("sleep 1000 | \"$@\"; true")
        .arg("sh")
        .arg(command.get_program())
        .args(command.get_args())
        .env_remove("DATABASE_URL");
    std::os::unix::process::CommandExt::process_group(&mut shell, 0);
    let mut parent = Watched::start(&mut shell, READY);
    assert_eq!(servers(&directory).len(), 1);
    // The pipe's writer is the shell's child `sleep`; kill both, but not the supervisor.
    let writer = fs::read_dir("/proc").unwrap().flatten().find(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        stat.contains("(sleep)") && stat.contains(&format!(" {} ", parent.child.id()))
    });
    let writer: i32 = writer
        .unwrap()
        .file_name()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(writer), Signal::SIGKILL).unwrap();
    parent.signal(Signal::SIGKILL);
    parent.wait();
    eventually("PostgreSQL has gone", || servers(&directory).is_empty());
    eventually("the supervisor has gone", || {
        processes_with(directory.to_str().unwrap()).is_empty()
    });
    fs::remove_dir_all(directory).unwrap();
}

/// The cluster is for its owner alone: loopback, a password, private files, never root.
#[tokio::test]
async fn the_cluster_is_private() {
    let directory = scratch("private");
    let mut server = Watched::start(&mut postgres(&directory), READY);
    let url = server.announced.clone();
    assert!(url.contains("@127.0.0.1:"), "{url}");
    let metadata = fs::metadata(&directory).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o700);
    assert_ne!(metadata.uid(), 0);
    let password = fs::metadata(directory.join("password")).unwrap();
    assert_eq!(password.permissions().mode() & 0o777, 0o600);

    let mut connection = PgConnection::connect(&url).await.unwrap();
    let addresses: String = sqlx::query_scalar("SHOW listen_addresses")
        .fetch_one(&mut connection)
        .await
        .unwrap();
    assert_eq!(addresses, "127.0.0.1");
    let (user, rest) = url.split_once("shop:").unwrap();
    let (_, rest) = rest.split_once('@').unwrap();
    let wrong = format!("{user}shop:guess@{rest}");
    assert!(PgConnection::connect(&wrong).await.is_err());

    connection.close().await.unwrap();
    server.signal(Signal::SIGINT);
    assert!(server.wait().success());
    assert!(!directory.exists(), "--temporary leaves nothing");
}

/// A second server in the same directory is refused, and says which.
#[test]
fn a_directory_has_one_server() {
    let directory = scratch("shared");
    let _server = Watched::start(&mut postgres(&directory), READY);
    let (status, _, stderr) = run(&mut postgres(&directory));
    assert!(!status.success());
    assert!(
        stderr.contains("another private PostgreSQL is running"),
        "{stderr}"
    );
    assert!(stderr.contains(directory.to_str().unwrap()), "{stderr}");
    assert!(
        directory.exists(),
        "the first one's directory is not removed"
    );
}

/// A directory with somebody's files in it is left alone.
#[test]
fn a_strange_directory_is_refused() {
    let directory = scratch("strange");
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(directory.join("letter"), "dear").unwrap();
    let (status, _, stderr) = run(&mut postgres(&directory));
    assert!(!status.success());
    assert!(stderr.contains("--directory"), "{stderr}");
    assert_eq!(
        fs::read_to_string(directory.join("letter")).unwrap(),
        "dear"
    );
    fs::remove_dir_all(directory).unwrap();
}

/// Broken data, an unfinished initialisation and another version's data are made anew.
#[test]
fn broken_data_is_made_anew() {
    let directory = scratch("broken");
    let start = || {
        let mut server = Watched::start(&mut lasting(&directory), READY);
        server.signal(Signal::SIGTERM);
        assert!(server.wait().success());
    };
    start();
    fs::remove_file(directory.join("data/global/pg_control")).unwrap();
    start();
    let keep = directory.join("data/keep");
    fs::write(&keep, "").unwrap();
    start();
    assert!(keep.exists(), "good data is kept");
    fs::write(directory.join("stamp"), "9.6\n").unwrap();
    start();
    assert!(!keep.exists(), "another version's data is not");
    fs::remove_file(directory.join("stamp")).unwrap();
    fs::create_dir(directory.join("data.new")).unwrap();
    start();
    fs::remove_dir_all(directory).unwrap();
}

/// Without programs, or with a directory that cannot be made, there is an error and a way out.
#[test]
fn a_server_that_cannot_start_says_why() {
    let mut command = common::program("postgres");
    let (status, _, stderr) =
        run(command.args(["--source", "/nowhere/bin", "--directory", "/tmp/x"]));
    assert!(!status.success());
    assert!(stderr.contains("/nowhere/bin"), "{stderr}");

    let (status, _, stderr) = run(&mut lasting(&"/proc/nowhere".into()));
    assert!(!status.success());
    assert!(stderr.contains("/proc/nowhere"), "{stderr}");

    let mut command = postgres(&scratch("user"));
    let (status, _, stderr) = run(command.args(["--user", "no-such-user"]));
    assert!(!status.success());
    assert!(stderr.contains("no-such-user"), "{stderr}");
}
