//! The files (and other code) that processes have mapped: opened once, kept open while anybody maps them.
//!
//! A file is told from another by device, inode and version. While it is open here its inode cannot become another
//! file's, so what is left to be checked is whether it was written: at each new mapping of it, by its times and size.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{FileExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, TryRecvError},
    },
};

use agent_ebpf::unwind::Rule;
use memmap2::{Mmap, UncheckedAdvice};
use rustix::fs::OFlags;

use crate::{
    file::{
        FileCopy, FileVersion, OpenFile, Snapshot, SnapshotRoom, find, find_in_root_of,
        is_served_by_fuse, open_again, open_found, open_regular,
    },
    kernel::{FileKey, MappedObject},
    object::{Exports, Object, Segment, bias},
    pool::{Answer, Subject, WorkerPool},
    process::{Backing, ExecutableMapping, ObjectId, living_thread, mapped_objects, process_exe},
    unwind::Cfi,
};

/// Files kept open at most: beyond it samples in a file are left to user space, which cannot unwind
/// them either. A machine of a thousand containers has about two thousand different binaries and
/// libraries.
const MAX_OBJECTS: usize = 16_384;

/// Files remembered at most as not to be had from a process.
const MAX_LOST: usize = 4096;

/// Mount namespaces whose directory of debug files is kept open at most: a thousand containers.
const MAX_DEBUG_DIRS: usize = 1024;

/// How long a file stays open that nobody maps any more, nanoseconds: a program that is started again and again should
/// find its own.
const UNUSED_FOR: u64 = 60_000_000_000;

/// Bytes of an object.
#[derive(Clone, Debug)]
pub enum Image {
    /// A file's, by mapping. That goes first: the file is then still open, and to unmap it closes nothing.
    File(Arc<Mmap>, Arc<OpenFile>),
    /// A file's that a process serves, copied.
    Copy(Arc<OpenFile>, Arc<FileCopy>),
    /// The vDSO's, copied from this process: the kernel maps the same to all.
    Vdso(Arc<[u8]>),
}

impl Image {
    /// Gives the pages that were read back to the kernel's page cache: they would count as this
    /// process's memory. They are read again when they are needed.
    pub fn forget_pages(&self) {
        if let Image::File(map, _) = self {
            // SAFETY: the mapping is of a file and read-only, so dropped pages come back unchanged.
            let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }

    /// The file, if it is one.
    pub fn file(&self) -> Option<&Arc<OpenFile>> {
        match self {
            Image::File(_, file) | Image::Copy(file, _) => Some(file),
            Image::Vdso(_) => None,
        }
    }

    /// The bytes. To read them may block as long as the file system likes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Image::File(map, _) => map,
            Image::Copy(_, copy) => copy.bytes(),
            Image::Vdso(bytes) => bytes,
        }
    }
}

/// Code with an ELF image.
#[derive(Debug)]
pub struct Mapped {
    /// Its unwind entries, checked once; `None` when it has none. Declared before the image that it
    /// borrows from, so that it is dropped first.
    cfi: Option<Cfi<'static>>,
    /// Path as the first process that had it sees it, or `[vdso]`.
    pub name: PathBuf,
    /// Its bytes.
    pub image: Image,
    /// Executable segments.
    pub segments: Vec<Segment>,
    /// GNU build id.
    pub build_id: Option<Vec<u8>>,
    /// What tells servers and their clients.
    pub exports: Exports,
    /// The version that was read; `None` for what is no file.
    pub version: Option<FileVersion>,
    /// Whether to read it cannot wait for anybody but this machine's disk.
    pub is_local: bool,
    /// A copy, should the file be overwritten.
    pub snapshot: Option<Arc<Snapshot>>,
    /// The debug files where it was found, if that is another mount namespace than the agent's.
    pub debug_dir: Option<Arc<File>>,
}

impl Mapped {
    /// Reads the facts of an image; `None`: it is no ELF file with code. May block.
    fn read(name: &Path, image: Image) -> Option<Mapped> {
        // SAFETY: the bytes lie in a file mapping or a boxed slice behind an `Arc`, so they do not move,
        // and `Mapped` holds the image for longer than what borrows from it.
        let bytes =
            unsafe { std::slice::from_raw_parts(image.bytes().as_ptr(), image.bytes().len()) };
        let object = Object::parse(bytes).ok()?;
        let mapped = Mapped {
            cfi: Cfi::new(&object).ok(),
            name: name.to_owned(),
            segments: object.segments.clone(),
            build_id: object.build_id.map(<[u8]>::to_vec),
            exports: Exports::read(bytes),
            version: None,
            is_local: true,
            snapshot: None,
            debug_dir: None,
            image,
        };
        mapped.image.forget_pages();
        Some(mapped)
    }

    /// The rule of an svma, read from its unwind entry directly. `None`: the object has no entries. May block.
    pub fn rule_at(&self, svma: u64) -> Option<Rule> {
        Some(self.cfi.as_ref()?.row_at(svma))
    }

    /// avma minus svma of a mapping of this object. `None`: the mapping is of no executable segment.
    pub fn bias(&self, mapping: &MappedObject) -> Option<u64> {
        let length = mapping.end - mapping.start;
        bias(&self.segments, mapping.start, mapping.offset, length)
    }

    /// Whether the file was not written since it was read.
    fn is_current(&self) -> bool {
        let (Some(file), Some(version)) = (self.image.file(), self.version) else {
            return true;
        };
        FileVersion::of(&***file).is_ok_and(|now| now == version)
    }

    /// Whether another reading of the same file, whose times differ, has the same contents as far as can be told.
    fn is_same_content(&self, other: &Mapped) -> bool {
        let (Some(own), Some(others)) = (self.version, other.version) else {
            return false;
        };
        own.modified == others.modified
            && own.size == others.size
            && self.build_id.is_some()
            && self.build_id == other.build_id
    }
}

/// Why files could not be opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenFailures {
    /// The limit of open files was reached.
    pub no_descriptors: u64,
    /// A file of a FUSE file system does not fit into the room for copies; counted at each attempt.
    pub too_large: u64,
    /// Any other reason: nearly always the process had gone.
    pub other: u64,
}

/// What an opened file is.
type Opened = io::Result<Option<Mapped>>;

/// An object, and when it was mapped last.
struct Entry {
    mapped: Arc<Mapped>,
    key: Option<FileKey>,
    /// When a mapping of it was last known, nanoseconds.
    used: u64,
}

/// Open directories of debug files by mount namespace, as `/proc/PID/ns/mnt` tells it, and root directory.
type DebugDirs = Mutex<HashMap<(PathBuf, PathBuf), Option<Arc<File>>>>;

/// What the threads share that open files.
#[derive(Default)]
struct Shared {
    debug_dirs: DebugDirs,
    room: Arc<SnapshotRoom>,
}

/// All objects.
pub struct Objects {
    /// The threads by which files are opened.
    pub pool: WorkerPool,
    objects: HashMap<ObjectId, Entry>,
    by_key: HashMap<FileKey, ObjectId>,
    last: u32,
    vdso: Option<Backing>,
    lost: HashSet<(u32, FileKey)>,
    /// Files whose opening is overdue.
    late: HashMap<FileKey, Receiver<Opened>>,
    /// Files that took long to be opened, and have no code.
    without_code: HashSet<FileKey>,
    shared: Arc<Shared>,
    /// Files that could not be opened or read.
    pub failures: OpenFailures,
}

impl Objects {
    /// Nothing opened yet.
    pub fn new() -> Objects {
        Objects {
            pool: WorkerPool::new(),
            objects: HashMap::new(),
            by_key: HashMap::new(),
            last: 0,
            vdso: None,
            lost: HashSet::new(),
            late: HashMap::new(),
            without_code: HashSet::new(),
            shared: Arc::default(),
            failures: OpenFailures::default(),
        }
    }

    /// The object with this number; `None` when it was evicted.
    pub fn get(&self, id: ObjectId) -> Option<&Arc<Mapped>> {
        self.objects.get(&id).map(|entry| &entry.mapped)
    }

    /// How many are open.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// What a mapping of `pid` is of; a file that is not known in its present version is opened. The answer is kept
    /// with the mapping.
    pub fn backing(&mut self, pid: u32, mapping: &ExecutableMapping) -> Backing {
        if let Some(backing) = mapping.backing.get() {
            return backing;
        }
        let backing = self.look_up(pid, mapping);
        if backing != Backing::Lost {
            mapping.backing.set(Some(backing));
        }
        backing
    }

    fn look_up(&mut self, pid: u32, mapping: &MappedObject) -> Backing {
        let Some(key) = mapping.file else {
            return match is_vdso(mapping) {
                true => self.vdso(mapping),
                false => Backing::Private,
            };
        };
        let known = self.by_key.get(&key).copied();
        let known = known.and_then(|id| Some((id, Arc::clone(self.get(id)?))));
        if let Some((id, mapped)) = &known
            && mapped.is_current()
        {
            return Backing::Object(*id);
        }
        if self.without_code.contains(&key) {
            return Backing::Private;
        }
        if self.lost.contains(&(pid, key)) || self.late.contains_key(&key) {
            return Backing::Lost;
        }
        let subject = Subject {
            pid,
            file: Some((mapping.name.clone(), (key.major, key.minor))),
        };
        let opened = known.map(|(_, mapped)| mapped);
        let (wanted, shared) = (mapping.clone(), Arc::clone(&self.shared));
        let work = move || open_object(pid, &wanted, key, opened.as_deref(), &shared);
        match self.pool.call(subject, work) {
            Answer::Done(opened) => self.take(pid, key, opened),
            Answer::Overdue(receiver) => {
                log::debug!("{}: does not answer yet", mapping.name.display());
                self.late.insert(key, receiver);
                Backing::Lost
            }
            Answer::Refused => self.lose(pid, key),
        }
    }

    fn vdso(&mut self, mapping: &MappedObject) -> Backing {
        *self.vdso.get_or_insert_with(|| {
            let mapped = vdso_image().and_then(|image| Mapped::read(&mapping.name, image));
            let Some(mapped) = mapped else {
                return Backing::Private;
            };
            // The vDSO is nobody's file: it stays.
            let id = ObjectId(0);
            let entry = Entry {
                mapped: Arc::new(mapped),
                key: None,
                used: u64::MAX,
            };
            self.objects.insert(id, entry);
            Backing::Object(id)
        })
    }

    fn take(&mut self, pid: u32, key: FileKey, opened: Opened) -> Backing {
        match opened {
            Ok(None) => Backing::Private,
            Ok(Some(mapped)) => self.add(pid, key, mapped),
            Err(error) => {
                log::debug!("pid {pid}, {key:?}: {error}");
                match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE) => self.failures.no_descriptors += 1,
                    _ if error.kind() == io::ErrorKind::FileTooLarge => {
                        self.failures.too_large += 1;
                    }
                    _ => self.failures.other += 1,
                }
                self.lose(pid, key)
            }
        }
    }

    /// Remembered for this process only: another may still show the file.
    fn lose(&mut self, pid: u32, key: FileKey) -> Backing {
        if self.lost.len() >= MAX_LOST {
            self.lost.clear();
        }
        self.lost.insert((pid, key));
        Backing::Lost
    }

    fn add(&mut self, pid: u32, key: FileKey, mapped: Mapped) -> Backing {
        // A file whose attributes alone were changed is the same object, from now on with these.
        if let Some(known) = self.by_key.get(&key)
            && let Some(entry) = self.objects.get_mut(known)
            && entry.mapped.is_same_content(&mapped)
        {
            entry.mapped = Arc::new(mapped);
            return Backing::Object(*known);
        }
        if self.objects.len() >= MAX_OBJECTS {
            return self.lose(pid, key);
        }
        self.last += 1;
        let id = ObjectId(self.last);
        let entry = Entry {
            mapped: Arc::new(mapped),
            key: Some(key),
            used: 0,
        };
        self.objects.insert(id, entry);
        self.by_key.insert(key, id);
        Backing::Object(id)
    }

    /// Takes files that were opened late. True: there were some.
    pub fn settle(&mut self) -> bool {
        if self.late.is_empty() {
            return false;
        }
        let mut arrived = Vec::new();
        self.late.retain(|key, receiver| match receiver.try_recv() {
            Ok(opened) => {
                arrived.push((*key, opened));
                false
            }
            Err(TryRecvError::Empty) => true,
            Err(TryRecvError::Disconnected) => false,
        });
        let any = !arrived.is_empty();
        for (key, opened) in arrived {
            // Not of any process's: who lost it is asked again.
            if self.take(0, key, opened) == Backing::Private && self.without_code.len() < MAX_LOST {
                self.without_code.insert(key);
            }
        }
        any
    }

    /// What could not be opened, or had no code, may be tried again.
    pub fn retry_lost(&mut self) {
        self.lost.clear();
        self.without_code.clear();
    }

    /// Closes the files that nobody has had mapped for a minute: `mapped` tells for each whether somebody has. Returns
    /// those that were closed.
    pub fn evict(&mut self, time: u64, mapped: &HashSet<ObjectId>) -> Vec<ObjectId> {
        let mut evicted = Vec::new();
        for (id, entry) in &mut self.objects {
            let Some(key) = entry.key else {
                continue;
            };
            if mapped.contains(id) || entry.used == 0 {
                entry.used = time;
            }
            if time >= entry.used.saturating_add(UNUSED_FOR) {
                evicted.push((*id, key));
            }
        }
        for (id, key) in &evicted {
            self.objects.remove(id);
            if self.by_key.get(key) == Some(id) {
                self.by_key.remove(key);
            }
        }
        evicted.into_iter().map(|(id, _)| id).collect()
    }
}

fn is_vdso(mapping: &MappedObject) -> bool {
    mapping.name.as_os_str() == "[vdso]"
}

/// Opens and reads the file of a mapping; `Ok(None)` for one that is no ELF file. `known` is the same file, open, in an
/// older version. May block.
fn open_object(
    pid: u32,
    mapping: &MappedObject,
    key: FileKey,
    known: Option<&Mapped>,
    shared: &Shared,
) -> Opened {
    let file = match known.and_then(|known| known.image.file()) {
        Some(file) => open_again(&***file)?,
        None => open(pid, mapping, key)?,
    };
    let file = Arc::new(OpenFile::new(file));
    // The version first: what is written after that is noticed later.
    let version = FileVersion::of(&**file)?;
    let image = if is_served_by_fuse(&**file) {
        let copy = FileCopy::read(&file, version, (key.major, key.minor))?;
        Image::Copy(Arc::clone(&file), Arc::new(copy))
    } else {
        // SAFETY: the mapping is only read. Its contents may change, and no reader relies on them not to; a file that
        // is truncated reads as zeros (see `truncation`).
        let map = unsafe { Mmap::map(&**file)? };
        Image::File(Arc::new(map), Arc::clone(&file))
    };
    Ok(Mapped::read(&mapping.name, image).map(|mapped| Mapped {
        version: Some(version),
        is_local: file.is_local(),
        // Only programs are overwritten in place: a library that is mapped would break whoever uses it.
        snapshot: (process_exe(pid).as_ref() == Some(&mapping.name))
            .then(|| shared.room.take(&file, version).map(Arc::new))
            .flatten(),
        debug_dir: match known {
            Some(known) => known.debug_dir.clone(),
            None => debug_dir(pid, &shared.debug_dirs),
        },
        ..mapped
    }))
}

/// The directory of debug files that a process sees, if its mount namespace is not the agent's.
fn debug_dir(pid: u32, dirs: &DebugDirs) -> Option<Arc<File>> {
    let theirs = fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()?;
    if fs::read_link("/proc/self/ns/mnt").is_ok_and(|own| own == theirs) {
        return None;
    }
    // A container's first process has its namespace before it has its root.
    let root = fs::read_link(format!("/proc/{pid}/root")).ok()?;
    let place = (theirs, root);
    let known = |dirs: &DebugDirs| dirs.lock().ok()?.get(&place).cloned();
    if let Some(known) = known(dirs) {
        return known;
    }
    let dir = find_in_root_of(pid, Path::new("/usr/lib/debug"), OFlags::DIRECTORY);
    let dir = dir.ok().map(|dir| Arc::new(File::from(dir)));
    if let Ok(mut dirs) = dirs.lock() {
        if dirs.len() >= MAX_DEBUG_DIRS {
            dirs.clear();
        }
        dirs.insert(place, dir.clone());
    }
    dir
}

/// Opens the file of a mapping: through the mapping itself, which is right even when the file was
/// deleted or replaced; else by its name as the process sees it; else, when the process has gone, by
/// its name here. By name the inode must be the mapped one.
fn open(pid: u32, mapping: &MappedObject, key: FileKey) -> io::Result<File> {
    let (start, end) = (mapping.start, mapping.end);
    // Of a process whose first thread has ended another knows the mappings.
    let thread = living_thread(pid).unwrap_or(pid);
    let by_mapping = format!("/proc/{thread}/map_files/{start:x}-{end:x}");
    open_regular(Path::new(&by_mapping)).or_else(|error| {
        // No other way leads to a descriptor where there is none left.
        if let Some(libc::EMFILE | libc::ENFILE) = error.raw_os_error() {
            return Err(error);
        }
        let in_root = find_in_root_of(pid, &mapping.name, OFlags::empty());
        let found = in_root.and_then(|found| open_inode(&found, key));
        found.or_else(|_| open_inode(&find(&mapping.name)?, key))
    })
}

fn open_inode(found: &OwnedFd, key: FileKey) -> io::Result<File> {
    let file = open_found(found)?;
    if file.metadata()?.ino() == key.inode {
        return Ok(file);
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "another file has this name now",
    ))
}

fn vdso_image() -> Option<Image> {
    let own = mapped_objects(std::process::id()).ok()?;
    let mapping = own.iter().find(|mapping| is_vdso(mapping))?;
    let mut bytes = vec![0; usize::try_from(mapping.end - mapping.start).ok()?];
    let memory = File::open("/proc/self/mem").ok()?;
    memory.read_exact_at(&mut bytes, mapping.start).ok()?;
    Some(Image::Vdso(bytes.into()))
}
