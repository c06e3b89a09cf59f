//! Copies of files that may soon be overwritten.
//!
//! Functions are named when a recording has ended. A program that is being developed or deployed
//! may have been overwritten in place by then (`cp`), and its old contents exist nowhere else. A
//! program that was changed recently is therefore copied when it is first mapped, within bounds.
//! The files of packages need no copy: they are old, and are replaced rather than overwritten.

use std::{
    fs::File,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use super::{FileVersion, OpenFile};

/// A file is copied only if it was changed within this time, seconds.
const YOUNG: i64 = 3600;

/// Largest file that is copied, bytes. The copy is made while a sample waits for its stack.
const MAX_FILE: u64 = 32 << 20;

/// Maximum size of all copies together, bytes. The copies are files without a name in the
/// directory for temporary files.
const MAX_BYTES: u64 = 128 << 20;

/// Counts the bytes of all snapshots, which are limited.
#[derive(Debug, Default)]
pub struct SnapshotRoom {
    used: AtomicU64,
}

/// A copy of a file.
#[derive(Debug)]
pub struct Snapshot {
    /// The copy. It has no name, and is deleted when it is closed.
    pub file: Arc<OpenFile>,
    bytes: u64,
    room: Arc<SnapshotRoom>,
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        self.room.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl SnapshotRoom {
    /// Copies a file of this version, if it may soon be overwritten and there is room. Failures
    /// are not reported: without a copy, the file's functions have no names if it is
    /// overwritten, and there are no other consequences.
    pub fn take(self: &Arc<Self>, file: &File, version: FileVersion) -> Option<Snapshot> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
        let is_young = version.changed.0.saturating_add(YOUNG) > i64::try_from(now).ok()?;
        if !is_young || version.size > MAX_FILE {
            return None;
        }
        let before = self.used.fetch_add(version.size, Ordering::Relaxed);
        let snapshot = |file| Snapshot {
            file: Arc::new(OpenFile::known(file, true)),
            bytes: version.size,
            room: Arc::clone(self),
        };
        if before + version.size > MAX_BYTES {
            self.used.fetch_sub(version.size, Ordering::Relaxed);
            return None;
        }
        match copy(file, version.size) {
            // The file was written while it was copied.
            Ok(copied) if FileVersion::of(file).ok() != Some(version) => {
                drop(snapshot(copied));
                None
            }
            Ok(copied) => Some(snapshot(copied)),
            Err(error) => {
                log::debug!("a recently changed file could not be copied: {error}");
                self.used.fetch_sub(version.size, Ordering::Relaxed);
                None
            }
        }
    }
}

fn copy(from: &File, bytes: u64) -> io::Result<File> {
    let to = tempfile::tempfile()?;
    let mut at = 0;
    while at < bytes {
        let left = usize::try_from(bytes - at).unwrap_or(usize::MAX);
        let (mut from_at, mut to_at) = (at, at);
        let copied =
            rustix::fs::copy_file_range(from, Some(&mut from_at), &to, Some(&mut to_at), left);
        match copied {
            Ok(0) => break,
            Ok(copied) => at += copied as u64,
            // `copy_file_range` does not support this pair of file systems.
            Err(_) => return copy_by_reading(from, to, at, bytes),
        }
    }
    Ok(to)
}

fn copy_by_reading(from: &File, to: File, mut at: u64, bytes: u64) -> io::Result<File> {
    use std::os::unix::fs::FileExt as _;
    let mut buffer = vec![0; 64 * 1024];
    while at < bytes {
        let read = from.read_at(&mut buffer, at)?;
        if read == 0 {
            break;
        }
        to.write_all_at(&buffer[..read], at)?;
        at += read as u64;
    }
    Ok(to)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Seek as _};

    use super::*;

    /// A young file is copied, the copy is unaffected when the file is overwritten, and dropping it frees its room.
    #[test]
    fn copies() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        std::fs::write(&path, "before").unwrap();
        let file = File::open(&path).unwrap();
        let room = Arc::new(SnapshotRoom::default());
        let version = FileVersion::of(&file).unwrap();
        let snapshot = room.take(&file, version).expect("it is young");
        std::fs::write(&path, "after").unwrap();
        let mut text = String::new();
        let mut copied: &File = &snapshot.file;
        copied.rewind().unwrap();
        copied.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before");
        assert_eq!(room.used.load(Ordering::Relaxed), 6);
        drop(snapshot);
        assert_eq!(room.used.load(Ordering::Relaxed), 0);
        assert!(room.take(&file, version).is_none(), "it was overwritten");
        assert_eq!(room.used.load(Ordering::Relaxed), 0);
    }

    /// Old files, large files and files beyond the total limit are not copied.
    #[test]
    fn refused() {
        let file = tempfile::tempfile().unwrap();
        let room = Arc::new(SnapshotRoom::default());
        let version = FileVersion::of(&file).unwrap();
        let old = FileVersion {
            changed: (1, 0),
            ..version
        };
        let large = FileVersion {
            size: MAX_FILE + 1,
            ..version
        };
        assert!(room.take(&file, old).is_none());
        assert!(room.take(&file, large).is_none());
        room.used.store(MAX_BYTES, Ordering::Relaxed);
        let one = FileVersion { size: 1, ..version };
        assert!(room.take(&file, one).is_none());
    }
}
