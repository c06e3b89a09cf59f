//! The names of a module's addresses, and how a name is written.

use std::collections::BTreeMap;
use std::fs::File;

use super::NamedFunction;

/// Longer symbols are not demangled (a mangled name can expand without bound) and cut.
const MAX_NAME: usize = 4096;

/// Names by address (innermost function first), and what went wrong on the way.
#[derive(Debug, Default)]
pub(crate) struct Named {
    pub by_address: BTreeMap<u64, Vec<NamedFunction>>,
    /// Where the functions start by the unwind tables, one per address; may be shorter.
    pub starts: Vec<Option<u64>>,
    pub notes: Vec<String>,
}

/// How far the look-up of a module has come.
pub(crate) enum Stage<'a> {
    /// The functions' starts are known, one per address.
    Starts(&'a [Option<u64>]),
    /// This file will be read.
    Reading(&'a File),
}

/// The name that a programmer wrote: Rust (both manglings, without the hash) and C++.
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

/// At most [`MAX_NAME`] bytes, whole characters.
pub(crate) fn cut(name: &str) -> &str {
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
