//! From addresses to names, by blazesym: symbol tables, debug links, DWARF with inlined functions
//! and lines, the vDSO, JIT maps and kallsyms.
//!
//! A frame is never named after a symbol that does not cover its address. Perf maps are streamed, and only the lines that are
//! asked for are kept.
//!
//! What is read was written by others and may be hostile: [`crate::naming`] runs this in a child process with limits.
//! A path that a file chose is opened by `open`; a debug file is checked by `debug_file`.

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

/// Where functions start, by the unwind tables: the source of names for functions without a symbol.
pub trait FunctionStarts {
    /// For each svma of the module the start (svma) of the function that covers it, by its FDE;
    /// `None` where none does. One answer per address, in order. It is asked once a module, so that
    /// the file needs to be read once and nothing kept.
    fn function_starts(&self, module: &Module, addresses: &[u64]) -> Vec<Option<u64>>;
}

/// No knowledge of function starts: frames without a symbol are named by their own address.
pub struct NoFunctionStarts;

impl FunctionStarts for NoFunctionStarts {
    fn function_starts(&self, _: &Module, addresses: &[u64]) -> Vec<Option<u64>> {
        vec![None; addresses.len()]
    }
}

/// What to look up, and where.
pub struct Options<'a> {
    /// Function starts by the unwind tables.
    pub function_starts: &'a dyn FunctionStarts,
    /// Directories of separate debug files (with `.build-id` below them).
    pub debug_dirs: Vec<PathBuf>,
    /// Whether to read DWARF: inlined functions, files and lines. Without it symbolising takes a
    /// fraction of the time and memory.
    pub debug_info: bool,
    /// The kernel's symbols.
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

/// A frame's name and place, before it is interned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedFunction {
    /// Demangled name, or module and address.
    pub name: String,
    /// The symbol as it was found; without one see [`Function`](crate::profile::Function).
    pub system_name: String,
    /// Source file; empty when unknown.
    pub file: String,
    /// Source line; 0 when unknown.
    pub line: u32,
}

/// A file in memory, for an image that has no file.
pub(crate) fn memory_file(bytes: &[u8]) -> io::Result<File> {
    let fd = rustix::fs::memfd_create(c"vdso", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    Ok(file)
}
