//! The records that travel through the ring buffer.
//!
//! A sample is a [`SampleHeader`] followed by `kernel_frames` and then `user_frames` words, each an
//! avma, leaf first. The first user frame is the interrupted instruction; the others are return
//! addresses (the instruction *after* the call), except a frame that a signal interrupted, which is
//! told by [`SIGNAL_FRAME_BIT`], and the one before it: that is the first instruction of the code
//! that returns from the handler, which no instruction called.
//!
//! A sample that the kernel could not unwind to its end is preceded, from the same CPU and with the
//! same `time`, by a [`StackCopyHeader`] and `stack_bytes` bytes of user stack: user space goes on from
//! there. The copy starts at the registers' stack pointer rounded down to
//! [`crate::limits::STACK_CHUNK`].

use crate::unwind::Registers;

/// Record kind of a sample.
pub const KIND_SAMPLE: u32 = 1;
/// Record kind of a stack copy.
pub const KIND_STACK_COPY: u32 = 2;
/// Record kind of what a PostgreSQL backend told, see [`crate::postgres::BackendHeader`].
pub const KIND_BACKEND: u32 = 3;
/// Record kind of the stack of a send to a server: like a sample, but at the time of the send.
pub const KIND_CALLER: u32 = 4;

/// Flag of a stack copy: `registers.ip` is an interrupted instruction, not a return address.
pub const EXACT_IP: u32 = 1;
/// Flag of a stack copy: the kernel followed a frame pointer on the way to this frame.
pub const GUESSED: u32 = 2;

/// Set in a user frame whose address is an interrupted instruction and not a return address: look
/// it up as it is. (User addresses on x86_64 and aarch64 never use bit 63.)
pub const SIGNAL_FRAME_BIT: u64 = 1 << 63;

/// How the unwinding of a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Outcome {
    /// The stack's proven end was reached by tables alone: an undefined or zero return address.
    Complete = 0,
    /// A table proves the end (the return address is undefined, or the code is an entry point's), but at least
    /// one frame before it was unwound by its frame pointer, because its code has no tables (just-in-time
    /// compiled code).
    CompleteByFramePointer = 1,
    /// A kernel thread, or a task without user registers, on its way out or in the middle of execve:
    /// there is no user stack.
    KernelOnly = 2,
    /// The process is not known to the kernel program yet.
    UnknownProcess = 3,
    /// An address outside every known executable mapping.
    UnknownMapping = 4,
    /// The mapping's file has no tables in the kernel yet.
    TablesPending = 5,
    /// An address that no unwind entry of its file covers.
    NotCovered = 6,
    /// A rule that the table compiler does not know.
    UnsupportedRule = 7,
    /// The stack's memory could not be read (paged out, or not the stack any more).
    UnreadableStack = 8,
    /// The caller's frame did not lie above the callee's: the stack is broken.
    NoProgress = 9,
    /// More than [`crate::limits::MAX_USER_FRAMES`] frames: the root end is missing.
    TooDeep = 10,
    /// User space went on from the stack copy, and the copy ended before the stack did.
    CopyTooShort = 11,
    /// A frame-pointer chain in code without tables ended somewhere that is no proven end.
    BrokenFramePointer = 12,
    /// A frame pointer or a return address of zero, after at least one frame was unwound by its frame pointer. It
    /// may be the end of the stack. It may as well be a number in a register that is no frame pointer.
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

    /// Whether the stack is known to be whole (a kernel thread's is: it has no user part).
    pub const fn is_complete(self) -> bool {
        matches!(
            self,
            Outcome::Complete | Outcome::CompleteByFramePointer | Outcome::KernelOnly
        )
    }

    /// The outcome of a walk that came to an end. `proven`: a table says that this is the end
    /// ([`crate::unwind::Step::End`]); otherwise a zero stands where a caller would. `guessed`: a frame pointer was
    /// followed on the way, so the walk may have lost the stack and found any zero.
    pub const fn of_end(proven: bool, guessed: bool) -> Outcome {
        match (proven, guessed) {
            (_, false) => Outcome::Complete,
            (true, true) => Outcome::CompleteByFramePointer,
            (false, true) => Outcome::GuessedEnd,
        }
    }

    /// Whether user space may get further than the kernel did, given a copy of the stack: the
    /// kernel lacked knowledge that user space has or can get.
    pub const fn is_continuable(self) -> bool {
        matches!(
            self,
            Outcome::UnknownProcess | Outcome::UnknownMapping | Outcome::TablesPending
        )
    }
}

/// Ids of a trace and of a span in it (W3C trace context); zero for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C, align(8))]
pub struct TraceContext {
    /// Trace id.
    pub trace: [u8; 16],
    /// Span id.
    pub span: [u8; 8],
}

impl TraceContext {
    /// As three words, in memory order: a comparison of bytes is a thousand instructions in a kernel program.
    #[inline(always)]
    pub const fn words(&self) -> [u64; 3] {
        // SAFETY: the type has this size and alignment, and no padding.
        unsafe { core::mem::transmute(*self) }
    }
}

/// Start of a sample record.
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
    /// Which address space the process had (the kernel's `mm` pointer: an identity, never followed).
    /// An exec changes it, so tables of the program before are never applied.
    pub mm: u64,
    /// Name of the thread, ended by NUL.
    pub comm: [u8; 16],
    /// Words of kernel stack that follow.
    pub kernel_frames: u32,
    /// Words of user stack that follow those.
    pub user_frames: u32,
    /// An [`Outcome`].
    pub outcome: u8,
    /// 1 when a stack copy of the same `cpu` and `time` was sent just before.
    pub has_stack_copy: u8,
    /// 1 when its process is a backend that is as its last [`KIND_BACKEND`] record tells, `wait_event` apart.
    pub is_backend_unchanged: u8,
    /// Explicit padding, zero.
    pub padding: u8,
    /// `wait_event_info` of a backend that is unchanged, of others undefined; 0: not waiting.
    pub wait_event: u32,
    /// What the thread was working for, if it publishes that.
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
    /// The frame at which the kernel stopped. It is not among the sample's user frames.
    pub registers: Registers,
}

const _: () = assert!(size_of::<StackCopyHeader>() == 24 + size_of::<Registers>());

#[cfg(test)]
mod tests {
    use super::*;

    /// After a guess only a table proves the end.
    #[test]
    fn ends() {
        assert_eq!(Outcome::of_end(true, false), Outcome::Complete);
        assert_eq!(Outcome::of_end(false, false), Outcome::Complete);
        assert_eq!(Outcome::of_end(true, true), Outcome::CompleteByFramePointer);
        let guessed = Outcome::of_end(false, true);
        assert_eq!(guessed, Outcome::GuessedEnd);
        assert!(!guessed.is_complete() && !guessed.is_continuable());
    }

    /// Numbers travel from the kernel and back.
    #[test]
    fn numbers() {
        for (number, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, number);
            assert_eq!(Outcome::from_u8(number as u8), Some(outcome));
        }
    }
}
