//! The kernel side as the agent sees it: loads and attaches the programs, reads their records,
//! writes their tables, reads their counters. No other module uses `aya`.

mod btf;
mod events;
mod lifecycle;
mod pool;
mod senders;
mod sizes;
mod times;

use std::{
    collections::{BTreeMap, HashSet},
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    time::Duration,
};

use agent_ebpf::{
    counters::{COUNTERS, Counter},
    limits::{CACHES, MAX_CONNECTIONS, MAX_SEGMENTS, SEGMENT_BLOCKS, ring_bytes},
    postgres::{Budget, ServerVariables, TIME_STEPS, WallClock},
    table::{Block, BlockId, Space},
};
use aya::{
    Ebpf, EbpfLoader, VerifierLogLevel,
    maps::{Array, ArrayOfMaps, HashMap, MapData, MapError, PerCpuArray, RingBuf},
    programs::{
        PerfEvent, ProgramError, RawTracePoint,
        perf_event::{
            PerfEventConfig, PerfEventLinkId, PerfEventScope, SamplePolicy, SoftwareEvent,
        },
    },
    util::online_cpus,
};
use aya_log::EbpfLogger;

pub use events::{BackendRecord, Record, Sample, StackCopy};
pub use lifecycle::{Event, EventKind, FileKey, LifecycleEvents, MappedObject};
pub use pool::BlockPool;
pub use senders::Senders;

/// What can go wrong between the agent and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel's type information cannot be read.
    #[error(
        "cannot read {}: {source}; the kernel must be built with CONFIG_DEBUG_INFO_BTF",
        btf::VMLINUX
    )]
    ReadBtf {
        /// The cause.
        source: io::Error,
    },
    /// The kernel's type information is malformed.
    #[error("{} is not BTF, or has an unknown format", btf::VMLINUX)]
    MalformedBtf,
    /// A field that the programs need is missing.
    #[error("this kernel is not supported, because it has no {of}.{field}")]
    MissingKernelField {
        /// The struct.
        of: &'static str,
        /// The member, also if the struct itself is missing.
        field: &'static str,
    },
    /// The maps and programs could not be loaded.
    #[error("cannot load the BPF maps and programs: {0}")]
    Load(#[from] aya::EbpfError),
    /// A program was rejected or could not be attached.
    #[error("program {program}: {source}")]
    Program {
        /// Its name.
        program: &'static str,
        /// The cause.
        source: Box<ProgramError>,
    },
    /// A map could not be read or written.
    #[error("map {map}: {source}")]
    Map {
        /// Its name.
        map: &'static str,
        /// The cause.
        source: Box<MapError>,
    },
    /// The list of processors could not be read.
    #[error("cannot read {path}: {source}")]
    Cpus {
        /// The file.
        path: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A CPU was added to the machine, for which the maps have no place.
    #[error("the BPF maps only have room for the CPUs that were present when the recording began")]
    NewCpu,
    /// The events of processes and mappings could not be opened.
    #[error("perf_event_open for process events on CPU {cpu}: {source}")]
    Lifecycle {
        /// The CPU.
        cpu: u32,
        /// The cause.
        source: io::Error,
    },
}

/// What is sampled, and how.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Nanoseconds between two samples of a CPU.
    pub period_ns: u64,
    /// Whether only selected processes are sampled (see [`Kernel::select_process`] and [`Kernel::select_name`]).
    pub filter: bool,
    /// Number of stacks that each CPU may take per second at sends to PostgreSQL servers; 0:
    /// sends are not observed.
    pub callers_per_second: u32,
    /// Where sends are observed; `None`: at the cheapest place that the kernel supports.
    pub senders: Option<Senders>,
}

/// `BPF_EXIST`: only an existing entry is written.
const BPF_EXIST: u64 = 2;

/// Windows per second of the budget of stacks at sends (100 ms each).
const WINDOWS_PER_SECOND: u32 = 10;
/// Walks that may be in progress on a CPU at the same time: one for a sample and one for a send.
const WALKS: u32 = 2;

/// Wrapper that allows plain data of the contract as values of maps.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Plain<T: Copy>(T);
// SAFETY: all are `repr(C)` integers without padding.
unsafe impl aya::Pod for Plain<Block> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<ServerVariables> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Space> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<Budget> {}
// SAFETY: as above.
unsafe impl aya::Pod for Plain<WallClock> {}

type Segment = Array<MapData, Plain<Block>>;

/// The loaded programs and their maps. Dropping it detaches and unloads everything.
pub struct Kernel {
    ebpf: Ebpf,
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
    ring: RingBuf<MapData>,
    processes: HashMap<MapData, u32, Plain<Space>>,
    targets: HashMap<MapData, u32, u8>,
    target_names: HashMap<MapData, [u8; 16], u8>,
    counts: PerCpuArray<MapData, u64>,
    budgets: PerCpuArray<MapData, Plain<Budget>>,
    servers: Array<MapData, Plain<ServerVariables>>,
    server_ports: Array<MapData, u64>,
    wall_clock: Array<MapData, Plain<WallClock>>,
    outer: ArrayOfMaps<MapData, Segment>,
    segments: Vec<Segment>,
    cpus: Vec<u32>,
    /// The sampling clock of each CPU that has one.
    clocks: Vec<(u32, PerfEventLinkId)>,
    /// CPUs with numbers below this have a place in the maps.
    cpu_numbers: u32,
    period_ns: u64,
    callers_per_second: u32,
    wanted_senders: Option<Senders>,
    senders: Option<Senders>,
    missing_fields: Vec<String>,
}

const SAMPLE: &str = "flamestorm_sample";
const RAW_TRACEPOINTS: [(&str, &str); 3] = [
    ("flamestorm_fork", "sched_process_fork"),
    ("flamestorm_exec", "sched_process_exec"),
    ("flamestorm_exit", "sched_process_exit"),
];

impl Kernel {
    /// Loads the maps and programs, and attaches the programs that follow processes. No sample is taken yet.
    ///
    /// # Errors
    /// The kernel lacks something or rejects the programs; the error says what.
    pub fn load(options: &Options) -> Result<Kernel, Error> {
        let offsets = btf::Offsets::of_running_kernel()?;
        // Without the field the mask is 0, and no bit is ever tested.
        let in_execve_byte = offsets.task_in_execve_bit.map_or(0, |bit| bit / 8);
        let in_execve_mask = offsets.task_in_execve_bit.map_or(0, |bit| 1u8 << (bit % 8));
        let filter = u8::from(options.filter);
        let has_tai_clock = u8::from(offsets.has_tai_clock);
        let frequency = 1_000_000_000 / options.period_ns.max(1);
        let frequency = u32::try_from(frequency).unwrap_or(u32::MAX);
        let cpus = cpus_online()?;
        let cpu_numbers = cpu_numbers(&cpus);
        let callers = options.callers_per_second.div_ceil(WINDOWS_PER_SECOND);
        let mut loader = EbpfLoader::new();
        loader
            // The programs need no relocation against the kernel's types.
            .btf(None)
            .verifier_log_level(VerifierLogLevel::STATS)
            .map_max_entries("RING", ring_bytes(cpus.len() as u32, frequency))
            .map_max_entries("STACK_COPY", WALKS * cpu_numbers)
            .map_max_entries("CACHE", WALKS * CACHES * cpu_numbers)
            // The kernel sets entries of LRU hash maps aside for each CPU.
            .map_max_entries("CONNECTIONS", MAX_CONNECTIONS + 256 * cpu_numbers)
            .override_global("PERIOD_NS", &options.period_ns, true)
            .override_global("CALLERS_PER_WINDOW", &callers, true)
            .override_global("TASK_IN_EXECVE", &in_execve_byte, true)
            .override_global("TASK_IN_EXECVE_MASK", &in_execve_mask, true)
            .override_global("HAS_TAI_CLOCK", &has_tai_clock, true)
            .override_global("FILTER", &filter, true);
        for (global, offset) in &offsets.globals {
            loader.override_global(global, offset, true);
        }
        let mut ebpf = loader.load(aya::include_bytes_aligned!(concat!(
            env!("OUT_DIR"),
            "/flamestorm-ebpf"
        )))?;
        let logger = EbpfLogger::init(&mut ebpf).ok();
        let mut kernel = Kernel {
            logger,
            ring: take(&mut ebpf, "RING")?,
            processes: take(&mut ebpf, "PROCESSES")?,
            targets: take(&mut ebpf, "TARGETS")?,
            target_names: take(&mut ebpf, "TARGET_NAMES")?,
            counts: take(&mut ebpf, "COUNTS")?,
            budgets: take(&mut ebpf, "CALLER_BUDGET")?,
            servers: take(&mut ebpf, "SERVERS")?,
            server_ports: take(&mut ebpf, "SERVER_PORTS")?,
            wall_clock: take(&mut ebpf, "WALL_CLOCK")?,
            callers_per_second: options.callers_per_second,
            wanted_senders: options.senders,
            senders: None,
            missing_fields: offsets.missing,
            outer: take(&mut ebpf, "SEGMENTS")?,
            segments: Vec::new(),
            cpus,
            clocks: Vec::new(),
            cpu_numbers,
            period_ns: options.period_ns,
            ebpf,
        };
        kernel.follow_processes()?;
        kernel.load_sampler()?;
        Ok(kernel)
    }

    fn follow_processes(&mut self) -> Result<(), Error> {
        for (program, tracepoint) in RAW_TRACEPOINTS {
            load(&mut self.ebpf, program)?;
            attach(&mut self.ebpf, program, tracepoint)?;
        }
        Ok(())
    }

    /// Starts to observe sends to PostgreSQL servers. From then on every send costs a little
    /// more, so this is to be called only when there is a server.
    ///
    /// # Errors
    /// The kernel has no place where sends can be observed.
    pub fn follow_senders(&mut self) -> Result<(), Error> {
        // This is tried only once, because a missing feature of the kernel stays missing.
        if std::mem::take(&mut self.callers_per_second) != 0 {
            self.senders = Some(Senders::follow(&mut self.ebpf, self.wanted_senders)?);
        }
        Ok(())
    }

    /// Where sends to servers are observed; `None` if they are not.
    pub fn senders(&self) -> Option<Senders> {
        self.senders
    }

    /// Missing members of kernel structs, without which a part of the attribution of database work is unavailable.
    pub fn missing_fields(&self) -> &[String] {
        &self.missing_fields
    }

    /// Gives the kernel programs the variables of a PostgreSQL server, by the server's index.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn set_server(&mut self, index: u32, server: ServerVariables) -> Result<(), Error> {
        self.servers
            .set(index, Plain(server), 0)
            .map_err(in_map("SERVERS"))
    }

    /// Tells the kernel programs that PostgreSQL listens on a TCP port.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn add_server_port(&mut self, port: u16) -> Result<(), Error> {
        let index = u32::from(port) / 64;
        let word = self.server_ports.get(&index, 0).unwrap_or(0);
        self.server_ports
            .set(index, word | 1 << (port % 64), 0)
            .map_err(in_map("SERVER_PORTS"))
    }

    /// Tells the kernel programs that PostgreSQL no longer listens on a TCP port.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn remove_server_port(&mut self, port: u16) -> Result<(), Error> {
        let index = u32::from(port) / 64;
        let word = self.server_ports.get(&index, 0).unwrap_or(0);
        self.server_ports
            .set(index, word & !(1 << (port % 64)), 0)
            .map_err(in_map("SERVER_PORTS"))
    }

    /// Gives the kernel programs the offset of the wall clock from the clock of the samples.
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn set_wall_clock(&mut self, clock: WallClock) -> Result<(), Error> {
        self.wall_clock
            .set(0, Plain(clock), 0)
            .map_err(in_map("WALL_CLOCK"))
    }

    fn load_sampler(&mut self) -> Result<(), Error> {
        let sampler = self.sampler()?;
        sampler.load().map_err(|source| refused(SAMPLE, source))
    }

    /// Starts the sampling clock on every CPU.
    ///
    /// # Errors
    /// `perf_event_open` was refused.
    pub fn start(&mut self) -> Result<(), Error> {
        for cpu in self.cpus.clone() {
            match self.start_clock(cpu) {
                // The CPU has gone offline since it was listed.
                Err(_) if !is_online(cpu) => {}
                started => started?,
            }
        }
        Ok(())
    }

    /// Starts the sampling clock on a CPU.
    ///
    /// # Errors
    /// `perf_event_open` was refused.
    fn start_clock(&mut self, cpu: u32) -> Result<(), Error> {
        let policy = SamplePolicy::Period(self.period_ns);
        let clock = self
            .sampler()?
            .attach(
                PerfEventConfig::Software(SoftwareEvent::CpuClock),
                PerfEventScope::AllProcessesOneCpu { cpu },
                policy,
                false,
            )
            .map_err(|source| refused(SAMPLE, source))?;
        self.clocks.push((cpu, clock));
        Ok(())
    }

    /// Starts sampling a CPU that has come online.
    ///
    /// # Errors
    /// `perf_event_open` was refused, or the maps have no place for a CPU with this number.
    pub fn add_cpu(&mut self, cpu: u32) -> Result<(), Error> {
        if cpu >= self.cpu_numbers {
            return Err(Error::NewCpu);
        }
        self.start_clock(cpu)?;
        self.cpus.push(cpu);
        Ok(())
    }

    /// Removes the sampling clock of a CPU that has gone offline, because the kernel never starts that clock again.
    ///
    /// # Errors
    /// The clock cannot be detached.
    pub fn remove_cpu(&mut self, cpu: u32) -> Result<(), Error> {
        self.cpus.retain(|of| *of != cpu);
        for (_, clock) in self
            .clocks
            .extract_if(.., |(of, _)| *of == cpu)
            .collect::<Vec<_>>()
        {
            let detached = self.sampler()?.detach(clock);
            detached.map_err(|source| refused(SAMPLE, source))?;
        }
        Ok(())
    }

    fn sampler(&mut self) -> Result<&mut PerfEvent, Error> {
        program_mut(&mut self.ebpf, SAMPLE)
            .try_into()
            .map_err(|source| refused(SAMPLE, source))
    }

    /// Stops the sampling clocks. Records that were already taken can still be read.
    ///
    /// # Errors
    /// A clock cannot be detached.
    pub fn stop(&mut self) -> Result<(), Error> {
        let sampler: &mut PerfEvent = program_mut(&mut self.ebpf, SAMPLE)
            .try_into()
            .map_err(|source| refused(SAMPLE, source))?;
        for (_, clock) in self.clocks.drain(..) {
            sampler
                .detach(clock)
                .map_err(|source| refused(SAMPLE, source))?;
        }
        Ok(())
    }

    /// The CPUs that are sampled once [`Self::start`] was called: those that were online.
    pub fn cpus(&self) -> &[u32] {
        &self.cpus
    }

    /// Waits until the kernel programs signal a record that should be read at once, for at most `timeout`.
    pub fn wait(&self, timeout: Duration) {
        let mut ring = libc::pollfd {
            fd: self.ring.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one valid pollfd. A signal or an error ends the wait early, which is harmless.
        unsafe { libc::poll(&raw mut ring, 1, milliseconds) };
    }

    /// Passes the records in the ring buffer to `handle`, oldest first, up to the first sample
    /// that was taken after `until` (nanoseconds), so that this ends however fast new records
    /// arrive. Log lines of the kernel programs go to the logger.
    pub fn read(&mut self, until: u64, mut handle: impl FnMut(Record<'_>)) {
        while let Some(item) = self.ring.next() {
            let Some(record) = Record::parse(&item) else {
                continue;
            };
            let newer = matches!(&record, Record::Sample(sample) if sample.header.time > until);
            handle(record);
            if newer {
                break;
            }
        }
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
    }

    /// Writes one block of the pool. Adds segments if the id lies beyond the existing ones.
    ///
    /// # Errors
    /// The kernel refuses the memory, or `id` lies beyond [`MAX_SEGMENTS`].
    pub fn write_block(&mut self, id: BlockId, block: &Block) -> Result<(), Error> {
        let segment = id / SEGMENT_BLOCKS;
        while self.segments.len() <= segment as usize {
            let index = u32::try_from(self.segments.len()).unwrap_or(MAX_SEGMENTS);
            let added = Segment::create(SEGMENT_BLOCKS, 0).map_err(in_map("SEGMENTS"))?;
            self.outer
                .set(index, &added, 0)
                .map_err(in_map("SEGMENTS"))?;
            self.segments.push(added);
        }
        self.segments[segment as usize]
            .set(id % SEGMENT_BLOCKS, Plain(*block), 0)
            .map_err(in_map("SEGMENTS"))
    }

    /// Gives the kernel programs the address space of a process. Returns true if the entry is new.
    /// An existing entry is removed with its process, by the program at the exit. A new entry may be
    /// written after the exit, so the caller must remove it again unless the process still exists.
    ///
    /// # Errors
    /// The map is full, or cannot be written.
    pub fn set_space(&mut self, pid: u32, space: Space) -> Result<bool, Error> {
        match self.processes.insert(pid, Plain(space), BPF_EXIST) {
            Err(MapError::SyscallError(refused))
                if refused.io_error.raw_os_error() == Some(libc::ENOENT) =>
            {
                let added = self.processes.insert(pid, Plain(space), 0);
                added.map(|()| true).map_err(in_map("PROCESSES"))
            }
            updated => updated.map(|()| false).map_err(in_map("PROCESSES")),
        }
    }

    /// The processes that have an address space in the kernel.
    pub fn spaces(&self) -> Vec<u32> {
        self.processes.keys().flatten().collect()
    }

    /// The address space that a process has in the kernel (from [`Self::set_space`], or inherited in a fork).
    pub fn space(&self, pid: u32) -> Option<Space> {
        self.processes.get(&pid, 0).ok().map(|space| space.0)
    }

    /// The root blocks of all address spaces in the kernel.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn roots(&self) -> Result<HashSet<BlockId>, Error> {
        let spaces = self.processes.iter();
        let roots = spaces.map(|entry| entry.map(|(_, space)| space.0.root));
        roots.collect::<Result<_, _>>().map_err(in_map("PROCESSES"))
    }

    /// Removes the address space of a process.
    pub fn remove_space(&mut self, pid: u32) {
        // This fails if the process has ended, because a kernel program has then removed the entry.
        let _ = self.processes.remove(&pid);
    }

    /// Selects a process and its future children for sampling.
    ///
    /// # Errors
    /// The map is full, or cannot be written.
    pub fn select_process(&mut self, pid: u32) -> Result<(), Error> {
        self.targets.insert(pid, 1, 0).map_err(in_map("TARGETS"))
    }

    /// Undoes [`Self::select_process`].
    pub fn deselect_process(&mut self, pid: u32) {
        // This fails if the process has ended, because a kernel program has then removed the entry.
        let _ = self.targets.remove(&pid);
    }

    /// The processes that are selected.
    pub fn selected(&self) -> Vec<u32> {
        self.targets.keys().flatten().collect()
    }

    /// Selects the threads with a name (at most 15 bytes, as the kernel stores it).
    ///
    /// # Errors
    /// The map is full, or cannot be written.
    pub fn select_name(&mut self, name: &str) -> Result<(), Error> {
        let mut key = [0; 16];
        let length = name.len().min(15);
        key[..length].copy_from_slice(&name.as_bytes()[..length]);
        self.target_names
            .insert(key, 1, 0)
            .map_err(in_map("TARGET_NAMES"))
    }

    /// A counter, summed over the CPUs.
    pub fn counter(&self, counter: Counter) -> u64 {
        debug_assert!((counter as u32) < COUNTERS);
        self.counts
            .get(&(counter as u32), 0)
            .map_or(0, |slots| slots.iter().sum())
    }

    /// Median time that the kernel program took at a send whose stack it took, nanoseconds,
    /// exact to half a microsecond. `None` if there was no such send.
    pub fn caller_stack_ns(&self) -> Option<f64> {
        let budgets = self.budgets.get(&0, 0).ok()?;
        let of_step = |step: usize| budgets.iter().map(|cpu| u64::from(cpu.0.times[step])).sum();
        let counts: [u64; TIME_STEPS] = std::array::from_fn(of_step);
        times::median(&counts)
    }

    /// The number of instructions that the verifier processed for the sampling program. `None` before Linux 5.16.
    pub fn verified_instructions(&self) -> Option<u32> {
        let program: &PerfEvent = self.ebpf.program(SAMPLE)?.try_into().ok()?;
        program.info().ok()?.verified_instruction_count()
    }

    /// Kernel memory of all maps, bytes, as the kernel accounts for it (`memlock` in `/proc/self/fdinfo`).
    pub fn map_bytes(&self) -> u64 {
        let Ok(entries) = std::fs::read_dir("/proc/self/fdinfo") else {
            return 0;
        };
        let mut maps = std::collections::HashMap::new();
        for entry in entries.flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            if let (Some(id), Some(bytes)) = (value(&text, "map_id:"), value(&text, "memlock:")) {
                maps.insert(id, bytes);
            }
        }
        maps.values().sum()
    }
}

impl Kernel {
    /// The number of runs that the kernel skipped, by the program's name (`recursion_misses` in
    /// `/proc/self/fdinfo`, since Linux 5.12). A run at a tracepoint is skipped if another run of the same
    /// program is in progress on the CPU. A run at a kprobe is skipped if any such program is running
    /// there, or if a system call on a map is in progress there, in which the agent can be preempted
    /// (kernel/bpf/syscall.c, `bpf_disable_instrumentation`). Programs without skipped runs are left out.
    pub fn skipped_runs(&self) -> BTreeMap<String, u64> {
        let skipped = |program: &aya::programs::Program| {
            let fd = program.fd().ok()?.as_fd().as_raw_fd();
            let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
            value(&text, "recursion_misses:").filter(|runs| *runs > 0)
        };
        let programs = self.ebpf.programs();
        programs
            .filter_map(|(name, program)| Some((name.to_owned(), skipped(program)?)))
            .collect()
    }
}

/// The CPUs that are online.
///
/// # Errors
/// `/sys` cannot be read.
pub fn cpus_online() -> Result<Vec<u32>, Error> {
    online_cpus().map_err(|(path, source)| Error::Cpus { path, source })
}

fn is_online(cpu: u32) -> bool {
    cpus_online().is_ok_and(|cpus| cpus.contains(&cpu))
}

/// The number of places that maps need for all CPUs that are present, including offline ones.
/// CPU numbers may have gaps.
fn cpu_numbers(online: &[u32]) -> u32 {
    // The file is an ordered list of ranges, so its last number is that of the last CPU.
    let present = std::fs::read_to_string("/sys/devices/system/cpu/present").unwrap_or_default();
    let last = present.trim().rsplit([',', '-']).next();
    let last = last.and_then(|last| last.parse().ok());
    online
        .iter()
        .copied()
        .chain(last)
        .max()
        .map_or(1, |last| last + 1)
}

/// The number that follows a name at the start of a line.
fn value(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().parse().ok()
}

fn attach(ebpf: &mut Ebpf, program: &'static str, tracepoint: &str) -> Result<(), Error> {
    let attach = |ebpf: &mut Ebpf| -> Result<(), ProgramError> {
        let loaded: &mut RawTracePoint = program_mut(ebpf, program).try_into()?;
        loaded.attach(tracepoint)?;
        Ok(())
    };
    attach(ebpf).map_err(|source| refused(program, source))
}

fn load(ebpf: &mut Ebpf, program: &'static str) -> Result<(), Error> {
    let load = |ebpf: &mut Ebpf| -> Result<(), ProgramError> {
        let loaded: &mut RawTracePoint = program_mut(ebpf, program).try_into()?;
        loaded.load()
    };
    load(ebpf).map_err(|source| refused(program, source))
}

fn program_mut<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> &'a mut aya::programs::Program {
    ebpf.program_mut(name)
        .expect("the object that build.rs made holds the program")
}

fn take<T: TryFrom<aya::maps::Map, Error = MapError>>(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<T, Error> {
    let map = ebpf
        .take_map(name)
        .expect("the object that build.rs made holds the map");
    T::try_from(map).map_err(in_map(name))
}

fn in_map(map: &'static str) -> impl FnOnce(MapError) -> Error {
    move |source| Error::Map {
        map,
        source: Box::new(source),
    }
}

fn refused(program: &'static str, source: impl Into<ProgramError>) -> Error {
    Error::Program {
        program,
        source: Box::new(source.into()),
    }
}
