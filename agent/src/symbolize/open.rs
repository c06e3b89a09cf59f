//! Opening files whose names somebody else chose.
//!
//! A name may lead to a FIFO, a device or a link out of a container. A path is therefore resolved first
//! without opening the file (`O_PATH`), and only a regular file is then opened for reading: opening a
//! device can have effects of its own.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// Nothing has this name.
    #[error("does not exist")]
    Missing,
    /// A device, a directory, a FIFO ….
    #[error("is not a regular file")]
    NotRegular,
    /// The kernel refuses, for example because a link leads outside.
    #[error("cannot be opened: {0}")]
    Io(io::Error),
}

impl From<rustix::io::Errno> for OpenError {
    fn from(errno: rustix::io::Errno) -> OpenError {
        use rustix::io::Errno;
        match errno {
            Errno::NOENT | Errno::SRCH | Errno::NOTDIR => OpenError::Missing,
            errno => OpenError::Io(errno.into()),
        }
    }
}

/// Opens a regular file by a path on this machine. Links are followed, magic ones (`/proc/PID/fd/…`) not.
pub(super) fn regular(path: &Path) -> Result<File, OpenError> {
    resolve(CWD, path, OFlags::empty(), ResolveFlags::NO_MAGICLINKS)
}

/// Opens a regular file below a directory, which is the root for every link on the way.
pub(super) fn regular_in(root: impl AsFd, path: &Path) -> Result<File, OpenError> {
    let flags = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    resolve(root, path, OFlags::empty(), flags)
}

/// Opens a regular file below a directory as [`regular_in`] does; the file's own name must be no link.
pub(super) fn regular_in_no_link(root: impl AsFd, path: &Path) -> Result<File, OpenError> {
    let flags = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    resolve(root, path, OFlags::NOFOLLOW, flags)
}

/// Opens a directory as a root for others.
pub(super) fn directory(path: &Path) -> Result<File, OpenError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?.into())
}

fn resolve(
    root: impl AsFd,
    path: &Path,
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<File, OpenError> {
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    let found = rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?;
    if FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) != FileType::RegularFile {
        return Err(OpenError::NotRegular);
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(own_path(&found), flags, Mode::empty())?.into())
}

/// A path to an open file that holds when its name has gone.
pub(super) fn own_path(file: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Only regular files are opened, and no link leads out of the root.
    #[test]
    fn only_regular_files_beneath_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        rustix::fs::mkfifoat(CWD, at("fifo"), Mode::RUSR).unwrap();
        symlink("/dev/zero", at("zero")).unwrap();
        symlink("/etc/passwd", at("outside")).unwrap();
        symlink("inside", at("link")).unwrap();
        std::fs::write(at("inside"), "x").unwrap();
        let root = directory(dir.path()).unwrap();
        for (name, found) in [
            ("fifo", false),
            ("zero", false),
            ("outside", false),
            (".", false),
            ("../../../../etc/passwd", false),
            ("none", false),
            ("inside", true),
            ("link", true),
        ] {
            assert_eq!(regular_in(&root, Path::new(name)).is_ok(), found, "{name}");
        }
        assert!(regular_in_no_link(&root, Path::new("link")).is_err());
        assert!(matches!(regular(&at("zero")), Err(OpenError::NotRegular)));
    }
}
