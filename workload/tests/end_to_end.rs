//! The whole: the release programs, a real PostgreSQL, recordings of the machine, and what they
//! have to show.
#![expect(clippy::unwrap_used, reason = "a failure in a helper is a failed test")]

mod common;

use std::path::Path;
use std::process::Command;

use common::recording::{Stack, can_record, count, release};
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

/// Whether a storm was too large or too small for the machine.
fn missed_the_size(told: &Value) -> bool {
    let mut problems = told["problems"].as_array().into_iter().flatten();
    problems.any(|problem| {
        let problem = problem.as_str().unwrap();
        problem.contains("answered in time") || problem.contains("large enough")
    })
}

/// Has the story told, and gives what it told to machines and to people.
fn story(directory: &Path, output: &Path) -> (Value, String) {
    let mut command = Command::new(release("workload"));
    command
        .env_remove("DATABASE_URL")
        .args(["scene", "all", "--open", "--yes", "--json", "--rounds", "2"])
        .arg("--agent")
        .arg(release("flamestorm"))
        .arg("--directory")
        .arg(directory)
        .arg("--output-dir")
        .arg(output);
    let (status, stdout, stderr) = run(&mut command);
    let told: Value = serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("{stderr}"));
    assert_eq!(told["success"], status.success(), "{stderr}");
    (told, stderr)
}

/// The whole story, as `make demo` has it told.
#[test]
fn the_story() {
    if !can_record() {
        return;
    }
    let (directory, output) = (scratch("end-to-end"), scratch("flames"));
    let (mut told, mut stderr) = story(&directory, &output);
    // The speed of a shared machine may change between the calibration and the storm. The next
    // story notices, and calibrates anew.
    for _ in 0..2 {
        if missed_the_size(&told) {
            (told, stderr) = story(&directory, &output);
        }
    }
    assert_eq!(told["success"], true, "{stderr}");

    // Scene 9: 43 at once, the pools full, the mixture of the scenario. The bands are the calibration's.
    assert_eq!(told["active_max"], 43, "{told}");
    assert!(told["pool_utilization_percent"].as_f64() >= Some(95.0));
    assert_eq!(told["queries"], 86);
    assert!(told["p95_ms"].as_f64() > told["baseline_p95_ms"].as_f64());
    assert!(
        told["failures"]["statement_timeout"].as_u64() >= Some(1),
        "{told}"
    );

    // Scene 9.5: the function, by name, file and line.
    assert_eq!(
        told["function"],
        "workload::services::product::search_products_unindexed"
    );
    let file = told["file"].as_str().unwrap();
    assert!(file.ends_with("src/services/product.rs"), "{file}");
    let line = told["line"].as_i64().unwrap();
    assert!(lines_of_function().contains(&line), "{line}");
    assert!(told["query"].as_str().unwrap().contains("ILIKE"), "{told}");
    assert!(told["share_of_service"].as_f64() >= Some(0.9), "{told}");
    let of_machine = told["share_of_machine"].as_f64().unwrap();
    assert!((0.1..0.7).contains(&of_machine), "{of_machine}");
    assert!(told["caller_share"].as_f64() >= Some(0.99), "{told}");
    let (before, after) = (&told["p95_before_fix_ms"], &told["p95_after_fix_ms"]);
    assert!(
        before.as_f64() > after.as_f64().map(|after| 2.0 * after),
        "{before}, {after}"
    );

    // Without the network it is the system's PostgreSQL, which has no names for its own functions.
    let named = !stderr.contains("no embedded PostgreSQL");
    let way = told["way"].as_array().unwrap();
    let way: Vec<&str> = way
        .iter()
        .map(|step| step["function"].as_str().unwrap())
        .collect();
    assert!(way.iter().any(|step| step.contains("ILIKE")), "{way:?}");
    assert!(way.contains(&"PostgresMain"), "{way:?}");
    assert!(
        !named || way.iter().any(|step| step.contains("Scan")),
        "{way:?}"
    );

    // Every recording is whole; and even a machine that lets the agent starve loses little.
    let recordings = told["recordings"].as_array().unwrap();
    assert_eq!(recordings.len(), 3);
    for recorded in recordings {
        let share = share(&recorded["lost"], &recorded["samples"]);
        assert!(share <= 0.01, "{recorded}");
        // How fast the agent learns a busy machine's processes is `make bench`'s to measure.
        assert!(
            recorded["rooted_share"].as_f64() >= Some(0.75),
            "{recorded}"
        );
    }

    // One picture from the request to PostgreSQL's scan.
    let folded = std::fs::read_to_string(output.join("storm.folded")).unwrap();
    let stacks: Vec<Stack> = folded.lines().map(Stack::parse).collect();
    let search =
        |stack: &Stack| stack.has("search_products_unindexed") && stack.has("PostgresMain");
    let all = count(&stacks, search);
    let stitched = count(&stacks, |stack| {
        search(stack)
            && stack.has_in_order(&[
                "search_products_unindexed",
                "ILIKE",
                "postgres",
                "PostgresMain",
            ])
    });
    assert!(all > 100 && stitched == all, "{stitched} of {all} stitched");

    // Scene 10: what the services said of queries that failed.
    let failed = told["errors"]["queries"].as_array().unwrap();
    assert!(!failed.is_empty(), "{told}");
    for query in failed {
        let lines = query["lines"].as_array().unwrap();
        assert!(!lines.is_empty(), "{query}");
        assert!(
            lines
                .iter()
                .all(|line| line["trace_id"] == query["trace_id"]),
            "{query}"
        );
    }

    // The files are there, and nothing else is.
    let files: Vec<_> = told["files"].as_array().unwrap().iter().collect();
    for name in [
        "baseline.svg",
        "storm.svg",
        "fixed.svg",
        "storm-vs-fixed.svg",
        "README.md",
    ] {
        let file = files
            .iter()
            .find(|file| file.as_str().unwrap().ends_with(name))
            .unwrap();
        let bytes = std::fs::metadata(file.as_str().unwrap()).unwrap().len();
        assert!(bytes > 1000, "{file}");
    }
    assert!(processes_with(directory.to_str().unwrap()).is_empty());
    std::fs::remove_dir_all(directory).unwrap();
    std::fs::remove_dir_all(output).unwrap();
}
