//! From a sample as the kernel sent it to a counted stack: addresses told apart by object, and the
//! rest of the stack unwound here when the kernel could not.

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

use super::processes::{Processes, nobody};
use crate::{
    file::{OpenFile, find_in_root_of, open_found},
    kernel::{Sample, StackCopy},
    mapped::{Code, Image, Mapped, Objects},
    pool::{Subject, WorkerPool},
    postgres::{Backends, SampleAttribution, Servers},
    process::{AddressSpace, Backing, ObjectId, Registry, is_trusted_by, own_pid},
    profile::{Frame, MAX_MODULES, Module, ModuleId, ProcessIndex, RawSample, Source, Window},
    unwind,
};

/// A stack copy that waits for its sample.
struct PendingStackCopy {
    cpu: u32,
    time: u64,
    exact_ip: bool,
    guessed: bool,
    registers: agent_ebpf::unwind::Registers,
    start: u64,
    bytes: Vec<u8>,
}

/// Stack copies that wait at most: two a CPU of the largest machines.
const MAX_COPIES: usize = 1024;

/// Buffers of used copies that are kept, 64 KiB each: more wait for their samples only in a burst of new processes.
const MAX_SPARE: usize = 16;

/// The window being filled and what is needed to fill it.
pub struct Ingest {
    /// The counted samples.
    pub window: Window,
    modules: HashMap<ModuleKey, ModuleId>,
    unknown_module: ModuleId,
    processes: Processes,
    /// Stack copies that wait for their samples: at most one a CPU and kind of walk.
    copies: Vec<PendingStackCopy>,
    /// Buffers of copies that were used.
    spare: Vec<Vec<u8>>,
    /// What PostgreSQL's backends said.
    pub backends: Backends,
    kernel_frames: Vec<Frame>,
    user_frames: Vec<Frame>,
    /// When the first sample whose user stack was walked to an end, proven or not, was taken, nanoseconds.
    pub first_unwound: Option<u64>,
    /// Samples whose stack was unwound here.
    pub continued: u64,
    /// Samples whose stack could not be unwound here, because a file did not answer in time.
    pub not_continued: u64,
    /// The code of the process whose stack was unwound here last.
    code: Option<(Rc<AddressSpace>, Arc<Code>)>,
    /// Time for walks in this thread.
    walks: Allowance,
}

/// Time that something may take: a quarter of all time, and what it did not take lately.
#[derive(Debug)]
struct Allowance {
    /// Time taken that is not made up for yet.
    taken: Duration,
    updated: Instant,
}

impl Allowance {
    /// What may be taken at once.
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

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum ModuleKey {
    Kernel,
    Unknown,
    Object(ObjectId),
    /// Code private to a process's incarnation.
    Jit(u64),
}

/// What the kernel should be told after a sample.
#[derive(Clone, Copy, Debug)]
pub struct TableRequest {
    /// A process that the kernel did not know, or not well enough.
    pub pid: u32,
    /// The address space in which it was sampled.
    pub mm: u64,
}

impl Ingest {
    /// Nothing counted yet. `full_text`: queries keep their literals.
    pub fn new(full_text: bool) -> Ingest {
        let mut window = Window::new();
        let mut modules = HashMap::new();
        // First, so that it is there when there is room for no other.
        let unknown_module = window.add_module(unknown_module()).unwrap_or(ModuleId(0));
        modules.insert(ModuleKey::Unknown, unknown_module);
        Ingest {
            window,
            modules,
            unknown_module,
            processes: Processes::new(),
            copies: Vec::new(),
            spare: Vec::new(),
            backends: Backends::new(full_text),
            kernel_frames: Vec::new(),
            user_frames: Vec::new(),
            first_unwound: None,
            continued: 0,
            not_continued: 0,
            code: None,
            walks: Allowance::new(),
        }
    }

    /// Keeps a stack for the sample that follows.
    pub fn stack_copy(&mut self, copy: &StackCopy<'_>) {
        // The sample for a copy that has waited this long was dropped, because the ring buffer was full.
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

    /// Counts a sample. `Some` when the kernel lacked knowledge of the process.
    pub fn sample(
        &mut self,
        sample: &Sample<'_>,
        registry: &mut Registry,
        objects: &mut Objects,
        servers: &Servers,
    ) -> Option<TableRequest> {
        let header = &sample.header;
        let mut kernel = std::mem::take(&mut self.kernel_frames);
        kernel.clear();
        if sample.header.kernel_frames > 0 {
            let module = self.module(ModuleKey::Kernel, objects, header.pid);
            // The kernel's own first entry is the interrupted instruction; the others are return
            // addresses.
            let frames = sample.kernel_frames().enumerate();
            kernel.extend(frames.map(|(i, address)| Frame {
                module,
                address,
                exact: i == 0,
            }));
        }
        let mut user = std::mem::take(&mut self.user_frames);
        let (index, outcome) = self.unwound(sample, registry, objects, &mut user);
        let ended = outcome.is_complete() || outcome == Outcome::GuessedEnd;
        if ended && !user.is_empty() && self.first_unwound.is_none() {
            self.first_unwound = Some(header.time);
        }
        let SampleAttribution {
            attribution,
            starts_execution,
        } = self.attribution(sample, registry, objects, servers);
        self.window.add(&RawSample {
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

    /// Keeps the stack of a send to a PostgreSQL server. `Some` as for a sample.
    pub fn caller(
        &mut self,
        caller: &Sample<'_>,
        registry: &mut Registry,
        objects: &mut Objects,
    ) -> Option<TableRequest> {
        let mut user = std::mem::take(&mut self.user_frames);
        let (process, outcome) = self.unwound(caller, registry, objects, &mut user);
        let pid = caller.header.pid;
        self.processes
            .sent(&mut self.window, pid, registry, &mut objects.pool);
        // A stack that could not be walked to its end is a part of one; one without a frame is nothing.
        if !user.is_empty()
            && let Some(stack) = self.window.intern(&user, &[])
        {
            let (cpu, time) = (caller.header.cpu, caller.header.time);
            self.backends.caller(cpu, time, process, (stack, outcome));
        }
        self.user_frames = user;
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
            window,
            ..
        } = self;
        let header = &sample.header;
        let mut sender = |pid: u32, comm: &[u8; 16]| {
            let pool = &mut objects.pool;
            processes.of_pid(
                window,
                (pid, header.time),
                &thread_name(comm),
                registry,
                pool,
            )
        };
        backends.attribute(header, servers, &mut sender)
    }

    /// The process and the user frames of a record; the rest of the stack is unwound here if need be.
    fn unwound(
        &mut self,
        sample: &Sample<'_>,
        registry: &mut Registry,
        objects: &mut Objects,
        user: &mut Vec<Frame>,
    ) -> (ProcessIndex, Outcome) {
        let header = &sample.header;
        let name = thread_name(&header.comm);
        let seen = (header.pid, header.time);
        let pool = &mut objects.pool;
        let index = self
            .processes
            .of_pid(&mut self.window, seen, &name, registry, pool);
        let (space, incarnation) = match registry.known(header.pid) {
            Some(process) => (Rc::clone(&process.space), process.incarnation),
            None => (Rc::default(), nobody(header.pid)),
        };
        let mut addresses: Vec<u64> = sample.user_frames().collect();
        let outcome = self.go_on(sample, &space, objects, &mut addresses);
        user.clear();
        for (i, &address) in addresses.iter().enumerate() {
            // No instruction called the code that returns from a signal's handler: its address is its
            // first instruction, and before it is another function.
            let returns_from_handler = addresses
                .get(i + 1)
                .is_some_and(|caller| caller & SIGNAL_FRAME_BIT != 0);
            let exact = i == 0 || address & SIGNAL_FRAME_BIT != 0 || returns_from_handler;
            user.push(self.frame(address, exact, &space, objects, header.pid, incarnation));
        }
        (index, outcome)
    }

    /// Unwinds the rest of the stack from its copy, if one came with the sample.
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
        let copy = self.copies.swap_remove(found);
        let code = self.code(space, objects, pid);
        let is_local = code.is_local();
        // The kernel took the frame at which it stopped out of the sample.
        let is_interrupted = copy.exact_ip && !addresses.is_empty();
        let stopped_at = copy.registers.ip | if is_interrupted { SIGNAL_FRAME_BIT } else { 0 };
        let mut walked = std::mem::take(addresses);
        let before = walked.clone();
        // Rules are read from the files, which may block.
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
        // To hand it to another thread costs more than the walk, so that is done for files which may not answer, and when
        // walks take much of the time: code can be made so that each frame is looked for in 64 KiB of instructions.
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
                self.continued += 1;
                *addresses = walked;
                self.spare(bytes);
                outcome
            }
            None => {
                self.not_continued += 1;
                *addresses = before;
                addresses.push(stopped_at);
                sample.outcome
            }
        }
    }

    /// Keeps a buffer for the next copy.
    fn spare(&mut self, bytes: Vec<u8>) {
        if self.spare.len() < MAX_SPARE {
            self.spare.push(bytes);
        }
    }

    /// The code of a process; that of the last is kept, since a new program sends several stacks.
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

    fn frame(
        &mut self,
        address: u64,
        exact: bool,
        space: &AddressSpace,
        objects: &mut Objects,
        pid: u32,
        incarnation: u64,
    ) -> Frame {
        let avma = address & !SIGNAL_FRAME_BIT;
        let lookup = if exact { avma } else { avma.wrapping_sub(1) };
        let Some(mapping) = space.find(lookup) else {
            let module = self.module(ModuleKey::Unknown, objects, pid);
            return Frame {
                module,
                address: avma,
                exact,
            };
        };
        let key = match objects.backing(pid, mapping) {
            Backing::Object(id) => match objects.get(id).and_then(|o| o.bias(mapping)) {
                Some(bias) => {
                    let module = self.module(ModuleKey::Object(id), objects, pid);
                    return Frame {
                        module,
                        address: avma.wrapping_sub(bias),
                        exact,
                    };
                }
                None => ModuleKey::Unknown,
            },
            Backing::Private => ModuleKey::Jit(incarnation),
            Backing::Lost => ModuleKey::Unknown,
        };
        Frame {
            module: self.module(key, objects, pid),
            address: avma,
            exact,
        }
    }

    /// Programs whose processes were not all told apart.
    pub fn programs(&self) -> usize {
        self.processes.programs()
    }

    /// Asks the processes that are still there once more for their service: one may have said it after its
    /// first sample.
    pub fn learn_services(&mut self, registry: &Registry, pool: &mut WorkerPool) {
        self.processes
            .learn_services(&mut self.window, registry, pool);
    }

    fn module(&mut self, key: ModuleKey, objects: &mut Objects, pid: u32) -> ModuleId {
        if let Some(id) = self.modules.get(&key) {
            return *id;
        }
        // Beyond the bound code counts under the module of unknown addresses, and is not looked up for each sample.
        if self.window.modules().len() >= MAX_MODULES {
            return self.unknown_module;
        }
        let Some(id) = self.window.add_module(describe(key, objects, pid)) else {
            return self.unknown_module;
        };
        self.modules.insert(key, id);
        id
    }
}

/// What the kernel should be told after a record.
fn wanted(sample: &Sample<'_>) -> Option<TableRequest> {
    sample.outcome.is_continuable().then_some(TableRequest {
        pid: sample.header.pid,
        mm: sample.header.mm,
    })
}

fn unknown_module() -> Module {
    Module {
        name: "[no mapping]".to_owned(),
        build_id: None,
        source: Source::Unknown,
        is_local: true,
        debug_dir: None,
        version: None,
        snapshot: None,
    }
}

fn describe(key: ModuleKey, objects: &mut Objects, pid: u32) -> Module {
    let bare = |name: &str, source: Source| Module {
        name: name.to_owned(),
        build_id: None,
        source,
        is_local: true,
        debug_dir: None,
        version: None,
        snapshot: None,
    };
    match key {
        ModuleKey::Kernel => bare("[kernel]", Source::Kernel),
        ModuleKey::Unknown => unknown_module(),
        ModuleKey::Jit(_) => Module {
            is_local: false,
            ..bare("[jit]", jit(pid, &mut objects.pool))
        },
        ModuleKey::Object(id) => objects
            .get(id)
            .map_or_else(unknown_module, |object| module_of(object)),
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

/// Where a process that compiles code just in time writes what it called it. The name has the pid
/// that the process itself sees.
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

    /// What took long has to wait, and regains its time.
    #[test]
    fn allowance() {
        let mut walks = Allowance::new();
        assert!(walks.has_time());
        walks.spend(Allowance::MOST * 20);
        assert!(!walks.has_time());
        // It took two seconds, so it waits for eight, and a part of one.
        walks.updated -= Duration::from_secs(7);
        assert!(!walks.has_time());
        walks.updated -= Duration::from_secs(1);
        assert!(walks.has_time());
    }

    /// When there are as many modules as may be, more code counts as unknown, and as nobody else's.
    #[test]
    fn too_many_modules() {
        let mut ingest = Ingest::new(false);
        while ingest.window.add_module(unknown_module()).is_some() {}
        assert_eq!(ingest.window.modules().len(), MAX_MODULES);
        let mut objects = Objects::new();
        let unknown = ingest.module(ModuleKey::Unknown, &mut objects, 0);
        assert!(matches!(
            ingest.window.modules()[unknown.0 as usize].source,
            Source::Unknown
        ));
        assert_eq!(ingest.module(ModuleKey::Jit(7), &mut objects, 0), unknown);
        assert_eq!(ingest.module(ModuleKey::Kernel, &mut objects, 0), unknown);
    }
}
