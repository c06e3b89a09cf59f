//! Facts about an ELF file, from its bytes: where its code is mapped from, its unwind sections, its
//! entry point, its build id. No I/O, and no panic on any input.
//!
//! Addresses here are svmas (as the file states them) unless they are named otherwise.

mod exports;
mod parse;

pub use exports::Exports;

use std::ops::Range;

/// Bytes of a build id at most: linkers write 8 to 32; a longer note is not a build id.
pub const MAX_BUILD_ID: usize = 64;

/// Executable segments at most. Linkers write one, seldom two.
pub const MAX_EXECUTABLE_SEGMENTS: usize = 64;

/// Executable sections at most; linkers write half a dozen. In a file with more, no code is known.
pub const MAX_CODE_SECTIONS: usize = 64;

/// Why a file's facts could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a 64-bit little-endian ELF file, or its headers lie outside the file.
    #[error("not a readable ELF file: {0}")]
    Elf(#[from] ::object::Error),
    /// An architecture without tables; the number is `e_machine`.
    #[error("ELF machine {0} is not supported")]
    Machine(u16),
    /// No executable segment, so no code that could be sampled.
    #[error("no executable segment")]
    NoText,
    /// More than [`MAX_EXECUTABLE_SEGMENTS`] executable segments.
    #[error("more than {MAX_EXECUTABLE_SEGMENTS} executable segments")]
    TooManySegments,
    /// The executable segments span more than table addresses (32 bits, without the greatest) can
    /// tell.
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
    /// Bytes of it that come from the file.
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
    /// Where the segments hold instructions, sorted by svma, without overlap: the executable
    /// sections. In a file without section headers, the executable segments, except one that also
    /// holds the file's own headers: there the code cannot be told from the rest.
    pub code: Vec<Section<'data>>,
    /// `.eh_frame`: by its section header, or else through `.eh_frame_hdr` up to the end of the
    /// segment that holds it.
    pub eh_frame: Option<Section<'data>>,
    /// `.eh_frame_hdr`: by `PT_GNU_EH_FRAME`, which is what the run-time unwinder uses.
    pub eh_frame_hdr: Option<Section<'data>>,
    /// Entry point; 0 in most shared libraries.
    pub entry: u64,
    /// Build id, where the linker wrote one.
    pub build_id: Option<&'data [u8]>,
}

impl<'data> Object<'data> {
    /// Reads the facts of an ELF file from its bytes.
    ///
    /// # Errors
    /// When it is no x86_64 ELF file, when its program headers are not readable, or when it has no
    /// code. Broken section headers, notes and unwind sections are no errors: what cannot be read
    /// is absent.
    pub fn parse(data: &'data [u8]) -> Result<Object<'data>, Error> {
        parse::parse(data)
    }

    /// From the first to the last byte of code.
    pub fn text(&self) -> Range<u64> {
        let start = self.segments.first().map_or(0, |s| s.svma);
        let end = self.segments.iter().map(|s| s.svma + s.size).max();
        start..end.unwrap_or(start)
    }

    /// Bytes of code.
    pub fn text_size(&self) -> u64 {
        self.segments.iter().map(|s| s.size).sum()
    }

    /// svma of the table address 0 of this file's table: the start of its [text](Self::text).
    pub fn base_svma(&self) -> u64 {
        self.text().start
    }

    /// avma − svma for a mapping of this file that begins at the avma `start`, `length` bytes long,
    /// from the file offset `pgoff`. `None` when no executable segment is in it.
    pub fn bias(&self, start: u64, pgoff: u64, length: u64) -> Option<u64> {
        bias(&self.segments, start, pgoff, length)
    }
}

/// The values of exported symbols (`.dynsym`), in the order of `names`: svmas; for a thread-local
/// variable of an executable its offset from the thread pointer. `None` for a name that the file does not
/// export.
pub fn exported<const N: usize>(data: &[u8], names: [&str; N]) -> [Option<u64>; N] {
    parse::exported(data, names)
}

/// [`Object::bias`], where only the segments were kept.
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
