//! The functions that used the CPU.

use std::collections::HashMap;

use crate::profile::{
    CALLER_MODULE, FunctionId, MappingId, PROCESS_MODULE, QUERY_MODULE, ResolvedProfile,
};

/// A function of a module, with its samples.
#[derive(Clone, Debug, PartialEq)]
pub struct TopFunction {
    /// Its name.
    pub name: String,
    /// The module's base name.
    pub module: String,
    /// Whether it is the kernel's.
    pub is_kernel: bool,
    /// `file:line` of the line with the most of its own samples; empty when unknown.
    pub place: String,
    /// Samples in the function itself.
    pub self_samples: u64,
    /// Samples in the function and in the functions that it called. A recursive function counts once per
    /// sample.
    pub total_samples: u64,
}

#[derive(Default)]
struct Tally {
    own: u64,
    total: u64,
    /// The last sample that was counted in `total`, as its index + 1.
    seen: usize,
    lines: HashMap<u32, u64>,
}

/// The `limit` functions with the most samples of their own. Functions with equally many are ordered by
/// their total samples.
pub fn top_functions(profile: &ResolvedProfile, limit: usize) -> Vec<TopFunction> {
    let mut tallies: HashMap<(FunctionId, MappingId), Tally> = HashMap::new();
    for (number, sample) in profile.samples.iter().enumerate() {
        let mut leaf = true;
        for id in sample.stack.iter() {
            let Some(location) = profile.locations.get(id.0 as usize) else {
                continue;
            };
            let mapping = profile.mappings.get(location.mapping.0 as usize);
            if mapping
                .is_some_and(|m| matches!(&*m.name, QUERY_MODULE | PROCESS_MODULE | CALLER_MODULE))
            {
                continue;
            }
            for line in &location.lines {
                let tally = tallies
                    .entry((line.function, location.mapping))
                    .or_default();
                if tally.seen != number + 1 {
                    tally.seen = number + 1;
                    tally.total += sample.count;
                }
                if leaf {
                    tally.own += sample.count;
                    *tally.lines.entry(line.line).or_insert(0) += sample.count;
                    leaf = false;
                }
            }
        }
    }
    let mut top: Vec<_> = tallies
        .into_iter()
        .filter_map(|((function, mapping), tally)| describe(profile, function, mapping, &tally))
        .collect();
    top.sort_by(|a, b| {
        let samples = |f: &TopFunction| (f.self_samples, f.total_samples);
        samples(b)
            .cmp(&samples(a))
            .then_with(|| (&a.name, &a.module).cmp(&(&b.name, &b.module)))
    });
    top.truncate(limit);
    top
}

fn describe(
    profile: &ResolvedProfile,
    function: FunctionId,
    mapping: MappingId,
    tally: &Tally,
) -> Option<TopFunction> {
    let function = profile.functions.get(function.0 as usize)?;
    let mapping = profile.mappings.get(mapping.0 as usize)?;
    let hottest = tally
        .lines
        .iter()
        .max_by_key(|(line, count)| (**count, **line));
    Some(TopFunction {
        name: function.name.to_string(),
        module: mapping.short_name().to_owned(),
        is_kernel: mapping.is_kernel,
        place: place(&function.file, hottest.map_or(0, |(line, _)| *line)),
        self_samples: tally.own,
        total_samples: tally.total,
    })
}

/// The last two components of a path, and the line. That is short, and usually enough to tell apart files
/// of the same name.
pub(crate) fn place(file: &str, line: u32) -> String {
    if file.is_empty() {
        return String::new();
    }
    let mut from_end = file.rmatch_indices('/').map(|(index, _)| index + 1);
    let short = match from_end.nth(1) {
        Some(index) => &file[index..],
        None => file,
    };
    match line {
        0 => short.to_owned(),
        line => format!("{short}:{line}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_short() {
        assert_eq!(place("", 3), "");
        assert_eq!(place("a.c", 3), "a.c:3");
        assert_eq!(place("src/a.c", 0), "src/a.c");
        assert_eq!(place("/build/pg/src/backend/a.c", 12), "backend/a.c:12");
    }
}
