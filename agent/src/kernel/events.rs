//! Decodes the records of the ring buffer. Their layout is described in `agent_ebpf::sample`.

use agent_ebpf::{
    limits::STACK_CHUNK,
    postgres::BackendHeader,
    sample::{
        EXACT_IP, GUESSED, KIND_BACKEND, KIND_CALLER, KIND_SAMPLE, KIND_STACK_COPY, Outcome,
        SampleHeader, StackCopyHeader,
    },
    unwind::Registers,
};

/// A record, borrowed from the ring buffer.
#[derive(Debug)]
pub enum Record<'a> {
    /// A sample.
    Sample(Sample<'a>),
    /// A copy of a stack, for the next sample or caller from the same CPU.
    StackCopy(StackCopy<'a>),
    /// The status of a PostgreSQL backend, for the next sample from the same CPU.
    Backend(Box<BackendRecord<'a>>),
    /// The stack of a send to a PostgreSQL server. `cpu` and `time` in its header are those of the send.
    Caller(Sample<'a>),
}

/// The status of a PostgreSQL backend.
#[derive(Clone, Debug)]
pub struct BackendRecord<'a> {
    /// The part of fixed size.
    pub header: BackendHeader,
    /// The query's text, possibly truncated inside a character.
    pub text: &'a [u8],
}

/// A sample as the kernel sent it.
#[derive(Debug)]
pub struct Sample<'a> {
    /// The part of fixed size.
    pub header: SampleHeader,
    /// How the walk ended.
    pub outcome: Outcome,
    /// Kernel frames, then user frames, eight bytes each (the ring buffer aligns to eight).
    frames: &'a [u8],
}

/// A copy of the top of a stack.
#[derive(Clone, Debug)]
pub struct StackCopy<'a> {
    /// Logical CPU.
    pub cpu: u32,
    /// The time of the sample, nanoseconds.
    pub time: u64,
    /// Whether the instruction pointer is exact; otherwise it is a return address.
    pub exact_ip: bool,
    /// Whether the kernel program followed a frame pointer to reach this frame.
    pub guessed: bool,
    /// The registers of the frame at which the walk is to continue.
    pub registers: Registers,
    /// Address of the first byte that was copied.
    pub start: u64,
    /// The bytes of the stack from there.
    pub bytes: &'a [u8],
}

impl<'a> Record<'a> {
    /// Decodes a record; `None` if it is malformed.
    pub fn parse(bytes: &'a [u8]) -> Option<Record<'a>> {
        match u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?) {
            KIND_SAMPLE => sample(bytes).map(Record::Sample),
            KIND_CALLER => sample(bytes).map(Record::Caller),
            KIND_BACKEND => {
                let (header, text) = split::<BackendHeader>(bytes)?;
                Some(Record::Backend(Box::new(BackendRecord {
                    text: text.get(..header.text_bytes as usize)?,
                    header,
                })))
            }
            KIND_STACK_COPY => {
                let (header, stack) = split::<StackCopyHeader>(bytes)?;
                Some(Record::StackCopy(StackCopy {
                    cpu: header.cpu,
                    time: header.time,
                    exact_ip: header.flags & EXACT_IP != 0,
                    guessed: header.flags & GUESSED != 0,
                    registers: header.registers,
                    start: header.registers.sp() & !(STACK_CHUNK as u64 - 1),
                    bytes: stack.get(..header.stack_bytes as usize)?,
                }))
            }
            _ => None,
        }
    }
}

fn sample(bytes: &[u8]) -> Option<Sample<'_>> {
    let (header, frames) = split::<SampleHeader>(bytes)?;
    let count = header.kernel_frames as usize + header.user_frames as usize;
    Some(Sample {
        outcome: Outcome::from_u8(header.outcome)?,
        frames: frames.get(..count * 8)?,
        header,
    })
}

impl Sample<'_> {
    /// Kernel frames, leaf first.
    pub fn kernel_frames(&self) -> impl Iterator<Item = u64> + '_ {
        words(&self.frames[..self.header.kernel_frames as usize * 8])
    }

    /// User frames, leaf first.
    pub fn user_frames(&self) -> impl Iterator<Item = u64> + '_ {
        words(&self.frames[self.header.kernel_frames as usize * 8..])
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().expect("chunks of eight bytes")))
}

/// Types of the contract that consist of integers, for which every bit pattern is valid.
trait Plain: Copy {}
impl Plain for SampleHeader {}
impl Plain for StackCopyHeader {}
impl Plain for BackendHeader {}

fn split<T: Plain>(bytes: &[u8]) -> Option<(T, &[u8])> {
    let (head, rest) = bytes.split_at_checked(size_of::<T>())?;
    // SAFETY: `head` has the size of `T`, for which every bit pattern is valid; the read is
    // unaligned.
    Some((unsafe { head.as_ptr().cast::<T>().read_unaligned() }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record that is shorter than its header states is rejected.
    #[test]
    fn truncated() {
        let mut bytes = vec![0u8; size_of::<SampleHeader>() + 16];
        bytes[..4].copy_from_slice(&KIND_SAMPLE.to_le_bytes());
        let frames_at = std::mem::offset_of!(SampleHeader, user_frames);
        bytes[frames_at..frames_at + 4].copy_from_slice(&2u32.to_le_bytes());
        let Some(Record::Sample(sample)) = Record::parse(&bytes) else {
            panic!("refused a good record");
        };
        assert_eq!(sample.user_frames().count(), 2);
        for cut in 0..bytes.len() {
            assert!(Record::parse(&bytes[..cut]).is_none(), "cut at {cut}");
        }
    }
}
