//! What PostgreSQL's backends said, brought together with their samples: the query without its literals,
//! names, and the caller.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::Arc,
};

use agent_ebpf::{
    postgres::{
        BackendHeader, CallerSearch, CallerStack, HAS_CONNECTION, HAS_LEADER, HAS_STATUS, Send,
        TEXT_OF_DEBUG, statement_start, status,
    },
    sample::TraceContext,
};

use super::{
    cost::{now, wall_offset},
    servers::Servers,
};
use crate::{
    kernel,
    profile::{
        Attribution, Backend, Caller, Phase, ProcessIndex, Query, QueryIndex, StackId, Unknown,
        Window,
    },
    query::{self, Client, Kind, TextMode, Texts},
};

/// Offset of `Oid st_userid` in the status.
const USER: usize = status::DATABASE + 4;

/// Stacks of sends kept at most, the oldest go first. A query that runs longer than this many others need to
/// be sampled loses its caller: half an hour at a hundred new statements a second.
const MAX_CALLERS: usize = 1 << 17;

/// Executions told apart at most.
const MAX_EXECUTIONS: usize = 1 << 20;

/// Names of databases and roles kept at most.
const MAX_NAMES: usize = 1 << 14;

/// Distinct short texts kept at most (kinds of processes, application names, clients).
const MAX_TEXTS: usize = 1 << 14;

/// What `pg_stat_activity.backend_type` calls a process that helps with another's statement.
const PARALLEL_WORKER: &str = "parallel worker";

/// A backend's words that wait for their sample.
struct Pending {
    cpu: u32,
    time: u64,
    header: BackendHeader,
    text: Vec<u8>,
}

/// A send whose stack is known.
#[derive(Clone, Copy, Debug)]
struct Known {
    process: ProcessIndex,
    stack: StackId,
}

/// How well samples of client backends and their workers could be attributed.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Samples of processes of a server.
    pub samples: u64,
    /// Of these, of processes that run statements for clients.
    pub for_clients: u64,
    /// Of those, of parallel workers that had no statement yet, or none any more.
    pub starting: u64,
    /// Of those for clients, with the query.
    pub with_query: u64,
    /// Of those with the query, between two statements.
    pub between: u64,
    /// Of those with the query, with the caller's stack.
    pub with_caller: u64,
    /// Of those with the query, by why the caller is not known.
    pub unknown: HashMap<Unknown, u64>,
}

/// The knowledge about backends in a recording.
pub struct Backends {
    /// When the recording began, nanoseconds.
    since: u64,
    pending: Vec<Pending>,
    texts: Texts,
    callers: HashMap<(u32, u64), Known>,
    oldest: VecDeque<(u32, u64)>,
    executions: HashSet<u64>,
    databases: HashMap<(u32, u32), Arc<str>>,
    users: HashMap<(u32, u32), Arc<str>>,
    strings: HashSet<Arc<str>>,
    /// What came of it.
    pub counts: Counts,
}

impl Default for Backends {
    fn default() -> Self {
        Self::new(false)
    }
}

/// Gives the number of the process that sent; its thread's name, for one of which nothing is known any more.
pub type SenderIndex<'a> = &'a mut dyn FnMut(u32, &[u8; 16]) -> ProcessIndex;

impl Backends {
    /// `full_text`: queries keep their literals.
    pub fn new(full_text: bool) -> Backends {
        Backends {
            since: now(),
            pending: Vec::new(),
            texts: Texts::new(if full_text {
                TextMode::Full
            } else {
                TextMode::Normalized
            }),
            callers: HashMap::new(),
            oldest: VecDeque::new(),
            executions: HashSet::new(),
            databases: HashMap::new(),
            users: HashMap::new(),
            strings: HashSet::new(),
            counts: Counts::default(),
        }
    }

    /// Keeps what a backend said for the sample that follows.
    pub fn said(&mut self, backend: &kernel::Backend<'_>) {
        // One a CPU: what an older record waits for was refused by a full buffer.
        self.pending.retain(|old| old.cpu != backend.header.cpu);
        self.pending.push(Pending {
            cpu: backend.header.cpu,
            time: backend.header.time,
            header: backend.header,
            text: backend.text.to_vec(),
        });
    }

    /// Keeps the stack of a send.
    pub fn caller(&mut self, cpu: u32, time: u64, process: ProcessIndex, stack: StackId) {
        if self.oldest.len() >= MAX_CALLERS
            && let Some(oldest) = self.oldest.pop_front()
        {
            self.callers.remove(&oldest);
        }
        if self
            .callers
            .insert((cpu, time), Known { process, stack })
            .is_none()
        {
            self.oldest.push_back((cpu, time));
        }
    }

    /// What the sample of this CPU and time was for, and whether it is the first of an execution.
    pub fn attribute(
        &mut self,
        cpu: u32,
        time: u64,
        own_trace: TraceContext,
        servers: &Servers,
        sender: SenderIndex<'_>,
    ) -> (Option<Attribution>, bool) {
        let found = self
            .pending
            .iter()
            .position(|pending| pending.cpu == cpu && pending.time == time);
        let Some(found) = found else {
            let attribution = Attribution {
                trace: own_trace,
                backend: None,
            };
            return (
                (own_trace != TraceContext::default()).then_some(attribution),
                false,
            );
        };
        let pending = self.pending.swap_remove(found);
        let (backend, trace, starts) = self.backend(&pending, servers, sender);
        let attribution = Attribution {
            trace: if trace == TraceContext::default() {
                own_trace
            } else {
                trace
            },
            backend: Some(Arc::new(backend)),
        };
        (Some(attribution), starts)
    }

    fn backend(
        &mut self,
        pending: &Pending,
        servers: &Servers,
        sender: SenderIndex<'_>,
    ) -> (Backend, TraceContext, bool) {
        let header = &pending.header;
        let server = servers.get(header.server);
        let version = server.and_then(|server| server.version);
        let title = query::title(&header.title);
        let has_status = header.flags & HAS_STATUS != 0;
        let state = match has_status {
            true => state(half(&header.status, status::STATE), version),
            false => "",
        };
        let text = if has_status || header.flags & TEXT_OF_DEBUG != 0 {
            pending.text.as_slice()
        } else {
            &[]
        };
        let query_id = match has_status {
            true => word(&header.status, status::QUERY_ID).cast_signed(),
            false => 0,
        };
        let query = (!text.is_empty()).then(|| self.query(header, query_id, text));
        let phase = match (query, state) {
            (None, _) => Phase::NoStatement,
            (_, "idle" | "idle in transaction" | "idle in transaction (aborted)") => Phase::Between,
            _ => Phase::Executing,
        };
        let runs_for_clients = matches!(
            title.kind,
            Kind::Client { .. } | Kind::ParallelWorker { .. }
        ) || header.flags & (HAS_CONNECTION | HAS_LEADER) != 0;
        let (database, user) = self.names(header, has_status, &title.kind);
        let application = until_nul(&header.application);
        let in_name = query::traceparent_in_name(application);
        let found = header.search == CallerSearch::Found as u32;
        let mut trace = if found {
            header.send.trace
        } else {
            TraceContext::default()
        };
        if trace == TraceContext::default() {
            let said = query::traceparent(text).or(in_name);
            trace = said.map_or(trace, |said| TraceContext {
                trace: said.trace_id,
                span: said.span_id,
            });
        }
        let client = client(&title.kind, header);
        let caller = match (query, runs_for_clients) {
            (Some(_), true) => {
                let since = server.and_then(|server| server.watched_since);
                let since = since.unwrap_or(self.since);
                self.find_caller(header, has_status, &client, since, sender)
            }
            _ => Caller::None,
        };
        let starts = query.is_some() && self.starts_execution(header);
        let kind = match &title.kind {
            Kind::Client { .. } => "client backend",
            Kind::ParallelWorker { .. } => PARALLEL_WORKER,
            Kind::Unknown if header.flags & HAS_LEADER != 0 => PARALLEL_WORKER,
            Kind::Autovacuum { .. } => "autovacuum worker",
            Kind::Background { name } => name.as_str(),
            Kind::Postmaster => "postmaster",
            Kind::Unknown if header.flags & HAS_CONNECTION != 0 => "client backend",
            Kind::Unknown => "unknown",
        };
        self.count(runs_for_clients, kind, query.is_some(), phase, &caller);
        let backend = Backend {
            kind: self.string(kind),
            port: server.and_then(|server| server.port).unwrap_or(0),
            query,
            phase,
            state,
            wait: wait(header.wait_event),
            database,
            user,
            // A name that is a trace's is another with each request.
            application: match in_name {
                Some(_) => self.string(""),
                None => self.string(&String::from_utf8_lossy(application)),
            },
            client: self.string(&client),
            caller,
        };
        (backend, trace, starts)
    }

    fn query(&mut self, header: &BackendHeader, query_id: i64, text: &[u8]) -> QueryIndex {
        // Query ids are made of the tables' numbers, which are a database's own. (It stays where it is when
        // the rest of the status is being written.)
        let database = half(&header.status, status::DATABASE);
        let scope = u64::from(header.server) << 32 | u64::from(database);
        // `track_activity_query_size` is usually a power of two, one byte of which is the NUL.
        let is_cut = text.len() >= 127 && (text.len() + 1).is_power_of_two();
        QueryIndex(self.texts.insert(scope, query_id, text, is_cut).0)
    }

    /// Names of database and role: from the title where they are in it, else by their numbers, which other
    /// backends' titles explained (a parallel worker's title has no names).
    fn names(
        &mut self,
        header: &BackendHeader,
        has_status: bool,
        kind: &Kind,
    ) -> (Arc<str>, Arc<str>) {
        let numbers = has_status.then(|| {
            let of = |at| (header.server, half(&header.status, at));
            (of(status::DATABASE), of(USER))
        });
        let (database, user) = match kind {
            Kind::Client { database, user, .. } => (Some(database.as_str()), Some(user.as_str())),
            Kind::Autovacuum { database } => (database.as_deref(), None),
            _ => (None, None),
        };
        let database = self.string(database.unwrap_or_default());
        let user = self.string(user.unwrap_or_default());
        let Some(numbers) = numbers else {
            return (database, user);
        };
        (
            explained(&mut self.databases, numbers.0, database),
            explained(&mut self.users, numbers.1, user),
        )
    }

    fn find_caller(
        &self,
        header: &BackendHeader,
        has_status: bool,
        client: &str,
        watched_since: u64,
        sender: SenderIndex<'_>,
    ) -> Caller {
        if !has_status {
            return Caller::Unknown(Unknown::State);
        }
        if header.flags & HAS_CONNECTION == 0 {
            return Caller::Unknown(Unknown::Leader);
        }
        let send: &Send = &header.send;
        let is = |search: CallerSearch| header.search == search as u32;
        if is(CallerSearch::Several) {
            return Caller::Process {
                process: sender(send.pid, &send.comm),
                reason: Unknown::Several,
            };
        }
        if !is(CallerSearch::Found) {
            let start = word(&header.status, status::STATEMENT_START).cast_signed();
            return Caller::Unknown(match () {
                () if is(CallerSearch::Forgotten) => Unknown::Forgotten,
                () if statement_start(start, wall_offset()) < watched_since => Unknown::Before,
                () if is_remote(header, client) => Unknown::Remote,
                () => Unknown::NoSend,
            });
        }
        if let Some(known) = self.callers.get(&(send.cpu, send.time)) {
            return Caller::Known {
                process: known.process,
                stack: known.stack,
            };
        }
        let reason = match send.stack {
            stack if stack == CallerStack::Refused as u32 => Unknown::Budget,
            _ => Unknown::Lost,
        };
        Caller::Process {
            process: sender(send.pid, &send.comm),
            reason,
        }
    }

    /// Whether this is the first sample of an execution: by its send; by its start, where there is none.
    fn starts_execution(&mut self, header: &BackendHeader) -> bool {
        let mut hasher = DefaultHasher::new();
        header.server.hash(&mut hasher);
        if header.search == CallerSearch::Found as u32 {
            (header.send.cpu, header.send.time).hash(&mut hasher);
        } else {
            let own = half(&header.status, status::PROCESS);
            let leader = header.flags & HAS_LEADER != 0;
            (if leader { header.leader } else { own }).hash(&mut hasher);
            word(&header.status, status::STATEMENT_START).hash(&mut hasher);
        }
        self.executions.len() < MAX_EXECUTIONS && self.executions.insert(hasher.finish())
    }

    fn count(
        &mut self,
        for_clients: bool,
        kind: &str,
        has_query: bool,
        phase: Phase,
        caller: &Caller,
    ) {
        let counts = &mut self.counts;
        counts.samples += 1;
        if !for_clients {
            return;
        }
        counts.for_clients += 1;
        if has_query {
            self.count_query(phase, caller, 1);
        } else {
            counts.starting += u64::from(kind == PARALLEL_WORKER);
        }
    }

    /// Counts samples with a query.
    fn count_query(&mut self, phase: Phase, caller: &Caller, samples: u64) {
        let counts = &mut self.counts;
        counts.with_query += samples;
        if phase == Phase::Between {
            counts.between += samples;
        }
        match caller {
            Caller::Known { .. } => counts.with_caller += samples,
            Caller::Process { reason, .. } | Caller::Unknown(reason) => {
                *counts.unknown.entry(*reason).or_default() += samples;
            }
            Caller::None => {}
        }
    }

    /// A parallel worker works for one statement all its life, but tells which only from the end of its
    /// start to the beginning of its end: its other samples get what those say.
    pub fn complete_workers(&mut self, window: &mut Window) {
        let is_worker = |backend: &Backend| &*backend.kind == PARALLEL_WORKER;
        let mut told: HashMap<ProcessIndex, Attribution> = HashMap::new();
        for (row, _) in window.rows() {
            let attribution = window.attribution(row);
            let backend = attribution.and_then(|attribution| attribution.backend.as_ref());
            if let (Some(attribution), Some(backend)) = (attribution, backend)
                && is_worker(backend)
                && backend.query.is_some()
            {
                told.entry(row.process)
                    .or_insert_with(|| attribution.clone());
            }
        }
        window.reattribute(|row, attribution, samples| {
            let silent = attribution.backend.as_ref()?;
            if !is_worker(silent) || silent.query.is_some() {
                return None;
            }
            let told = told.get(&row.process)?;
            let backend = told.backend.as_ref()?;
            self.count_query(Phase::Executing, &backend.caller, samples);
            self.counts.starting = self.counts.starting.saturating_sub(samples);
            let backend = Backend {
                state: silent.state,
                wait: silent.wait,
                phase: Phase::Executing,
                ..Backend::clone(backend)
            };
            Some(Attribution {
                trace: told.trace,
                backend: Some(Arc::new(backend)),
            })
        });
    }

    fn string(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.strings.get(text) {
            return Arc::clone(known);
        }
        let shared: Arc<str> = Arc::from(text);
        if self.strings.len() < MAX_TEXTS {
            self.strings.insert(Arc::clone(&shared));
        }
        shared
    }

    /// Samples of queries beyond the bounds.
    pub fn other_queries(&self) -> u64 {
        self.texts.overflow()
    }

    /// The queries, in the order of their indices.
    pub fn queries(&self) -> Vec<Query> {
        self.texts
            .queries()
            .iter()
            .map(|query| Query {
                id: match query.id {
                    0 => format!("text:{:016x}", query.key),
                    id => id.to_string(),
                },
                text: Arc::clone(&query.text),
            })
            .collect()
    }
}

/// Keeps or looks up the name of a number.
fn explained(
    names: &mut HashMap<(u32, u32), Arc<str>>,
    number: (u32, u32),
    name: Arc<str>,
) -> Arc<str> {
    if name.is_empty() {
        return names.get(&number).cloned().unwrap_or(name);
    }
    if number.1 != 0 && names.len() < MAX_NAMES {
        names.insert(number, Arc::clone(&name));
    }
    name
}

/// The client's address as the title tells it, else as the socket does.
fn client(kind: &Kind, header: &BackendHeader) -> String {
    match kind {
        Kind::Client {
            client: Client::Local,
            ..
        } => "local".to_owned(),
        Kind::Client {
            client: Client::Tcp { host, .. },
            ..
        } => host.clone(),
        _ if header.flags & HAS_CONNECTION == 0 => String::new(),
        _ => match (
            header.connection.client_port,
            address(header.connection.client),
        ) {
            (0, _) => "local".to_owned(),
            (_, address) => address.to_canonical().to_string(),
        },
    }
}

fn address(words: [u64; 2]) -> std::net::IpAddr {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&words[0].to_le_bytes());
    bytes[8..].copy_from_slice(&words[1].to_le_bytes());
    std::net::IpAddr::from(bytes)
}

/// Whether the client is at another address than the server: on another host, or in another container.
fn is_remote(header: &BackendHeader, client: &str) -> bool {
    let connection = &header.connection;
    client != "local"
        && connection.client_port != 0
        && connection.network_namespace == 0
        && connection.client != connection.server
}

/// `BackendState` (src/include/utils/backend_status.h): version 18 has one more at the start.
fn state(number: u32, version: Option<u32>) -> &'static str {
    let before_18 = version.is_none_or(|version| version < 18);
    match if before_18 && number > 0 {
        number + 1
    } else {
        number
    } {
        1 => "starting",
        2 => "idle",
        3 => "active",
        4 => "idle in transaction",
        5 => "fastpath function call",
        6 => "idle in transaction (aborted)",
        7 => "disabled",
        _ => "",
    }
}

/// The class in the upper byte of a wait event (src/include/utils/wait_event.h).
fn wait(event: u32) -> &'static str {
    match event >> 24 {
        0x01 => "LWLock",
        0x03 => "Lock",
        0x04 => "BufferPin",
        0x05 => "Activity",
        0x06 => "Client",
        0x07 => "Extension",
        0x08 => "IPC",
        0x09 => "Timeout",
        0x0a => "IO",
        0x0b => "InjectionPoint",
        _ => "",
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn word(status: &[u8], at: usize) -> u64 {
    let bytes = status[at..at + 8].try_into();
    u64::from_le_bytes(bytes.expect("eight bytes"))
}

fn half(status: &[u8], at: usize) -> u32 {
    let bytes = status[at..at + 4].try_into();
    u32::from_le_bytes(bytes.expect("four bytes"))
}

#[cfg(test)]
mod tests {
    use agent_ebpf::sample::Outcome;

    use super::*;
    use crate::profile::RawSample;

    fn worker(query: Option<QueryIndex>, state: &'static str, caller: Caller) -> Attribution {
        Attribution {
            trace: TraceContext::default(),
            backend: Some(Arc::new(Backend {
                kind: Arc::from(PARALLEL_WORKER),
                port: 5432,
                query,
                phase: query.map_or(Phase::NoStatement, |_| Phase::Executing),
                state,
                wait: "",
                database: Arc::from(""),
                user: Arc::from(""),
                application: Arc::from(""),
                client: Arc::from(""),
                caller,
            })),
        }
    }

    /// A worker's start is its statement's, and its caller's; that of one which never told stays unknown.
    #[test]
    fn workers() {
        let mut window = Window::new();
        let mut count = |process, attribution| {
            window.add(&RawSample {
                process: ProcessIndex(process),
                tid: process,
                thread_name: *b"postgres\0\0\0\0\0\0\0\0",
                outcome: Outcome::Complete,
                kernel: &[],
                user: &[],
                attribution: Some(attribution),
                starts_execution: false,
            });
        };
        let lost = Caller::Unknown(Unknown::Budget);
        count(1, worker(None, "", Caller::None));
        count(1, worker(None, "", Caller::None));
        count(1, worker(Some(QueryIndex(3)), "active", lost.clone()));
        count(2, worker(None, "", Caller::None));
        let mut backends = Backends::default();
        backends.complete_workers(&mut window);
        let found: Vec<_> = window
            .rows()
            .map(|(row, tally)| {
                let backend = window.attribution(row).and_then(|a| a.backend.clone());
                let backend = backend.expect("a worker's");
                (row.process.0, backend.query, backend.state, tally.samples)
            })
            .collect();
        let expected = [
            (1, Some(QueryIndex(3)), "", 2),
            (1, Some(QueryIndex(3)), "active", 1),
            (2, None, "", 1),
        ];
        assert_eq!(found, expected);
        assert_eq!(backends.counts.with_query, 2);
        assert_eq!(backends.counts.unknown[&Unknown::Budget], 2);
    }

    /// The same state has another number in version 18.
    #[test]
    fn states() {
        assert_eq!(state(2, Some(17)), "active");
        assert_eq!(state(3, Some(18)), "active");
        assert_eq!(state(1, None), "idle");
        assert_eq!(state(6, Some(14)), "disabled");
        assert_eq!(state(0, Some(14)), "");
        assert_eq!(state(99, Some(18)), "");
    }

    /// IPv4 comes out as IPv4.
    #[test]
    fn addresses() {
        let mapped = 0xffff_0000 | u64::from(u32::from_le_bytes([10, 1, 2, 3])) << 32;
        assert_eq!(address([0, mapped]).to_canonical().to_string(), "10.1.2.3");
        assert_eq!(address([0, 1 << 56]).to_string(), "::1");
    }
}
