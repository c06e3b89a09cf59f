//! Looks up the names of kernel addresses in kallsyms.

use std::collections::BTreeMap;

use blazesym::MaybeDefault;
use blazesym::symbolize::source::{Kernel, Source};
use blazesym::symbolize::{Input, Symbolized, Symbolizer};

use super::names::{Named, cut};
use super::{NamedFunction, Options};

/// Maximum size of a function, bytes. Kallsyms gives no sizes, so a symbol reaches to the next one, which
/// can be gigabytes away behind the last symbol of a region (module memory, BPF programs that are not
/// listed). The longest functions of a distribution's kernel are about 100 KiB long.
const MAX_FUNCTION: usize = 256 * 1024;

/// Looks up every address (sorted) in kallsyms.
pub(super) fn symbolize(addresses: &[u64], options: &Options<'_>) -> Named {
    let source = Source::Kernel(Kernel {
        kallsyms: MaybeDefault::Some(options.kallsyms.clone()),
        vmlinux: MaybeDefault::None,
        ..Kernel::default()
    });
    let symbolizer = Symbolizer::builder()
        .enable_code_info(false)
        .enable_inlined_fns(false)
        .enable_demangling(false)
        .build();
    let symbols = match symbolizer.symbolize(&source, Input::AbsAddr(addresses)) {
        Ok(symbols) => symbols,
        Err(error) => {
            let note = format!(
                "kernel frames have no names: {}: {error:#}",
                options.kallsyms.display()
            );
            return Named {
                notes: vec![note],
                ..Named::default()
            };
        }
    };
    let by_address: BTreeMap<_, _> = addresses
        .iter()
        .zip(&symbols)
        .filter_map(|(address, symbol)| match symbol {
            Symbolized::Sym(sym) if sym.offset < MAX_FUNCTION => {
                Some((*address, vec![named(&sym.name)]))
            }
            _ => None,
        })
        .collect();
    let mut notes = Vec::new();
    if by_address.is_empty() && !addresses.is_empty() {
        notes.push(format!(
            "kernel frames have no names: {} hides its addresses (kernel.kptr_restrict; reading \
             them needs CAP_SYSLOG)",
            options.kallsyms.display()
        ));
    }
    Named {
        by_address,
        notes,
        ..Named::default()
    }
}

fn named(symbol: &str) -> NamedFunction {
    let name = cut(symbol).to_owned();
    NamedFunction {
        system_name: name.clone(),
        name,
        file: String::new(),
        line: 0,
    }
}
