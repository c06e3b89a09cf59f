//! Function starts from unwind entries. They provide names for functions that have no symbol.

use memmap2::Mmap;

use crate::{
    object::Object,
    profile::{Module, Source},
    symbolize::FunctionStarts,
    unwind,
};

/// Reads function starts from the objects' own unwind entries.
pub struct UnwindEntries;

impl FunctionStarts for UnwindEntries {
    fn function_starts(&self, module: &Module, addresses: &[u64]) -> Vec<Option<u64>> {
        let starts = |bytes: &[u8]| {
            let object = Object::parse(bytes).ok()?;
            let cfi = unwind::Cfi::new(&object).ok()?;
            let start = |address: &u64| cfi.function_start(*address);
            Some(addresses.iter().map(start).collect())
        };
        let found = match &module.source {
            // SAFETY: as in `objects::open`.
            Source::File(file) => unsafe { Mmap::map(&***file) }
                .ok()
                .and_then(|map| starts(&map)),
            Source::Copy(copy) => starts(copy.bytes()),
            Source::Vdso(bytes) => starts(bytes),
            Source::Kernel | Source::Jit { .. } | Source::Unknown => None,
        };
        found.unwrap_or_else(|| vec![None; addresses.len()])
    }
}
