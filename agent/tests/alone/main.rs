//! Recordings that other work would disturb. Tests of one binary run at the same time, and binaries one after the
//! other: nothing but what is listed here runs beside these tests.
//!
//! - `shares`: shares of CPU time. Takes the machine's lock as exclusive.
//! - `signals`: stacks through signal frames. On an alternate stack a sample is incomplete until the agent has given the
//!   kernel the process's tables, so the bounds hold only where the agent does not wait for a CPU. These two tests run
//!   beside each other.
//! - `soak`: long recordings; `FLAMESTORM_SOAK_MINUTES` makes them longer (`make soak`). Each test takes the machine's
//!   lock as exclusive before it starts anything.

#[path = "../common/mod.rs"]
mod common;

mod shares;
mod signals;
mod soak;
