//! The contract between the programs in the kernel and the agent in user space: `no_std` types and
//! pure functions that both sides use.
//!
//! With the feature `programs`, this crate also contains the kernel programs themselves (`src/main.rs`).
//!
//! The project uses three kinds of addresses:
//! - **avma**, actual virtual memory address: an address in a running process, such as a program counter in
//!   a sample;
//! - **svma**, stated virtual memory address: an address in an ELF file, as used by its symbols and
//!   `.eh_frame`;
//! - **table address**: svma minus [the table's base](table), a `u32`. The kernel searches the tables by it.
#![cfg_attr(not(test), no_std)]

pub mod counters;
pub mod limits;
pub mod postgres;
pub mod sample;
pub mod table;
pub mod unwind;
