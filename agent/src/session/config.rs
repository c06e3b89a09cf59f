//! The parameters of a recording.

use std::time::Duration;

use crate::kernel::Senders;

/// Maximum number of names for `--comm`: the size of the kernel's map.
pub const MAX_NAMES: usize = agent_ebpf::limits::MAX_TARGET_NAMES as usize;

/// What to record.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Pids of the processes to record. Their future children are recorded too.
    pub pids: Vec<u32>,
    /// Names of the processes or threads to record.
    pub names: Vec<String>,
    /// Samples per second and CPU.
    pub frequency: u32,
    /// The process group that the command joins; `None`: the agent's own.
    pub process_group: Option<i32>,
    /// How long to record; `None`: until a signal arrives or the command ends.
    pub duration: Option<Duration>,
    /// A command to start and record.
    pub command: Vec<String>,
    /// Maximum number of stacks that each CPU may take per second at sends to PostgreSQL servers.
    pub callers_per_second: u32,
    /// Where sends are observed; `None`: at the cheapest place that the kernel supports.
    pub senders: Option<Senders>,
    /// Whether query texts keep their literals.
    pub full_query_text: bool,
    /// When the agent was started, nanoseconds ([`now`](super::now)).
    pub started: u64,
}

impl Config {
    /// Whether only selected processes are recorded, and not the whole machine.
    pub fn has_target(&self) -> bool {
        !(self.pids.is_empty() && self.names.is_empty() && self.command.is_empty())
    }

    /// Nanoseconds between two samples of a CPU.
    pub fn period_ns(&self) -> u64 {
        1_000_000_000 / u64::from(self.frequency.max(1))
    }

    /// A description of what is recorded, for titles.
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
