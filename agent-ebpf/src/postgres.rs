//! What a PostgreSQL backend tells about itself, and what joins it to its client.
//!
//! A backend keeps its status (`PgBackendStatus`, src/include/utils/backend_status.h) in shared memory,
//! where the exported variable `MyBEEntry` points to it. The sampling program runs in the backend's own
//! context, so it reads the status directly: nothing is installed in the server and nothing is paid per
//! query. The offsets are those of versions 14 to 18, where they did not change; each reading checks itself
//! by the process id in it.

use crate::sample::TraceContext;

/// Bytes of the status that are read: up to and with `st_query_id`.
pub const STATUS_BYTES: usize = 0x1b0;

/// Offsets of the status's members, bytes.
pub mod status {
    /// `int st_changecount`: odd while the backend writes.
    pub const CHANGE_COUNT: usize = 0x00;
    /// `int st_procpid`: the backend's pid as it sees it itself.
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
    /// `char *st_activity_raw`: the text, cut at `track_activity_query_size`.
    pub const TEXT: usize = 0xf8;
    /// `uint64 st_query_id`.
    pub const QUERY_ID: usize = 0x1a8;
}

/// 2000-01-01 UTC, PostgreSQL's epoch, in microseconds of Unix time.
pub const EPOCH_MICROSECONDS: i64 = 946_684_800_000_000;

/// Bytes of a query's text that travel with a sample.
pub const TEXT_BYTES: usize = 2048;
/// Bytes of a process title that travel with a sample.
pub const TITLE_BYTES: usize = 128;
/// Bytes of an `application_name`, its NUL included (`NAMEDATALEN`).
pub const APPLICATION_BYTES: usize = 64;

/// Where the processes of one server keep their variables: avma, 0 for one that is not exported. One
/// address serves all of them, because they are forked from one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct ServerVariables {
    /// `PgBackendStatus *MyBEEntry`
    pub my_be_entry: u64,
    /// `Port *MyProcPort`; its first member is the socket's file descriptor.
    pub my_proc_port: u64,
    /// `uint32 *my_wait_event_info`
    pub my_wait_event_info: u64,
    /// `const char *debug_query_string`
    pub debug_query_string: u64,
    /// `BackgroundWorker *MyBgworkerEntry`; it begins with the worker's name.
    pub my_bgworker_entry: u64,
}

/// A connection, named alike from both of its ends.
///
/// TCP: the two addresses and ports; and the network namespace where the addresses are loopback's, which
/// every namespace has. A Unix socket has no such names: there it is the address of the server's `struct
/// sock` in the kernel, an identity that is never followed from here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Connection {
    /// Client's IPv6 address (IPv4 mapped into it) in memory order; or the server's socket.
    pub client: [u64; 2],
    /// ServerVariables's address.
    pub server: [u64; 2],
    /// Client's port.
    pub client_port: u16,
    /// ServerVariables's port.
    pub server_port: u16,
    /// Inode number of the network namespace of a loopback connection, else 0.
    pub network_namespace: u32,
}

/// A backend's end of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ServedConnection {
    /// The connection.
    pub connection: Connection,
    /// When the backend was started, `CLOCK_MONOTONIC`, nanoseconds. The name of a connection is used again;
    /// what was sent before was for another backend.
    pub since: u64,
}

/// A process of a server: what a parallel worker knows its leader by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct BackendKey {
    /// Index of the server.
    pub server: u32,
    /// Process id as the server's processes see it.
    pub pid: u32,
}

/// Which revision of a backend's status its last record had. It is kept with what every sample reads of its process: a
/// map of its own would be more cold pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct StatusRevision {
    /// Address of its status; 0: no record was sent.
    pub entry: u64,
    /// Address of its wait event; 0: it has none.
    pub wait_event: u64,
    /// The status's count of changes in that record.
    pub changes: u32,
    /// Its process id as it sees it itself.
    pub pid: u32,
}

/// What is known of the stack of a send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum CallerStack {
    /// The budget of stacks was spent.
    Refused = 0,
    /// It is held in the kernel until a sample asks for it.
    Held = 1,
    /// It was sent to the agent, as a [`crate::sample::KIND_CALLER`] record.
    Sent = 2,
}

/// A send on a connection to a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Send {
    /// `CLOCK_MONOTONIC` before the first byte left, nanoseconds; 0: none, or being written.
    pub time: u64,
    /// Process that sent, in the initial pid namespace.
    pub pid: u32,
    /// Its thread.
    pub tid: u32,
    /// Logical CPU. Together with `time` it names the send.
    pub cpu: u32,
    /// A [`CallerStack`].
    pub stack: u32,
    /// Changes when the server has answered: sends of one turn wait in the server together.
    pub turn: u32,
    /// Hash of the stack; 0 when it was not taken.
    pub hash: u32,
    /// The thread's trace context; zero when it has none.
    pub trace: TraceContext,
    /// Name of the thread, ended by NUL.
    pub comm: [u8; 16],
}

/// How many stacks a CPU takes at sends, and what they take.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Budget {
    /// Start of the window, nanoseconds.
    pub window: u64,
    /// Sends in it.
    pub seen: u32,
    /// Stacks taken in it.
    pub taken: u32,
    /// A send is chosen when a random number is not above this.
    pub threshold: u32,
    /// Unused, zero.
    pub padding: u32,
    /// Sends whose stack was taken, by how long they took: in steps of 2 to the power of [`TIME_STEP_BITS`]
    /// nanoseconds; the last slot has what took longer.
    pub times: [u32; TIME_STEPS],
}

/// See [`Budget::times`]: half a microsecond.
pub const TIME_STEP_BITS: u32 = 9;
/// Slots of [`Budget::times`]: 65 µs.
pub const TIME_STEPS: usize = 128;

/// How the search for the send behind a backend's sample ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum CallerSearch {
    /// There is nothing to search by: no client connection, or no statement.
    #[default]
    None = 0,
    /// The newest send that is not later than the statement's start.
    Found = 1,
    /// No send was seen on the connection since recording began, or the client is on another host.
    NoSend = 2,
    /// All sends that are remembered are later than the statement's start, or one is just being noted.
    Forgotten = 3,
    /// Several sends, from different stacks, waited in the server when the statement began (pipelining):
    /// it is one of theirs.
    Several = 4,
}

/// Flag of a backend record: the status was read, is this process's own, and was not being written.
pub const HAS_STATUS: u32 = 1;
/// Flag of a backend record: the text is `debug_query_string`'s, because the status has none.
pub const TEXT_OF_DEBUG: u32 = 2;
/// Flag of a backend record: it is a parallel worker, and `leader` is set.
pub const HAS_LEADER: u32 = 4;
/// Flag of a backend record: it has a client connection.
pub const HAS_CONNECTION: u32 = 8;

/// Start of a backend record, which comes before the sample of the same `cpu` and `time`. Followed by
/// `text_bytes` bytes of query text.
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
    /// Leader of a parallel worker, as the server's processes number it.
    pub leader: u32,
    /// `wait_event_info`; 0: not waiting.
    pub wait_event: u32,
    /// A [`CallerSearch`].
    pub search: u32,
    /// Bytes of text that follow.
    pub text_bytes: u32,
    /// The send that was found.
    pub send: Send,
    /// The connection, for one with [`HAS_CONNECTION`].
    pub connection: Connection,
    /// The process's title (`argv[0]`), ended by NUL.
    pub title: [u8; TITLE_BYTES],
    /// `application_name`, ended by NUL.
    pub application: [u8; APPLICATION_BYTES],
    /// The first bytes of `PgBackendStatus`, of which those are read that [`status`] names; the others are zero.
    pub status: [u8; STATUS_BYTES],
}

const _: () = assert!(size_of::<Connection>() == 40);
const _: () = assert!(size_of::<Send>() == 72);
const _: () = assert!(
    size_of::<BackendHeader>() == 40 + 72 + 40 + TITLE_BYTES + APPLICATION_BYTES + STATUS_BYTES
);

/// Whether what begins with these two bytes may start a statement. In PostgreSQL's protocol 3 that is a
/// message `Query`, `Parse`, `Bind`, `Execute`, `Describe`, `Close` or `FunctionCall`, whose length follows
/// in four bytes, the first of which is 0 below 16 MiB; not `Sync` and not the rows of a `COPY`, wherever in a
/// message the send begins. Encrypted, it is a TLS record of application data.
pub const fn may_start_statement(first: [u8; 2]) -> bool {
    matches!(
        first,
        [b'Q' | b'P' | b'B' | b'E' | b'D' | b'C' | b'F', 0] | [23, 3]
    )
}

/// The wall clock, by which PostgreSQL times its statements, against the clock of the samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct WallClock {
    /// `CLOCK_REALTIME` − `CLOCK_MONOTONIC`, nanoseconds.
    pub offset: i64,
    /// The same before the wall clock was last set; as `offset` where it never was.
    pub offset_before: i64,
    /// When `offset_before` was last seen to be right, nanoseconds on the clock of the samples; 0 where it is `offset`.
    pub set_after: u64,
    /// `CLOCK_TAI` − `CLOCK_MONOTONIC`, nanoseconds, read with `offset`. The two change together, and of the two the kernel
    /// programs can read this one.
    pub tai_offset: i64,
}

/// By how much two readings of [`WallClock::offset`] or [`WallClock::tai_offset`] differ at least when the wall clock was
/// set between them, nanoseconds. Its corrections by degrees are also those of the monotonic clock; this is far above
/// the error of a reading.
pub const WALL_CLOCK_STEP: u64 = 100_000;

impl WallClock {
    /// The time of a statement's start on the clock of the samples, nanoseconds, from PostgreSQL's microseconds. 0 when
    /// it has none. `now` is not before it, on the clock of the samples.
    pub const fn statement_start(&self, microseconds: i64, now: u64) -> u64 {
        if microseconds <= 0 {
            return 0;
        }
        // A server may claim any number.
        let unix = microseconds
            .wrapping_add(EPOCH_MICROSECONDS)
            .wrapping_mul(1000);
        let start = since_boot(unix.wrapping_sub(self.offset));
        // A statement that began before the clock was set has its start from the clock as it was. One that may have begun on
        // either side of a step back is taken for the later. Its send is then found by the turn, not by the time.
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

/// How much later than the statement's start a send may seem to be, nanoseconds: the start is in whole
/// microseconds, and the offset between the clocks is read with an error of less than one.
pub const START_TOLERANCE: u64 = 2_000;

#[cfg(test)]
mod tests {
    use super::*;

    /// 2026-01-01 00:00:00 UTC is 26 years, 7 leap days among them, after PostgreSQL's epoch.
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

    /// A statement that began before the wall clock was set and one that began after it, wherever the clock was set to.
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
