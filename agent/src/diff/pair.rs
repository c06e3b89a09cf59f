//! The two recordings: read, checked against each other, filtered alike.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::encode::folded;
use crate::profile::ResolvedProfile;
use crate::report::{self, Filter, FilterError, LoadError, MAX_FILE};

/// Why there is nothing to compare.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A `.pb.gz` could not be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// An extension that names nothing that can be compared.
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
    #[error("{path} is larger than {} MiB: no folded stacks are", MAX_FILE >> 20)]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file is no folded stacks.
    #[error("{path}: {source}")]
    Folded {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: folded::DecodeError,
    },
    /// One of each kind.
    #[error(
        "{before} and {after} are of two kinds: folded stacks tell neither time nor modules. Compare two .pb.gz, \
         or make a .folded of the other by `flamestorm report {pprof} --output …`"
    )]
    Mixed {
        /// The one.
        before: String,
        /// The other.
        after: String,
        /// Which of them is the `.pb.gz`.
        pprof: String,
    },
    /// No samples at all.
    #[error("neither {0} nor {1} holds a sample")]
    Empty(String, String),
    /// A filter that nothing fulfils.
    #[error("{name}: {source}")]
    Filter {
        /// The recording.
        name: String,
        /// The reason.
        source: FilterError,
    },
    /// A view of folded stacks.
    #[error("folded stacks are shown as they were written: --view needs two .pb.gz")]
    NoViews,
}

/// What a recording was read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `.pb.gz`
    Pprof,
    /// `.folded`
    Folded,
}

/// One of the two.
#[derive(Clone, Debug)]
pub struct Recording {
    /// What it is called.
    pub name: String,
    /// What it was read from.
    pub kind: Kind,
    /// Its samples, or those of them that are compared.
    pub profile: ResolvedProfile,
    /// All of its samples.
    pub samples: u64,
    /// The CPU time of all of its samples, nanoseconds.
    pub cpu_ns: u64,
    /// Its length, nanoseconds; 0 when unknown.
    pub duration_ns: u64,
}

impl Recording {
    /// A recording, whole.
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
/// The file cannot be read, or is none.
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

/// Two recordings of one kind, of which at least one holds samples.
#[derive(Clone, Debug)]
pub struct Pair {
    pub(super) before: Recording,
    pub(super) after: Recording,
}

impl Pair {
    /// The two together.
    ///
    /// # Errors
    /// They are of two kinds, or both empty.
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

    /// Only the samples that fulfil the conditions; there may be none in one of the two. The figures stay
    /// relative to the whole recordings.
    ///
    /// # Errors
    /// No sample of either fulfils them.
    pub fn filter(mut self, filters: &[Filter]) -> Result<Pair, Error> {
        let before = report::filter(&self.before.profile, filters);
        let after = report::filter(&self.after.profile, filters);
        if let (Err(first), Err(second)) = (&before, &after) {
            // The one that says most: a value that is not there tells what is.
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

    /// What both were read from.
    pub fn kind(&self) -> Kind {
        self.before.kind
    }

    /// Both as a view shows them.
    pub fn shown(mut self, show: impl Fn(&ResolvedProfile) -> ResolvedProfile) -> Pair {
        self.before.profile = show(&self.before.profile);
        self.after.profile = show(&self.after.profile);
        self
    }
}
