//! Finds the address spaces that belong to a PostgreSQL server, and those that publish trace contexts, by
//! the symbols that their files export.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::Read as _,
    path::Path,
    sync::mpsc::Receiver,
    time::{Duration, Instant},
};

use agent_ebpf::{limits::MAX_SERVERS, postgres};
use rustix::fs::OFlags;

use crate::{
    clock::now,
    cost::Priority,
    file::{directory_of, open_found},
    kernel::{Error, Kernel, Senders},
    mapped::Objects,
    pool::{Answer, Subject, WorkerPool},
    process::{AddressSpace, Backing, ObjectId, own_pid, parent_of, process_exe},
};

/// The maximum number of bytes that are read of a file in a data directory.
const MAX_FILE: u64 = 4096;

/// How long a server that starts may take until it listens on the port in its `postmaster.pid`.
const PORT_PATIENCE: Duration = Duration::from_secs(60);

/// The interval at which such a server is checked during that time.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// The maximum number of bytes that are read of a list of sockets. Sockets that listen come first in the
/// lists of TCP sockets.
const MAX_SOCKETS: u64 = 8 << 20;

/// The maximum number of file descriptors of a process that are examined.
const MAX_DESCRIPTORS: usize = 4096;

/// What the kernel needs to know about the processes of an address space.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// See [`agent_ebpf::table::Space::server`].
    pub server: u32,
    /// See [`agent_ebpf::table::Space::trace_offset`].
    pub trace_offset: i32,
    /// Whether it looks like a server's address space, but there was no room for another server.
    pub found_no_place: bool,
}

/// A PostgreSQL server: one postmaster and its children.
#[derive(Debug)]
pub struct Server {
    /// Number of the server in this recording. Unlike its index, it is not reused for another server.
    pub number: u32,
    /// The postmaster; another process of the server if the postmaster could not be determined.
    pub pid: u32,
    /// Major version, from `PG_VERSION` in its data directory.
    pub version: Option<u32>,
    /// Port from `postmaster.pid`, once the server has been seen to listen on it.
    pub port: Option<u16>,
    /// Since when the sends of its clients are recorded, nanoseconds of `CLOCK_MONOTONIC`. Earlier sends
    /// were not seen.
    pub watched_since: Option<u64>,
    /// Its executable, and the bias at which that is mapped.
    place: (ObjectId, u64),
    /// Whether the kernel program was given its port, because the server listens on it by TCP.
    has_tcp: bool,
    seen: Instant,
    asked: Option<Instant>,
    /// Receives the result of a check that is overdue.
    late: Option<Receiver<Listening>>,
}

/// What a server's data directory and its sockets say.
#[derive(Clone, Copy, Debug, Default)]
struct Listening {
    version: Option<u32>,
    /// The port in `postmaster.pid`, if the server listens on it.
    port: Option<u16>,
    /// Whether the server listens on it by TCP.
    by_tcp: bool,
}

/// The known servers, at the index under which the kernel knows each. An index is reused for another server
/// when no process of the old one is left.
#[derive(Debug, Default)]
pub struct Servers {
    servers: Vec<Option<Server>>,
    /// Number of servers that were ever seen.
    seen: u32,
    /// Number of servers' address spaces for which there was no room at first.
    pub refused: u64,
}

impl Servers {
    /// The server with this index.
    pub fn get(&self, index: u32) -> Option<&Server> {
        self.servers.get(index as usize)?.as_ref()
    }

    /// Whether there is room for another server.
    pub fn has_place(&self) -> bool {
        self.len() < MAX_SERVERS as usize
    }

    /// The number of servers that were ever seen.
    pub fn count(&self) -> u64 {
        u64::from(self.seen)
    }

    /// The number of servers that are known at present.
    pub fn len(&self) -> usize {
        self.servers.iter().flatten().count()
    }

    /// What the kernel needs to know about the processes of an address space. A server that was not known
    /// before is registered in the kernel.
    ///
    /// # Errors
    /// The kernel refuses the new server.
    pub fn facts(
        &mut self,
        kernel: &mut Kernel,
        objects: &mut Objects,
        pid: u32,
        space: &AddressSpace,
    ) -> Result<Facts, Error> {
        let mut facts = Facts::default();
        for mapping in space.mappings() {
            let Backing::Object(id) = objects.backing(pid, mapping) else {
                continue;
            };
            let Some(object) = objects.get(id) else {
                continue;
            };
            if object.exports.trace_offset != 0 {
                facts.trace_offset = object.exports.trace_offset;
            }
            if let (Some(symbols), Some(bias)) = (object.exports.server, object.bias(mapping)) {
                facts.server = self.server(kernel, pid, (id, bias), symbols)?;
                facts.found_no_place = facts.server == 0;
            }
        }
        Ok(facts)
    }

    /// The index, counted from 1, of the server whose executable is mapped at `place`; 0 if there are too
    /// many servers.
    fn server(
        &mut self,
        kernel: &mut Kernel,
        pid: u32,
        place: (ObjectId, u64),
        symbols: [Option<u64>; 5],
    ) -> Result<u32, Error> {
        // Two servers may have the executable at the same address (without address space randomisation), so
        // the postmaster is compared as well. It is not known if the process has ended.
        let postmaster = postmaster_of(pid);
        let is_known = |server: &Option<Server>| {
            server.as_ref().is_some_and(|known| {
                known.place == place && postmaster.is_none_or(|asked| asked == known.pid)
            })
        };
        if let Some(known) = self.servers.iter().position(is_known) {
            return Ok(known as u32 + 1);
        }
        let postmaster = postmaster.unwrap_or(pid);
        let Some(index) = self.free_place() else {
            return Ok(0);
        };
        let [
            my_be_entry,
            my_proc_port,
            my_wait_event_info,
            debug_query_string,
            my_bgworker_entry,
        ] = symbols.map(|svma| svma.map_or(0, |svma| svma.wrapping_add(place.1)));
        let variables = postgres::ServerVariables {
            my_be_entry,
            my_proc_port,
            my_wait_event_info,
            debug_query_string,
            my_bgworker_entry,
        };
        log::debug!("pid {pid} runs what looks like PostgreSQL, of pid {postmaster}");
        kernel.set_server(index as u32, variables)?;
        if let Err(error) = kernel.follow_senders() {
            log::warn!(
                "the callers of PostgreSQL's statements cannot be recorded: {error}; see `flamestorm doctor`"
            );
        }
        if kernel.senders() == Some(Senders::Functions) {
            Priority::UnpreemptedReader.apply();
        }
        self.seen = self.seen.wrapping_add(1);
        self.servers[index] = Some(Server {
            number: self.seen,
            pid: postmaster,
            version: None,
            port: None,
            watched_since: None,
            place,
            has_tcp: false,
            seen: Instant::now(),
            asked: None,
            late: None,
        });
        Ok(index as u32 + 1)
    }

    fn free_place(&mut self) -> Option<usize> {
        if let Some(free) = self.servers.iter().position(Option::is_none) {
            return Some(free);
        }
        let index = self.servers.len();
        if index >= MAX_SERVERS as usize {
            return None;
        }
        self.servers.push(None);
        Some(index)
    }

    /// Checks the servers that have just started, until their ports are known.
    ///
    /// # Errors
    /// The kernel refuses a port.
    pub fn settle(&mut self, kernel: &mut Kernel, pool: &mut WorkerPool) -> Result<(), Error> {
        for server in self.servers.iter_mut().flatten() {
            let Some(found) = server.ask(pool) else {
                continue;
            };
            server.version = server.version.or(found.version);
            let Some(port) = found.port else {
                continue;
            };
            server.port = Some(port);
            if found.by_tcp {
                kernel.add_server_port(port)?;
                server.has_tcp = true;
            }
            server.watched_since = Some(now());
            log::debug!(
                "PostgreSQL {:?}: pid {}, port {port}",
                server.version,
                server.pid
            );
        }
        Ok(())
    }

    /// Evicts the servers that have no known process any more. `alive` are the indices, counted from 1, of
    /// the servers that processes belong to.
    ///
    /// # Errors
    /// A port could not be removed in the kernel.
    pub fn evict(&mut self, kernel: &mut Kernel, alive: &HashSet<u32>) -> Result<(), Error> {
        for index in 0..self.servers.len() {
            if alive.contains(&(index as u32 + 1)) {
                continue;
            }
            // A server that was found a moment ago may have no process in the kernel yet.
            let is_old = |server: &mut Server| server.seen.elapsed() > PORT_PATIENCE;
            let Some(gone) = self.servers[index].take_if(is_old) else {
                continue;
            };
            let others = self.servers.iter().flatten();
            let mut same_port = others.filter(|other| other.has_tcp && other.port == gone.port);
            if let (true, Some(port), None) = (gone.has_tcp, gone.port, same_port.next()) {
                kernel.remove_server_port(port)?;
            }
        }
        Ok(())
    }
}

impl Server {
    /// Checks where the server listens, unless that is known or was checked a moment ago. `None` if there
    /// is no new result.
    fn ask(&mut self, pool: &mut WorkerPool) -> Option<Listening> {
        if self.port.is_some() || self.seen.elapsed() > PORT_PATIENCE {
            return None;
        }
        if let Some(late) = &self.late {
            let found = late.try_recv().ok()?;
            self.late = None;
            return Some(found);
        }
        if self.asked.is_some_and(|asked| asked.elapsed() < ASK_EVERY) {
            return None;
        }
        self.asked = Some(Instant::now());
        let pid = self.pid;
        match pool.call(Subject::process(pid), move || listening(pid)) {
            Answer::Done(found) => Some(found),
            Answer::Overdue(late) => {
                self.late = Some(late);
                None
            }
            Answer::Refused => None,
        }
    }
}

/// Whether an executable is likely to be a server's, judged by its name. Such a process is examined before
/// it is sampled.
pub fn is_likely_server(exe: &Path) -> bool {
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    // The kernel appends this to the path of a file that was removed or replaced.
    let name = name.trim_end_matches(" (deleted)");
    name == "postgres" || name == "postmaster" || name == "edb-postgres"
}

/// The parent of a process if it runs the same executable, otherwise the process itself. `None` if the
/// process has ended.
fn postmaster_of(pid: u32) -> Option<u32> {
    let own = process_exe(pid)?;
    let parent = parent_of(pid)?;
    Some(if process_exe(parent) == Some(own) {
        parent
    } else {
        pid
    })
}

/// Reads a server's version and port from its data directory, and looks for that port among its listening
/// sockets. A program that only looks like a server could name a port that is not its own, and every send
/// to that port would then be examined. So a port counts only if the process listens on it. May block.
fn listening(pid: u32) -> Listening {
    let version = version(pid);
    let unknown = Listening {
        version,
        ..Listening::default()
    };
    let Some(port) = named_port(pid) else {
        return unknown;
    };
    let own = own_sockets(pid);
    let by_tcp = ["tcp", "tcp6"]
        .iter()
        .any(|list| has_listener(pid, list, &own, |line| is_tcp_listener(line, port)));
    let by_unix = || has_listener(pid, "unix", &own, |line| is_unix_listener(line, port));
    match by_tcp || by_unix() {
        true => Listening {
            version,
            port: Some(port),
            by_tcp,
        },
        false => unknown,
    }
}

/// Reads a file in the server's data directory, which is the working directory of every process of a
/// server.
fn in_data_directory(pid: u32, file: &str) -> Option<String> {
    let directory = directory_of(pid, "cwd").ok()?;
    // The directory is untrusted, because any user can run a program of this name in a directory of their
    // own. It must not lead to a file outside, or to a device.
    let found = rustix::fs::openat2(
        directory,
        file,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
        rustix::fs::ResolveFlags::BENEATH,
    );
    let file = open_found(found.ok()?).ok()?;
    let mut text = String::new();
    file.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

fn version(pid: u32) -> Option<u32> {
    let text = in_data_directory(pid, "PG_VERSION")?;
    text.trim().split('.').next()?.parse().ok()
}

/// The port from `postmaster.pid`, which is on its fourth line. The first line is the postmaster's pid in
/// its own pid namespace (src/include/utils/pidfile.h). A file that another server left behind does not
/// count.
fn named_port(pid: u32) -> Option<u16> {
    let text = in_data_directory(pid, "postmaster.pid")?;
    let mut lines = text.lines();
    if lines.next()?.trim().parse() != Ok(own_pid(pid)?) {
        return None;
    }
    lines.nth(2)?.trim().parse().ok()
}

/// Inode numbers of the sockets that a process has open.
fn own_sockets(pid: u32) -> HashSet<u64> {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
        return HashSet::new();
    };
    let inode = |entry: fs::DirEntry| {
        let target = fs::read_link(entry.path()).ok()?;
        let inode = target.to_str()?.strip_prefix("socket:[")?;
        inode.strip_suffix(']')?.parse().ok()
    };
    let descriptors = descriptors.flatten().take(MAX_DESCRIPTORS);
    descriptors.filter_map(inode).collect()
}

/// Whether a list of the sockets in a process's network namespace contains one of the process's own sockets
/// that `listener` accepts. `listener` takes a line of the list and returns the inode number.
fn has_listener(
    pid: u32,
    list: &str,
    own: &HashSet<u64>,
    listener: impl Fn(&str) -> Option<u64>,
) -> bool {
    let Ok(file) = File::open(format!("/proc/{pid}/net/{list}")) else {
        return false;
    };
    let mut bytes = Vec::new();
    if file.take(MAX_SOCKETS).read_to_end(&mut bytes).is_err() {
        return false;
    }
    let text = String::from_utf8_lossy(&bytes);
    let mut inodes = text.lines().filter_map(listener);
    inodes.any(|inode| own.contains(&inode))
}

/// The inode of a TCP socket that listens on a port, from a line of `/proc/net/tcp` or `tcp6`: local
/// address and port, state (0A: listening) and inode are the second, fourth and tenth field (Linux,
/// Documentation/networking/proc_net_tcp.rst).
fn is_tcp_listener(line: &str, port: u16) -> Option<u64> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (_, local) = fields.get(1)?.rsplit_once(':')?;
    let is_wanted = u16::from_str_radix(local, 16) == Ok(port) && *fields.get(3)? == "0A";
    is_wanted.then(|| fields.get(9)?.parse().ok())?
}

/// The inode of a Unix socket that accepts connections at `.s.PGSQL.PORT`, from a line of `/proc/net/unix`:
/// flags, inode and path are the fourth, seventh and eighth field; `__SO_ACCEPTCON` is 1 << 16
/// (include/uapi/linux/net.h).
fn is_unix_listener(line: &str, port: u16) -> Option<u64> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let flags = u32::from_str_radix(fields.get(3)?, 16).ok()?;
    let name = format!(".s.PGSQL.{port}");
    let is_wanted = flags & 1 << 16 != 0 && fields.get(7)?.rsplit('/').next()? == name;
    is_wanted.then(|| fields.get(6)?.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines as Linux 6.18 writes them. A connection, another port and another socket do not count.
    #[test]
    fn listeners() {
        let tcp = "   0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000   108        0 41234 1";
        assert_eq!(is_tcp_listener(tcp, 5432), Some(41234));
        assert_eq!(is_tcp_listener(tcp, 5433), None);
        assert_eq!(is_tcp_listener(&tcp.replace(" 0A ", " 01 "), 5432), None);
        let unix = "0000000000000000: 00000002 00000000 00010000 0001 01 20211 /run/postgresql/.s.PGSQL.5432";
        assert_eq!(is_unix_listener(unix, 5432), Some(20211));
        assert_eq!(is_unix_listener(unix, 543), None);
        assert_eq!(
            is_unix_listener(&unix.replace("00010000", "00000000"), 5432),
            None
        );
        assert_eq!(is_tcp_listener("", 1), None);
        assert_eq!(is_unix_listener("Num       RefCount Protocol", 1), None);
    }

    /// Finds the listening socket of the test itself.
    #[test]
    fn own_listener() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let pid = std::process::id();
        let own = own_sockets(pid);
        let listens = |port| has_listener(pid, "tcp", &own, |line| is_tcp_listener(line, port));
        assert!(listens(port));
        drop(listener);
        assert!(!has_listener(pid, "tcp", &own_sockets(pid), |line| {
            is_tcp_listener(line, port)
        }));
    }
}
