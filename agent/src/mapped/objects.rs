//! The files (and other code) that processes have mapped, opened once and kept open while any process maps them.
//!
//! A file is identified by device, inode and version. While it is open here its inode number is not given to
//! another file. So at each new mapping only its times and size need to be compared, to detect that it was written.

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

/// Maximum number of files that are kept open. Samples in further files are left to user space, which cannot unwind
/// them either. A machine with a thousand containers has about two thousand different binaries and libraries.
const MAX_OBJECTS: usize = 16_384;

/// Maximum number of files that are remembered as unavailable in a process, and of files that
/// are remembered as having no code.
const MAX_LOST: usize = 4096;

/// Maximum number of mount namespaces whose directory of debug files is kept open: enough for a
/// thousand containers.
const MAX_DEBUG_DIRS: usize = 1024;

/// How long a file stays open after its last mapping has gone, nanoseconds. A program that is
/// started again and again then need not be opened again and again.
const UNUSED_FOR: u64 = 60_000_000_000;

/// The bytes of an object.
#[derive(Clone, Debug)]
pub enum Image {
    /// A file that is mapped. The mapping is dropped before the file, so that unmapping never closes it.
    File(Arc<Mmap>, Arc<OpenFile>),
    /// A copy of a file that a FUSE server provides.
    Copy(Arc<OpenFile>, Arc<FileCopy>),
    /// A copy of this process's vDSO: the kernel maps the same vDSO into all processes.
    Vdso(Arc<[u8]>),
}

impl Image {
    /// Unmaps the pages that were read, because they would count as this process's memory. They
    /// stay in the kernel's page cache, and are mapped again when they are needed.
    pub fn forget_pages(&self) {
        if let Image::File(map, _) = self {
            // SAFETY: the mapping is of a file and read-only, so dropped pages come back unchanged.
            let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }

    /// The open file, if the image comes from a file.
    pub fn file(&self) -> Option<&Arc<OpenFile>> {
        match self {
            Image::File(_, file) | Image::Copy(file, _) => Some(file),
            Image::Vdso(_) => None,
        }
    }

    /// The bytes. Reading them may block for as long as the file system does not answer.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Image::File(map, _) => map,
            Image::Copy(_, copy) => copy.bytes(),
            Image::Vdso(bytes) => bytes,
        }
    }
}

/// An ELF image that is open, and the facts read from it.
#[derive(Debug)]
pub struct Mapped {
    /// Its unwind entries, checked once; `None` if it has none. The field is declared before
    /// the image that it borrows from, so that it is dropped first.
    cfi: Option<Cfi<'static>>,
    /// Path as seen by the first process that mapped it, or `[vdso]`.
    pub name: PathBuf,
    /// Its bytes.
    pub image: Image,
    /// Executable segments.
    pub segments: Vec<Segment>,
    /// GNU build id.
    pub build_id: Option<Vec<u8>>,
    /// Exported symbols that identify PostgreSQL servers and programs with trace contexts.
    pub exports: Exports,
    /// The version that was read; `None` if it is not a file.
    pub version: Option<FileVersion>,
    /// Whether reading it depends on nothing but this machine's disk.
    pub is_local: bool,
    /// A copy, in case the file is overwritten.
    pub snapshot: Option<Arc<Snapshot>>,
    /// The directory of debug files in the mount namespace where it was found, if that is not the agent's.
    pub debug_dir: Option<Arc<File>>,
}

impl Mapped {
    /// Reads the facts of an image; `None` if it is not an ELF file with code. May block.
    fn read(name: &Path, image: Image) -> Option<Mapped> {
        // SAFETY: the bytes are in a file mapping or in heap memory behind an `Arc`, so they do
        // not move, and `Mapped` holds the image for longer than what borrows from it.
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

    /// The rule for an svma, read directly from its unwind entry. `None` if the object has no entries. May block.
    pub fn rule_at(&self, svma: u64) -> Option<Rule> {
        Some(self.cfi.as_ref()?.row_at(svma))
    }

    /// avma − svma of a mapping of this object. `None` if the mapping holds no executable segment.
    pub fn bias(&self, mapping: &MappedObject) -> Option<u64> {
        let length = mapping.end - mapping.start;
        bias(&self.segments, mapping.start, mapping.offset, length)
    }

    /// Whether the file has not been written since it was read.
    fn is_current(&self) -> bool {
        let (Some(file), Some(version)) = (self.image.file(), self.version) else {
            return true;
        };
        FileVersion::of(&***file).is_ok_and(|now| now == version)
    }

    /// Whether another read of the same file, with a different version, has the same contents
    /// as far as can be told.
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

/// How many files could not be opened, by cause.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenFailures {
    /// The limit on open files was reached.
    pub no_descriptors: u64,
    /// A file of a FUSE file system did not fit into the room for copies; counted at each attempt.
    pub too_large: u64,
    /// Any other cause: nearly always the process had ended.
    pub other: u64,
}

/// The result of opening a file; `None` if it is not an ELF file with code.
type Opened = io::Result<Option<Mapped>>;

/// An open object, and when it was last mapped.
struct Entry {
    mapped: Arc<Mapped>,
    key: Option<FileKey>,
    /// When a mapping of it was last known, nanoseconds; 0 before [`Objects::evict`] has seen it.
    used: u64,
}

/// Open directories of debug files by mount namespace, as the link `/proc/PID/ns/mnt` states
/// it, and root directory.
type DebugDirs = Mutex<HashMap<(PathBuf, PathBuf), Option<Arc<File>>>>;

/// The state that is shared by the threads that open files.
#[derive(Default)]
struct Shared {
    debug_dirs: DebugDirs,
    room: Arc<SnapshotRoom>,
}

/// All objects that are open.
pub struct Objects {
    /// The threads that open files.
    pub pool: WorkerPool,
    objects: HashMap<ObjectId, Entry>,
    by_key: HashMap<FileKey, ObjectId>,
    last: u32,
    vdso: Option<Backing>,
    lost: HashSet<(u32, FileKey)>,
    /// Files whose opening is overdue.
    late: HashMap<FileKey, Receiver<Opened>>,
    /// Files whose opening was overdue, and that turned out to have no code.
    without_code: HashSet<FileKey>,
    shared: Arc<Shared>,
    /// Files that could not be opened or read.
    pub failures: OpenFailures,
}

impl Objects {
    /// Makes an empty collection.
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

    /// The object with this number; `None` if it was evicted.
    pub fn get(&self, id: ObjectId) -> Option<&Arc<Mapped>> {
        self.objects.get(&id).map(|entry| &entry.mapped)
    }

    /// The number of open objects.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Where the code of a mapping of `pid` comes from. A file that is not open in its present
    /// version is opened. The answer is kept with the mapping, unless it is [`Backing::Lost`].
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
                log::debug!("{}: opening it is overdue", mapping.name.display());
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
            // The vDSO is not a file, and is never evicted.
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

    /// Remembers that a file is unavailable in this process. Another process may still provide it.
    fn lose(&mut self, pid: u32, key: FileKey) -> Backing {
        if self.lost.len() >= MAX_LOST {
            self.lost.clear();
        }
        self.lost.insert((pid, key));
        Backing::Lost
    }

    fn add(&mut self, pid: u32, key: FileKey, mapped: Mapped) -> Backing {
        // If only the file's attributes were changed, the object keeps its number and gets the new attributes.
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

    /// Takes over files whose opening was overdue and is done by now. Returns true if there were any.
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
            // The answer belongs to no process in particular. Processes with a lost mapping of
            // the file look it up again.
            if self.take(0, key, opened) == Backing::Private && self.without_code.len() < MAX_LOST {
                self.without_code.insert(key);
            }
        }
        any
    }

    /// Forgets which files could not be opened or had no code, so that they are tried again.
    pub fn retry_lost(&mut self) {
        self.lost.clear();
        self.without_code.clear();
    }

    /// Closes the files that no process has had mapped for a minute. `mapped` holds the objects
    /// that are mapped at `time`, nanoseconds. Returns those that were closed.
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

/// Opens and reads the file of a mapping; `Ok(None)` if it is not an ELF file with code.
/// `known` is the same file, still open, in an older version. May block.
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
    // The version is read before the contents, so that a later write changes it and is noticed.
    let version = FileVersion::of(&**file)?;
    let image = if is_served_by_fuse(&**file) {
        let copy = FileCopy::read(&file, version, (key.major, key.minor))?;
        Image::Copy(Arc::clone(&file), Arc::new(copy))
    } else {
        // SAFETY: the mapping is only read. Its contents may change, and no reader relies on
        // them not to; a file that is truncated reads as zeros (see `session::truncation`).
        let map = unsafe { Mmap::map(&**file)? };
        Image::File(Arc::new(map), Arc::clone(&file))
    };
    Ok(Mapped::read(&mapping.name, image).map(|mapped| Mapped {
        version: Some(version),
        is_local: file.is_local(),
        // Only programs are copied. Overwriting a mapped library in place would break the processes that use it.
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
    // The root is part of the key, because a container's first process enters its namespace
    // before it gets its root.
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

/// Opens the file of a mapping: through the mapping itself, which gives the right file even if it was deleted
/// or replaced; else by its path as the process sees it; else, in case the process has ended, by the same
/// path in the agent's own mount namespace. A file found by its path must have the inode of the mapped one.
fn open(pid: u32, mapping: &MappedObject, key: FileKey) -> io::Result<File> {
    let (start, end) = (mapping.start, mapping.end);
    // If the first thread of a process has ended, the mappings can be read from another thread.
    let thread = living_thread(pid).unwrap_or(pid);
    let by_mapping = format!("/proc/{thread}/map_files/{start:x}-{end:x}");
    open_regular(Path::new(&by_mapping)).or_else(|error| {
        // Without a free descriptor the other ways would fail too.
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
