//! A recording, from the first map to the last sample: the one place that knows both the way of the
//! data and the control of the kernel's tables.

mod backends;
mod command;
mod cost;
mod ingest;
mod objects;
mod servers;
mod starts;
mod tables;
mod truncation;

use std::{
    collections::VecDeque,
    process::Child,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use agent_ebpf::counters::Counter;
use anyhow::{Context as _, Result, bail};

use self::{
    command::Held,
    ingest::{Ingest, Wanted},
    objects::Objects,
    tables::Tables,
};
use crate::{
    kernel::{self, Event, EventKind, Kernel, LifecycleEvents, Options, Record},
    process::{Registry, process_name},
    profile::{AttributionStats, RecordingMeta, Runtime, Unknown, Window},
};

pub use agent_ebpf::limits::CALLER_STACKS_PER_SECOND;
pub use command::exit_code;
pub use cost::{cpu_seconds, max_rss_bytes, now};
pub use starts::UnwindEntries;
pub use truncation::survive as survive_truncation;

/// How often the buffers are read. Long enough to cost nothing, short enough that a buffer of a
/// thousand mappings does not fill, nor the ring buffer: that one is made for an eighth of a second
/// ([`agent_ebpf::limits::ring_bytes`]).
const READ_EVERY: Duration = Duration::from_millis(100);

/// Shortest time between two reads, less than a tick at 99 Hz.
const REST: Duration = Duration::from_millis(5);

/// How long a command may take to end after it was sent the signal that ends the recording.
const COMMAND_GRACE: Duration = Duration::from_secs(5);

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
    /// How long; `None` until a signal, or until the command ends.
    pub duration: Option<Duration>,
    /// A command to start and record.
    pub command: Vec<String>,
    /// Stacks that each CPU may take in one second at sends to PostgreSQL servers.
    pub callers_per_second: u32,
    /// Whether the texts of queries keep their literals.
    pub full_query_text: bool,
    /// When the agent was started ([`now`]) .
    pub started: u64,
}

impl Config {
    fn has_target(&self) -> bool {
        !(self.pids.is_empty() && self.names.is_empty() && self.command.is_empty())
    }

    fn period_ns(&self) -> u64 {
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

/// What was recorded.
pub struct Recording {
    /// The samples.
    pub window: Window,
    /// Its circumstances.
    pub meta: RecordingMeta,
    /// What was measured beside the samples.
    pub runtime: Runtime,
    /// Exit status of the command, if there was one.
    pub command_status: Option<u8>,
}

/// Progress of a recording, told about once a second.
pub struct Progress {
    /// Time since the first sample could be taken.
    pub elapsed: Duration,
    /// Samples so far.
    pub samples: u64,
}

/// Records until the duration is over, the command has ended or a signal (its number in `signal`)
/// has come.
///
/// # Errors
/// The kernel refuses, a target does not exist, or the command cannot be started.
pub fn record(
    config: &Config,
    signal: &Arc<AtomicUsize>,
    progress: impl FnMut(Progress),
) -> Result<Recording> {
    for pid in &config.pids {
        if process_name(*pid).is_none() {
            bail!("no process has the pid {pid}; `ps -e` lists those there are");
        }
    }
    let mut session = Session::open(config)?;
    let held = if config.command.is_empty() {
        None
    } else {
        let name = &config.command[0];
        Some(Held::start(&config.command).with_context(|| format!("cannot start {name}"))?)
    };
    // Not before the command was forked: its limits and its priority are its own.
    raise_file_limit();
    cost::go_first();
    session.select(config, held.as_ref())?;
    let steal = cost::steal_seconds();
    let start = Instant::now();
    let start_unix = std::time::SystemTime::now();
    session.kernel.start(config.period_ns())?;
    let child = match held {
        Some(held) => {
            let name = &config.command[0];
            Some(
                held.release()
                    .with_context(|| format!("cannot run {name}"))?,
            )
        }
        None => None,
    };
    let (status, startup_cpu) = session.run(config, signal, start, child, progress)?;
    let duration = start.elapsed();
    session.finish()?;
    cost::go_as_usual();
    let stolen = steal.and_then(|before| Some(cost::steal_seconds()? - before));
    Ok(session.into_recording(config, duration, start_unix, stolen, startup_cpu, status))
}

struct Session {
    kernel: Kernel,
    control: Control,
    objects: Objects,
    tables: Tables,
    ingest: Ingest,
    wanted: Vec<Wanted>,
    /// Updates that the kernel refused, and the first reason.
    refused: (u64, Option<String>),
}

impl Session {
    fn open(config: &Config) -> Result<Session> {
        let kernel = Kernel::load(&Options {
            period_ns: config.period_ns(),
            filter: config.has_target(),
            callers_per_second: config.callers_per_second,
        })?;
        // First the events, then the processes that exist: nothing falls between.
        let lifecycle = LifecycleEvents::open(kernel.cpus())?;
        let mut control = Control::new(lifecycle, config.names.clone());
        control.registry.scan();
        // Servers are known before they are sampled, so that their clients' first sends are seen.
        control.changed = control
            .registry
            .iter()
            .filter(|process| servers::is_likely_server(&process.exe))
            .map(|process| process.pid)
            .collect();
        let mut session = Session {
            kernel,
            control,
            objects: Objects::default(),
            tables: Tables::new(),
            ingest: Ingest::new(config.full_query_text),
            wanted: Vec::new(),
            refused: (0, None),
        };
        session.update_kernel();
        Ok(session)
    }

    fn select(&mut self, config: &Config, held: Option<&Held>) -> Result<()> {
        for name in &config.names {
            self.kernel.select_name(name)?;
        }
        let named = self
            .control
            .registry
            .iter()
            .filter(|p| config.names.contains(&p.name));
        let named: Vec<u32> = named.map(|process| process.pid).collect();
        let command = held.map(Held::pid);
        for pid in config.pids.iter().copied().chain(named).chain(command) {
            self.kernel.select_process(pid)?;
        }
        Ok(())
    }

    /// The loop. Returns the command's exit status and the CPU time until the first sample could be
    /// unwound.
    fn run(
        &mut self,
        config: &Config,
        signal: &AtomicUsize,
        start: Instant,
        mut child: Option<Child>,
        mut progress: impl FnMut(Progress),
    ) -> Result<(Option<u8>, f64)> {
        let mut startup_cpu = cpu_seconds();
        let mut told = Duration::ZERO;
        loop {
            let left = config
                .duration
                .map(|duration| duration.saturating_sub(start.elapsed()));
            self.wait(left.unwrap_or(READ_EVERY).min(READ_EVERY));
            let before_first = self.ingest.first_unwound.is_none();
            self.cycle();
            if before_first {
                startup_cpu = cpu_seconds();
            }
            if start.elapsed() - told >= Duration::from_secs(1) {
                told = start.elapsed();
                let samples = self.ingest.window.counters().samples;
                progress(Progress {
                    elapsed: told,
                    samples,
                });
            }
            if let Some(child) = &mut child
                && let Some(status) = child.try_wait()?
            {
                return Ok((Some(exit_code(status)), startup_cpu));
            }
            let over = config
                .duration
                .is_some_and(|duration| start.elapsed() >= duration);
            let number = signal.load(Ordering::Relaxed);
            if over || number != 0 {
                let status = child
                    .map(|child| self.end_command(child, number as i32))
                    .transpose()?;
                return Ok((status, startup_cpu));
            }
        }
    }

    /// Ends the command with the signal that ended the recording, and goes on recording meanwhile.
    fn end_command(&mut self, mut child: Child, signal: i32) -> Result<u8> {
        let signal = if signal == 0 { libc::SIGTERM } else { signal };
        // SAFETY: the child has not been waited for, so the pid is still its own.
        unsafe { libc::kill(child.id() as i32, signal) };
        let deadline = Instant::now() + COMMAND_GRACE;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait()? {
                return Ok(exit_code(status));
            }
            self.wait(READ_EVERY);
            self.cycle();
        }
        log::warn!("the command did not end within {COMMAND_GRACE:?} of the signal: killed");
        child.kill()?;
        Ok(exit_code(child.wait()?))
    }

    /// Waits until it is time to read.
    fn wait(&self, longest: Duration) {
        let before = Instant::now();
        self.kernel.wait(longest);
        // However often it is asked to hurry, the agent takes a rest between.
        let rested = before.elapsed();
        thread::sleep(REST.min(longest).saturating_sub(rested));
    }

    /// Reads everything there is, and tells the kernel what it lacked.
    fn cycle(&mut self) {
        let Session {
            kernel,
            control,
            objects,
            ingest,
            wanted,
            tables,
            ..
        } = self;
        kernel.read(now(), |record| match record {
            Record::StackCopy(copy) => ingest.stack_copy(&copy),
            Record::Backend(backend) => ingest.backends.said(&backend),
            Record::Caller(caller) => {
                wanted.extend(ingest.caller(&caller, &mut control.registry, objects));
            }
            Record::Sample(sample) => {
                control.advance(sample.header.time);
                let registry = &mut control.registry;
                wanted.extend(ingest.sample(&sample, registry, objects, &tables.servers));
            }
        });
        control.advance(u64::MAX);
        self.update_kernel();
        let time = self.control.read_until;
        let settled = self
            .tables
            .settle(&mut self.kernel, &mut self.objects, time);
        self.note_refusal(settled);
    }

    /// Selects, gives and forgets what the events and samples of this cycle ask for.
    fn update_kernel(&mut self) {
        for pid in std::mem::take(&mut self.control.selected_late) {
            let selected = self.kernel.select_process(pid);
            self.note_refusal(selected);
        }
        let mut changed = std::mem::take(&mut self.control.changed);
        changed.sort_unstable();
        changed.dedup();
        for pid in changed {
            let Some(process) = self.control.registry.known(pid) else {
                self.tables.forget(pid);
                continue;
            };
            let (kernel, objects) = (&mut self.kernel, &mut self.objects);
            // What was forked has what its parent had.
            let is_new = servers::is_likely_server(&process.exe) && kernel.space(pid).is_none();
            let told = match is_new {
                true => self
                    .tables
                    .give_unseen(kernel, objects, pid, &process.space),
                false => Ok(()),
            }
            .and_then(|()| self.tables.changed(kernel, objects, pid, &process.space));
            self.note_refusal(told);
        }
        let told = self.tables.servers.settle(&mut self.kernel);
        self.note_refusal(told);
        let told = self.kernel.set_wall_offset(cost::wall_offset());
        self.note_refusal(told);
        for wanted in std::mem::take(&mut self.wanted) {
            let given = self.give(wanted);
            self.note_refusal(given);
        }
        for pid in std::mem::take(&mut self.control.ended) {
            self.tables.forget(pid);
        }
    }

    fn give(&mut self, Wanted { pid, mm }: Wanted) -> Result<(), kernel::Error> {
        let (kernel, objects) = (&mut self.kernel, &mut self.objects);
        let registry = &self.control.registry;
        let Some(process) = registry.known(pid) else {
            return Ok(());
        };
        self.tables.give(kernel, objects, pid, mm, &process.space)?;
        // Its next children should not have to be sampled first: a server that forks workers is itself
        // hardly ever on a CPU.
        match process.parent.and_then(|parent| registry.known(parent)) {
            Some(parent) => self
                .tables
                .give_unseen(kernel, objects, parent.pid, &parent.space),
            None => Ok(()),
        }
    }

    /// A table that the kernel does not take costs the samples in it their speed, not the recording.
    fn note_refusal(&mut self, result: Result<(), kernel::Error>) {
        if let Err(error) = result {
            self.refused.0 += 1;
            self.refused.1.get_or_insert_with(|| error.to_string());
        }
    }

    /// Stops the clock and takes what is still in the buffers.
    fn finish(&mut self) -> Result<()> {
        self.kernel.stop()?;
        self.cycle();
        let Ingest {
            backends, window, ..
        } = &mut self.ingest;
        backends.complete_workers(window);
        self.ingest.learn_services(&self.control.registry);
        Ok(())
    }

    fn into_recording(
        mut self,
        config: &Config,
        duration: Duration,
        start: std::time::SystemTime,
        steal_seconds: Option<f64>,
        startup_cpu: f64,
        command_status: Option<u8>,
    ) -> Recording {
        let cpus = self.kernel.cpus().len() as u32;
        let count = |counter| self.kernel.counter(counter);
        let sampled = count(Counter::Sampled);
        log::debug!(
            "kernel: {sampled} samples, {} ns by its own clock, {} user frames, {} processes without room; {} \
             stacks continued here; {} blocks in use; {} files unreadable",
            count(Counter::SampleNanos),
            count(Counter::UserFrames),
            count(Counter::ProcessMapFull),
            self.ingest.continued,
            self.tables.blocks_in_use(),
            self.objects.unreadable,
        );
        let mut runtime = Runtime {
            expected_samples: (duration.as_secs_f64()
                * f64::from(config.frequency)
                * f64::from(cpus))
            .round() as u64,
            steal_seconds,
            startup_ms: self
                .ingest
                .first_unwound
                .map(|first| first.saturating_sub(config.started) as f64 / 1e6),
            ..Runtime::default()
        };
        runtime.ticks.idle = count(Counter::Idle);
        runtime.ticks.filtered = count(Counter::Filtered);
        runtime.ticks.missed = count(Counter::MissedTicks);
        runtime.lost = [
            ("ring_buffer_full", count(Counter::RingFull)),
            ("process_events_lost", self.control.lifecycle.lost()),
            (
                "stack_table_full",
                self.ingest.window.counters().stack_table_full,
            ),
        ]
        .map(|(cause, number)| (cause.to_owned(), number))
        .into();
        runtime.agent.cpu_seconds.startup = startup_cpu;
        runtime.agent.cpu_seconds.recording = cpu_seconds() - startup_cpu;
        runtime.agent.max_rss_bytes.recording = max_rss_bytes();
        runtime.kernel.map_bytes = self.kernel.map_bytes();
        // By the program's own clock, so that ticks which were no samples do not count.
        let nanos = count(Counter::SampleNanos).saturating_sub(count(Counter::BackendNanos));
        runtime.kernel.run_ns_per_sample = (sampled > 0).then(|| nanos as f64 / sampled as f64);
        runtime.unwind_tables = self.tables.coverage();
        runtime.stack_copies.sent = count(Counter::StackCopies);
        runtime.stack_copies.refused = [
            ("over_budget", count(Counter::StackCopyBudget)),
            ("ring_buffer_full", count(Counter::StackCopyRingFull)),
        ]
        .map(|(cause, number)| (cause.to_owned(), number))
        .into();
        let unsent: u64 = runtime.stack_copies.refused.values().sum();
        if unsent > 0 {
            runtime.note(format!(
                "{unsent} stacks of processes that were not known yet could not be completed: more than {} a second \
                 and CPU, or no room",
                agent_ebpf::limits::STACK_COPIES_PER_SECOND
            ));
        }
        if runtime.unwind_tables.mappings_left_out > 0 {
            runtime.note(format!(
                "{} mappings of one process were left out: the kernel is told {} of each",
                runtime.unwind_tables.mappings_left_out,
                agent_ebpf::limits::MAX_MAPPINGS
            ));
        }
        if let (refused, Some(reason)) = &self.refused {
            runtime.note(format!(
                "the kernel refused {refused} updates of tables; the first: {reason}"
            ));
        }
        let meta = RecordingMeta {
            host: read_line("/proc/sys/kernel/hostname"),
            kernel: read_line("/proc/sys/kernel/osrelease"),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            target: config.target(),
            start_unix_ns: start
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |since| since.as_nanos() as i64),
            duration_ns: duration.as_nanos() as u64,
            frequency_hz: config.frequency,
            cpus,
        };
        runtime.attribution = self.attribution(config);
        let queries = self.ingest.backends.queries();
        self.ingest.window.set_queries(queries);
        Recording {
            window: self.ingest.window,
            meta,
            runtime,
            command_status,
        }
    }
}

impl Session {
    fn attribution(&self, config: &Config) -> Option<AttributionStats> {
        let servers = self.tables.servers.count();
        if servers == 0 {
            return None;
        }
        let count = |counter| self.kernel.counter(counter);
        let each = |nanos, number| {
            let number = count(number);
            (number > 0).then(|| count(nanos) as f64 / number as f64)
        };
        let counts = &self.ingest.backends.counts;
        let unknown = Unknown::ALL.map(|reason| {
            let samples = counts.unknown.get(&reason).copied().unwrap_or(0);
            (reason.name().to_owned(), samples)
        });
        let (sends, stacks) = (count(Counter::Sends), count(Counter::CallerStacks));
        Some(AttributionStats {
            servers: servers as u64,
            server_samples: counts.samples,
            backend_samples: counts.for_clients,
            with_query: counts.with_query,
            starting_workers: counts.starting,
            between_statements: counts.between,
            with_caller: counts.with_caller,
            without_caller: unknown.into(),
            other_queries: self.ingest.backends.other_queries(),
            sends,
            caller_stacks: stacks,
            caller_stack_budget: config.callers_per_second,
            connections_refused: count(Counter::ConnectionMapFull),
            send_ns: (sends > stacks)
                .then(|| count(Counter::SendNanos) as f64 / (sends - stacks) as f64),
            caller_stack_ns: each(Counter::CallerNanos, Counter::CallerStacks),
            backend_ns: each(Counter::BackendNanos, Counter::Backends),
        })
    }
}

/// What happens to processes: read, put in order, and taken up as far as the samples have come.
struct Control {
    lifecycle: LifecycleEvents,
    registry: Registry,
    /// Events read and not yet taken up, by time.
    events: VecDeque<Event>,
    /// Everything that happened before this (nanoseconds) has been read into `events`.
    read_until: u64,
    /// Processes whose address space is another than before.
    changed: Vec<u32>,
    /// Processes that have ended.
    ended: Vec<u32>,
    /// Names that are selected, and processes that came to have one.
    names: Vec<String>,
    selected_late: Vec<u32>,
}

impl Control {
    fn new(lifecycle: LifecycleEvents, names: Vec<String>) -> Control {
        Control {
            lifecycle,
            registry: Registry::default(),
            events: VecDeque::new(),
            read_until: 0,
            changed: Vec::new(),
            ended: Vec::new(),
            names,
            selected_late: Vec::new(),
        }
    }

    /// Takes up everything that happened up to `time`.
    fn advance(&mut self, time: u64) {
        if time >= self.read_until {
            // The time first: what is not read now happened later.
            self.read_until = now();
            let mut fresh = Vec::new();
            self.lifecycle.read(&mut fresh);
            self.events.extend(fresh);
        }
        while let Some(event) = self.events.pop_front_if(|event| event.time <= time) {
            self.apply(event);
        }
    }

    fn apply(&mut self, event: Event) {
        let pid = event.pid;
        match &event.kind {
            EventKind::Exec { name } | EventKind::Rename { name, .. }
                if self.names.contains(name) =>
            {
                self.selected_late.push(pid);
            }
            EventKind::Exit => self.ended.push(pid),
            _ => {}
        }
        if self.registry.apply(event) {
            self.changed.push(pid);
        }
    }
}

/// Allows as many open files as may be: every mapped file is kept open until its symbols are read.
fn raise_file_limit() {
    // SAFETY: the struct is valid; the second call only raises the soft limit to the hard one.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

fn read_line(path: &str) -> String {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}
