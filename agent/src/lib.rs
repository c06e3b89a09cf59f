//! flamestorm, the agent: samples the CPU stacks of everything on a Linux machine.
//!
//! Data flows one way, `kernel` → `profile` → `symbolize` → `encode`; the control plane,
//! `process` → `unwind` → `kernel`, is known to the session alone. See ARCHITECTURE.md.

pub mod object;
pub mod unwind;
