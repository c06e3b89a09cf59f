//! Implements [`Object::parse`] with the ELF structures of the crate `object`.

use super::{
    Error, MAX_BUILD_ID, MAX_CODE_SECTIONS, MAX_EXECUTABLE_SEGMENTS, Object, Section, Segment,
};
use ::object::LittleEndian;
use ::object::elf;
use ::object::read::elf::{
    FileHeader, GnuHashTable, ProgramHeader, SectionHeader, SectionTable, Sym, VersionTable,
};

type Header = elf::FileHeader64<LittleEndian>;
type Headers<'data> = &'data [elf::ProgramHeader64<LittleEndian>];

const LE: LittleEndian = LittleEndian;

pub(super) fn parse(data: &[u8]) -> Result<Object<'_>, Error> {
    let header = Header::parse(data)?;
    header.endian()?;
    let machine = header.e_machine(LE);
    if machine != elf::EM_X86_64 {
        return Err(Error::Machine(machine.0));
    }
    let headers = header.program_headers(LE, data)?;
    let segments = executable_segments(headers, data)?;
    // A file whose section headers are missing or broken still runs, so they are optional.
    let sections = header.sections(LE, data).unwrap_or_default();
    let eh_frame_hdr = headers
        .iter()
        .find(|h| h.p_type(LE) == elf::PT_GNU_EH_FRAME)
        .and_then(|h| section_of(h, data));
    let eh_frame =
        named(&sections, data, b".eh_frame").or_else(|| behind(eh_frame_hdr?, headers, data));
    Ok(Object {
        code: code(&segments, &sections, data),
        segments,
        eh_frame,
        eh_frame_hdr,
        entry: header.e_entry(LE),
        build_id: build_id(headers, &sections, data),
    })
}

pub(super) fn exported<const N: usize>(data: &[u8], names: [&str; N]) -> [Option<u64>; N] {
    let mut values = [None; N];
    let _ = look_for(data, &names, &mut values);
    values
}

fn look_for(data: &[u8], names: &[&str], values: &mut [Option<u64>]) -> Result<(), Error> {
    let header = Header::parse(data)?;
    let headers = header.program_headers(LE, data)?;
    let sections = header.sections(LE, data)?;
    let symbols = sections.symbols(LE, data, elf::SHT_DYNSYM)?;
    let table = hash_table(&sections, data);
    let find = |name: &[u8]| match &table {
        // This reads a few pages of the file, whereas the symbol table of a large library is megabytes.
        Some(table) => {
            let versions = VersionTable::default();
            let found = table.find(LE, name, elf::gnu_hash(name), None, &symbols, &versions);
            found.map(|(_, symbol)| symbol)
        }
        None => symbols.iter().find(|symbol| {
            symbol.st_shndx(LE) != elf::SHN_UNDEF && symbol.name(LE, symbols.strings()) == Ok(name)
        }),
    };
    for (name, value) in names.iter().zip(values) {
        *value = find(name.as_bytes()).and_then(|symbol| match symbol.st_type() {
            elf::STT_TLS => from_thread_pointer(headers, symbol.st_value(LE)),
            _ => Some(symbol.st_value(LE)),
        });
    }
    Ok(())
}

/// The GNU hash table, by which the dynamic linker finds exported symbols; `None` if it is missing or malformed.
fn hash_table<'data>(
    sections: &SectionTable<'data, Header>,
    data: &'data [u8],
) -> Option<GnuHashTable<'data, Header>> {
    let header = sections.gnu_hash_header(LE, data).ok()??;
    // `GnuHashTable` relies on both without checking them.
    let sound =
        header.bloom_shift.get(LE) < u32::BITS && header.bloom_count.get(LE).is_power_of_two();
    let (table, _) = sections.gnu_hash(LE, data).ok()??;
    sound.then_some(table)
}

/// Offset of an executable's thread-local variable from the thread pointer, which is where its TLS block
/// ends (System V ABI, TLS variant II). `None` if the file is not a dynamically linked executable.
fn from_thread_pointer(headers: Headers<'_>, value: u64) -> Option<u64> {
    headers.iter().find(|h| h.p_type(LE) == elf::PT_INTERP)?;
    let block = headers.iter().find(|h| h.p_type(LE) == elf::PT_TLS)?;
    let size = block
        .p_memsz(LE)
        .checked_next_multiple_of(block.p_align(LE).max(1))?;
    Some(value.wrapping_sub(size))
}

fn executable_segments(headers: Headers<'_>, data: &[u8]) -> Result<Vec<Segment>, Error> {
    let mut segments: Vec<Segment> = headers
        .iter()
        .filter(|h| h.p_type(LE) == elf::PT_LOAD && h.p_flags(LE).contains(elf::PF_X))
        .filter_map(|h| {
            let available = (data.len() as u64).saturating_sub(h.p_offset(LE));
            let segment = Segment {
                file_offset: h.p_offset(LE),
                svma: h.p_vaddr(LE),
                size: h.p_filesz(LE).min(available),
            };
            // From here on `svma + size` cannot overflow.
            let fits = segment.svma.checked_add(segment.size).is_some();
            (fits && segment.size > 0).then_some(segment)
        })
        .take(MAX_EXECUTABLE_SEGMENTS + 1)
        .collect();
    if segments.len() > MAX_EXECUTABLE_SEGMENTS {
        return Err(Error::TooManySegments);
    }
    segments.sort_by_key(|s| (s.svma, s.size));
    let start = segments.first().ok_or(Error::NoText)?.svma;
    let end = segments.iter().map(|s| s.svma + s.size).max();
    let span = end.ok_or(Error::NoText)? - start;
    if span > u64::from(u32::MAX) {
        return Err(Error::TextSpan(span));
    }
    Ok(segments)
}

/// The value of [`Object::code`].
fn code<'data>(
    segments: &[Segment],
    sections: &SectionTable<'data, Header>,
    data: &'data [u8],
) -> Vec<Section<'data>> {
    let mut code: Vec<Section<'_>> = if sections.is_empty() {
        segments.iter().filter_map(|s| bytes_of(s, data)).collect()
    } else {
        let executable = sections
            .iter()
            .filter(|s| s.sh_flags(LE).contains(elf::SHF_ALLOC | elf::SHF_EXECINSTR));
        let bytes = executable.filter_map(|s| {
            let svma = s.sh_addr(LE);
            let data = s.data(LE, data).ok().filter(|data| !data.is_empty())?;
            let fits = svma.checked_add(data.len() as u64).is_some();
            fits.then_some(Section { svma, data })
        });
        bytes.take(MAX_CODE_SECTIONS + 1).collect()
    };
    code.sort_by_key(|section| section.svma);
    let apart = code
        .windows(2)
        .all(|pair| pair[0].svma + pair[0].data.len() as u64 <= pair[1].svma);
    if code.len() > MAX_CODE_SECTIONS || !apart {
        return Vec::new();
    }
    code
}

/// The bytes of a segment; `None` if the file's headers are among them.
fn bytes_of<'data>(segment: &Segment, data: &'data [u8]) -> Option<Section<'data>> {
    let start = usize::try_from(segment.file_offset).ok()?;
    let size = usize::try_from(segment.size).ok()?;
    let data = data.get(start..start.checked_add(size)?)?;
    (start > 0).then_some(Section {
        svma: segment.svma,
        data,
    })
}

fn section_of<'data>(
    header: &elf::ProgramHeader64<LittleEndian>,
    data: &'data [u8],
) -> Option<Section<'data>> {
    Some(Section {
        svma: header.p_vaddr(LE),
        data: header.data(LE, data).ok()?,
    })
}

/// A section by its name, if it is loaded and not empty. (It is empty in a file of split debug information.)
fn named<'data>(
    sections: &SectionTable<'data, Header>,
    data: &'data [u8],
    name: &[u8],
) -> Option<Section<'data>> {
    let (_, section) = sections.section_by_name(LE, name)?;
    let bytes = section.data(LE, data).ok()?;
    let loaded = section.sh_flags(LE).contains(elf::SHF_ALLOC);
    (loaded && !bytes.is_empty()).then_some(Section {
        svma: section.sh_addr(LE),
        data: bytes,
    })
}

/// The section that `.eh_frame_hdr` points to, up to the end of its segment. `.eh_frame` marks
/// its own end by an entry of length zero.
fn behind<'data>(
    hdr: Section<'data>,
    headers: Headers<'data>,
    data: &'data [u8],
) -> Option<Section<'data>> {
    let bases = gimli::BaseAddresses::default().set_eh_frame_hdr(hdr.svma);
    let parsed = gimli::EhFrameHdr::new(hdr.data, gimli::LittleEndian)
        .parse(&bases, 8)
        .ok()?;
    let svma = parsed.eh_frame_ptr().direct().ok()?;
    headers
        .iter()
        .filter(|h| h.p_type(LE) == elf::PT_LOAD)
        .filter_map(|h| section_of(h, data))
        .find_map(|segment| {
            let skip = usize::try_from(svma.checked_sub(segment.svma)?).ok()?;
            let data = segment.data.get(skip..)?;
            (!data.is_empty()).then_some(Section { svma, data })
        })
}

fn build_id<'data>(
    headers: Headers<'data>,
    sections: &SectionTable<'data, Header>,
    data: &'data [u8],
) -> Option<&'data [u8]> {
    let from_segments = headers
        .iter()
        .filter_map(|h| h.notes(LE, data).ok().flatten());
    let from_sections = sections
        .iter()
        .filter_map(|s| s.notes(LE, data).ok().flatten());
    from_segments.chain(from_sections).find_map(|mut notes| {
        while let Ok(Some(note)) = notes.next() {
            let id = note.desc();
            if note.name() == elf::ELF_NOTE_GNU
                && note.n_type(LE) == elf::NT_GNU_BUILD_ID
                && (1..=MAX_BUILD_ID).contains(&id.len())
            {
                return Some(id);
            }
        }
        None
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lookup by the hash table and a scan of all symbols give the same values. A name that
    /// is only imported, or does not exist, has none.
    #[test]
    fn exported_symbols() {
        let libraries = std::fs::read_to_string("/proc/self/maps").unwrap();
        let libc = libraries
            .lines()
            .find_map(|line| {
                line.split_whitespace()
                    .nth(5)
                    .filter(|name| name.contains("/libc."))
            })
            .expect("this test is linked dynamically");
        let data = std::fs::read(libc).unwrap();
        let names = ["malloc", "qsort", "__tls_get_addr", "no_such_function"];
        let by_hash = exported(&data, names);
        assert!(by_hash[0].is_some() && by_hash[1].is_some() && by_hash[0] != by_hash[1]);
        assert_eq!(by_hash[2..], [None, None]);
        let header = Header::parse(&*data).unwrap();
        let sections = header.sections(LE, &*data).unwrap();
        let is_table = |s: &&elf::SectionHeader64<LittleEndian>| s.sh_type(LE) == elf::SHT_GNU_HASH;
        let index = sections.iter().position(|s| is_table(&s)).unwrap();
        let size = usize::from(header.e_shentsize(LE));
        // The type is the second 32-bit word of a section header.
        let at = header.e_shoff(LE) as usize + index * size + 4;
        let mut without = data.clone();
        without[at..at + 4].copy_from_slice(&elf::SHT_NULL.0.to_le_bytes());
        assert_eq!(exported(&without, names), by_hash);
    }
}
