//! Names of functions.
//!
//! - `symbolize`: the lookup itself, called in this process: no root, no kernel. Its tests with damaged files last longer
//!   with `FLAMESTORM_FUZZ_SECONDS` (`make fuzz`).
//! - `child`: the child process in which a recording looks names up, and what happens when it hangs or dies. These tests
//!   record.

#[path = "../common/mod.rs"]
mod common;

mod child;
mod symbolize;
