//! What is refused before a symbol reader sees it.
//!
//! Any process on the machine may be sampled, so any file may be a trap. A compressed section says
//! itself how much memory it wants, and a failed allocation ends the whole agent, not only the
//! lookup. (Panics of the reader are caught where it is called.)

use std::fs::File;

use object::elf::FileHeader64;
use object::read::elf::{CompressionHeader, FileHeader, SectionHeader};
use object::{Endianness, ReadCache, ReadRef};

/// Most bytes that the compressed sections of one file may unpack to. The debug information of the
/// largest programs (browsers) is near 4 GiB, that of the kernel below 1 GiB.
pub(super) const MAX_UNPACKED: u64 = 4 << 30;

/// Zlib cannot do better than this (1:1032), so what claims more lies.
const MAX_RATIO: u64 = 1100;

/// Why a file's symbols are not read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    /// Not an ELF file for 64-bit machines.
    #[error("no readable ELF file: {0}")]
    NotElf(String),
    /// Compressed sections that would unpack to too much.
    #[error("its compressed sections claim to unpack to {0} bytes, more than {MAX_UNPACKED}")]
    TooLarge(u64),
    /// A section that claims what no compression can do.
    #[error("a compressed section of {packed} bytes claims to unpack to {claimed}")]
    Impossible {
        /// Bytes in the file.
        packed: u64,
        /// Bytes it claims.
        claimed: u64,
    },
}

/// Looks at the section headers only; reads a few KiB.
pub(super) fn check(file: &File) -> Result<(), Refused> {
    let cache = ReadCache::new(file);
    check_data(&cache)
}

fn check_data<'data>(data: impl ReadRef<'data>) -> Result<(), Refused> {
    let not_elf = |error: object::read::Error| Refused::NotElf(error.to_string());
    let header = FileHeader64::<Endianness>::parse(data).map_err(not_elf)?;
    let endian = header.endian().map_err(not_elf)?;
    let sections = header.section_headers(endian, data).map_err(not_elf)?;
    let mut total: u64 = 0;
    for section in sections {
        let compressed = section.compression(endian, data).map_err(not_elf)?;
        let Some((header, _, packed)) = compressed else {
            continue;
        };
        let claimed = header.ch_size(endian);
        if claimed > packed.saturating_mul(MAX_RATIO) + 4096 {
            return Err(Refused::Impossible { packed, claimed });
        }
        total = total.saturating_add(claimed);
    }
    if total > MAX_UNPACKED {
        return Err(Refused::TooLarge(total));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF header, one compressed section that claims `claimed` bytes, and its header.
    fn elf(claimed: u64) -> Vec<u8> {
        let mut file = vec![0u8; 64 + 2 * 64 + 24];
        file[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0");
        file[20] = 1;
        file[0x28..0x30].copy_from_slice(&64u64.to_le_bytes());
        file[0x34..0x36].copy_from_slice(&64u16.to_le_bytes());
        file[0x3a..0x3c].copy_from_slice(&64u16.to_le_bytes());
        file[0x3c..0x3e].copy_from_slice(&2u16.to_le_bytes());
        let section = 128;
        file[section + 4] = 1; // SHT_PROGBITS
        file[section + 8..section + 16].copy_from_slice(&0x800u64.to_le_bytes());
        file[section + 0x18..section + 0x20].copy_from_slice(&192u64.to_le_bytes());
        file[section + 0x20..section + 0x28].copy_from_slice(&24u64.to_le_bytes());
        file[192] = 1; // ELFCOMPRESS_ZLIB
        file[200..208].copy_from_slice(&claimed.to_le_bytes());
        file
    }

    #[test]
    fn claims_are_checked() {
        assert_eq!(check_data(elf(4000).as_slice()), Ok(()));
        assert!(matches!(
            check_data(elf(1 << 50).as_slice()),
            Err(Refused::Impossible { claimed, .. }) if claimed == 1 << 50
        ));
        assert!(matches!(
            check_data(b"no elf".as_slice()),
            Err(Refused::NotElf(_))
        ));
    }

    /// This very program is no trap.
    #[test]
    fn ordinary_programs_pass() {
        let file = File::open(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(check(&file), Ok(()));
    }
}
