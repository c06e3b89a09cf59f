//! What the compiled tables cover, counted file by file.

use std::collections::HashSet;

use agent_ebpf::unwind::Unsupported;

use crate::{process::ObjectId, profile::UnwindTables, unwind::Table};

/// The sum over all files.
#[derive(Debug, Default)]
pub struct Coverage {
    counted: HashSet<ObjectId>,
    sum: UnwindTables,
    /// The process of which most mappings were left out.
    pub most_mapped: u32,
}

impl Coverage {
    /// Counts a file's table, once: it may have been freed and compiled again.
    pub fn add(&mut self, id: ObjectId, table: &Table) {
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

    /// Counts a file without a table, once.
    pub fn add_failed(&mut self, id: ObjectId) {
        self.sum.failed += u64::from(self.counted.insert(id));
    }

    /// The object was closed: its number does not come again.
    pub fn forget(&mut self, id: ObjectId) {
        self.counted.remove(&id);
    }

    /// A process had so many mappings more than the kernel can be told.
    pub fn left_out(&mut self, pid: u32, mappings: u64) {
        if mappings > self.sum.mappings_left_out {
            self.sum.mappings_left_out = mappings;
            self.most_mapped = pid;
        }
    }

    /// The figures.
    pub fn figures(&self) -> UnwindTables {
        let mut figures = self.sum.clone();
        let unsupported: u64 = figures.unsupported_bytes.values().sum();
        figures.unsupported_share =
            (figures.text_bytes > 0).then(|| unsupported as f64 / figures.text_bytes as f64);
        figures
    }
}
