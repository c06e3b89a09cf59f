//! The result of a module's lookup, and the demangling of names.

use std::collections::BTreeMap;
use std::fs::File;

use super::NamedFunction;

/// Maximum length of a name, bytes. Longer symbols are truncated and not demangled, because a mangled name
/// can expand without bound.
const MAX_NAME: usize = 4096;

/// Names by address (innermost function first), and notes about what could not be read.
#[derive(Debug, Default)]
pub(crate) struct Named {
    pub by_address: BTreeMap<u64, Vec<NamedFunction>>,
    /// Starts of the functions according to the unwind tables, one for each address; may be shorter.
    pub starts: Vec<Option<u64>>,
    pub notes: Vec<String>,
}

/// Progress of a module's lookup.
pub(crate) enum Stage<'a> {
    /// The function starts have been found, one for each address.
    Starts(&'a [Option<u64>]),
    /// This file is going to be read.
    Reading(&'a File),
}

/// The name as a programmer wrote it, for Rust (both manglings, without the hash) and C++.
pub(crate) fn demangle(symbol: &str) -> String {
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

/// The first [`MAX_NAME`] bytes of a name, truncated at a character boundary.
pub(crate) fn cut(name: &str) -> &str {
    &name[..name.floor_char_boundary(MAX_NAME)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both Rust manglings lose their hash, C++ names get their types, and C names stay unchanged.
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

    /// A very long name is truncated at a character boundary.
    #[test]
    fn long_names_are_cut() {
        let name = "é".repeat(MAX_NAME);
        assert_eq!(demangle(&name).len(), MAX_NAME);
    }
}
