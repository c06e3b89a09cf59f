//! What the current process says of itself when it belongs to a PostgreSQL server, see
//! [`agent_ebpf::postgres`].

use agent_ebpf::{
    counters::Counter,
    postgres::{
        BackendHeader, BackendKey, CallerSearch, Connection, HAS_CONNECTION, HAS_LEADER,
        HAS_STATUS, STATUS_BYTES, ServedConnection, ServerVariables, StatusRevision, TEXT_BYTES,
        TEXT_OF_DEBUG, TITLE_BYTES, status,
    },
    sample::{KIND_BACKEND, SampleHeader},
    table::Space,
};
use aya_ebpf::{bindings::BPF_RB_NO_WAKEUP, helpers::bpf_ktime_get_ns};

use crate::{
    counting,
    maps::{BACKEND, BACKENDS, KNOWN, PROCESSES, SERVERS},
    output, sends, socket,
    state::{BackendFacts, BackendRecord},
    task,
    user::{self, follow, read_string},
    words,
};

/// What the backend says becomes known with its sample: by a record before it, or as before.
#[inline(always)]
pub fn tell(space: &Space, sample: &mut SampleHeader) {
    // SAFETY: the helper has no preconditions.
    let start = unsafe { bpf_ktime_get_ns() };
    if is_unchanged(&space.revision) {
        sample.is_backend_unchanged = 1;
        sample.wait_event = wait_event(space.revision.wait_event);
    } else {
        let revision = tell_all(space.server, sample).unwrap_or_default();
        note(sample.pid, sample.mm, revision);
    }
    counting::one(Counter::Backends);
    // SAFETY: the helper has no preconditions.
    let end = unsafe { bpf_ktime_get_ns() };
    counting::add(Counter::BackendNanos, end.wrapping_sub(start));
}

/// Whether nothing of the status has changed since it was sent: the text, the state and the query's number are
/// the same then, and so is what was found by them. A statement takes many samples, and its record is some fifteen
/// cache lines that nobody else touches.
#[inline(always)]
fn is_unchanged(revision: &StatusRevision) -> bool {
    // `st_changecount` and `st_procpid`.
    revision.entry != 0
        && user::read::<[u32; 2]>(revision.entry) == Some([revision.changes, revision.pid])
}

/// Notes the revision of the status that was sent.
#[inline(always)]
fn note(pid: u32, mm: u64, revision: StatusRevision) {
    if let Some(space) = PROCESSES.get_ptr_mut(pid) {
        // SAFETY: nobody writes this but the process's own samples, and whoever replaces all of it.
        let space = unsafe { &mut *space };
        if space.mm == mm {
            space.revision = revision;
        }
    }
}

/// The sample that a backend record was for was lost, so its record is useless: the next sample sends it again.
#[inline(always)]
pub fn forget(sample: &SampleHeader) {
    note(sample.pid, sample.mm, StatusRevision::default());
}

/// Sends the status and what goes with it. `server` counts from 1. Returns the revision that was sent, if the next sample
/// may refer to it.
#[inline(always)]
fn tell_all(server: u32, sample: &SampleHeader) -> Option<StatusRevision> {
    let variables = SERVERS.get(server.checked_sub(1)?)?;
    let backend = BACKEND.get_ptr_mut(0)?;
    // SAFETY: this CPU's only user of its slot is the sampling program.
    let BackendRecord {
        header,
        text,
        facts: learnt,
    } = unsafe { &mut *backend };
    header.kind = KIND_BACKEND;
    header.cpu = sample.cpu;
    header.time = sample.time;
    header.server = server - 1;
    header.search = CallerSearch::None as u32;
    words::clear(&mut header.send);
    header.application[0] = 0;
    // SAFETY: a process runs on one CPU at a time.
    let is_known = |known: &*mut BackendFacts| unsafe { (**known).mm } == sample.mm;
    if KNOWN
        .get_ptr_mut(sample.pid)
        .is_none_or(|known| !is_known(&known))
    {
        let is_all = learn(variables, header.server, learnt);
        learnt.mm = if is_all { sample.mm } else { 0 };
        let _ = KNOWN.insert(sample.pid, &*learnt, 0);
    }
    let Some(known) = KNOWN.get_ptr_mut(sample.pid) else {
        counting::one(Counter::ConnectionMapFull);
        return None;
    };
    // SAFETY: as above.
    let known = unsafe { &mut *known };
    describe(variables, header, text, known);
    if header.flags & HAS_STATUS == 0 {
        // It is still starting: to be asked again.
        known.mm = 0;
    }
    // Without a statement the text is another variable's, whose changes are not counted; and what is not all known yet
    // is asked for again.
    let statement = word(&header.status, status::STATEMENT_START);
    let is_sought = header.flags & HAS_CONNECTION != 0;
    let is_counted =
        known.mm != 0 && statement != 0 && (!is_sought || known.statement == statement);
    let revision = StatusRevision {
        entry: known.entry,
        wait_event: known.wait_event,
        changes: half(&header.status, status::CHANGE_COUNT),
        pid: known.pid,
    };
    let bytes = size_of::<BackendHeader>() + header.text_bytes as usize;
    // SAFETY: the helper copies as many bytes, which begin with the header.
    let is_sent = output::send(unsafe { &mut *backend }, bytes, BPF_RB_NO_WAKEUP);
    (is_sent && is_counted).then_some(revision)
}

/// Finds out what does not change; false when something of it cannot be known yet.
#[inline(always)]
fn learn(variables: &ServerVariables, server: u32, known: &mut BackendFacts) -> bool {
    known.entry = follow(variables.my_be_entry).unwrap_or(0);
    known.wait_event = follow(variables.my_wait_event_info).unwrap_or(0);
    known.pid = task::own_pid().unwrap_or(0);
    known.leader = 0;
    known.flags = 0;
    known.statement = 0;
    known.title[0] = 0;
    title(&mut known.title);
    if let Some(port) = follow(variables.my_proc_port) {
        let Some(served) = own_connection(port).and_then(|own| remember(server, known.pid, own))
        else {
            return false;
        };
        known.served = served;
        known.flags = HAS_CONNECTION;
        return true;
    }
    let Some(leader) = follow(variables.my_bgworker_entry).and_then(leader) else {
        return true;
    };
    known.leader = leader;
    known.flags = HAS_LEADER;
    let key = BackendKey {
        server,
        pid: leader,
    };
    // SAFETY: the value is copied at once.
    let Some(served) = (unsafe { BACKENDS.get(key) }) else {
        return false;
    };
    words::copy(&mut known.served, served);
    known.flags = HAS_LEADER | HAS_CONNECTION;
    true
}

/// Fills the record.
#[inline(always)]
fn describe(
    variables: &ServerVariables,
    header: &mut BackendHeader,
    text: &mut [u8; TEXT_BYTES],
    known: &mut BackendFacts,
) {
    header.flags = known.flags;
    header.leader = known.leader;
    header.title = known.title;
    header.wait_event = wait_event(known.wait_event);
    let address = status_of(variables, header, known);
    header.text_bytes = read_text(address, text);
    if known.flags & HAS_CONNECTION == 0 {
        return;
    }
    words::copy(&mut header.connection, &known.served.connection);
    let statement = word(&header.status, status::STATEMENT_START);
    if header.flags & HAS_STATUS == 0 || statement == 0 {
        return;
    }
    // What was sent later does not change which send was the last before.
    if known.statement != statement {
        // The next sample may know more of what is not certain.
        let is_certain = sends::find(header, statement, known.served.since);
        known.search = header.search;
        words::copy(&mut known.send, &header.send);
        known.statement = if is_certain { statement } else { 0 };
    } else {
        header.search = known.search;
        words::copy(&mut header.send, &known.send);
    }
}

#[inline(always)]
fn wait_event(address: u64) -> u32 {
    match address {
        0 => 0,
        address => user::read(address).unwrap_or(0),
    }
}

/// Reads the status; the address of the text, 0 when there is none. A status that was being written is not
/// taken: its text may be the beginning of one statement and the end of another, in which a literal looks
/// like anything. (Only the backend itself writes it, and it is interrupted.)
#[inline(always)]
fn status_of(variables: &ServerVariables, header: &mut BackendHeader, known: &BackendFacts) -> u64 {
    let status = &mut header.status;
    if known.entry != 0
        && read::<{ status::CHANGE_COUNT }, { status::USER + 4 }>(known.entry, status)
        && read::<{ status::STATE }, { status::TEXT + 8 }>(known.entry, status)
        && read::<{ status::QUERY_ID }, STATUS_BYTES>(known.entry, status)
        && half(status, status::PROCESS) == known.pid
        && half(status, status::CHANGE_COUNT) & 1 == 0
    {
        header.flags |= HAS_STATUS;
        read_string(word(status, status::APPLICATION), &mut header.application);
        let text = word(status, status::TEXT);
        // Before the first statement, and with `track_activities = off`, there is no start.
        if word(status, status::STATEMENT_START) != 0 {
            return text;
        }
    } else {
        // What it never changes is kept where it was read: without the database the text would be another query's.
        if half(status, status::PROCESS) != known.pid {
            word_set(status, status::DATABASE, 0);
        }
        status[status::STATE] = 0;
        word_set(status, status::STATEMENT_START, 0);
        word_set(status, status::CHANGE_COUNT, 0);
    }
    match follow(variables.debug_query_string) {
        Some(text) => {
            header.flags |= TEXT_OF_DEBUG;
            text
        }
        None => 0,
    }
}

/// The connection of a backend's `Port`.
#[inline(always)]
fn own_connection(port: u64) -> Option<Connection> {
    socket::of_server(socket::of_descriptor(user::read(port)?)?)
}

/// Notes the connection of the current backend, for its parallel workers. `pid` is as it sees it itself.
#[inline(always)]
pub fn remember(server: u32, pid: u32, connection: Connection) -> Option<ServedConnection> {
    let key = BackendKey { server, pid };
    let since = task::start_time()?;
    let served = ServedConnection { connection, since };
    // SAFETY: the value is compared at once.
    if unsafe { BACKENDS.get(key) } != Some(&served) {
        let _ = BACKENDS.insert(key, served, 0);
    }
    Some(served)
}

/// Forgets a process that has ended or runs another program. `server` counts from 1; 0: none.
#[inline(always)]
pub fn ended(pid: u32, server: u32) {
    let Some(known) = KNOWN.get_ptr(pid) else {
        return;
    };
    // SAFETY: the number is copied at once.
    let own = unsafe { (*known).pid };
    if server != 0 {
        let key = BackendKey {
            server: server - 1,
            pid: own,
        };
        let _ = BACKENDS.remove(key);
    }
    let _ = KNOWN.remove(pid);
}

/// Address of the current backend's status.
#[inline(always)]
pub fn status_address(variables: &ServerVariables) -> Option<u64> {
    follow(variables.my_be_entry)
}

/// Start of a backend's statement, in PostgreSQL's own time. `None` when it cannot be read, or the status is another
/// backend's.
#[inline(always)]
pub fn statement_of(entry: u64, pid: u32) -> Option<u64> {
    let words: [u64; status::STATEMENT_START / 8 + 1] = user::read(entry)?;
    const { assert!(status::PROCESS == 4) };
    ((words[0] >> 32) as u32 == pid).then_some(words[status::STATEMENT_START / 8])
}

/// The leader's pid from the entry of a parallel worker: it begins with the name, `parallel worker for PID
/// 123` (src/backend/access/transam/parallel.c, `LaunchParallelWorkers`).
#[inline(always)]
fn leader(entry: u64) -> Option<u32> {
    const PREFIX: [u64; 3] = [
        u64::from_le_bytes(*b"parallel"),
        u64::from_le_bytes(*b" worker "),
        u64::from_le_bytes(*b"for PID "),
    ];
    let name: [u64; 5] = user::read(entry)?;
    if name[0] != PREFIX[0] || name[1] != PREFIX[1] || name[2] != PREFIX[2] {
        return None;
    }
    let mut pid = 0u32;
    let mut at = 0;
    while at < 10 {
        let digit = (name[3 + at / 8] >> (at % 8 * 8)) as u8;
        if !digit.is_ascii_digit() {
            break;
        }
        pid = pid.wrapping_mul(10).wrapping_add(u32::from(digit - b'0'));
        at += 1;
    }
    Some(pid)
}

/// Reads the process's title: PostgreSQL writes it over its arguments.
#[inline(always)]
fn title(to: &mut [u8; TITLE_BYTES]) {
    if let Some(start) = task::arguments() {
        read_string(start, to);
    }
}

/// Reads the status's bytes from `FROM` to `TO`, of which nobody asks for all.
#[inline(always)]
fn read<const FROM: usize, const TO: usize>(entry: u64, to: &mut [u8; STATUS_BYTES]) -> bool {
    const { assert!(FROM < TO && TO <= STATUS_BYTES) };
    // SAFETY: the buffer is as large as the size says.
    unsafe {
        user::read_bytes(
            entry.wrapping_add(FROM as u64),
            to.as_mut_ptr().add(FROM),
            (TO - FROM) as u32,
        )
    }
}

/// Reads the text; its length without the NUL.
#[inline(always)]
fn read_text(address: u64, to: &mut [u8; TEXT_BYTES]) -> u32 {
    if address == 0 {
        return 0;
    }
    let length = read_string(address, to);
    if length <= 1 || length > TEXT_BYTES as i64 {
        return 0;
    }
    length as u32 - 1
}

/// A word of the status.
#[inline(always)]
fn word(status: &[u8; STATUS_BYTES], at: usize) -> u64 {
    // SAFETY: every offset of `status` is eight bytes or more before the end, and aligned.
    unsafe { status.as_ptr().add(at).cast::<u64>().read() }
}

#[inline(always)]
fn half(status: &[u8; STATUS_BYTES], at: usize) -> u32 {
    // SAFETY: as above, four bytes.
    unsafe { status.as_ptr().add(at).cast::<u32>().read() }
}

#[inline(always)]
fn word_set(status: &mut [u8; STATUS_BYTES], at: usize, value: u64) {
    // SAFETY: as above.
    unsafe { status.as_mut_ptr().add(at).cast::<u64>().write(value) }
}
