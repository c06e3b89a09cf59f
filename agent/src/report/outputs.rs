//! Output files: checked before the recording, and written completely or not at all.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::encode::{folded, pprof, svg};
use crate::profile::ResolvedProfile;

/// The format of a file, which its extension names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `.svg`: interactive flame graph.
    Svg,
    /// `.folded`: folded stacks.
    Folded,
    /// `.pb.gz`: pprof, the file of record.
    Pprof,
}

impl Format {
    fn of(path: &Path) -> Result<Format, OutputError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".svg") {
            Ok(Format::Svg)
        } else if name.ends_with(".folded") {
            Ok(Format::Folded)
        } else if name.ends_with(".pb.gz") {
            Ok(Format::Pprof)
        } else {
            Err(OutputError::UnknownExtension {
                path: path.to_owned(),
            })
        }
    }

    /// The profile in this format.
    ///
    /// # Errors
    /// See [`svg::encode`].
    pub fn encode(self, profile: &ResolvedProfile) -> Result<Vec<u8>, svg::SvgError> {
        match self {
            Format::Svg => svg::encode(profile),
            Format::Folded => Ok(folded::encode(profile)),
            Format::Pprof => Ok(pprof::encode(profile)),
        }
    }
}

/// Why an output cannot be written. The message says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// An extension that names no format.
    #[error(
        "{path}: the extension names no format: use .svg, .folded, .pb.gz, or - for folded stacks \
         on standard output"
    )]
    UnknownExtension {
        /// The output.
        path: PathBuf,
    },
    /// The same output was given twice.
    #[error("{path} is given as an output twice: leave one out")]
    Twice {
        /// The output.
        path: PathBuf,
    },
    /// The output is a directory.
    #[error("{path} is a directory: name a file in it, for example {path}/flamestorm.svg")]
    IsDirectory {
        /// The output.
        path: PathBuf,
    },
    /// The output's directory does not exist, or the output cannot be written.
    #[error("{path} cannot be written: {source}; {way_out}")]
    Unwritable {
        /// The output.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
        /// What to do.
        way_out: &'static str,
    },
    /// The output of a difference is a `.pb.gz`, which can only hold a recording.
    #[error(
        "{path}: a difference is not a recording: use .svg, .folded, or - for folded stacks on standard output"
    )]
    NoRecording {
        /// The output.
        path: PathBuf,
    },
    /// The picture could not be drawn.
    #[error("{path}: {source}; the .pb.gz and .folded outputs are not affected")]
    Encode {
        /// The output.
        path: PathBuf,
        /// The reason.
        source: svg::SvgError,
    },
}

impl OutputError {
    fn unwritable(path: &Path, source: io::Error) -> OutputError {
        let way_out = match source.kind() {
            io::ErrorKind::NotFound => "create its directory first",
            io::ErrorKind::PermissionDenied => "choose a directory that you may write, by --output",
            io::ErrorKind::ReadOnlyFilesystem => "choose another file system, by --output",
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                "make room, or choose another file system, by --output"
            }
            _ => "choose another place, by --output",
        };
        OutputError::Unwritable {
            path: path.to_owned(),
            source,
            way_out,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Stdout,
    Path(PathBuf),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Output {
    target: Target,
    format: Format,
}

/// The outputs of a recording.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outputs(Vec<Output>);

/// A file that was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its path.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
}

/// The result of writing all outputs.
#[derive(Debug, Default)]
pub struct WriteReport {
    /// The files that were written.
    pub written: Vec<Written>,
    /// Why other outputs were not written. The failure of one output does not prevent the others.
    pub errors: Vec<OutputError>,
    /// Where the profile was saved instead, if an output failed and no `.pb.gz` was written, so that a full
    /// disk does not lose the recording.
    pub rescued: Option<Written>,
}

/// A recording whose frames have no names yet, saved on disk while the names are looked up. A temporary
/// file is removed when this is dropped.
#[derive(Debug)]
pub struct Unnamed {
    /// Its path.
    pub path: PathBuf,
    temporary: Option<tempfile::TempPath>,
}

impl Unnamed {
    /// Keeps a temporary file on disk.
    pub fn keep(mut self) {
        if let Some(temporary) = self.temporary.take() {
            // This only disables the removal, which cannot fail on Unix.
            let _ = temporary.keep();
        }
    }
}

impl WriteReport {
    /// The paths of the files that were written, for `Summary::files`.
    pub fn files(&self) -> Vec<String> {
        self.written
            .iter()
            .chain(&self.rescued)
            .map(|written| written.path.display().to_string())
            .collect()
    }
}

impl Outputs {
    /// Parses the values of `--output`. `-` means folded stacks on standard output.
    pub fn parse(paths: &[PathBuf]) -> Result<Outputs, OutputError> {
        let mut outputs = Vec::new();
        for path in paths {
            let output = if path == Path::new("-") {
                Output {
                    target: Target::Stdout,
                    format: Format::Folded,
                }
            } else {
                Output {
                    target: Target::Path(path.clone()),
                    format: Format::of(path)?,
                }
            };
            if outputs.contains(&output) {
                return Err(OutputError::Twice { path: path.clone() });
            }
            outputs.push(output);
        }
        Ok(Outputs(outputs))
    }

    /// Whether folded stacks are written to standard output, so that the table must be printed elsewhere.
    pub fn uses_stdout(&self) -> bool {
        self.0.iter().any(|output| output.target == Target::Stdout)
    }

    /// Whether there are no outputs.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Checks, before anything is recorded, that each output can be written. Leaves no files behind and
    /// does not change existing ones.
    pub fn preflight(&self) -> Result<(), OutputError> {
        for output in &self.0 {
            if let Target::Path(path) = &output.target {
                check(path)?;
            }
        }
        Ok(())
    }

    /// Refuses outputs in a format that a difference cannot be written in.
    pub fn refuse_recordings(&self) -> Result<(), OutputError> {
        for output in &self.0 {
            if let (Format::Pprof, Target::Path(path)) = (output.format, &output.target) {
                return Err(OutputError::NoRecording { path: path.clone() });
            }
        }
        Ok(())
    }

    /// Writes every output, each completely or not at all. `shown` is the part of `profile` that pictures
    /// and folded stacks show; a `.pb.gz` contains all of `profile`.
    pub fn write(&self, profile: &ResolvedProfile, shown: &ResolvedProfile) -> WriteReport {
        let mut report = self.write_each(|format| {
            format.encode(match format {
                Format::Pprof => profile,
                Format::Svg | Format::Folded => shown,
            })
        });
        let kept = report.written.iter().any(|written| {
            let format = Format::of(&written.path);
            matches!(format, Ok(Format::Pprof))
        });
        if !kept && !report.errors.is_empty() {
            report.rescued = rescue(profile);
        }
        report
    }

    /// Writes a recording that has no names yet to the path of the `.pb.gz`, so that it is not lost if the
    /// lookup of names fails. Without a `.pb.gz` among the outputs, it is written to a temporary file, in
    /// the directory for temporary files or else beside the first output.
    pub fn write_unnamed(&self, profile: &ResolvedProfile) -> Result<Unnamed, OutputError> {
        let bytes = pprof::encode(profile);
        let mut paths = self.0.iter().filter_map(|output| match &output.target {
            // A device or a FIFO can take only one recording.
            Target::Path(path) if !is_special(path) => Some((output.format, path)),
            _ => None,
        });
        if let Some((_, path)) = paths.clone().find(|(format, _)| *format == Format::Pprof) {
            write_path(path, &bytes).map_err(|source| OutputError::unwritable(path, source))?;
            return Ok(Unnamed {
                path: path.clone(),
                temporary: None,
            });
        }
        // The disk of the outputs is tried last, because the outputs themselves will need space there.
        let beside = paths.next().map(|(_, path)| directory_of(&real_path(path)));
        let mut result = Err(io::ErrorKind::NotFound.into());
        let mut place = PathBuf::new();
        for directory in [std::env::temp_dir()].into_iter().chain(beside) {
            result = write_temporary(&directory, &bytes);
            place = directory;
            if result.is_ok() {
                break;
            }
        }
        let temporary =
            result.map_err(|error| OutputError::unwritable(&place, without_path(error)))?;
        Ok(Unnamed {
            path: temporary.to_path_buf(),
            temporary: Some(temporary),
        })
    }

    /// Writes every output, each completely or not at all. `encode` makes the content for a format.
    pub fn write_each(
        &self,
        encode: impl Fn(Format) -> Result<Vec<u8>, svg::SvgError>,
    ) -> WriteReport {
        let mut report = WriteReport::default();
        for output in &self.0 {
            match write(output, &encode) {
                Ok(written) => report.written.extend(written),
                Err(error) => report.errors.push(error),
            }
        }
        report
    }
}

fn check(path: &Path) -> Result<(), OutputError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => {
            return Err(OutputError::IsDirectory {
                path: path.to_owned(),
            });
        }
        // A device or FIFO is opened when there is something to write.
        Ok(metadata) if !metadata.is_file() => return Ok(()),
        _ => {}
    }
    temporary_beside(&real_path(path))
        .map(drop)
        .map_err(|source| OutputError::unwritable(path, source))
}

fn write(
    output: &Output,
    encode: impl Fn(Format) -> Result<Vec<u8>, svg::SvgError>,
) -> Result<Option<Written>, OutputError> {
    let name = match &output.target {
        Target::Stdout => Path::new("standard output"),
        Target::Path(path) => path,
    };
    let bytes = encode(output.format).map_err(|source| OutputError::Encode {
        path: name.to_owned(),
        source,
    })?;
    match &output.target {
        Target::Stdout => match io::stdout().lock().write_all(&bytes) {
            // The reader closed the pipe early (`| head`), which is not an error.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(None),
            result => result
                .map(|()| None)
                .map_err(|source| OutputError::unwritable(name, source)),
        },
        Target::Path(path) => write_path(path, &bytes)
            .map(|()| Some(written(path, &bytes)))
            .map_err(|source| OutputError::unwritable(path, source)),
    }
}

fn written(path: &Path, bytes: &[u8]) -> Written {
    Written {
        path: path.to_owned(),
        bytes: bytes.len() as u64,
    }
}

fn write_path(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if is_special(path) {
        // Renaming over a device would replace it.
        return File::options().write(true).open(path)?.write_all(bytes);
    }
    write_atomically(&real_path(path), bytes).map_err(without_path)
}

/// Whether a path is a FIFO or a device.
fn is_special(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| {
        let kind = metadata.file_type();
        kind.is_fifo() || kind.is_char_device() || kind.is_block_device()
    })
}

/// The system's error without the path of the temporary file, which `tempfile` adds and which means nothing
/// to the user.
fn without_path(error: io::Error) -> io::Error {
    if error.raw_os_error().is_some() {
        return error;
    }
    let text = error.to_string();
    let reason = text.split(" at path ").next().unwrap_or_default();
    io::Error::new(error.kind(), reason.to_owned())
}

fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The target of a link, so that the link itself is kept; the path itself if nothing exists there yet.
fn real_path(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// A temporary file in the same directory, so that it can be renamed over its target.
fn temporary_beside(path: &Path) -> io::Result<tempfile::NamedTempFile> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".");
    tempfile::Builder::new()
        .prefix(&name)
        .suffix(".part")
        // The mode of any new file, which the umask reduces.
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(directory_of(path))
        .map_err(without_path)
}

fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = temporary_beside(path)?;
    file.as_file_mut().write_all(bytes)?;
    // A full disk may be reported only here.
    file.as_file().sync_data()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

fn write_temporary(directory: &Path, bytes: &[u8]) -> io::Result<tempfile::TempPath> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("flamestorm-").suffix(".pb.gz");
    let file = builder.tempfile_in(directory)?;
    file.as_file().write_all(bytes)?;
    Ok(file.into_temp_path())
}

/// Saves the profile in the directory for temporary files.
fn rescue(profile: &ResolvedProfile) -> Option<Written> {
    let file = tempfile::Builder::new()
        .prefix("flamestorm-")
        .suffix(".pb.gz")
        .tempfile()
        .ok()?;
    let bytes = pprof::encode(profile);
    file.as_file().write_all(&bytes).ok()?;
    let (_, path) = file.keep().ok()?;
    Some(written(&path, &bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(paths: &[&str]) -> Result<Outputs, OutputError> {
        let paths: Vec<_> = paths.iter().map(PathBuf::from).collect();
        Outputs::parse(&paths)
    }

    #[test]
    fn formats_by_extension() {
        let outputs = parse(&["a.svg", "d/b.folded", "c.pb.gz", "-"]).unwrap();
        let formats: Vec<_> = outputs.0.iter().map(|output| output.format).collect();
        assert_eq!(
            formats,
            [Format::Svg, Format::Folded, Format::Pprof, Format::Folded]
        );
        assert!(outputs.uses_stdout());
        for wrong in ["a.png", "svg", "x.gz", ".."] {
            let error = parse(&[wrong]).unwrap_err().to_string();
            assert!(error.contains(wrong) && error.contains(".pb.gz"), "{error}");
        }
        assert!(matches!(
            parse(&["a.svg", "a.svg"]),
            Err(OutputError::Twice { .. })
        ));
    }

    /// A recording without names is written to the `.pb.gz` itself, otherwise to a temporary file, which is
    /// removed.
    #[test]
    fn unnamed_recordings() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let files = || fs::read_dir(dir.path()).unwrap().count();
        let profile = ResolvedProfile::default();
        let outputs = Outputs::parse(&[at("a.svg")]).unwrap();
        let unnamed = outputs.write_unnamed(&profile).unwrap();
        assert!(crate::report::load(&unnamed.path).is_ok());
        let temporary = unnamed.path.clone();
        drop(unnamed);
        assert!(!temporary.exists());
        assert_eq!(files(), 0);
        let outputs = Outputs::parse(&[at("a.svg"), at("a.pb.gz")]).unwrap();
        drop(outputs.write_unnamed(&profile).unwrap());
        assert!(crate::report::load(&at("a.pb.gz")).is_ok());
        assert_eq!(files(), 1);
        let outputs = Outputs::parse(&[at("none/a.pb.gz")]).unwrap();
        let error = outputs.write_unnamed(&profile).unwrap_err().to_string();
        assert!(
            error.contains("none/a.pb.gz") && !error.contains(".part"),
            "{error}"
        );
    }

    /// A missing directory is found before the recording, and the error says what to do. An existing output
    /// and its directory are left unchanged.
    #[test]
    fn preflight_touches_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let old = dir.path().join("old.svg");
        fs::write(&old, "old").unwrap();
        let missing = dir.path().join("none/a.svg");
        let error = Outputs::parse(std::slice::from_ref(&missing))
            .unwrap()
            .preflight()
            .unwrap_err()
            .to_string();
        assert!(error.contains("none/a.svg"), "{error}");
        assert!(error.contains("create its directory"), "{error}");
        Outputs::parse(std::slice::from_ref(&old))
            .unwrap()
            .preflight()
            .unwrap();
        assert_eq!(fs::read(&old).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let directory = dir.path().join("d.svg");
        fs::create_dir(&directory).unwrap();
        let outputs = Outputs::parse(&[directory]).unwrap();
        assert!(matches!(
            outputs.preflight(),
            Err(OutputError::IsDirectory { .. })
        ));
    }

    /// Links stay links, devices stay devices, and nothing is left beside the output.
    #[test]
    fn writes_through_links_and_to_devices() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real.folded");
        let link = dir.path().join("link.folded");
        fs::write(&real, "old").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        write_path(&link, b"new").unwrap();
        assert_eq!(fs::read(&real).unwrap(), b"new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        let null = dir.path().join("null.folded");
        std::os::unix::fs::symlink("/dev/null", &null).unwrap();
        write_path(&null, b"gone").unwrap();
        assert!(
            fs::metadata("/dev/null")
                .unwrap()
                .file_type()
                .is_char_device()
        );
    }

    /// The failure of one output loses neither the others nor the recording.
    #[test]
    fn a_failed_output_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let good = dir.path().join("a.folded");
        let full = dir.path().join("full.svg");
        std::os::unix::fs::symlink("/dev/full", &full).unwrap();
        let outputs = Outputs::parse(&[full, good.clone()]).unwrap();
        let nothing = ResolvedProfile::default();
        let report = outputs.write(&nothing, &nothing);
        assert_eq!(report.written.len(), 1);
        let error = report.errors[0].to_string();
        assert!(
            error.contains("full.svg") && error.contains("make room"),
            "{error}"
        );
        let rescued = report.rescued.unwrap();
        assert!(pprof::decode(&fs::read(&rescued.path).unwrap()).is_ok());
        fs::remove_file(rescued.path).unwrap();
        assert!(good.exists());
    }
}
