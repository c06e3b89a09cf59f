//! Samples counted while a recording runs, bounded in memory.
//!
//! Stacks are a trie from the root: a node is (parent, frame), so the thousand stacks below one
//! `main` share it. Everything is interned in insertion order, so two windows that saw the same
//! samples are equal.
//!
//! Memory at the bounds: [`MAX_STACK_NODES`] × 24 B + [`MAX_FRAMES`] × 40 B + [`MAX_ROWS`] × 100 B,
//! together about 50 MB, and paths and names; a minute of a busy machine needs about a tenth.

use std::fs::File;
use std::hash::BuildHasher;
use std::path::PathBuf;
use std::sync::Arc;

use agent_ebpf::sample::{Outcome, TraceContext};
use foldhash::fast::RandomState;
use indexmap::{IndexMap, IndexSet};

use super::attribution::{Attribution, Query};
use super::ids::{ModuleId, ProcessIndex, StackId};
use crate::file::{FileCopy, FileVersion, OpenFile, Snapshot};

/// Distinct nodes of the stack trie (12 MB). A whole machine at work for a minute has about 20,000;
/// a process that never takes the same path twice must not grow the agent without end.
pub const MAX_STACK_NODES: usize = 1 << 19;

/// Distinct frames (10 MB): there cannot be more useful ones than nodes, and code has fewer
/// addresses than stacks.
pub const MAX_FRAMES: usize = 1 << 18;

/// Distinct (process, thread, outcome, stack) rows (26 MB).
pub const MAX_ROWS: usize = 1 << 18;

/// Distinct modules: every one may keep a file open, so the limit of open files is met earlier.
pub const MAX_MODULES: usize = 1 << 16;

/// Distinct processes: a machine that starts a thousand a second for a minute stays below. In a crowded window
/// ([`Window::is_crowded`]) those that are new are counted together by program.
pub const MAX_PROCESSES: usize = 1 << 16;

/// Programs by which processes are counted together.
pub const MAX_PROGRAMS: usize = 1 << 12;

/// Name of the process under which samples are counted when there are [`MAX_PROGRAMS`].
pub const OTHER_PROCESSES: &str = "[other processes]";

/// Name of the leaf of a stack that was cut short to make room ([`Window::prune`]).
pub const RARE_STACKS: &str = "[rare stacks]";

/// Name of the stack under which samples are counted that found a table full.
pub const STACK_TABLE_FULL: &str = "[stack table full]";

/// Name of a thread as the kernel has it, ended by NUL.
pub type ThreadName = [u8; 16];

/// Where the code of a module comes from, and so where its symbols are read.
#[derive(Clone, Debug)]
pub enum Source {
    /// A mapped file. It is kept open: its symbols can be read when the process, and even the
    /// file's name, have gone.
    File(Arc<OpenFile>),
    /// A file that a FUSE server has, copied when it was mapped: nobody has to ask the server again.
    Copy(Arc<FileCopy>),
    /// The vDSO: an ELF image that has no file.
    Vdso(Arc<[u8]>),
    /// The kernel and its modules.
    Kernel,
    /// Code that a process compiled for itself (anonymous executable memory).
    Jit {
        /// The process, in the agent's pid namespace.
        pid: u32,
        /// Where its perf map is, as the agent sees it: `/proc/PID/root/tmp/perf-NSPID.map`.
        perf_map: PathBuf,
        /// The same file opened earlier, for a process that has gone by now.
        file: Option<Arc<OpenFile>>,
    },
    /// Addresses outside every mapping.
    Unknown,
}

/// Code that was sampled.
#[derive(Clone, Debug)]
pub struct Module {
    /// The path as the process sees it, or `[vdso]`, `[kernel]`, `[jit]`, `[no mapping]`.
    pub name: String,
    /// The GNU build id.
    pub build_id: Option<Vec<u8>>,
    /// Where symbols are read from.
    pub source: Source,
    /// Whether to read that, and what it leads to, cannot wait for anybody but this machine's disk.
    pub is_local: bool,
    /// The directory of debug files where the code comes from, if that is another mount namespace than
    /// the agent's: open, so that it can be read when the process has gone.
    pub debug_dir: Option<Arc<File>>,
    /// The version of the file that was mapped; `None` for what is no file. A file that has another by the time of
    /// naming has names for other code.
    pub version: Option<FileVersion>,
    /// A copy of that version, for a file that was young when it was mapped.
    pub snapshot: Option<Arc<Snapshot>>,
}

impl Module {
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
    /// Process id in the initial pid namespace; 0 for one that stands for several.
    pub pid: u32,
    /// The process's comm: its main thread's name.
    pub name: String,
    /// Path of its executable as it sees it; empty when it could not be learnt.
    pub exe: String,
    /// Name of the service that it is an instance of; empty when it says none.
    pub service: String,
}

impl Process {
    /// Name of its service: as it says itself, else its executable's, else its own.
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
    /// For a file and the vDSO the svma; for JIT code, the kernel and addresses outside every
    /// mapping the address itself.
    pub address: u64,
    /// True for an interrupted instruction and for a signal's return trampoline, which are looked up
    /// as they are; false for a return address, which is looked up at the byte before.
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

/// One sample, its addresses already told apart by module.
#[derive(Clone, Debug)]
pub struct RawSample<'a> {
    /// The process.
    pub process: ProcessIndex,
    /// Thread id in the initial pid namespace.
    pub tid: u32,
    /// The thread's name.
    pub thread_name: ThreadName,
    /// How the unwinding ended.
    pub outcome: Outcome,
    /// Kernel frames, leaf first.
    pub kernel: &'a [Frame],
    /// User frames, leaf first.
    pub user: &'a [Frame],
    /// What it was for.
    pub attribution: Option<Attribution>,
    /// Whether it is the first sample of an execution of its statement.
    pub starts_execution: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Node {
    pub(super) parent: StackId,
    pub(super) frame: u32,
}

/// What equal samples have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RowKey {
    /// The process.
    pub process: ProcessIndex,
    /// Thread id.
    pub tid: u32,
    /// The thread's name.
    pub thread_name: ThreadName,
    /// How the unwinding ended.
    pub outcome: Outcome,
    /// The stack, from the root of its user part to the leaf of its kernel part.
    pub stack: StackId,
    /// Whether the stack's leaf end was cut off to make room.
    pub is_cut: bool,
    /// What it was for: see [`Window::attribution`].
    pub attribution: Option<u32>,
}

/// How often a row was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Samples.
    pub samples: u64,
    /// Executions of a statement that were first seen in this row.
    pub executions: u64,
}

/// What the bounds cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WindowCounters {
    /// Samples received.
    pub samples: u64,
    /// Samples counted under [`STACK_TABLE_FULL`], because a table had reached its bound.
    pub stack_table_full: u64,
    /// Samples whose stack was cut short to make room ([`Window::prune`]).
    pub cut_short: u64,
}

/// The samples of a recording so far: counted, interned, bounded.
#[derive(Debug)]
pub struct Window {
    modules: Vec<Module>,
    processes: Vec<Process>,
    /// Two look-ups for each frame of each sample: with the standard library's hasher they were a quarter of the
    /// agent's CPU time. This one is seeded at random as well.
    pub(super) frames: IndexSet<Frame, RandomState>,
    pub(super) nodes: IndexSet<Node, RandomState>,
    pub(super) rows: IndexMap<RowKey, Tally>,
    pub(super) attributions: IndexSet<Attribution>,
    queries: Vec<Query>,
    /// Samples of [`STACK_TABLE_FULL`] by process and outcome: bounded by [`MAX_PROCESSES`].
    overflow: IndexMap<(ProcessIndex, Outcome), u64>,
    pub(super) counters: WindowCounters,
    pub(super) max_nodes: usize,
    /// Pruning makes no room any more.
    pub(super) is_exhausted: bool,
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

    /// An empty window with fewer stack nodes, where memory is scarcer.
    pub fn with_max_nodes(max_nodes: usize) -> Window {
        Window {
            modules: Vec::new(),
            processes: Vec::new(),
            frames: IndexSet::default(),
            nodes: IndexSet::default(),
            rows: IndexMap::new(),
            attributions: IndexSet::new(),
            queries: Vec::new(),
            overflow: IndexMap::new(),
            counters: WindowCounters::default(),
            max_nodes: max_nodes.min(MAX_STACK_NODES),
            is_exhausted: false,
        }
    }

    /// Makes a module known. The caller sees to it that a module is added once. `None`: there are
    /// [`MAX_MODULES`] already (count the frame under the [`Source::Unknown`] module then).
    pub fn add_module(&mut self, module: Module) -> Option<ModuleId> {
        push_bounded(&mut self.modules, module, MAX_MODULES).map(ModuleId)
    }

    /// Makes a process known. `None`: there are [`MAX_PROCESSES`] already.
    pub fn add_process(&mut self, process: Process) -> Option<ProcessIndex> {
        push_bounded(&mut self.processes, process, MAX_PROCESSES).map(ProcessIndex)
    }

    /// Whether processes that are new should not be told apart any more: there are many, or their rows take half of the
    /// room. Each sample of a short-lived process is a row of its own.
    pub fn is_crowded(&self) -> bool {
        self.processes.len() >= MAX_PROCESSES || self.rows.len() >= MAX_ROWS / 2
    }

    /// A process that stands for all of a program, or, without one, for all others. It has no pid. The caller adds
    /// [`MAX_PROGRAMS`] at most.
    pub fn add_program(&mut self, program: Option<(&str, &str)>) -> ProcessIndex {
        let (name, exe) = program.unwrap_or((OTHER_PROCESSES, ""));
        self.processes.push(Process {
            pid: 0,
            name: name.to_owned(),
            exe: exe.to_owned(),
            service: String::new(),
        });
        ProcessIndex(self.processes.len() as u32 - 1)
    }

    /// Whether a process stands for itself alone.
    fn is_one(&self, index: ProcessIndex) -> bool {
        let process = self.processes.get(index.0 as usize);
        process.is_none_or(|process| process.pid != 0)
    }

    /// Corrects what is known of a process: a thread may be sampled before its exec is read.
    pub fn process_mut(&mut self, index: ProcessIndex) -> Option<&mut Process> {
        self.processes.get_mut(index.0 as usize)
    }

    /// Gives a JIT module its opened perf map, or a module its build id learnt later.
    pub fn module_mut(&mut self, id: ModuleId) -> Option<&mut Module> {
        self.modules.get_mut(id.0 as usize)
    }

    /// Counts a sample. It is never dropped: at a bound it counts under [`STACK_TABLE_FULL`].
    pub fn add(&mut self, sample: &RawSample<'_>) {
        self.counters.samples += 1;
        let stack = self.intern(sample.user, sample.kernel);
        // Traces make rows of their own: at half of the room they are left out, so that stacks are not.
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

    /// Keeps a stack that is no sample's own. `None`: a table is full.
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

    /// What a row was for.
    pub fn attribution(&self, row: &RowKey) -> Option<&Attribution> {
        self.attributions.get_index(row.attribution? as usize)
    }

    /// The queries; a [`super::QueryIndex`] is an index.
    pub fn queries(&self) -> &[Query] {
        &self.queries
    }

    /// Gives the queries that the attributions name.
    pub fn set_queries(&mut self, queries: Vec<Query>) {
        self.queries = queries;
    }

    /// Gives rows a better attribution, where `better` has one for a row, its attribution and its samples.
    pub fn reattribute(
        &mut self,
        mut better: impl FnMut(&RowKey, &Attribution, u64) -> Option<Attribution>,
    ) {
        for (mut row, tally) in std::mem::take(&mut self.rows) {
            let better = self
                .attribution(&row)
                .and_then(|attribution| better(&row, attribution, tally.samples));
            if let Some(better) = better {
                row.attribution = intern_bounded(&mut self.attributions, better, MAX_ROWS);
            }
            let known = self.rows.entry(row).or_default();
            known.samples += tally.samples;
            known.executions += tally.executions;
        }
    }

    /// Samples whose stack found a table full.
    pub fn overflow(&self) -> impl ExactSizeIterator<Item = (ProcessIndex, Outcome, u64)> + '_ {
        self.overflow.iter().map(|((p, o), count)| (*p, *o, *count))
    }

    /// How many samples came, and how many lost their stack to a bound.
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

    /// Equal samples are one row; stacks with a common root share its nodes; kernel frames lie
    /// above (nearer to the leaf than) user frames.
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

    /// At the bound known stacks are still counted, new ones are counted without their frames.
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
                cut_short: 0
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
