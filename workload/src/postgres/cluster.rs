//! A private cluster: its directory, its first initialisation, its server.

use std::fs::{self, File};
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{ConnectOptions, Connection, Executor};
use tokio::process::Command;

use super::PostgresError;
use super::binaries::Binaries;
use super::lock::Lock;
use crate::child::{self, Process};
use crate::db::DATABASE;

/// The role that owns everything in a private cluster.
const ROLE: &str = "shop";

/// Marks a directory as ours; locked while a server runs in it.
const LOCK: &str = "flamestorm.lock";

/// Tells what the data was made by; written when it is complete.
const STAMP: &str = "stamp";

/// A crashed server may have to recover first.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// A fast shutdown writes a checkpoint: seconds on a slow disk.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

/// Between finding a free port and taking it somebody else may.
const PORT_TRIES: u32 = 5;

/// The kernel takes socket paths of at most 107 bytes, of which PostgreSQL's own file name
/// needs 19.
const MAX_SOCKET_DIRECTORY: usize = 88;

/// How much of the server's log an error quotes.
const LOG_TAIL: usize = 1200;

/// A directory of ours with initialised data, locked against a second server.
#[derive(Debug)]
pub struct Cluster {
    directory: PathBuf,
    binaries: Binaries,
    password: String,
    made_now: bool,
    _lock: Lock,
}

impl Cluster {
    /// Opens the cluster in `directory`, making it where it is missing, unfinished, or made by
    /// another version or another `stamp` of settings. `fresh` makes it anew in any case.
    pub async fn open(
        directory: &Path,
        binaries: Binaries,
        fresh: bool,
    ) -> Result<Self, PostgresError> {
        claim(directory)?;
        let lock = Lock::try_take(&directory.join(LOCK))?.ok_or_else(|| PostgresError::InUse {
            directory: directory.to_owned(),
        })?;
        let options = initdb_options(binaries.major());
        let stamp = format!("{}\n{}\n", binaries.version(), options.join(" "));
        let found = fs::read_to_string(directory.join(STAMP)).ok();
        let password = fs::read_to_string(directory.join("password")).ok();
        let mut cluster = Self {
            directory: directory.to_owned(),
            binaries,
            password: password.unwrap_or_default(),
            made_now: false,
            _lock: lock,
        };
        if fresh || found.as_ref() != Some(&stamp) || cluster.password.is_empty() {
            if found.is_some() {
                tracing::info!(directory = %directory.display(), "making the data anew");
            }
            cluster.initialise(&stamp).await?;
        }
        Ok(cluster)
    }

    /// The version of the server.
    pub fn version(&self) -> &str {
        self.binaries.version()
    }

    /// Starts the server. Data that a server refuses is made anew, once: the catalogue can be
    /// generated again, so there is nothing to lose.
    pub async fn start(&mut self) -> Result<Server, PostgresError> {
        match self.start_on_free_port().await {
            Err(error) if !self.made_now && matches!(error, PostgresError::Start { .. }) => {
                tracing::warn!(%error, "the cached data is broken: making it anew");
                let stamp = fs::read_to_string(self.path(STAMP)).unwrap_or_default();
                self.initialise(&stamp).await?;
                self.start_on_free_port().await
            }
            started => started,
        }
    }

    async fn start_on_free_port(&self) -> Result<Server, PostgresError> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.start_on(free_port()?).await {
                Err(PostgresError::PortTaken { .. }) if tries < PORT_TRIES => {}
                started => return started,
            }
        }
    }

    async fn start_on(&self, port: u16) -> Result<Server, PostgresError> {
        let log_path = self.path("postgres.log");
        let log = private_file(&log_path)?;
        let mut command = Command::new(self.binaries.program("postgres"));
        quiet_environment(&mut command)
            .arg("-D")
            .arg(self.path("data"))
            .args(self.settings(port))
            .stdout(std::process::Stdio::null())
            .stderr(log);
        // Immediate shutdown: no checkpoint, no wait for clients; the next start recovers.
        let process = Process::spawn_tied(&mut command, Signal::SIGQUIT).map_err(|error| {
            PostgresError::Start {
                reason: error.to_string(),
                log: log_path.clone(),
            }
        })?;
        let mut server = Server {
            process,
            port,
            password: self.password.clone(),
            log: log_path,
        };
        server.wait_until_ready().await?;
        Ok(server)
    }

    fn settings(&self, port: u16) -> Vec<String> {
        let socket = self.path("socket");
        let socket = match socket.to_str() {
            Some(path) if path.len() <= MAX_SOCKET_DIRECTORY && !path.contains([',', '"']) => path,
            // TCP on loopback alone will do.
            _ => "",
        };
        [
            "listen_addresses=127.0.0.1".to_owned(),
            format!("port={port}"),
            format!("unix_socket_directories={socket}"),
            "unix_socket_permissions=0700".to_owned(),
            "max_connections=100".to_owned(),
            // The whole table stays in memory: the demo exhausts the CPU, not the disk.
            "shared_buffers=256MB".to_owned(),
            // A catalogue that can be generated again needs no wait for the disk.
            "synchronous_commit=off".to_owned(),
            "max_wal_size=1GB".to_owned(),
        ]
        .into_iter()
        .flat_map(|setting| ["-c".to_owned(), setting])
        .collect()
    }

    /// Makes the data in a directory beside its place, so that it is complete or absent.
    async fn initialise(&mut self, stamp: &str) -> Result<(), PostgresError> {
        remove_file(&self.path(STAMP))?;
        for name in ["data", "data.new", "socket"] {
            remove_directory(&self.path(name))?;
        }
        super::make_private_directory(&self.path("socket"))?;
        self.password = random_password()?;
        let password_path = self.path("password");
        write_private(&password_path, &self.password)?;
        let mut command = Command::new(self.binaries.program("initdb"));
        let output = child::tie(quiet_environment(&mut command), Signal::SIGKILL)
            .args(initdb_options(self.binaries.major()))
            .arg("--pwfile")
            .arg(&password_path)
            .arg("-D")
            .arg(self.path("data.new"))
            .stdin(std::process::Stdio::null())
            .output()
            .await
            .map_err(|error| PostgresError::Initdb {
                reason: error.to_string(),
            })?;
        if !output.status.success() {
            let text = [output.stderr, output.stdout].concat();
            return Err(PostgresError::Initdb {
                reason: tail(&String::from_utf8_lossy(&text)),
            });
        }
        let (from, to) = (self.path("data.new"), self.path("data"));
        fs::rename(&from, &to).map_err(|source| PostgresError::File { path: to, source })?;
        self.made_now = true;
        write_private(&self.path(STAMP), stamp)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// UTF-8 by libc, whose character conversion is what the demo's flame graph shows. No checks
/// are skipped and no password is spared: other users of the machine can reach loopback.
const INITDB_OPTIONS: [&str; 7] = [
    "--username=shop",
    "--auth=scram-sha-256",
    "--encoding=UTF8",
    LOCALE_PROVIDER,
    "--locale=C.UTF-8",
    "--data-checksums",
    // What a crash of the machine breaks is noticed and made anew.
    "--no-sync",
];

/// Version 14 knows no other provider, and no such option.
const LOCALE_PROVIDER: &str = "--locale-provider=libc";

fn initdb_options(major: u32) -> Vec<&'static str> {
    let mut options = INITDB_OPTIONS.to_vec();
    options.retain(|option| major >= 15 || *option != LOCALE_PROVIDER);
    options
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    process: Process,
    port: u16,
    password: String,
    log: PathBuf,
}

impl Server {
    /// A `postgresql://` URL with the password, for `DATABASE_URL`.
    pub fn url(&self) -> String {
        let (port, password) = (self.port, &self.password);
        format!("postgresql://{ROLE}:{password}@127.0.0.1:{port}/{DATABASE}")
    }

    /// Waits until the server ends by itself, which it should not.
    pub async fn wait(&mut self) -> PostgresError {
        let reason = match self.process.wait().await {
            Ok(status) => format!("the server ended by itself: {status}"),
            Err(error) => format!("the server cannot be waited for: {error}"),
        };
        self.failed(reason)
    }

    /// Ends the server: sessions are cut off, a checkpoint is written.
    pub async fn stop(&mut self) {
        if let Err(error) = self.process.stop(Signal::SIGINT, STOP_PATIENCE).await {
            tracing::warn!(%error, "PostgreSQL did not stop");
        }
    }

    /// Connects until the server answers, and makes the database.
    async fn wait_until_ready(&mut self) -> Result<(), PostgresError> {
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            let last = match self.make_database().await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            let exited = self.process.child().try_wait().ok().flatten();
            if let Some(status) = exited {
                let error = self.failed(format!("the server ended: {status}"));
                return Err(match &error {
                    PostgresError::Start { reason, .. } if reason.contains("could not bind") => {
                        PostgresError::PortTaken { port: self.port }
                    }
                    _ => error,
                });
            }
            if Instant::now() > deadline || is_final(&last) {
                self.stop().await;
                return Err(self.failed(last.to_string()));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn make_database(&self) -> Result<(), sqlx::Error> {
        let options = PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(self.port)
            .username(ROLE)
            .password(&self.password)
            .database("postgres")
            .disable_statement_logging();
        let mut connection = PgConnection::connect_with(&options).await?;
        let exists: bool =
            sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
                .bind(DATABASE)
                .fetch_one(&mut connection)
                .await?;
        if !exists {
            connection.execute("CREATE DATABASE productcatalog").await?;
        }
        connection.close().await
    }

    fn failed(&self, reason: String) -> PostgresError {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        PostgresError::Start {
            reason: format!("{reason}\n{}", tail(&log)),
            log: self.log.clone(),
        }
    }
}

/// An answer that waiting will not change; "the database system is starting up" (57P03) will.
fn is_final(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(db) if db.code().as_deref() != Some("57P03"))
}

/// Makes `directory` ours: it must be new, empty, or claimed before.
fn claim(directory: &Path) -> Result<(), PostgresError> {
    super::make_private_directory(directory)?;
    let failed = |source| PostgresError::File {
        path: directory.to_owned(),
        source,
    };
    let mut entries = fs::read_dir(directory).map_err(failed)?;
    if directory.join(LOCK).exists() || entries.next().is_none() {
        return Ok(());
    }
    Err(PostgresError::NotOurs {
        directory: directory.to_owned(),
    })
}

/// Removes a directory that was ours, with everything in it.
pub fn remove(directory: &Path) -> Result<(), PostgresError> {
    if directory.join(LOCK).exists() {
        remove_directory(directory)?;
    }
    Ok(())
}

/// Without the caller's `PG…` variables, and with messages that we can read.
fn quiet_environment(command: &mut Command) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("PG")) {
            command.env_remove(name);
        }
    }
    command
        .env_remove("LC_ALL")
        .env("LC_MESSAGES", "C")
        .current_dir("/")
}

fn free_port() -> Result<u16, PostgresError> {
    let port = || TcpListener::bind("127.0.0.1:0")?.local_addr();
    port()
        .map(|address| address.port())
        .map_err(|error| PostgresError::NoPort {
            reason: error.to_string(),
        })
}

/// 128 random bits from the kernel, in hexadecimal.
fn random_password() -> Result<String, PostgresError> {
    let mut bytes = [0_u8; 16];
    let path = Path::new("/dev/urandom");
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|source| PostgresError::File {
            path: path.to_owned(),
            source,
        })?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn private_file(path: &Path) -> Result<File, PostgresError> {
    File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| PostgresError::File {
            path: path.to_owned(),
            source,
        })
}

fn write_private(path: &Path, text: &str) -> Result<(), PostgresError> {
    use std::io::Write;
    private_file(path)?
        .write_all(text.as_bytes())
        .map_err(|source| PostgresError::File {
            path: path.to_owned(),
            source,
        })
}

fn remove_file(path: &Path) -> Result<(), PostgresError> {
    absent(path, fs::remove_file(path))
}

fn remove_directory(path: &Path) -> Result<(), PostgresError> {
    absent(path, fs::remove_dir_all(path))
}

/// What is not there is as good as removed.
fn absent(path: &Path, result: std::io::Result<()>) -> Result<(), PostgresError> {
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(PostgresError::File {
            path: path.to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}

/// The end of a text, at a character's boundary.
fn tail(text: &str) -> String {
    let text = text.trim_end();
    let start = text.len().saturating_sub(LOG_TAIL);
    let start = (start..text.len()).find(|at| text.is_char_boundary(*at));
    text[start.unwrap_or(text.len())..].to_owned()
}
