//! Callers: keeps the stacks of sends to servers, and finds the one that a backend's sample belongs to.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::Arc,
};

use agent_ebpf::{
    postgres::{CallerSearch, CallerStack, HAS_CONNECTION, Send, WallClock, status},
    sample::Outcome,
};

use foldhash::fast::RandomState;

use super::status::{BackendStatus, word};
use crate::profile::{Caller, ProcessIndex, SharedProcess, SharedStack, StackId, Unknown};

/// Maximum number of sends whose stacks are kept; the oldest are evicted. A query loses its caller if it
/// runs longer than it takes to sample this many other statements: half an hour at a hundred new statements
/// a second.
const MAX_SENDS: usize = 1 << 17;

/// Maximum number of frames of distinct stacks that are kept, 24 bytes each (24 MiB). An application has a
/// few hundred distinct stacks; only a program that makes stacks on purpose reaches the bound.
const MAX_FRAMES: usize = 1 << 20;

/// Identifies a send by its CPU and its time.
type SendKey = (u32, u64);

/// A send whose stack is known, in a form that does not depend on a window. The kernel hands each stack
/// over only once, and the statement may run for many windows.
#[derive(Clone, Debug)]
pub struct KnownSend {
    /// The process that sent.
    pub process: Arc<SharedProcess>,
    /// The stack of the send.
    pub stack: SharedStack,
    /// How the walk of the stack ended.
    pub outcome: Outcome,
}

impl KnownSend {
    /// Converts it to a caller in a window, in which the process and the stack have these indices.
    pub fn caller(&self, process: ProcessIndex, stack: StackId) -> Caller {
        match self.outcome {
            // A very deep stack lacks its root end, but the caller is at the leaf end.
            Outcome::Complete | Outcome::CompleteByFramePointer | Outcome::TooDeep => {
                Caller::Known { process, stack }
            }
            outcome => Caller::Partial {
                process,
                stack,
                outcome,
            },
        }
    }
}

/// The caller of a statement, independent of a window.
#[derive(Debug)]
pub enum FoundCaller {
    /// A send whose stack is known.
    Send(KnownSend),
    /// A process whose stack is not known.
    Process {
        /// Its pid.
        pid: u32,
        /// Name of the thread that sent, terminated by NUL.
        comm: [u8; 16],
        /// Why the stack is not known.
        reason: Unknown,
    },
    /// Neither the process nor its stack is known.
    Unknown(Unknown),
}

/// Converts a caller to the indices of the window that is being filled.
pub type PlaceCaller<'a> = &'a mut dyn FnMut(FoundCaller) -> Caller;

/// The sends whose stacks are known.
#[derive(Debug, Default)]
pub struct Callers {
    /// The offset of the wall clock.
    pub clock: WallClock,
    sends: HashMap<SendKey, KnownSend>,
    oldest: VecDeque<SendKey>,
    /// Each distinct stack, with the number of sends that have it.
    stacks: HashMap<SharedStack, usize, RandomState>,
    /// Total number of frames in `stacks`.
    frames: usize,
}

impl Callers {
    /// Keeps the stack of a send.
    pub fn keep(&mut self, cpu: u32, time: u64, send: KnownSend) {
        let key = (cpu, time);
        if self.sends.contains_key(&key) {
            return;
        }
        let frames = send.stack.len();
        let new_frames = match self.stacks.contains_key(&send.stack) {
            true => 0,
            false => frames,
        };
        while self.oldest.len() >= MAX_SENDS || self.frames + new_frames > MAX_FRAMES {
            let Some(oldest) = self.oldest.pop_front() else {
                break;
            };
            self.evict(oldest);
        }
        let stack = match self.stacks.entry(send.stack) {
            Entry::Occupied(mut known) => {
                *known.get_mut() += 1;
                Arc::clone(known.key())
            }
            Entry::Vacant(new) => {
                self.frames += frames;
                let stack = Arc::clone(new.key());
                new.insert(1);
                stack
            }
        };
        let send = KnownSend {
            process: send.process,
            stack,
            outcome: send.outcome,
        };
        self.sends.insert(key, send);
        self.oldest.push_back(key);
    }

    fn evict(&mut self, key: SendKey) {
        let Some(KnownSend { stack, .. }) = self.sends.remove(&key) else {
            return;
        };
        if let Entry::Occupied(mut known) = self.stacks.entry(stack) {
            *known.get_mut() -= 1;
            if *known.get() == 0 {
                self.frames -= known.remove_entry().0.len();
            }
        }
    }

    /// Finds the caller of a backend's statement. The sends to its server have been observed since
    /// `watched_since` (nanoseconds).
    pub fn of(&self, said: &BackendStatus<'_>, client: &str, watched_since: u64) -> FoundCaller {
        let header = said.header;
        let start = word(&header.status, status::STATEMENT_START).cast_signed();
        if !said.has_status || start == 0 {
            return FoundCaller::Unknown(Unknown::State);
        }
        if header.flags & HAS_CONNECTION == 0 {
            return FoundCaller::Unknown(Unknown::Leader);
        }
        let send: &Send = &header.send;
        let process = |reason| FoundCaller::Process {
            pid: send.pid,
            comm: send.comm,
            reason,
        };
        let is = |search: CallerSearch| header.search == search as u32;
        if is(CallerSearch::Several) {
            return process(Unknown::Several);
        }
        if !is(CallerSearch::Found) {
            return FoundCaller::Unknown(match () {
                () if is(CallerSearch::Forgotten) => Unknown::Forgotten,
                () if self.clock.statement_start(start, header.time) < watched_since => {
                    Unknown::Before
                }
                () if said.is_remote(client) => Unknown::Remote,
                () => Unknown::NoSend,
            });
        }
        match self.sends.get(&(send.cpu, send.time)) {
            Some(known) => FoundCaller::Send(known.clone()),
            None if send.stack == CallerStack::Refused as u32 => process(Unknown::Budget),
            None => process(Unknown::Lost),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::{Module, ModuleKey, Process, SharedFrame, SharedModule};

    fn send(address: u64, frames: usize, outcome: Outcome) -> KnownSend {
        let module = Module::unknown();
        let frame = SharedFrame {
            module: Arc::new(SharedModule {
                key: ModuleKey::Unknown,
                module,
            }),
            address,
            exact: false,
        };
        let process = Process {
            pid: 1,
            name: String::new(),
            exe: String::new(),
            service: String::new(),
        };
        KnownSend {
            process: Arc::new(SharedProcess {
                incarnation: 1,
                process,
            }),
            stack: vec![frame; frames].into(),
            outcome,
        }
    }

    /// A caller is known if the end of its stack is proven or the stack is too deep; otherwise it is
    /// partial.
    #[test]
    fn partial_callers() {
        for outcome in Outcome::ALL {
            let caller = send(1, 1, outcome).caller(ProcessIndex(1), StackId::EMPTY);
            let is_known = matches!(caller, Caller::Known { .. });
            let expected = ["complete", "complete_by_frame_pointer", "too_deep"];
            assert_eq!(is_known, expected.contains(&outcome.name()), "{outcome:?}");
        }
    }

    /// Equal stacks are kept once. At the bound of sends the oldest one is evicted, and a stack is evicted
    /// with its last send.
    #[test]
    fn sends_are_evicted() {
        let mut callers = Callers::default();
        for time in 0..MAX_SENDS as u64 {
            callers.keep(0, time, send(u64::from(time != 0), 3, Outcome::Complete));
        }
        assert_eq!((callers.stacks.len(), callers.frames), (2, 6));
        assert!(callers.sends.contains_key(&(0, 0)));
        callers.keep(0, u64::MAX, send(1, 3, Outcome::Complete));
        assert!(!callers.sends.contains_key(&(0, 0)));
        assert_eq!((callers.stacks.len(), callers.frames), (1, 3));
        assert_eq!(callers.sends.len(), MAX_SENDS);
    }

    /// At the bound of frames, as many of the oldest sends are evicted as necessary.
    #[test]
    fn frames_are_bounded() {
        let mut callers = Callers::default();
        for time in 0..20 {
            callers.keep(0, time, send(time, MAX_FRAMES / 10, Outcome::Complete));
            assert!(callers.frames <= MAX_FRAMES);
        }
        assert_eq!(callers.sends.len(), 10);
        assert_eq!(callers.oldest.len(), 10);
    }
}
