//! Folded stacks: `comm;root;…;leaf count`, one line per stack, sorted.
//!
//! The format has no escapes. As in other tools (stackcollapse-perf), a `;` in a name becomes `:`; a line
//! break or another control character becomes a space. Kernel frames end in `_[k]`. A number at the end of
//! a leaf is preceded by a no-break space.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::profile::{
    FrameRef, Function, FunctionId, Line, Location, LocationId, Mapping, MappingId,
    ResolvedProfile, ResolvedSample, key,
};

/// The suffix of a kernel frame.
pub const KERNEL_SUFFIX: &str = "_[k]";

/// The profile as folded stacks.
pub fn encode(profile: &ResolvedProfile) -> Vec<u8> {
    let mut out = String::new();
    for (stack, count) in lines(profile) {
        out.push_str(&stack);
        out.push(' ');
        out.push_str(&count.to_string());
        out.push('\n');
    }
    out.into_bytes()
}

/// The distinct stacks with their counts, sorted.
pub(super) fn lines(profile: &ResolvedProfile) -> BTreeMap<String, u64> {
    let mut lines = BTreeMap::new();
    for sample in &profile.samples {
        let stack = stack(profile, sample);
        *lines
            .entry(unambiguous(&stack).unwrap_or(stack))
            .or_insert(0) += sample.count;
    }
    lines
}

/// A sample's stack as one line, without its count.
pub(crate) fn stack(profile: &ResolvedProfile, sample: &ResolvedSample) -> String {
    let mut line = root_name(sample).into_owned();
    let frames: Vec<_> = profile.frames(sample).collect();
    for frame in frames.iter().rev() {
        line.push(';');
        line.push_str(&frame_name(frame));
    }
    line
}

/// Reads folded stacks that were written by this crate or by another tool. The format has no modules,
/// files, labels or times. The first name of a stack becomes the name of the process, and frames that end
/// in `_[k]` become the kernel's.
pub fn decode(bytes: &[u8]) -> Result<ResolvedProfile, DecodeError> {
    let text = String::from_utf8_lossy(bytes);
    let mut reader = Reader::default();
    for (line, number) in text.lines().zip(1..) {
        // Other readers of the format skip these lines, too.
        if line.trim().is_empty() || line.starts_with("# ") {
            continue;
        }
        let sample = reader
            .sample(line)
            .ok_or_else(|| DecodeError::NoCount(number, excerpt(line)))?;
        reader.profile.samples.push(sample);
    }
    if reader.profile.samples.is_empty() {
        return Err(DecodeError::Empty);
    }
    Ok(reader.profile)
}

/// Why a text is not folded stacks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A line that is not `frame;frame;… count`.
    #[error("line {0} ({1:?}) does not end in a count, so these are not folded stacks")]
    NoCount(usize, String),
    /// The text contains no stacks.
    #[error("it contains no stacks")]
    Empty,
}

/// The beginning of a line, for a message.
fn excerpt(line: &str) -> String {
    const SHOWN: usize = 40;
    line.chars().take(SHOWN).collect()
}

/// The profile that is being read, and what is needed to add to it.
#[derive(Default)]
struct Reader {
    profile: ResolvedProfile,
    locations: HashMap<String, LocationId>,
    /// The module of everything outside the kernel, and the module of the kernel.
    mappings: [Option<MappingId>; 2],
}

impl Reader {
    fn sample(&mut self, line: &str) -> Option<ResolvedSample> {
        let (stack, count) = line.trim_end().rsplit_once(' ')?;
        let count = count.parse().ok()?;
        let (comm, frames) = stack.split_once(';').unwrap_or((stack, ""));
        let frames = frames.rsplit(';').filter(|frame| !frame.is_empty());
        let stack = frames.map(|frame| self.location(frame)).collect();
        Some(ResolvedSample {
            labels: Arc::from([(Arc::from(key::COMM), Arc::from(comm))]),
            stack,
            count,
            cpu_ns: 0,
            executions: 0,
        })
    }

    fn location(&mut self, frame: &str) -> LocationId {
        if let Some(known) = self.locations.get(frame) {
            return *known;
        }
        let (name, is_kernel) = match frame.strip_suffix(KERNEL_SUFFIX) {
            Some(name) => (name, true),
            None => (frame, false),
        };
        let mapping = self.mapping(is_kernel);
        let profile = &mut self.profile;
        profile.functions.push(Function {
            name: Arc::from(name),
            system_name: Arc::from(name),
            file: Arc::from(""),
        });
        profile.locations.push(Location {
            mapping,
            address: 0,
            lines: vec![Line {
                function: FunctionId(profile.functions.len() as u32 - 1),
                line: 0,
            }],
        });
        let id = LocationId(profile.locations.len() as u32 - 1);
        self.locations.insert(frame.to_owned(), id);
        id
    }

    fn mapping(&mut self, is_kernel: bool) -> MappingId {
        let mappings = &mut self.profile.mappings;
        *self.mappings[usize::from(is_kernel)].get_or_insert_with(|| {
            mappings.push(Mapping {
                name: Arc::from(if is_kernel { "[kernel]" } else { "" }),
                build_id: Arc::from(""),
                is_kernel,
            });
            MappingId(mappings.len() as u32 - 1)
        })
    }
}

/// The escaped name at the root: the name of the process, or its pid if the name is not known. The root of
/// a stitched stack is the calling process.
pub(super) fn root_name(sample: &ResolvedSample) -> Cow<'_, str> {
    if let Some(caller) = sample.label(key::CALLER_COMM) {
        return escape(caller);
    }
    match (sample.label(key::COMM), sample.label(key::PID)) {
        (Some(comm), _) if !comm.is_empty() => escape(comm),
        (_, Some(pid)) => Cow::Owned(format!("[pid {pid}]")),
        _ => Cow::Borrowed("[no process]"),
    }
}

/// A frame's escaped name. A kernel frame gets [`KERNEL_SUFFIX`].
pub(super) fn frame_name<'a>(frame: &FrameRef<'a>) -> Cow<'a, str> {
    let name = escape(&frame.function.name);
    if frame.mapping.is_kernel {
        Cow::Owned(format!("{name}{KERNEL_SUFFIX}"))
    } else {
        name
    }
}

fn escape(name: &str) -> Cow<'_, str> {
    if !name.contains(|c: char| c == ';' || c.is_control()) {
        return Cow::Borrowed(name);
    }
    let escaped = name.chars().map(|c| match c {
        ';' => ':',
        c if c.is_control() => ' ',
        c => c,
    });
    Cow::Owned(escaped.collect())
}

/// A leaf that ends in a number, as in `LIMIT 20`, with a no-break space before that number. With an
/// ordinary space, the number would be read as the first of the two counts of a difference. `None` if the
/// leaf does not end in a number.
pub(super) fn unambiguous(leaf: &str) -> Option<String> {
    let (name, last) = leaf.rsplit_once(' ')?;
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    (!last.is_empty() && last.chars().all(is_number)).then(|| format!("{name}\u{a0}{last}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No name can break a line or add a frame.
    #[test]
    fn separators_are_escaped() {
        assert_eq!(
            escape("core::array::<[T; 4]>::map"),
            "core::array::<[T: 4]>::map"
        );
        assert_eq!(escape("a\nb\r\tc"), "a b  c");
        assert!(matches!(escape("plain name"), Cow::Borrowed(_)));
    }
    /// Stacks that were written can be read again. For anything else, the error names the line.
    #[test]
    fn decoded() {
        let text = "a b;main;read_[k] 3\n# comment\n\na b;main 4\nidle 1\n";
        let profile = decode(text.as_bytes()).unwrap();
        let again = String::from_utf8(encode(&profile)).unwrap();
        assert_eq!(again, "a b;main 4\na b;main;read_[k] 3\nidle 1\n");
        assert_eq!(profile.functions.len(), 2);
        assert_eq!(decode(b"# nothing\n"), Err(DecodeError::Empty));
        let refused = decode(b"a;b 1\nhello, world\n").unwrap_err();
        assert!(refused.to_string().starts_with("line 2 (\"hello, world\")"));
        assert!(decode(b"a;b -1").is_err() && decode(b"7").is_err());
    }
}
