//! Reads the status of the current process when it belongs to a PostgreSQL server, and sends it to the
//! agent. See [`agent_ebpf::postgres`].

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

/// Tells the agent the status of the sampled backend: by a record that is sent before the sample, or by a
/// flag in the sample if the status is the same as in the last record.
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

/// Whether the status has not changed since it was sent. Then the text, the state and the query id are the
/// same, and so is the send that was found for them. This is worth a check because a statement usually
/// takes many samples, and a record touches some fifteen cold cache lines.
#[inline(always)]
fn is_unchanged(revision: &StatusRevision) -> bool {
    // `st_changecount` and `st_procpid`.
    revision.entry != 0
        && user::read::<[u32; 2]>(revision.entry) == Some([revision.changes, revision.pid])
}

/// Stores the revision of the status that was sent.
#[inline(always)]
fn note(pid: u32, mm: u64, revision: StatusRevision) {
    if let Some(space) = PROCESSES.get_ptr_mut(pid) {
        // SAFETY: this field is written only by samples of this process, and when the whole entry is
        // replaced.
        let space = unsafe { &mut *space };
        if space.mm == mm {
            space.revision = revision;
        }
    }
}

/// Makes the next sample send a record again. To be called when a sample was lost: the agent cannot use a
/// backend record whose sample is missing.
#[inline(always)]
pub fn forget(sample: &SampleHeader) {
    note(sample.pid, sample.mm, StatusRevision::default());
}

/// Sends a complete backend record. `server` is 1 + the server's index. Returns the revision that was sent,
/// or `None` if the next sample must not refer to it.
#[inline(always)]
fn tell_all(server: u32, sample: &SampleHeader) -> Option<StatusRevision> {
    let variables = SERVERS.get(server.checked_sub(1)?)?;
    let backend = BACKEND.get_ptr_mut(0)?;
    // SAFETY: only the sampling program uses this CPU's slot.
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
    // SAFETY: the entry is written only by samples of its process, and a backend has one thread, which runs
    // on one CPU at a time.
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
        // The backend may still be starting, so the facts about it are gathered again at the next sample.
        known.mm = 0;
    }
    // Without a statement's start the text is taken from another variable, whose changes `st_changecount`
    // does not count. And what is still incomplete must be read again.
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
    // SAFETY: no other reference to the record is used while the helper copies it.
    let is_sent = output::send(unsafe { &mut *backend }, bytes, BPF_RB_NO_WAKEUP);
    (is_sent && is_counted).then_some(revision)
}

/// Gathers the facts about a backend that do not change. Returns false if some of them cannot be known yet.
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

/// Fills the record, and finds the send that began the backend's statement.
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
    // The search is made once for each statement: later sends do not change which send was the last one
    // before it.
    if known.statement != statement {
        // An uncertain result is not cached, since the next sample may find a certain one.
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

/// Reads the status, and returns the address of the text, or 0 if there is none. A status that the backend
/// was changing when it was interrupted is not used: its text may be the beginning of one statement
/// followed by the end of another, in which literals cannot be recognized and removed.
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
        // Before the first statement, and with `track_activities = off`, there is no start, and the text is
        // taken from `debug_query_string`.
        if word(status, status::STATEMENT_START) != 0 {
            return text;
        }
    } else {
        // Members that never change, such as the database, are kept if they were read from the right
        // status: the same text in another database would count as another query.
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

/// The connection of the current backend, from the address of its `Port`.
#[inline(always)]
fn own_connection(port: u64) -> Option<Connection> {
    socket::of_server(socket::of_descriptor(user::read(port)?)?)
}

/// Stores the connection of the current backend, so that its parallel workers can find it. `pid` is the
/// backend's process id in its own pid namespace.
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

/// Forgets a process that has exited or runs another program. `server` is 1 + the server's index, or 0 for
/// none.
#[inline(always)]
pub fn ended(pid: u32, server: u32) {
    let Some(known) = KNOWN.get_ptr(pid) else {
        return;
    };
    // SAFETY: the process id is copied at once.
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

/// Address of the current backend's status (`PgBackendStatus`).
#[inline(always)]
pub fn status_address(variables: &ServerVariables) -> Option<u64> {
    follow(variables.my_be_entry)
}

/// Start of the current backend's statement, in PostgreSQL's own time. `entry` is the address of its
/// status, `pid` its process id in its own pid namespace. `None` if the status cannot be read, or belongs
/// to another backend.
#[inline(always)]
pub fn statement_of(entry: u64, pid: u32) -> Option<u64> {
    let words: [u64; status::STATEMENT_START / 8 + 1] = user::read(entry)?;
    const { assert!(status::PROCESS == 4) };
    ((words[0] >> 32) as u32 == pid).then_some(words[status::STATEMENT_START / 8])
}

/// The leader's process id, from the `BackgroundWorker` entry of a parallel worker. The entry begins with
/// the worker's name, `parallel worker for PID 123` (src/backend/access/transam/parallel.c,
/// `LaunchParallelWorkers`). `None` for background workers of other kinds.
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

/// Reads the process's title, which PostgreSQL writes over its arguments.
#[inline(always)]
fn title(to: &mut [u8; TITLE_BYTES]) {
    if let Some(start) = task::arguments() {
        read_string(start, to);
    }
}

/// Reads the bytes of the status from offset `FROM` up to `TO`. Reading only the needed parts touches fewer
/// cache lines.
#[inline(always)]
fn read<const FROM: usize, const TO: usize>(entry: u64, to: &mut [u8; STATUS_BYTES]) -> bool {
    const { assert!(FROM < TO && TO <= STATUS_BYTES) };
    // SAFETY: `TO` is at most the size of the buffer.
    unsafe {
        user::read_bytes(
            entry.wrapping_add(FROM as u64),
            to.as_mut_ptr().add(FROM),
            (TO - FROM) as u32,
        )
    }
}

/// Reads the text, and returns its length without the NUL; 0 if it is empty or cannot be read.
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

/// The eight bytes of the status at an offset.
#[inline(always)]
fn word(status: &[u8; STATUS_BYTES], at: usize) -> u64 {
    // SAFETY: callers pass constants of the module `status`, which are at least eight bytes before the end
    // and aligned for what is read.
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
