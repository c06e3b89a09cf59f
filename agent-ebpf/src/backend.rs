//! What the current process says of itself when it belongs to a PostgreSQL server, see
//! [`agent_ebpf::postgres`].

use core::ffi::c_void;

use agent_ebpf::{
    counters::Counter,
    limits::SENDS,
    postgres::{
        BackendHeader, BackendKey, CallerSearch, CallerStack, Connection, HAS_CONNECTION,
        HAS_LEADER, HAS_STATUS, START_TOLERANCE, STATUS_BYTES, Send, Served, Server, TEXT_BYTES,
        TEXT_OF_DEBUG, TITLE_BYTES, Told, WALL_CLOCK_STEP, WallClock, status,
    },
    sample::{KIND_BACKEND, SampleHeader},
    table::Space,
};
use aya_ebpf::{
    bindings::BPF_RB_NO_WAKEUP,
    helpers::{
        bpf_get_current_task, bpf_ktime_get_ns, bpf_probe_read_user,
        generated::{bpf_ktime_get_tai_ns, bpf_probe_read_user_str},
    },
};

use crate::{
    caller::{self, Ring},
    counting,
    lifecycle::field,
    maps::{
        BACKEND, BACKENDS, CONNECTIONS, HAS_TAI_CLOCK, KNOWN, MM_ARG_START, PID_LEVEL, PID_NUMBERS,
        PROCESSES, SERVERS, SIGNAL_PIDS, TASK_MM, TASK_SIGNAL, TASK_START_TIME, WALL_CLOCK,
    },
    sampling::send,
    socket, words,
};

/// Nanoseconds after a statement's start in which its send may not be noted yet: at a Unix socket the server can read
/// it before.
const YOUNG: u64 = 1_000_000;

/// Nanoseconds after a statement's start in which a send that is not there yet is looked for again: longer than a client
/// waits for a CPU between putting its bytes into a Unix socket and noting them, on a machine that is not hopeless.
const SETTLED: u64 = 100_000_000;

/// A record being built.
#[repr(C)]
pub struct Backend {
    header: BackendHeader,
    text: [u8; TEXT_BYTES],
    known: Known,
}

/// What does not change while a backend lives, and its last statement's send: found once, because each of it lies
/// behind pointers to memory that nobody has touched for long.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Known {
    /// Identity of its address space: another process of the same number has another. 0: not all is known yet.
    mm: u64,
    /// Address of its status.
    entry: u64,
    /// Address of its wait event.
    wait_event: u64,
    /// Its process id as it sees it itself.
    pid: u32,
    leader: u32,
    /// [`HAS_CONNECTION`] and [`HAS_LEADER`].
    flags: u32,
    /// A [`CallerSearch`]: how that for the send behind `statement` ended.
    search: u32,
    served: Served,
    /// Start of a statement, in PostgreSQL's own time; 0: none.
    statement: u64,
    /// Its send.
    send: Send,
    title: [u8; TITLE_BYTES],
}

/// What the backend says becomes known with its sample: by a record before it, or as before.
#[inline(always)]
pub fn tell(space: &Space, sample: &mut SampleHeader) {
    // SAFETY: the helper has no preconditions.
    let start = unsafe { bpf_ktime_get_ns() };
    if is_unchanged(&space.told) {
        sample.is_backend_unchanged = 1;
        sample.wait_event = wait_event(space.told.wait_event);
    } else {
        let told = tell_all(space.server, sample).unwrap_or_default();
        note(sample.pid, sample.mm, told);
    }
    counting::one(Counter::Backends);
    // SAFETY: the helper has no preconditions.
    let end = unsafe { bpf_ktime_get_ns() };
    counting::add(Counter::BackendNanos, end.wrapping_sub(start));
}

/// Whether nothing of the status has changed since it was told: the text, the state and the query's number are
/// the same then, and so is what was found by them. A statement takes many samples, and its record is some fifteen
/// cache lines that nobody else touches.
#[inline(always)]
fn is_unchanged(told: &Told) -> bool {
    // `st_changecount` and `st_procpid`.
    told.entry != 0 && user::<[u32; 2]>(told.entry) == Some([told.changes, told.pid])
}

/// Notes what a backend was told to be.
#[inline(always)]
fn note(pid: u32, mm: u64, told: Told) {
    if let Some(space) = PROCESSES.get_ptr_mut(pid) {
        // SAFETY: nobody writes this but the process's own samples, and whoever replaces all of it.
        let space = unsafe { &mut *space };
        if space.mm == mm {
            space.told = told;
        }
    }
}

/// The sample that a backend's words were for was lost, and they with it.
#[inline(always)]
pub fn forget(sample: &SampleHeader) {
    note(sample.pid, sample.mm, Told::default());
}

/// Sends all that the backend says. `server` counts from 1. What was told, if the same may be said again of the next
/// sample.
#[inline(always)]
fn tell_all(server: u32, sample: &SampleHeader) -> Option<Told> {
    let variables = SERVERS.get(server.checked_sub(1)?)?;
    let backend = BACKEND.get_ptr_mut(0)?;
    // SAFETY: this CPU's only user of its slot is the sampling program.
    let Backend {
        header,
        text,
        known: learnt,
    } = unsafe { &mut *backend };
    header.kind = KIND_BACKEND;
    header.cpu = sample.cpu;
    header.time = sample.time;
    header.server = server - 1;
    header.search = CallerSearch::None as u32;
    words::clear(&mut header.send);
    header.application[0] = 0;
    // SAFETY: a process runs on one CPU at a time.
    let is_known = |known: &*mut Known| unsafe { (**known).mm } == sample.mm;
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
    let told = Told {
        entry: known.entry,
        wait_event: known.wait_event,
        changes: half(&header.status, status::CHANGE_COUNT),
        pid: known.pid,
    };
    let bytes = size_of::<BackendHeader>() + header.text_bytes as usize;
    // SAFETY: the helper copies as many bytes, which begin with the header.
    let is_sent = send(unsafe { &mut *backend }, bytes, BPF_RB_NO_WAKEUP);
    (is_sent && is_counted).then_some(told)
}

/// Finds out what does not change; false when something of it cannot be known yet.
#[inline(always)]
fn learn(variables: &Server, server: u32, known: &mut Known) -> bool {
    known.entry = follow(variables.my_be_entry).unwrap_or(0);
    known.wait_event = follow(variables.my_wait_event_info).unwrap_or(0);
    known.pid = own_pid().unwrap_or(0);
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
    variables: &Server,
    header: &mut BackendHeader,
    text: &mut [u8; TEXT_BYTES],
    known: &mut Known,
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
        let is_certain = find_send(header, statement, known.served.since);
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
        address => user(address).unwrap_or(0),
    }
}

/// Reads the status; the address of the text, 0 when there is none. A status that was being written is not
/// taken: its text may be the beginning of one statement and the end of another, in which a literal looks
/// like anything. (Only the backend itself writes it, and it is interrupted.)
#[inline(always)]
fn status_of(variables: &Server, header: &mut BackendHeader, known: &Known) -> u64 {
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
    socket::of_server(socket::of_descriptor(user(port)?)?)
}

/// Notes the connection of the current backend, for its parallel workers. `pid` is as it sees it itself.
#[inline(always)]
pub fn remember(server: u32, pid: u32, connection: Connection) -> Option<Served> {
    let key = BackendKey { server, pid };
    // SAFETY: the current task, and an offset from the kernel's own BTF.
    let since = unsafe {
        field(
            bpf_get_current_task() as *const c_void,
            TASK_START_TIME.load(),
        )
    }?;
    let served = Served { connection, since };
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
pub fn status_address(variables: &Server) -> Option<u64> {
    follow(variables.my_be_entry)
}

/// Start of a backend's statement, in PostgreSQL's own time. `None` when it cannot be read, or the status is another
/// backend's.
#[inline(always)]
pub fn statement_of(entry: u64, pid: u32) -> Option<u64> {
    let words: [u64; status::STATEMENT_START / 8 + 1] = user(entry)?;
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
    let name: [u64; 5] = user(entry)?;
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

/// Finds the newest send that is not later than the statement's start, and sends its stack on if that
/// was not done yet. (Never simply the last send: a client may send more while the statement runs.)
///
/// False when it may be another after all, which is not to be remembered.
#[inline(always)]
fn find_send(header: &mut BackendHeader, statement: u64, since: u64) -> bool {
    let Some(clock) = WALL_CLOCK.get(0) else {
        return false;
    };
    let mut start = clock.statement_start(statement as i64, header.time);
    // Set a moment ago, which the agent has not seen yet; where that cannot be asked, a start before the backend's own or
    // in the future tells of it. The turns alone decide then.
    let is_strange = was_set(clock) | is_less(start, since) | is_less(header.time, start);
    if is_strange != 0 {
        start = header.time;
    }
    start = start.wrapping_add(START_TOLERANCE);
    let is_young = is_less(header.time, start.wrapping_add(YOUNG));
    let is_settled = 1 ^ is_less(header.time, start.wrapping_add(SETTLED));
    let Some(ring) = CONNECTIONS.get_ptr_mut(header.connection) else {
        header.search = CallerSearch::NoSend as u32;
        return is_settled != 0;
    };
    // SAFETY: the client may write to the ring meanwhile, on another CPU: a send that is being written has
    // the time 0, and what is overwritten now is the oldest.
    let ring = unsafe { &mut *ring };
    if ring.noting != 0 {
        header.search = CallerSearch::Forgotten as u32;
        return false;
    }
    // The last turn in which the statement can have been sent: it has not begun to answer a later one.
    let turn = ring
        .turn
        .wrapping_sub(1 ^ differ(ring.answered, statement) as u32);
    let mut best = (0, 0);
    let mut later = 0;
    let mut slot = 0;
    while slot < SENDS {
        let mut time = ring.sends[slot].time;
        later |= is_less(start, time);
        let is_of_later_turn = turn.wrapping_sub(ring.sends[slot].turn) >> 31;
        time &= u64::from(is_of_later_turn).wrapping_sub(1);
        if time > best.0 && time <= start && time >= since {
            best = (time, slot);
        }
        slot += 1;
    }
    if best.0 == 0 {
        header.search = match later {
            0 => CallerSearch::NoSend as u32,
            _ => CallerSearch::Forgotten as u32,
        };
        return later == 0 && is_settled != 0;
    }
    hand_over(ring, best.1, &mut header.send);
    // It has been answered, if not for this statement: another statement came with it, or the statement's own send was
    // noted only after its bytes had left, or will be.
    let turns = u64::from(ring.turn.wrapping_sub(header.send.turn));
    let is_answered = is_less(1 ^ differ(ring.answered, statement), turns);
    header.search = match () {
        // The client has just sent once more, over this.
        () if header.send.time != best.0 => CallerSearch::Forgotten as u32,
        () if is_answered & (later | is_young) != 0 => CallerSearch::Forgotten as u32,
        () if waited_with_others(ring, best.1, &header.send, since, start) => {
            CallerSearch::Several as u32
        }
        () => CallerSearch::Found as u32,
    };
    is_answered | is_strange == 0 && header.search != CallerSearch::Forgotten as u32
}

/// 1 where the wall clock was set since the agent read it.
#[inline(always)]
fn was_set(clock: &WallClock) -> u64 {
    // The verifier removes what follows where it is 0.
    if HAS_TAI_CLOCK.load() == 0 {
        return 0;
    }
    // SAFETY: the helpers have no preconditions, and the second is called only where it is there.
    let offset = unsafe { bpf_ktime_get_tai_ns().wrapping_sub(bpf_ktime_get_ns()) };
    let change = offset
        .wrapping_sub(clock.tai_offset as u64)
        .wrapping_add(WALL_CLOCK_STEP);
    is_less(change, 0) | is_less(2 * WALL_CLOCK_STEP, change)
}

/// 1 where a number is less than another, and the distance below 2^63: without a branch, of which the verifier would
/// follow both sides to the program's end.
#[inline(always)]
fn is_less(one: u64, other: u64) -> u64 {
    core::hint::black_box(one.wrapping_sub(other)) >> 63
}

/// 1 where two numbers differ, without a branch as well.
#[inline(always)]
fn differ(one: u64, other: u64) -> u64 {
    let bits = core::hint::black_box(one ^ other);
    core::hint::black_box(bits | bits.wrapping_neg()) >> 63
}

/// Whether a send of another stack, or for another trace, was in the server as well when the statement began.
/// Where a stack was not taken, nobody knows that it was the same.
#[inline(always)]
fn waited_with_others(ring: &Ring, found: usize, send: &Send, since: u64, start: u64) -> bool {
    let mut others = false;
    let mut slot = 0;
    while slot < SENDS {
        let other = &ring.sends[slot];
        others |= slot != found
            && other.time != 0
            && other.time >= since
            && other.time <= start
            && other.turn == send.turn
            && (other.hash == 0 || other.hash != send.hash || !is_same_trace(other, send));
        slot += 1;
    }
    others
}

#[inline(always)]
fn is_same_trace(one: &Send, other: &Send) -> bool {
    let (one, other) = (one.trace.words(), other.trace.words());
    one[0] == other[0] && one[1] == other[1] && one[2] == other[2]
}

#[inline(always)]
fn hand_over(ring: &mut Ring, slot: usize, send: &mut Send) {
    let slot = core::hint::black_box(slot) & (SENDS - 1);
    if ring.sends[slot].stack == CallerStack::Held as u32
        && caller::send_stack(&mut ring.stacks[slot])
    {
        ring.sends[slot].stack = CallerStack::Sent as u32;
    }
    words::copy(send, &ring.sends[slot]);
}

/// The current process's id as it sees it itself: what a server in a container calls its backends.
#[inline(always)]
pub fn own_pid() -> Option<u32> {
    /// `PIDTYPE_TGID` (include/linux/pid_types.h).
    const TGID: u32 = 1;
    /// Size of `struct upid`; its first member is the number.
    const UPID: u32 = 16;
    // SAFETY: each base is a kernel object of the type that the offset is for, or the read fails.
    unsafe {
        let signal: *const c_void =
            field(bpf_get_current_task() as *const c_void, TASK_SIGNAL.load())?;
        let pid: *const c_void = field(signal, SIGNAL_PIDS.load() + 8 * TGID)?;
        let level: u32 = field(pid, PID_LEVEL.load())?;
        field(
            pid,
            PID_NUMBERS.load().wrapping_add(level.wrapping_mul(UPID)),
        )
    }
}

/// Reads the process's title: PostgreSQL writes it over its arguments.
#[inline(always)]
fn title(to: &mut [u8; TITLE_BYTES]) {
    // SAFETY: the current task, and offsets from the kernel's own BTF.
    let start: Option<u64> = unsafe {
        field::<*const c_void>(bpf_get_current_task() as *const c_void, TASK_MM.load())
            .and_then(|mm| field(mm, MM_ARG_START.load()))
    };
    if let Some(start) = start {
        read_string(start, to);
    }
}

/// Reads a pointer variable; `None` for one that is null, not there or cannot be read.
#[inline(always)]
fn follow(variable: u64) -> Option<u64> {
    if variable == 0 {
        return None;
    }
    user::<u64>(variable).filter(|pointer| *pointer != 0)
}

/// Reads a value of user memory.
#[inline(always)]
fn user<T>(address: u64) -> Option<T> {
    // SAFETY: the helper checks the address; `T` is made of integers here.
    unsafe { bpf_probe_read_user(address as *const T) }.ok()
}

/// Reads the status's bytes from `FROM` to `TO`, of which nobody asks for all.
#[inline(always)]
fn read<const FROM: usize, const TO: usize>(entry: u64, to: &mut [u8; STATUS_BYTES]) -> bool {
    const { assert!(FROM < TO && TO <= STATUS_BYTES) };
    // SAFETY: the buffer is as large as the size says; the helper checks the address.
    unsafe {
        aya_ebpf::helpers::generated::bpf_probe_read_user(
            to.as_mut_ptr().add(FROM).cast(),
            (TO - FROM) as u32,
            entry.wrapping_add(FROM as u64) as *const c_void,
        ) == 0
    }
}

/// Reads a string, its NUL included; on failure the first byte is 0.
#[inline(always)]
fn read_string<const N: usize>(address: u64, to: &mut [u8; N]) -> i64 {
    // SAFETY: as above.
    unsafe { bpf_probe_read_user_str(to.as_mut_ptr().cast(), N as u32, address as *const c_void) }
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
