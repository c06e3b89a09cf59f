//! The whole: the release programs, a real PostgreSQL, a recording of the machine, and what it
//! has to show.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;

use std::process::Command;

use common::recording::{self, Stack, can_record, count, release};
use common::{processes_with, run, scratch};
use serde_json::Value;

/// The source that the recording has to lead to.
const SOURCE: &str = include_str!("../src/services/product.rs");

/// The lines of the function in its source.
fn lines_of_function() -> std::ops::RangeInclusive<i64> {
    let mut lines = SOURCE.lines().enumerate();
    let is_start = |(_, line): &(usize, &str)| line.contains("async fn search_products_unindexed");
    let (start, _) = lines.find(is_start).unwrap();
    let (end, _) = lines.find(|(_, line)| *line == "}").unwrap();
    i64::try_from(start + 1).unwrap()..=i64::try_from(end + 1).unwrap()
}

/// The share of `part` in `whole`, both counts.
fn share(part: &Value, whole: &Value) -> f64 {
    part.as_f64().unwrap() / whole.as_f64().unwrap()
}

#[test]
fn the_demo_shows_the_search() {
    if !can_record() {
        return;
    }
    let (directory, output) = (scratch("end-to-end"), scratch("flames"));
    let mut command = Command::new(release("workload"));
    command
        .env_remove("DATABASE_URL")
        .args(["demo", "--json", "--seconds", "8", "--agent"])
        .arg(release("flamestorm"))
        .arg("--directory")
        .arg(&directory)
        .arg("--output-dir")
        .arg(&output);
    let (status, stdout, stderr) = run(&mut command);
    assert!(status.success(), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).unwrap();

    // The function that waits for the database, by name, file and line.
    let function = &report["function"];
    assert_eq!(
        function["function"],
        "workload::services::product::search_products_unindexed"
    );
    assert!(
        function["file"]
            .as_str()
            .unwrap()
            .ends_with("src/services/product.rs"),
        "{function}"
    );
    let line = function["line"].as_i64().unwrap();
    assert!(lines_of_function().contains(&line), "{function}");
    assert_eq!(function["service"], "product-service");

    // Nearly every sample of PostgreSQL's backends has its query and who asked.
    let attribution = &report["attribution"];
    assert!(
        attribution["query_share"].as_f64() >= Some(0.99),
        "{attribution}"
    );
    assert!(
        attribution["caller_share"].as_f64() >= Some(0.95),
        "{attribution}"
    );
    let search = &report["queries"][0];
    assert!(
        search["query"].as_str().unwrap().contains("ILIKE"),
        "{search}"
    );
    assert!(search["share"].as_f64() >= Some(0.9), "{search}");
    assert!(search["executions"].as_u64() >= Some(10), "{search}");

    // PostgreSQL's stacks: there, complete, and through the sequential scan.
    let processes = report["processes"].as_array().unwrap();
    let postgres = processes.iter().find(|p| p["name"] == "postgres").unwrap();
    assert!(postgres["samples"].as_u64().unwrap() > 100, "{postgres}");
    // How fast the agent learns a busy machine's processes is `make bench`'s to measure.
    let rooted = postgres["rooted_share"].as_f64().unwrap();
    assert!(rooted >= 0.75, "{rooted} of postgres' stacks are complete");
    let folded = std::fs::read_to_string(output.join("first-flame.folded")).unwrap();
    let stacks: Vec<Stack> = folded.lines().map(Stack::parse).collect();
    // Without the network it is the system's PostgreSQL, which has no names for its own functions.
    let named = !stderr.contains("no embedded PostgreSQL");
    assert!(
        !named || stacks.iter().any(|stack| stack.has("ExecSeqScan")),
        "no sequential scan"
    );

    // One picture from the visitor's request to PostgreSQL's scan.
    let backends: Vec<Stack> = stacks
        .into_iter()
        .filter(|stack| stack.has("PostgresMain") && stack.frames[0] == "workload")
        .collect();
    let stitched = recording::share(&backends, |stack| {
        stack.has_in_order(&[
            "search_products_unindexed",
            "ILIKE",
            "postgres",
            "PostgresMain",
        ])
    });
    let all = count(&backends, |_| true);
    assert!(
        all > 100 && stitched >= 0.99,
        "{stitched} of {all} stitched"
    );

    // Every frame has a name; and even a machine that lets the agent starve loses little.
    let agent = &report["agent"];
    assert_eq!(agent["frames_unnamed"], 0);
    for (cause, lost) in agent["lost"].as_object().unwrap() {
        assert!(share(lost, &agent["samples"]) <= 0.01, "{cause}: {lost}");
    }

    // The files are there, and nothing else is.
    for file in report["files"].as_array().unwrap() {
        assert!(
            std::fs::metadata(file.as_str().unwrap()).unwrap().len() > 1000,
            "{file}"
        );
    }
    assert!(processes_with(directory.to_str().unwrap()).is_empty());
    std::fs::remove_dir_all(directory).unwrap();
    std::fs::remove_dir_all(output).unwrap();
}
