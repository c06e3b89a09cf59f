//! Who asked: the stacks of sends to servers, and which of them a backend's sample was for.

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

/// Sends whose stacks are kept at most; the oldest are evicted. A query that runs longer than this many others need to
/// be sampled loses its caller: half an hour at a hundred new statements a second.
const MAX_SENDS: usize = 1 << 17;

/// Frames of distinct stacks that are kept at most, 24 bytes each: 24 MiB. An application has a few hundred stacks; more is
/// somebody who makes them.
const MAX_FRAMES: usize = 1 << 20;

/// A send, named by its CPU and its time.
type SendKey = (u32, u64);

/// A send whose stack is known, in terms that outlive a window: the kernel hands a stack over once, and the statement may
/// run for many windows.
#[derive(Clone, Debug)]
pub struct KnownSend {
    /// Who sent.
    pub process: Arc<SharedProcess>,
    /// From where.
    pub stack: SharedStack,
    /// How the walk ended.
    pub outcome: Outcome,
}

impl KnownSend {
    /// The caller, in terms of a window in which process and stack have these numbers.
    pub fn caller(&self, process: ProcessIndex, stack: StackId) -> Caller {
        match self.outcome {
            // Of a very deep stack the root end is missing, not the caller.
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

/// The caller of a statement, before it is given its place in a window.
#[derive(Debug)]
pub enum FoundCaller {
    /// A send whose stack is known.
    Send(KnownSend),
    /// A process whose stack is not known.
    Process {
        /// Its pid.
        pid: u32,
        /// Name of the thread that sent, ended by NUL.
        comm: [u8; 16],
        /// Why the stack is not known.
        reason: Unknown,
    },
    /// Not known.
    Unknown(Unknown),
}

/// Gives a caller its place in the window that is being filled.
pub type PlaceCaller<'a> = &'a mut dyn FnMut(FoundCaller) -> Caller;

/// The sends whose stacks are known.
#[derive(Debug, Default)]
pub struct Callers {
    /// What the wall clock shows.
    pub clock: WallClock,
    sends: HashMap<SendKey, KnownSend>,
    oldest: VecDeque<SendKey>,
    /// Each stack once, and how many sends have it.
    stacks: HashMap<SharedStack, usize, RandomState>,
    /// In these stacks.
    frames: usize,
}

impl Callers {
    /// Keeps the stack of a send.
    pub fn keep(&mut self, cpu: u32, time: u64, send: KnownSend) {
        let frames = send.stack.len();
        while self.oldest.len() >= MAX_SENDS || self.frames + frames > MAX_FRAMES {
            let Some(oldest) = self.oldest.pop_front() else {
                break;
            };
            self.evict(oldest);
        }
        let key = (cpu, time);
        if self.sends.contains_key(&key) {
            return;
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

    /// Who asked for a backend's statement. Sends to its server were watched from `watched_since` on
    /// (nanoseconds).
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
    use crate::profile::{Module, ModuleKey, Process, SharedFrame, SharedModule, Source};

    fn send(address: u64, frames: usize, outcome: Outcome) -> KnownSend {
        let module = Module {
            name: String::new(),
            build_id: None,
            source: Source::Unknown,
            is_local: true,
            debug_dir: None,
            version: None,
            snapshot: None,
        };
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

    /// A caller is known when its stack's end is proven, or too deep to be reached; else a part of it is.
    #[test]
    fn partial_callers() {
        for outcome in Outcome::ALL {
            let caller = send(1, 1, outcome).caller(ProcessIndex(1), StackId::EMPTY);
            let is_known = matches!(caller, Caller::Known { .. });
            let expected = ["complete", "complete_by_frame_pointer", "too_deep"];
            assert_eq!(is_known, expected.contains(&outcome.name()), "{outcome:?}");
        }
    }

    /// Equal stacks are kept once; at the bound of sends the oldest goes, and its stack with its last send.
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

    /// At the bound of frames as many old sends go as are needed.
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
