//! A FUSE file system with one file, whose server stops answering requests when told to: all requests, or
//! only those at the close of a file.

use std::{
    ffi::CString,
    fs::{self, File},
    io::{ErrorKind, Read as _, Write as _},
    os::{fd::AsRawFd as _, unix::ffi::OsStrExt as _},
    path::{Path, PathBuf},
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

/// The node number of the file; that of the directory is 1.
const FILE: u64 = 2;
/// Size of the largest request: a write of a megabyte with its header.
const MAX_REQUEST: usize = (1 << 20) + 4096;

/// Which requests are not answered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Unanswered {
    Everything,
    Closing,
}

/// FLUSH: the kernel sends it for every descriptor that is closed, and waits for the answer.
const FLUSH: u32 = 25;

/// A mounted file system. When it is dropped it is unmounted, and every process that waits for it gets an
/// error.
pub struct Fuse {
    directory: PathBuf,
    hangs: Arc<AtomicBool>,
    unanswered: Arc<AtomicUsize>,
    ends: Arc<AtomicBool>,
    server: Option<thread::JoinHandle<()>>,
}

impl Fuse {
    /// Mounts the file system on a new directory. The file is an executable with this content.
    pub fn mount(
        directory: &Path,
        name: &'static str,
        content: Vec<u8>,
        unanswered: Unanswered,
    ) -> std::io::Result<Self> {
        fs::create_dir(directory)?;
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let options = format!(
            "fd={},rootmode=040000,user_id=0,group_id=0",
            device.as_raw_fd()
        );
        let options = CString::new(options).expect("no NUL");
        let target = CString::new(directory.as_os_str().as_bytes()).expect("no NUL");
        // SAFETY: every pointer is to a string that ends in NUL and outlives the call.
        let status = unsafe {
            libc::mount(
                c"flamestorm-test".as_ptr(),
                target.as_ptr(),
                c"fuse".as_ptr(),
                libc::MS_NOSUID | libc::MS_NODEV,
                options.as_ptr().cast(),
            )
        };
        if status != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let [hangs, ends] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
        let count = Arc::new(AtomicUsize::new(0));
        let server = Server {
            device,
            name,
            content,
            kind: unanswered,
            unanswered: count.clone(),
            hangs: hangs.clone(),
            ends: ends.clone(),
        };
        Ok(Self {
            directory: directory.to_owned(),
            hangs,
            unanswered: count,
            ends,
            server: Some(thread::spawn(move || server.serve())),
        })
    }

    /// From now on requests of the chosen kind are not answered.
    pub fn hang(&self) {
        self.hangs.store(true, Ordering::Relaxed);
    }
}

impl Fuse {
    /// The number of requests that were read and not answered. A thread that waits for one of these cannot
    /// be ended by a signal.
    pub fn unanswered(&self) -> usize {
        self.unanswered.load(Ordering::Relaxed)
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let target = CString::new(self.directory.as_os_str().as_bytes()).expect("no NUL");
        // SAFETY: the pointer is to a string that ends in NUL and outlives the call.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        self.ends.store(true, Ordering::Relaxed);
        // The thread closes the device, on which the kernel ends every wait for an answer.
        let _ = self.server.take().map(thread::JoinHandle::join);
    }
}

struct Server {
    device: File,
    name: &'static str,
    content: Vec<u8>,
    kind: Unanswered,
    unanswered: Arc<AtomicUsize>,
    hangs: Arc<AtomicBool>,
    ends: Arc<AtomicBool>,
}

impl Server {
    fn serve(mut self) {
        let mut request = vec![0; MAX_REQUEST];
        while !self.ends.load(Ordering::Relaxed) {
            if !self.has_request() {
                continue;
            }
            let size = match self.device.read(&mut request) {
                Ok(size) => size,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let operation = u32::from_le_bytes(request[4..8].try_into().expect("4 bytes"));
            let may_hang = self.kind == Unanswered::Everything || operation == FLUSH;
            let hangs = may_hang && self.hangs.load(Ordering::Relaxed);
            self.unanswered
                .fetch_add(usize::from(hangs), Ordering::Relaxed);
            if !hangs && let Some(answer) = self.answer(&request[..size]) {
                let _ = self.device.write(&answer);
            }
        }
    }

    /// Waits up to 50 ms for a request.
    fn has_request(&self) -> bool {
        let mut poll = libc::pollfd {
            fd: self.device.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: the pointer is to one pollfd, and that is the count.
        let ready = unsafe { libc::poll(ptr::from_mut(&mut poll), 1, 50) };
        ready > 0
    }

    /// The answer to a request: see include/uapi/linux/fuse.h.
    fn answer(&self, request: &[u8]) -> Option<Vec<u8>> {
        let half = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().expect("4 bytes"));
        let word = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().expect("8 bytes"));
        let (operation, unique, node) = (half(4), word(8), word(16));
        let mut body = Vec::new();
        let error = match operation {
            // LOOKUP
            1 if request[40..].split(|byte| *byte == 0).next() == Some(self.name.as_bytes()) => {
                for value in [FILE, 0, 3600, 3600, 0] {
                    body.extend(value.to_le_bytes());
                }
                body.extend(self.attributes(FILE));
                0
            }
            1 => libc::ENOENT,
            // FORGET and BATCH_FORGET have no answer.
            2 | 42 => return None,
            // GETATTR
            3 => {
                body.extend([3600u64, 0].map(u64::to_le_bytes).concat());
                body.extend(self.attributes(node));
                0
            }
            // OPEN and OPENDIR: no handle, no flags.
            14 | 27 => {
                body.extend([0; 16]);
                0
            }
            // READ
            15 => {
                let start = (word(48) as usize).min(self.content.len());
                let end = (start + half(56) as usize).min(self.content.len());
                body.extend(&self.content[start..end]);
                0
            }
            // INIT: version 7.31, read-ahead of 128 KiB, writes of one page.
            26 => {
                for value in [7, 31, 1 << 17, 0, 0, 4096, 1] {
                    body.extend(u32::to_le_bytes(value));
                }
                body.resize(64, 0);
                0
            }
            // STATFS: the server that hangs entirely answers it, the other does not implement it.
            17 if self.kind == Unanswered::Everything => {
                body.resize(80, 0);
                0
            }
            // RELEASE, RELEASEDIR, ACCESS
            18 | FLUSH | 29 | 34 => 0,
            _ => libc::ENOSYS,
        };
        let mut answer = Vec::new();
        answer.extend(u32::to_le_bytes(16 + body.len() as u32));
        answer.extend((-error).to_le_bytes());
        answer.extend(unique.to_le_bytes());
        answer.extend(body);
        Some(answer)
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        let (size, mode) = if node == FILE {
            (self.content.len() as u64, libc::S_IFREG | 0o755)
        } else {
            (0, libc::S_IFDIR | 0o755)
        };
        let mut bytes = Vec::new();
        // Node number, size, blocks, and three times in seconds.
        for value in [node, size, size.div_ceil(512), 0, 0, 0] {
            bytes.extend(value.to_le_bytes());
        }
        // Nanoseconds of the three times, mode, links, user, group, device, block size, flags.
        for value in [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0] {
            bytes.extend(value.to_le_bytes());
        }
        bytes
    }
}
