//! Notes the sends of clients to PostgreSQL servers. The programs run in the client's thread before the
//! server is woken, and store its stack and trace context in the [`SendRing`] of the connection. They also
//! see when the server answers, which ends a turn. The whole protocol is drawn in `sends.rs`.

use agent_ebpf::{
    counters::Counter,
    limits::{MAX_CALLER_FRAMES, SENDS},
    postgres::{Budget, CallerStack, Connection, TIME_STEP_BITS, may_start_statement},
    sample::{KIND_CALLER, Outcome},
};
use aya_ebpf::{
    bindings::BPF_RB_FORCE_WAKEUP,
    helpers::{
        bpf_get_current_pid_tgid, bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_ktime_get_ns,
        generated::bpf_probe_read_kernel,
    },
    programs::RawTracePointContext,
};

use crate::{
    arch, backend, counting,
    fields::Pointer,
    maps::{CALLER_BUDGET, CALLERS_PER_WINDOW, CONNECTIONS, NEW_RING, SERVERS, WALK},
    output,
    socket::{self, Message},
    stack_copy,
    state::{CALLER, HeldStack, SampleRecord, SendRing, Walk},
    task, trace,
    verifier::bounded,
    walk, words,
};

/// Length of a window of the stack budget, nanoseconds. It is short so that the rate adapts quickly to a
/// burst of sends.
pub const BUDGET_WINDOW: u64 = 100_000_000;

/// Of the sends without a stack, those are timed whose number in the window is 1 under this mask (every
/// sixteenth), because reading the clock is a considerable part of what a send costs.
const TIMED_MASK: u32 = 15;

/// Handles a send on a TCP socket; in the sender's thread, before the first byte has left.
#[inline(always)]
pub fn tcp(sock: Pointer) -> Option<()> {
    passes(socket::sent_by_tcp(sock)?)
}

/// Handles a send on a Unix socket (`struct socket`); in the sender's thread, before the first byte has left.
#[inline(always)]
pub fn unix(socket: Pointer) -> Option<()> {
    passes(socket::sent_by_unix(socket)?)
}

/// Handles data that was just put into the receive queue of a Unix socket; in the sender's thread, before
/// the reader is woken.
#[inline(always)]
pub fn unix_received(sock: Pointer) -> Option<()> {
    passes(socket::received_by_unix(sock)?)
}

/// Handles the entry of a system call. `TP_PROTO(struct pt_regs *regs, long id)`.
#[inline(always)]
pub fn system_call(ctx: &RawTracePointContext) -> Option<()> {
    let descriptor = arch::sends_on(ctx)?;
    passes(socket::sent(socket::of_descriptor(descriptor)?)?)
}

#[inline(always)]
fn passes(message: Message) -> Option<()> {
    match message {
        Message::Request(connection, ring) => asks(&connection, ring),
        Message::Answer(connection, ring) => answers(&connection, ring),
    }
}

/// Handles a send from the client to the server.
#[inline(always)]
fn asks(connection: &Connection, ring: Option<*mut SendRing>) -> Option<()> {
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    if !arch::first_bytes_sent().is_none_or(may_start_statement) {
        return None;
    }
    let ring = match ring {
        Some(ring) => ring,
        None => ring_of(connection)?,
    };
    // SAFETY: only one thread sends on a connection at a time; two would break PostgreSQL's protocol.
    note(
        unsafe { &mut *ring },
        now,
        task::space().map_or(0, |space| space.trace_offset),
    );
    Some(())
}

/// Handles a send from the server to the client. A long answer is sent in many pieces, the first of which
/// ends the turn.
#[inline(always)]
fn answers(connection: &Connection, ring: Option<*mut SendRing>) -> Option<()> {
    let ring = match ring {
        Some(ring) => ring,
        None => CONNECTIONS.get_ptr_mut(connection)?,
    };
    // SAFETY: the client usually waits for this answer and does not write to the ring. If it is pipelining
    // it may, and then a send may be attributed to the turn before or after its own.
    let ring = unsafe { &mut *ring };
    let pid = task::pid();
    let known = match ring.backend == pid {
        true if ring.asked == 0 => return Some(()),
        true => backend::statement_of(ring.status, ring.own_pid),
        false => None,
    };
    let statement = match known {
        Some(statement) => statement,
        None => meet(ring, pid, connection)?,
    };
    if ring.asked != 0 && (statement == 0 || ring.answered != statement) {
        ring.answered = statement;
        ring.asked = 0;
        ring.turn = ring.turn.wrapping_add(1);
    }
    Some(())
}

/// Stores in the ring which backend answers. Returns the start of its statement, 0 if it cannot be read or
/// there is none.
#[inline(always)]
fn meet(ring: &mut SendRing, pid: u32, connection: &Connection) -> Option<u64> {
    let server = task::space()?.server.checked_sub(1)?;
    ring.own_pid = task::own_pid()?;
    ring.status = backend::status_address(SERVERS.get(server)?)?;
    backend::remember(server, ring.own_pid, *connection)?;
    ring.backend = pid;
    Some(backend::statement_of(ring.status, ring.own_pid).unwrap_or(0))
}

/// The ring of a connection; a new one is added if there is none.
#[inline(always)]
fn ring_of(connection: &Connection) -> Option<*mut SendRing> {
    if let Some(ring) = CONNECTIONS.get_ptr_mut(connection) {
        return Some(ring);
    }
    let empty = NEW_RING.get(0)?;
    if CONNECTIONS.insert(connection, empty, 0).is_err() {
        counting::one(Counter::ConnectionMapFull);
        return None;
    }
    CONNECTIONS.get_ptr_mut(connection)
}

/// Stores a send of the current thread in the ring.
#[inline(always)]
fn note(ring: &mut SendRing, now: u64, trace_offset: i32) {
    let ids = bpf_get_current_pid_tgid();
    // A turn uses at most half of the slots, and then overwrites its newest one. So the first sends of the
    // turn are kept, and those of the turn before as well: an encrypted COPY sends its rows in one turn,
    // after that of its statement.
    if ring.asked < SENDS as u32 / 2 {
        ring.next = ring.next.wrapping_add(1);
        ring.asked += 1;
    }
    let slot = core::hint::black_box(ring.next as usize) & (SENDS - 1);
    ring.noting = 1;
    ring.sends[slot].time = 0;
    ring.sends[slot].pid = (ids >> 32) as u32;
    ring.sends[slot].tid = ids as u32;
    // SAFETY: the helper has no preconditions.
    ring.sends[slot].cpu = unsafe { bpf_get_smp_processor_id() };
    task::name(&mut ring.sends[slot].comm);
    ring.sends[slot].turn = ring.turn;
    ring.sends[slot].hash = 0;
    trace::of_current_thread(trace_offset, &mut ring.sends[slot].trace);
    let Some(budget) = CALLER_BUDGET.get_ptr_mut(0) else {
        ring.noting = 0;
        return;
    };
    // SAFETY: as in `take_stack`.
    let budget = unsafe { &mut *budget };
    let chosen = within_budget(budget, now);
    ring.sends[slot].stack = if chosen {
        take_stack(ring, slot, now) as u32
    } else {
        CallerStack::Refused as u32
    };
    ring.sends[slot].time = now;
    ring.noting = 0;
    counting::one(Counter::Sends);
    if chosen {
        counting::one(Counter::CallerStacks);
        count_time(budget, since(now));
    } else if budget.seen & TIMED_MASK == 1 {
        counting::one(Counter::TimedSends);
        counting::add(Counter::SendNanos, since(now));
    }
}

#[inline(always)]
fn since(start: u64) -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }.wrapping_sub(start)
}

/// Whether the stack of this send is to be taken. If the previous window had more sends than the budget
/// allows stacks, a random number decides, so that the stacks that are taken are a fair sample of all
/// sends. A window takes at most twice its budget, in case there are suddenly more sends.
#[inline(always)]
fn within_budget(budget: &mut Budget, now: u64) -> bool {
    let limit = CALLERS_PER_WINDOW.load();
    if now.wrapping_sub(budget.window) >= BUDGET_WINDOW {
        budget.threshold = if budget.seen <= limit {
            u32::MAX
        } else {
            ((u64::from(limit) << 32) / u64::from(budget.seen)) as u32
        };
        budget.window = now;
        budget.seen = 0;
        budget.taken = 0;
    }
    budget.seen += 1;
    // SAFETY: the helper has no preconditions.
    if unsafe { bpf_get_prandom_u32() } > budget.threshold || budget.taken >= limit.wrapping_mul(2)
    {
        return false;
    }
    budget.taken += 1;
    true
}

/// Counts in the histogram [`Budget::times`] how long a send with a stack took.
#[inline(always)]
fn count_time(budget: &mut Budget, nanos: u64) {
    let last = budget.times.len() as u64 - 1;
    let mut at = nanos >> TIME_STEP_BITS;
    if at > last {
        at = last;
    }
    if let Some(at) = bounded(at as usize, budget.times.len() - 1) {
        budget.times[at] = budget.times[at].wrapping_add(1);
    }
}

/// Walks the stack of the current thread and holds it in the ring. If user space has to finish the walk,
/// the stack is sent at once instead, together with a copy of the stack.
#[inline(always)]
fn take_stack(ring: &mut SendRing, slot: usize, now: u64) -> CallerStack {
    let Some(walk) = WALK.get_ptr_mut(CALLER) else {
        return CallerStack::Refused;
    };
    // SAFETY: only the programs at sends use this slot. The kernel runs them where they cannot be preempted
    // (kernel/trace/bpf_trace.c, `__bpf_trace_run`; kernel/kprobes.c), so only the sampling program can
    // interrupt them, and that uses the other slot.
    let walk = unsafe { &mut *walk };
    let send = &ring.sends[slot & (SENDS - 1)];
    walk.record.header.kind = KIND_CALLER;
    walk.record.header.pid = send.pid;
    walk.record.header.tid = send.tid;
    walk.record.header.cpu = send.cpu;
    walk.record.header.time = now;
    words::copy(&mut walk.record.header.trace, &send.trace);
    task::name(&mut walk.record.header.comm);
    walk.record.header.mm = task::mm();
    walk.record.header.kernel_frames = 0;
    walk.record.header.user_frames = 0;
    walk.record.header.has_stack_copy = 0;
    walk.record.header.is_backend_unchanged = 0;
    if !arch::from_kernel_entry(&mut walk.cursor.regs, &mut walk.record.frames) {
        return CallerStack::Refused;
    }
    walk::user_stack::<{ CALLER }>(walk);
    let is_continuable = Outcome::is_continuable(walk::outcome(walk));
    // A partial stack gets a hash of its own, made from the time, so that it never counts as equal to
    // another stack.
    let hash = if is_continuable { now << 32 } else { walk.hash };
    ring.sends[slot & (SENDS - 1)].hash = (hash >> 32) as u32 | 1;
    if is_continuable {
        // The record is sent even without a copy, because it tells the agent which process needs tables.
        let copied = stack_copy::send::<{ CALLER }>(walk, now);
        walk.record.header.has_stack_copy = copied as u8;
        return match send_walk(walk) && copied {
            true => CallerStack::Sent,
            false => CallerStack::Refused,
        };
    }
    hold(walk, &mut ring.stacks[slot & (SENDS - 1)]);
    CallerStack::Held
}

/// Sends the walked stack, and wakes the agent.
#[inline(always)]
fn send_walk(walk: &mut Walk) -> bool {
    let bytes = SampleRecord::bytes(walk.record.header.user_frames as usize);
    output::send(&mut walk.record, bytes, BPF_RB_FORCE_WAKEUP)
}

/// Copies a stack into the ring. A stack that is too deep loses its root end.
#[inline(always)]
fn hold(walk: &mut Walk, stack: &mut HeldStack) {
    let mut frames = walk.record.header.user_frames as usize;
    if frames > MAX_CALLER_FRAMES {
        frames = MAX_CALLER_FRAMES;
        walk.record.header.outcome = Outcome::TooDeep as u8;
    }
    walk.record.header.user_frames = frames as u32;
    words::copy(&mut stack.header, &walk.record.header);
    if let Some(bytes) = bounded(frames * 8, MAX_CALLER_FRAMES * 8) {
        // SAFETY: both arrays have at least this many bytes.
        unsafe {
            bpf_probe_read_kernel(
                stack.frames.as_mut_ptr().cast(),
                bytes as u32,
                walk.record.frames.as_ptr().cast(),
            )
        };
    }
}
