//! Samples, counted while a recording runs, in bounded memory.
//!
//! Stacks are stored as a trie that starts at the root: a node is a pair of parent and frame, so the
//! thousand stacks below one `main` share its node. Everything is interned in insertion order, so two
//! windows that saw the same samples are equal.
//!
//! Memory at the bounds: [`MAX_STACK_NODES`] × 24 B + [`MAX_FRAMES`] × 40 B + [`MAX_ROWS`] × 100 B,
//! together about 50 MB, plus paths and names. A minute of a busy machine needs about a tenth of that.

use std::collections::HashMap;
use std::fs::File;
use std::hash::BuildHasher;
use std::path::PathBuf;
use std::sync::Arc;

use agent_ebpf::sample::{Outcome, TraceContext};
use foldhash::fast::RandomState;
use indexmap::{IndexMap, IndexSet};

use super::attribution::{Attribution, Query};
use super::ids::{ModuleId, ProcessIndex, StackId};
use super::prune::Pruned;
use crate::file::{FileCopy, FileVersion, OpenFile, Snapshot};

/// The maximum number of distinct nodes of the stack trie (12 MB). A minute of a whole machine at work has
/// about 20,000. The bound is for processes that never take the same path twice, which would make the agent
/// grow without end.
pub const MAX_STACK_NODES: usize = 1 << 19;

/// The maximum number of distinct frames (10 MB). Fewer frames than nodes are enough, because code has
/// fewer addresses than stacks.
pub const MAX_FRAMES: usize = 1 << 18;

/// The maximum number of distinct rows (26 MB), see [`RowKey`].
pub const MAX_ROWS: usize = 1 << 18;

/// The maximum number of distinct modules. Each may keep a file open, so the limit of open files is reached
/// first.
pub const MAX_MODULES: usize = 1 << 16;

/// The maximum number of distinct processes. A machine that starts a thousand processes a second stays
/// below this for a minute. In a crowded window ([`Window::is_crowded`]) new processes are counted together
/// by program.
pub const MAX_PROCESSES: usize = 1 << 16;

/// The maximum number of programs by which processes are counted together.
pub const MAX_PROGRAMS: usize = 1 << 12;

/// Name of the process under which samples are counted once there are [`MAX_PROGRAMS`] programs.
pub const OTHER_PROCESSES: &str = "[other processes]";

/// Name of the leaf of a stack that was cut short to make room (see `prune.rs`).
pub const RARE_STACKS: &str = "[rare stacks]";

/// Name of the stack under which samples are counted whose own stack finds no room in a full table.
pub const STACK_TABLE_FULL: &str = "[stack table full]";

/// Name of a thread as the kernel has it, terminated by NUL.
pub type ThreadName = [u8; 16];

/// Where the code of a module comes from, and therefore where its symbols are read.
#[derive(Clone, Debug)]
pub enum Source {
    /// A mapped file. It is kept open, so that its symbols can be read after the process has ended, and
    /// even after the file was removed.
    File(Arc<OpenFile>),
    /// A copy of a file on a FUSE file system, made when the file was mapped, so that the FUSE server need
    /// not be asked again.
    Copy(Arc<FileCopy>),
    /// The vDSO, which is an ELF image without a file.
    Vdso(Arc<[u8]>),
    /// The kernel and its modules.
    Kernel,
    /// Code that a process compiled for itself (anonymous executable memory).
    Jit {
        /// The process, in the agent's pid namespace.
        pid: u32,
        /// Path of its perf map, as the agent sees it: `/proc/PID/root/tmp/perf-NSPID.map`.
        perf_map: PathBuf,
        /// The same file, opened earlier, for a process that has ended by now.
        file: Option<Arc<OpenFile>>,
    },
    /// Addresses outside every mapping.
    Unknown,
}

/// A module whose code was sampled.
#[derive(Clone, Debug)]
pub struct Module {
    /// The path as the process sees it, or `[vdso]`, `[kernel]`, `[jit]`, `[no mapping]`.
    pub name: String,
    /// The GNU build id.
    pub build_id: Option<Vec<u8>>,
    /// Where symbols are read from.
    pub source: Source,
    /// Whether reading the source, and the files that it refers to, depends only on this machine's disk, so
    /// that it cannot block on anything else.
    pub is_local: bool,
    /// The directory of debug files of the mount namespace that the code comes from, if that is not the
    /// agent's. It is kept open, so that it can be read after the process has ended.
    pub debug_dir: Option<Arc<File>>,
    /// The version of the file that was mapped; `None` if the module is not a file. If the file has another
    /// version when names are looked up, its symbols are those of other code.
    pub version: Option<FileVersion>,
    /// A copy of that version, if the file was young when it was mapped.
    pub snapshot: Option<Arc<Snapshot>>,
}

impl Module {
    /// The module of addresses outside every mapping.
    pub fn unknown() -> Module {
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

    /// The name under which a frame without a symbol appears: the file's base name, or the name in
    /// brackets as it is.
    pub fn short_name(&self) -> &str {
        match self.name.rsplit('/').next() {
            Some(base) if !base.is_empty() => base,
            _ => &self.name,
        }
    }
}

/// A process that was sampled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Process id in the initial pid namespace; 0 for an entry that stands for several processes.
    pub pid: u32,
    /// The comm of the process, which is the name of its main thread.
    pub name: String,
    /// Path of its executable, as the process sees it; empty if it could not be read.
    pub exe: String,
    /// Name of the service that it is an instance of; empty if the process declares none.
    pub service: String,
}

impl Process {
    /// The name of its service: as the process declares it, otherwise the name of its executable, otherwise
    /// its own name.
    pub fn service_name(&self) -> &str {
        let exe = self.exe.trim_end_matches(" (deleted)");
        let exe = exe.rsplit('/').next().unwrap_or_default();
        match (self.service.as_str(), exe) {
            ("", "") => &self.name,
            ("", exe) => exe,
            (service, _) => service,
        }
    }
}

/// One frame of a stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Frame {
    /// The module.
    pub module: ModuleId,
    /// For a file and the vDSO, the svma. For JIT code, the kernel and addresses outside every mapping, the
    /// address in memory.
    pub address: u64,
    /// True for an interrupted instruction and for a signal's return trampoline, which are looked up at
    /// this address; false for a return address, which is looked up at the byte before.
    pub exact: bool,
}

impl Frame {
    /// The address whose symbol, file and line describe this frame.
    pub fn lookup_address(&self) -> u64 {
        if self.exact {
            self.address
        } else {
            self.address.saturating_sub(1)
        }
    }
}

/// One sample, whose addresses are already assigned to modules.
#[derive(Clone, Debug)]
pub struct RawSample<'a> {
    /// The process.
    pub process: ProcessIndex,
    /// Thread id in the initial pid namespace.
    pub tid: u32,
    /// The thread's name.
    pub thread_name: ThreadName,
    /// How unwinding ended.
    pub outcome: Outcome,
    /// Kernel frames, leaf first.
    pub kernel: &'a [Frame],
    /// User frames, leaf first.
    pub user: &'a [Frame],
    /// What its CPU time was used for, if that is known.
    pub attribution: Option<Attribution>,
    /// Whether it is the first sample of an execution of its statement.
    pub starts_execution: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Node {
    pub(super) parent: StackId,
    pub(super) frame: u32,
}

/// What samples of one row have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowKey {
    /// The process.
    pub process: ProcessIndex,
    /// Thread id.
    pub tid: u32,
    /// The thread's name.
    pub thread_name: ThreadName,
    /// How unwinding ended.
    pub outcome: Outcome,
    /// The stack, from the root of its user part to the leaf of its kernel part.
    pub stack: StackId,
    /// Whether the stack's leaf end was cut off to make room.
    pub is_cut: bool,
    /// Index of its attribution, see [`Window::attribution`].
    pub attribution: Option<u32>,
}

/// How often a row was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Samples.
    pub samples: u64,
    /// Executions of a statement whose first sample is in this row.
    pub executions: u64,
}

/// The counted rows.
pub(super) type Rows = IndexMap<RowKey, Tally, RandomState>;

/// How many samples were received, and how many were affected by a bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowCounters {
    /// Samples received.
    pub samples: u64,
    /// Samples that were counted under [`STACK_TABLE_FULL`], because a table had reached its bound.
    pub stack_table_full: u64,
    /// What making room did to samples ([`Window::is_nearly_full`]).
    pub pruned: Pruned,
}

/// The samples of a recording so far, interned and counted in bounded memory.
#[derive(Debug)]
pub struct Window {
    modules: Vec<Module>,
    pub(super) processes: Vec<Process>,
    /// Entries that stand for all processes of a program, by its name and executable.
    programs: HashMap<(String, String), ProcessIndex>,
    /// The entry that stands for the processes of programs beyond [`MAX_PROGRAMS`].
    others: Option<ProcessIndex>,
    /// Each frame of each sample needs two lookups. With the standard library's hasher these took a quarter
    /// of the agent's CPU time. This hasher is seeded at random as well.
    pub(super) frames: IndexSet<Frame, RandomState>,
    pub(super) nodes: IndexSet<Node, RandomState>,
    pub(super) rows: Rows,
    pub(super) attributions: IndexSet<Attribution, RandomState>,
    queries: Vec<Query>,
    /// Samples that are counted under [`STACK_TABLE_FULL`], by process and outcome; bounded by
    /// [`MAX_PROCESSES`].
    overflow: IndexMap<(ProcessIndex, Outcome), u64>,
    pub(super) counters: WindowCounters,
    pub(super) max_nodes: usize,
    /// Samples after which the window may be pruned again.
    pub(super) prune_after: u64,
    /// See [`Window::is_crowded`].
    pub(super) is_crowded: bool,
}

impl Default for Window {
    fn default() -> Self {
        Self::new()
    }
}

impl Window {
    /// An empty window with the bounds of this module.
    pub fn new() -> Window {
        Self::with_max_nodes(MAX_STACK_NODES)
    }

    /// An empty window that holds at most `max_nodes` stack nodes, for machines with less memory.
    pub fn with_max_nodes(max_nodes: usize) -> Window {
        Window {
            modules: Vec::new(),
            processes: Vec::new(),
            programs: HashMap::new(),
            others: None,
            frames: IndexSet::default(),
            nodes: IndexSet::default(),
            rows: Rows::default(),
            attributions: IndexSet::default(),
            queries: Vec::new(),
            overflow: IndexMap::new(),
            counters: WindowCounters::default(),
            max_nodes: max_nodes.min(MAX_STACK_NODES),
            prune_after: 0,
            is_crowded: false,
        }
    }

    /// Adds a module. The caller must add each module only once. Returns `None` if there are
    /// [`MAX_MODULES`] already; the frame should then be counted under the [`Source::Unknown`] module.
    pub fn add_module(&mut self, module: Module) -> Option<ModuleId> {
        push_bounded(&mut self.modules, module, MAX_MODULES).map(ModuleId)
    }

    /// Adds a process. Returns `None` if there are [`MAX_PROCESSES`] already.
    pub fn add_process(&mut self, process: Process) -> Option<ProcessIndex> {
        push_bounded(&mut self.processes, process, MAX_PROCESSES).map(ProcessIndex)
    }

    /// Whether new processes should be counted together by program, because there are too many of them, or
    /// because rows take half of the room. Each sample of a short-lived process is a row of its own.
    pub fn is_crowded(&self) -> bool {
        self.is_crowded || self.processes.len() >= MAX_PROCESSES || self.rows.len() >= MAX_ROWS / 2
    }

    /// The entry that stands for all processes of a program, given by name and executable. It has no pid. Beyond
    /// [`MAX_PROGRAMS`] it is the one that stands for all other processes.
    pub fn program(&mut self, name: &str, exe: &str) -> ProcessIndex {
        let key = (name.to_owned(), exe.to_owned());
        if let Some(index) = self.programs.get(&key) {
            return *index;
        }
        if self.programs.len() >= MAX_PROGRAMS {
            return match self.others {
                Some(index) => index,
                None => {
                    let index = self.push_program(OTHER_PROCESSES, "");
                    *self.others.insert(index)
                }
            };
        }
        let index = self.push_program(name, exe);
        self.programs.insert(key, index);
        index
    }

    fn push_program(&mut self, name: &str, exe: &str) -> ProcessIndex {
        self.processes.push(Process {
            pid: 0,
            name: name.to_owned(),
            exe: exe.to_owned(),
            service: String::new(),
        });
        ProcessIndex(self.processes.len() as u32 - 1)
    }

    /// The number of programs some of whose processes are counted together.
    pub fn programs(&self) -> usize {
        self.programs.len()
    }

    /// Whether an entry stands for a single process.
    pub(super) fn is_one(&self, index: ProcessIndex) -> bool {
        let process = self.processes.get(index.0 as usize);
        process.is_none_or(|process| process.pid != 0)
    }

    /// A process, to correct what is known about it: a thread may be sampled before the event of its exec
    /// is read.
    pub fn process_mut(&mut self, index: ProcessIndex) -> Option<&mut Process> {
        self.processes.get_mut(index.0 as usize)
    }

    /// A module, to add what becomes known later: the opened perf map of JIT code, or a build id.
    pub fn module_mut(&mut self, id: ModuleId) -> Option<&mut Module> {
        self.modules.get_mut(id.0 as usize)
    }

    /// Counts a sample. No sample is dropped: at a bound it is counted under [`STACK_TABLE_FULL`].
    pub fn add(&mut self, sample: &RawSample<'_>) {
        self.counters.samples += 1;
        let stack = self.intern(sample.user, sample.kernel);
        // Each trace makes rows of its own. Traces are left out once half of the rows are used, so that
        // there is room for stacks.
        let mut attribution = sample.attribution.clone();
        if self.rows.len() >= MAX_ROWS / 2
            && let Some(attribution) = &mut attribution
        {
            attribution.trace = TraceContext::default();
        }
        let attribution = attribution
            .and_then(|attribution| intern_bounded(&mut self.attributions, attribution, MAX_ROWS));
        let row = stack.map(|stack| RowKey {
            attribution,
            process: sample.process,
            tid: if self.is_one(sample.process) {
                sample.tid
            } else {
                0
            },
            thread_name: sample.thread_name,
            outcome: sample.outcome,
            stack,
            is_cut: false,
        });
        match row {
            Some(row) if self.rows.len() < MAX_ROWS || self.rows.contains_key(&row) => {
                let tally = self.rows.entry(row).or_default();
                tally.samples += 1;
                tally.executions += u64::from(sample.starts_execution);
            }
            _ => {
                self.counters.stack_table_full += 1;
                let key = (sample.process, sample.outcome);
                *self.overflow.entry(key).or_insert(0) += 1;
            }
        }
    }

    /// Stores a stack, which need not belong to a sample, and returns its index. `None` if a table is full.
    pub fn intern(&mut self, user: &[Frame], kernel: &[Frame]) -> Option<StackId> {
        let mut parent = StackId::EMPTY;
        for frame in user.iter().rev().chain(kernel.iter().rev()) {
            let frame = intern_bounded(&mut self.frames, *frame, MAX_FRAMES)?;
            let node = Node { parent, frame };
            parent = StackId(intern_bounded(&mut self.nodes, node, self.max_nodes)?);
        }
        Some(parent)
    }

    /// The modules; a [`ModuleId`] is an index.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// The processes; a [`ProcessIndex`] is an index.
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// Every distinct frame; [`Window::stack`] yields indices into this.
    pub fn frames(&self) -> impl ExactSizeIterator<Item = &Frame> {
        self.frames.iter()
    }

    /// A stack's frames as indices into [`Window::frames`], leaf first.
    pub fn stack(&self, stack: StackId) -> impl Iterator<Item = usize> + '_ {
        let mut next = stack;
        std::iter::from_fn(move || {
            let node = self.nodes.get_index(next.0 as usize)?;
            next = node.parent;
            Some(node.frame as usize)
        })
    }

    /// The counted rows, in the order in which they were first seen.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = (&RowKey, Tally)> {
        self.rows.iter().map(|(row, tally)| (row, *tally))
    }

    /// The attribution of a row.
    pub fn attribution(&self, row: &RowKey) -> Option<&Attribution> {
        self.attributions.get_index(row.attribution? as usize)
    }

    /// The queries; a [`super::QueryIndex`] is an index.
    pub fn queries(&self) -> &[Query] {
        &self.queries
    }

    /// Sets the queries that the attributions refer to.
    pub fn set_queries(&mut self, queries: Vec<Query>) {
        self.queries = queries;
    }

    /// Replaces attributions. `better` is called with each row that has an attribution, with that
    /// attribution and the row's number of samples, and returns the new attribution, if there is one. Rows
    /// that become equal are merged.
    pub fn reattribute(
        &mut self,
        mut better: impl FnMut(&RowKey, &Attribution, u64) -> Option<Attribution>,
    ) {
        for (mut row, tally) in std::mem::take(&mut self.rows) {
            let better = self
                .attribution(&row)
                .and_then(|attribution| better(&row, attribution, tally.samples));
            // In a full table the row keeps the attribution that it has.
            let better =
                better.and_then(|better| intern_bounded(&mut self.attributions, better, MAX_ROWS));
            row.attribution = better.or(row.attribution);
            let known = self.rows.entry(row).or_default();
            known.samples += tally.samples;
            known.executions += tally.executions;
        }
    }

    /// Samples whose stack found no room in a full table, by process and outcome.
    pub fn overflow(&self) -> impl ExactSizeIterator<Item = (ProcessIndex, Outcome, u64)> + '_ {
        self.overflow.iter().map(|((p, o), count)| (*p, *o, *count))
    }

    /// How many samples were received, and how many lost their stack to a bound.
    pub fn counters(&self) -> WindowCounters {
        self.counters
    }
}

fn push_bounded<T>(list: &mut Vec<T>, item: T, bound: usize) -> Option<u32> {
    if list.len() >= bound {
        return None;
    }
    let index = u32::try_from(list.len()).ok()?;
    list.push(item);
    Some(index)
}

fn intern_bounded<T: std::hash::Hash + Eq, S: BuildHasher>(
    set: &mut IndexSet<T, S>,
    item: T,
    bound: usize,
) -> Option<u32> {
    let index = if set.len() < bound {
        set.insert_full(item).0
    } else {
        set.get_index_of(&item)?
    };
    u32::try_from(index).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(address: u64) -> Frame {
        Frame {
            module: ModuleId(0),
            address,
            exact: false,
        }
    }

    fn sample<'a>(user: &'a [Frame], kernel: &'a [Frame]) -> RawSample<'a> {
        RawSample {
            process: ProcessIndex(0),
            tid: 1,
            thread_name: *b"worker\0\0\0\0\0\0\0\0\0\0",
            outcome: Outcome::Complete,
            kernel,
            user,
            attribution: None,
            starts_execution: false,
        }
    }

    /// Equal samples are one row; stacks with a common root share its nodes; kernel frames are nearer to
    /// the leaf than user frames.
    #[test]
    fn counts_and_shares() {
        let mut window = Window::new();
        let user = [frame(3), frame(2), frame(1)];
        window.add(&sample(&user, &[]));
        window.add(&sample(&user, &[]));
        window.add(&sample(&user, &[frame(9)]));
        let rows: Vec<_> = window
            .rows()
            .map(|(row, n)| (row.stack, n.samples))
            .collect();
        assert_eq!(rows.iter().map(|r| r.1).collect::<Vec<_>>(), [2, 1]);
        assert_eq!(window.nodes.len(), 4);
        let frames: Vec<_> = window.frames().copied().collect();
        let addresses: Vec<_> = window.stack(rows[1].0).map(|f| frames[f].address).collect();
        assert_eq!(addresses, [9, 3, 2, 1]);
    }

    /// At the bound, known stacks are still counted, and new ones are counted without their frames.
    #[test]
    fn a_full_table_loses_stacks_but_no_samples() {
        let mut window = Window::with_max_nodes(2);
        window.add(&sample(&[frame(2), frame(1)], &[]));
        window.add(&sample(&[frame(3), frame(1)], &[]));
        window.add(&sample(&[frame(2), frame(1)], &[]));
        let counted: u64 = window.rows().map(|(_, n)| n.samples).sum();
        assert_eq!(counted, 2);
        let lost: Vec<_> = window.overflow().collect();
        assert_eq!(lost, [(ProcessIndex(0), Outcome::Complete, 1)]);
        assert_eq!(
            window.counters(),
            WindowCounters {
                samples: 3,
                stack_table_full: 1,
                pruned: Pruned::default()
            }
        );
    }

    /// A sample without any frame is still a sample.
    #[test]
    fn an_empty_stack_is_counted() {
        let mut window = Window::new();
        window.add(&sample(&[], &[]));
        let (row, count) = window.rows().next().expect("one row");
        assert_eq!((row.stack, count.samples), (StackId::EMPTY, 1));
        assert_eq!(window.stack(row.stack).count(), 0);
    }
}
