//! Unwind tables: a file's `.eh_frame` compiled to rows that the kernel program can search.
//!
//! Bytes in, tables out; no I/O. [`Cfi`] is the view of one file: [`Cfi::compile`] makes its
//! [`Table`], [`Cfi::row_at`] finds the rule of one address without a table, with the same result.
//! [`tree`] lays a table out in blocks, [`space`] the mappings of a process, and [`walk()`] unwinds
//! what the kernel could not.
//!
//! Both readings of a file go through the same steps in the same order, so that they cannot differ:
//! `fdes` tells which entry an address belongs to, `cfi` evaluates that entry, `x86_64` turns
//! an evaluated row into a rule. For code that no entry covers, `sweep` derives rules from the
//! instructions; [`Table::analysed`] counts them.

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
    /// Evaluating everything would take more than a sound file can ask for: the entries overlap
    /// one another in the section. The number is the bytes that were to be evaluated.
    #[error("the entries of .eh_frame overlap: {0} bytes of instructions")]
    Overlapping(u64),
    /// More rows than the blocks of a tree can hold; the number is that of the leaf blocks.
    #[error("a table of {0} leaf blocks is too large")]
    TooLarge(usize),
    /// It took too long, and was given up.
    #[error("its table takes too long")]
    TooSlow,
    /// A fault of this program.
    #[error("the compiler of tables panicked")]
    Panicked,
    /// Every thread that compiles waits for a file. It may be tried again.
    #[error("no thread can compile its table now")]
    Unavailable,
}

/// Compiles a file's table as long as `go_on` says so. See [`Cfi::compile`].
///
/// # Errors
/// As [`Cfi::new`] and [`Cfi::compile`].
pub fn compile(object: &Object<'_>, go_on: &dyn Fn() -> bool) -> Result<Table, Error> {
    Cfi::new(object)?.compile_while(go_on)
}
