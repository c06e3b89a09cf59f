//! Looks up the names of one module's addresses in this process. This is the work of the namer child.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::debug_file::Origin;
use super::names::{Named, Stage};
use super::{Options, elf, guard, kernel, memory_file, perf_map};
use crate::profile::{Module, Source};

/// Looks up sorted addresses. If a reader panics because of a broken file, only this module's names are
/// lost.
pub(crate) fn name_module(
    module: &Module,
    addresses: &[u64],
    options: &Options<'_>,
    report: &mut dyn FnMut(Stage<'_>),
) -> Named {
    let found = catch_unwind(AssertUnwindSafe(|| starts(module, addresses, options)));
    let starts = found.unwrap_or_else(|_| vec![None; addresses.len()]);
    report(Stage::Starts(&starts));
    let attempt = catch_unwind(AssertUnwindSafe(|| {
        look_up(module, addresses, &starts, options, report)
    }));
    let mut named = attempt.unwrap_or_else(|_| Named {
        notes: vec![
            "its symbols could not be read, because the file is broken or hostile".to_owned(),
        ],
        ..Named::default()
    });
    named.starts = starts;
    named
}

/// One function start for each address; `None` where the module has no unwind tables.
fn starts(module: &Module, addresses: &[u64], options: &Options<'_>) -> Vec<Option<u64>> {
    let mut starts = match module.source {
        Source::File(_) | Source::Copy(_) | Source::Vdso(_) => {
            options.function_starts.function_starts(module, addresses)
        }
        _ => Vec::new(),
    };
    starts.resize(addresses.len(), None);
    starts
}

/// The bytes of an image that is not read from an open file; empty for any other module.
pub(crate) fn bytes_of(source: &Source) -> &[u8] {
    match source {
        Source::Copy(copy) => copy.bytes(),
        Source::Vdso(bytes) => bytes,
        Source::File(_) | Source::Kernel | Source::Jit { .. } | Source::Unknown => &[],
    }
}

fn look_up(
    module: &Module,
    addresses: &[u64],
    starts: &[Option<u64>],
    options: &Options<'_>,
    report: &mut dyn FnMut(Stage<'_>),
) -> Named {
    let failed = |note: String| Named {
        notes: vec![note],
        ..Named::default()
    };
    let copy;
    let file = match &module.source {
        Source::File(file) => &**file,
        Source::Copy(_) | Source::Vdso(_) => match memory_file(bytes_of(&module.source)) {
            Ok(file) => {
                copy = file;
                &copy
            }
            Err(error) => return failed(format!("memfd_create: {error}")),
        },
        Source::Kernel => return kernel::symbolize(addresses, options),
        Source::Jit {
            pid,
            perf_map,
            file,
        } => return perf_map::symbolize(*pid, perf_map, file.as_ref(), addresses, report),
        Source::Unknown => return Named::default(),
    };
    if let Err(refused) = guard::check(file) {
        return failed(format!("symbols not read: {refused}"));
    }
    let origin = Origin {
        file,
        build_id: module.build_id.as_deref(),
        container: module.debug_dir.as_deref(),
    };
    elf::symbolize(&origin, addresses, starts, options, report)
}
