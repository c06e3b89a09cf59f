//! Facts about an ELF file, read from its bytes: where its code is mapped from, its unwind sections,
//! its entry point, its build id, its exported symbols. No I/O, and no panic on any input.
//!
//! Addresses here are svmas (as the file states them) unless they are named otherwise.

mod exports;
mod parse;

pub use exports::Exports;

use std::ops::Range;

/// Maximum length of a build id, bytes. Linkers write 8 to 32; a longer note is not taken for a build id.
pub const MAX_BUILD_ID: usize = 64;

/// Maximum number of executable segments of a file. Linkers write one, seldom two.
pub const MAX_EXECUTABLE_SEGMENTS: usize = 64;

/// Maximum number of executable sections of a file; linkers write half a dozen. For a file with
/// more, [`Object::code`] is empty.
pub const MAX_CODE_SECTIONS: usize = 64;

/// Why a file's facts could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a 64-bit little-endian ELF file, or its headers lie outside the file.
    #[error("not a readable ELF file: {0}")]
    Elf(#[from] ::object::Error),
    /// An architecture that is not supported; the number is `e_machine`.
    #[error("ELF machine {0} is not supported")]
    Machine(u16),
    /// No executable segment, so no code that could be sampled.
    #[error("no executable segment")]
    NoText,
    /// More than [`MAX_EXECUTABLE_SEGMENTS`] executable segments.
    #[error("more than {MAX_EXECUTABLE_SEGMENTS} executable segments")]
    TooManySegments,
    /// The executable segments span more bytes than a table address can express (32 bits,
    /// without the greatest value).
    #[error("the executable segments span {0:#x} bytes")]
    TextSpan(u64),
}

/// An executable `PT_LOAD` segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Offset of its first byte in the file.
    pub file_offset: u64,
    /// svma of its first byte.
    pub svma: u64,
    /// The number of its bytes that come from the file.
    pub size: u64,
}

/// A section's bytes and where they are mapped.
#[derive(Clone, Copy, Debug)]
pub struct Section<'data> {
    /// svma of the first byte.
    pub svma: u64,
    /// The bytes.
    pub data: &'data [u8],
}

/// What is known about an ELF file.
#[derive(Clone, Debug)]
pub struct Object<'data> {
    /// Executable segments, sorted by svma; at least one.
    pub segments: Vec<Segment>,
    /// The parts of the segments that hold instructions, sorted by svma, without overlap: the
    /// executable sections. In a file without section headers these are the executable segments,
    /// except one that also holds the file's own headers, because its code cannot be told apart
    /// from the rest. Empty if the sections overlap, or are more than [`MAX_CODE_SECTIONS`].
    pub code: Vec<Section<'data>>,
    /// `.eh_frame`, found by its section header, or else through `.eh_frame_hdr`; then it
    /// extends to the end of the segment that holds it.
    pub eh_frame: Option<Section<'data>>,
    /// `.eh_frame_hdr`, found by `PT_GNU_EH_FRAME`, which is what the run-time unwinder uses.
    pub eh_frame_hdr: Option<Section<'data>>,
    /// Entry point; 0 in most shared libraries.
    pub entry: u64,
    /// Build id, if the linker wrote one.
    pub build_id: Option<&'data [u8]>,
}

impl<'data> Object<'data> {
    /// Reads the facts of an ELF file from its bytes.
    ///
    /// # Errors
    /// The file is not an x86_64 ELF file, its program headers are unreadable, or it has no
    /// executable segments, too many, or too large ones. Broken section headers, notes and
    /// unwind sections are not errors: what cannot be read is absent.
    pub fn parse(data: &'data [u8]) -> Result<Object<'data>, Error> {
        parse::parse(data)
    }

    /// The svmas from the first to the last byte of the executable segments.
    pub fn text(&self) -> Range<u64> {
        let start = self.segments.first().map_or(0, |s| s.svma);
        let end = self.segments.iter().map(|s| s.svma + s.size).max();
        start..end.unwrap_or(start)
    }

    /// The bytes of all executable segments together.
    pub fn text_size(&self) -> u64 {
        self.segments.iter().map(|s| s.size).sum()
    }

    /// The svma that is address 0 in this file's table: the start of its [text](Self::text).
    pub fn base_svma(&self) -> u64 {
        self.text().start
    }

    /// avma − svma for a mapping of this file that begins at the avma `start` and is `length` bytes
    /// long, from the file offset `pgoff`. `None` if the mapping holds no part of an executable segment.
    pub fn bias(&self, start: u64, pgoff: u64, length: u64) -> Option<u64> {
        bias(&self.segments, start, pgoff, length)
    }
}

/// The values of exported symbols (`.dynsym`), in the order of `names`: svmas, or for a thread-local variable
/// of an executable its offset from the thread pointer. `None` for a name that the file does not export.
pub fn exported<const N: usize>(data: &[u8], names: [&str; N]) -> [Option<u64>; N] {
    parse::exported(data, names)
}

/// The same as [`Object::bias`], for callers that have kept only the segments.
pub fn bias(segments: &[Segment], start: u64, pgoff: u64, length: u64) -> Option<u64> {
    let end = pgoff.checked_add(length)?;
    let overlap = |segment: &&Segment| {
        let from = pgoff.max(segment.file_offset);
        let to = end.min(segment.file_offset.saturating_add(segment.size));
        to.saturating_sub(from)
    };
    let segment = segments.iter().max_by_key(overlap)?;
    if overlap(&segment) == 0 {
        return None;
    }
    let svma = segment
        .svma
        .wrapping_sub(segment.file_offset)
        .wrapping_add(pgoff);
    Some(start.wrapping_sub(svma))
}
