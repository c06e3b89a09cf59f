//! The records that are sent through the ring buffer.
//!
//! A sample is a [`SampleHeader`] followed by `kernel_frames` and then `user_frames` words. Each word is an
//! avma, and the leaf comes first. The first user frame is the interrupted instruction. The others are
//! return addresses (the instruction *after* the call), with two exceptions: a frame that a signal
//! interrupted, which is marked by [`SIGNAL_FRAME_BIT`]; and the frame before it, which is the first
//! instruction of the code that returns from the signal handler and was not called by any instruction.
//!
//! If the kernel lacked knowledge to unwind a sample to its end, the sample is preceded by a
//! [`StackCopyHeader`] with the same CPU and `time` and `stack_bytes` bytes of user stack, from which user
//! space continues the walk. The copy starts at the stack pointer in its registers, rounded down to
//! [`crate::limits::STACK_CHUNK`].

use crate::unwind::Registers;

/// Record kind of a sample.
pub const KIND_SAMPLE: u32 = 1;
/// Record kind of a stack copy.
pub const KIND_STACK_COPY: u32 = 2;
/// Record kind of the status of a PostgreSQL backend, see [`crate::postgres::BackendHeader`].
pub const KIND_BACKEND: u32 = 3;
/// Record kind of the stack of a send to a server. It has the form of a sample, with the time of the send.
pub const KIND_CALLER: u32 = 4;

/// Flag of a stack copy: `registers.ip` is an interrupted instruction, not a return address.
pub const EXACT_IP: u32 = 1;
/// Flag of a stack copy: the kernel followed at least one frame pointer on the way to this frame.
pub const GUESSED: u32 = 2;

/// Set in a user frame (not the first) whose address is an interrupted instruction and not a return
/// address, so that it is looked up at the address itself. User addresses on x86_64 and aarch64 never use
/// bit 63.
pub const SIGNAL_FRAME_BIT: u64 = 1 << 63;

/// How the unwinding of a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Outcome {
    /// The end of the stack was reached and proven by tables alone: the return address is undefined or zero.
    Complete = 0,
    /// A table proves the end (the return address is undefined, or the code is that of an entry point), but
    /// at least one frame before it was unwound by its frame pointer, because its code has no tables (as
    /// just-in-time compiled code).
    CompleteByFramePointer = 1,
    /// There is no user stack: the task is a kernel thread, is exiting, or is in the middle of execve.
    KernelOnly = 2,
    /// The kernel has no tables for the process yet.
    UnknownProcess = 3,
    /// The walk came to an address outside every known executable mapping.
    UnknownMapping = 4,
    /// The walk came to a mapping whose file has no tables in the kernel (yet).
    TablesPending = 5,
    /// The walk came to an address that no unwind entry of its file covers.
    NotCovered = 6,
    /// The walk came to a rule that the table compiler does not support.
    UnsupportedRule = 7,
    /// Memory of the stack could not be read: it was paged out, never written, or is not part of the stack.
    UnreadableStack = 8,
    /// The caller's frame did not lie above the callee's: the stack is broken.
    NoProgress = 9,
    /// More than [`crate::limits::MAX_USER_FRAMES`] frames: the root end is missing.
    TooDeep = 10,
    /// User space continued the walk on the stack copy, and the copy ended before the stack did.
    CopyTooShort = 11,
    /// A frame-pointer chain in code without tables ended somewhere that is no proven end.
    BrokenFramePointer = 12,
    /// The walk came to a frame pointer or a return address of zero after at least one frame was unwound by
    /// its frame pointer. This may be the end of the stack, or the register may have held something other
    /// than a frame pointer.
    GuessedEnd = 13,
}

impl Outcome {
    /// Every outcome, in the order of their numbers.
    pub const ALL: [Outcome; 14] = [
        Outcome::Complete,
        Outcome::CompleteByFramePointer,
        Outcome::KernelOnly,
        Outcome::UnknownProcess,
        Outcome::UnknownMapping,
        Outcome::TablesPending,
        Outcome::NotCovered,
        Outcome::UnsupportedRule,
        Outcome::UnreadableStack,
        Outcome::NoProgress,
        Outcome::TooDeep,
        Outcome::CopyTooShort,
        Outcome::BrokenFramePointer,
        Outcome::GuessedEnd,
    ];

    /// The outcome with this number.
    pub fn from_u8(number: u8) -> Option<Outcome> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The name used in summaries and labels.
    pub const fn name(self) -> &'static str {
        match self {
            Outcome::Complete => "complete",
            Outcome::CompleteByFramePointer => "complete_by_frame_pointer",
            Outcome::KernelOnly => "kernel_only",
            Outcome::UnknownProcess => "unknown_process",
            Outcome::UnknownMapping => "unknown_mapping",
            Outcome::TablesPending => "tables_pending",
            Outcome::NotCovered => "not_covered",
            Outcome::UnsupportedRule => "unsupported_rule",
            Outcome::UnreadableStack => "unreadable_stack",
            Outcome::NoProgress => "no_progress",
            Outcome::TooDeep => "too_deep",
            Outcome::CopyTooShort => "copy_too_short",
            Outcome::BrokenFramePointer => "broken_frame_pointer",
            Outcome::GuessedEnd => "guessed_end",
        }
    }

    /// Whether the stack is known to be complete. That of [`Outcome::KernelOnly`] is, because there is no
    /// user part.
    pub const fn is_complete(self) -> bool {
        matches!(
            self,
            Outcome::Complete | Outcome::CompleteByFramePointer | Outcome::KernelOnly
        )
    }

    /// The outcome of a walk that came to an end. `proven`: a table says that this is the end
    /// ([`crate::unwind::Step::End`]); otherwise the return address is zero. `guessed`: a frame pointer was
    /// followed on the way, so the walk may have left the stack and read an unrelated zero.
    pub const fn of_end(proven: bool, guessed: bool) -> Outcome {
        match (proven, guessed) {
            (_, false) => Outcome::Complete,
            (true, true) => Outcome::CompleteByFramePointer,
            (false, true) => Outcome::GuessedEnd,
        }
    }

    /// Whether user space may get further with a copy of the stack, because the kernel lacked knowledge
    /// that the agent has or can obtain.
    pub const fn is_continuable(self) -> bool {
        matches!(
            self,
            Outcome::UnknownProcess | Outcome::UnknownMapping | Outcome::TablesPending
        )
    }
}

/// Ids of a trace and of a span in it (W3C trace context); all zero if there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C, align(8))]
pub struct TraceContext {
    /// Trace id.
    pub trace: [u8; 16],
    /// Span id.
    pub span: [u8; 8],
}

impl TraceContext {
    /// The ids as three words, in memory order, for comparisons: comparing them byte by byte takes a thousand
    /// instructions in a kernel program.
    #[inline(always)]
    pub const fn words(&self) -> [u64; 3] {
        // SAFETY: the type has this size and alignment, and no padding.
        unsafe { core::mem::transmute(*self) }
    }
}

/// Start of a sample record, and of the record of a caller's stack.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct SampleHeader {
    /// [`KIND_SAMPLE`] or [`KIND_CALLER`].
    pub kind: u32,
    /// Process id (the kernel's tgid) in the initial pid namespace.
    pub pid: u32,
    /// Thread id (the kernel's pid).
    pub tid: u32,
    /// Logical CPU.
    pub cpu: u32,
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// Identity of the address space that the process had (the kernel's `mm` pointer, never dereferenced).
    /// An exec changes it, so the tables of the old program are not applied to the new one.
    pub mm: u64,
    /// Name of the thread, ended by NUL.
    pub comm: [u8; 16],
    /// Words of kernel stack that follow.
    pub kernel_frames: u32,
    /// Words of user stack that follow those.
    pub user_frames: u32,
    /// An [`Outcome`].
    pub outcome: u8,
    /// 1 when a stack copy with the same `cpu` and `time` was sent just before.
    pub has_stack_copy: u8,
    /// 1 when the process is a backend whose last [`KIND_BACKEND`] record still holds, except for
    /// `wait_event`.
    pub is_backend_unchanged: u8,
    /// Explicit padding, zero.
    pub padding: u8,
    /// `wait_event_info` if `is_backend_unchanged` is 1, else undefined; 0 if the backend is not waiting.
    pub wait_event: u32,
    /// The trace and span that the thread was working for, if it publishes them.
    pub trace: TraceContext,
}

const _: () = assert!(size_of::<SampleHeader>() == 88);

/// Start of a stack copy record.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct StackCopyHeader {
    /// [`KIND_STACK_COPY`].
    pub kind: u32,
    /// Bytes of stack that follow, from `registers.sp()` rounded down to
    /// [`crate::limits::STACK_CHUNK`].
    pub stack_bytes: u32,
    /// Logical CPU.
    pub cpu: u32,
    /// [`EXACT_IP`], [`GUESSED`].
    pub flags: u32,
    /// `CLOCK_MONOTONIC`, nanoseconds: the same as in the sample's header.
    pub time: u64,
    /// Registers of the frame at which the kernel stopped. This frame is not among the sample's user frames.
    pub registers: Registers,
}

const _: () = assert!(size_of::<StackCopyHeader>() == 24 + size_of::<Registers>());

#[cfg(test)]
mod tests {
    use super::*;

    /// After a frame pointer was followed, only a table proves the end.
    #[test]
    fn ends() {
        assert_eq!(Outcome::of_end(true, false), Outcome::Complete);
        assert_eq!(Outcome::of_end(false, false), Outcome::Complete);
        assert_eq!(Outcome::of_end(true, true), Outcome::CompleteByFramePointer);
        let guessed = Outcome::of_end(false, true);
        assert_eq!(guessed, Outcome::GuessedEnd);
        assert!(!guessed.is_complete() && !guessed.is_continuable());
    }

    /// Every outcome can be recovered from its number.
    #[test]
    fn numbers() {
        for (number, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, number);
            assert_eq!(Outcome::from_u8(number as u8), Some(outcome));
        }
    }
}
