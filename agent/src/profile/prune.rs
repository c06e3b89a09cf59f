//! Makes room in a [`Window`] that is nearly full: rare stacks are cut short, and rare rows counted by program, so that new
//! ones are still counted whole.

use std::sync::Arc;

use agent_ebpf::sample::TraceContext;
use foldhash::fast::RandomState;
use indexmap::IndexSet;

use super::attribution::{Attribution, Backend, Caller, Unknown};
use super::ids::{ProcessIndex, StackId};
use super::window::{MAX_FRAMES, MAX_ROWS, Node, Rows, Window};

/// Frames that one sample can need: those of its own stack, of the kernel's and of its caller's
/// ([`agent_ebpf::limits`]), rounded up.
const MOST_FRAMES: usize = 4096;

/// Samples between two prunings at least. What finds no room meanwhile is counted under
/// [`STACK_TABLE_FULL`](super::STACK_TABLE_FULL): a process that never takes the same path twice fills what was freed within
/// some hundred samples, and pruning takes a tenth of a second.
const PAUSE: u64 = 1 << 15;

/// Maximum number of nodes at which the stacks of rare rows may end. It is a small part of the rows, so that few rows are left
/// when rare rows are counted by program.
const COARSE_NODES: usize = MAX_ROWS / 16;

/// What pruning did to the samples so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Samples whose stack was cut short.
    pub cut_short: u64,
    /// Samples that are counted by program, without pid, thread and trace.
    pub by_program: u64,
}

/// Samples whose caller's stack was dropped when the window was pruned once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DroppedCallers {
    /// Of callers whose stack was whole.
    pub known: u64,
    /// Of callers whose stack was known in part.
    pub partial: u64,
}

impl Window {
    /// Whether the next sample may find no room.
    pub fn is_nearly_full(&self) -> bool {
        let need = MOST_FRAMES.min(self.max_nodes / 4);
        self.counters.samples >= self.prune_after
            && (self.nodes.len() + need > self.max_nodes
                || self.frames.len() + need > MAX_FRAMES
                || self.rows.len() + 1 > MAX_ROWS
                || self.attributions.len() + 1 > MAX_ROWS)
    }

    /// Frees about half of what is scarce, by as little as that needs. Where nodes or frames are, stacks of few samples lose
    /// their leaf end ([`RowKey::is_cut`](super::RowKey::is_cut)), down to the frame that they share with enough others.
    /// Where rows are, those of few samples are counted by program, and their stacks are cut as well. No sample is lost, and
    /// what has many samples stays as it is.
    ///
    /// Every [`StackId`] that was given out before is void.
    pub(crate) fn prune(&mut self) -> DroppedCallers {
        self.prune_after = self.counters.samples + PAUSE;
        self.is_crowded = true;
        let weights = self.weights();
        let nodes = Histogram::of(weights.iter().copied());
        let is_scarce = |used: usize, room: usize| used > room - room / 4;
        let mut least = 0;
        if is_scarce(self.nodes.len(), self.max_nodes) {
            least = nodes.least_for(self.max_nodes / 2);
        }
        if is_scarce(self.frames.len(), MAX_FRAMES) {
            let frames = Histogram::of(self.heaviest_of_each_frame(&weights));
            least = least.max(frames.least_for(MAX_FRAMES / 2));
        }
        let mut least_row = 0;
        if is_scarce(self.rows.len().max(self.attributions.len()), MAX_ROWS) {
            let rows = Histogram::of(self.rows.values().map(|tally| tally.samples));
            least_row = rows.least_for(MAX_ROWS / 4);
        }
        let least_of_rare = least.max(nodes.least_for(COARSE_NODES));
        let stacks = self.keep_stacks(&weights, least, least_of_rare);
        let are_names_scarce = is_scarce(self.attributions.len(), MAX_ROWS);
        self.keep_rows(&stacks, least_row, are_names_scarce)
    }

    /// For each node the number of samples at it and above it, and of those for which it is a caller's.
    fn weights(&self) -> Vec<u64> {
        let mut weights = vec![0u64; self.nodes.len()];
        let mut add = |stack: StackId, samples: u64| {
            if let Some(weight) = weights.get_mut(stack.0 as usize) {
                *weight += samples;
            }
        };
        for (row, tally) in &self.rows {
            add(row.stack, tally.samples);
            if let Some(stack) = self.attribution(row).and_then(caller_stack) {
                add(stack, tally.samples);
            }
        }
        // A node comes after its parent.
        for index in (0..weights.len()).rev() {
            let parent = self.nodes[index].parent.0 as usize;
            if parent < index {
                weights[parent] += weights[index];
            }
        }
        weights
    }

    /// For each frame the weight of its heaviest node.
    fn heaviest_of_each_frame(&self, weights: &[u64]) -> impl Iterator<Item = u64> {
        let mut heaviest = vec![0; self.frames.len()];
        for (node, weight) in self.nodes.iter().zip(weights) {
            let known = &mut heaviest[node.frame as usize];
            *known = (*known).max(*weight);
        }
        heaviest.into_iter()
    }

    /// Keeps the nodes of at least `least` samples. Returns what each node has become: for other rows, and for rare ones.
    fn keep_stacks(&mut self, weights: &[u64], least: u64, least_of_rare: u64) -> Vec<KeptNode> {
        let mut frames = IndexSet::with_hasher(RandomState::default());
        let mut nodes: IndexSet<Node, RandomState> = IndexSet::default();
        let mut kept: Vec<KeptNode> = Vec::with_capacity(self.nodes.len());
        for (node, weight) in self.nodes.iter().zip(weights) {
            let parent = kept_node(&kept, node.parent);
            // The parent has at least as many samples, so it was kept as well.
            let own = match *weight >= least {
                true => {
                    let frame = frames.insert_full(self.frames[node.frame as usize]).0 as u32;
                    let node = Node {
                        parent: parent.own.stack,
                        frame,
                    };
                    KeptStack {
                        stack: StackId(nodes.insert_full(node).0 as u32),
                        is_cut: false,
                    }
                }
                false => parent.own.cut(),
            };
            let rare = match *weight >= least_of_rare {
                true => own,
                false => parent.rare.cut(),
            };
            kept.push(KeptNode { own, rare });
        }
        (self.frames, self.nodes) = (frames, nodes);
        kept
    }

    /// The rows with the stacks that were kept. Those of fewer samples than `least` are counted by program; without their
    /// application and client only where attributions are scarce.
    fn keep_rows(
        &mut self,
        stacks: &[KeptNode],
        least: u64,
        are_names_scarce: bool,
    ) -> DroppedCallers {
        let rows = std::mem::take(&mut self.rows);
        let old = std::mem::take(&mut self.attributions);
        let mut kept = Rows::with_capacity_and_hasher(rows.len() / 2, RandomState::default());
        let mut dropped = DroppedCallers::default();
        // By index, for rows that are rare and for the others.
        let mut known = [vec![None; old.len()], vec![None; old.len()]];
        let mut pruned = Pruned {
            cut_short: 0,
            ..self.counters.pruned
        };
        for (mut row, tally) in rows {
            let is_rare = tally.samples < least;
            let node = kept_node(stacks, row.stack);
            let stack = if is_rare { node.rare } else { node.own };
            row.stack = stack.stack;
            row.is_cut |= stack.is_cut;
            if let Some(index) = row.attribution {
                let index = index as usize;
                let attribution = &old[index];
                let is_dropped = caller_stack(attribution)
                    .is_some_and(|stack| kept_node(stacks, stack).own.is_cut);
                if is_dropped {
                    dropped.add(attribution, tally.samples);
                }
                let new = &mut known[usize::from(is_rare)][index];
                if new.is_none() {
                    let mut attribution = keep_attribution(attribution, stacks);
                    if is_rare {
                        attribution = self.by_program(attribution, are_names_scarce);
                    }
                    *new = Some(self.attributions.insert_full(attribution).0 as u32);
                }
                row.attribution = *new;
            }
            if is_rare && self.is_one(row.process) {
                pruned.by_program += tally.samples;
                row.process = self.program_of(row.process);
                (row.tid, row.thread_name) = (0, [0; 16]);
            }
            if row.is_cut {
                pruned.cut_short += tally.samples;
            }
            let sum = kept.entry(row).or_default();
            sum.samples += tally.samples;
            sum.executions += tally.executions;
        }
        self.rows = kept;
        self.counters.pruned = pruned;
        dropped
    }

    /// An attribution that says nothing of a single process; nor of a connection, where names are scarce.
    fn by_program(&mut self, attribution: Attribution, are_names_scarce: bool) -> Attribution {
        let backend = attribution.backend.map(|backend| {
            let mut backend = Backend::clone(&backend);
            if are_names_scarce {
                (backend.application, backend.client) = (Arc::from(""), Arc::from(""));
            }
            if let Caller::Known { process, .. }
            | Caller::Partial { process, .. }
            | Caller::Process { process, .. } = &mut backend.caller
            {
                *process = self.program_of(*process);
            }
            Arc::new(backend)
        });
        Attribution {
            trace: TraceContext::default(),
            backend,
        }
    }

    /// The entry of the program that a process runs.
    fn program_of(&mut self, process: ProcessIndex) -> ProcessIndex {
        let Some(process) = self.processes.get(process.0 as usize) else {
            return process;
        };
        let (name, exe) = (process.name.clone(), process.exe.clone());
        self.program(&name, &exe)
    }
}

/// The number of nodes, frames or rows for each number of samples.
struct Histogram {
    /// By the number of samples; the last slot has what has more.
    counts: Vec<usize>,
    total: usize,
}

impl Histogram {
    /// Counts from this number of samples on share the last slot.
    const MOST: usize = 1 << 16;

    fn of(samples: impl Iterator<Item = u64>) -> Histogram {
        let mut counts = vec![0; Self::MOST + 1];
        let mut total = 0;
        for samples in samples {
            counts[usize::try_from(samples).map_or(Self::MOST, |n| n.min(Self::MOST))] += 1;
            total += 1;
        }
        Histogram { counts, total }
    }

    /// The smallest threshold that at most `room` of the counted nodes, frames or rows reach.
    fn least_for(&self, room: usize) -> u64 {
        let mut left = self.total;
        let mut least = 0;
        while left > room && least < Self::MOST {
            left -= self.counts[least];
            least += 1;
        }
        least as u64
    }
}

/// What a stack has become.
#[derive(Clone, Copy, Debug)]
struct KeptStack {
    stack: StackId,
    /// Whether its leaf end is missing.
    is_cut: bool,
}

impl KeptStack {
    fn cut(self) -> KeptStack {
        KeptStack {
            is_cut: true,
            ..self
        }
    }
}

/// What the stack that ends in a node has become.
#[derive(Clone, Copy, Debug)]
struct KeptNode {
    /// For rows that are not rare.
    own: KeptStack,
    /// For rare rows.
    rare: KeptStack,
}

fn kept_node(kept: &[KeptNode], stack: StackId) -> KeptNode {
    let empty = KeptStack {
        stack: StackId::EMPTY,
        is_cut: false,
    };
    kept.get(stack.0 as usize).copied().unwrap_or(KeptNode {
        own: empty,
        rare: empty,
    })
}

impl DroppedCallers {
    fn add(&mut self, attribution: &Attribution, samples: u64) {
        let caller = attribution.backend.as_ref().map(|backend| &backend.caller);
        match caller {
            Some(Caller::Known { .. }) => self.known += samples,
            Some(Caller::Partial { .. }) => self.partial += samples,
            _ => {}
        }
    }
}

fn caller_stack(attribution: &Attribution) -> Option<StackId> {
    match attribution.backend.as_ref()?.caller {
        Caller::Known { stack, .. } | Caller::Partial { stack, .. } => Some(stack),
        Caller::None | Caller::Process { .. } | Caller::Unknown(_) => None,
    }
}

/// A caller's stack is kept whole or not at all: its leaf end says who asked.
fn keep_attribution(attribution: &Attribution, stacks: &[KeptNode]) -> Attribution {
    let (Some(backend), Some(stack)) = (&attribution.backend, caller_stack(attribution)) else {
        return attribution.clone();
    };
    let kept = kept_node(stacks, stack).own;
    let mut backend = Backend::clone(backend);
    match &mut backend.caller {
        Caller::Known { process, .. } | Caller::Partial { process, .. } if kept.is_cut => {
            backend.caller = Caller::Process {
                process: *process,
                reason: Unknown::Lost,
            };
        }
        Caller::Known { stack, .. } | Caller::Partial { stack, .. } => *stack = kept.stack,
        Caller::None | Caller::Process { .. } | Caller::Unknown(_) => {}
    }
    Attribution {
        trace: attribution.trace,
        backend: Some(Arc::new(backend)),
    }
}

#[cfg(test)]
mod tests {
    use agent_ebpf::sample::Outcome;

    use super::*;
    use crate::profile::{Frame, ModuleId, Phase, Process, RawSample, WaitEvent};

    fn frame(address: u64) -> Frame {
        Frame {
            module: ModuleId(0),
            address,
            exact: false,
        }
    }

    fn sample(user: &[Frame], tid: u32) -> RawSample<'_> {
        RawSample {
            process: ProcessIndex(0),
            tid,
            thread_name: [0; 16],
            outcome: Outcome::Complete,
            kernel: &[],
            user,
            attribution: None,
            starts_execution: false,
        }
    }

    fn attribution(caller: Caller) -> Attribution {
        Attribution {
            trace: TraceContext::default(),
            backend: Some(Arc::new(Backend {
                kind: Arc::from("client backend"),
                port: 0,
                query: None,
                phase: Phase::Executing,
                state: "active",
                wait: WaitEvent::default(),
                database: Arc::from(""),
                user: Arc::from(""),
                application: Arc::from(""),
                client: Arc::from(""),
                caller,
            })),
        }
    }

    fn addresses(window: &Window, stack: StackId) -> Vec<u64> {
        let frames: Vec<Frame> = window.frames().copied().collect();
        window.stack(stack).map(|f| frames[f].address).collect()
    }

    /// However many stacks come, the frequent ones stay whole, each sample is counted, and there is room for new ones.
    #[test]
    fn rare_stacks_are_cut() {
        const STACKS: u64 = 4 * MAX_FRAMES as u64;
        let mut window = Window::new();
        let heavy = [frame(3), frame(2), frame(1)];
        for number in 0..STACKS {
            if window.is_nearly_full() {
                window.prune();
                assert!(window.frames.len() <= MAX_FRAMES / 2);
            }
            window.add(&sample(&[frame(1_000_000 + number), frame(2), frame(1)], 1));
            window.add(&sample(&heavy, 1));
        }
        assert_eq!(window.counters().stack_table_full, 0);
        let total: u64 = window.rows().map(|(_, tally)| tally.samples).sum();
        assert_eq!(total, 2 * STACKS);
        let of = |wanted: &[u64], cut: bool| {
            let rows = window.rows();
            let found = rows.filter(|(row, _)| row.is_cut == cut);
            let found = found.filter(|(row, _)| addresses(&window, row.stack) == wanted);
            found.map(|(_, tally)| tally.samples).sum::<u64>()
        };
        assert_eq!(of(&[3, 2, 1], false), STACKS);
        assert!(of(&[2, 1], true) > STACKS * 3 / 4);
        assert_eq!(of(&[2, 1], true), window.counters().pruned.cut_short);
        assert_eq!(window.frames().len(), window.rows().len() + 1);
    }

    /// Where rows are scarce, the rare ones are counted by program, and the others stay as they are.
    #[test]
    fn rare_rows_are_counted_by_program() {
        let mut window = Window::new();
        window.add_process(Process {
            pid: 7,
            name: "many".to_owned(),
            exe: "/bin/many".to_owned(),
            service: String::new(),
        });
        let stack = [frame(1)];
        for tid in 1..=2 * MAX_ROWS as u32 {
            if window.is_nearly_full() {
                window.prune();
            }
            window.add(&sample(&stack, tid));
            window.add(&sample(&stack, 1));
        }
        let samples = |tid| {
            let mut rows = window.rows();
            rows.find(|(row, _)| row.tid == tid)
                .map(|(_, tally)| tally.samples)
        };
        assert_eq!(samples(1), Some(1 + 2 * MAX_ROWS as u64));
        assert!(samples(0).is_some_and(|samples| samples > MAX_ROWS as u64 / 2));
        let rare = window.rows().find(|(row, _)| row.tid == 0);
        let process = rare.map(|(row, _)| &window.processes()[row.process.0 as usize]);
        let process = process.map(|process| (process.pid, process.exe.as_str()));
        assert_eq!(process, Some((0, "/bin/many")));
        assert_eq!(window.counters().stack_table_full, 0);
    }

    /// However many processes, connections, threads and stacks there are, a window has room for more.
    #[test]
    fn a_window_never_ends() {
        let mut window = Window::new();
        for number in 0..3 * MAX_ROWS as u64 {
            if window.is_nearly_full() {
                window.prune();
            }
            let process = match window.is_crowded() {
                true => None,
                false => window.add_process(Process {
                    pid: 1 + number as u32,
                    name: "backend".to_owned(),
                    exe: "/bin/backend".to_owned(),
                    service: String::new(),
                }),
            };
            let process = process.unwrap_or_else(|| window.program("backend", "/bin/backend"));
            let caller = Caller::Process {
                process,
                reason: Unknown::Budget,
            };
            let mut attribution = attribution(caller);
            if let Some(backend) = attribution.backend.as_mut().and_then(Arc::get_mut) {
                backend.application = Arc::from(format!("application {number}"));
                backend.client = Arc::from(format!("client {number}"));
            }
            attribution.trace.span = number.to_le_bytes();
            let stack = [frame(number), frame(number / 3), frame(1)];
            window.add(&RawSample {
                process,
                attribution: Some(attribution),
                ..sample(&stack, 1 + number as u32)
            });
        }
        assert_eq!(window.counters().stack_table_full, 0);
        let total: u64 = window.rows().map(|(_, tally)| tally.samples).sum();
        assert_eq!(total, 3 * MAX_ROWS as u64);
    }

    /// A caller's stack that many samples have is whole after pruning; one of a rare sample is said to be lost.
    #[test]
    fn callers_are_whole_or_lost() {
        let mut window = Window::with_max_nodes(10_000);
        for (leaf, samples) in [(100, 1), (200, 50)] {
            let stack = window.intern(&[frame(leaf), frame(leaf + 1)], &[]);
            let stack = stack.expect("room");
            for _ in 0..samples {
                window.add(&RawSample {
                    attribution: Some(attribution(Caller::Known {
                        process: ProcessIndex(7),
                        stack,
                    })),
                    ..sample(&[frame(1)], 1)
                });
            }
        }
        for number in 0..9_000 {
            window.add(&sample(&[frame(1_000_000 + number)], 1));
        }
        assert!(window.is_nearly_full());
        window.prune();
        let callers: Vec<_> = window
            .rows()
            .filter_map(|(row, tally)| {
                let backend = window.attribution(row)?.backend.clone()?;
                Some((backend.caller.clone(), tally.samples))
            })
            .collect();
        let [(lost, 1), (Caller::Known { stack, .. }, 50)] = &callers[..] else {
            panic!("{callers:?}");
        };
        assert_eq!(
            *lost,
            Caller::Process {
                process: ProcessIndex(7),
                reason: Unknown::Lost
            }
        );
        assert_eq!(addresses(&window, *stack), [200, 201]);
    }

    /// Processes that share their stacks, so that no stack is rare but each row: they are counted by program, and only where
    /// rows are what is scarce.
    #[test]
    fn rows_that_share_stacks() {
        let mut window = Window::new();
        let (processes, stacks) = (1 << 10, MAX_ROWS as u64 >> 10);
        for pid in 1..=processes {
            let process = window.add_process(Process {
                pid,
                name: "worker".to_owned(),
                exe: "/bin/worker".to_owned(),
                service: String::new(),
            });
            let process = process.expect("room");
            for number in 0..stacks {
                let mut attribution = attribution(Caller::None);
                if let Some(backend) = attribution.backend.as_mut().and_then(Arc::get_mut) {
                    backend.application = Arc::from(["checkout", "search"][pid as usize % 2]);
                }
                window.add(&RawSample {
                    process,
                    attribution: Some(attribution),
                    ..sample(&[frame(number), frame(1)], pid)
                });
            }
        }
        assert!(window.is_nearly_full());
        window.prune();
        assert!(window.rows.len() <= MAX_ROWS / 2);
        assert_eq!(window.counters().pruned.by_program, MAX_ROWS as u64);
        assert!(!window.is_nearly_full(), "it is not tried for each sample");
        // There are few applications, so that the samples keep theirs.
        let of_search = window.rows().filter(|(row, _)| {
            let attribution = window.attribution(row);
            let backend = attribution.and_then(|attribution| attribution.backend.as_ref());
            backend.is_some_and(|backend| &*backend.application == "search")
        });
        let of_search: u64 = of_search.map(|(_, tally)| tally.samples).sum();
        assert_eq!(of_search, MAX_ROWS as u64 / 2);
    }

    /// Deep stacks fill the nodes, and rows, of which there are enough, stay as they are.
    #[test]
    fn what_is_not_scarce_stays() {
        let mut window = Window::new();
        let threads = MAX_ROWS as u32 / 2;
        for tid in 1..=threads {
            window.add(&sample(&[frame(1)], tid));
        }
        let mut number = 0;
        while !window.is_nearly_full() {
            let deep: Vec<Frame> = (0..1000).map(|depth| frame(depth ^ number << 8)).collect();
            window.add(&sample(&deep, 1));
            number += 1;
        }
        window.prune();
        assert!(window.nodes.len() <= window.max_nodes / 2);
        let of_threads = window.rows().filter(|(row, _)| row.tid > 1).count();
        assert_eq!(of_threads, threads as usize - 1);
        assert_eq!(window.counters().pruned.by_program, 0);
    }
}
