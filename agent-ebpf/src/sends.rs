//! The sends that are noted under a connection: which of them began a statement.

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
    verifier::{differ, is_less},
    words,
};

/// Nanoseconds after a statement's start in which its send may not be noted yet: at a Unix socket the server can read
/// it before.
const YOUNG: u64 = 1_000_000;

/// Nanoseconds after a statement's start in which a send that is not there yet is looked for again: longer than a client
/// waits for a CPU between putting its bytes into a Unix socket and noting them, on a machine that is not hopeless.
const SETTLED: u64 = 100_000_000;

/// Finds the newest send that is not later than the statement's start, and sends its stack on if that
/// was not done yet. (Never simply the last send: a client may send more while the statement runs.)
///
/// False when it may be another after all, which is not to be remembered.
#[inline(always)]
pub fn find(header: &mut BackendHeader, statement: u64, since: u64) -> bool {
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

/// Whether a send of another stack, or for another trace, was in the server as well when the statement began.
/// Where a stack was not taken, nobody knows that it was the same.
#[inline(always)]
fn waited_with_others(ring: &SendRing, found: usize, send: &Send, since: u64, start: u64) -> bool {
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
fn hand_over(ring: &mut SendRing, slot: usize, send: &mut Send) {
    let slot = core::hint::black_box(slot) & (SENDS - 1);
    if ring.sends[slot].stack == CallerStack::Held as u32 && send_stack(&mut ring.stacks[slot]) {
        ring.sends[slot].stack = CallerStack::Sent as u32;
    }
    words::copy(send, &ring.sends[slot]);
}

/// Sends a held stack.
#[inline(always)]
fn send_stack(stack: &mut HeldStack) -> bool {
    let bytes = size_of::<SampleHeader>() + stack.header.user_frames as usize * 8;
    output::send(stack, bytes, BPF_RB_NO_WAKEUP)
}
