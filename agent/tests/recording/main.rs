//! Recordings of small programs (`tests/programs`) whose true stacks are known.
//!
//! - `frames`, `recursion`, `system_calls`: kinds of frames and stacks.
//! - `linking`, `identity`: kinds of files, and files that change.
//! - `lifecycle`: threads, processes and mappings that come and go.
//! - `command`: what `flamestorm record` promises beside its stacks.
//!
//! Most tests take the machine's lock as shared and run beside each other. A test that loads the machine so much that
//! others would notice takes the lock as exclusive. What needs a machine that does nothing else is in `alone`.

#[path = "../common/mod.rs"]
mod common;

mod command;
mod frames;
mod identity;
mod lifecycle;
mod linking;
mod recursion;
mod system_calls;
