//! Joins the records of PostgreSQL's backends with their samples: finds the query without its literals, the
//! names of database and role, and the caller.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    rc::Rc,
    sync::Arc,
};

use agent_ebpf::{
    postgres::{BackendHeader, CallerSearch, HAS_LEADER, WallClock, status},
    sample::{SampleHeader, TraceContext},
};

use super::{
    callers::{Callers, KnownSend, PlaceCaller},
    counts::Counts,
    names::Names,
    servers::Servers,
    status::{BackendStatus, half, word},
};
use crate::{
    clock::now,
    kernel,
    profile::{Attribution, Backend, Caller, Phase, QueryIndex, WaitEvent},
    query::Texts,
    recent::Recent,
};

/// The number of executions that one half of [`Recent`] remembers. If half a million other executions were
/// sampled between two samples of an execution, it is counted again.
const MAX_EXECUTIONS: usize = 1 << 19;

/// The number of backends whose last record one half of [`Recent`] keeps, at most 3 KiB each.
const MAX_WORDS: usize = 4096;

/// A backend's record: its status, and the text of its statement.
struct Words {
    header: BackendHeader,
    text: Vec<u8>,
}

/// The result of [`Backends::attribute`].
#[derive(Debug, Default)]
pub struct SampleAttribution {
    /// The attribution; `None` if nothing is known.
    pub attribution: Option<Attribution>,
    /// Whether the sample is the first one of an execution of its statement.
    pub starts_execution: bool,
}

/// What is known about backends independently of a window.
pub struct Backends {
    /// When the recording began, nanoseconds.
    since: u64,
    /// Records whose sample has not been read yet.
    pending: Vec<Words>,
    /// The last record of each backend, by pid. It is valid until the backend sends another one.
    last: Recent<u32, Rc<Words>>,
    callers: Callers,
    executions: Recent<u64, ()>,
    names: Names,
}

/// The parts of a window that are needed to attribute its samples.
pub struct WindowQueries<'a> {
    /// The queries.
    pub texts: &'a mut Texts,
    /// How well samples could be attributed.
    pub counts: &'a mut Counts,
    /// Converts callers to the indices of the window.
    pub place: PlaceCaller<'a>,
}

impl Backends {
    /// Starts without any records; the recording begins now.
    pub fn new() -> Backends {
        Backends {
            since: now(),
            pending: Vec::new(),
            last: Recent::new(MAX_WORDS),
            callers: Callers::default(),
            executions: Recent::new(MAX_EXECUTIONS),
            names: Names::new(),
        }
    }

    /// Keeps a backend's record for the sample that follows.
    pub fn said(&mut self, backend: &kernel::BackendRecord<'_>) {
        // Each CPU has at most one record that waits. The sample of an older one was dropped because the
        // ring buffer was full.
        self.pending
            .retain(|old| old.header.cpu != backend.header.cpu);
        self.pending.push(Words {
            header: backend.header,
            text: backend.text.to_vec(),
        });
    }

    /// Updates the offset of the wall clock.
    pub fn set_clock(&mut self, clock: WallClock) {
        self.callers.clock = clock;
    }

    /// Keeps the stack of a send.
    pub fn keep_send(&mut self, cpu: u32, time: u64, send: KnownSend) {
        self.callers.keep(cpu, time, send);
    }

    /// Finds out what a sample's work was for: its statement, caller and trace.
    pub fn attribute(
        &mut self,
        sample: &SampleHeader,
        servers: &Servers,
        queries: &mut WindowQueries<'_>,
    ) -> SampleAttribution {
        let own_trace = sample.trace;
        let Some(words) = self.words(sample, queries.counts) else {
            let attribution = (own_trace != TraceContext::default()).then_some(Attribution {
                trace: own_trace,
                backend: None,
            });
            return SampleAttribution {
                attribution,
                starts_execution: false,
            };
        };
        let mut header = words.header;
        if sample.is_backend_unchanged != 0 {
            header.wait_event = sample.wait_event;
        }
        let server = servers.get(header.server);
        let version = server.and_then(|server| server.version);
        // The index may be reused for another server. Names and queries are stored by the server's number,
        // which is not.
        header.server = server.map_or(0, |server| server.number);
        let said = BackendStatus::new(&header, &words.text, version);
        let watched_since = server.and_then(|server| server.watched_since);
        let port = server.and_then(|server| server.port);
        let since = watched_since.unwrap_or(self.since);
        let backend = self.backend(&said, port.unwrap_or(0), since, queries);
        let starts_execution = backend.query.is_some() && self.starts_execution(said.header);
        let trace = said.trace();
        let attribution = Attribution {
            trace: match trace == TraceContext::default() {
                true => own_trace,
                false => trace,
            },
            backend: Some(Arc::new(backend)),
        };
        SampleAttribution {
            attribution: Some(attribution),
            starts_execution,
        }
    }

    /// The backend's record that applies to a sample: the one that was sent with it, or the last one.
    fn words(&mut self, sample: &SampleHeader, counts: &mut Counts) -> Option<Rc<Words>> {
        if sample.is_backend_unchanged != 0 {
            let last = self.last.get(&sample.pid);
            if last.is_none() {
                // So many other backends were sampled since that the record was evicted.
                counts.samples += 1;
                counts.for_clients += 1;
            }
            return last;
        }
        let belongs =
            |words: &Words| (words.header.cpu, words.header.time) == (sample.cpu, sample.time);
        let found = self.pending.iter().position(belongs)?;
        let words = Rc::new(self.pending.swap_remove(found));
        self.last.insert(sample.pid, Rc::clone(&words));
        Some(words)
    }

    fn backend(
        &mut self,
        said: &BackendStatus<'_>,
        port: u16,
        watched_since: u64,
        queries: &mut WindowQueries<'_>,
    ) -> Backend {
        let query = (!said.text.is_empty()).then(|| query_of(said, queries.texts));
        let phase = said.phase(query.is_some());
        let client = said.client();
        let caller = match query.is_some() && said.runs_for_clients() {
            true => (queries.place)(self.callers.of(said, &client, watched_since)),
            false => Caller::None,
        };
        count(queries.counts, said, query.is_some(), phase, &caller);
        let (database, user) = self.names.of(said);
        Backend {
            kind: self.names.shared(said.kind()),
            port,
            query,
            phase,
            state: said.state,
            wait: WaitEvent(said.header.wait_event),
            database,
            user,
            application: self.names.shared(&said.application()),
            client: self.names.shared(&client),
            caller,
        }
    }

    /// Whether this is the first sample of an execution. An execution is identified by its send, or by the
    /// statement's start if the send is not known. The samples of parallel workers count as those of their
    /// leader.
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
        let execution = hasher.finish();
        let is_new = self.executions.get(&execution).is_none();
        if is_new {
            self.executions.insert(execution, ());
        }
        is_new
    }
}

fn query_of(said: &BackendStatus<'_>, texts: &mut Texts) -> QueryIndex {
    // Query ids are computed from the OIDs of tables, which are only unique within a database. (The
    // database in the status does not change, so it can be used even if the status was being written.)
    let database = half(&said.header.status, status::DATABASE);
    let scope = u64::from(said.header.server) << 32 | u64::from(database);
    // The server truncates texts to `track_activity_query_size` bytes, usually a power of two, of which one
    // byte is the NUL.
    let is_cut = said.text.len() >= 127 && (said.text.len() + 1).is_power_of_two();
    let query = texts.insert(scope, said.query_id(), said.text, is_cut);
    QueryIndex(query.0)
}

fn count(
    counts: &mut Counts,
    said: &BackendStatus<'_>,
    has_query: bool,
    phase: Phase,
    caller: &Caller,
) {
    counts.samples += 1;
    if !said.runs_for_clients() {
        return;
    }
    counts.for_clients += 1;
    if has_query {
        counts.add_query(phase, caller, 1);
    } else {
        counts.starting += u64::from(said.is_parallel_worker());
    }
}
