//! Unwind tables: a file's `.eh_frame` compiled to rows that the kernel program can search.
//!
//! The module turns bytes into tables, and does no I/O. [`Cfi`] represents the unwind information of one
//! file: [`Cfi::compile`] makes its [`Table`], and [`Cfi::row_at`] finds the rule of a single address
//! without a table, with the same result. [`tree`] lays out a table in blocks, [`space`] lays out the
//! mappings of a process, and [`walk()`] finishes stacks that the kernel could not unwind to their end.
//!
//! Compiling a table and looking up one address go through the same steps in the same order, so that their
//! results cannot differ: `fdes` finds the entry that an address belongs to, `cfi` evaluates that entry,
//! and `x86_64` turns an evaluated row into a rule. For code that no entry covers, `sweep` derives rules
//! from the instructions; [`Table::analysed`] counts that code.

mod cfi;
mod fdes;
mod rules;
pub mod space;
mod sweep;
mod table;
pub mod tree;
pub mod walk;
mod x86_64;

pub use cfi::{Cfi, MAX_CIE_BYTES, MAX_ENTRY_BYTES, MAX_FDE_BYTES, MIN_FRAME_POINTER_GAP};
pub use table::{REASONS, Row, Table};
pub use walk::{RuleLookup, StackBytes, walk};

use crate::object::Object;

/// Why a file has no table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The file has no `.eh_frame` with bytes in it.
    #[error("the file has no .eh_frame")]
    NoUnwindInformation,
    /// The entries overlap one another in the section, so that evaluating all of them would take more work
    /// than any sound file needs. The number is the size in bytes of the entry at which this was noticed.
    #[error("the entries of .eh_frame overlap (noticed at an entry of {0} bytes)")]
    Overlapping(u64),
    /// The table has more rows than the blocks of a tree can hold. The number is that of its leaf blocks.
    #[error("the table is too large: {0} leaf blocks")]
    TooLarge(usize),
    /// Compiling the table took too long, and was given up.
    #[error("compiling the table took too long")]
    TooSlow,
    /// The compiler panicked, which is a bug in this program.
    #[error("the table compiler panicked")]
    Panicked,
    /// No thread can compile the table now, because too many are blocked reading a file. It may be tried
    /// again later.
    #[error("no thread is available to compile the table")]
    Unavailable,
}

/// Compiles a file's table; gives up when `go_on` returns false. See [`Cfi::compile_while`].
///
/// # Errors
/// As [`Cfi::new`] and [`Cfi::compile_while`].
pub fn compile(object: &Object<'_>, go_on: &dyn Fn() -> bool) -> Result<Table, Error> {
    Cfi::new(object)?.compile_while(go_on)
}
