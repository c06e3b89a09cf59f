//! A PostgreSQL of a test's own: Debian's, in a temporary directory, gone at the end.

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

/// A running server with the superuser `test`, listening on a Unix socket and on loopback.
pub struct Cluster {
    directory: PathBuf,
    /// Removed at the end.
    _own: Option<TempDir>,
    namespace: Option<Namespace>,
    programs: PathBuf,
    pub port: u16,
}

impl Cluster {
    /// Starts one. `None` where there is no PostgreSQL, which has been said;
    /// `FLAMESTORM_REQUIRE_BPF=1` makes that a failure.
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

    /// Starts one in a namespace, in a directory that is seen only there.
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
        // A parameter that is given twice has its last value.
        let path = self.outside("data/postgresql.auto.conf");
        fs::write(&path, configuration).expect("configuration");
        self.control("start");
    }

    /// Where the socket is, too.
    pub fn path(&self) -> &Path {
        &self.directory
    }

    /// A file in it, as the test sees it.
    fn outside(&self, file: &str) -> PathBuf {
        let path = self.directory.join(file);
        match &self.namespace {
            Some(namespace) => namespace.outside(&path),
            None => path,
        }
    }

    /// The Unix socket.
    pub fn socket(&self) -> String {
        format!("{}/.s.PGSQL.{}", self.path().display(), self.port)
    }

    /// The pid of the postmaster, as this test sees it.
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

    /// `pg_ctl start|stop|restart`
    pub fn control(&self, action: &str) {
        let log = self.path().join("log");
        let log = log.to_str().expect("UTF-8");
        self.run(
            "pg_ctl",
            &["-s", "-w", "-m", "fast", "-l", log, action, "-D"],
        );
    }

    /// Runs SQL by psql.
    pub fn sql(&self, sql: &str) -> String {
        let mut command = self.command("psql");
        command.args(["-qAtX", "-v", "ON_ERROR_STOP=1", "-U", "test", "-h"]);
        command.arg(self.path());
        command.args(["-p", &self.port.to_string(), "postgres", "-c", sql]);
        run(command).trim().to_owned()
    }

    /// A program of the server's version, as the server's user.
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

    /// Any program, where the server is.
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

/// A port of loopback that is free now; nobody else on this machine picks it in the next second.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port()
}

/// A directory that the server's user can write to.
pub fn cluster_directory() -> TempDir {
    let directory = tempfile::Builder::new()
        .prefix("flamestorm-cluster-")
        .tempdir()
        .expect("temporary directory");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777))
        .expect("permissions of a directory of ours");
    directory
}

/// The newest of Debian's PostgreSQLs.
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

/// A user without rights, as a server should have: `postgres`, else `nobody`. Name, number, group.
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
