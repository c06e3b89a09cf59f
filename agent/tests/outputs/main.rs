//! What the agent writes and prints.
//!
//! - `folded`, `pprof`, `svg`: the formats of a profile. Several tests compare with `tests/golden`;
//!   `FLAMESTORM_BLESS=1` overwrites the golden files with the new text.
//! - `report`, `diff`: the table, the figures and the filters of one recording, and of two.
//! - `report_command`, `diff_command`: the same by the commands `flamestorm report` and `flamestorm diff`. Only
//!   `report_command` records.
//! - `query_texts`: no literal of a query may be in any output. `FLAMESTORM_FUZZ_SECONDS` makes it last longer
//!   (`make fuzz`).
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "../common/mod.rs"]
mod common;

mod diff;
mod diff_command;
mod folded;
mod pprof;
mod profiles;
mod query_texts;
mod report;
mod report_command;
mod svg;
