//! A PostgreSQL server of one test: Debian's programs, with data in a temporary directory that is removed
//! at the end.

use std::{
    fs,
    io::Write as _,
    net::TcpListener,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use super::{namespace::Namespace, programs::run};

/// A running server with the superuser `test`. It listens on a Unix socket and on loopback.
pub struct Cluster {
    directory: PathBuf,
    /// The temporary directory, if this created it. Removed when dropped.
    _own: Option<TempDir>,
    namespace: Option<Namespace>,
    programs: PathBuf,
    pub port: u16,
}

impl Cluster {
    /// Starts a server. Where PostgreSQL is not installed, says so and returns `None`, or fails if
    /// `FLAMESTORM_REQUIRE_BPF=1`.
    pub fn start(settings: &str) -> Option<Cluster> {
        let programs = programs()?;
        let directory = cluster_directory();
        let mut cluster = Cluster {
            directory: directory.path().to_owned(),
            _own: Some(directory),
            namespace: None,
            programs,
            port: free_port(),
        };
        cluster.begin(settings);
        Some(cluster)
    }

    /// Starts a server in namespaces, in a directory that is mounted only there.
    pub fn start_in(
        namespace: Namespace,
        directory: &Path,
        port: u16,
        settings: &str,
    ) -> Option<Cluster> {
        let programs = programs()?;
        let mut cluster = Cluster {
            directory: directory.to_owned(),
            _own: None,
            namespace: Some(namespace),
            programs,
            port,
        };
        cluster.begin(settings);
        Some(cluster)
    }

    fn begin(&mut self, settings: &str) {
        self.run(
            "initdb",
            &[
                "-U",
                "test",
                "-A",
                "trust",
                "--no-sync",
                "--locale=C.UTF-8",
                "-D",
            ],
        );
        let (socket, port) = (self.path().display(), self.port);
        let configuration = format!(
            "listen_addresses = '127.0.0.1, ::1'\nport = {port}\nunix_socket_directories = '{socket}'\n\
             fsync = off\nautovacuum = off\njit = off\n{settings}\n"
        );
        // The last value of a repeated parameter counts, so `settings` override the defaults above.
        let path = self.outside("data/postgresql.auto.conf");
        fs::write(&path, configuration).expect("configuration");
        self.control("start");
    }

    /// The directory of the server, which also contains its socket.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// A file in the directory, as the test sees it.
    fn outside(&self, file: &str) -> PathBuf {
        let path = self.directory.join(file);
        match &self.namespace {
            Some(namespace) => namespace.outside(&path),
            None => path,
        }
    }

    /// The path of the Unix socket.
    pub fn socket(&self) -> String {
        format!("{}/.s.PGSQL.{}", self.path().display(), self.port)
    }

    /// The pid of the postmaster, as the test sees it.
    pub fn postmaster(&self) -> u32 {
        let path = self.outside("data/postmaster.pid");
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let pid = text.lines().next().and_then(|line| line.parse().ok());
        let pid = pid.unwrap_or_else(|| panic!("{text}"));
        match &self.namespace {
            Some(namespace) => namespace.pid_outside(pid),
            None => pid,
        }
    }

    /// Runs `pg_ctl start`, `stop` or `restart`.
    pub fn control(&self, action: &str) {
        let log = self.path().join("log");
        let log = log.to_str().expect("UTF-8");
        self.run(
            "pg_ctl",
            &["-s", "-w", "-m", "fast", "-l", log, action, "-D"],
        );
    }

    /// Runs SQL by psql and returns what it printed.
    pub fn sql(&self, sql: &str) -> String {
        let mut command = self.command("psql");
        command.args(["-qAtX", "-v", "ON_ERROR_STOP=1", "-U", "test", "-h"]);
        command.arg(self.path());
        command.args(["-p", &self.port.to_string(), "postgres", "-c", sql]);
        run(command).trim().to_owned()
    }

    /// A command that runs one of the server's own programs, as the server's user.
    pub fn command(&self, program: &str) -> Command {
        let program = self.programs.join(program);
        // PostgreSQL refuses to run as root.
        // SAFETY: a query without side effects.
        let is_root = unsafe { libc::geteuid() } == 0;
        let user = is_root.then(|| {
            let (_, user, group) = unprivileged();
            (user, group)
        });
        if let Some(namespace) = &self.namespace {
            return namespace.command(program, user);
        }
        let mut command = Command::new(program);
        command.current_dir(self.path());
        if let Some((user, group)) = user {
            command.uid(user).gid(group);
        }
        command
    }

    /// A command that runs any program in the same namespaces as the server.
    pub fn beside(&self, program: &Path) -> Command {
        match &self.namespace {
            Some(namespace) => namespace.command(program, None),
            None => Command::new(program),
        }
    }

    fn run(&self, program: &str, args: &[&str]) {
        let mut command = self.command(program);
        command.args(args).arg(self.path().join("data"));
        run(command);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let mut stop = self.command("pg_ctl");
        stop.args(["-s", "-w", "-m", "immediate", "stop", "-D"]);
        let _ = stop.arg(self.path().join("data")).output();
    }
}

/// A port that is free on loopback now. The kernel does not choose it for another socket within the next
/// second.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port()
}

/// A temporary directory to which the server's user can write.
pub fn cluster_directory() -> TempDir {
    let directory = tempfile::Builder::new()
        .prefix("flamestorm-cluster-")
        .tempdir()
        .expect("temporary directory");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777))
        .expect("permissions of a directory of ours");
    directory
}

/// The program directory of the newest PostgreSQL that Debian has installed.
fn programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten();
    let found = versions
        .map(|version| version.path().join("bin"))
        .filter(|programs| programs.join("initdb").exists())
        .max();
    if found.is_none() {
        assert!(
            std::env::var_os("FLAMESTORM_REQUIRE_BPF").is_none_or(|value| value != "1"),
            "no /usr/lib/postgresql/*/bin: apt-get install --no-install-recommends postgresql-15"
        );
        writeln!(std::io::stderr(), "SKIPPED: no PostgreSQL").expect("standard error");
    }
    found
}

/// A user without privileges, as a server should have: `postgres`, or `nobody` where that does not exist.
/// Name, user id and group id.
pub fn unprivileged() -> (&'static str, u32, u32) {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let of = |name: &'static str| {
        let line = users
            .lines()
            .find(|line| line.split(':').next() == Some(name))?;
        let mut numbers = line.split(':').skip(2).map_while(|part| part.parse().ok());
        Some((name, numbers.next()?, numbers.next()?))
    };
    of("postgres")
        .or_else(|| of("nobody"))
        .expect("the user nobody")
}
