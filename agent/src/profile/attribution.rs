//! What a sample's CPU time was used for: the statement that a PostgreSQL backend ran, the caller that sent
//! it, and the trace.

use std::sync::Arc;

use agent_ebpf::sample::{Outcome, TraceContext};

use super::ids::{ProcessIndex, QueryIndex, StackId};
use super::wait_event::WaitEvent;

/// A query: all statements that differ only in their literals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// PostgreSQL's query id in decimal; where the server computes none, `text:` and a hash of the text.
    pub id: String,
    /// The text without literals (with them, if the full text was requested).
    pub text: Arc<str>,
}

/// What is known about a sample besides its process and stack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Attribution {
    /// The trace that the work belongs to. A backend's work belongs to the trace of its caller.
    pub trace: TraceContext,
    /// Set for the processes of a PostgreSQL server.
    pub backend: Option<Arc<Backend>>,
}

/// What a process of a PostgreSQL server was doing. Texts are empty where nothing is known.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Backend {
    /// `client backend`, `parallel worker`, `checkpointer` …, as in `pg_stat_activity.backend_type`.
    pub kind: Arc<str>,
    /// Port of the server; 0 when unknown.
    pub port: u16,
    /// The query of its statement; `None` for a process that runs none, or whose statement could not be
    /// read.
    pub query: Option<QueryIndex>,
    /// Whether it was executing the statement.
    pub phase: Phase,
    /// As in `pg_stat_activity.state`.
    pub state: &'static str,
    /// The event that it was about to wait for.
    pub wait: WaitEvent,
    /// Name of the database.
    pub database: Arc<str>,
    /// Name of the role.
    pub user: Arc<str>,
    /// The client's `application_name`.
    pub application: Arc<str>,
    /// The client's address; `local` for a Unix socket.
    pub client: Arc<str>,
    /// The process and stack that sent the statement.
    pub caller: Caller,
}

/// Whether a backend was executing a statement or was between two statements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// It was executing the statement.
    Executing,
    /// It had reported the end of the statement, and was sending the rest of the answer or reading the next
    /// message. The query is that of the statement that ended.
    Between,
    /// It runs no statements, or had not run any yet.
    NoStatement,
}

impl Phase {
    /// The name in labels.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Executing => "executing",
            Phase::Between => "between statements",
            Phase::NoStatement => "no statement",
        }
    }
}

/// The process and stack that sent a backend its statement.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Caller {
    /// There is no caller, because this is a background process, or a backend that has not run a statement
    /// yet.
    None,
    /// A process of this machine, and its stack at the send.
    Known {
        /// The process.
        process: ProcessIndex,
        /// Its stack.
        stack: StackId,
    },
    /// A process of this machine, and the leaf end of its stack at the send: the walk did not reach the
    /// root.
    Partial {
        /// The process.
        process: ProcessIndex,
        /// The frames that were found.
        stack: StackId,
        /// How the walk ended.
        outcome: Outcome,
    },
    /// A process of this machine whose stack is not known.
    Process {
        /// The process.
        process: ProcessIndex,
        /// Why the stack is not known.
        reason: Unknown,
    },
    /// Neither the process nor its stack is known.
    Unknown(Unknown),
}

impl Caller {
    /// The value of the label `caller`: `known`, `partial`, or the reason why the caller is not known.
    /// `None` for [`Caller::None`].
    pub const fn label(&self) -> Option<&'static str> {
        match self {
            Caller::None => None,
            Caller::Known { .. } => Some(KNOWN),
            Caller::Partial { .. } => Some(PARTIAL),
            Caller::Process { reason, .. } | Caller::Unknown(reason) => Some(reason.name()),
        }
    }
}

/// The label of a caller whose stack is known.
pub const KNOWN: &str = "known";

/// The label of a caller of whose stack only the leaf end is known.
pub const PARTIAL: &str = "partial";

/// Why a caller, or its stack, is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unknown {
    /// The budget for stacks at sends was used up.
    Budget,
    /// The stack was taken, but no frame of it was found, or there was no room to keep it.
    Lost,
    /// No send was seen on the connection: the send is older than the recording, or was made in a way that
    /// is not observed.
    NoSend,
    /// The client is at another address: on another host, or behind address translation (NAT).
    Remote,
    /// The statement began before the sends to its server were observed: before the recording, or right
    /// after a new server had started.
    Before,
    /// Only sends after the start of the statement are still remembered.
    Forgotten,
    /// The server was working on several requests when the statement began.
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

    /// The name in labels and summaries.
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

    /// The name of the frame that takes the place of the caller in a picture.
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
