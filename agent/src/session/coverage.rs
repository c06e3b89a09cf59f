//! How much code the compiled tables cover, summed over files.

use std::collections::HashSet;

use agent_ebpf::unwind::Unsupported;

use crate::{process::ObjectId, profile::UnwindTables, unwind::Table};

/// The sum over all files.
#[derive(Debug, Default)]
pub struct Coverage {
    counted: HashSet<ObjectId>,
    /// Open files whose table could not be compiled or loaded so far.
    failed: HashSet<ObjectId>,
    sum: UnwindTables,
    /// The process with the most mappings that were left out.
    pub most_mapped: u32,
}

impl Coverage {
    /// Counts a file's table, once per file: a table may be freed and compiled again.
    pub fn add(&mut self, id: ObjectId, table: &Table) {
        self.failed.remove(&id);
        if !self.counted.insert(id) {
            return;
        }
        let sum = &mut self.sum;
        sum.files += 1;
        sum.text_bytes += table.text;
        sum.covered_bytes += table.covered;
        sum.derived_bytes += table.analysed;
        sum.frame_pointer_bytes += table.guessed;
        for (reason, bytes) in Unsupported::ALL.into_iter().zip(table.unsupported) {
            let name = reason.name().to_owned();
            *sum.unsupported_bytes.entry(name).or_insert(0) += bytes;
        }
    }

    /// Counts a file whose table could not be compiled or loaded, once per file, until [`Coverage::add`] counts it.
    pub fn add_failed(&mut self, id: ObjectId) {
        if !self.counted.contains(&id) {
            self.failed.insert(id);
        }
    }

    /// Forgets an object that was closed; its number is not used again.
    pub fn forget(&mut self, id: ObjectId) {
        self.counted.remove(&id);
        self.sum.failed += u64::from(self.failed.remove(&id));
    }

    /// Notes that this many mappings of a process were left out of its address space in the kernel.
    pub fn left_out(&mut self, pid: u32, mappings: u64) {
        if mappings > self.sum.mappings_left_out {
            self.sum.mappings_left_out = mappings;
            self.most_mapped = pid;
        }
    }

    /// The sums, and the share of unsupported code.
    pub fn figures(&self) -> UnwindTables {
        let mut figures = self.sum.clone();
        figures.failed += self.failed.len() as u64;
        let unsupported: u64 = figures.unsupported_bytes.values().sum();
        figures.unsupported_share =
            (figures.text_bytes > 0).then(|| unsupported as f64 / figures.text_bytes as f64);
        figures
    }
}
