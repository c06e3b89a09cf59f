//! Turns a sample, as the kernel sent it, into a counted stack: finds the module of each address, and
//! unwinds the rest of the stack from its copy if the kernel could not.

use std::{
    collections::HashMap,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use agent_ebpf::{
    sample::{Outcome, SIGNAL_FRAME_BIT},
    unwind::Cursor,
};
use rustix::fs::OFlags;

use super::{
    open_window::OpenWindow,
    processes::{Processes, nobody},
};
use crate::{
    file::{OpenFile, find_in_root_of, open_found},
    kernel::{Sample, StackCopy},
    mapped::{Code, Image, Mapped, Objects},
    pool::{Subject, WorkerPool},
    postgres::{Backends, FoundCaller, KnownSend, SampleAttribution, Servers, WindowQueries},
    process::{AddressSpace, Backing, ObjectId, Registry, is_trusted_by, own_pid},
    profile::{
        self, Caller, Frame, Module, ModuleKey, ProcessIndex, RawSample, SharedFrame, SharedModule,
        SharedProcess, Source,
    },
    query::TextMode,
    unwind,
};

/// A stack copy whose sample has not been read yet.
struct PendingStackCopy {
    cpu: u32,
    time: u64,
    exact_ip: bool,
    guessed: bool,
    registers: agent_ebpf::unwind::Registers,
    start: u64,
    bytes: Vec<u8>,
}

/// Maximum number of waiting stack copies: two for each CPU of the largest machines.
const MAX_COPIES: usize = 1024;

/// Maximum number of buffers that are kept for reuse, 64 KiB each. Only in a burst of new processes do more
/// copies wait for their samples.
const MAX_SPARE: usize = 16;

/// Maximum number of modules that are described: those of two windows. Beyond it, modules that no caller's stack refers
/// to are described again when they are needed.
const MAX_SHARED: usize = 2 * profile::MAX_MODULES;

/// The window that is being filled, and the state that is needed to fill it and later windows.
pub struct Ingest {
    /// The window that is being filled.
    pub open: OpenWindow,
    mode: TextMode,
    /// The modules of this window and the previous one, and those of kept callers' stacks.
    modules: HashMap<ModuleKey, Arc<SharedModule>>,
    processes: Processes,
    /// Stack copies whose samples have not been read yet: at most one for each CPU and kind of walk, unless
    /// samples were lost.
    copies: Vec<PendingStackCopy>,
    /// Buffers of used copies, for reuse.
    spare: Vec<Vec<u8>>,
    /// The records of PostgreSQL's backends.
    pub backends: Backends,
    kernel_frames: Vec<Frame>,
    user_frames: Vec<Frame>,
    addresses: Vec<UserAddress>,
    /// When the first sample was taken whose user stack was walked to an end (proven or guessed),
    /// nanoseconds.
    pub first_unwound: Option<u64>,
    /// The code of the process whose stack was last unwound here.
    code: Option<(Rc<AddressSpace>, Arc<Code>)>,
    /// The time that walks in this thread may take.
    walks: Allowance,
}

/// A frame's address, before its module has an index in a window.
#[derive(Clone, Copy, Debug)]
struct UserAddress {
    module: ModuleKey,
    address: u64,
    exact: bool,
}

/// A bound on the time that an activity takes: a quarter of the time that passes. Unused time is saved up
/// to a limit.
#[derive(Debug)]
struct Allowance {
    /// Time that was spent and has not been regained yet.
    taken: Duration,
    updated: Instant,
}

impl Allowance {
    /// The time that may be spent at once.
    const MOST: Duration = Duration::from_millis(100);

    fn new() -> Allowance {
        Allowance {
            taken: Duration::ZERO,
            updated: Instant::now(),
        }
    }

    fn has_time(&mut self) -> bool {
        let now = Instant::now();
        let regained = now.duration_since(self.updated) / 4;
        self.updated = now;
        self.taken = self.taken.saturating_sub(regained);
        self.taken < Self::MOST
    }

    fn spend(&mut self, time: Duration) {
        self.taken += time;
    }
}

/// A request for tables, because the kernel lacked knowledge when it took a sample.
#[derive(Clone, Copy, Debug)]
pub struct TableRequest {
    /// The process, which the kernel did not know, or did not know completely.
    pub pid: u32,
    /// The kernel's identity of the address space in which it was sampled.
    pub mm: u64,
}

impl Ingest {
    /// Starts with an empty window. If `full_text`, query texts keep their literals.
    pub fn new(full_text: bool) -> Ingest {
        let mode = match full_text {
            true => TextMode::Full,
            false => TextMode::Normalized,
        };
        Ingest {
            open: OpenWindow::new(mode),
            mode,
            modules: HashMap::new(),
            processes: Processes::new(),
            copies: Vec::new(),
            spare: Vec::new(),
            backends: Backends::new(),
            kernel_frames: Vec::new(),
            user_frames: Vec::new(),
            addresses: Vec::new(),
            first_unwound: None,
            code: None,
            walks: Allowance::new(),
        }
    }

    /// Ends the window that is being filled, and begins the next one.
    pub fn rotate(&mut self, registry: &Registry) -> OpenWindow {
        self.open.complete_workers();
        let filled = std::mem::replace(&mut self.open, OpenWindow::new(self.mode));
        self.processes.evict(registry);
        self.modules
            .retain(|key, shared| filled.places.has_module(*key) || Arc::strong_count(shared) > 1);
        filled
    }

    /// Asks the processes that are still alive once more for their service: one may have published it after its first
    /// sample.
    pub fn learn_services(&mut self, registry: &Registry, pool: &mut WorkerPool) {
        let places = &mut self.open.places;
        self.processes.learn_services(places, registry, pool);
    }

    /// Keeps a stack copy for the sample that follows.
    pub fn stack_copy(&mut self, copy: &StackCopy<'_>) {
        // When so many copies wait, the sample of the oldest was dropped because the ring buffer was full.
        if self.copies.len() >= MAX_COPIES {
            let evicted = self.copies.remove(0);
            self.spare(evicted.bytes);
        }
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(copy.bytes);
        self.copies.push(PendingStackCopy {
            cpu: copy.cpu,
            time: copy.time,
            exact_ip: copy.exact_ip,
            guessed: copy.guessed,
            registers: copy.registers,
            start: copy.start,
            bytes,
        });
    }

    /// Counts a sample. Returns `Some` if the kernel lacked knowledge of the process.
    pub fn sample(
        &mut self,
        sample: &Sample<'_>,
        registry: &mut Registry,
        objects: &mut Objects,
        servers: &Servers,
    ) -> Option<TableRequest> {
        let header = &sample.header;
        self.open.make_room();
        let mut kernel = std::mem::take(&mut self.kernel_frames);
        kernel.clear();
        if sample.header.kernel_frames > 0 {
            let module = self.place(ModuleKey::Kernel, objects, header.pid);
            // The first kernel frame is the interrupted instruction; the others are return addresses.
            let frames = sample.kernel_frames().enumerate();
            kernel.extend(frames.map(|(i, address)| Frame {
                module,
                address,
                exact: i == 0,
            }));
        }
        let mut user = std::mem::take(&mut self.user_frames);
        user.clear();
        let (index, outcome) = self.unwound(sample, registry, objects);
        for index in 0..self.addresses.len() {
            let UserAddress {
                module,
                address,
                exact,
            } = self.addresses[index];
            user.push(Frame {
                module: self.place(module, objects, header.pid),
                address,
                exact,
            });
        }
        let ended = outcome.is_complete() || outcome == Outcome::GuessedEnd;
        if ended && !user.is_empty() && self.first_unwound.is_none() {
            self.first_unwound = Some(header.time);
        }
        let SampleAttribution {
            attribution,
            starts_execution,
        } = self.attribution(sample, registry, objects, servers);
        self.open.places.window.add(&RawSample {
            process: index,
            tid: header.tid,
            thread_name: header.comm,
            outcome,
            kernel: &kernel,
            user: &user,
            attribution,
            starts_execution,
        });
        (self.kernel_frames, self.user_frames) = (kernel, user);
        wanted(sample)
    }

    /// Keeps the stack of a send to a PostgreSQL server. Returns `Some` as [`Ingest::sample`] does.
    pub fn caller(
        &mut self,
        caller: &Sample<'_>,
        registry: &mut Registry,
        objects: &mut Objects,
    ) -> Option<TableRequest> {
        let (_, outcome) = self.unwound(caller, registry, objects);
        let pid = caller.header.pid;
        let sender = self
            .processes
            .sent(&mut self.open.places, pid, registry, &mut objects.pool);
        // An incomplete stack is kept as a partial one; one without any frame is of no use.
        if !self.addresses.is_empty() {
            let addresses = std::mem::take(&mut self.addresses);
            let frame = |of: &UserAddress| SharedFrame {
                module: self.shared_module(of.module, objects, pid),
                address: of.address,
                exact: of.exact,
            };
            let send = KnownSend {
                stack: addresses.iter().map(frame).collect(),
                process: sender.unwrap_or_else(|| Arc::new(unasked(pid, caller, registry))),
                outcome,
            };
            self.addresses = addresses;
            let (cpu, time) = (caller.header.cpu, caller.header.time);
            self.backends.keep_send(cpu, time, send);
        }
        wanted(caller)
    }

    fn attribution(
        &mut self,
        sample: &Sample<'_>,
        registry: &mut Registry,
        objects: &mut Objects,
        servers: &Servers,
    ) -> SampleAttribution {
        let Ingest {
            backends,
            processes,
            open,
            ..
        } = self;
        let header = &sample.header;
        let OpenWindow {
            places,
            texts,
            counts,
            ..
        } = open;
        let mut place = |found: FoundCaller| match found {
            FoundCaller::Send(mut send) => {
                // Its service may have become known after the send.
                if let Some(process) = processes.shared(send.process.incarnation) {
                    send.process = process;
                }
                places.caller(&send)
            }
            FoundCaller::Process { pid, comm, reason } => {
                let name = thread_name(&comm);
                let seen = (pid, header.time);
                let pool = &mut objects.pool;
                let process = processes.of_pid(places, seen, &name, registry, pool);
                Caller::Process { process, reason }
            }
            FoundCaller::Unknown(reason) => Caller::Unknown(reason),
        };
        let mut queries = WindowQueries {
            texts,
            counts,
            place: &mut place,
        };
        backends.attribute(header, servers, &mut queries)
    }

    /// Returns the process of a record and the outcome of its walk, and leaves its user frames in
    /// `addresses`. If a stack copy came with the record, the rest of the stack is unwound here.
    fn unwound(
        &mut self,
        sample: &Sample<'_>,
        registry: &mut Registry,
        objects: &mut Objects,
    ) -> (ProcessIndex, Outcome) {
        let header = &sample.header;
        let name = thread_name(&header.comm);
        let seen = (header.pid, header.time);
        let pool = &mut objects.pool;
        let index = self
            .processes
            .of_pid(&mut self.open.places, seen, &name, registry, pool);
        let (space, incarnation) = match registry.known(header.pid) {
            Some(process) => (Rc::clone(&process.space), process.incarnation),
            None => (Rc::default(), nobody(header.pid)),
        };
        let mut addresses: Vec<u64> = sample.user_frames().collect();
        let outcome = self.go_on(sample, &space, objects, &mut addresses);
        self.addresses.clear();
        for (i, &address) in addresses.iter().enumerate() {
            // The code that returns from a signal handler was not called by an instruction. Its address is
            // the first instruction of that code, and the byte before it belongs to another function.
            let returns_from_handler = addresses
                .get(i + 1)
                .is_some_and(|caller| caller & SIGNAL_FRAME_BIT != 0);
            let exact = i == 0 || address & SIGNAL_FRAME_BIT != 0 || returns_from_handler;
            let pid = header.pid;
            self.addresses
                .push(locate(address, exact, &space, objects, (pid, incarnation)));
        }
        (index, outcome)
    }

    /// Unwinds the rest of the stack from its copy, if one came with the record. Returns the outcome.
    fn go_on(
        &mut self,
        sample: &Sample<'_>,
        space: &Rc<AddressSpace>,
        objects: &mut Objects,
        addresses: &mut Vec<u64>,
    ) -> Outcome {
        let (pid, cpu, time) = (sample.header.pid, sample.header.cpu, sample.header.time);
        let belongs = |copy: &PendingStackCopy| copy.cpu == cpu && copy.time == time;
        let Some(found) = self.copies.iter().position(belongs) else {
            return sample.outcome;
        };
        let copy = self.copies.remove(found);
        let code = self.code(space, objects, pid);
        let is_local = code.is_local();
        // The kernel removed the frame at which it stopped from the sample, so it is added again if the
        // walk cannot continue.
        let is_interrupted = copy.exact_ip && !addresses.is_empty();
        let stopped_at = copy.registers.ip | if is_interrupted { SIGNAL_FRAME_BIT } else { 0 };
        let mut walked = std::mem::take(addresses);
        let before = walked.clone();
        // The rules are read from the files, which may block.
        let walk = move || {
            let mut cursor = Cursor::new(copy.registers);
            cursor.exact_ip = u64::from(copy.exact_ip);
            let stack = unwind::StackBytes {
                base: copy.start,
                bytes: &copy.bytes,
            };
            let rule = |avma| code.rule(avma);
            let outcome = unwind::walk(&mut cursor, copy.guessed, rule, &stack, &mut walked);
            (outcome, walked, copy.bytes)
        };
        // Handing a walk to another thread costs more than the walk itself. That is done only if a file may
        // not answer, or if walks take too much of this thread's time: a hostile program's code can be made
        // so that the rule for each frame is searched in 64 KiB of instructions.
        let done = match is_local && self.walks.has_time() {
            true => {
                let begun = Instant::now();
                let done = walk();
                self.walks.spend(begun.elapsed());
                Some(done)
            }
            false => objects.pool.call(Subject::process(pid), walk).done(),
        };
        match done {
            Some((outcome, walked, bytes)) => {
                self.open.continued += 1;
                *addresses = walked;
                self.spare(bytes);
                outcome
            }
            None => {
                self.open.not_continued += 1;
                *addresses = before;
                addresses.push(stopped_at);
                sample.outcome
            }
        }
    }

    /// Keeps a buffer for a later copy.
    fn spare(&mut self, bytes: Vec<u8>) {
        if self.spare.len() < MAX_SPARE {
            self.spare.push(bytes);
        }
    }

    /// The code of a process. That of the last process is cached, because a new program sends several
    /// copies.
    fn code(&mut self, space: &Rc<AddressSpace>, objects: &mut Objects, pid: u32) -> Arc<Code> {
        if let Some((known, code)) = &self.code
            && Rc::ptr_eq(known, space)
        {
            return Arc::clone(code);
        }
        let code = Arc::new(Code::of(space, objects, pid));
        self.code = match code.is_whole() {
            true => Some((Rc::clone(space), Arc::clone(&code))),
            false => None,
        };
        code
    }

    /// The index of a module in the window that is being filled.
    fn place(&mut self, key: ModuleKey, objects: &mut Objects, pid: u32) -> profile::ModuleId {
        let Ingest { open, modules, .. } = self;
        open.places
            .module(key, || shared_module(modules, key, objects, pid))
    }

    fn shared_module(
        &mut self,
        key: ModuleKey,
        objects: &mut Objects,
        pid: u32,
    ) -> Arc<SharedModule> {
        shared_module(&mut self.modules, key, objects, pid)
    }
}

/// The shared description of a module, made once for each identity.
fn shared_module(
    modules: &mut HashMap<ModuleKey, Arc<SharedModule>>,
    key: ModuleKey,
    objects: &mut Objects,
    pid: u32,
) -> Arc<SharedModule> {
    if let Some(known) = modules.get(&key) {
        return Arc::clone(known);
    }
    if modules.len() >= MAX_SHARED {
        modules.retain(|_, shared| Arc::strong_count(shared) > 1);
    }
    let key = match modules.len() < MAX_SHARED {
        true => key,
        false => ModuleKey::Unknown,
    };
    let module = describe(key, objects, pid);
    let shared = Arc::new(SharedModule { key, module });
    modules.insert(key, Arc::clone(&shared));
    shared
}

/// A process whose service is not known.
fn unasked(pid: u32, caller: &Sample<'_>, registry: &Registry) -> SharedProcess {
    let known = registry.known(pid);
    let exe = known.map(|process| process.exe.to_string_lossy().into_owned());
    SharedProcess {
        incarnation: known.map_or(nobody(pid), |process| process.incarnation),
        process: profile::Process {
            pid,
            name: known.map_or_else(|| thread_name(&caller.header.comm), |p| p.name.clone()),
            exe: exe.unwrap_or_default(),
            service: String::new(),
        },
    }
}

/// The module of a frame, and its address there.
fn locate(
    address: u64,
    exact: bool,
    space: &AddressSpace,
    objects: &mut Objects,
    (pid, incarnation): (u32, u64),
) -> UserAddress {
    let avma = address & !SIGNAL_FRAME_BIT;
    let at = |module, address| UserAddress {
        module,
        address,
        exact,
    };
    let lookup = if exact { avma } else { avma.wrapping_sub(1) };
    let Some(mapping) = space.find(lookup) else {
        return at(ModuleKey::Unknown, avma);
    };
    match objects.backing(pid, mapping) {
        Backing::Object(id) => match objects.get(id).and_then(|o| o.bias(mapping)) {
            Some(bias) => at(ModuleKey::File(id.0), avma.wrapping_sub(bias)),
            None => at(ModuleKey::Unknown, avma),
        },
        Backing::Private => at(ModuleKey::Jit(incarnation), avma),
        Backing::Lost => at(ModuleKey::Unknown, avma),
    }
}

/// The request for tables that follows from a record's outcome.
fn wanted(sample: &Sample<'_>) -> Option<TableRequest> {
    sample.outcome.is_continuable().then_some(TableRequest {
        pid: sample.header.pid,
        mm: sample.header.mm,
    })
}

fn describe(key: ModuleKey, objects: &mut Objects, pid: u32) -> Module {
    let bare = |name: &str, source: Source| Module {
        name: name.to_owned(),
        source,
        ..Module::unknown()
    };
    match key {
        ModuleKey::Kernel => bare("[kernel]", Source::Kernel),
        ModuleKey::Unknown => Module::unknown(),
        ModuleKey::Jit(_) => Module {
            is_local: false,
            ..bare("[jit]", jit(pid, &mut objects.pool))
        },
        ModuleKey::File(number) => objects
            .get(ObjectId(number))
            .map_or_else(Module::unknown, |object| module_of(object)),
    }
}

fn module_of(object: &Mapped) -> Module {
    Module {
        name: object.name.to_string_lossy().into_owned(),
        build_id: object.build_id.clone(),
        source: match &object.image {
            Image::File(_, file) => Source::File(Arc::clone(file)),
            Image::Copy(_, copy) => Source::Copy(Arc::clone(copy)),
            Image::Vdso(bytes) => Source::Vdso(Arc::clone(bytes)),
        },
        is_local: (object.is_local || matches!(object.image, Image::Copy(..)))
            && object.debug_dir.is_none(),
        debug_dir: object.debug_dir.clone(),
        version: object.version,
        snapshot: object.snapshot.clone(),
    }
}

/// The source of names for just-in-time compiled code: the perf map that the process writes. The file's
/// name contains the pid that the process itself sees.
fn jit(pid: u32, pool: &mut WorkerPool) -> Source {
    let own = own_pid(pid).unwrap_or(pid);
    let open = move || {
        let path = PathBuf::from(format!("/tmp/perf-{own}.map"));
        let found = find_in_root_of(pid, &path, OFlags::NOFOLLOW).ok()?;
        let file = OpenFile::new(open_found(found).ok()?);
        is_trusted_by(pid, &file).then_some(file)
    };
    let file = pool.call(Subject::process(pid), open).done().flatten();
    Source::Jit {
        pid,
        perf_map: PathBuf::from(format!("/proc/{pid}/root/tmp/perf-{own}.map")),
        file: file.map(Arc::new),
    }
}

fn thread_name(comm: &[u8; 16]) -> String {
    let name = comm.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After a long walk the next has to wait until the time is regained.
    #[test]
    fn allowance() {
        let mut walks = Allowance::new();
        assert!(walks.has_time());
        walks.spend(Allowance::MOST * 20);
        assert!(!walks.has_time());
        // Two seconds were spent and 100 ms of them are allowed, so the wait is between seven and eight
        // seconds.
        walks.updated -= Duration::from_secs(7);
        assert!(!walks.has_time());
        walks.updated -= Duration::from_secs(1);
        assert!(walks.has_time());
    }

    /// Once the maximum number of modules is reached, code in further modules counts as unknown, and not as
    /// that of another module.
    #[test]
    fn too_many_modules() {
        let mut ingest = Ingest::new(false);
        while ingest
            .open
            .places
            .window
            .add_module(Module::unknown())
            .is_some()
        {}
        assert_eq!(
            ingest.open.places.window.modules().len(),
            profile::MAX_MODULES
        );
        let mut objects = Objects::new();
        let unknown = ingest.place(ModuleKey::Unknown, &mut objects, 0);
        assert!(matches!(
            ingest.open.places.window.modules()[unknown.0 as usize].source,
            Source::Unknown
        ));
        assert_eq!(ingest.place(ModuleKey::Jit(7), &mut objects, 0), unknown);
        assert_eq!(ingest.place(ModuleKey::Kernel, &mut objects, 0), unknown);
    }
}
