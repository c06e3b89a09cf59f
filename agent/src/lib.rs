//! The flamestorm agent: it samples the CPU stacks of all processes on a Linux machine.
//!
//! Data flows in one direction, `kernel` → `profile` → `naming` → `encode`. The control
//! plane, `process` → `unwind` → `kernel`, is driven by `session` alone. See ARCHITECTURE.md.

pub mod clock;
pub mod cost;
pub mod diff;
pub mod doctor;
pub mod encode;
pub mod file;
pub mod kernel;
mod mapped;
pub mod naming;
pub mod object;
pub mod pipeline;
mod pool;
mod postgres;
pub mod process;
pub mod profile;
pub mod query;
mod recent;
pub mod report;
pub mod session;
pub mod symbolize;
pub mod unwind;
