//! Finds, among the sends that were noted for a connection, the one that began a backend's statement.
//!
//! The life of a send, in the order of a simple query:
//!
//! ```text
//!  client thread                  SendRing of the connection                      PostgreSQL backend
//!  -------------                  --------------------------                      ------------------
//!  1 caller::asks, at the send:
//!    the first bytes may start -> sends[n]  = { time, turn, thread, trace, hash }
//!    a statement; its stack is    stacks[n] = frames; sends[n].stack = Held
//!    walked, within the budget    asked += 1
//!            |
//!  2         +------------------- the message -----------------------------------> the statement begins; its start
//!                                                                                 is in the backend's status
//!
//!  3                              the newest send of a turn not after <---------- backend::tell, at a tick:
//!                                 the statement's, sent since the                 sends::find(statement start)
//!                                 backend's start and not after
//!                                 the statement's start
//!                                       |
//!                                       +-> to the ring buffer: KIND_CALLER, once (Held becomes Sent);
//!                                           then KIND_BACKEND with the Send; then KIND_SAMPLE
//!
//!  4                              answered = the statement's start <------------- caller::answers, at the first
//!                                 turn += 1; asked = 0                            send of the answer
//!            ^                                                                          |
//!            +------------------- the answer -------------------------------------------+
//! ```
//!
//! Samples (3) may come before or after the answer (4), or not at all; then the stack is never sent. A
//! certain result is cached in the map `KNOWN`, so later samples of the statement do not search again. A
//! stack that the kernel cannot walk to its end for want of tables is sent at once in step 1, with a copy
//! of the stack (`Sent`). Beyond the budget no stack is taken (`Refused`). A slot is overwritten when the
//! ring has come round, and the ring is evicted when it is the least recently used of all connections.

use agent_ebpf::{
    limits::SENDS,
    postgres::{
        BackendHeader, CallerSearch, CallerStack, START_TOLERANCE, Send, WALL_CLOCK_STEP, WallClock,
    },
    sample::SampleHeader,
};
use aya_ebpf::{
    bindings::BPF_RB_NO_WAKEUP,
    helpers::{bpf_ktime_get_ns, generated::bpf_ktime_get_tai_ns},
};

use crate::{
    maps::{CONNECTIONS, HAS_TAI_CLOCK, WALL_CLOCK},
    output,
    state::{HeldStack, SendRing},
    verifier::{differ, is_less, select},
    words,
};

/// Nanoseconds after a statement's start during which its send may not be noted yet: the server can read it
/// from a Unix socket before the client has noted it.
const YOUNG: u64 = 1_000_000;

/// Nanoseconds after a statement's start during which a missing send is searched for again. Between putting
/// its bytes into a Unix socket and noting them a client may wait for a CPU; except on a badly overloaded
/// machine, that takes less time than this.
const SETTLED: u64 = 100_000_000;

/// Finds the newest send that is not later than the statement's start, and sends its stack to the agent
/// unless that was done before. (It is not simply the last send, because a client may send more while the
/// statement runs.)
///
/// `header` has the time and the connection, and receives the result. `statement` is the statement's start
/// in PostgreSQL's own time, `since` the backend's start in nanoseconds of `CLOCK_MONOTONIC`. Returns false
/// if the result is uncertain: then it must not be cached, and the next sample searches again.
#[inline(always)]
pub fn find(header: &mut BackendHeader, statement: u64, since: u64) -> bool {
    let Some(clock) = WALL_CLOCK.get(0) else {
        return false;
    };
    // This is checked before the other fields are read, because the agent may replace the clock meanwhile, and it
    // writes the offset that is checked here last.
    let was_set = was_set(clock);
    let mut start = clock.statement_start(statement as i64, header.time);
    // The wall clock may have been set since the agent last read it, so that the converted start is wrong.
    // Where this cannot be checked directly, a start before the backend's own or in the future reveals it.
    // Then the statement's start is replaced by the present, so that the turns alone decide.
    let is_strange = was_set | is_less(start, since) | is_less(header.time, start);
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
    // SAFETY: the client may write to the ring at the same time, on another CPU. A send that is being
    // written has the time 0, and if the send that was found is overwritten, this is noticed by its time
    // below.
    let ring = unsafe { &mut *ring };
    if ring.noting != 0 {
        header.search = CallerSearch::Forgotten as u32;
        return false;
    }
    // The last turn in which the statement can have been sent: the previous turn if its answer has begun
    // (which ended that turn), otherwise the current one.
    let turn = ring
        .turn
        .wrapping_sub(1 ^ differ(ring.answered, statement) as u32);
    let mut best = (0, 0);
    let mut later = 0;
    let mut slot = 0;
    while slot < SENDS {
        let time = ring.sends[slot].time;
        let is_later = is_less(start, time);
        let is_of_later_turn = u64::from(turn.wrapping_sub(ring.sends[slot].turn) >> 31);
        let is_worse = is_later | is_of_later_turn | is_less(time, since) | is_less(time, best.0);
        let is_better = 1 ^ is_worse;
        best = (
            select(is_better, time, best.0),
            select(is_better, slot as u64, best.1),
        );
        later |= is_later;
        slot += 1;
    }
    let best = (best.0, best.1 as usize);
    if best.0 == 0 {
        header.search = match later {
            0 => CallerSearch::NoSend as u32,
            _ => CallerSearch::Forgotten as u32,
        };
        return later == 0 && is_settled != 0;
    }
    hand_over(ring, best.1, &mut header.send);
    // Whether the send's turn was ended by the answer to an earlier statement. Then either both statements
    // came with this send, or this statement's own send is noted late or was not noted yet, because its
    // bytes left before that.
    let turns = u64::from(ring.turn.wrapping_sub(header.send.turn));
    let is_answered = is_less(1 ^ differ(ring.answered, statement), turns);
    header.search = match () {
        // The client has just overwritten this slot with another send.
        () if header.send.time != best.0 => CallerSearch::Forgotten as u32,
        () if is_answered & (later | is_young) != 0 => CallerSearch::Forgotten as u32,
        () if waited_with_others(ring, best.1, &header.send, since, start) => {
            CallerSearch::Several as u32
        }
        () => CallerSearch::Found as u32,
    };
    is_answered | is_strange == 0 && header.search != CallerSearch::Forgotten as u32
}

/// 1 if the wall clock was set since the agent read it, else 0. Always 0 on kernels without
/// `bpf_ktime_get_tai_ns`.
#[inline(always)]
fn was_set(clock: &WallClock) -> u64 {
    // The verifier knows the value, and removes the code below if it is 0. The kernel would otherwise
    // reject the call of a helper that it lacks.
    if HAS_TAI_CLOCK.load() == 0 {
        return 0;
    }
    // SAFETY: the helpers have no preconditions, and `bpf_ktime_get_tai_ns` is called only if the kernel
    // has it.
    let offset = unsafe { bpf_ktime_get_tai_ns().wrapping_sub(bpf_ktime_get_ns()) };
    let change = offset
        .wrapping_sub(clock.tai_offset as u64)
        .wrapping_add(WALL_CLOCK_STEP);
    is_less(change, 0) | is_less(2 * WALL_CLOCK_STEP, change)
}

/// Whether a send with another stack, or for another trace, also waited in the server when the statement
/// began. A send whose stack was not taken counts as different, because it may be.
#[inline(always)]
fn waited_with_others(ring: &SendRing, found: usize, send: &Send, since: u64, start: u64) -> bool {
    let mut others = 0;
    let mut slot = 0;
    while slot < SENDS {
        let other = &ring.sends[slot];
        let is_elsewhen = (1 ^ differ(other.time, 0))
            | is_less(other.time, since)
            | is_less(start, other.time)
            | differ(other.turn.into(), send.turn.into());
        let is_different = (1 ^ differ(other.hash.into(), 0))
            | differ(other.hash.into(), send.hash.into())
            | has_other_trace(other, send);
        others |= differ(slot as u64, found as u64) & (1 ^ is_elsewhen) & is_different;
        slot += 1;
    }
    others != 0
}

/// 1 if two sends belong to different traces, else 0.
#[inline(always)]
fn has_other_trace(one: &Send, other: &Send) -> u64 {
    let (one, other) = (one.trace.words(), other.trace.words());
    differ(one[0], other[0]) | differ(one[1], other[1]) | differ(one[2], other[2])
}

/// Copies a send out of the ring, after sending its stack to the agent if that is still held.
#[inline(always)]
fn hand_over(ring: &mut SendRing, slot: usize, send: &mut Send) {
    let slot = core::hint::black_box(slot) & (SENDS - 1);
    if ring.sends[slot].stack == CallerStack::Held as u32 && send_stack(&mut ring.stacks[slot]) {
        ring.sends[slot].stack = CallerStack::Sent as u32;
    }
    words::copy(send, &ring.sends[slot]);
}

/// Sends a held stack to the agent.
#[inline(always)]
fn send_stack(stack: &mut HeldStack) -> bool {
    let bytes = size_of::<SampleHeader>() + stack.header.user_frames as usize * 8;
    output::send(stack, bytes, BPF_RB_NO_WAKEUP)
}
