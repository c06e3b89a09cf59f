//! What a recording shows, read from what the agent answered as any other tool would read it.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

/// What a query cost, as `flamestorm queries --json` tells it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Query {
    /// Its text, without literals.
    pub query: String,
    /// CPU time of the backends and their parallel workers, seconds.
    pub cpu_seconds: f64,
    /// Its part of the CPU time of all queries.
    pub share: f64,
    /// Samples.
    pub samples: u64,
    /// Executions that were seen.
    pub executions: u64,
    /// Who asked for it, most samples first.
    pub callers: Vec<Caller>,
    /// Samples whose caller is not known, by reason.
    pub callers_unknown: BTreeMap<String, u64>,
}

/// A function that asked for a query.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Caller {
    /// The service it is a part of.
    pub service: String,
    /// Its name.
    pub function: String,
    /// Its source file; empty when unknown.
    pub file: String,
    /// The line of the call; 0 when unknown.
    pub line: u32,
    /// Samples.
    pub samples: u64,
    /// Of the query's samples.
    pub share: f64,
}

/// The function of `service` that had the database work most, and the query by which.
pub fn costliest<'a>(queries: &'a [Query], service: &str) -> Option<(&'a Query, &'a Caller)> {
    let callers = queries
        .iter()
        .flat_map(|query| query.callers.iter().map(move |caller| (query, caller)));
    callers
        .filter(|(_, caller)| caller.service == service)
        .max_by_key(|(_, caller)| caller.samples)
}

/// A function on the way from a caller to where the time goes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// Its name, or the query.
    pub function: String,
    /// Its part of the samples of the first of the way.
    pub share: f64,
}

/// A way ends where its next step has less than this of the samples.
const LEAST_SHARE: f64 = 0.2;

/// Stacks with their numbers of samples, the root first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stacks(Vec<(Vec<String>, u64)>);

impl Stacks {
    /// Reads folded stacks: `root;…;leaf count`, one a line.
    pub fn parse(folded: &[u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(folded).map_err(|error| error.to_string())?;
        let stacks = text.lines().map(|line| {
            let (stack, count) = line.rsplit_once(' ')?;
            let frames = stack.split(';').map(str::to_owned).collect();
            Some((frames, count.parse().ok()?))
        });
        let stacks: Option<Vec<_>> = stacks.collect();
        stacks
            .map(Self)
            .ok_or_else(|| "a line is no folded stack".to_owned())
    }

    /// All samples.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|(_, count)| count).sum()
    }

    /// The samples whose stack has `function`.
    pub fn with(&self, function: &str) -> u64 {
        let with = self
            .0
            .iter()
            .filter(|(frames, _)| frames.iter().any(|f| f == function));
        with.map(|(_, count)| count).sum()
    }

    /// From `function` on, step by step to where most samples lead, for as long as that is a good part of them.
    pub fn way(&self, function: &str) -> Vec<Step> {
        let mut below: Vec<(&[String], u64)> = self
            .0
            .iter()
            .filter_map(|(frames, count)| {
                let at = frames.iter().position(|frame| frame == function)?;
                Some((frames.get(at..)?, *count))
            })
            .collect();
        let whole: u64 = below.iter().map(|(_, count)| count).sum();
        let mut way = Vec::new();
        loop {
            let mut next: HashMap<&str, u64> = HashMap::new();
            for (frames, count) in &below {
                if let Some(frame) = frames.first() {
                    *next.entry(frame).or_default() += count;
                }
            }
            // Of equals always the same.
            let most = next
                .into_iter()
                .max_by(|(a, m), (b, n)| m.cmp(n).then(b.cmp(a)));
            let Some((function, count)) = most else {
                return way;
            };
            let share = share(count, whole);
            if share < LEAST_SHARE {
                return way;
            }
            way.push(Step {
                function: function.to_owned(),
                share,
            });
            below.retain_mut(|(frames, _)| match frames.split_first() {
                Some((first, rest)) if first == function => {
                    *frames = rest;
                    true
                }
                _ => false,
            });
        }
    }
}

/// A part of a whole, of counts of samples.
pub fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What the agent prints is understood; of a service's functions the costliest is found.
    #[test]
    fn the_costliest_function() {
        let query = |text: &str, service: &str, function: &str, samples: u64| {
            json!({
                "query_id": "7", "query": text, "database": "shop", "cpu_seconds": 1.5, "share": 0.5,
                "mean_cores": 0.3, "samples": samples, "samples_between_statements": 0,
                "executions": 3, "caller_share": 1.0, "callers_unknown": { "not_captured": 1 },
                "trace_ids": [],
                "callers": [{
                    "service": service, "function": function, "file": "a.rs", "line": 7,
                    "samples": samples, "share": 1.0,
                }],
            })
        };
        let queries: Vec<Query> = serde_json::from_value(json!([
            query("SELECT 1", "product-service", "shop::get", 5),
            query("SELECT 2", "product-service", "shop::search", 9),
            query("SELECT 3", "order-service", "shop::other", 20),
        ]))
        .unwrap();
        let (query, caller) = costliest(&queries, "product-service").unwrap();
        assert_eq!(
            (query.query.as_str(), caller.function.as_str()),
            ("SELECT 2", "shop::search")
        );
        assert_eq!(costliest(&queries, "absent"), None);
        assert_eq!(queries[0].callers_unknown["not_captured"], 1);
    }

    /// Stacks are counted and followed to where the time goes.
    #[test]
    fn the_way() {
        let folded = b"shop;main;search;SELECT ?;scan;like 60\n\
                       shop;main;search;SELECT ?;scan 25\n\
                       shop;main;search;send_[k] 15\n\
                       shop;main;other 100\n";
        let stacks = Stacks::parse(folded).unwrap();
        assert_eq!(
            (stacks.total(), stacks.with("search"), stacks.with("none")),
            (200, 100, 0)
        );
        let way = stacks.way("search");
        let way: Vec<_> = way
            .iter()
            .map(|step| (step.function.as_str(), step.share))
            .collect();
        assert_eq!(
            way,
            [
                ("search", 1.0),
                ("SELECT ?", 0.85),
                ("scan", 0.85),
                ("like", 0.6)
            ]
        );
        assert_eq!(stacks.way("none"), []);
        assert!(Stacks::parse(b"no count\n").is_err());
        assert_eq!(Stacks::parse(b"").unwrap().total(), 0);
    }
}
