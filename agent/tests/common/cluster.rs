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

use super::programs::run;

/// A running server with the superuser `test`, listening on a Unix socket and on loopback.
pub struct Cluster {
    directory: TempDir,
    programs: PathBuf,
    pub port: u16,
}

impl Cluster {
    /// Starts one. `None` where there is no PostgreSQL, which has been said;
    /// `FLAMESTORM_REQUIRE_BPF=1` makes that a failure.
    pub fn start(settings: &str) -> Option<Cluster> {
        let Some(programs) = programs() else {
            assert!(
                std::env::var_os("FLAMESTORM_REQUIRE_BPF").is_none_or(|value| value != "1"),
                "no /usr/lib/postgresql/*/bin: apt-get install --no-install-recommends postgresql-15"
            );
            writeln!(std::io::stderr(), "SKIPPED: no PostgreSQL").expect("standard error");
            return None;
        };
        let directory = tempfile::Builder::new()
            .prefix("flamestorm-cluster-")
            .tempdir()
            .expect("temporary directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777))
            .expect("permissions of a directory of ours");
        // Free now; nobody else on this machine picks it in the next second.
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .expect("a free port")
            .port();
        let cluster = Cluster {
            directory,
            programs,
            port,
        };
        cluster.run(
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
        let socket = cluster.path().display();
        let configuration = format!(
            "listen_addresses = '127.0.0.1, ::1'\nport = {port}\nunix_socket_directories = '{socket}'\n\
             fsync = off\nautovacuum = off\njit = off\n{settings}\n"
        );
        // A parameter that is given twice has its last value.
        let path = cluster.path().join("data/postgresql.auto.conf");
        fs::write(&path, configuration).expect("configuration");
        cluster.control("start");
        Some(cluster)
    }

    /// Where the socket is, too.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The Unix socket.
    pub fn socket(&self) -> String {
        format!("{}/.s.PGSQL.{}", self.path().display(), self.port)
    }

    /// The pid of the postmaster, as this test sees it.
    pub fn postmaster(&self) -> u32 {
        let path = self.path().join("data/postmaster.pid");
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let pid = text.lines().next().and_then(|line| line.parse().ok());
        pid.unwrap_or_else(|| panic!("{text}"))
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
        let mut command = Command::new(self.programs.join(program));
        command.current_dir(self.path());
        // SAFETY: a query without side effects.
        if unsafe { libc::geteuid() } == 0 {
            // PostgreSQL refuses to run as root.
            let (user, group) = unprivileged();
            command.uid(user).gid(group);
        }
        command
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

/// The newest of Debian's PostgreSQLs.
fn programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?.flatten();
    let programs = versions.map(|version| version.path().join("bin"));
    programs
        .filter(|programs| programs.join("initdb").exists())
        .max()
}

/// User and group of `postgres`, else of `nobody`.
fn unprivileged() -> (u32, u32) {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let of = |name: &str| {
        let line = users
            .lines()
            .find(|line| line.split(':').next() == Some(name))?;
        let mut numbers = line.split(':').skip(2).map_while(|part| part.parse().ok());
        Some((numbers.next()?, numbers.next()?))
    };
    of("postgres")
        .or_else(|| of("nobody"))
        .unwrap_or((65_534, 65_534))
}
