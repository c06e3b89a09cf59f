//! Symbols of ELF files.

use std::collections::BTreeMap;
use std::fs::File;

use blazesym::symbolize::source::{Elf, Source};
use blazesym::symbolize::{CodeInfo, Input, Sym, Symbolized, Symbolizer};

use super::debug_file::{self, Found, Origin};
use super::lookup::Stage;
use super::open::own_path;
use super::{Options, Resolved};

/// How far a symbol without a size reaches at most, where no unwind entry says where the next
/// function begins: hand-written assembly (`_start`, `_init`) is shorter.
const MAX_SIZELESS: u64 = 4096;

/// Longer symbols are not demangled (a mangled name can expand without bound) and cut.
const MAX_NAME: usize = 4096;

/// Names by address (innermost function first), and what went wrong on the way.
#[derive(Debug, Default)]
pub(super) struct Named {
    pub by_address: BTreeMap<u64, Vec<Resolved>>,
    /// Where the functions start by the unwind tables, one per address; may be shorter.
    pub starts: Vec<Option<u64>>,
    pub notes: Vec<String>,
}

/// Looks up every address (svma, sorted) in a file, and in its debug file. `starts` are the functions'
/// starts by the unwind tables, one per address.
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

/// Where symbols may be, the most telling first: the debug file, the file itself with its debug information
/// (which may be broken), the file without it.
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

/// Whether the symbol really covers the address that it was found for.
fn covers(sym: &Sym<'_>, function_start: Option<u64>) -> bool {
    if sym.name.is_empty() {
        return false;
    }
    match sym.size {
        Some(size) if size > 0 => sym.offset < size,
        // A DWARF function of several ranges (hot and cold parts): found by its exact ranges, but
        // told without start and size.
        _ if sym.addr == 0 && sym.code_info.is_some() => true,
        _ => match function_start {
            Some(start) => start <= sym.addr,
            None => (sym.offset as u64) < MAX_SIZELESS,
        },
    }
}

/// The functions at an address, innermost first.
fn lines_of(sym: &Sym<'_>) -> Vec<Resolved> {
    let inlined = sym.inlined.iter().rev();
    inlined
        .filter(|function| !function.name.is_empty())
        .map(|function| resolved(&function.name, function.code_info.as_ref()))
        .chain([resolved(&sym.name, sym.code_info.as_deref())])
        .collect()
}

fn resolved(symbol: &str, code: Option<&CodeInfo<'_>>) -> Resolved {
    Resolved {
        name: demangle(symbol),
        system_name: cut(symbol).to_owned(),
        file: code.map_or_else(String::new, |code| {
            code.to_path().to_string_lossy().into_owned()
        }),
        line: code.and_then(|code| code.line).unwrap_or(0),
    }
}

/// The name that a programmer wrote: Rust (both manglings, without the hash) and C++.
pub(super) fn demangle(symbol: &str) -> String {
    if symbol.len() > MAX_NAME {
        return cut(symbol).to_owned();
    }
    if let Ok(rust) = rustc_demangle::try_demangle(symbol) {
        return cut(&format!("{rust:#}")).to_owned();
    }
    if symbol.starts_with("_Z")
        && let Ok(parsed) = cpp_demangle::Symbol::new(symbol)
        && let Ok(name) = parsed.demangle()
    {
        return cut(&name).to_owned();
    }
    symbol.to_owned()
}

/// At most [`MAX_NAME`] bytes, whole characters.
pub(super) fn cut(name: &str) -> &str {
    &name[..name.floor_char_boundary(MAX_NAME)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both Rust manglings lose their hash, C++ gets its types, C stays as it is.
    #[test]
    fn demangles() {
        for (symbol, name) in [
            (
                "_ZN4core9panicking9panic_fmt17h5f1a6fd39197ad62E",
                "core::panicking::panic_fmt",
            ),
            ("_RNvC6_123foo3bar", "123foo::bar"),
            ("_ZNSt6vectorIiE5clearEv", "std::vector<int>::clear()"),
            ("ExecSeqScan", "ExecSeqScan"),
            ("_Z", "_Z"),
        ] {
            assert_eq!(demangle(symbol), name);
        }
    }

    /// A hostile name is cut at a character's boundary.
    #[test]
    fn long_names_are_cut() {
        let name = "é".repeat(MAX_NAME);
        assert_eq!(demangle(&name).len(), MAX_NAME);
    }
}
