//! The figures of a recording: `--summary json`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use agent_ebpf::sample::Outcome;
use serde::{Deserialize, Serialize};

use crate::profile::{
    AgentCost, AttributionStats, KernelCost, Location, ResolvedProfile, ResolvedSample,
    StackCopies, UnwindTables, key,
};

/// What was recorded, how complete it is, and what it cost. Shares are between 0 and 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Host name.
    pub host: String,
    /// Kernel release.
    pub kernel_release: String,
    /// What was recorded.
    pub target: String,
    /// Length of the recording, seconds.
    pub duration_seconds: f64,
    /// Samples per second and CPU.
    pub frequency_hz: u32,
    /// Number of CPUs that were sampled.
    pub cpus: u32,
    /// Samples received.
    pub samples: u64,
    /// Samples that the timers should have produced: frequency × CPUs × time.
    pub expected_samples: u64,
    /// Ticks on an idle CPU. These are expected, and are not samples.
    pub idle_ticks: u64,
    /// Ticks in processes that were not targets.
    pub filtered_ticks: u64,
    /// Ticks that did not come (late timers, CPUs stolen by the hypervisor, a program that the kernel
    /// skipped).
    pub missed_ticks: u64,
    /// CPU time that the hypervisor took during the recording, seconds.
    pub steal_seconds: Option<f64>,
    /// Samples lost in the agent's own pipeline, by cause.
    pub lost: BTreeMap<String, u64>,
    /// Stack copies of the samples that the kernel could not unwind.
    #[serde(default)]
    pub stack_copies: StackCopies,
    /// Samples by how unwinding ended. Every outcome is listed, even with 0.
    pub outcomes: BTreeMap<String, u64>,
    /// Share of the samples with a user stack in which the end of that stack was proven. `None` if no
    /// sample has a user stack.
    pub rooted_share: Option<f64>,
    /// Frames of all samples. A frame in ten samples counts ten times; functions inlined into it do not
    /// count.
    pub frames: u64,
    /// Of these, frames without a name: neither the function nor its start is known, only the module and an
    /// address.
    pub frames_unnamed: u64,
    /// Of these, frames that are named by module and function start, because the module has no symbol
    /// there. They do not count as unnamed.
    pub frames_module_only: u64,
    /// Frames per sample.
    pub stack_depth: StackDepth,
    /// How much of the files' code the unwind tables cover.
    #[serde(default)]
    pub unwind_tables: UnwindTables,
    /// What the agent consumed.
    pub agent: AgentCost,
    /// What its programs in the kernel consumed.
    pub kernel: KernelCost,
    /// Milliseconds until the first sample that could be unwound.
    pub startup_ms: Option<f64>,
    /// Number of entries at the end of the recording, by collection: the maps of the kernel programs, and
    /// the agent's own caches.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sizes: BTreeMap<String, u64>,
    /// Runs that the kernel skipped, by kernel program.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub skipped_runs: BTreeMap<String, u64>,
    /// Processes by name, most samples first.
    pub processes: Vec<ProcessSummary>,
    /// How well the work of PostgreSQL's backends could be attributed. `None` if no server was seen.
    pub attribution: Option<AttributionStats>,
    /// Things the reader should know.
    pub notes: Vec<String>,
    /// The files that were written.
    pub files: Vec<String>,
}

/// Frames per sample, weighted by samples.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StackDepth {
    /// Median.
    pub p50: u64,
    /// Deepest.
    pub max: u64,
}

/// The processes of one name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcessSummary {
    /// The name (comm).
    pub name: String,
    /// Their process ids, ascending.
    pub pids: Vec<u32>,
    /// Their samples.
    pub samples: u64,
    /// Share of all samples.
    pub share: f64,
    /// As [`Summary::rooted_share`], for these processes.
    pub rooted_share: Option<f64>,
}

/// Samples with a user stack, and those of them whose end was proven.
#[derive(Clone, Copy, Default)]
struct Rooted {
    user: u64,
    complete: u64,
}

impl Rooted {
    fn add(&mut self, outcome: Option<Outcome>, count: u64) {
        // A sample whose outcome is not known (in another tool's file) does not count as proven.
        if outcome != Some(Outcome::KernelOnly) {
            self.user += count;
            if outcome.is_some_and(Outcome::is_complete) {
                self.complete += count;
            }
        }
    }

    fn share(self) -> Option<f64> {
        (self.user > 0).then(|| self.complete as f64 / self.user as f64)
    }
}

impl Summary {
    /// Computes the figures of the samples, and copies what the session measured.
    pub fn of(profile: &ResolvedProfile) -> Summary {
        let meta = &profile.meta;
        let runtime = &profile.runtime;
        let mut summary = Summary {
            host: meta.host.clone(),
            kernel_release: meta.kernel.clone(),
            target: meta.target.clone(),
            duration_seconds: meta.duration_ns as f64 / 1e9,
            frequency_hz: meta.frequency_hz,
            cpus: meta.cpus,
            samples: profile.total_count(),
            expected_samples: runtime.expected_samples,
            idle_ticks: runtime.ticks.idle,
            filtered_ticks: runtime.ticks.filtered,
            missed_ticks: runtime.ticks.missed,
            steal_seconds: runtime.steal_seconds,
            lost: runtime.lost.clone(),
            outcomes: Outcome::ALL.map(|o| (o.name().to_owned(), 0)).into(),
            stack_copies: runtime.stack_copies.clone(),
            unwind_tables: runtime.unwind_tables.clone(),
            agent: runtime.agent,
            kernel: runtime.kernel,
            startup_ms: runtime.startup_ms,
            sizes: runtime.sizes.clone(),
            skipped_runs: runtime.skipped_runs.clone(),
            attribution: runtime.attribution.clone(),
            notes: runtime.notes.clone(),
            ..Summary::default()
        };
        let mut rooted = Rooted::default();
        for sample in &profile.samples {
            let name = sample.label(key::OUTCOME).unwrap_or("untold");
            *summary.outcomes.entry(name.to_owned()).or_insert(0) += sample.count;
            rooted.add(outcome(sample), sample.count);
        }
        summary.rooted_share = rooted.share();
        summary.count_frames(profile);
        summary.processes = processes(profile);
        summary
    }

    fn count_frames(&mut self, profile: &ResolvedProfile) {
        let mut depths: BTreeMap<u64, u64> = BTreeMap::new();
        for sample in &profile.samples {
            let depth = sample.stack.len() as u64;
            *depths.entry(depth).or_insert(0) += sample.count;
            self.frames += depth * sample.count;
            let locations = sample.stack.iter();
            for location in locations.filter_map(|id| profile.locations.get(id.0 as usize)) {
                match named(profile, location) {
                    Named::No => self.frames_unnamed += sample.count,
                    Named::ByModule => self.frames_module_only += sample.count,
                    Named::BySymbol => {}
                }
            }
        }
        self.stack_depth = StackDepth {
            p50: median(&depths),
            max: depths.keys().next_back().copied().unwrap_or(0),
        };
    }

    /// Samples lost in the agent's own pipeline, for all causes together.
    pub fn lost_total(&self) -> u64 {
        self.lost.values().sum()
    }
}

enum Named {
    No,
    ByModule,
    BySymbol,
}

fn named(profile: &ResolvedProfile, location: &Location) -> Named {
    let mut frames = profile.frames_at(location).peekable();
    if frames.peek().is_none() {
        return Named::No;
    }
    let mut best = Named::BySymbol;
    for frame in frames {
        if frame.function.name.is_empty() || frame.function.is_address_only() {
            return Named::No;
        }
        if frame.function.is_module_only() {
            best = Named::ByModule;
        }
    }
    best
}

fn outcome(sample: &ResolvedSample) -> Option<Outcome> {
    let name = sample.label(key::OUTCOME)?;
    Outcome::ALL.into_iter().find(|o| o.name() == name)
}

fn median(counts: &BTreeMap<u64, u64>) -> u64 {
    let half = counts.values().sum::<u64>().div_ceil(2);
    let mut seen = 0;
    for (value, count) in counts {
        seen += count;
        if seen >= half {
            return *value;
        }
    }
    0
}

fn processes(profile: &ResolvedProfile) -> Vec<ProcessSummary> {
    #[derive(Default)]
    struct Group {
        pids: BTreeSet<u32>,
        samples: u64,
        rooted: Rooted,
    }
    let mut groups: HashMap<&str, Group> = HashMap::new();
    for sample in &profile.samples {
        let name = sample.label(key::COMM).unwrap_or("[no process]");
        let group = groups.entry(name).or_default();
        let pid = sample
            .label(key::PID)
            .and_then(|pid| pid.parse::<u32>().ok());
        group.pids.extend(pid);
        group.samples += sample.count;
        group.rooted.add(outcome(sample), sample.count);
    }
    let total = profile.total_count().max(1) as f64;
    let mut processes: Vec<_> = groups
        .into_iter()
        .map(|(name, group)| ProcessSummary {
            name: name.to_owned(),
            pids: group.pids.into_iter().collect(),
            samples: group.samples,
            share: group.samples as f64 / total,
            rooted_share: group.rooted.share(),
        })
        .collect();
    processes.sort_by(|a, b| b.samples.cmp(&a.samples).then_with(|| a.name.cmp(&b.name)));
    processes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&BTreeMap::new()), 0);
        assert_eq!(median(&BTreeMap::from([(3, 1)])), 3);
        assert_eq!(median(&BTreeMap::from([(1, 5), (9, 4)])), 1);
        assert_eq!(median(&BTreeMap::from([(1, 4), (9, 5)])), 9);
    }
}
