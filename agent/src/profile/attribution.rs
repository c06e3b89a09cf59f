//! What a sample was for: the statement that a PostgreSQL backend ran, who asked for it, and the trace.

use std::sync::Arc;

use agent_ebpf::sample::{Outcome, TraceContext};

use super::ids::{ProcessIndex, QueryIndex, StackId};
use super::wait_event::WaitEvent;

/// A query: what statements that differ in their literals only have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// PostgreSQL's query id, decimal; or, where the server computes none, `text:` and a hash of the text.
    pub id: String,
    /// Its text without literals (unless the full text was asked for).
    pub text: Arc<str>,
}

/// What else is known of a sample.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Attribution {
    /// The trace that the work was for; a backend's is its caller's.
    pub trace: TraceContext,
    /// Set for processes of a PostgreSQL server.
    pub backend: Option<Arc<Backend>>,
}

/// What a process of a PostgreSQL server was doing. Texts are empty where nothing is known.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Backend {
    /// `client backend`, `parallel worker`, `checkpointer` …, as in `pg_stat_activity.backend_type`.
    pub kind: Arc<str>,
    /// Port of the server; 0 when unknown.
    pub port: u16,
    /// The statement; `None` for a process that runs none, or whose statement could not be read.
    pub query: Option<QueryIndex>,
    /// Where in its life.
    pub phase: Phase,
    /// As in `pg_stat_activity.state`.
    pub state: &'static str,
    /// What it was about to wait for.
    pub wait: WaitEvent,
    /// Database.
    pub database: Arc<str>,
    /// Role.
    pub user: Arc<str>,
    /// `application_name`
    pub application: Arc<str>,
    /// Client's address, `local` for a Unix socket.
    pub client: Arc<str>,
    /// Who asked.
    pub caller: Caller,
}

/// Where a backend was between two statements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// It ran the statement.
    Executing,
    /// It had reported its end: sends what is left of the answer, reads what comes next. The statement is
    /// the one that ended.
    Between,
    /// It runs no statements, or had run none yet.
    NoStatement,
}

impl Phase {
    /// Name for labels.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Executing => "executing",
            Phase::Between => "between statements",
            Phase::NoStatement => "no statement",
        }
    }
}

/// Who asked a backend for its statement.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Caller {
    /// Nobody: a background process, or a backend that has run no statement yet.
    None,
    /// A process of this machine, and its stack at the send.
    Known {
        /// The process.
        process: ProcessIndex,
        /// Its stack.
        stack: StackId,
    },
    /// A process of this machine, and the leaf end of its stack: the walk did not come to the root.
    Partial {
        /// The process.
        process: ProcessIndex,
        /// The frames that were found.
        stack: StackId,
        /// How the walk ended.
        outcome: Outcome,
    },
    /// A process of this machine, whose stack is not known.
    Process {
        /// The process.
        process: ProcessIndex,
        /// Why not.
        reason: Unknown,
    },
    /// Not known.
    Unknown(Unknown),
}

impl Caller {
    /// The value of the label: `known`, `partial`, or why not. `None` of nobody.
    pub const fn label(&self) -> Option<&'static str> {
        match self {
            Caller::None => None,
            Caller::Known { .. } => Some(KNOWN),
            Caller::Partial { .. } => Some(PARTIAL),
            Caller::Process { reason, .. } | Caller::Unknown(reason) => Some(reason.name()),
        }
    }
}

/// Label of a caller whose stack is known.
pub const KNOWN: &str = "known";

/// Label of a caller of whose stack the leaf end is known.
pub const PARTIAL: &str = "partial";

/// Why a caller, or its stack, is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unknown {
    /// The budget of stacks was spent.
    Budget,
    /// The stack was taken, but no frame of it was found, or it was not kept (a bound was reached).
    Lost,
    /// No send was seen on the connection: it is older than the recording, or it was made by a way that is
    /// not watched.
    NoSend,
    /// The client is at another address: on another host, or behind a translation of addresses.
    Remote,
    /// The statement began before the sends to its server were watched: before the recording, or right
    /// after a new server had started.
    Before,
    /// Only later sends are remembered.
    Forgotten,
    /// Several requests were in the server when the statement began.
    Several,
    /// The leader of a parallel worker is not known.
    Leader,
    /// The backend's state could not be read.
    State,
}

impl Unknown {
    /// Every reason.
    pub const ALL: [Unknown; 9] = [
        Unknown::Budget,
        Unknown::Lost,
        Unknown::NoSend,
        Unknown::Remote,
        Unknown::Before,
        Unknown::Forgotten,
        Unknown::Several,
        Unknown::Leader,
        Unknown::State,
    ];

    /// Name for labels and summaries.
    pub const fn name(self) -> &'static str {
        match self {
            Unknown::Budget => "not_captured",
            Unknown::Lost => "stack_lost",
            Unknown::NoSend => "no_send_seen",
            Unknown::Remote => "remote_client",
            Unknown::Before => "before_recording",
            Unknown::Forgotten => "send_forgotten",
            Unknown::Several => "several_sends",
            Unknown::Leader => "leader_unknown",
            Unknown::State => "state_unreadable",
        }
    }

    /// What stands in the picture where the caller would.
    pub const fn frame(self) -> &'static str {
        match self {
            Unknown::Budget => "[caller not captured]",
            Unknown::Lost => "[caller's stack lost]",
            Unknown::NoSend => "[caller not seen]",
            Unknown::Remote => "[caller at another address]",
            Unknown::Before => "[asked before the recording]",
            Unknown::Forgotten => "[caller forgotten]",
            Unknown::Several => "[one of several callers]",
            Unknown::Leader => "[leader of the parallel worker unknown]",
            Unknown::State => "[state of the backend not readable]",
        }
    }
}
