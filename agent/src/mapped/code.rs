//! The code of one process, by mapping: everything that the walk on a stack copy needs, in a
//! form that can be sent to another thread.

use std::sync::Arc;

use super::objects::{Mapped, Objects};
use crate::{
    process::{AddressSpace, Backing},
    unwind::RuleLookup,
};

/// Where the rules of a mapping come from.
#[derive(Debug)]
enum Rules {
    /// The file's unwind entries, and avma − svma.
    File(Arc<Mapped>, u64),
    /// There are no unwind entries: the frame pointer is followed.
    FramePointer,
    /// The mapping holds no executable segment of its file.
    Unknown,
    /// The file could not be opened so far.
    Pending,
}

/// A mapping and its rules.
#[derive(Debug)]
struct Stretch {
    start: u64,
    end: u64,
    rules: Rules,
}

/// The executable mappings of a process with their files.
#[derive(Debug)]
pub struct Code {
    /// Ordered by address, not overlapping.
    stretches: Vec<Stretch>,
}

impl Code {
    /// The code of a process. Files that are not open yet are opened.
    pub fn of(space: &AddressSpace, objects: &mut Objects, pid: u32) -> Code {
        let stretches = space.mappings().iter().map(|mapping| {
            let rules = match objects.backing(pid, mapping) {
                Backing::Object(id) => match objects.get(id) {
                    Some(object) => match object.bias(mapping) {
                        Some(bias) => Rules::File(Arc::clone(object), bias),
                        None => Rules::Unknown,
                    },
                    None => Rules::Pending,
                },
                Backing::Private => Rules::FramePointer,
                Backing::Lost => Rules::Pending,
            };
            Stretch {
                start: mapping.start,
                end: mapping.end,
                rules,
            }
        });
        Code {
            stretches: stretches.collect(),
        }
    }

    /// Whether every file could be opened.
    pub fn is_whole(&self) -> bool {
        let is_pending = |stretch: &Stretch| matches!(stretch.rules, Rules::Pending);
        !self.stretches.iter().any(is_pending)
    }

    /// Whether reading the rules depends on nothing but this machine's disk.
    pub fn is_local(&self) -> bool {
        let is_local = |stretch: &Stretch| match &stretch.rules {
            Rules::File(mapped, _) => mapped.is_local,
            Rules::FramePointer | Rules::Unknown | Rules::Pending => true,
        };
        self.stretches.iter().all(is_local)
    }

    /// The rule for an address, read directly from its file, because the file's table may not exist yet. May block.
    pub fn rule(&self, avma: u64) -> RuleLookup {
        let after = self.stretches.partition_point(|s| s.start <= avma);
        let stretch = after.checked_sub(1).map(|at| &self.stretches[at]);
        let Some(stretch) = stretch.filter(|stretch| avma < stretch.end) else {
            return RuleLookup::UnknownMapping;
        };
        match &stretch.rules {
            Rules::FramePointer => RuleLookup::FramePointer,
            Rules::Unknown => RuleLookup::UnknownMapping,
            Rules::Pending => RuleLookup::TablesPending,
            Rules::File(mapped, bias) => match mapped.rule_at(avma.wrapping_sub(*bias)) {
                Some(rule) => RuleLookup::Rule(rule),
                None => RuleLookup::FramePointer,
            },
        }
    }
}
