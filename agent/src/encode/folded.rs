//! Folded stacks: `comm;root;…;leaf count`, one line a stack, sorted.
//!
//! The format has no escapes. Like the tools that came before (stackcollapse-perf), a `;` in a name
//! becomes `:`; a line break or another control character becomes a space. Kernel frames end in
//! `_[k]`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::profile::{FrameRef, ResolvedProfile, ResolvedSample, key};

/// Marks a kernel frame.
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
        let mut line = escape(&root_name(sample)).into_owned();
        let frames: Vec<_> = profile.frames(sample).collect();
        for frame in frames.iter().rev() {
            line.push(';');
            line.push_str(&frame_name(frame));
        }
        *lines.entry(line).or_insert(0) += sample.count;
    }
    lines
}

/// The name at the root: the process's, or its pid where the name could not be learnt. A stitched stack
/// begins in the caller.
pub(super) fn root_name(sample: &ResolvedSample) -> Cow<'_, str> {
    if let Some(caller) = sample.label(key::CALLER_COMM) {
        return Cow::Borrowed(caller);
    }
    match (sample.label(key::COMM), sample.label(key::PID)) {
        (Some(comm), _) if !comm.is_empty() => Cow::Borrowed(comm),
        (_, Some(pid)) => Cow::Owned(format!("[pid {pid}]")),
        _ => Cow::Borrowed("[no process]"),
    }
}

/// A frame's name, escaped, the kernel's marked.
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
}
