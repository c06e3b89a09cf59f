//! The types of the values that the programs keep in maps, and of the records that they build there. This
//! module depends on no other module of the programs.

use agent_ebpf::{
    limits::{MAX_CALLER_FRAMES, MAX_KERNEL_FRAMES, MAX_STACK_COPY, MAX_USER_FRAMES, SENDS},
    postgres::{BackendHeader, Send, ServedConnection, TEXT_BYTES, TITLE_BYTES},
    sample::{SampleHeader, StackCopyHeader},
    table::{MappingEntry, Space},
    unwind::{Cursor, Rule},
};

/// Slot of the sampling program in the per-CPU state of walks. The sampling program may interrupt the
/// program at sends, so the two share no state that either of them writes.
pub const SAMPLER: u32 = 0;

/// Slot of the programs at sends in the per-CPU state of walks.
pub const CALLER: u32 = 1;

/// Number of walks that may be in progress on a CPU at the same time.
pub const SLOTS: u32 = 2;

/// Most frames of a sample, kernel and user frames together.
pub const FRAMES: usize = (MAX_KERNEL_FRAMES + MAX_USER_FRAMES) as usize;

/// Timestamps by which a CPU counts missed ticks and limits its stack copies.
#[repr(C)]
pub struct CpuClock {
    /// Time of the previous tick, nanoseconds; 0 before the first.
    pub last_tick: u64,
    /// Start of the second for which `copies` counts, nanoseconds.
    pub window: u64,
    /// Stack copies that were attempted in that second.
    pub copies: u64,
}

/// The state of a walk, followed by the record that it builds. Everything that a frame needs lies together:
/// between two samples the measured program evicts this memory from the CPU's caches and its pages from the
/// TLB, and touching one more page costs more than touching one more cache line.
#[repr(C)]
pub struct Walk {
    /// The part of the user stack that was read last.
    pub stretch: Stretch,
    /// Registers of the current frame.
    pub cursor: Cursor,
    /// Timestamps of this CPU, for this slot.
    pub clock: CpuClock,
    /// Copy of the process's entry in the map of address spaces.
    pub space: Space,
    /// The mapping that was found last. The next address is often in the same mapping, also in the next
    /// sample.
    pub mapping: MappingEntry,
    /// [`Space::number`] of the address space to which `mapping` belongs.
    pub mapping_of: u32,
    /// Index of the current frame's rule in [`RuleCache::rules`].
    pub place: u8,
    /// Index of the rule of the last walk's first frame.
    pub first: u8,
    /// 1 when a frame pointer was followed in this walk, else 0.
    pub frame_pointers: u32,
    /// Hash of the user frames; computed only for slot [`CALLER`].
    pub hash: u64,
    /// The record that will be sent.
    pub record: SampleRecord,
}

/// A sample record. Only its used part is sent, see [`SampleRecord::bytes`].
#[repr(C)]
pub struct SampleRecord {
    /// The fixed-size start of the record.
    pub header: SampleHeader,
    /// The kernel frames, followed by the user frames.
    pub frames: [u64; FRAMES],
}

impl SampleRecord {
    /// Size in bytes of a record with this many frames.
    #[inline(always)]
    pub fn bytes(frames: usize) -> usize {
        core::mem::offset_of!(SampleRecord, frames) + frames * 8
    }
}

const _: () = assert!(core::mem::offset_of!(SampleRecord, frames) == size_of::<SampleHeader>());

/// Words of the user stack that are read at once. Reading frame by frame would wait for memory at each
/// frame, because callers' frames have not been touched for long. When a longer piece is read, the
/// processor prefetches.
pub const STRETCH: usize = 256;

/// A copied piece of the user stack.
#[repr(C)]
pub struct Stretch {
    /// avma of the first word; 0 when nothing was read yet.
    pub start: u64,
    /// 1 after a piece could not be read, which happens near the end of the stack. From then on only the
    /// words of each frame are read.
    pub ended: u64,
    pub words: [u64; STRETCH],
}

/// Rules that a [`RuleCache`] holds: as many as a `u8` can index.
pub const CACHED: usize = 1 << u8::BITS;

/// A cache of rules, in the order in which they were found. As on the stack, a caller's rule nearly always
/// follows its callee's, so the next rule is usually found right after the last one, and the processor has
/// prefetched it. That matters because the measured program evicts this memory from the CPU's caches
/// between two samples.
#[repr(C)]
pub struct RuleCache {
    /// Index into `rules` of the rule for an address, by the address's hash.
    pub places: [u8; CACHED],
    /// Index into `rules` at which the next rule is stored; it replaces the oldest.
    pub next: u8,
    /// Unused, zero.
    pub padding: [u8; 7],
    /// The rules, used as a ring.
    pub rules: [CachedRule; CACHED],
}

/// A cached rule, and the addresses for which it is valid.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct CachedRule {
    /// The first address (avma) for which the rule is known to be valid.
    pub start: u64,
    /// [`Space::number`] of the address space that it belongs to; 0 in an unused entry.
    pub space: u32,
    /// Number of bytes from `start` for which the rule is valid.
    pub length: u32,
    /// The rule itself.
    pub rule: Rule,
}

/// A stack copy record. Only its used part is sent.
#[repr(C)]
pub struct StackCopyRecord {
    pub header: StackCopyHeader,
    pub bytes: [u8; MAX_STACK_COPY],
}

/// The stack of a send, kept until a sample needs it. It is sent as a [`agent_ebpf::sample::KIND_CALLER`]
/// record.
#[repr(C)]
pub struct HeldStack {
    pub header: SampleHeader,
    pub frames: [u64; MAX_CALLER_FRAMES],
}

/// The last sends on a connection. The protocol is described in `sends.rs`.
#[repr(C)]
pub struct SendRing {
    /// Number of the newest send; modulo [`SENDS`] it is its index in `sends`.
    pub next: u32,
    /// The current turn, see [`Send::turn`].
    pub turn: u32,
    /// Sends in this turn, counted up to half of [`SENDS`].
    pub asked: u32,
    /// Process id of the backend that answers, in the initial pid namespace; 0 before its first answer. The
    /// fields `own_pid` and `status` describe the same backend.
    pub backend: u32,
    /// 1 while a send is being noted. On a Unix socket its bytes may already be in the receive queue, so a
    /// server that is awake may begin the statement before the send is noted.
    pub noting: u32,
    /// The backend's process id in its own pid namespace.
    pub own_pid: u32,
    /// Address of the backend's status (`PgBackendStatus`) in the backend's memory.
    pub status: u64,
    /// Start of the statement whose answer ended the last turn, in PostgreSQL's own time.
    pub answered: u64,
    /// The sends, used as a ring.
    pub sends: [Send; SENDS],
    /// The stack of each send that is [`CallerStack::Held`](agent_ebpf::postgres::CallerStack::Held).
    pub stacks: [HeldStack; SENDS],
}

/// A backend record under construction. Only the header and the used part of the text are sent.
#[repr(C)]
pub struct BackendRecord {
    pub header: BackendHeader,
    pub text: [u8; TEXT_BYTES],
    /// Scratch space in which the facts about a backend are gathered; never sent.
    pub facts: BackendFacts,
}

/// Facts about a backend that stay the same for its lifetime, and the send of its last statement. They are
/// found once and cached, because each of them lies behind several pointers to cold memory.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct BackendFacts {
    /// Identity of the backend's address space, by which a later process with the same pid is told apart. 0
    /// while some fact is still missing: then the facts are gathered again at the next sample.
    pub mm: u64,
    /// Address of its status (`PgBackendStatus`); 0 if it has none.
    pub entry: u64,
    /// Address of its wait event; 0 if it has none.
    pub wait_event: u64,
    /// Its process id in its own pid namespace.
    pub pid: u32,
    /// Process id of a parallel worker's leader, in the server's pid namespace; valid with `HAS_LEADER`.
    pub leader: u32,
    /// `HAS_CONNECTION` and `HAS_LEADER`.
    pub flags: u32,
    /// A `CallerSearch`: the result of the search for the send that began `statement`.
    pub search: u32,
    /// Its client connection, or its leader's; valid with `HAS_CONNECTION`.
    pub served: ServedConnection,
    /// Start of the statement for which `send` and `search` were found, in PostgreSQL's own time; 0 if
    /// there is none.
    pub statement: u64,
    /// The send that began `statement`.
    pub send: Send,
    /// The process's title, ended by NUL.
    pub title: [u8; TITLE_BYTES],
}
