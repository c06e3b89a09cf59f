//! Who we are, and whom we become: PostgreSQL refuses to run as root, and nothing here needs to.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid, User};
use tokio::process::Command;

/// The account that is used when root did not come through sudo: it exists on every system and
/// owns nothing.
const NOBODY: &str = "nobody";

/// Where root keeps the cache of an account that has no home.
const SYSTEM_CACHE: &str = "/var/cache/flamestorm";

/// The environment variable that chooses another cache directory.
pub const CACHE_VARIABLE: &str = "FLAMESTORM_CACHE";

/// A change of user that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The name is in no user database.
    #[error("there is no user {name:?} on this machine; name another one with --user")]
    Unknown {
        /// The name asked for.
        name: String,
    },
    /// The user is root, whom PostgreSQL refuses.
    #[error("PostgreSQL refuses to run as root; name an unprivileged user with --user")]
    Root,
    /// The system refused the change.
    #[error("cannot become user {name}: {source}; run as root, or without --user")]
    Become {
        /// The user we wanted to be.
        name: String,
        /// What the system said.
        source: nix::Error,
    },
    /// A directory cannot be made, or is somebody else's.
    #[error("cannot use {path} as {name}'s cache: {reason}; choose another with {CACHE_VARIABLE}")]
    Cache {
        /// The directory.
        path: PathBuf,
        /// The user it should belong to.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

/// An account of this machine.
#[derive(Debug, Clone)]
pub struct Account {
    user: User,
}

impl Account {
    /// The account that unprivileged work is done as: `name` where given, else the caller, or,
    /// where the caller is root, the user behind sudo, or `nobody`.
    pub fn unprivileged(name: Option<&str>) -> Result<Self, UserError> {
        let account = match name {
            Some(name) => Self::named(name)?,
            None if Uid::effective().is_root() => {
                Self::behind_sudo().map_or_else(|| Self::named(NOBODY), Ok)?
            }
            None => Self::current()?,
        };
        if account.user.uid.is_root() {
            return Err(UserError::Root);
        }
        Ok(account)
    }

    /// The user who called sudo, where somebody did and was not root already.
    pub fn behind_sudo() -> Option<Self> {
        if !Uid::effective().is_root() {
            return None;
        }
        let name = std::env::var("SUDO_USER").ok()?;
        Self::named(&name)
            .ok()
            .filter(|account| !account.user.uid.is_root())
    }

    fn named(name: &str) -> Result<Self, UserError> {
        match User::from_name(name) {
            Ok(Some(user)) => Ok(Self { user }),
            _ => Err(UserError::Unknown {
                name: name.to_owned(),
            }),
        }
    }

    fn current() -> Result<Self, UserError> {
        let uid = Uid::effective();
        match User::from_uid(uid) {
            Ok(Some(user)) => Ok(Self { user }),
            _ => Err(UserError::Unknown {
                name: uid.to_string(),
            }),
        }
    }

    /// The account's name.
    pub fn name(&self) -> &str {
        &self.user.name
    }

    /// Its user and group, as numbers.
    pub fn ids(&self) -> (u32, u32) {
        (self.user.uid.as_raw(), self.user.gid.as_raw())
    }

    /// Makes this process the account's, for good: groups, group, user. Nothing to do when it is
    /// already.
    pub fn become_it(&self) -> Result<(), UserError> {
        if Uid::effective() == self.user.uid {
            return Ok(());
        }
        let change = || {
            let name = std::ffi::CString::new(self.user.name.as_bytes())
                .map_err(|_| nix::Error::EINVAL)?;
            nix::unistd::initgroups(&name, self.user.gid)?;
            nix::unistd::setgid(self.user.gid)?;
            nix::unistd::setuid(self.user.uid)
        };
        change().map_err(|source| UserError::Become {
            name: self.user.name.clone(),
            source,
        })
    }

    /// The directory for what is kept between runs; made, with its parents, where it can be.
    /// Root has to call this before [`Self::become_it`]: an account without a home gets a
    /// directory that only root can make.
    pub fn cache(&self) -> Result<PathBuf, UserError> {
        if let Some(cache) = std::env::var_os(CACHE_VARIABLE).filter(|cache| !cache.is_empty()) {
            return Ok(cache.into());
        }
        let own = Uid::effective() == self.user.uid;
        if own && let Some(cache) = std::env::var_os("XDG_CACHE_HOME").filter(|c| !c.is_empty()) {
            return Ok(Path::new(&cache).join("flamestorm"));
        }
        let home = &self.user.dir;
        let has_home = fs::metadata(home).is_ok_and(|home| home.uid() == self.user.uid.as_raw());
        if has_home {
            return Ok(home.join(".cache/flamestorm"));
        }
        let path = PathBuf::from(SYSTEM_CACHE);
        self.own(&path).map_err(|error| UserError::Cache {
            path: path.clone(),
            name: self.user.name.clone(),
            reason: error.to_string(),
        })?;
        Ok(path)
    }

    /// Makes `path` if it is not there, and checks whose it is.
    fn own(&self, path: &Path) -> io::Result<()> {
        let (uid, gid) = self.ids();
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) if Uid::effective().is_root() => {
                std::os::unix::fs::chown(path, Some(uid), Some(gid))?;
            }
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let metadata = fs::symlink_metadata(path)?;
        if metadata.is_dir() && metadata.uid() == uid {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "it belongs to user {}",
            metadata.uid()
        )))
    }
}

/// Gives `path` to the user behind sudo, where there is one: what a user's command writes is
/// the user's.
pub fn give_to_sudo_user(path: &Path) -> io::Result<()> {
    let Some(account) = Account::behind_sudo() else {
        return Ok(());
    };
    let (uid, _) = account.ids();
    let gid = std::env::var("SUDO_GID")
        .ok()
        .and_then(|gid| gid.parse().ok())
        .map_or(account.user.gid, Gid::from_raw);
    std::os::unix::fs::lchown(path, Some(uid), Some(gid.as_raw()))
}

/// Has a service become `user` where we are root: a web service has no need of that.
pub(crate) fn without_root(command: &mut Command, user: Option<&str>) -> Result<(), UserError> {
    if Uid::effective().is_root() {
        let account = Account::unprivileged(user)?;
        command.args(["--user", account.name()]);
    }
    Ok(())
}
