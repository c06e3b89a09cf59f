//! ELF files with sections that no linker would write.

use std::{fs, path::Path, process::Command};

use crate::common::run;

/// Offsets of fields in a section header of a 64-bit ELF file.
pub const SH_FLAGS: usize = 8;
pub const SH_OFFSET: usize = 24;
pub const SH_SIZE: usize = 32;
/// The flag of a compressed section.
const SHF_COMPRESSED: u64 = 1 << 11;
/// Compression algorithms of sections.
pub const ZLIB: u32 = 1;
pub const ZSTD: u32 = 2;

/// An ELF file in memory that is changed, then written back.
pub struct Elf<'path> {
    path: &'path Path,
    pub bytes: Vec<u8>,
}

impl<'path> Elf<'path> {
    pub fn read(path: &'path Path) -> Self {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(bytes[..5], *b"\x7fELF\x02", "{}", path.display());
        Self { path, bytes }
    }

    /// Writes the file back. Its permissions stay.
    pub fn write(self) {
        fs::write(self.path, self.bytes)
            .unwrap_or_else(|error| panic!("{}: {error}", self.path.display()));
    }

    pub fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().expect("8 bytes"))
    }

    fn half(&self, at: usize) -> usize {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("4 bytes")) as usize
    }

    fn short(&self, at: usize) -> usize {
        usize::from(u16::from_le_bytes(
            self.bytes[at..at + 2].try_into().expect("2 bytes"),
        ))
    }

    pub fn set(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// The offset of the header of a section.
    #[track_caller]
    pub fn section(&self, name: &str) -> usize {
        let headers = self.word(0x28) as usize;
        let at = |index: usize| headers + index * 64;
        let names = self.word(at(self.short(0x3e)) + SH_OFFSET) as usize;
        (0..self.short(0x3c))
            .map(at)
            .find(|header| {
                let start = names + self.half(*header);
                self.bytes[start..].starts_with(name.as_bytes())
                    && self.bytes[start + name.len()] == 0
            })
            .unwrap_or_else(|| panic!("{}: no section {name}", self.path.display()))
    }

    /// Gives a section other content, which is appended to the file. What the program has loaded in memory
    /// does not change.
    pub fn set_content(&mut self, name: &str, content: &[u8]) {
        let header = self.section(name);
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        self.set(header + SH_OFFSET, self.bytes.len() as u64);
        self.set(header + SH_SIZE, content.len() as u64);
        self.bytes.extend(content);
    }

    /// Gives a section compressed content that claims to have `claimed` bytes.
    pub fn set_compressed(&mut self, name: &str, algorithm: u32, claimed: u64, packed: &[u8]) {
        let mut content = Vec::new();
        content.extend(u64::from(algorithm).to_le_bytes());
        content.extend(claimed.to_le_bytes());
        content.extend(1u64.to_le_bytes());
        content.extend(packed);
        self.set_content(name, &content);
        let flags = self.section(name) + SH_FLAGS;
        let value = self.word(flags) | SHF_COMPRESSED;
        self.set(flags, value);
    }
}

/// Runs `objcopy` on a file, in place.
pub fn objcopy(file: &Path, args: &[&str]) {
    let mut command = Command::new("objcopy");
    command.args(args).arg(file);
    run(command);
}

/// Adds a section with this content.
pub fn add_section(file: &Path, name: &str, content: &[u8]) {
    let part = file.with_extension("section");
    fs::write(&part, content).expect("a file of ours");
    objcopy(
        file,
        &["--add-section", &format!("{name}={}", part.display())],
    );
    fs::remove_file(&part).expect("a file of ours");
}

/// The content of a section `.gnu_debuglink`.
pub fn debug_link(target: &str, crc: u32) -> Vec<u8> {
    let mut content = target.as_bytes().to_vec();
    content.resize((content.len() + 1).next_multiple_of(4), 0);
    content.extend(crc.to_le_bytes());
    content
}

/// The content of a section `.gnu_debugaltlink`.
pub fn alternate_link(target: &str) -> Vec<u8> {
    let mut content = target.as_bytes().to_vec();
    content.push(0);
    content.extend([0xab; 20]);
    content
}

/// Zlib data that unpacks to `times` times 16 MiB of zeros: an actual bomb, not only a false claim.
pub fn zlib_zeros(times: u32) -> Vec<u8> {
    use flate2::{Compress, Compression, FlushCompress, Status};
    let mut packer = Compress::new(Compression::best(), false);
    let mut piece = Vec::with_capacity(1 << 20);
    // A full flush ends at a byte boundary and resets the state, so the piece can be repeated.
    let status = packer
        .compress_vec(&vec![0; 16 << 20], &mut piece, FlushCompress::Full)
        .expect("zeros can be compressed");
    assert_eq!(status, Status::Ok);
    let mut packed = vec![0x78, 0xda];
    for _ in 0..times {
        packed.extend(&piece);
    }
    // An empty last block, and the checksum (Adler-32) of the zeros.
    packed.extend([0x03, 0x00]);
    let length = (u64::from(times) * (16 << 20) % 65521) as u16;
    packed.extend(length.to_be_bytes());
    packed.extend(1u16.to_be_bytes());
    packed
}

/// Zstandard data (RFC 8878) that unpacks to `times` times 128 KiB of zeros, in blocks of four bytes.
pub fn zstd_zeros(times: u32) -> Vec<u8> {
    let mut packed = vec![0x28, 0xb5, 0x2f, 0xfd];
    // A single segment, with the size of the content in eight bytes.
    packed.push(0b1110_0000);
    packed.extend((u64::from(times) << 17).to_le_bytes());
    for block in 1..=times {
        let run_length = 1 << 1;
        let header = u32::from(block == times) | run_length | (1 << 17) << 3;
        packed.extend(&header.to_le_bytes()[..3]);
        packed.push(0);
    }
    packed
}

/// An `.eh_frame` of `count` functions, each with the smallest possible entry.
pub fn many_entries(count: u32) -> Vec<u8> {
    let mut frame = common_entry();
    for index in 0..count {
        let start = frame.len() as u32;
        frame.extend(16u32.to_le_bytes());
        frame.extend((start + 4).to_le_bytes());
        // Start of the function, relative to this field, and its length. No augmentation, no instructions.
        frame.extend((index.wrapping_mul(16)).to_le_bytes());
        frame.extend(16u32.to_le_bytes());
        frame.extend([0; 4]);
    }
    frame.extend([0; 4]);
    frame
}

/// An `.eh_frame` whose entries refer to each other as their common entry (CIE).
pub fn circular_entries(count: u32) -> Vec<u8> {
    let mut frame = common_entry();
    for _ in 0..count {
        let start = frame.len() as u32;
        frame.extend(12u32.to_le_bytes());
        // Refers to the entry before, which is no CIE, or to itself.
        frame.extend((if start.is_multiple_of(32) { 4 } else { 20u32 }).to_le_bytes());
        frame.extend([0xff; 8]);
    }
    frame.extend([0; 4]);
    frame
}

/// A CIE: length, the CIE's mark, version 1, augmentation `zR`, code alignment 1, data alignment −8, return
/// address in register 16, pointers relative to themselves in four bytes, CFA = rsp + 8, return address at
/// CFA − 8.
fn common_entry() -> Vec<u8> {
    let mut entry = 20u32.to_le_bytes().to_vec();
    entry.extend([0; 4]);
    entry.extend([
        1, b'z', b'R', 0, 1, 0x78, 16, 1, 0x1b, 0x0c, 7, 8, 0x90, 1, 0, 0,
    ]);
    entry
}
