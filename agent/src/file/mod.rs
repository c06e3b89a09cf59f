//! Files that other processes chose: opening them without side effects, and telling their versions apart.

mod open;
mod snapshot;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    path::Path,
};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags};

pub use open::{FileCopy, OpenFile};
pub use snapshot::{Snapshot, SnapshotRoom};

/// The attributes of a file that change when it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileVersion {
    /// Time of the last change of contents or attributes: seconds and nanoseconds since 1970.
    pub changed: (i64, u32),
    /// Time of the last change of contents, which the file's owner can set.
    pub modified: (i64, u32),
    /// Size, bytes.
    pub size: u64,
}

impl FileVersion {
    /// The version of an open file, from what the kernel knows without asking a file server
    /// (`AT_STATX_DONT_SYNC`), so that this never blocks.
    ///
    /// # Errors
    /// Those of `statx`.
    pub fn of(file: impl AsFd) -> io::Result<FileVersion> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let wanted = StatxFlags::CTIME | StatxFlags::MTIME | StatxFlags::SIZE;
        let found = rustix::fs::statx(file, c"", flags, wanted)?;
        Ok(FileVersion {
            changed: (found.stx_ctime.tv_sec, found.stx_ctime.tv_nsec),
            modified: (found.stx_mtime.tv_sec, found.stx_mtime.tv_nsec),
            size: found.stx_size,
        })
    }
}

/// Magic numbers of file systems that depend on no other process or machine to answer
/// (include/uapi/linux/magic.h; those of XFS, ZFS and F2FS in their own headers). overlayfs is
/// not among them, because its layers may be on any other file system.
const LOCAL_FILE_SYSTEMS: [u32; 9] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // Btrfs
    0xf2f5_2010, // F2FS
    0x2fc1_2fc1, // ZFS
    0x0102_1994, // tmpfs
    0x8584_58f6, // ramfs
    0xe0f5_e1e2, // EROFS
    0x7371_7368, // SquashFS
];

/// Whether a file is on a file system of this machine, which answers as fast as its disk.
/// `false` if that is unknown.
pub fn is_local(file: impl AsFd) -> bool {
    let kind = rustix::fs::fstatfs(file).map(|found| found.f_type as u32);
    kind.is_ok_and(|kind| LOCAL_FILE_SYSTEMS.contains(&kind))
}

/// Whether a file is served by FUSE, whose server may be any user's process. `true` if that is unknown.
pub fn is_served_by_fuse(file: impl AsFd) -> bool {
    rustix::fs::fstatfs(file).map_or(true, |found| found.f_type as u32 == 0x6573_5546)
}

/// Opens a regular file whose path another process chose.
///
/// # Errors
/// The file is not a regular file, or cannot be opened.
pub fn open_regular(path: &Path) -> io::Result<File> {
    open_found(find(path)?)
}

/// Looks up a file without opening it, and returns a descriptor of `O_PATH`.
///
/// # Errors
/// The path cannot be resolved.
pub fn find(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Looks up a file like [`find`], but within a directory, which is the root of absolute paths
/// and links, so that no link leads out of it. `flags` are added to those of `open`.
///
/// # Errors
/// The path cannot be resolved within the directory.
pub fn find_beneath(directory: impl AsFd, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(
        directory,
        path,
        flags,
        Mode::empty(),
        resolve,
    )?)
}

/// Looks up a file like [`find_beneath`], within the root directory of a process.
///
/// # Errors
/// The process has ended, or the path cannot be resolved there.
pub fn find_in_root_of(pid: u32, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    find_beneath(directory_of(pid, "root")?, path, flags)
}

/// Opens a directory of a process: `root` or `cwd`.
///
/// # Errors
/// The process has ended.
pub fn directory_of(pid: u32, which: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let path = format!("/proc/{pid}/{which}");
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens a file that was looked up, for reading, if it is a regular file. The type is checked
/// before it is opened, because opening a device or a FIFO may block forever or have side effects.
///
/// # Errors
/// The file is not a regular file, or cannot be opened.
pub fn open_found(found: impl AsFd) -> io::Result<File> {
    let mode = rustix::fs::fstat(&found)?.st_mode;
    if !FileType::from_raw_mode(mode).is_file() {
        let message = "not a regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    open_again(found)
}

/// Opens an open file a second time, for reading.
///
/// # Errors
/// Those of `open`.
pub fn open_again(file: impl AsFd) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A FIFO, a device and a directory are rejected without being opened; a link to a file is followed.
    #[test]
    fn only_regular_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("file"), "text").unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, path("fifo"), Mode::RUSR).unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        assert!(open_regular(&path("file")).is_ok());
        assert!(open_regular(&path("link")).is_ok());
        assert!(open_regular(&path("fifo")).is_err());
        assert!(open_regular(dir.path()).is_err());
        assert!(open_regular(Path::new("/dev/zero")).is_err());
    }

    /// No path and no link leads out of the directory.
    #[test]
    fn beneath() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "text").unwrap();
        let links = [
            ("out", "/etc/passwd"),
            ("up", "../../../../etc/passwd"),
            ("in", "/file"),
        ];
        for (name, target) in links {
            std::os::unix::fs::symlink(target, dir.path().join(name)).unwrap();
        }
        let root = File::open(dir.path()).unwrap();
        let found = |path: &str| find_beneath(&root, Path::new(path), OFlags::empty());
        assert!(found("out").is_err() && found("up").is_err());
        assert!(found("/file").is_ok() && found("in").is_ok());
        assert!(found("../../etc/passwd").is_err());
    }

    /// A temporary file is local, unless it is on overlayfs, and a file of `/proc` is not.
    #[test]
    fn local_files() {
        let file = tempfile::tempfile().unwrap();
        let overlay = rustix::fs::fstatfs(&file).unwrap().f_type as u32 == 0x794c_7630;
        assert_eq!(is_local(&file), !overlay);
        assert!(!is_local(File::open("/proc/self/maps").unwrap()));
    }

    /// Writing changes the version, reading does not.
    #[test]
    fn versions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "one").unwrap();
        let file = File::open(&path).unwrap();
        let before = FileVersion::of(&file).unwrap();
        std::fs::read(&path).unwrap();
        assert_eq!(FileVersion::of(&file).unwrap(), before);
        std::fs::write(&path, "three").unwrap();
        assert_ne!(FileVersion::of(&file).unwrap(), before);
    }
}
