//! Durations, from a histogram that a kernel program keeps.

use agent_ebpf::postgres::TIME_STEP_BITS;

/// The median of a histogram of durations, nanoseconds. All steps are 2 to the power of
/// [`TIME_STEP_BITS`] nanoseconds long, and the durations within a step are taken to be spread
/// evenly. `None` if the histogram is empty.
pub fn median(counts: &[u64]) -> Option<f64> {
    let half = counts.iter().sum::<u64>() as f64 / 2.0;
    let mut before = 0.0;
    for (step, count) in counts.iter().enumerate() {
        let count = *count as f64;
        if count > 0.0 && before + count >= half {
            let steps = step as f64 + (half - before) / count;
            return Some(steps * f64::from(1u32 << TIME_STEP_BITS));
        }
        before += count;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[0, 0]), None);
        assert_eq!(median(&[0, 1]), Some(1.5 * 512.0));
        assert_eq!(median(&[0, 2, 0, 2]), Some(2.0 * 512.0));
        // Three of the four durations are in the last step, and the median lies after a third of them.
        assert_eq!(median(&[1, 3]), Some(512.0 * (1.0 + 1.0 / 3.0)));
        assert_eq!(median(&[1, 0, 0, 100]).map(f64::floor), Some(1789.0));
    }
}
