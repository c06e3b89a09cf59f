//! The files (and other code) that processes have mapped: opened once, kept open.

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use agent_ebpf::unwind::Rule;
use memmap2::{Mmap, UncheckedAdvice};

use crate::{
    kernel::{FileKey, MappedObject},
    object::{Object, Segment, bias},
    process::mapped_objects,
    unwind::Cfi,
};

/// Files kept open at most: beyond it samples in a file are left to user space, which cannot unwind
/// them either. A machine of a thousand containers has about two thousand different binaries and
/// libraries.
const MAX_OBJECTS: usize = 16_384;

/// Files remembered by their identity at most, those that are no ELF included.
const MAX_KEYS: usize = 4 * MAX_OBJECTS;

/// Files remembered at most as not to be had from a process.
const MAX_LOST: usize = 4096;

/// Mount namespaces whose directory of debug files is kept open at most: a thousand containers.
const MAX_DEBUG_DIRS: usize = 1024;

/// A mapped file or the vDSO, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectId(pub u32);

/// Bytes of an object.
#[derive(Clone, Debug)]
pub enum Image {
    /// A file's, by mapping.
    File(Arc<File>, Arc<Mmap>),
    /// The vDSO's, copied from this process: the kernel maps the same to all.
    Vdso(Arc<[u8]>),
}

impl Image {
    /// Gives the pages that were read back to the kernel's page cache: they would count as this
    /// process's memory. They are read again when they are needed.
    pub fn forget_pages(&self) {
        if let Image::File(_, map) = self {
            // SAFETY: the mapping is of a file and read-only, so dropped pages come back unchanged.
            let _ = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Image::File(_, map) => map,
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
    /// The debug files where it was found, if that is another mount namespace than the agent's.
    pub debug_dir: Option<Arc<File>>,
}

impl Mapped {
    /// The rule of an svma, read from its unwind entry directly. `None`: the object has no entries.
    pub fn rule_at(&self, svma: u64) -> Option<Rule> {
        Some(self.cfi.as_ref()?.row_at(svma))
    }

    /// avma minus svma of a mapping of this object. `None`: the mapping is of no executable segment.
    pub fn bias(&self, mapping: &MappedObject) -> Option<u64> {
        let length = mapping.end - mapping.start;
        bias(&self.segments, mapping.start, mapping.offset, length)
    }
}

/// What a mapping is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// An ELF image.
    Object(ObjectId),
    /// Code that belongs to the process alone (just-in-time compiled), or a file that is no ELF.
    Private,
    /// A file that could not be opened: the process had gone, or there are too many.
    Lost,
}

/// All objects.
#[derive(Debug, Default)]
pub struct Objects {
    objects: Vec<Mapped>,
    by_key: HashMap<FileKey, Backing>,
    vdso: Option<Backing>,
    lost: HashSet<(u32, FileKey)>,
    /// By mount namespace, as `/proc/PID/ns/mnt` tells it, and root directory.
    debug_dirs: HashMap<(PathBuf, PathBuf), Option<Arc<File>>>,
    /// Files that could not be opened or read.
    pub unreadable: u64,
}

impl Objects {
    /// The object with this number.
    pub fn get(&self, id: ObjectId) -> &Mapped {
        &self.objects[id.0 as usize]
    }

    /// What is known of a mapping without opening anything.
    pub fn known(&self, mapping: &MappedObject) -> Option<Backing> {
        match mapping.file {
            Some(key) => self.by_key.get(&key).copied(),
            None if is_vdso(mapping) => self.vdso,
            None => Some(Backing::Private),
        }
    }

    /// What a mapping of `pid` is of; a file seen for the first time is opened.
    pub fn backing(&mut self, pid: u32, mapping: &MappedObject) -> Backing {
        if let Some(backing) = self.known(mapping) {
            return backing;
        }
        let Some(key) = mapping.file else {
            let vdso = vdso_image();
            let backing = vdso.map_or(Backing::Private, |image| self.add(mapping, image, None));
            self.vdso = Some(backing);
            return backing;
        };
        if self.lost.contains(&(pid, key)) {
            return Backing::Lost;
        }
        match open(pid, mapping, key) {
            Ok(image) => {
                let debug_dir = self.debug_dir(pid);
                let backing = self.add(mapping, image, debug_dir);
                if self.by_key.len() < MAX_KEYS {
                    self.by_key.insert(key, backing);
                }
                backing
            }
            Err(error) => {
                log::debug!("{}: {error}", mapping.name.display());
                self.unreadable += 1;
                // Remembered for this process only: another may still show the file.
                if self.lost.len() >= MAX_LOST {
                    self.lost.clear();
                }
                self.lost.insert((pid, key));
                Backing::Lost
            }
        }
    }

    /// The directory of debug files that a process sees, if its mount namespace is not the agent's.
    fn debug_dir(&mut self, pid: u32) -> Option<Arc<File>> {
        let theirs = fs::read_link(format!("/proc/{pid}/ns/mnt")).ok()?;
        // A container's first process has its namespace before it has its root.
        let root = fs::read_link(format!("/proc/{pid}/root")).ok()?;
        let place = (theirs.clone(), root);
        if let Some(known) = self.debug_dirs.get(&place) {
            return known.clone();
        }
        if self.debug_dirs.len() >= MAX_DEBUG_DIRS {
            return None;
        }
        let other = fs::read_link("/proc/self/ns/mnt").is_ok_and(|own| own != theirs);
        let dir = other.then(|| format!("/proc/{pid}/root/usr/lib/debug"));
        let mut options = File::options();
        let options = options
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY);
        let dir = dir.and_then(|dir| options.open(dir).ok()).map(Arc::new);
        self.debug_dirs.insert(place, dir.clone());
        dir
    }

    fn add(
        &mut self,
        mapping: &MappedObject,
        image: Image,
        debug_dir: Option<Arc<File>>,
    ) -> Backing {
        if self.objects.len() >= MAX_OBJECTS {
            return Backing::Lost;
        }
        // SAFETY: the bytes lie in a file mapping or a boxed slice behind an `Arc`, so they do not move,
        // and `Mapped` holds the image for longer than what borrows from it.
        let bytes =
            unsafe { std::slice::from_raw_parts(image.bytes().as_ptr(), image.bytes().len()) };
        let Ok(object) = Object::parse(bytes) else {
            return Backing::Private;
        };
        let cfi = Cfi::new(&object).ok();
        let (segments, build_id) = (object.segments.clone(), object.build_id.map(<[u8]>::to_vec));
        let id = ObjectId(self.objects.len() as u32);
        self.objects.push(Mapped {
            cfi,
            name: mapping.name.clone(),
            segments,
            build_id,
            debug_dir,
            image,
        });
        Backing::Object(id)
    }
}

fn is_vdso(mapping: &MappedObject) -> bool {
    mapping.name.as_os_str() == "[vdso]"
}

/// Opens the file of a mapping: through the mapping itself, which is right even when the file was
/// deleted or replaced; else by its name as the process sees it; else, when the process has gone, by
/// its name here. By name the inode must be the mapped one.
fn open(pid: u32, mapping: &MappedObject, key: FileKey) -> io::Result<Image> {
    let (start, end) = (mapping.start, mapping.end);
    let by_mapping = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
    let file = open_regular(Path::new(&by_mapping))
        .or_else(|_| open_inode(&in_root_of(pid, &mapping.name), key))
        .or_else(|_| open_inode(&mapping.name, key))?;
    // SAFETY: the mapping is read-only and private. Its contents may change, and no reader relies on
    // them not to; a file that is truncated reads as zeros (see `truncation`).
    let map = unsafe { Mmap::map(&file)? };
    Ok(Image::File(Arc::new(file), Arc::new(map)))
}

/// Opens a regular file whose name somebody else chose: never waits (a FIFO would), never makes a
/// terminal this process's own.
pub fn open_regular(path: &Path) -> io::Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "not a regular file",
    ))
}

fn open_inode(path: &Path, key: FileKey) -> io::Result<File> {
    let file = open_regular(path)?;
    if file.metadata()?.ino() == key.inode {
        return Ok(file);
    }
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "another file has this name now",
    ))
}

fn in_root_of(pid: u32, path: &Path) -> PathBuf {
    let relative = path.strip_prefix("/").unwrap_or(path);
    Path::new("/proc")
        .join(pid.to_string())
        .join("root")
        .join(relative)
}

fn vdso_image() -> Option<Image> {
    let own = mapped_objects(std::process::id());
    let mapping = own.iter().find(|mapping| is_vdso(mapping))?;
    let mut bytes = vec![0; usize::try_from(mapping.end - mapping.start).ok()?];
    let memory = File::open("/proc/self/mem").ok()?;
    memory.read_exact_at(&mut bytes, mapping.start).ok()?;
    Some(Image::Vdso(bytes.into()))
}
