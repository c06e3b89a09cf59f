//! What is asked of a recording.

use std::time::Duration;

use crate::kernel::Senders;

/// Names that `--comm` takes at most: the size of the kernel's map.
pub const MAX_NAMES: usize = agent_ebpf::limits::MAX_TARGET_NAMES as usize;

/// What to record.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Processes, with the children they will have.
    pub pids: Vec<u32>,
    /// Names of processes or threads.
    pub names: Vec<String>,
    /// Samples per second and CPU.
    pub frequency: u32,
    /// The process group that the command joins; `None`: this process's.
    pub process_group: Option<i32>,
    /// How long; `None` until a signal, or until the command ends.
    pub duration: Option<Duration>,
    /// A command to start and record.
    pub command: Vec<String>,
    /// Stacks that each CPU may take in one second at sends to PostgreSQL servers.
    pub callers_per_second: u32,
    /// Where sends are to be seen; `None`: at the cheapest place that the kernel has.
    pub senders: Option<Senders>,
    /// Whether the texts of queries keep their literals.
    pub full_query_text: bool,
    /// When the agent was started ([`now`](super::now)).
    pub started: u64,
}

impl Config {
    /// Whether less than the whole machine is recorded.
    pub fn has_target(&self) -> bool {
        !(self.pids.is_empty() && self.names.is_empty() && self.command.is_empty())
    }

    /// Nanoseconds between two samples of a CPU.
    pub fn period_ns(&self) -> u64 {
        1_000_000_000 / u64::from(self.frequency.max(1))
    }

    /// What is recorded, for titles.
    pub fn target(&self) -> String {
        let pids = self.pids.iter().map(|pid| format!("pid {pid}"));
        let names = self.names.iter().map(|name| format!("comm {name}"));
        let command = (!self.command.is_empty()).then(|| self.command.join(" "));
        let targets: Vec<_> = pids.chain(names).chain(command).collect();
        if targets.is_empty() {
            return "whole machine".to_owned();
        }
        targets.join(", ")
    }
}
