//! The checks that a file must pass before a symbol reader sees it.
//!
//! Any process on the machine may be sampled, so any file may be made to do harm. The header of a
//! compressed section claims how much memory the section needs, and a failed allocation ends the whole
//! process and not only the lookup. (Panics of the reader are caught where it is called.)

use std::fs::File;

use object::elf::FileHeader64;
use object::read::elf::{CompressionHeader, FileHeader, SectionHeader};
use object::{Endianness, ReadCache, ReadRef};

/// Maximum number of bytes that the compressed sections of one file may claim to unpack to, in total. The
/// debug information of the largest programs (browsers) is near 4 GiB, that of the kernel below 1 GiB.
pub(super) const MAX_UNPACKED: u64 = 4 << 30;

/// Maximum ratio of unpacked to packed size. Zlib reaches at most 1032:1, so a section that claims more is
/// forged. The same limit applies to other methods.
const MAX_RATIO: u64 = 1100;

/// Why a file's symbols are not read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    /// Not an ELF file for 64-bit machines.
    #[error("not a readable ELF file: {0}")]
    NotElf(String),
    /// The compressed sections claim to unpack to too many bytes.
    #[error("its compressed sections claim to unpack to {0} bytes, more than {MAX_UNPACKED}")]
    TooLarge(u64),
    /// A section claims a compression ratio that is impossible.
    #[error("a compressed section of {packed} bytes claims to unpack to {claimed}")]
    Impossible {
        /// Bytes in the file.
        packed: u64,
        /// Bytes that it claims to unpack to.
        claimed: u64,
    },
}

/// Checks the section headers. Only a few KiB are read.
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

    /// An ordinary program, this test, passes.
    #[test]
    fn ordinary_programs_pass() {
        let file = File::open(std::env::current_exe().unwrap()).unwrap();
        assert_eq!(check(&file), Ok(()));
    }
}
