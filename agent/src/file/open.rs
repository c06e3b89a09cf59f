//! Files of other processes, while they are open in the agent.
//!
//! Closing such a file may wait for its server forever (FUSE: fs/fuse/file.c, `fuse_flush`). Reading it
//! through a mapping may do so too, while holding the lock that every change of this process's memory
//! needs (mm/filemap.c, `filemap_fault`, after a first attempt has failed). A file that is not local is
//! therefore closed by a thread of its own, and a file of a FUSE server is copied instead of mapped.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    mem::ManuallyDrop,
    ops::Deref,
    os::unix::fs::FileExt as _,
    sync::{Mutex, PoisonError},
    thread,
};

use super::{FileVersion, is_local};

/// Maximum number of threads that close files.
const MAX_CLOSING: usize = 32;

/// Files that wait to be closed, and the number of threads that close them.
struct Closing {
    files: Vec<File>,
    threads: usize,
}

static CLOSING: Mutex<Closing> = Mutex::new(Closing {
    files: Vec::new(),
    threads: 0,
});

/// An open file. Dropping it never waits for the file's server.
#[derive(Debug)]
pub struct OpenFile {
    file: ManuallyDrop<File>,
    is_local: bool,
}

impl OpenFile {
    /// Takes over a file and determines whether it is local, which may block.
    pub fn new(file: File) -> OpenFile {
        let is_local = is_local(&file);
        OpenFile::known(file, is_local)
    }

    /// Takes over a file for which the caller knows whether it is local.
    pub fn known(file: File, is_local: bool) -> OpenFile {
        OpenFile {
            file: ManuallyDrop::new(file),
            is_local,
        }
    }

    /// Whether reading and closing the file depends on nothing but this machine's disk.
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
        // SAFETY: the file is taken once, and not used afterwards.
        let file = unsafe { ManuallyDrop::take(&mut self.file) };
        match self.is_local {
            true => drop(file),
            false => close_apart(file),
        }
    }
}

/// Closes a file in a thread. If [`MAX_CLOSING`] threads are at work, all of them probably wait
/// for servers, and the file stays in the list.
fn close_apart(file: File) {
    // The list stays valid even if a thread panicked while it held the lock.
    let mut closing = CLOSING.lock().unwrap_or_else(PoisonError::into_inner);
    closing.files.push(file);
    if closing.threads >= MAX_CLOSING {
        return;
    }
    let name = "closer".to_owned();
    // If no thread can be started, the next thread that is started closes this file too.
    if thread::Builder::new().name(name).spawn(close_files).is_ok() {
        closing.threads += 1;
    }
}

fn close_files() {
    loop {
        let mut closing = CLOSING.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(file) = closing.files.pop() else {
            closing.threads -= 1;
            return;
        };
        drop(closing);
        drop(file);
    }
}

/// Largest file that is copied into memory, bytes.
const MAX_COPY: u64 = 64 << 20;

/// Maximum size of all copies from one device, bytes. The device's server decides how large its files are.
const MAX_COPIES_OF_DEVICE: u64 = 128 << 20;

/// Maximum size of all copies together, bytes.
const MAX_COPIES: u64 = 512 << 20;

/// Bytes of copies by device: major and minor number.
static COPIED: Mutex<BTreeMap<(u32, u32), u64>> = Mutex::new(BTreeMap::new());

/// The contents of a file in memory.
#[derive(Debug)]
pub struct FileCopy {
    bytes: Vec<u8>,
    device: (u32, u32),
    reserved: u64,
}

impl FileCopy {
    /// Reads a file of the given version and device (major and minor number). May block.
    ///
    /// # Errors
    /// The file cannot be read; or it is too large, or there is no room for another copy (`FileTooLarge`).
    pub fn read(file: &File, version: FileVersion, device: (u32, u32)) -> io::Result<FileCopy> {
        let size = version.size;
        let mut copied = COPIED.lock().unwrap_or_else(PoisonError::into_inner);
        let of_device = copied.get(&device).copied().unwrap_or(0);
        let all: u64 = copied.values().sum();
        let fits = size <= MAX_COPY
            && of_device + size <= MAX_COPIES_OF_DEVICE
            && all + size <= MAX_COPIES;
        if !fits {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        *copied.entry(device).or_default() += size;
        drop(copied);
        let mut copy = FileCopy {
            bytes: Vec::new(),
            device,
            reserved: size,
        };
        copy.bytes.resize(size as usize, 0);
        file.read_exact_at(&mut copy.bytes, 0)?;
        Ok(copy)
    }

    /// The device of the file that was copied: major and minor number.
    pub fn device(&self) -> (u32, u32) {
        self.device
    }

    /// The contents.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for FileCopy {
    fn drop(&mut self) {
        let mut copied = COPIED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = copied.get_mut(&self.device) {
            *bytes = bytes.saturating_sub(self.reserved);
            if *bytes == 0 {
                copied.remove(&self.device);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// A file is copied unchanged. A file that is too large is rejected before memory is allocated.
    #[test]
    fn copies() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        let read =
            |file: &File, device| FileCopy::read(file, FileVersion::of(file).unwrap(), device);
        let copy = read(&file, (0, 1)).unwrap();
        assert_eq!(copy.bytes(), b"content");
        file.set_len(MAX_COPY + 1).unwrap();
        assert!(read(&file, (0, 1)).is_err());
        // Two files of the largest size use up the room of a device.
        file.set_len(MAX_COPY).unwrap();
        let other = read(&file, (0, 1)).unwrap();
        assert!(read(&file, (0, 1)).is_err());
        drop((copy, other));
        assert!(read(&file, (0, 1)).is_ok());
        assert!(COPIED.lock().unwrap().is_empty());
    }

    /// A file that is not local is closed as well.
    #[test]
    fn closes() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(OpenFile::known(writer.into(), false));
        // The read ends when the write end of the pipe is closed.
        let read = io::Read::read_to_end(&mut File::from(reader), &mut Vec::new());
        assert_eq!(read.unwrap(), 0);
    }
}
