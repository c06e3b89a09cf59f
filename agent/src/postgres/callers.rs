//! Who asked: the stacks of sends to servers, and which of them a backend's sample was for.

use std::collections::{HashMap, VecDeque};

use agent_ebpf::{
    postgres::{CallerSearch, CallerStack, HAS_CONNECTION, Send, WallClock, status},
    sample::Outcome,
};

use super::status::{BackendStatus, word};
use crate::profile::{Caller, ProcessIndex, StackId, Unknown};

/// Stacks of sends kept at most, the oldest go first. A query that runs longer than this many others need to
/// be sampled loses its caller: half an hour at a hundred new statements a second.
const MAX_CALLERS: usize = 1 << 17;

/// Gives the number of the process that sent; its thread's name, for one of which nothing is known any more.
pub type SenderIndex<'a> = &'a mut dyn FnMut(u32, &[u8; 16]) -> ProcessIndex;

/// A send's name: its CPU and its time.
type SendKey = (u32, u64);

/// A send whose stack is known.
#[derive(Clone, Copy, Debug)]
struct Known {
    process: ProcessIndex,
    stack: StackId,
    outcome: Outcome,
}

impl Known {
    fn caller(self) -> Caller {
        let Known {
            process,
            stack,
            outcome,
        } = self;
        match outcome {
            // Of a very deep stack the root end is missing, not the caller.
            Outcome::Complete | Outcome::CompleteByFramePointer | Outcome::TooDeep => {
                Caller::Known { process, stack }
            }
            _ => Caller::Partial {
                process,
                stack,
                outcome,
            },
        }
    }
}

/// The sends whose stacks came up.
#[derive(Debug, Default)]
pub struct Callers {
    /// What the wall clock shows.
    pub clock: WallClock,
    known: HashMap<SendKey, Known>,
    oldest: VecDeque<SendKey>,
}

impl Callers {
    /// Keeps the stack of a send, and how its walk ended.
    pub fn keep(
        &mut self,
        cpu: u32,
        time: u64,
        process: ProcessIndex,
        (stack, outcome): (StackId, Outcome),
    ) {
        if self.oldest.len() >= MAX_CALLERS
            && let Some(oldest) = self.oldest.pop_front()
        {
            self.known.remove(&oldest);
        }
        let key = (cpu, time);
        let known = Known {
            process,
            stack,
            outcome,
        };
        if self.known.insert(key, known).is_none() {
            self.oldest.push_back(key);
        }
    }

    /// Who asked for a backend's statement. Sends to its server were watched from `watched_since` on
    /// (nanoseconds).
    pub fn of(
        &self,
        said: &BackendStatus<'_>,
        client: &str,
        watched_since: u64,
        sender: SenderIndex<'_>,
    ) -> Caller {
        let header = said.header;
        let start = word(&header.status, status::STATEMENT_START).cast_signed();
        if !said.has_status || start == 0 {
            return Caller::Unknown(Unknown::State);
        }
        if header.flags & HAS_CONNECTION == 0 {
            return Caller::Unknown(Unknown::Leader);
        }
        let send: &Send = &header.send;
        let is = |search: CallerSearch| header.search == search as u32;
        if is(CallerSearch::Several) {
            return Caller::Process {
                process: sender(send.pid, &send.comm),
                reason: Unknown::Several,
            };
        }
        if !is(CallerSearch::Found) {
            return Caller::Unknown(match () {
                () if is(CallerSearch::Forgotten) => Unknown::Forgotten,
                () if self.clock.statement_start(start, header.time) < watched_since => {
                    Unknown::Before
                }
                () if said.is_remote(client) => Unknown::Remote,
                () => Unknown::NoSend,
            });
        }
        if let Some(known) = self.known.get(&(send.cpu, send.time)) {
            return known.caller();
        }
        Caller::Process {
            process: sender(send.pid, &send.comm),
            reason: match send.stack == CallerStack::Refused as u32 {
                true => Unknown::Budget,
                false => Unknown::Lost,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A caller is known when its stack's end is proven, or too deep to be reached; else a part of it is.
    #[test]
    fn partial_callers() {
        for outcome in Outcome::ALL {
            let caller = Known {
                process: ProcessIndex(1),
                stack: StackId::EMPTY,
                outcome,
            }
            .caller();
            let is_known = matches!(caller, Caller::Known { .. });
            let expected = ["complete", "complete_by_frame_pointer", "too_deep"];
            assert_eq!(is_known, expected.contains(&outcome.name()), "{outcome:?}");
        }
    }
}
