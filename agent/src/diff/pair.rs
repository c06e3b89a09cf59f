//! The two recordings: read, checked against each other, and filtered by the same conditions.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::encode::folded;
use crate::profile::ResolvedProfile;
use crate::report::{self, Filter, FilterError, LoadError, MAX_FILE};

/// Why two recordings cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A `.pb.gz` could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The extension is not that of a recording that can be compared.
    #[error("{0}: recordings to compare are .pb.gz or .folded files")]
    UnknownExtension(PathBuf),
    /// A `.folded` could not be read.
    #[error("{path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is too large.
    #[error("{path} is larger than {} MiB, which is too large for folded stacks", MAX_FILE >> 20)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file does not contain folded stacks.
    #[error("{path}: {source}")]
    Folded {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: folded::DecodeError,
    },
    /// One is a `.pb.gz` and the other a `.folded`.
    #[error(
        "{before} and {after} are of different kinds: folded stacks contain neither times nor modules. \
         Compare two .pb.gz, or two .folded: `flamestorm report {pprof} --output …` makes a .folded of the .pb.gz"
    )]
    Mixed {
        /// The recording before.
        before: String,
        /// The recording after.
        after: String,
        /// Which of them is the `.pb.gz`.
        pprof: String,
    },
    /// Neither recording contains a sample.
    #[error("neither {0} nor {1} contains a sample")]
    Empty(String, String),
    /// No sample fulfils the filters.
    #[error("{name}: {source}")]
    Filter {
        /// The recording.
        name: String,
        /// The reason.
        source: FilterError,
    },
    /// A view was requested of folded stacks.
    #[error("folded stacks are shown as they were written: --view needs two .pb.gz")]
    NoViews,
}

/// The kind of file that a recording was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `.pb.gz`
    Pprof,
    /// `.folded`
    Folded,
}

/// One of the two recordings.
#[derive(Clone, Debug)]
pub struct Recording {
    /// Its name.
    pub name: String,
    /// The kind of file that it was read from.
    pub kind: Kind,
    /// Its samples; after filtering, those that are compared.
    pub profile: ResolvedProfile,
    /// The number of all of its samples.
    pub samples: u64,
    /// The CPU time of all of its samples, nanoseconds.
    pub cpu_ns: u64,
    /// Its length, nanoseconds; 0 if unknown.
    pub duration_ns: u64,
}

impl Recording {
    /// A whole recording, before filtering.
    pub fn new(name: String, kind: Kind, profile: ResolvedProfile) -> Recording {
        Recording {
            name,
            kind,
            samples: profile.total_count(),
            cpu_ns: profile.samples.iter().map(|sample| sample.cpu_ns).sum(),
            duration_ns: profile.meta.duration_ns,
            profile,
        }
    }
}

/// Reads a `.pb.gz` or a `.folded`.
///
/// # Errors
/// The file cannot be read, or is not a recording.
pub fn load(path: &Path) -> Result<Recording, Error> {
    let name = path.display().to_string();
    if name.ends_with(".pb.gz") {
        let profile = report::load(path)?;
        return Ok(Recording::new(name, Kind::Pprof, profile));
    }
    if !name.ends_with(".folded") {
        return Err(Error::UnknownExtension(path.to_owned()));
    }
    let read = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(read)?;
    file.take(MAX_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(Error::TooLarge {
            path: path.to_owned(),
        });
    }
    let profile = folded::decode(&bytes).map_err(|source| Error::Folded {
        path: path.to_owned(),
        source,
    })?;
    Ok(Recording::new(name, Kind::Folded, profile))
}

/// Two recordings of the same kind, at least one of which contains samples.
#[derive(Clone, Debug)]
pub struct Pair {
    pub(super) before: Recording,
    pub(super) after: Recording,
}

impl Pair {
    /// Makes a pair of two recordings.
    ///
    /// # Errors
    /// They are of different kinds, or both are empty.
    pub fn of(before: Recording, after: Recording) -> Result<Pair, Error> {
        if before.kind != after.kind {
            let pprof = match before.kind {
                Kind::Pprof => before.name.clone(),
                Kind::Folded => after.name.clone(),
            };
            return Err(Error::Mixed {
                before: before.name,
                after: after.name,
                pprof,
            });
        }
        if before.samples == 0 && after.samples == 0 {
            return Err(Error::Empty(before.name, after.name));
        }
        Ok(Pair { before, after })
    }

    /// Keeps only the samples that fulfil the conditions. One of the two recordings may have none. The
    /// figures remain relative to the whole recordings.
    ///
    /// # Errors
    /// No sample of either recording fulfils them.
    pub fn filter(mut self, filters: &[Filter]) -> Result<Pair, Error> {
        let before = report::filter(&self.before.profile, filters);
        let after = report::filter(&self.after.profile, filters);
        if let (Err(first), Err(second)) = (&before, &after) {
            // Of the two errors, the more informative one is reported: an error about a value lists the
            // values that exist.
            let unknown_key = matches!(first, FilterError::UnknownKey { .. });
            let (name, source) = if unknown_key {
                (&self.after.name, second)
            } else {
                (&self.before.name, first)
            };
            return Err(Error::Filter {
                name: name.clone(),
                source: source.clone(),
            });
        }
        self.before.profile = before.unwrap_or_default();
        self.after.profile = after.unwrap_or_default();
        Ok(self)
    }

    /// The kind of file that both were read from.
    pub fn kind(&self) -> Kind {
        self.before.kind
    }

    /// Both recordings as a view shows them.
    pub fn shown(mut self, show: impl Fn(&ResolvedProfile) -> ResolvedProfile) -> Pair {
        self.before.profile = show(&self.before.profile);
        self.after.profile = show(&self.after.profile);
        self
    }
}
