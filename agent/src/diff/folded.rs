//! Folded stacks with two columns, as tools for differential flame graphs read them: `stack before after`.

use super::compare::Difference;

/// Whole numbers for one of the unit: microseconds of CPU time a second, or millionths of the sum.
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

/// As a whole number.
pub(super) fn scaled(value: f64) -> u64 {
    (value * SCALE).round() as u64
}
