//! The arithmetic of a calibration, and what counts as success.

use crate::calibration::Measured;
use crate::catalogue::MAX_PRODUCTS;
use crate::storm::StormReport;
use crate::storm::plan::QUERIES_OF_A_ROUND;

/// The 95th percentile that is aimed at. The scenario's 2.8 s would be too near to the cliff: from
/// 3.2 s on the statement timeout takes nearly all queries at once.
const AIM_MS: f64 = 2600.0;

/// A size that brings the 95th percentile above this is not kept, although it is in the band.
const TOO_NEAR_MS: f64 = 2950.0;

/// The scenario's 2.8 s, less 20 %.
const LOWEST_P95_MS: f64 = 2800.0 * 0.8;

/// Queries that fail, in percent.
pub const FAILED_PERCENT: std::ops::RangeInclusive<f64> = 4.0..=13.0;

/// The fullest that the pools were seen, at least, in percent.
const LOWEST_UTILIZATION: f64 = 95.0;

/// The background's 95th percentile before the storm, at most.
const HIGHEST_BASELINE_MS: f64 = 45.0;

/// How far from what it cost a query may be, for a calibration to be good still. The band from
/// [`LOWEST_P95_MS`] to the statement timeout is wider on either side of the aim.
const COST_TOLERANCE: f64 = 0.1;

/// Smaller than this, planning and the way there cost more than the scan.
const MIN_PRODUCTS: f64 = 1000.0;

/// Sizes are rounded to this.
const STEP: f64 = 1000.0;

/// One measurement never changes the size by more than this factor: it may have been disturbed.
const MAX_CHANGE: f64 = 1.6;

impl From<&StormReport> for Measured {
    fn from(report: &StormReport) -> Self {
        Self {
            p95_ms: report.p95_ms,
            failed_percent: report.failed_percent,
            pool_utilization_percent: report.pool_utilization_percent,
            baseline_p95_ms: report.baseline_p95_ms,
            single_query_ms: report.single_query_ms,
        }
    }
}

impl Measured {
    /// How far the round is from what is aimed at, in milliseconds of its 95th percentile. Beyond
    /// the cliff it says nothing.
    pub fn distance(&self) -> f64 {
        match self.p95_ms {
            Some(p95) if self.failed_percent <= *FAILED_PERCENT.end() => (p95 - AIM_MS).abs(),
            _ => f64::INFINITY,
        }
    }

    /// What lies outside its band, in words; nothing when all is as it should be.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let p95 = self.p95_ms.unwrap_or(f64::INFINITY);
        if !(LOWEST_P95_MS..=TOO_NEAR_MS).contains(&p95) {
            faults.push(format!(
                "P95 is {p95:.0} ms, wanted are {LOWEST_P95_MS:.0} to {TOO_NEAR_MS:.0}"
            ));
        }
        if !FAILED_PERCENT.contains(&self.failed_percent) {
            faults.push(format!(
                "{:.1} % of the queries failed, wanted are {} to {}",
                self.failed_percent,
                FAILED_PERCENT.start(),
                FAILED_PERCENT.end()
            ));
        }
        if self.pool_utilization_percent < LOWEST_UTILIZATION {
            faults.push(format!(
                "the pools were {:.1} % full, wanted are {LOWEST_UTILIZATION}",
                self.pool_utilization_percent
            ));
        }
        let baseline = self.baseline_p95_ms.unwrap_or(f64::INFINITY);
        if baseline > HIGHEST_BASELINE_MS {
            faults.push(format!(
                "the baseline's P95 is {baseline:.0} ms, wanted are at most {HIGHEST_BASELINE_MS}"
            ));
        }
        faults
    }
}

/// The catalogue's size by one query's CPU time in nanoseconds for each product.
///
/// All queries of a round share the processors alike, so nearly all of them end when each has had
/// what it costs: after 43 times the cost of one, divided by the number of processors. The few
/// large ones have had no more than the others by then.
pub fn products_for(nanos_per_product: f64, cpus: usize) -> u32 {
    let count = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
    let cost_of_one = AIM_MS * 1e6 * count(cpus) / count(QUERIES_OF_A_ROUND);
    rounded(cost_of_one / nanos_per_product.max(1.0))
}

/// Whether a query costs what it did: whether the machine is as fast as it was.
pub fn costs_the_same(then: f64, now: f64) -> bool {
    (now / then - 1.0).abs() <= COST_TOLERANCE
}

/// The size after a round with `products` showed `measured`: the latency grows with the size. When
/// nearly everything was cancelled, the round says only that it was too large.
pub fn adjusted(products: u32, measured: &Measured) -> u32 {
    let factor = match measured.p95_ms {
        Some(p95) if measured.distance().is_finite() => AIM_MS / p95.max(1.0),
        _ => 0.8,
    };
    rounded(f64::from(products) * factor.clamp(1.0 / MAX_CHANGE, MAX_CHANGE))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped between two numbers of products"
)]
fn rounded(products: f64) -> u32 {
    let steps = (products / STEP).round() * STEP;
    steps.clamp(MIN_PRODUCTS, f64::from(MAX_PRODUCTS)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: Measured = Measured {
        p95_ms: Some(2600.0),
        failed_percent: 7.0,
        pool_utilization_percent: 95.6,
        baseline_p95_ms: Some(12.0),
        single_query_ms: Some(130.0),
    };

    /// 43 queries of 121 ms on two processors end after 2.6 s.
    #[test]
    fn the_size_follows_from_the_cost_of_a_query() {
        // 1.728 µs for each of 70,000 products are 121 ms.
        assert_eq!(products_for(1728.0, 2), 70_000);
        assert_eq!(products_for(1728.0, 1), 35_000);
        assert_eq!(products_for(864.0, 2), 140_000);
        // Nonsense stays within bounds.
        assert_eq!(products_for(0.0, 2), MAX_PRODUCTS);
        assert_eq!(products_for(1e12, 2), 1000);
    }

    /// A size is corrected by what it showed, in bounded steps, and downwards from beyond the cliff.
    #[test]
    fn the_size_follows_the_measurement() {
        let slow = Measured {
            p95_ms: Some(3120.0),
            ..GOOD
        };
        assert_eq!(adjusted(84_000, &slow), 70_000);
        let fast = Measured {
            p95_ms: Some(260.0),
            ..GOOD
        };
        assert_eq!(adjusted(10_000, &fast), 16_000);
        for p95_ms in [Some(2600.0), None] {
            let beyond = Measured {
                p95_ms,
                failed_percent: 57.0,
                ..GOOD
            };
            assert_eq!(adjusted(100_000, &beyond), 80_000);
        }
    }

    /// A round beyond the cliff is farther away than any other.
    #[test]
    fn the_distance_is_from_the_aim() {
        assert!(GOOD.distance() < 1.0);
        let slow = Measured {
            p95_ms: Some(3120.0),
            ..GOOD
        };
        assert!((slow.distance() - 520.0).abs() < 1.0);
        let beyond = Measured {
            failed_percent: 57.0,
            ..GOOD
        };
        assert!(beyond.distance().is_infinite());
    }

    /// A machine that has become slower needs another catalogue.
    #[test]
    fn a_calibration_holds_while_a_query_costs_the_same() {
        assert!(costs_the_same(121.0, 121.0));
        assert!(costs_the_same(121.0, 130.0));
        assert!(!costs_the_same(121.0, 140.0));
        assert!(!costs_the_same(121.0, 100.0));
        assert!(!costs_the_same(0.0, 100.0));
    }

    /// Each band is looked at, and what was not measured lies in none.
    #[test]
    fn each_band_has_its_fault() {
        assert!(GOOD.faults().is_empty());
        for bad in [
            Measured {
                p95_ms: Some(2200.0),
                ..GOOD
            },
            Measured {
                p95_ms: Some(3000.0),
                ..GOOD
            },
            Measured {
                p95_ms: None,
                ..GOOD
            },
            Measured {
                failed_percent: 2.3,
                ..GOOD
            },
            Measured {
                failed_percent: 21.0,
                ..GOOD
            },
            Measured {
                pool_utilization_percent: 93.3,
                ..GOOD
            },
            Measured {
                baseline_p95_ms: Some(46.0),
                ..GOOD
            },
            Measured {
                baseline_p95_ms: None,
                ..GOOD
            },
        ] {
            assert_eq!(bad.faults().len(), 1, "{bad:?}");
        }
    }
}
