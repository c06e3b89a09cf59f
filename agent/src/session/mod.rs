//! A recording, from loading the kernel programs to the last sample. This is the only module that connects
//! the two flows of the agent: the data of the samples, and the control of the kernel's tables.

mod command;
mod compiler;
mod config;
mod control;
mod coverage;
mod cpus;
mod figures;
mod ingest;
mod open_window;
mod processes;
mod repair;
mod starts;
mod tables;
mod truncation;

use std::{
    collections::HashSet,
    process::Child,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use self::{
    command::HeldCommand,
    control::Control,
    cpus::Cpus,
    figures::Course,
    ingest::{Ingest, TableRequest},
    open_window::OpenWindow,
    tables::Tables,
};
use crate::{
    clock::{WallClockReader, now},
    cost,
    kernel::{self, Kernel, LifecycleEvents, Options, Record},
    mapped::Objects,
    postgres::is_likely_server,
    process::{
        Backing, ObjectId, exists, in_initial_pid_namespace, process_name, process_of_thread,
    },
    profile::{RecordingMeta, Runtime, Window},
};

pub use agent_ebpf::limits::CALLER_STACKS_PER_SECOND;
pub use command::exit_code;
pub use config::{Config, MAX_NAMES};
pub use starts::UnwindEntries;
pub use truncation::survive as survive_truncation;

/// Interval at which the buffers are read. Reading at this interval costs almost nothing, and no buffer
/// fills in it: a CPU's buffer of process events has room for a thousand mappings, and the ring buffer for
/// an eighth of a second ([`agent_ebpf::limits::ring_bytes`]).
const READ_EVERY: Duration = Duration::from_millis(100);

/// Shortest time between two reads; shorter than the period of a tick at 99 Hz.
const REST: Duration = Duration::from_millis(5);

/// Interval at which unused files are closed, nanoseconds.
const CLOSE_EVERY: u64 = 10_000_000_000;

/// How long the agent may wait for files and processes that do not answer: once before sampling starts, and
/// once after it has stopped.
const PATIENCE: Duration = Duration::from_secs(10);

/// Interval at which the agent removes the state of processes that have ended without an event.
const RECONCILE_EVERY: Duration = Duration::from_secs(5);

/// How long the command may take to end after it was sent the signal that ended the recording.
const COMMAND_GRACE: Duration = Duration::from_secs(5);

/// How long the command may take to end after SIGKILL.
const KILL_GRACE: Duration = Duration::from_secs(1);

/// A finished recording.
pub struct Recording {
    /// The samples.
    pub window: Window,
    /// The circumstances of the recording.
    pub meta: RecordingMeta,
    /// Measurements besides the samples.
    pub runtime: Runtime,
    /// Exit status of the command, if one was recorded.
    pub command_status: Option<u8>,
}

/// Progress of a recording, reported about once a second.
pub struct Progress {
    /// Time since sampling started.
    pub elapsed: Duration,
    /// Samples so far.
    pub samples: u64,
}

/// Records until the duration is over, the command has ended, or a signal has arrived (whose number is then
/// in `signal`).
///
/// # Errors
/// The kernel programs cannot be loaded, a target does not exist, or the command cannot be started.
pub fn record(
    config: &Config,
    signal: &Arc<AtomicUsize>,
    progress: impl FnMut(Progress),
) -> Result<Recording> {
    check_processes(&config.pids)?;
    // The command is forked before any file is opened whose path another process chose: it would inherit
    // such files, and closing them at its exec may block forever.
    let held = if config.command.is_empty() {
        None
    } else {
        let name = &config.command[0];
        Some(
            HeldCommand::start(&config.command, config.process_group)
                .with_context(|| format!("cannot start {name}"))?,
        )
    };
    // The limit of open files and the priority are raised after the command was forked, so that it does not
    // inherit them, and before the kernel programs are loaded, which on an overloaded machine would take
    // several times as long.
    raise_file_limit();
    cost::Priority::Reader.apply();
    let mut session = Session::open(config)?;
    session.select(config, held.as_ref())?;
    let steal = cost::steal_seconds();
    let start = Instant::now();
    let start_unix = std::time::SystemTime::now();
    session.objects.pool.be_quick();
    session.kernel.start()?;
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
    cost::Priority::Normal.apply();
    let stolen = steal.and_then(|before| Some(cost::steal_seconds()? - before));
    let course = Course {
        start: start_unix,
        duration,
        steal_seconds: stolen,
        startup_cpu,
        command_status: status,
    };
    Ok(session.into_recording(config, &course))
}

/// Checks that the pids in `/proc` are those that the kernel programs see, and that each target is a
/// process.
fn check_processes(pids: &[u32]) -> Result<()> {
    if in_initial_pid_namespace() == Some(false) {
        bail!(
            "flamestorm runs in a pid namespace of its own (a container), where the pids of the machine's processes are not visible; \
             share the host's pid namespace: `docker run --pid=host`, in Kubernetes `hostPID: true`"
        );
    }
    for &pid in pids {
        let Some(name) = process_name(pid) else {
            bail!("no process has the pid {pid}; `ps -e` lists the running processes");
        };
        if let Some(process) = process_of_thread(pid).filter(|process| *process != pid) {
            let name = process_name(process).unwrap_or(name);
            bail!("{pid} is a thread of process {process} ({name}): use --pid {process}");
        }
    }
    Ok(())
}

struct Session {
    kernel: Kernel,
    control: Control,
    objects: Objects,
    tables: Tables,
    ingest: Ingest,
    wanted: Vec<TableRequest>,
    cpus: Cpus,
    wall_clock: WallClockReader,
    /// When [`Session::reconcile`] last ran.
    reconciled: Instant,
    /// Whether only selected processes are sampled.
    filter: bool,
    /// The number of updates that the kernel refused, and the first reason.
    refused: (u64, Option<String>),
    /// When unused files were last closed, nanoseconds.
    closed_at: u64,
}

impl Session {
    fn open(config: &Config) -> Result<Session> {
        let kernel = Kernel::load(&Options {
            period_ns: config.period_ns(),
            filter: config.has_target(),
            callers_per_second: config.callers_per_second,
            senders: config.senders,
        })?;
        // Events are recorded before the processes are listed, so that no process is missed in between.
        let lifecycle = LifecycleEvents::open(kernel.cpus())?;
        let mut control = Control::new(lifecycle, config.names.clone());
        let mut objects = Objects::new();
        objects.pool.be_patient(PATIENCE);
        control
            .registry
            .scan(&mut |pid| objects.pool.mapped_objects(pid));
        // Servers that run already are given to the kernel before sampling starts, so that the first sends
        // of their clients are seen.
        control.changed = control
            .registry
            .iter()
            .filter(|process| is_likely_server(&process.exe))
            .map(|process| process.pid)
            .collect();
        let mut session = Session {
            kernel,
            control,
            objects,
            tables: Tables::new(),
            ingest: Ingest::new(config.full_query_text),
            wanted: Vec::new(),
            cpus: Cpus::new(),
            reconciled: Instant::now(),
            filter: config.has_target(),
            refused: (0, None),
            closed_at: now(),
            wall_clock: WallClockReader::default(),
        };
        session.update_kernel();
        Ok(session)
    }

    fn select(&mut self, config: &Config, held: Option<&HeldCommand>) -> Result<()> {
        for name in &config.names {
            self.kernel.select_name(name)?;
        }
        let named = self
            .control
            .registry
            .iter()
            .filter(|p| config.names.contains(&p.name));
        let named: Vec<u32> = named.map(|process| process.pid).collect();
        let command = held.map(HeldCommand::pid);
        for pid in config.pids.iter().copied().chain(named).chain(command) {
            self.kernel.select_process(pid)?;
        }
        Ok(())
    }

    /// Runs the loop. Returns the command's exit status, and the agent's CPU time until the first sample
    /// could be unwound, seconds.
    fn run(
        &mut self,
        config: &Config,
        signal: &AtomicUsize,
        start: Instant,
        mut child: Option<Child>,
        mut progress: impl FnMut(Progress),
    ) -> Result<(Option<u8>, f64)> {
        let mut startup_cpu = cost::cpu_seconds();
        let mut told = Duration::ZERO;
        progress(Progress {
            elapsed: told,
            samples: 0,
        });
        loop {
            let left = config
                .duration
                .map(|duration| duration.saturating_sub(start.elapsed()));
            self.wait(left.unwrap_or(READ_EVERY).min(READ_EVERY));
            let before_first = self.ingest.first_unwound.is_none();
            self.cycle();
            if before_first {
                startup_cpu = cost::cpu_seconds();
            }
            if start.elapsed() - told >= Duration::from_secs(1) {
                told = start.elapsed();
                let samples = self.ingest.open.places.window.counters().samples;
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

    /// Forwards the signal that ended the recording to the command (SIGTERM if there was none), and keeps
    /// recording until the command ends or its time is up.
    fn end_command(&mut self, mut child: Child, signal: i32) -> Result<u8> {
        let signal = if signal == 0 { libc::SIGTERM } else { signal };
        // SAFETY: the child has not been reaped yet, so the pid still belongs to it.
        unsafe { libc::kill(child.id() as i32, signal) };
        let deadline = Instant::now() + COMMAND_GRACE;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait()? {
                return Ok(exit_code(status));
            }
            self.wait(READ_EVERY);
            self.cycle();
        }
        log::warn!(
            "the command did not end within {COMMAND_GRACE:?} of the signal, so it is killed"
        );
        child.kill()?;
        // A command that is blocked in the kernel is not ended even by SIGKILL.
        let deadline = Instant::now() + KILL_GRACE;
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait()? {
                return Ok(exit_code(status));
            }
            self.wait(REST);
        }
        log::warn!("the command is blocked in the kernel and could not be killed");
        Ok(128 + libc::SIGKILL as u8)
    }

    /// Waits until a stack copy arrives or `longest` has passed, but at least [`REST`].
    fn wait(&self, longest: Duration) {
        let before = Instant::now();
        self.kernel.wait(longest);
        // Each stack copy wakes the agent early. The pause bounds the CPU time that frequent copies can
        // cost.
        let rested = before.elapsed();
        thread::sleep(REST.min(longest).saturating_sub(rested));
    }

    /// Reads all buffers, and gives the kernel what the samples and events call for.
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
                control.sampled(&sample);
                let registry = &mut control.registry;
                wanted.extend(ingest.sample(&sample, registry, objects, &tables.servers));
            }
        });
        control.advance(u64::MAX);
        control.settle(&mut |pid| objects.pool.mapped_objects(pid));
        self.cpus.settle(&mut self.kernel, &mut self.control);
        self.update_kernel();
        if self.reconciled.elapsed() >= RECONCILE_EVERY {
            self.reconciled = Instant::now();
            self.reconcile();
        }
        let time = self.control.read_until();
        let settled = self
            .tables
            .settle(&mut self.kernel, &mut self.objects, time);
        self.note_refusal(settled);
        self.close_unused(time);
    }

    /// Closes files that no process has mapped any more.
    fn close_unused(&mut self, time: u64) {
        if time < self.closed_at + CLOSE_EVERY {
            return;
        }
        self.closed_at = time;
        let mut mapped: HashSet<ObjectId> = self.tables.referred().collect();
        for process in self.control.registry.iter() {
            let backings = process.space.mappings().iter().map(|m| m.backing.get());
            mapped.extend(backings.filter_map(|backing| match backing {
                Some(Backing::Object(id)) => Some(id),
                _ => None,
            }));
        }
        let closed = self.objects.evict(time, &mapped);
        self.tables.forget_objects(time, &closed);
    }

    /// Updates the kernel's targets and tables as the events and samples of this cycle require.
    fn update_kernel(&mut self) {
        for pid in std::mem::take(&mut self.control.selected_late) {
            if self.control.registry.has_ended(pid) {
                continue;
            }
            let selected = self.kernel.select_process(pid);
            self.note_refusal(selected);
            // If the process has ended by now, its exit event may have been handled before it was selected,
            // so it is deselected here. If it ends later, it is deselected after the exit event.
            if !exists(pid) {
                self.kernel.deselect_process(pid);
            }
        }
        let mut changed = std::mem::take(&mut self.control.changed);
        changed.sort_unstable();
        changed.dedup();
        for pid in changed {
            let Some(process) = self.control.registry.living(pid) else {
                continue;
            };
            let (kernel, objects) = (&mut self.kernel, &mut self.objects);
            // A forked process has the entry that the kernel copied from its parent, and needs no new one.
            let is_new = is_likely_server(&process.exe) && kernel.space(pid).is_none();
            let told = match is_new {
                true => self
                    .tables
                    .give_unseen(kernel, objects, pid, &process.space),
                false => Ok(()),
            }
            .and_then(|()| self.tables.changed(kernel, objects, pid, &process.space));
            self.note_refusal(told);
        }
        let pool = &mut self.objects.pool;
        let told = self.tables.servers.settle(&mut self.kernel, pool);
        self.note_refusal(told);
        let clock = self.wall_clock.read();
        self.ingest.backends.set_clock(clock);
        let told = self.kernel.set_wall_clock(clock);
        self.note_refusal(told);
        for wanted in std::mem::take(&mut self.wanted) {
            let given = self.give(wanted);
            self.note_refusal(given);
        }
        for pid in std::mem::take(&mut self.control.ended) {
            self.forget(pid);
        }
    }

    /// Removes the state of a process that has ended, unless its pid is in use again.
    fn forget(&mut self, pid: u32) {
        if self.control.registry.living(pid).is_some() {
            return;
        }
        self.control.repair.forget(pid);
        self.tables.forget(&mut self.kernel, pid);
        if self.filter {
            self.kernel.deselect_process(pid);
        }
    }

    /// Removes the state of processes that ended without an event: events can be lost, and the kernel may
    /// have been given an entry after the process had ended.
    fn reconcile(&mut self) {
        self.control.end_missing();
        for pid in std::mem::take(&mut self.control.ended) {
            self.forget(pid);
        }
        self.tables
            .forget_missing(&mut self.kernel, &self.control.registry);
        for pid in self.kernel.selected() {
            if !exists(pid) {
                self.kernel.deselect_process(pid);
            }
        }
    }

    fn give(&mut self, TableRequest { pid, mm }: TableRequest) -> Result<(), kernel::Error> {
        let (kernel, objects) = (&mut self.kernel, &mut self.objects);
        let registry = &self.control.registry;
        let Some(process) = registry.living(pid) else {
            return Ok(());
        };
        self.tables.give(kernel, objects, pid, mm, &process.space)?;
        // The parent is given its tables too, so that its next children inherit them and need not be
        // sampled first. A server that forks workers is itself hardly ever on a CPU.
        match process.parent.and_then(|parent| registry.living(parent)) {
            Some(parent) => self
                .tables
                .give_unseen(kernel, objects, parent.pid, &parent.space),
            None => Ok(()),
        }
    }

    /// Counts a refused update. Without its table a sample is unwound in user space, which is slower, but
    /// the recording goes on.
    fn note_refusal(&mut self, result: Result<(), kernel::Error>) {
        if let Err(error) = result {
            self.refused.0 += 1;
            self.refused.1.get_or_insert_with(|| error.to_string());
        }
    }

    /// Ends the window that is being filled, and begins the next one. No sample is lost: those that are
    /// still in the ring buffer are counted in the next window.
    fn rotate(&mut self) -> OpenWindow {
        self.ingest.rotate(&self.control.registry)
    }

    /// Stops the sampling clock and processes what is still in the buffers.
    fn finish(&mut self) -> Result<()> {
        self.kernel.stop()?;
        self.cycle();
        let pool = &mut self.objects.pool;
        pool.be_patient(PATIENCE);
        self.ingest.learn_services(&self.control.registry, pool);
        Ok(())
    }
}

/// Raises the limit of open files to its maximum, because every mapped file is kept open until its symbols
/// are read.
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
