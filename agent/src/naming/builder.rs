//! Interns the parts of a [`ResolvedProfile`], so that each is stored once.

use std::collections::HashMap;
use std::sync::Arc;

use indexmap::{IndexMap, IndexSet};

use crate::profile::{Function, FunctionId, Line, Location, LocationId, Mapping, MappingId};
use crate::symbolize::NamedFunction;

#[derive(Default)]
pub(super) struct Builder {
    strings: HashMap<String, Arc<str>>,
    mappings: IndexMap<(Arc<str>, Arc<str>, bool), ()>,
    functions: IndexSet<Function>,
    pub locations: Vec<Location>,
}

impl Builder {
    pub fn string(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.strings.get(text) {
            return known.clone();
        }
        let shared: Arc<str> = Arc::from(text);
        self.strings.insert(text.to_owned(), shared.clone());
        shared
    }

    pub fn mapping(&mut self, name: &str, build_id: Option<&[u8]>, is_kernel: bool) -> MappingId {
        let build_id: String = build_id
            .unwrap_or_default()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let key = (self.string(name), self.string(&build_id), is_kernel);
        MappingId(self.mappings.insert_full(key, ()).0 as u32)
    }

    pub fn lines(&mut self, resolved: &[NamedFunction]) -> Vec<Line> {
        resolved
            .iter()
            .map(|resolved| {
                let function = Function {
                    name: self.string(&resolved.name),
                    system_name: self.string(&resolved.system_name),
                    file: self.string(&resolved.file),
                };
                Line {
                    function: FunctionId(self.functions.insert_full(function).0 as u32),
                    line: resolved.line,
                }
            })
            .collect()
    }

    pub fn location(&mut self, mapping: MappingId, address: u64, lines: Vec<Line>) -> LocationId {
        let id = LocationId(self.locations.len() as u32);
        self.locations.push(Location {
            mapping,
            address,
            lines,
        });
        id
    }

    /// A location that does not stand for code. It is in a module of its own, or in the module for its kind
    /// (process, query, caller).
    pub fn mark(&mut self, module: &str, name: &str) -> LocationId {
        let mapping = self.mapping(module, None, false);
        let lines = self.lines(&[NamedFunction {
            name: name.to_owned(),
            // The system name marks this name as a real one, and not as a replacement for a missing symbol.
            system_name: name.to_owned(),
            file: String::new(),
            line: 0,
        }]);
        self.location(mapping, 0, lines)
    }

    pub fn finish(self) -> (Vec<Mapping>, Vec<Function>, Vec<Location>) {
        let mappings = self
            .mappings
            .into_keys()
            .map(|(name, build_id, is_kernel)| Mapping {
                name,
                build_id,
                is_kernel,
            })
            .collect();
        (
            mappings,
            self.functions.into_iter().collect(),
            self.locations,
        )
    }
}
