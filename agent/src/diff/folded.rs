//! Folded stacks with two counts, as tools for differential flame graphs read them: `stack before after`.

use super::compare::Difference;

/// The whole number that stands for one unit: the counts are microseconds of CPU time per second, or
/// millionths of the sum.
pub(super) const SCALE: f64 = 1e6;

/// Every stack, sorted.
pub(super) fn encode(difference: &Difference) -> Vec<u8> {
    let mut out = String::new();
    for (stack, both) in &difference.stacks {
        let (before, after) = (scaled(both.before.value), scaled(both.after.value));
        out.push_str(&format!("{stack} {before} {after}\n"));
    }
    out.into_bytes()
}

/// A value as a whole number of 1 / [`SCALE`].
pub(super) fn scaled(value: f64) -> u64 {
    (value * SCALE).round() as u64
}
