//! Which address spaces belong to a PostgreSQL server, and which publish trace contexts: told by what
//! their files export.

use std::{
    collections::HashMap,
    fs,
    io::Read as _,
    path::Path,
    time::{Duration, Instant},
};

use agent_ebpf::{limits::MAX_SERVERS, postgres};

use super::{
    cost::now,
    objects::{Backing, ObjectId, Objects, open_regular},
};
use crate::{
    kernel::{Error, Kernel},
    object::exported,
    process::{AddressSpace, own_pid, parent_of},
};

/// Symbols by which a server is known, in the order of [`postgres::Server`].
const SERVER_SYMBOLS: [&str; 5] = [
    "MyBEEntry",
    "MyProcPort",
    "my_wait_event_info",
    "debug_query_string",
    "MyBgworkerEntry",
];

/// The thread-local variable of OTEP 4947.
const TRACE_SYMBOL: &str = "otel_thread_ctx_v1";

/// Bytes that are read of a file in a data directory.
const MAX_FILE: u64 = 4096;

/// How long a server that starts may take to say on which port it listens.
const PORT_PATIENCE: Duration = Duration::from_secs(60);

/// What the kernel should know of the processes of an address space.
#[derive(Clone, Copy, Debug, Default)]
pub struct Facts {
    /// See [`agent_ebpf::table::Space::server`].
    pub server: u32,
    /// See [`agent_ebpf::table::Space::trace_offset`].
    pub trace_offset: i32,
}

/// What an object exports.
#[derive(Clone, Copy, Debug, Default)]
struct Exports {
    server: Option<[Option<u64>; 5]>,
    trace_offset: i32,
}

/// A PostgreSQL server: one postmaster and its children.
#[derive(Clone, Debug)]
pub struct Server {
    /// A process of it.
    pub pid: u32,
    /// Major version, from `PG_VERSION` in its data directory.
    pub version: Option<u32>,
    /// Port from `postmaster.pid`.
    pub port: Option<u16>,
    /// Since when the sends of its clients are noted, nanoseconds; earlier ones nobody saw.
    pub watched_since: Option<u64>,
    seen: Instant,
}

/// Every server that was seen.
#[derive(Debug, Default)]
pub struct Servers {
    exports: HashMap<ObjectId, Exports>,
    /// A server's processes have one executable at one address, and one postmaster.
    by_place: HashMap<(ObjectId, u64, u32), u32>,
    servers: Vec<Server>,
    /// Servers beyond the bound.
    pub refused: u64,
}

impl Servers {
    /// The server with this index.
    pub fn get(&self, index: u32) -> Option<&Server> {
        self.servers.get(index as usize)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.servers.len()
    }

    /// What is to be known of the processes of an address space. A server that was not known is told to
    /// the kernel.
    ///
    /// # Errors
    /// The kernel does not take it.
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
            let object = objects.get(id);
            let exports = *self.exports.entry(id).or_insert_with(|| {
                let exports = exports(object.image.bytes());
                object.image.forget_pages();
                exports
            });
            if exports.trace_offset != 0 {
                facts.trace_offset = exports.trace_offset;
            }
            if let (Some(symbols), Some(bias)) = (exports.server, object.bias(mapping)) {
                facts.server = self.server(kernel, pid, (id, bias), symbols)?;
            }
        }
        Ok(facts)
    }

    /// Number of the server whose executable lies there, counted from 1; 0 when there are too many.
    fn server(
        &mut self,
        kernel: &mut Kernel,
        pid: u32,
        place: (ObjectId, u64),
        symbols: [Option<u64>; 5],
    ) -> Result<u32, Error> {
        // Two servers may lie at one address (no randomisation), so the postmaster counts as well. A process
        // that has gone cannot be asked for it.
        let postmaster = postmaster_of(pid);
        let known = self.by_place.iter().find(|((object, bias, known), _)| {
            (*object, *bias) == place && postmaster.is_none_or(|asked| asked == *known)
        });
        if let Some((_, index)) = known {
            return Ok(index + 1);
        }
        let postmaster = postmaster.unwrap_or(pid);
        let key = (place.0, place.1, postmaster);
        let index = self.servers.len() as u32;
        if index >= MAX_SERVERS {
            self.refused += 1;
            return Ok(0);
        }
        let [
            my_be_entry,
            my_proc_port,
            my_wait_event_info,
            debug_query_string,
            my_bgworker_entry,
        ] = symbols.map(|svma| svma.map_or(0, |svma| svma.wrapping_add(place.1)));
        let variables = postgres::Server {
            my_be_entry,
            my_proc_port,
            my_wait_event_info,
            debug_query_string,
            my_bgworker_entry,
        };
        kernel.set_server(index, variables)?;
        if let Err(error) = kernel.follow_senders() {
            log::warn!(
                "who asks PostgreSQL servers is not known: {error}; see `flamestorm doctor`"
            );
        }
        self.by_place.insert(key, index);
        self.servers.push(Server {
            pid: postmaster,
            version: version(pid),
            port: None,
            watched_since: None,
            seen: Instant::now(),
        });
        Ok(index + 1)
    }

    /// Learns the ports of servers that have just started.
    ///
    /// # Errors
    /// The kernel does not take one.
    pub fn settle(&mut self, kernel: &mut Kernel) -> Result<(), Error> {
        for server in &mut self.servers {
            if server.port.is_some() || server.seen.elapsed() > PORT_PATIENCE {
                continue;
            }
            if server.version.is_none() {
                server.version = version(server.pid);
            }
            server.port = port(server.pid);
            if let Some(port) = server.port {
                kernel.add_server_port(port)?;
                server.watched_since = Some(now());
                log::debug!(
                    "PostgreSQL {:?}: pid {}, port {port}",
                    server.version,
                    server.pid
                );
            }
        }
        Ok(())
    }
}

fn exports(image: &[u8]) -> Exports {
    let [trace] = exported(image, [TRACE_SYMBOL]);
    let symbols = exported(image, SERVER_SYMBOLS);
    Exports {
        // Versions that are not supported export less.
        server: (symbols[0].is_some() && symbols[1].is_some()).then_some(symbols),
        trace_offset: trace
            .and_then(|offset| i32::try_from(offset.cast_signed()).ok())
            .filter(|offset| *offset < 0)
            .unwrap_or(0),
    }
}

/// Whether an executable is likely to be a server's, by its name: then it is looked at before it is sampled.
pub fn is_likely_server(exe: &Path) -> bool {
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    // The kernel appends this to the name of a file that was replaced.
    let name = name.trim_end_matches(" (deleted)");
    name == "postgres" || name == "postmaster" || name == "edb-postgres"
}

/// The process's parent, if that runs the same executable; else itself. `None` when it has gone.
fn postmaster_of(pid: u32) -> Option<u32> {
    let exe = |pid: u32| fs::read_link(format!("/proc/{pid}/exe")).ok();
    let own = exe(pid)?;
    let parent = parent_of(pid)?;
    Some(if exe(parent) == Some(own) {
        parent
    } else {
        pid
    })
}

/// Every process of a server works in its data directory.
fn in_data_directory(pid: u32, file: &str) -> Option<String> {
    // Whoever runs a program of this name chooses what lies there.
    let file = open_regular(format!("/proc/{pid}/cwd/{file}").as_ref()).ok()?;
    let mut text = String::new();
    file.take(MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}

fn version(pid: u32) -> Option<u32> {
    let text = in_data_directory(pid, "PG_VERSION")?;
    text.trim().split('.').next()?.parse().ok()
}

/// The port from `postmaster.pid`: its fourth line; the first is the postmaster's pid as it sees it itself
/// (src/include/utils/pidfile.h). A file that another server left behind does not count.
fn port(pid: u32) -> Option<u16> {
    let text = in_data_directory(pid, "postmaster.pid")?;
    let mut lines = text.lines();
    if lines.next()?.trim().parse() != Ok(own_pid(pid)?) {
        return None;
    }
    lines.nth(2)?.trim().parse().ok()
}
