//! The reader behind [`Object::parse`], over the `object` crate's ELF structures.

use super::{
    Error, MAX_BUILD_ID, MAX_CODE_SECTIONS, MAX_EXECUTABLE_SEGMENTS, Object, Section, Segment,
};
use ::object::LittleEndian;
use ::object::elf;
use ::object::read::elf::{FileHeader, ProgramHeader, SectionHeader, SectionTable, Sym};

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
    // A file without section headers, or with broken ones, still runs: go on without.
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
    let symbols = header
        .sections(LE, data)?
        .symbols(LE, data, elf::SHT_DYNSYM)?;
    for symbol in symbols.iter() {
        let name = symbol.name(LE, symbols.strings())?;
        let Some(index) = names.iter().position(|wanted| wanted.as_bytes() == name) else {
            continue;
        };
        if symbol.st_shndx(LE) == elf::SHN_UNDEF {
            continue;
        }
        let value = symbol.st_value(LE);
        values[index] = if symbol.st_type() == elf::STT_TLS {
            from_thread_pointer(headers, value)
        } else {
            Some(value)
        };
    }
    Ok(())
}

/// Where an executable's thread-local variable lies, seen from the thread pointer: its block ends there
/// (System V ABI, TLS variant II).
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
            // Addresses never wrap after this.
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

/// See [`Object::code`].
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

/// The bytes of a segment, unless the file's headers are among them.
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

/// A section by its name, if it is loaded and has bytes. (In a file of split debug information it
/// has none.)
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

/// The section that `.eh_frame_hdr` points to, up to its segment's end; `.eh_frame` tells its own
/// end by an entry of length zero.
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
