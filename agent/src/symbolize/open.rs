//! Opens files whose paths another user chose.
//!
//! The opening itself is done by [`crate::file`]. This module adds the reason why a file is not read.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use crate::file::{find_beneath, open_found};

/// Why a file is not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    /// No file has this name.
    #[error("does not exist")]
    Missing,
    /// It is a device, a directory, a FIFO or the like.
    #[error("is not a regular file")]
    NotRegular,
    /// The kernel refuses to open it, for example because a link leads outside the root.
    #[error("cannot be opened: {0}")]
    Io(io::Error),
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> OpenError {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => OpenError::Missing,
            io::ErrorKind::InvalidInput => OpenError::NotRegular,
            _ if error.raw_os_error() == Some(libc::ESRCH) => OpenError::Missing,
            _ => OpenError::Io(error),
        }
    }
}

/// Opens a regular file by a path of this machine. Symbolic links are followed, but magic links
/// (`/proc/PID/fd/…`) are not.
pub(super) fn regular(path: &Path) -> Result<File, OpenError> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_MAGICLINKS;
    let found = rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve);
    Ok(open_found(found.map_err(io::Error::from)?)?)
}

/// Opens a regular file below a directory, which is the root for every link on the way.
pub(super) fn regular_in(root: impl AsFd, path: &Path) -> Result<File, OpenError> {
    Ok(open_found(find_beneath(root, path, OFlags::empty())?)?)
}

/// Opens a regular file as [`regular_in`] does, but refuses a file whose own name is a link.
pub(super) fn regular_in_no_link(root: impl AsFd, path: &Path) -> Result<File, OpenError> {
    Ok(open_found(find_beneath(root, path, OFlags::NOFOLLOW)?)?)
}

/// Opens a directory to use it as a root for lookups.
pub(super) fn directory(path: &Path) -> Result<File, OpenError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    Ok(opened.map_err(io::Error::from)?.into())
}

/// A path to an open file that stays valid when the file's name has been removed.
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
