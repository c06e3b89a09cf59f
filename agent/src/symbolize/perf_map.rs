//! Perf maps: the names that a just-in-time compiler gives to its code.
//!
//! Lines of `START SIZE NAME`, hexadecimal without `0x` (Linux,
//! tools/perf/Documentation/jit-interface.txt). The file belongs to the process that is looked at:
//! it may be half written, huge, or made to deceive. It is therefore read (not mapped: the process
//! could cut it and kill the reader by SIGBUS), in a stream, keeping only what was asked for, and a
//! line that makes no sense is passed over.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use super::Resolved;
use super::elf::{Named, demangle};

/// Bytes read of one perf map. A large Node.js or Java process writes some 20 MB.
pub const MAX_MAP_BYTES: u64 = 256 * 1024 * 1024;

/// Bytes of one line that are looked at; what is longer keeps its beginning.
pub const MAX_LINE_BYTES: usize = 4096;

/// Why a perf map could not be read.
#[derive(Debug, thiserror::Error)]
pub enum PerfMapError {
    /// It could not be opened or read.
    #[error("{path}: {source}")]
    Io {
        /// The map.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is a device, a directory, a FIFO ….
    #[error("{path} is not a regular file")]
    NotAFile {
        /// The map.
        path: PathBuf,
    },
}

/// Names of addresses (sorted) by the perf map at `path`, or by `opened` where the path leads
/// nowhere any more. A missing map is no error: most processes write none.
pub(super) fn symbolize(path: &Path, opened: Option<&Arc<File>>, addresses: &[u64]) -> Named {
    let result = match open(path) {
        Ok(Some(file)) => find_in_perf_map(BufReader::new(file.take(MAX_MAP_BYTES)), addresses)
            .map_err(|source| PerfMapError::Io {
                path: path.to_owned(),
                source,
            }),
        Ok(None) => match opened {
            Some(file) => find_in_perf_map(BufReader::new(FromStart::new(file)), addresses)
                .map_err(|source| PerfMapError::Io {
                    path: path.to_owned(),
                    source,
                }),
            None => return Named::default(),
        },
        Err(error) => Err(error),
    };
    match result {
        Ok(names) => Named {
            by_address: addresses
                .iter()
                .zip(names)
                .filter_map(|(address, name)| Some((*address, vec![named(&name?)])))
                .collect(),
            notes: Vec::new(),
        },
        Err(error) => Named {
            notes: vec![error.to_string()],
            ..Named::default()
        },
    }
}

fn named(symbol: &str) -> Resolved {
    Resolved {
        name: demangle(symbol),
        system_name: symbol.to_owned(),
        file: String::new(),
        line: 0,
    }
}

/// Opens a regular file without following a link at its end and without waiting for a FIFO.
fn open(path: &Path) -> Result<Option<File>, PerfMapError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::SRCH) => return Ok(None),
        Err(errno) => {
            return Err(PerfMapError::Io {
                path: path.to_owned(),
                source: errno.into(),
            });
        }
    };
    let metadata = file.metadata().map_err(|source| PerfMapError::Io {
        path: path.to_owned(),
        source,
    })?;
    if metadata.mode() & 0o170_000 != 0o100_000 {
        return Err(PerfMapError::NotAFile {
            path: path.to_owned(),
        });
    }
    Ok(Some(file))
}

/// Reads a shared file from its start, whatever its cursor is.
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

/// The name that covers each of `addresses` (sorted, ascending), `None` where none does.
///
/// Where entries overlap the later line wins: a compiler that uses memory again appends. Memory is
/// proportional to the addresses, not to the map.
///
/// # Errors
/// Those of the reader; hostile content is no error.
pub fn find_in_perf_map(
    mut reader: impl BufRead,
    addresses: &[u64],
) -> io::Result<Vec<Option<String>>> {
    let mut names = vec![None; addresses.len()];
    let mut line = Vec::new();
    while next_line(&mut reader, &mut line)? {
        let Some((start, size, name)) = parse_line(&line) else {
            continue;
        };
        let end = start.saturating_add(size);
        let first = addresses.partition_point(|address| *address < start);
        let covered = addresses[first..].iter().take_while(|a| **a < end).count();
        if covered > 0 {
            let name = String::from_utf8_lossy(name).into_owned();
            names[first..first + covered].fill(Some(name));
        }
    }
    Ok(names)
}

/// Reads up to the next newline, keeping at most [`MAX_LINE_BYTES`]. False at the end.
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
    // `from_str_radix` would take a sign.
    if !digits.first()?.is_ascii_hexdigit() {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(map: &str, addresses: &[u64]) -> Vec<Option<String>> {
        find_in_perf_map(map.as_bytes(), addresses).unwrap()
    }

    /// An entry names the addresses inside it and none outside, spaces and all.
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

    /// A compiler that uses memory again appends: the later line wins.
    #[test]
    fn the_last_entry_wins() {
        assert_eq!(
            find("1000 10 old\n1008 10 new\n", &[0x1004, 0x1009]),
            [Some("old".to_owned()), Some("new".to_owned())]
        );
    }

    /// Half a line, no line, signs, overflow, bytes that are no UTF-8: passed over, the good line
    /// among them is found.
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

    /// A FIFO does not make the reader wait, a link is not followed, a missing map is no news.
    #[test]
    fn only_regular_files() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::RUSR).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        for path in [&fifo, &link, &dir.path().to_owned()] {
            let named = symbolize(path, None, &[0x1000]);
            assert_eq!(named.notes.len(), 1, "{}", path.display());
            assert!(named.notes[0].contains(path.to_str().unwrap()));
        }
        let named = symbolize(&dir.path().join("none"), None, &[0x1000]);
        assert!(named.notes.is_empty() && named.by_address.is_empty());
    }

    /// The map of a process that has gone is read from the file opened before, from its start.
    #[test]
    fn opened_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("perf-1.map");
        std::fs::write(&path, "1000 10 compiled\n").unwrap();
        let mut file = File::open(&path).unwrap();
        io::copy(&mut file, &mut io::sink()).unwrap();
        std::fs::remove_file(&path).unwrap();
        let named = symbolize(&path, Some(&Arc::new(file)), &[0x1001]);
        assert_eq!(named.by_address[&0x1001][0].name, "compiled");
    }
}
