//! Scene 9: the database is exhausted.

use std::cell::Cell;
use std::convert::Infallible;
use std::time::Duration;

use super::SceneError;
use super::narrator::{Narrator, Tone, toned};
use super::shop::Shop;
use crate::calibrate;
use crate::load;
use crate::storm::StormReport;
use crate::storm::plan::QUERIES_OF_A_ROUND;

/// How long the shop is watched on a day like any other.
pub const BASELINE: Duration = Duration::from_secs(6);

/// How often the story is told while something takes its time.
const TICK: Duration = Duration::from_secs(3);

/// How often the pools are looked at while there is only traffic.
const LOOK: Duration = Duration::from_millis(250);

/// A storm that makes the shop less than so many times slower is none.
const SLOWER: f64 = 3.0;

/// So near to what was expected is as expected.
const NEAR: f64 = 0.2;

/// The fullest that the pools have to be seen, in percent.
const EXHAUSTED_PERCENT: f64 = 90.0;

/// The scene: a baseline, the storm, and what was expected of it.
pub async fn tell(
    narrator: &Narrator,
    shop: &Shop,
    rounds: u32,
) -> Result<(load::Report, StormReport), SceneError> {
    narrator.heading("Scene 9: the database is exhausted");
    narrator.pause("a day like any other").await?;
    let traffic = baseline(narrator, shop).await?;
    let queries = QUERIES_OF_A_ROUND;
    narrator
        .pause(&format!(
            "the storm, {rounds} rounds of {queries} queries at once"
        ))
        .await?;
    let storm = storm(narrator, shop, rounds).await?;
    table(narrator, &storm);
    let url = shop.url();
    narrator.say(&format!(
        "look at {url}/#/demo: three services, one database, all of them slow"
    ));
    narrator.line(
        "in Coralogix: APM, service map; APM, databases, productcatalog. All three services suffer: which code is it?",
    );
    Ok((traffic, storm))
}

/// Light traffic, and what it shows.
pub async fn baseline(narrator: &Narrator, shop: &Shop) -> Result<load::Report, SceneError> {
    narrator.say(&format!("visitors browse for {} s", BASELINE.as_secs()));
    let fullest: Cell<Option<f64>> = Cell::new(None);
    let look = async {
        loop {
            if let Ok(status) = shop.status().await {
                let percent = status.pool_utilization_percent();
                // Not known is less than anything.
                fullest.set(match (fullest.get(), percent) {
                    (Some(a), Some(b)) => Some(a.max(b)),
                    (a, b) => a.or(b),
                });
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    let traffic = during(shop.traffic(BASELINE), look).await?;
    narrator.line(&format!(
        "{} requests, {} failed; P50 {}, P95 {}; pools at most {} full",
        traffic.completed,
        traffic.failed,
        ms(traffic.p50_ms),
        ms(traffic.p95_ms),
        percent(fullest.get())
    ));
    Ok(traffic)
}

/// A storm, told while it goes on.
pub async fn storm(
    narrator: &Narrator,
    shop: &Shop,
    rounds: u32,
) -> Result<StormReport, SceneError> {
    narrator.say(&format!(
        "the storm begins: {rounds} rounds of {QUERIES_OF_A_ROUND} queries at once, through the services' HTTP"
    ));
    let tick = async {
        loop {
            tokio::time::sleep(TICK).await;
            if let Ok(status) = shop.status().await
                && let Some(storm) = status
                    .storm
                    .as_ref()
                    .filter(|it| it.running && it.round > 0)
            {
                narrator.line(&format!(
                    "round {} of {}: {} queries over, {} of them failed; pools {} full",
                    storm.round,
                    storm.rounds,
                    storm.done,
                    storm.failed,
                    percent(status.pool_utilization_percent())
                ));
            }
        }
    };
    let storm = during(shop.storm(rounds), tick).await?;
    narrator.say(&format!("the storm is over, after {:.1} s", storm.seconds));
    Ok(storm)
}

/// The last storm that the shop has had, if it has errors to tell of; else one now.
pub async fn last_or_new(
    narrator: &Narrator,
    shop: &Shop,
    rounds: u32,
) -> Result<StormReport, SceneError> {
    match shop.last_storm().await? {
        Some(last) if last.failed > 0 => Ok(last),
        _ => storm(narrator, shop, rounds).await,
    }
}

/// `work`, with something else going on beside it until it is done.
async fn during<T>(work: impl Future<Output = T>, beside: impl Future<Output = Infallible>) -> T {
    tokio::select! {
        done = work => done,
        never = beside => match never {},
    }
}

/// What was measured beside what was expected.
fn table(narrator: &Narrator, storm: &StormReport) {
    let expected = &storm.expected;
    let row = |what: &str, measured: String, expected: String, is_near: bool| {
        let tone = if is_near { Tone::Good } else { Tone::Fair };
        let measured = toned(tone, format_args!("{measured:>10}"));
        narrator.line(&format!("{what:<34} {measured}   {expected:>10}"));
    };
    let near = |measured: Option<f64>, expected: f64| {
        measured.is_some_and(|measured| (measured / expected - 1.0).abs() <= NEAR)
    };
    narrator.line(&format!(
        "{:<34} {:>10}   {:>10}",
        "", "measured", "expected"
    ));
    row(
        "P95 before (light traffic)",
        ms(storm.baseline_p95_ms),
        format!("≤ {}", ms(Some(expected.baseline_p95_ms))),
        storm
            .baseline_p95_ms
            .is_some_and(|p95| p95 <= expected.baseline_p95_ms),
    );
    row(
        "P95 of completed queries",
        ms(storm.p95_ms),
        ms(Some(expected.p95_ms)),
        near(storm.p95_ms, expected.p95_ms),
    );
    row(
        "P99 of executed queries",
        ms(storm.p99_ms),
        ms(Some(expected.p99_ms)),
        near(storm.p99_ms, expected.p99_ms),
    );
    row(
        "queries active at once, at most",
        storm.active_max.to_string(),
        expected.active.to_string(),
        storm.active_max >= u64::from(expected.active),
    );
    row(
        "connection pools, at the fullest",
        format!("{:.1} %", storm.pool_utilization_percent),
        format!("≥ {:.0} %", expected.pool_utilization_percent),
        storm.pool_utilization_percent >= expected.pool_utilization_percent,
    );
    row(
        "failed",
        format!("{:.1} %", storm.failed_percent),
        format!("{:.1} %", expected.failed_percent),
        calibrate::FAILED_PERCENT.contains(&storm.failed_percent),
    );
    for (cause, count) in &storm.failures {
        narrator.line(&toned(
            Tone::Faint,
            format_args!("  {cause}: {count} of {}", storm.queries),
        ));
    }
    narrator.line(&toned(
        Tone::Faint,
        format_args!(
            "  one such query alone: {}; P50 in the storm: {}",
            ms(storm.single_query_ms),
            ms(storm.p50_ms)
        ),
    ));
}

/// What was no storm about it.
pub fn problems(storm: &StormReport) -> Vec<String> {
    let mut problems = Vec::new();
    let (before, p95) = (storm.baseline_p95_ms, storm.p95_ms);
    if p95.is_none() && storm.executed > 0 {
        problems.push(
            "no query of the storm was answered in time: this machine needs a smaller catalogue (--products), or, \
             where it was busy, another try"
                .to_owned(),
        );
    } else if before
        .zip(p95)
        .is_none_or(|(before, p95)| p95 < before * SLOWER)
    {
        problems.push(format!(
            "the storm did not slow the shop down: P95 {} before and {} in it",
            ms(before),
            ms(p95)
        ));
    }
    if storm.pool_utilization_percent < EXHAUSTED_PERCENT {
        problems.push(format!(
            "the storm did not exhaust the pools: {:.1} % full at most",
            storm.pool_utilization_percent
        ));
    }
    if storm.failed == 0 {
        problems.push(
            "no query of the storm failed: none was large enough for the statement timeout"
                .to_owned(),
        );
    }
    problems
}

/// A share that may not be known.
fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "? %".to_owned(), |percent| format!("{percent:.0} %"))
}

/// Milliseconds, as people read them.
pub fn ms(value: Option<f64>) -> String {
    match value {
        Some(ms) if ms < 100.0 => format!("{ms:.1} ms"),
        Some(ms) => format!("{ms:.0} ms"),
        None => "none".to_owned(),
    }
}
