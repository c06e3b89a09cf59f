//! Looks up the names of addresses, by blazesym: in symbol tables, debug links, DWARF with inlined
//! functions and lines, the vDSO, JIT maps and kallsyms.
//!
//! A frame is never named after a symbol that does not cover its address. Perf maps are streamed, and only
//! names that are needed are kept.
//!
//! The files that are read come from other users and may be hostile, so [`crate::naming`] runs this in a
//! child process with resource limits. A path that a file contains is opened by `open`, and a debug file is
//! checked by `debug_file`.

mod debug_file;
mod elf;
mod guard;
mod kernel;
mod lookup;
mod names;
mod open;
mod perf_map;

pub use perf_map::{MAX_LINE_BYTES, MAX_MAP_BYTES, find_in_perf_map};

pub(crate) use lookup::{bytes_of, name_module};
pub(crate) use names::{Named, Stage};

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use crate::profile::Module;

/// Provides the starts of functions according to the unwind tables. Functions without a symbol are named by
/// their start.
pub trait FunctionStarts {
    /// For each svma of the module, the start (svma) of the function that covers it according to its FDE;
    /// `None` where no FDE covers it. One answer for each address, in order. This is called once for each
    /// module, so that the file is read only once and nothing needs to be kept.
    fn function_starts(&self, module: &Module, addresses: &[u64]) -> Vec<Option<u64>>;
}

/// An implementation without function starts: frames without a symbol are named by their own address.
pub struct NoFunctionStarts;

impl FunctionStarts for NoFunctionStarts {
    fn function_starts(&self, _: &Module, addresses: &[u64]) -> Vec<Option<u64>> {
        vec![None; addresses.len()]
    }
}

/// What is looked up, and where.
pub struct Options<'a> {
    /// The source of function starts.
    pub function_starts: &'a dyn FunctionStarts,
    /// Directories of separate debug files (with `.build-id` below them).
    pub debug_dirs: Vec<PathBuf>,
    /// Whether to read DWARF, for inlined functions, files and lines. Without it symbolization takes a
    /// fraction of the time and memory.
    pub debug_info: bool,
    /// Path of the kernel's symbols.
    pub kallsyms: PathBuf,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Options {
            function_starts: &NoFunctionStarts,
            debug_dirs: vec![PathBuf::from("/usr/lib/debug")],
            debug_info: true,
            kallsyms: PathBuf::from("/proc/kallsyms"),
        }
    }
}

/// The name and source location of a function at a frame, before it is interned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedFunction {
    /// Demangled name, or module and address.
    pub name: String,
    /// The symbol as it was found. For a function without one see [`Function`](crate::profile::Function).
    pub system_name: String,
    /// Source file; empty when unknown.
    pub file: String,
    /// Source line; 0 when unknown.
    pub line: u32,
}

/// Makes a file in memory from the bytes of an image that has no file.
pub(crate) fn memory_file(bytes: &[u8]) -> io::Result<File> {
    let fd = rustix::fs::memfd_create(c"vdso", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    Ok(file)
}
