//! Looks up addresses in ELF files.

use std::collections::BTreeMap;
use std::fs::File;

use blazesym::symbolize::source::{Elf, Source};
use blazesym::symbolize::{CodeInfo, Input, Sym, Symbolized, Symbolizer};

use super::debug_file::{self, Found, Origin};
use super::names::{Named, Stage, cut, demangle};
use super::open::own_path;
use super::{NamedFunction, Options};

/// Maximum number of bytes that a symbol without a size covers where no unwind entry says where the next
/// function begins. Hand-written assembly (`_start`, `_init`) is shorter.
const MAX_SIZELESS: u64 = 4096;

/// Looks up every address (svma, sorted) in a file and in its debug file. `starts` holds, for each address,
/// the start of its function according to the unwind tables.
pub(super) fn symbolize(
    origin: &Origin<'_>,
    addresses: &[u64],
    starts: &[Option<u64>],
    options: &Options<'_>,
    report: &mut dyn FnMut(Stage<'_>),
) -> Named {
    let mut named = Named::default();
    let found = if options.debug_info {
        debug_file::find(origin, options)
    } else {
        Found::default()
    };
    named.notes.extend(found.note);
    if let Some(file) = &found.file {
        report(Stage::Reading(file));
    }
    let start_of: BTreeMap<u64, u64> = addresses
        .iter()
        .zip(starts)
        .filter_map(|(address, start)| Some((*address, (*start)?)))
        .collect();
    let symbolizer = Symbolizer::builder()
        .enable_auto_reload(false)
        .enable_demangling(false)
        .enable_code_info(options.debug_info)
        .enable_inlined_fns(options.debug_info)
        .set_debug_dirs(Some(&options.debug_dirs))
        .build();
    let sources = sources(origin.file, found.file.as_ref(), options, &mut named.notes);
    for source in sources {
        let open: Vec<u64> = addresses
            .iter()
            .copied()
            .filter(|address| !named.by_address.contains_key(address))
            .collect();
        if open.is_empty() {
            break;
        }
        match symbolizer.symbolize(&Source::Elf(source), Input::VirtOffset(&open)) {
            Ok(symbols) => {
                for (address, symbol) in open.iter().zip(&symbols) {
                    if let Symbolized::Sym(sym) = symbol
                        && covers(sym, start_of.get(address).copied())
                    {
                        named.by_address.insert(*address, lines_of(sym));
                    }
                }
            }
            Err(error) => named.notes.push(format!("{error:#}")),
        }
    }
    named
}

/// The places where symbols are looked up, the most informative first: the debug file and the file itself
/// with debug information (which may be broken), then both without it.
fn sources(
    file: &File,
    debug_file: Option<&File>,
    options: &Options<'_>,
    notes: &mut Vec<String>,
) -> Vec<Elf> {
    let mut sources = Vec::new();
    if options.debug_info {
        for file in debug_file.into_iter().chain([file]) {
            match debug_file::may_read_debug_info(file, options) {
                Ok(true) => sources.push(Elf::new(own_path(file))),
                Ok(false) => {}
                Err(note) => notes.push(note),
            }
        }
    }
    for file in debug_file.into_iter().chain([file]) {
        let mut plain = Elf::new(own_path(file));
        plain.debug_syms = false;
        sources.push(plain);
    }
    sources
}

/// Whether a symbol really covers the address that it was found for.
fn covers(sym: &Sym<'_>, function_start: Option<u64>) -> bool {
    if sym.name.is_empty() {
        return false;
    }
    match sym.size {
        Some(size) if size > 0 => sym.offset < size,
        // A DWARF function with several ranges (hot and cold parts). It was found by its exact ranges, but
        // is reported without start and size.
        _ if sym.addr == 0 && sym.code_info.is_some() => true,
        _ => match function_start {
            Some(start) => start <= sym.addr,
            None => (sym.offset as u64) < MAX_SIZELESS,
        },
    }
}

/// The functions at an address, innermost first.
fn lines_of(sym: &Sym<'_>) -> Vec<NamedFunction> {
    let inlined = sym.inlined.iter().rev();
    inlined
        .filter(|function| !function.name.is_empty())
        .map(|function| resolved(&function.name, function.code_info.as_ref()))
        .chain([resolved(&sym.name, sym.code_info.as_deref())])
        .collect()
}

fn resolved(symbol: &str, code: Option<&CodeInfo<'_>>) -> NamedFunction {
    NamedFunction {
        name: demangle(symbol),
        system_name: cut(symbol).to_owned(),
        file: code.map_or_else(String::new, |code| {
            code.to_path().to_string_lossy().into_owned()
        }),
        line: code.and_then(|code| code.line).unwrap_or(0),
    }
}
