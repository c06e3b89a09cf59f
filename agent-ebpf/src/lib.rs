//! The contract between the programs in the kernel and the agent in user space: `no_std` types and
//! pure functions that both sides use.
//!
//! With the feature `programs` the same crate is compiled for the kernel (`src/main.rs`).
//!
//! Address spaces have names throughout the project:
//! - **avma**, actual virtual memory address: what a process sees (a program counter in a sample);
//! - **svma**, stated virtual memory address: what the ELF file says (symbols, `.eh_frame`);
//! - **table address**: svma minus [`the table's base`](table), a `u32`, what the kernel searches.
#![cfg_attr(not(test), no_std)]

pub mod counters;
pub mod limits;
pub mod postgres;
pub mod sample;
pub mod table;
pub mod unwind;
