//! What a PostgreSQL process is, according to its title.

/// A title of at least this many bytes may have been cut. The sampling
/// program reads up to 127 bytes of a title and a NUL ([`agent_ebpf::postgres::TITLE_BYTES`]).
const MAYBE_CUT: usize = 127;

/// What a process title says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Title {
    /// The server's setting `cluster_name`, if it has one (on Debian, for example, `15/main`).
    pub cluster: Option<String>,
    /// What the process is.
    pub kind: Kind,
}

/// What a PostgreSQL process is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A backend that serves a client.
    Client {
        /// The role that logged in.
        user: String,
        /// The database.
        database: String,
        /// How the client is connected.
        client: Client,
    },
    /// A process that helps another backend with its query.
    ParallelWorker {
        /// Process id of that backend, in the pid namespace of the server.
        leader: u32,
    },
    /// A process that vacuums a database.
    Autovacuum {
        /// The database; `None` until the worker has connected to it.
        database: Option<String>,
    },
    /// Any other process of the server, including the processes of extensions.
    Background {
        /// Its kind, without its current activity: `checkpointer`, `walsender` ….
        name: String,
    },
    /// The server itself, the parent of all others.
    Postmaster,
    /// Not a process of PostgreSQL, or the title says too little.
    Unknown,
}

/// How a client is connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Client {
    /// By a Unix socket.
    Local,
    /// By TCP.
    Tcp {
        /// Its address; its host name if the setting `log_hostname` is on.
        host: String,
        /// Its port.
        port: u16,
    },
}

/// Processes that add their current activity to their name.
const BACKGROUND: [&str; 17] = [
    "archiver",
    "autovacuum launcher",
    "background writer",
    "bgwriter",
    "checkpointer",
    "io worker",
    "logger",
    "logical replication apply worker",
    "logical replication launcher",
    "logical replication parallel apply worker",
    "logical replication tablesync worker",
    "logical replication worker",
    "slotsync worker",
    "startup",
    "stats collector",
    "walreceiver",
    "walsender",
];

/// Parses the title of a process. `cmdline` is `/proc/PID/cmdline` or the memory behind it: the arguments
/// up to a NUL, or cut at 127 bytes.
///
/// The formats are those of versions 14 to 18 (`init_ps_display` and `set_ps_display` in
/// <https://github.com/postgres/postgres/blob/REL_18_STABLE/src/backend/utils/misc/ps_status.c>,
/// `BackendInitialize` for clients): `postgres: [cluster: ]user database host(port) activity` and
/// `postgres: [cluster: ]kind activity`. With `update_process_title` off, the activity is missing.
///
/// Names are not quoted in a title, so some titles are ambiguous, and the result is a guess:
/// - if the name of a user or a database contains spaces, the first word is taken for the user;
/// - the name of a cluster ends at the first `: `; on a server without a cluster name, the name of a user
///   or a background worker that contains `: ` (`Citus Maintenance Daemon: 16384/10`) is taken for a
///   cluster and what follows it;
/// - a user called `autovacuum` with a database called `worker`, and the like, are taken for the process of
///   that name.
///
/// A backend whose user is not known yet is [`Kind::Unknown`] or [`Kind::Background`].
pub fn title(cmdline: &[u8]) -> Title {
    let zero = cmdline.iter().position(|&byte| byte == 0);
    let maybe_cut = zero.unwrap_or(cmdline.len()) >= MAYBE_CUT;
    let text = String::from_utf8_lossy(&cmdline[..zero.unwrap_or(cmdline.len())]);
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    let Some(title) = text.strip_prefix("postgres: ") else {
        let program = text.rsplit('/').next().unwrap_or_default();
        let is_server = matches!(program, "postgres" | "postmaster");
        let kind = if is_server {
            Kind::Postmaster
        } else {
            Kind::Unknown
        };
        return Title {
            cluster: None,
            kind,
        };
    };
    let (cluster, rest) = match title.split_once(": ") {
        Some((cluster, rest)) if !cluster.contains('(') => (Some(cluster.to_owned()), rest),
        _ => (None, title),
    };
    let kind = kind(rest.trim_end(), maybe_cut);
    Title { cluster, kind }
}

/// Parses the part after the name of the cluster.
fn kind(title: &str, maybe_cut: bool) -> Kind {
    if let Some(pid) = title.strip_prefix("parallel worker for PID ") {
        return match pid.parse() {
            Ok(leader) if !maybe_cut => Kind::ParallelWorker { leader },
            _ => Kind::Unknown,
        };
    }
    if let Some(database) = title.strip_prefix("autovacuum worker") {
        let database = Some(database.trim_start()).filter(|name| !name.is_empty());
        return Kind::Autovacuum {
            database: database.map(str::to_owned),
        };
    }
    let is = |name: &&&str| {
        let rest = title.strip_prefix(**name);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
    };
    if let Some(name) = BACKGROUND.iter().find(is)
        // A role may have the name of such a process, so a title that names a client is a backend's. Only a
        // walsender's title names its client as well.
        && (*name == "walsender" || client(title).is_none())
    {
        return Kind::Background {
            name: (*name).to_owned(),
        };
    }
    match client(title) {
        Some(client) => client,
        None if title.is_empty() || maybe_cut => Kind::Unknown,
        None => Kind::Background {
            name: title.to_owned(),
        },
    }
}

/// A client's backend. The host is the first word that can be one and has a user and a database before it.
fn client(title: &str) -> Option<Kind> {
    let mut at = 0;
    for word in title.split(' ') {
        let names = title[..at].trim_end();
        at += word.len() + 1;
        let Some((user, database)) = names.split_once(' ') else {
            continue;
        };
        if let Some(client) = host(word) {
            return Some(Kind::Client {
                user: user.to_owned(),
                database: database.to_owned(),
                client,
            });
        }
    }
    None
}

/// Parses `[local]`, `127.0.0.1(5432)` or `::1(5432)`.
fn host(word: &str) -> Option<Client> {
    if word == "[local]" {
        return Some(Client::Local);
    }
    let (host, port) = word.strip_suffix(')')?.rsplit_once('(')?;
    Some(Client::Tcp {
        host: Some(host).filter(|host| !host.is_empty())?.to_owned(),
        port: port.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Client {
        Client::Tcp {
            host: host.into(),
            port,
        }
    }

    /// Titles of backends with clients: as Debian's PostgreSQL 15 shows them, and as the source of the
    /// other versions formats them.
    #[test]
    fn clients() {
        for (text, cluster, user, database, client) in [
            (
                "15/main: a b c 127.0.0.1(59890) SELECT\0\0\0",
                Some("15/main"),
                "a",
                "b c",
                tcp("127.0.0.1", 59890),
            ),
            (
                "15/main: postgres postgres ::1(60472) SELECT\0\0",
                Some("15/main"),
                "postgres",
                "postgres",
                tcp("::1", 60472),
            ),
            (
                "15/main: postgres postgres [local] idle in transaction\0",
                Some("15/main"),
                "postgres",
                "postgres",
                Client::Local,
            ),
            (
                "app shop fe80::1%eth0(65535) idle",
                None,
                "app",
                "shop",
                tcp("fe80::1%eth0", 65535),
            ),
            (
                "app shop db.example.com(1) UPDATE waiting",
                None,
                "app",
                "shop",
                tcp("db.example.com", 1),
            ),
            // `update_process_title` off.
            ("app shop [local] ", None, "app", "shop", Client::Local),
            (
                "startup shop [local] authentication",
                None,
                "startup",
                "shop",
                Client::Local,
            ),
        ] {
            let title = title(format!("postgres: {text}").as_bytes());
            assert_eq!(title.cluster.as_deref(), cluster, "{text}");
            let (user, database) = (user.into(), database.into());
            assert_eq!(
                title.kind,
                Kind::Client {
                    user,
                    database,
                    client
                },
                "{text}"
            );
        }
    }

    #[test]
    fn background_processes() {
        for (text, name) in [
            ("checkpointer \0\0", "checkpointer"),
            ("background writer ", "background writer"),
            ("walwriter ", "walwriter"),
            ("walsummarizer ", "walsummarizer"),
            ("autovacuum launcher ", "autovacuum launcher"),
            ("archiver last was 00000001000000000000000D", "archiver"),
            ("startup recovering 000000010000000000000003", "startup"),
            ("stats collector ", "stats collector"),
            ("io worker 2", "io worker"),
            ("slotsync worker ", "slotsync worker"),
            ("walreceiver streaming 0/3000148", "walreceiver"),
            (
                "walsender replicator 10.0.0.2(51000) streaming 0/3000148",
                "walsender",
            ),
            ("walsender postgres [local] START_REPLICATION", "walsender"),
            ("walsender app shop ::1(51000) idle", "walsender"),
            (
                "logical replication launcher ",
                "logical replication launcher",
            ),
            (
                "logical replication worker for subscription 16394 ",
                "logical replication worker",
            ),
            (
                "logical replication apply worker for subscription 16394 ",
                "logical replication apply worker",
            ),
            (
                "logical replication tablesync worker for subscription 1 sync 2",
                "logical replication tablesync worker",
            ),
            (
                "TimescaleDB Background Worker Launcher ",
                "TimescaleDB Background Worker Launcher",
            ),
        ] {
            for (prefix, cluster) in [
                ("postgres: ", None),
                ("postgres: 15/main: ", Some("15/main")),
            ] {
                let title = title(format!("{prefix}{text}").as_bytes());
                assert_eq!(title.cluster.as_deref(), cluster, "{text}");
                assert_eq!(title.kind, Kind::Background { name: name.into() }, "{text}");
            }
        }
    }

    #[test]
    fn workers() {
        let kind = |text: &str| title(text.as_bytes()).kind;
        let worker = "postgres: 15/main: parallel worker for PID 24787 \0\0\0";
        assert_eq!(kind(worker), Kind::ParallelWorker { leader: 24787 });
        assert_eq!(kind("postgres: parallel worker for PID x"), Kind::Unknown);
        // Cut within the number.
        let long = format!("postgres: {}: parallel worker for PID 12", "c".repeat(90));
        assert_eq!(kind(&long), Kind::Unknown);
        // The kernel ends what it cuts with a NUL.
        assert_eq!(kind(&format!("{long:.127}\0")), Kind::Unknown);
        let client = format!("postgres: {} {} 127.0", "u".repeat(60), "d".repeat(60));
        assert_eq!(kind(&format!("{client:.127}\0")), Kind::Unknown);
        let vacuum = |database: Option<&str>| Kind::Autovacuum {
            database: database.map(str::to_owned),
        };
        assert_eq!(
            kind("postgres: 15/main: autovacuum worker my db\0"),
            vacuum(Some("my db"))
        );
        assert_eq!(kind("postgres: autovacuum worker "), vacuum(None));
    }

    #[test]
    fn others() {
        for (cmdline, expected) in [
            (
                "/usr/lib/postgresql/15/bin/postgres\0-D\0/data\0",
                Kind::Postmaster,
            ),
            ("postgres", Kind::Postmaster),
            ("/usr/bin/psql\0-c\0postgres: x", Kind::Unknown),
            ("postgres: ", Kind::Unknown),
            ("", Kind::Unknown),
        ] {
            let expected = Title {
                cluster: None,
                kind: expected,
            };
            assert_eq!(title(cmdline.as_bytes()), expected, "{cmdline}");
        }
        title(b"postgres: \xff\xfe \xc3(\xff [local]");
    }
}
