//! Scene 10: the errors, by their traces, and what they say together.

use serde::Serialize;
use serde_json::Value;

use super::SceneError;
use super::fire::ms;
use super::investigation::{Investigation, place};
use super::narrator::{Narrator, Tone, toned};
use super::shop::Shop;
use crate::storm::{Asked, StormReport};
use crate::telemetry::memory::Line;

/// Failed queries whose lines are shown.
const SHOWN: usize = 3;

/// A query that failed, and what the services said about it.
#[derive(Debug, Clone, Serialize)]
pub struct Failed {
    /// The query.
    #[serde(flatten)]
    pub query: Asked,
    /// The lines of its trace, warnings and errors.
    pub lines: Vec<Line>,
}

/// What scene 10 read.
#[derive(Debug, Clone, Serialize)]
pub struct Errors {
    /// Some of the storm's failed queries, the slowest first.
    pub queries: Vec<Failed>,
    /// How many there were.
    pub failed: usize,
    /// What follows, each sentence from figures that were measured.
    pub diagnosis: Vec<String>,
}

impl Errors {
    /// What could not be shown.
    pub fn problems(&self) -> Vec<String> {
        if self.failed == 0 {
            return vec!["no query of the storm failed: there was nothing to read".to_owned()];
        }
        if self.queries.iter().all(|query| query.lines.is_empty()) {
            return vec!["no service remembers a line about a query that failed".to_owned()];
        }
        Vec::new()
    }
}

/// The scene.
pub async fn tell(
    narrator: &Narrator,
    shop: &Shop,
    storm: &StormReport,
    investigation: Option<&Investigation>,
) -> Result<Errors, SceneError> {
    narrator.heading("Scene 10: what the logs say");
    narrator
        .pause("the errors of the storm, by their traces")
        .await?;
    // One of each service before a second of any.
    let rank = |it: &&Asked| {
        let service = &it.service;
        let mut same = storm
            .slowest_failed
            .iter()
            .filter(|other| other.service == *service);
        same.position(|other| other == *it)
    };
    let mut failed: Vec<&Asked> = storm.slowest_failed.iter().collect();
    failed.sort_by_key(rank);
    let mut queries = Vec::new();
    for query in failed.into_iter().take(SHOWN) {
        let lines = shop.lines(Some(&query.trace_id), "warn").await?;
        narrator.say(&format!(
            "trace {}: {} of {}, after {}",
            query.trace_id,
            toned(Tone::Bad, &query.outcome),
            query.service,
            ms(Some(query.ms))
        ));
        for line in &lines {
            narrator.line(&shown(line));
        }
        queries.push(Failed {
            query: query.clone(),
            lines,
        });
    }
    if queries.is_empty() {
        narrator.say("no query of the storm failed: there is nothing to read");
    }
    let diagnosis = diagnosis(storm, investigation);
    narrator.say("together:");
    for sentence in &diagnosis {
        narrator.line(sentence);
    }
    let url = shop.url();
    narrator.say(&format!(
        "look at {url}/#/logs, and {url}/#/traces for the waterfalls"
    ));
    narrator.line("in Coralogix: Explore, logs; code and utilization_percent as columns, trace_id leads to the trace");
    Ok(Errors {
        queries,
        failed: storm.failed,
        diagnosis,
    })
}

/// A line as the terminal shows it: level, service, message, fields.
fn shown(line: &Line) -> String {
    let tone = match line.level.as_str() {
        "ERROR" => Tone::Bad,
        "WARN" => Tone::Fair,
        _ => Tone::Faint,
    };
    let fields: Vec<String> = line
        .fields
        .iter()
        .map(|(name, value)| match value {
            Value::String(text) => format!("{name}={text}"),
            value => format!("{name}={value}"),
        })
        .collect();
    format!(
        "{} {} {} {}",
        toned(tone, format_args!("{:<5}", line.level)),
        line.service,
        line.message,
        toned(Tone::Faint, fields.join(" "))
    )
}

/// What the figures say together.
fn diagnosis(storm: &StormReport, investigation: Option<&Investigation>) -> Vec<String> {
    let mut told = vec![format!(
        "{} queries ran at once and held {:.1} % of all connections, P99 {}; alone one takes {}.",
        storm.active_max,
        storm.pool_utilization_percent,
        ms(storm.p99_ms),
        ms(storm.single_query_ms)
    )];
    let causes: Vec<String> = storm
        .failures
        .iter()
        .map(|(cause, count)| format!("{count} by {cause}"))
        .collect();
    told.push(match causes.is_empty() {
        true => format!("None of {} failed.", storm.queries),
        false => format!(
            "{} of {} failed: {}.",
            storm.failed,
            storm.queries,
            causes.join(", ")
        ),
    });
    if let Some(found) = investigation {
        told.push(format!(
            "{} ({}) asks for {:.1} % of the product-service's CPU time, its queries included.",
            found.function,
            place(&found.file, found.line),
            found.share_of_service * 100.0
        ));
        told.push(format!(
            "With the index P95 is {} instead of {}: the database need not grow.",
            ms(found.p95_after_fix_ms),
            ms(found.p95_before_fix_ms)
        ));
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storm::Around;

    fn storm(outcomes: &[&str]) -> StormReport {
        let asked: Vec<Asked> = outcomes
            .iter()
            .map(|outcome| Asked {
                trace_id: "0a".to_owned(),
                service: "product-service".to_owned(),
                ms: 3210.0,
                outcome: (*outcome).to_owned(),
            })
            .collect();
        let services = ["product-service", "order-service", "inventory-service"];
        StormReport::of(1, services, &asked, Around::default())
    }

    /// The diagnosis names each cause with its number.
    #[test]
    fn causes_are_named() {
        let told = diagnosis(
            &storm(&["completed", "statement_timeout", "statement_timeout"]),
            None,
        );
        assert!(
            told[1].contains("2 of 3 failed: 2 by statement_timeout"),
            "{told:?}"
        );
        let told = diagnosis(&storm(&["completed"]), None);
        assert!(told[1].contains("None of 1 failed"), "{told:?}");
    }

    /// Failures of which nobody says anything are a problem, and so is nothing to read.
    #[test]
    fn silence_is_a_problem() {
        let mut errors = Errors {
            queries: Vec::new(),
            failed: 2,
            diagnosis: Vec::new(),
        };
        assert!(errors.problems()[0].contains("remembers"));
        errors.failed = 0;
        assert!(errors.problems()[0].contains("nothing to read"));
    }
}
