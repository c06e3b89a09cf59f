//! Finds separate debug files by build id or debug link, and checks them before they are read.
//!
//! blazesym follows debug links by itself and opens whatever they name. It is therefore only given files
//! without such links ([`may_read_debug_info`]), and the debug file that was found here is given to it as
//! another file.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use object::elf::{FileHeader64, NT_GNU_BUILD_ID};
use object::read::elf::{FileHeader, SectionHeader};
use object::{Endianness, ReadCache};

use super::open::{self, OpenError, own_path};
use super::{Options, guard};

/// Maximum size of a debug file, bytes. The debug information of a browser is near 4 GiB.
const MAX_DEBUG_FILE: u64 = 8 << 30;

/// Maximum size of a link section, bytes. It contains a path and a checksum or a build id.
const MAX_LINK: u64 = 8192;

/// The debug file that was found, or the reason why a candidate was not accepted.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub file: Option<File>,
    pub note: Option<String>,
}

/// The file of a module, and what leads to its debug file.
pub(super) struct Origin<'a> {
    pub file: &'a File,
    pub build_id: Option<&'a [u8]>,
    /// The directory of debug files of its container, if it is in one.
    pub container: Option<&'a File>,
}

/// The links that a file contains, and its build id.
#[derive(Debug, Default, PartialEq, Eq)]
struct Links {
    /// Name and checksum in `.gnu_debuglink`; `None` if there is no such section, `Some(None)` if it cannot
    /// be parsed.
    debug: Option<Option<(Vec<u8>, u32)>>,
    /// Path and build id in `.gnu_debugaltlink`, likewise.
    alternate: Option<Option<(Vec<u8>, Vec<u8>)>>,
    /// Whether there is a `.debug_sup`.
    supplement: bool,
    build_id: Option<Vec<u8>>,
}

/// Looks for the debug file of a module: by build id in the agent's debug directories and in its container's,
/// then by debug link beside the file and in those directories.
pub(super) fn find(origin: &Origin<'_>, options: &Options<'_>) -> Found {
    let mut found = Found::default();
    let by_id = origin.build_id.and_then(debug_file_name);
    let links = links(origin.file).unwrap_or_default();
    let link = match &links.debug {
        Some(Some((name, crc))) => Some((Path::new(OsStr::from_bytes(name)), *crc)),
        Some(None) => {
            found.note = Some("its debug link is malformed".to_owned());
            None
        }
        None => None,
    };
    if let Some(name) = by_id {
        for candidate in in_directories(&name, origin, options) {
            // No checksum is passed, so only the build id decides.
            found.try_candidate(&name, candidate, origin.build_id, None);
        }
    }
    let Some((name, crc)) = link else {
        return found;
    };
    if name.components().count() != 1 || name.file_name().is_none() {
        found.refuse(name, "is a path, but only a plain file name is allowed");
        return found;
    }
    let place = std::fs::read_link(own_path(origin.file)).unwrap_or_default();
    let place = place.parent().unwrap_or(Path::new("/"));
    for beside in [place.join(name), place.join(".debug").join(name)] {
        if found.file.is_none() {
            found.try_candidate(name, open::regular(&beside), origin.build_id, Some(crc));
        }
    }
    let place = place.strip_prefix("/").unwrap_or(place);
    for below in [PathBuf::from(name), place.join(name)] {
        for candidate in in_directories(&below, origin, options) {
            found.try_candidate(name, candidate, origin.build_id, Some(crc));
        }
    }
    found
}

/// The files with this name in the agent's directories of debug files and in the container's.
fn in_directories(
    name: &Path,
    origin: &Origin<'_>,
    options: &Options<'_>,
) -> impl Iterator<Item = Result<File, OpenError>> {
    let own = options.debug_dirs.iter();
    let own: Vec<_> = own.map(|dir| open::regular(&dir.join(name))).collect();
    let container = origin.container.map(|dir| open::regular_in(dir, name));
    own.into_iter().chain(container)
}

impl Found {
    fn try_candidate(
        &mut self,
        name: &Path,
        candidate: Result<File, OpenError>,
        build_id: Option<&[u8]>,
        crc: Option<u32>,
    ) {
        if self.file.is_some() {
            return;
        }
        let checked = match candidate {
            Err(OpenError::Missing) => return,
            Err(error) => Err(error.to_string()),
            Ok(file) => check(&file, build_id, crc).map(|()| file),
        };
        match checked {
            Ok(file) => {
                self.file = Some(file);
                self.note = None;
            }
            Err(reason) => self.refuse(name, &reason),
        }
    }

    /// The first refusal is the one that is reported.
    fn refuse(&mut self, name: &Path, reason: &str) {
        let note = || format!("debug file {} not read: it {reason}", name.display());
        self.note.get_or_insert_with(note);
    }
}

/// Checks that a debug file belongs to the module: by build id if both have one, else by checksum.
fn check(file: &File, build_id: Option<&[u8]>, crc: Option<u32>) -> Result<(), String> {
    let size = file.metadata().map_err(|error| error.to_string())?.len();
    if size > MAX_DEBUG_FILE {
        return Err(format!("is larger than {MAX_DEBUG_FILE} bytes"));
    }
    guard::check(file).map_err(|refused| format!("is refused: {refused}"))?;
    let own = links(file).and_then(|links| links.build_id);
    match (build_id, own, crc) {
        (Some(wanted), Some(own), _) if wanted == own => Ok(()),
        (Some(_), Some(_), _) => Err("has another build id".to_owned()),
        (_, _, Some(wanted)) => {
            let crc = checksum(file).map_err(|error| format!("cannot be read: {error}"))?;
            let equal = crc == wanted;
            equal
                .then_some(())
                .ok_or_else(|| "has another checksum than the link says".to_owned())
        }
        (_, _, None) => Err("has no build id".to_owned()),
    }
}

/// CRC-32 of a file, as debug links contain it.
fn checksum(file: &File) -> io::Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 18];
    let mut offset = 0;
    loop {
        match file.read_at(&mut buffer, offset)? {
            0 => return Ok(hasher.finalize()),
            read => {
                hasher.update(&buffer[..read]);
                offset += read as u64;
            }
        }
    }
}

/// Whether blazesym may read a file's debug information. It then follows the file's links, so there must be
/// none, or only one to an alternate file that passes the checks at every place where blazesym looks.
///
/// # Errors
/// The reason why an alternate file is refused.
pub(super) fn may_read_debug_info(file: &File, options: &Options<'_>) -> Result<bool, String> {
    let Some(links) = links(file) else {
        return Ok(false);
    };
    if links.debug.is_some() || links.supplement {
        return Ok(false);
    }
    match links.alternate {
        None => Ok(true),
        Some(None) => Err("its link to an alternate debug file is broken".to_owned()),
        Some(Some((path, build_id))) => {
            let path = Path::new(OsStr::from_bytes(&path));
            let place = std::fs::read_link(own_path(file)).unwrap_or_default();
            let mut candidates = alternates(path, &place, &build_id, &options.debug_dirs);
            candidates.try_for_each(|candidate| {
                let checked = match open::regular(&candidate) {
                    Err(OpenError::Missing) => Ok(()),
                    Err(error) => Err(error.to_string()),
                    Ok(file) => check(&file, Some(&build_id), None).map_err(|why| why.to_string()),
                };
                let name = candidate.display();
                checked.map_err(|why| format!("alternate debug file {name} not read: it {why}"))
            })?;
            Ok(true)
        }
    }
}

/// Every path at which blazesym looks for an alternate file.
fn alternates<'a>(
    path: &'a Path,
    place: &'a Path,
    build_id: &[u8],
    dirs: &'a [PathBuf],
) -> impl Iterator<Item = PathBuf> + 'a {
    let by_id = debug_file_name(build_id);
    let by_id = by_id.map(|name| dirs.iter().map(move |dir| dir.join(&name)));
    let fixed = dirs.iter().map(move |dir| dir.join(path));
    let parents = place.ancestors().skip(1);
    let below = parents.flat_map(move |parent| {
        let relative = parent.strip_prefix("/").unwrap_or(parent);
        dirs.iter().map(move |dir| dir.join(relative).join(path))
    });
    let beside = place.with_file_name("").join(path);
    by_id
        .into_iter()
        .flatten()
        .chain(fixed)
        .chain([beside])
        .chain(below)
}

/// The links of a file; `None` if it is not a readable ELF file.
fn links(file: &File) -> Option<Links> {
    let cache = ReadCache::new(file);
    let data = &cache;
    let header = FileHeader64::<Endianness>::parse(data).ok()?;
    let endian = header.endian().ok()?;
    let sections = header.sections(endian, data).ok()?;
    let mut links = Links::default();
    for section in sections.iter() {
        let small = section.sh_size(endian) <= MAX_LINK;
        let content = || {
            let bytes = small.then(|| section.data(endian, data).ok()).flatten()?;
            Some(bytes.to_vec())
        };
        match sections.section_name(endian, section).unwrap_or_default() {
            b".gnu_debuglink" => links.debug = Some(content().and_then(|data| debug_link(&data))),
            b".gnu_debugaltlink" => {
                links.alternate = Some(content().and_then(|data| alternate_link(&data)));
            }
            b".debug_sup" => links.supplement = true,
            _ => {}
        }
        if small && let Ok(Some(mut notes)) = section.notes(endian, data) {
            while let Ok(Some(note)) = notes.next() {
                if note.name() == b"GNU" && note.n_type(endian) == NT_GNU_BUILD_ID {
                    links.build_id = Some(note.desc().to_vec());
                }
            }
        }
    }
    Some(links)
}

/// Parses a debug link: a name, NUL, padding to four bytes, the checksum.
fn debug_link(data: &[u8]) -> Option<(Vec<u8>, u32)> {
    let end = data.iter().position(|byte| *byte == 0)?;
    let crc = data.get((end + 1).next_multiple_of(4)..)?.first_chunk()?;
    (end > 0).then(|| (data[..end].to_vec(), u32::from_le_bytes(*crc)))
}

/// Parses a link to an alternate file: a path, NUL, the build id.
fn alternate_link(data: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let end = data.iter().position(|byte| *byte == 0)?;
    Some((data[..end].to_vec(), data[end + 1..].to_vec()))
}

/// The path of a debug file by build id, `.build-id/ab/cdef….debug` (GDB's manual, "Separate Debug Files").
fn debug_file_name(build_id: &[u8]) -> Option<PathBuf> {
    let (first, rest) = build_id.split_first()?;
    if rest.is_empty() {
        return None;
    }
    let rest: String = rest.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(PathBuf::from(format!(".build-id/{first:02x}/{rest}.debug")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_files_are_named_by_build_id() {
        assert_eq!(
            debug_file_name(&[0xab, 0xcd, 0x01]),
            Some(PathBuf::from(".build-id/ab/cd01.debug"))
        );
        assert_eq!(debug_file_name(&[0xab]), None);
    }

    #[test]
    fn links_are_parsed() {
        let link = debug_link(b"a.debug\0\x01\0\0\0");
        assert_eq!(link, Some((b"a.debug".to_vec(), 1)));
        for broken in [&b"a.debug"[..], b"a\0\0\0\x01", b"\0\0\0\0\0\0\0\0", b""] {
            assert_eq!(debug_link(broken), None);
        }
        let alternate = alternate_link(b"/x\0\x01\x02");
        assert_eq!(alternate, Some((b"/x".to_vec(), vec![1, 2])));
    }
}
