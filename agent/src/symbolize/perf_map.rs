//! Reads perf maps: the names that a just-in-time compiler gives to its code.
//!
//! A perf map consists of lines `START SIZE NAME`, with hexadecimal numbers without `0x` (Linux,
//! tools/perf/Documentation/jit-interface.txt). The file belongs to the process that is sampled, so it may
//! be half written, huge or forged. It is therefore read as a stream, of which only the needed names are
//! kept, and lines that cannot be parsed are skipped. It is not mapped, because the process could truncate
//! it, and SIGBUS would end the reader.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::NamedFunction;
use super::names::{Named, Stage, demangle};
use super::open::{self, OpenError};
use crate::file::OpenFile;
use crate::process::is_trusted_by;

/// Maximum number of bytes that are read of one perf map. A large Node.js or Java process writes some 20
/// MB.
pub const MAX_MAP_BYTES: u64 = 256 * 1024 * 1024;

/// Maximum number of bytes of a line. Longer lines are truncated.
pub const MAX_LINE_BYTES: usize = 4096;

/// Maximum total size of the names that one perf map provides, bytes. A hostile process could otherwise
/// have as many names of [`MAX_LINE_BYTES`] as addresses, a gigabyte in total.
const MAX_NAMES_BYTES: usize = 64 * 1024 * 1024;

/// Looks up sorted addresses in the perf map at `path`. If that is missing or not trustworthy, the map that
/// was `opened` while the process ran is used: by now the process may have ended, and its pid may belong to
/// another one. A missing map is not an error, because most processes write none.
pub(super) fn symbolize(
    pid: u32,
    path: &Path,
    opened: Option<&Arc<OpenFile>>,
    addresses: &[u64],
    report: &mut dyn FnMut(Stage<'_>),
) -> Named {
    let current = match (open(path), opened) {
        (Ok(file), Some(opened)) if !is_trusted_by(pid, &file) || !is_of_same(&file, opened) => {
            Ok(Some(Arc::clone(opened)))
        }
        (Ok(file), _) => is_own(pid, &file).map(|()| Some(Arc::new(OpenFile::new(file)))),
        (Err(_), Some(opened)) => Ok(Some(Arc::clone(opened))),
        (Err(OpenError::Missing), None) => Ok(None),
        (Err(error), None) => Err(error.to_string()),
    };
    let mut notes = Vec::new();
    let found = current.and_then(|file| match file {
        Some(file) => {
            if file.metadata().is_ok_and(|file| file.len() > MAX_MAP_BYTES) {
                let read = MAX_MAP_BYTES >> 20;
                notes.push(format!(
                    "perf map {}: only its first {read} MiB are read",
                    path.display()
                ));
            }
            report(Stage::Reading(&file));
            let reader = BufReader::new(FromStart::new(&file));
            find_in_perf_map(reader, addresses).map_err(|error| error.to_string())
        }
        None => Ok(Vec::new()),
    });
    match found {
        Ok(names) => Named {
            by_address: addresses
                .iter()
                .zip(names)
                .filter_map(|(address, name)| Some((*address, vec![named(&name?)])))
                .collect(),
            notes,
            ..Named::default()
        },
        Err(reason) => Named {
            notes: vec![format!("perf map {} not read: it {reason}", path.display())],
            ..Named::default()
        },
    }
}

/// Opens a regular file that is not a symbolic link. A path through a process's root cannot leave that
/// root.
fn open(path: &Path) -> Result<File, OpenError> {
    let through_root: Vec<_> = path.components().take(4).collect();
    if let [_, proc, _, root] = through_root[..]
        && proc.as_os_str() == "proc"
        && root.as_os_str() == "root"
    {
        let root: PathBuf = through_root.iter().collect();
        let below = path.strip_prefix(&root).unwrap_or(path);
        return open::regular_in_no_link(open::directory(&root)?, below);
    }
    open::regular_in_no_link(open::directory(Path::new("/"))?, path)
}

/// Whether two files belong to the same user.
fn is_of_same(one: &File, other: &File) -> bool {
    let owner = |file: &File| file.metadata().map(|file| file.uid()).ok();
    owner(one) == owner(other)
}

/// Refuses a map that belongs neither to the process's user nor to root: in `/tmp` any user may create a
/// file with this name.
fn is_own(pid: u32, file: &File) -> Result<(), String> {
    match is_trusted_by(pid, file) {
        true => Ok(()),
        false => Err("belongs to another user than the process".to_owned()),
    }
}

fn named(symbol: &str) -> NamedFunction {
    NamedFunction {
        name: demangle(symbol),
        system_name: symbol.to_owned(),
        file: String::new(),
        line: 0,
    }
}

/// Reads a shared file from its start, independently of its cursor, up to [`MAX_MAP_BYTES`].
struct FromStart<'a> {
    file: &'a File,
    offset: u64,
}

impl<'a> FromStart<'a> {
    fn new(file: &'a File) -> Self {
        FromStart { file, offset: 0 }
    }
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.offset >= MAX_MAP_BYTES {
            return Ok(0);
        }
        let count = self.file.read_at(buffer, self.offset)?;
        self.offset += count as u64;
        Ok(count)
    }
}

/// The names of the entries that cover `addresses` (sorted, ascending); `None` where no entry does.
///
/// Where entries overlap, the later line wins, because a compiler that reuses memory appends a line. The
/// memory used is proportional to the number of addresses, not to the size of the map.
///
/// # Errors
/// The reader fails, or the names take too much memory. (Whenever 64 MiB of names have been read, those
/// that later lines have not replaced are added up, and more than 32 MiB of them are an error.) Malformed
/// lines are not an error.
pub fn find_in_perf_map(
    mut reader: impl BufRead,
    addresses: &[u64],
) -> io::Result<Vec<Option<Arc<str>>>> {
    let mut names: Vec<Option<Arc<str>>> = vec![None; addresses.len()];
    let mut bytes = 0;
    let mut line = Vec::new();
    while next_line(&mut reader, &mut line)? {
        let Some((start, size, name)) = parse_line(&line) else {
            continue;
        };
        let end = start.saturating_add(size);
        let first = addresses.partition_point(|address| *address < start);
        let covered = addresses[first..].iter().take_while(|a| **a < end).count();
        if covered > 0 {
            let name: Arc<str> = String::from_utf8_lossy(name).into();
            bytes += name.len();
            names[first..first + covered].fill(Some(name));
            if bytes > MAX_NAMES_BYTES {
                // Names that later lines replaced no longer count.
                bytes = kept(&names);
                if bytes > MAX_NAMES_BYTES / 2 {
                    return Err(io::Error::other("has more names than fit into memory"));
                }
            }
        }
    }
    Ok(names)
}

/// Total size of all names, bytes. A name that neighbours share counts once.
fn kept(names: &[Option<Arc<str>>]) -> usize {
    let chunks = names.chunk_by(|a, b| match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    });
    let first = chunks.filter_map(|chunk| chunk.first()?.as_deref());
    first.map(str::len).sum()
}

/// Reads a line, keeping at most [`MAX_LINE_BYTES`] of it. Returns false at the end of the file.
fn next_line(reader: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let mut any = false;
    loop {
        let buffer = reader.fill_buf()?;
        if buffer.is_empty() {
            return Ok(any);
        }
        any = true;
        let newline = buffer.iter().position(|byte| *byte == b'\n');
        let piece = &buffer[..newline.unwrap_or(buffer.len())];
        let room = MAX_LINE_BYTES.saturating_sub(line.len());
        line.extend_from_slice(&piece[..piece.len().min(room)]);
        let used = piece.len() + usize::from(newline.is_some());
        reader.consume(used);
        if newline.is_some() {
            return Ok(true);
        }
    }
}

fn parse_line(line: &[u8]) -> Option<(u64, u64, &[u8])> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let (start, rest) = split_field(line)?;
    let (size, name) = split_field(rest)?;
    if name.is_empty() {
        return None;
    }
    Some((hexadecimal(start)?, hexadecimal(size)?, name))
}

fn split_field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let line = line.trim_ascii_start();
    let end = line.iter().position(|byte| *byte == b' ')?;
    Some((&line[..end], line[end..].trim_ascii_start()))
}

fn hexadecimal(field: &[u8]) -> Option<u64> {
    let digits = field.strip_prefix(b"0x").unwrap_or(field);
    // `from_str_radix` would accept a sign.
    if !digits.first()?.is_ascii_hexdigit() {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(map: &str, addresses: &[u64]) -> Vec<Option<Arc<str>>> {
        find_in_perf_map(map.as_bytes(), addresses).unwrap()
    }

    /// An entry names the addresses inside it and no others. Names may contain spaces.
    #[test]
    fn covers_exactly() {
        let names = find(
            "1000 10 first one\n1020 8 second\n",
            &[0xfff, 0x1000, 0x100f, 0x1010, 0x1027, 0x1028],
        );
        let names: Vec<_> = names.iter().map(Option::as_deref).collect();
        let first = Some("first one");
        assert_eq!(names, [None, first, first, None, Some("second"), None]);
    }

    /// A compiler that reuses memory appends a line, and the later line wins.
    #[test]
    fn the_last_entry_wins() {
        assert_eq!(
            find("1000 10 old\n1008 10 new\n", &[0x1004, 0x1009]),
            [Some("old".into()), Some("new".into())]
        );
    }

    /// Truncated lines, empty lines, signs, overflow and invalid UTF-8 are skipped or replaced, and the
    /// valid lines among them are found.
    #[test]
    fn hostile_lines() {
        let mut map = b"\n\n zz\n1000\n1000 \n1000 10\n+1000 10 sign\n-1 1 sign\n\
            fffffffffffffff0 ffffffffffffffff end of memory\n11111111111111111 1 too long\n\
            2000 0 empty\n3000 8 bad \xff\xfe\n0x4000 0x8 prefixed\r\n5000 8 half"
            .to_vec();
        map.extend(vec![b'x'; MAX_LINE_BYTES * 3]);
        let addresses = [0x1000, 0x2000, 0x3000, 0x4000, 0x5000, u64::MAX - 1];
        let names = find_in_perf_map(map.as_slice(), &addresses).unwrap();
        assert_eq!(names[0], None);
        assert_eq!(names[1], None);
        assert_eq!(names[2].as_deref(), Some("bad \u{fffd}\u{fffd}"));
        assert_eq!(names[3].as_deref(), Some("prefixed"));
        assert!(names[4].as_ref().unwrap().len() <= MAX_LINE_BYTES);
        assert_eq!(names[5].as_deref(), Some("end of memory"));
    }

    /// A FIFO does not block the reader, a link is not followed, and a missing map gives no note.
    #[test]
    fn only_regular_files() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        for path in [&fifo, &link, &dir.path().to_owned()] {
            let named = symbolize(1, path, None, &[0x1000], &mut |_| {});
            assert_eq!(named.notes.len(), 1, "{}", path.display());
            assert!(named.notes[0].contains(path.to_str().unwrap()));
        }
        let named = symbolize(1, &dir.path().join("none"), None, &[0x1000], &mut |_| {});
        assert!(named.notes.is_empty() && named.by_address.is_empty());
    }

    /// The map of a process that has ended is read from the file that was opened before, from its start.
    #[test]
    fn opened_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("perf-1.map");
        std::fs::write(&path, "1000 10 compiled\n").unwrap();
        let mut file = File::open(&path).unwrap();
        io::copy(&mut file, &mut io::sink()).unwrap();
        std::fs::remove_file(&path).unwrap();
        let named = symbolize(
            1,
            &path,
            Some(&Arc::new(OpenFile::new(file))),
            &[0x1001],
            &mut |_| {},
        );
        assert_eq!(named.by_address[&0x1001][0].name, "compiled");
    }
}
