//! Files of others while they are open here.
//!
//! To close one may mean to wait for its server for ever (FUSE: fs/fuse/file.c, `fuse_flush`), and to read one through a
//! mapping may mean to do so with the lock that every change of this process's memory needs (mm/filemap.c,
//! `filemap_fault`, after a first attempt has failed). So a file that is not local is closed by a thread of its own, and one
//! of a FUSE server is copied instead of mapped.

use std::{
    fs::File,
    io,
    mem::ManuallyDrop,
    ops::Deref,
    os::unix::fs::FileExt as _,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
};

use super::{FileVersion, is_local};

/// Files that threads may be closing at a time. When there are more, files stay open until the process ends.
const MAX_CLOSING: usize = 32;

/// Files that threads are closing.
static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// An open file, closed without waiting for whoever serves it.
#[derive(Debug)]
pub struct OpenFile {
    file: ManuallyDrop<File>,
    is_local: bool,
}

impl OpenFile {
    /// Takes over a file, and asks where it lies, which may block.
    pub fn new(file: File) -> OpenFile {
        let is_local = is_local(&file);
        OpenFile::known(file, is_local)
    }

    /// Takes over a file of which it is known whether it is local.
    pub fn known(file: File, is_local: bool) -> OpenFile {
        OpenFile {
            file: ManuallyDrop::new(file),
            is_local,
        }
    }

    /// Whether to read and close it cannot wait for anybody but this machine's disk.
    pub fn is_local(&self) -> bool {
        self.is_local
    }
}

impl Deref for OpenFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        // SAFETY: it is taken once, and not used afterwards.
        let file = unsafe { ManuallyDrop::take(&mut self.file) };
        match self.is_local {
            true => drop(file),
            false => close_apart(file),
        }
    }
}

/// Closes a file in a thread, or leaves it open when there are too many such threads.
fn close_apart(file: File) {
    // Not dropped with the closure if no thread can be started.
    let file = ManuallyDrop::new(file);
    if CLOSING.fetch_add(1, Ordering::Relaxed) >= MAX_CLOSING {
        CLOSING.fetch_sub(1, Ordering::Relaxed);
        return;
    }
    let close = move || {
        drop(ManuallyDrop::into_inner(file));
        CLOSING.fetch_sub(1, Ordering::Relaxed);
    };
    let name = "closer".to_owned();
    if thread::Builder::new().name(name).spawn(close).is_err() {
        CLOSING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Largest file that is copied into memory, bytes.
const MAX_COPY: u64 = 64 << 20;

/// Most bytes of all copies together.
const MAX_COPIES: u64 = 256 << 20;

/// Bytes of all copies.
static COPIED: AtomicU64 = AtomicU64::new(0);

/// A file's content in memory.
#[derive(Debug)]
pub struct FileCopy {
    bytes: Vec<u8>,
    reserved: u64,
}

impl FileCopy {
    /// Reads a file of this version. May block.
    ///
    /// # Errors
    /// It cannot be read, is too large, or there is no room for another copy.
    pub fn read(file: &File, version: FileVersion) -> io::Result<FileCopy> {
        let size = version.size;
        if size > MAX_COPY {
            return Err(io::Error::other("too large to be copied from its server"));
        }
        let mut copy = FileCopy {
            bytes: Vec::new(),
            reserved: size,
        };
        if COPIED.fetch_add(size, Ordering::Relaxed) + size > MAX_COPIES {
            return Err(io::Error::other("too much is copied from servers"));
        }
        copy.bytes.resize(size as usize, 0);
        file.read_exact_at(&mut copy.bytes, 0)?;
        Ok(copy)
    }

    /// The content.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for FileCopy {
    fn drop(&mut self) {
        COPIED.fetch_sub(self.reserved, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// A file is copied as it is; one that is too large is refused before memory is taken.
    #[test]
    fn copies() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        let copy = FileCopy::read(&file, FileVersion::of(&file).unwrap()).unwrap();
        assert_eq!(copy.bytes(), b"content");
        file.set_len(MAX_COPY + 1).unwrap();
        assert!(FileCopy::read(&file, FileVersion::of(&file).unwrap()).is_err());
        drop(copy);
        assert_eq!(COPIED.load(Ordering::Relaxed), 0);
    }
}
