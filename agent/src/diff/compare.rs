//! The comparison: every stack and every function before and after, in one unit.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::pair::{Kind, Pair, Recording};
use crate::encode::folded;
use crate::profile::{
    CALLER_MODULE, PROCESS_MODULE, QUERY_MODULE, ResolvedProfile, ResolvedSample,
};
use crate::report::place;

/// A difference of at most this many standard deviations is taken for chance. Chance alone exceeds it about
/// one time in twenty.
const STANDARD_DEVIATIONS: f64 = 2.0;

/// How two recordings were made comparable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalisation {
    /// Each recording's CPU time was divided by its length, which gives CPU seconds per second.
    Duration,
    /// A length is not known, so each stack was divided by the sum of its recording. A change that affects
    /// all stacks alike does not show.
    Total,
}

/// One of the two recordings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Side {
    /// Its name.
    pub name: String,
    /// Its samples.
    pub samples: u64,
    /// Of these, the samples that were compared.
    pub compared: u64,
    /// Its length, if that is known.
    pub seconds: Option<f64>,
}

/// A number of samples, and their value in the unit of the comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Amount {
    pub samples: u64,
    pub value: f64,
}

impl Amount {
    fn add(&mut self, samples: u64, value: f64) {
        self.samples += samples;
        self.value += value;
    }

    /// The square of the standard deviation of `value`. The number of samples is random, with a standard
    /// deviation equal to its square root.
    fn variance(self) -> f64 {
        self.value * self.value / self.samples.max(1) as f64
    }
}

/// An amount before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Both {
    pub before: Amount,
    pub after: Amount,
}

impl Both {
    fn side(&mut self, after: bool) -> &mut Amount {
        if after {
            &mut self.after
        } else {
            &mut self.before
        }
    }

    pub fn merge(&mut self, other: &Both) {
        self.before.add(other.before.samples, other.before.value);
        self.after.add(other.after.samples, other.after.value);
    }

    pub fn change(&self) -> Change {
        let (before, after) = (self.before.value, self.after.value);
        let deviation = (self.before.variance() + self.after.variance()).sqrt();
        Change {
            before,
            after,
            difference: after - before,
            within_chance: (after - before).abs() <= STANDARD_DEVIATIONS * deviation,
        }
    }
}

/// A figure before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Change {
    /// Before.
    pub before: f64,
    /// After.
    pub after: f64,
    /// `after` minus `before`.
    pub difference: f64,
    /// Whether chance alone explains the difference, because there are so few samples.
    pub within_chance: bool,
}

/// A function of a module, or a query.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FunctionChange {
    /// Its name; the text of a query.
    pub function: String,
    /// The module's base name; empty for folded stacks, `[query]` for a query.
    pub module: String,
    /// `file:line` of the place with the most of its samples; empty when unknown.
    pub place: String,
    /// The change in the function itself.
    #[serde(rename = "self")]
    pub own: Change,
    /// The change in the function and in the functions that it called.
    pub total: Change,
}

impl FunctionChange {
    /// Whether it stands for a query.
    pub fn is_query(&self) -> bool {
        self.module == QUERY_MODULE
    }
}

/// The difference between two recordings.
#[derive(Clone, Debug)]
pub struct Difference {
    /// The recording before.
    pub before: Side,
    /// The recording after.
    pub after: Side,
    /// How they were made comparable.
    pub normalisation: Normalisation,
    /// All samples that were compared.
    pub total: Change,
    /// Every function and query, in no particular order.
    pub functions: Vec<FunctionChange>,
    /// Every stack, in folded form.
    pub(super) stacks: BTreeMap<String, Both>,
}

impl Pair {
    /// Compares the two recordings.
    pub fn compare(&self) -> Difference {
        let known = |recording: &Recording| recording.seconds().is_some();
        let normalisation = if known(&self.before) && known(&self.after) {
            Normalisation::Duration
        } else {
            Normalisation::Total
        };
        let mut sum = Both::default();
        let mut stacks: BTreeMap<String, Both> = BTreeMap::new();
        let mut functions = Functions::default();
        for (recording, is_after) in [(&self.before, false), (&self.after, true)] {
            let profile = &recording.profile;
            for (number, sample) in profile.samples.iter().enumerate() {
                let value = recording.value(sample, normalisation);
                let mut add = |both: &mut Both| both.side(is_after).add(sample.count, value);
                add(&mut sum);
                add(stacks.entry(folded::stack(profile, sample)).or_default());
                functions.add(profile, sample, (is_after, number), &mut add);
            }
        }
        Difference {
            before: self.before.side(),
            after: self.after.side(),
            normalisation,
            total: sum.change(),
            functions: functions.changes(),
            stacks,
        }
    }
}

impl Recording {
    /// Its length, if that is known. A filtered recording has the length of the whole recording.
    fn seconds(&self) -> Option<f64> {
        let nanoseconds = self.duration_ns;
        (self.kind == Kind::Pprof && nanoseconds > 0).then_some(nanoseconds as f64 / 1e9)
    }

    fn side(&self) -> Side {
        Side {
            name: self.name.clone(),
            samples: self.samples,
            compared: self.profile.total_count(),
            seconds: self.seconds(),
        }
    }

    fn value(&self, sample: &ResolvedSample, normalisation: Normalisation) -> f64 {
        let cpu = sample.cpu_ns as f64;
        match normalisation {
            Normalisation::Duration => cpu / self.duration_ns.max(1) as f64,
            Normalisation::Total if self.cpu_ns > 0 => cpu / self.cpu_ns as f64,
            Normalisation::Total => sample.count as f64 / self.samples.max(1) as f64,
        }
    }
}

/// The functions of both recordings, by name and module.
#[derive(Default)]
struct Functions<'a>(HashMap<(&'a str, &'a str), Tally<'a>>);

#[derive(Default)]
struct Tally<'a> {
    own: Both,
    total: Both,
    /// The sample that was last counted in `total`, so that a recursive function counts once per sample.
    seen: Option<(bool, usize)>,
    /// Samples by file and line.
    places: HashMap<(&'a str, u32), u64>,
}

impl<'a> Functions<'a> {
    fn add(
        &mut self,
        profile: &'a ResolvedProfile,
        sample: &'a ResolvedSample,
        number: (bool, usize),
        add: &mut impl FnMut(&mut Both),
    ) {
        let frames = profile
            .frames(sample)
            .filter(|frame| !matches!(&*frame.mapping.name, PROCESS_MODULE | CALLER_MODULE));
        for (depth, frame) in frames.enumerate() {
            let key = (&*frame.function.name, frame.mapping.short_name());
            let tally = self.0.entry(key).or_default();
            if depth == 0 {
                add(&mut tally.own);
            }
            if tally.seen != Some(number) {
                tally.seen = Some(number);
                add(&mut tally.total);
                let place = (&*frame.function.file, frame.line);
                *tally.places.entry(place).or_insert(0) += sample.count;
            }
        }
    }

    fn changes(self) -> Vec<FunctionChange> {
        let change = |((name, module), tally): ((&str, &str), Tally<'_>)| {
            let most = tally
                .places
                .iter()
                .max_by_key(|(place, samples)| (**samples, *place));
            FunctionChange {
                function: name.to_owned(),
                module: module.to_owned(),
                place: most.map_or_else(String::new, |((file, line), _)| place(file, *line)),
                own: tally.own.change(),
                total: tally.total.change(),
            }
        };
        self.0.into_iter().map(change).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(before: u64, after: u64) -> Change {
        let amount = |samples: u64| Amount {
            samples,
            value: samples as f64 * 0.01,
        };
        let both = Both {
            before: amount(before),
            after: amount(after),
        };
        both.change()
    }

    /// Twenty samples more than ten are a change, twenty more than a thousand are chance.
    #[test]
    fn chance() {
        assert!(!change(10, 30).within_chance);
        assert!(change(1_000, 1_020).within_chance);
        assert!(change(0, 3).within_chance && !change(0, 5).within_chance);
        assert!(change(0, 0).within_chance);
        assert_eq!(change(200, 100).difference, -1.0);
    }
}
