//! The contract with the kernel programs about PostgreSQL: the status of a backend, and what connects it to
//! its client.
//!
//! A backend keeps its status (`PgBackendStatus`, src/include/utils/backend_status.h) in shared memory, and
//! the exported variable `MyBEEntry` points to it. The sampling program runs in the backend's own context,
//! so it reads the status directly: nothing is installed in the server, and queries cost nothing extra. The
//! offsets are the same in versions 14 to 18. Each reading is checked by the process id that the status
//! contains.

use crate::sample::TraceContext;

/// Bytes of the status that a record carries: up to the end of `st_query_id`.
pub const STATUS_BYTES: usize = 0x1b0;

/// Offsets of the members of `PgBackendStatus`, in bytes.
pub mod status {
    /// `int st_changecount`: odd while the backend changes its status.
    pub const CHANGE_COUNT: usize = 0x00;
    /// `int st_procpid`: the backend's process id in its own pid namespace.
    pub const PROCESS: usize = 0x04;
    /// `TimestampTz st_activity_start_timestamp`: microseconds since 2000-01-01 UTC.
    pub const STATEMENT_START: usize = 0x20;
    /// `Oid st_databaseid`.
    pub const DATABASE: usize = 0x30;
    /// `Oid st_userid`.
    pub const USER: usize = 0x34;
    /// `BackendState st_state`.
    pub const STATE: usize = 0xe8;
    /// `char *st_appname`: `application_name`, at most 63 bytes.
    pub const APPLICATION: usize = 0xf0;
    /// `char *st_activity_raw`: the statement's text, truncated at `track_activity_query_size`.
    pub const TEXT: usize = 0xf8;
    /// `uint64 st_query_id`.
    pub const QUERY_ID: usize = 0x1a8;
}

/// PostgreSQL's epoch, 2000-01-01 UTC, in microseconds of Unix time.
pub const EPOCH_MICROSECONDS: i64 = 946_684_800_000_000;

/// Bytes of the buffer for a query's text in a backend record, its NUL included.
pub const TEXT_BYTES: usize = 2048;
/// Bytes of a process title in a backend record, its NUL included.
pub const TITLE_BYTES: usize = 128;
/// Bytes of an `application_name`, its NUL included (`NAMEDATALEN`).
pub const APPLICATION_BYTES: usize = 64;

/// Addresses (avma) of variables in the processes of one server; 0 for a variable that it does not export.
/// The addresses are the same in all of its processes, because they are forked from one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ServerVariables {
    /// `PgBackendStatus *MyBEEntry`
    pub my_be_entry: u64,
    /// `Port *MyProcPort`; the first member of `Port` is the socket's file descriptor.
    pub my_proc_port: u64,
    /// `uint32 *my_wait_event_info`
    pub my_wait_event_info: u64,
    /// `const char *debug_query_string`
    pub debug_query_string: u64,
    /// `BackgroundWorker *MyBgworkerEntry`; a `BackgroundWorker` begins with the worker's name.
    pub my_bgworker_entry: u64,
}

/// The name of a connection, which is the same when it is read from either end.
///
/// A TCP connection is named by its two addresses and ports, and by the network namespace if the addresses
/// are loopback addresses, since every namespace has the same ones. A connection of Unix sockets has no
/// such names. It is named by the address of the server's `struct sock` in the kernel, which is an identity
/// and never dereferenced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Connection {
    /// The client's IPv6 address in network byte order (an IPv4 address is mapped into it). For a Unix
    /// socket, the address of the server's `struct sock`, and zero.
    pub client: [u64; 2],
    /// The server's IPv6 address in the same form; zero for a Unix socket.
    pub server: [u64; 2],
    /// The client's port; 0 for a Unix socket.
    pub client_port: u16,
    /// The server's port; 0 for a Unix socket.
    pub server_port: u16,
    /// Inode number of the network namespace if the connection is a loopback connection, else 0.
    pub network_namespace: u32,
}

/// A connection, and when the backend that serves it was started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ServedConnection {
    /// The connection.
    pub connection: Connection,
    /// When the backend was started, nanoseconds of `CLOCK_MONOTONIC`. A connection's name may have been
    /// used before, so sends from before this time were for another backend.
    pub since: u64,
}

/// A process of a server, in the form in which a parallel worker identifies its leader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct BackendKey {
    /// Index of the server.
    pub server: u32,
    /// Process id in the server's pid namespace.
    pub pid: u32,
}

/// The revision of a backend's status that was last sent to the agent. A sample that finds the same
/// revision needs no new record. It is part of [`crate::table::Space`], which every sample reads anyway: a
/// map of its own would mean more cold pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct StatusRevision {
    /// Address of the backend's status; 0 if no record was sent that a sample may refer to.
    pub entry: u64,
    /// Address of the backend's wait event; 0 if it has none.
    pub wait_event: u64,
    /// The status's `st_changecount` in the last record.
    pub changes: u32,
    /// The backend's process id in its own pid namespace.
    pub pid: u32,
}

/// What happened to the stack of a send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CallerStack {
    /// It was not taken because the budget was spent, or it could not be taken or sent whole.
    Refused = 0,
    /// It is held in the kernel until a sample needs it.
    Held = 1,
    /// It was sent to the agent as a [`crate::sample::KIND_CALLER`] record.
    Sent = 2,
}

/// A send on a connection to a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Send {
    /// When the send was seen, nanoseconds of `CLOCK_MONOTONIC`: before the server is woken, and except for
    /// Unix sockets at `sk_data_ready` also before the first byte has left. 0 in an unused slot, and while
    /// the send is being written.
    pub time: u64,
    /// Process that sent, in the initial pid namespace.
    pub pid: u32,
    /// Thread that sent, in the initial pid namespace.
    pub tid: u32,
    /// Logical CPU on which it was sent. Together with `time` it identifies the send.
    pub cpu: u32,
    /// A [`CallerStack`].
    pub stack: u32,
    /// Number of the connection's turn. It is increased when the server begins to answer, so the sends of
    /// one turn wait in the server together.
    pub turn: u32,
    /// Hash of the stack; 0 if no stack was taken.
    pub hash: u32,
    /// The thread's trace context; zero if it has none.
    pub trace: TraceContext,
    /// Name of the thread, ended by NUL.
    pub comm: [u8; 16],
}

/// A CPU's budget of stacks at sends, and how long those sends took.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Budget {
    /// Start of the current window, nanoseconds.
    pub window: u64,
    /// Sends seen in the window.
    pub seen: u32,
    /// Sends in the window that were chosen for a stack.
    pub taken: u32,
    /// A send is chosen when a random `u32` is not above this threshold.
    pub threshold: u32,
    /// Unused, zero.
    pub padding: u32,
    /// Histogram of how long the sends with a stack took, in steps of 2 to the power of [`TIME_STEP_BITS`]
    /// nanoseconds. The last slot also counts those that took longer.
    pub times: [u32; TIME_STEPS],
}

/// Width of a slot of [`Budget::times`] as a power of two: 512 ns.
pub const TIME_STEP_BITS: u32 = 9;
/// Slots of [`Budget::times`]; together they cover 65 µs.
pub const TIME_STEPS: usize = 128;

/// The result of the search for the send that began the statement of a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum CallerSearch {
    /// There was nothing to search for: the process has no client connection or no statement.
    #[default]
    None = 0,
    /// The newest send that is not later than the statement's start was found.
    Found = 1,
    /// No send is remembered for the connection: none was seen since the recording began, the client is on
    /// another host, or the connection was evicted.
    NoSend = 2,
    /// The send cannot be told any more: all remembered sends are later than the statement's start, the
    /// candidate was overwritten or belongs to an earlier statement, or a send is being noted at this
    /// moment.
    Forgotten = 3,
    /// Several sends from different stacks waited in the server when the statement began (pipelining). The
    /// statement belongs to one of them.
    Several = 4,
}

/// Flag of a backend record: the status was read, belongs to this process, and was not being changed.
pub const HAS_STATUS: u32 = 1;
/// Flag of a backend record: the text is that of `debug_query_string`, because the status has none.
pub const TEXT_OF_DEBUG: u32 = 2;
/// Flag of a backend record: the process is a parallel worker, and `leader` is set.
pub const HAS_LEADER: u32 = 4;
/// Flag of a backend record: the process has a client connection; that of a parallel worker is its leader's.
pub const HAS_CONNECTION: u32 = 8;

/// Start of a backend record, which is sent before the sample with the same `cpu` and `time`. It is
/// followed by `text_bytes` bytes of query text.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct BackendHeader {
    /// [`crate::sample::KIND_BACKEND`].
    pub kind: u32,
    /// Logical CPU.
    pub cpu: u32,
    /// `CLOCK_MONOTONIC`, nanoseconds: the same as in the sample's header.
    pub time: u64,
    /// [`HAS_STATUS`] and the other flags.
    pub flags: u32,
    /// Index of the server.
    pub server: u32,
    /// Process id of a parallel worker's leader in the server's pid namespace; valid with [`HAS_LEADER`].
    pub leader: u32,
    /// `wait_event_info`; 0 if the backend is not waiting.
    pub wait_event: u32,
    /// A [`CallerSearch`].
    pub search: u32,
    /// Bytes of text that follow the header.
    pub text_bytes: u32,
    /// The send that the search found.
    pub send: Send,
    /// The connection; valid with [`HAS_CONNECTION`].
    pub connection: Connection,
    /// The process's title (`argv[0]`), ended by NUL.
    pub title: [u8; TITLE_BYTES],
    /// `application_name`, ended by NUL.
    pub application: [u8; APPLICATION_BYTES],
    /// The first bytes of `PgBackendStatus`. Only the parts with the members named in [`status`] are read;
    /// the rest is zero.
    pub status: [u8; STATUS_BYTES],
}

const _: () = assert!(size_of::<Connection>() == 40);
const _: () = assert!(size_of::<Send>() == 72);
const _: () = assert!(
    size_of::<BackendHeader>() == 40 + 72 + 40 + TITLE_BYTES + APPLICATION_BYTES + STATUS_BYTES
);

/// Whether a send that begins with these two bytes may start a statement. In PostgreSQL's protocol 3 such a
/// send begins with a message `Query`, `Parse`, `Bind`, `Execute`, `Describe`, `Close` or `FunctionCall`.
/// The type is followed by the length in four bytes, the first of which is 0 if the message is shorter than
/// 16 MiB. `Sync` and the rows of a `COPY` do not match, even if the send begins in the middle of a
/// message. On an encrypted connection a TLS record of application data matches, since its content is
/// unknown.
pub const fn may_start_statement(first: [u8; 2]) -> bool {
    matches!(
        first,
        [b'Q' | b'P' | b'B' | b'E' | b'D' | b'C' | b'F', 0] | [23, 3]
    )
}

/// The offset between the wall clock, by which PostgreSQL times its statements, and the clock of the samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct WallClock {
    /// `CLOCK_REALTIME` − `CLOCK_MONOTONIC`, nanoseconds.
    pub offset: i64,
    /// The offset before the wall clock was last set; equal to `offset` if it was never set.
    pub offset_before: i64,
    /// When `offset_before` was last seen to be right, nanoseconds of `CLOCK_MONOTONIC`; 0 if the clock was
    /// never set.
    pub set_after: u64,
    /// `CLOCK_TAI` − `CLOCK_MONOTONIC`, nanoseconds, read together with `offset`. Both change when the wall
    /// clock is set (a leap second changes `offset` alone), and kernel programs can read `CLOCK_TAI` but not
    /// `CLOCK_REALTIME`.
    pub tai_offset: i64,
}

/// Two readings of [`WallClock::offset`] or [`WallClock::tai_offset`] that differ by more than this mean
/// that the wall clock was set between them, nanoseconds. Gradual corrections (slewing) apply to the
/// monotonic clock as well, so they do not change the offset. The value is far above the error of a
/// reading.
pub const WALL_CLOCK_STEP: u64 = 100_000;

impl WallClock {
    /// Converts the start of a statement from PostgreSQL's microseconds to nanoseconds of
    /// `CLOCK_MONOTONIC`. Returns 0 if the statement has no start. `now`, also of `CLOCK_MONOTONIC`, must
    /// not be before the start.
    pub const fn statement_start(&self, microseconds: i64, now: u64) -> u64 {
        if microseconds <= 0 {
            return 0;
        }
        // The number is read from the server's memory and may be anything, hence the wrapping arithmetic.
        let unix = microseconds
            .wrapping_add(EPOCH_MICROSECONDS)
            .wrapping_mul(1000);
        let start = since_boot(unix.wrapping_sub(self.offset));
        // The start of a statement that began before the clock was set must be converted by the old offset.
        // After a step back, a start may be possible by either offset; then the later time is taken, and
        // the send is found by its turn rather than by its time.
        if start < self.set_after || start > now {
            since_boot(unix.wrapping_sub(self.offset_before))
        } else {
            start
        }
    }
}

const fn since_boot(time: i64) -> u64 {
    if time < 0 { 0 } else { time as u64 }
}

/// How much later than its statement's start a send may appear to be, nanoseconds: the start is in whole
/// microseconds, and the offset between the clocks is read with an error of less than one microsecond.
pub const START_TOLERANCE: u64 = 2_000;

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-01-01 00:00:00 UTC is 26 years, with 7 leap days, after PostgreSQL's epoch.
    #[test]
    fn starts() {
        let days = 26 * 365 + 7;
        let postgres = days * 86_400 * 1_000_000;
        let unix = 1_767_225_600 * 1_000_000_000;
        let clock = |offset| WallClock {
            offset,
            offset_before: offset,
            ..WallClock::default()
        };
        assert_eq!(clock(unix - 5).statement_start(postgres, 10), 5);
        assert_eq!(clock(0).statement_start(0, 10), 0);
        assert_eq!(clock(i64::MAX / 2).statement_start(1, 10), 0);
    }

    /// The clock is set forward or back, while one statement begins before that and another after it.
    #[test]
    fn starts_when_the_clock_was_set() {
        const SECOND: i64 = 1_000_000_000;
        let to_postgres = |unix: i64| unix / 1000 - EPOCH_MICROSECONDS;
        let before = 1_767_225_600 * SECOND;
        let (early, seen, late, now) = (90 * SECOND, 99 * SECOND, 101 * SECOND, 110 * SECOND);
        for (step, seems) in [
            (-3600, early),
            (15, early),
            (3600, early),
            (-15, early + 15 * SECOND),
        ] {
            let clock = WallClock {
                offset: before + step * SECOND,
                offset_before: before,
                set_after: seen as u64,
                tai_offset: 0,
            };
            let start = |postgres| clock.statement_start(postgres, now as u64);
            assert_eq!(start(to_postgres(early + before)), seems as u64, "{step}");
            assert_eq!(
                start(to_postgres(late + clock.offset)),
                late as u64,
                "{step}"
            );
        }
    }
}
