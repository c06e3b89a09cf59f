//! What the programs keep in maps, and the records that they build there. This module imports none of the programs.

use agent_ebpf::{
    limits::{MAX_CALLER_FRAMES, MAX_KERNEL_FRAMES, MAX_STACK_COPY, MAX_USER_FRAMES, SENDS},
    postgres::{BackendHeader, Send, ServedConnection, TEXT_BYTES, TITLE_BYTES},
    sample::{SampleHeader, StackCopyHeader},
    table::{MappingEntry, Space},
    unwind::{Cursor, Rule},
};

/// Slot of the sampling program in what each CPU has for walks. It may interrupt the other, so they share
/// nothing that is written.
pub const SAMPLER: u32 = 0;

/// Slot of the program at sends.
pub const CALLER: u32 = 1;

/// How many walks may be under way on a CPU.
pub const SLOTS: u32 = 2;

/// Frames of a sample, kernel's and user's.
pub const FRAMES: usize = (MAX_KERNEL_FRAMES + MAX_USER_FRAMES) as usize;

/// A CPU's own time keeping.
#[repr(C)]
pub struct CpuClock {
    /// Tick before this one, nanoseconds; 0 before the first.
    pub last_tick: u64,
    /// Start of the second in which `copies` were sent.
    pub window: u64,
    /// Stack copies sent in that second.
    pub copies: u64,
}

/// The state of a walk and, behind it, the record being built. What each frame needs lies together: between
/// two samples the measured program has driven this out of the caches, and a page more costs more than a line.
#[repr(C)]
pub struct Walk {
    pub stretch: Stretch,
    /// Registers of the current frame.
    pub cursor: Cursor,
    /// The CPU's time keeping.
    pub clock: CpuClock,
    /// What is known of its process.
    pub space: Space,
    /// The mapping that was looked for last; the next address is often in the same, in the next sample too.
    pub mapping: MappingEntry,
    /// [`Space::number`] of the address space in which it was found.
    pub mapping_of: u32,
    /// Place of the current frame's rule in the [`RuleCache`].
    pub place: u8,
    /// That of the last walk's first frame.
    pub first: u8,
    pub frame_pointers: u32,
    /// Hash of the user frames of a [`CALLER`].
    pub hash: u64,
    /// What is sent.
    pub record: SampleRecord,
}

/// A sample as it is sent.
#[repr(C)]
pub struct SampleRecord {
    /// Its start.
    pub header: SampleHeader,
    /// Kernel frames and then user frames.
    pub frames: [u64; FRAMES],
}

impl SampleRecord {
    /// Bytes of a record with so many frames.
    #[inline(always)]
    pub fn bytes(frames: usize) -> usize {
        core::mem::offset_of!(SampleRecord, frames) + frames * 8
    }
}

const _: () = assert!(core::mem::offset_of!(SampleRecord, frames) == size_of::<SampleHeader>());

/// Words of the user stack that are read at once. Frame by frame each read waits for memory that the measured
/// program has not touched for long; in one piece the processor fetches ahead.
pub const STRETCH: usize = 256;

/// A piece of the user stack.
#[repr(C)]
pub struct Stretch {
    /// Where it begins; 0: nothing is there yet.
    pub start: u64,
    /// 1 when a piece could not be read: near the end of the stack words are read one by one.
    pub ended: u64,
    pub words: [u64; STRETCH],
}

/// Rules that a [`RuleCache`] holds: as many as a byte counts.
pub const CACHED: usize = 1 << u8::BITS;

/// Rules that were found before, in the order in which they were: a caller's nearly always comes after its callee's, as
/// on the stack. So the next is at hand when the one before was found, and the processor has fetched it ahead: between
/// two samples the measured program has driven all of this out of its caches.
#[repr(C)]
pub struct RuleCache {
    /// Where the rule of an address is, by the address's hash.
    pub places: [u8; CACHED],
    /// The place of the next rule that is found: the oldest's.
    pub next: u8,
    pub padding: [u8; 7],
    pub rules: [CachedRule; CACHED],
}

/// A rule that was found before.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct CachedRule {
    /// The first address for which it is known to be valid.
    pub start: u64,
    /// [`Space::number`] of the address space in which; 0 is none.
    pub space: u32,
    /// Bytes for which.
    pub length: u32,
    pub rule: Rule,
}

/// A stack copy being built.
#[repr(C)]
pub struct StackCopyRecord {
    pub header: StackCopyHeader,
    pub bytes: [u8; MAX_STACK_COPY],
}

/// The stack of a send.
#[repr(C)]
pub struct HeldStack {
    pub header: SampleHeader,
    pub frames: [u64; MAX_CALLER_FRAMES],
}

/// The last sends on a connection.
#[repr(C)]
pub struct SendRing {
    pub next: u32,
    /// See [`Send::turn`].
    pub turn: u32,
    /// Sends in this turn.
    pub asked: u32,
    /// The backend that answers, which is remembered for its parallel workers.
    pub backend: u32,
    /// 1 while a send is being noted. At a Unix socket its bytes are there already, and a server that is awake may begin
    /// the statement meanwhile.
    pub noting: u32,
    /// The backend's process id as it sees it itself.
    pub own_pid: u32,
    /// Address of the backend's status.
    pub status: u64,
    /// Start of the statement whose answer ended the last turn.
    pub answered: u64,
    /// The sends.
    pub sends: [Send; SENDS],
    /// Their stacks.
    pub stacks: [HeldStack; SENDS],
}

/// A record being built.
#[repr(C)]
pub struct BackendRecord {
    pub header: BackendHeader,
    pub text: [u8; TEXT_BYTES],
    pub facts: BackendFacts,
}

/// What does not change while a backend lives, and its last statement's send: found once, because each of it lies
/// behind pointers to memory that nobody has touched for long.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct BackendFacts {
    /// Identity of its address space: another process of the same number has another. 0: not all is known yet.
    pub mm: u64,
    /// Address of its status.
    pub entry: u64,
    /// Address of its wait event.
    pub wait_event: u64,
    /// Its process id as it sees it itself.
    pub pid: u32,
    pub leader: u32,
    /// [`HAS_CONNECTION`] and [`HAS_LEADER`].
    pub flags: u32,
    /// A [`CallerSearch`]: how that for the send behind `statement` ended.
    pub search: u32,
    pub served: ServedConnection,
    /// Start of a statement, in PostgreSQL's own time; 0: none.
    pub statement: u64,
    /// Its send.
    pub send: Send,
    pub title: [u8; TITLE_BYTES],
}
