//! The circumstances and measurements of a finished recording.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use agent_ebpf::counters::Counter;

use super::{Config, Recording, Session, open_window::OpenWindow};
use crate::cost::{self, max_rss_bytes};
use crate::profile::{
    AttributionStats, Pruned, RARE_STACKS, RecordingMeta, Runtime, StackCopies, Unknown,
};

/// When a recording was made, how it ended, and what was measured from outside the session.
pub struct Course {
    /// When it began.
    pub start: SystemTime,
    /// How long it lasted.
    pub duration: Duration,
    /// CPU time that the hypervisor took away during the recording, seconds; `None` if that could not be
    /// read.
    pub steal_seconds: Option<f64>,
    /// CPU time of the agent until the first sample could be unwound, seconds.
    pub startup_cpu: f64,
    /// Exit status of the command, if one was recorded.
    pub command_status: Option<u8>,
}

impl Session {
    /// The recording, with its circumstances and measurements.
    pub fn into_recording(mut self, config: &Config, course: &Course) -> Recording {
        let filled = self.rotate();
        self.log_counters(&filled);
        let meta = self.meta(config, course);
        let runtime = self.runtime(config, course, &filled);
        Recording {
            window: filled.finish(),
            meta,
            runtime,
            command_status: course.command_status,
        }
    }

    fn log_counters(&self, filled: &OpenWindow) {
        let count = |counter| self.kernel.counter(counter);
        log::debug!(
            "kernel: {} samples, {} ns by its own clock, {} user frames, {} processes without room; {} stacks \
             continued in user space; {} blocks in use; {} files unreadable",
            count(Counter::Sampled),
            count(Counter::SampleNanos),
            count(Counter::UserFrames),
            count(Counter::ProcessMapFull),
            filled.continued,
            self.tables.blocks_in_use(),
            self.objects.failures.other,
        );
    }

    fn meta(&self, config: &Config, course: &Course) -> RecordingMeta {
        let since_epoch = course.start.duration_since(UNIX_EPOCH);
        RecordingMeta {
            host: read_line("/proc/sys/kernel/hostname"),
            kernel: read_line("/proc/sys/kernel/osrelease"),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            target: config.target(),
            start_unix_ns: since_epoch.map_or(0, |since| since.as_nanos() as i64),
            duration_ns: course.duration.as_nanos() as u64,
            frequency_hz: config.frequency,
            cpus: self.kernel.cpus().len() as u32,
        }
    }

    fn runtime(&mut self, config: &Config, course: &Course, filled: &OpenWindow) -> Runtime {
        let count = |counter| self.kernel.counter(counter);
        let cpu_seconds = self.cpus.seconds(course.duration, self.kernel.cpus().len());
        let ticks = cpu_seconds * f64::from(config.frequency);
        let first = self.ingest.first_unwound;
        let mut runtime = Runtime {
            expected_samples: ticks.round() as u64,
            steal_seconds: course.steal_seconds,
            startup_ms: first.map(|first| first.saturating_sub(config.started) as f64 / 1e6),
            lost: by_cause([
                ("ring_buffer_full", count(Counter::RingFull)),
                ("process_events_lost", self.control.lifecycle.lost()),
                (
                    "stack_table_full",
                    filled.places.window.counters().stack_table_full,
                ),
            ]),
            unwind_tables: self.tables.coverage(),
            stack_copies: StackCopies {
                sent: count(Counter::StackCopies),
                refused: by_cause([
                    ("over_budget", count(Counter::StackCopyBudget)),
                    ("ring_buffer_full", count(Counter::StackCopyRingFull)),
                ]),
            },
            attribution: self.attribution(config, filled),
            sizes: self.sizes(),
            skipped_runs: self.kernel.skipped_runs(),
            ..Runtime::default()
        };
        runtime.ticks.idle = count(Counter::Idle);
        runtime.ticks.filtered = count(Counter::Filtered);
        runtime.ticks.missed = count(Counter::MissedTicks);
        runtime.agent.cpu_seconds.startup = course.startup_cpu;
        runtime.agent.cpu_seconds.recording = cost::cpu_seconds() - course.startup_cpu;
        runtime.agent.max_rss_bytes.recording = max_rss_bytes();
        runtime.kernel.map_bytes = self.kernel.map_bytes();
        // The program measures its own time, so that ticks which did not become samples do not count.
        let nanos = count(Counter::SampleNanos).saturating_sub(count(Counter::BackendNanos));
        runtime.kernel.run_ns_per_sample = mean(nanos, count(Counter::Sampled));
        self.note_bounds(&mut runtime, filled);
        runtime
    }

    /// The number of entries in the kernel's maps and in the agent's collections, at the end.
    fn sizes(&self) -> BTreeMap<String, u64> {
        let mut sizes = self.kernel.entries();
        let held = self.control.sizes().into_iter();
        let held = held.chain(self.tables.sizes()).chain([
            ("files", self.objects.len() as u64),
            ("servers", self.tables.servers.len() as u64),
            ("overdue_threads", self.objects.pool.overdue() as u64),
        ]);
        sizes.extend(held.map(|(name, size)| (name.to_owned(), size)));
        sizes
    }

    /// Adds notes about the bounds that were reached.
    fn note_bounds(&self, runtime: &mut Runtime, filled: &OpenWindow) {
        let unsent: u64 = runtime.stack_copies.refused.values().sum();
        if unsent > 0 {
            runtime.note(format!(
                "{unsent} stacks of processes that were not known yet could not be completed, because more than {} stack \
                 copies a second were needed on one CPU, or because the ring buffer was full",
                agent_ebpf::limits::STACK_COPIES_PER_SECOND
            ));
        }
        if runtime.unwind_tables.mappings_left_out > 0 {
            runtime.note(format!(
                "{} mappings of pid {} were left out, because at most {} mappings of a process fit into the kernel's tables",
                runtime.unwind_tables.mappings_left_out,
                self.tables.most_mapped(),
                agent_ebpf::limits::MAX_MAPPINGS
            ));
        }
        self.note_files(runtime, filled);
        if filled.places.window.programs() > 0 {
            runtime.note(format!(
                "there were so many processes and threads that later processes of {} programs have no pid of their own, \
                 but are counted together by program",
                filled.places.window.programs()
            ));
        }
        let Pruned {
            cut_short,
            by_program,
        } = filled.places.window.counters().pruned;
        if cut_short > 0 {
            runtime.note(format!(
                "there were more distinct stacks than fit into memory: {cut_short} samples of rare stacks lost their leaf \
                 end, which is shown as {RARE_STACKS}"
            ));
        }
        if by_program > 0 {
            runtime.note(format!(
                "there were more processes, threads and connections than fit into memory: {by_program} samples of rare \
                 ones are counted by program"
            ));
        }
        if self.tables.servers.refused > 0 {
            runtime.note(format!(
                "more than {} PostgreSQL servers ran at the same time: {} others had to wait for a free place, and their samples \
                 had no queries until then",
                agent_ebpf::limits::MAX_SERVERS,
                self.tables.servers.refused
            ));
        }
        for (program, runs) in runtime.skipped_runs.clone() {
            runtime.note(format!(
                "the kernel skipped {runs} runs of {program}, because another run or a system call of the agent was in progress on the same CPU: the senders of as \
                 many messages, or as many events of processes, may be missing"
            ));
        }
        for note in self.cpus.notes() {
            runtime.note(note);
        }
        if let (refused, Some(reason)) = &self.refused {
            runtime.note(format!(
                "the kernel refused {refused} updates of its tables; the first reason: {reason}"
            ));
        }
    }

    /// Adds notes about files and processes that could not be read, with remedies where there are any.
    fn note_files(&self, runtime: &mut Runtime, filled: &OpenWindow) {
        let failures = self.objects.failures;
        if failures.no_descriptors > 0 {
            runtime.note(format!(
                "the limit of open files ({}) was reached {} times: code in files that could not be opened has \
                 neither complete stacks nor names; raise the limit (`ulimit -n`, systemd: LimitNOFILE=)",
                file_limit(),
                failures.no_descriptors
            ));
        }
        if failures.too_large > 0 {
            runtime.note(format!(
                "{} times, files of FUSE file systems were too large to be read (the limits are 64 MiB for a file, 128 MiB for a file \
                 system, 512 MiB in total): code in them has neither complete stacks nor names",
                failures.too_large
            ));
        }
        let pool = self.objects.pool.counts();
        let waiting = self.objects.pool.overdue() + self.tables.abandoned();
        if pool.refused + filled.not_continued > 0 || waiting > 0 {
            runtime.note(format!(
                "{} files or processes did not answer in time (a dead network file system, FUSE?), and {waiting} have still \
                 not answered; {} further ones were not asked because of that, and {} stacks could not be completed",
                pool.overdue, pool.refused, filled.not_continued,
            ));
        }
        for subject in self.objects.pool.unanswered() {
            runtime.note(format!(
                "{subject} does not answer: code there has neither complete stacks nor names"
            ));
        }
        if pool.panicked > 0 {
            runtime.note(format!(
                "{} files or processes could not be read because of a bug in this program; please report it",
                pool.panicked
            ));
        }
    }

    fn attribution(&self, config: &Config, filled: &OpenWindow) -> Option<AttributionStats> {
        let servers = self.tables.servers.count();
        if servers == 0 {
            return None;
        }
        let count = |counter| self.kernel.counter(counter);
        let counts = &filled.counts;
        let unknown = Unknown::ALL.map(|reason| {
            let samples = counts.unknown.get(&reason).copied().unwrap_or(0);
            (reason.name(), samples)
        });
        let (sends, stacks) = (count(Counter::Sends), count(Counter::CallerStacks));
        Some(AttributionStats {
            servers,
            server_samples: counts.samples,
            backend_samples: counts.for_clients,
            with_query: counts.with_query,
            starting_workers: counts.starting,
            between_statements: counts.between,
            with_caller: counts.with_caller,
            with_partial_caller: counts.with_partial_caller,
            without_caller: by_cause(unknown),
            other_queries: filled.texts.overflow(),
            sends,
            caller_stacks: stacks,
            caller_stack_budget: config.callers_per_second,
            connections_refused: count(Counter::ConnectionMapFull),
            send_ns: mean(count(Counter::SendNanos), count(Counter::TimedSends)),
            caller_stack_ns: self.kernel.caller_stack_ns(),
            backend_ns: mean(count(Counter::BackendNanos), count(Counter::Backends)),
        })
    }
}

/// The limit of open files of this process.
fn file_limit() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nofile)
        .current
        .unwrap_or(u64::MAX)
}

fn by_cause<C: FromIterator<(String, u64)>, const N: usize>(numbers: [(&str, u64); N]) -> C {
    let named = |(cause, number): (&str, u64)| (cause.to_owned(), number);
    numbers.into_iter().map(named).collect()
}

/// The mean; `None` if `number` is 0.
fn mean(sum: u64, number: u64) -> Option<f64> {
    (number > 0).then(|| sum as f64 / number as f64)
}

fn read_line(path: &str) -> String {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}
