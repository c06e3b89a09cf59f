//! Reads a profile from its file, for `flamestorm report`.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::encode::pprof::{self, DecodeError};
use crate::profile::ResolvedProfile;

/// The maximum number of bytes that are read of a file. The unpacked data has a bound of its own
/// ([`pprof::MAX_UNPACKED`]).
pub const MAX_FILE: u64 = pprof::MAX_UNPACKED;

/// Why a profile could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be read.
    #[error("{path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is too large to be a profile.
    #[error("{path} is larger than {} MiB, which is too large for a profile", MAX_FILE >> 20)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is not a profile, or it is damaged.
    #[error("{path} is not a readable profile: {source}; expected a .pb.gz written by flamestorm")]
    Decode {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: DecodeError,
    },
}

/// Reads a `.pb.gz`.
///
/// # Errors
/// The file cannot be read, is too large, or is damaged.
pub fn load(path: &Path) -> Result<ResolvedProfile, LoadError> {
    let read = |source| LoadError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(read)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(LoadError::TooLarge {
            path: path.to_owned(),
        });
    }
    pprof::decode(&bytes).map_err(|source| LoadError::Decode {
        path: path.to_owned(),
        source,
    })
}
