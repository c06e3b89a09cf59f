//! Makes room in a [`Window`] that is nearly full: rare stacks are cut short, so that new stacks are still
//! counted in full.

use std::collections::HashMap;
use std::sync::Arc;

use foldhash::fast::RandomState;
use indexmap::{IndexMap, IndexSet};

use super::attribution::{Attribution, Backend, Caller, Unknown};
use super::ids::StackId;
use super::window::{MAX_FRAMES, MAX_ROWS, Node, RowKey, Tally, Window};

/// Maximum number of frames that one sample can need: those of its own kernel and user stacks, and those of
/// its caller's stack.
const MOST_FRAMES: usize = 2048;

/// Stacks with at least this many samples are never cut short. A window in which every stack has so many
/// samples is full.
const MOST_SAMPLES: u64 = 1 << 20;

impl Window {
    /// Whether there may be no room for the next sample.
    pub fn is_nearly_full(&self) -> bool {
        let is_full = |used: usize, room: usize, need: usize| used + need > room;
        !self.is_exhausted
            && (is_full(self.nodes.len(), self.max_nodes, MOST_FRAMES)
                || is_full(self.frames.len(), MAX_FRAMES, MOST_FRAMES)
                || is_full(self.rows.len(), MAX_ROWS, 1)
                || is_full(self.attributions.len(), MAX_ROWS, 1))
    }

    /// Frees half of the room, if possible, with the least loss. Stacks with few samples lose their leaf
    /// end ([`RowKey::is_cut`]), up to the frame that they share with enough other samples. If rows are
    /// scarce, those with few samples lose their thread and their trace. No sample is lost, and stacks and
    /// rows with many samples stay as they are.
    ///
    /// Every [`StackId`] that was returned before is invalid afterwards.
    pub fn prune(&mut self) {
        let weights = self.weights();
        let mut least = 2;
        while least < MOST_SAMPLES && !self.has_room_for(&weights, least) {
            least *= 2;
        }
        let stacks = self.keep_stacks(&weights, least);
        let mut least_row = 0;
        loop {
            let (rows, attributions) = self.keep_rows(&stacks, least_row);
            if rows.len() <= MAX_ROWS / 2 && attributions.len() <= MAX_ROWS / 2 {
                (self.rows, self.attributions) = (rows, attributions);
                break;
            }
            least_row = (least_row * 2).max(2);
            if least_row > MOST_SAMPLES {
                (self.rows, self.attributions) = (rows, attributions);
                self.is_exhausted = true;
                break;
            }
        }
        let is_cut = |(row, tally): (&RowKey, &Tally)| row.is_cut.then_some(tally.samples);
        self.counters.cut_short = self.rows.iter().filter_map(is_cut).sum();
    }

    /// The weight of each node: the number of samples whose stack, or whose caller's stack, ends at the
    /// node or passes through it.
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
        // Every node comes after its parent.
        for index in (0..weights.len()).rev() {
            let parent = self.nodes[index].parent.0 as usize;
            if parent < index {
                weights[parent] += weights[index];
            }
        }
        weights
    }

    fn has_room_for(&self, weights: &[u64], least: u64) -> bool {
        let mut is_used = vec![false; self.frames.len()];
        let (mut nodes, mut frames) = (0, 0);
        for (node, _) in self
            .nodes
            .iter()
            .zip(weights)
            .filter(|(_, weight)| **weight >= least)
        {
            nodes += 1;
            frames += usize::from(!std::mem::replace(&mut is_used[node.frame as usize], true));
        }
        nodes <= self.max_nodes / 2 && frames <= MAX_FRAMES / 2
    }

    /// Keeps the nodes with at least `least` samples. Returns for each node what it has become: the same
    /// node, or the nearest ancestor that was kept.
    fn keep_stacks(&mut self, weights: &[u64], least: u64) -> Vec<KeptStack> {
        let mut frames = IndexSet::with_hasher(RandomState::default());
        let mut nodes: IndexSet<Node, RandomState> = IndexSet::default();
        let mut kept: Vec<KeptStack> = Vec::with_capacity(self.nodes.len());
        for (node, weight) in self.nodes.iter().zip(weights) {
            let parent = kept_stack(&kept, node.parent);
            kept.push(match *weight >= least {
                // Its parent has at least as many samples, so it was kept too.
                true => {
                    let frame = frames.insert_full(self.frames[node.frame as usize]).0 as u32;
                    let node = Node {
                        parent: parent.stack,
                        frame,
                    };
                    KeptStack {
                        stack: StackId(nodes.insert_full(node).0 as u32),
                        is_cut: false,
                    }
                }
                false => KeptStack {
                    stack: parent.stack,
                    is_cut: true,
                },
            });
        }
        (self.frames, self.nodes) = (frames, nodes);
        kept
    }

    /// The rows and attributions with the stacks that were kept. Rows with fewer samples than `least` lose
    /// their thread and their trace.
    fn keep_rows(
        &self,
        stacks: &[KeptStack],
        least: u64,
    ) -> (IndexMap<RowKey, Tally>, IndexSet<Attribution>) {
        let mut rows: IndexMap<RowKey, Tally> = IndexMap::new();
        let mut attributions = IndexSet::new();
        let mut kept: HashMap<(u32, bool), u32> = HashMap::new();
        for (row, tally) in &self.rows {
            let mut row = *row;
            let is_rare = tally.samples < least;
            let stack = kept_stack(stacks, row.stack);
            row.stack = stack.stack;
            row.is_cut |= stack.is_cut;
            row.attribution = row.attribution.and_then(|index| {
                if let Some(known) = kept.get(&(index, is_rare)) {
                    return Some(*known);
                }
                let attribution = self.attributions.get_index(index as usize)?;
                let mut attribution = keep_attribution(attribution, stacks);
                if is_rare {
                    attribution.trace = Default::default();
                }
                let new = attributions.insert_full(attribution).0 as u32;
                kept.insert((index, is_rare), new);
                Some(new)
            });
            if is_rare {
                (row.tid, row.thread_name) = (0, [0; 16]);
            }
            let known = rows.entry(row).or_default();
            known.samples += tally.samples;
            known.executions += tally.executions;
        }
        (rows, attributions)
    }
}

/// What a stack has become by pruning.
#[derive(Clone, Copy, Debug)]
struct KeptStack {
    stack: StackId,
    /// Whether its leaf end is missing.
    is_cut: bool,
}

fn kept_stack(kept: &[KeptStack], stack: StackId) -> KeptStack {
    let empty = KeptStack {
        stack: StackId::EMPTY,
        is_cut: false,
    };
    kept.get(stack.0 as usize).copied().unwrap_or(empty)
}

fn caller_stack(attribution: &Attribution) -> Option<StackId> {
    match attribution.backend.as_ref()?.caller {
        Caller::Known { stack, .. } | Caller::Partial { stack, .. } => Some(stack),
        Caller::None | Caller::Process { .. } | Caller::Unknown(_) => None,
    }
}

/// Converts an attribution to the stacks that were kept. A caller's stack is kept whole or not at all,
/// because its leaf end shows which code sent the statement.
fn keep_attribution(attribution: &Attribution, stacks: &[KeptStack]) -> Attribution {
    let Some(backend) = &attribution.backend else {
        return attribution.clone();
    };
    let mut caller = backend.caller.clone();
    if let Caller::Known { process, stack } | Caller::Partial { process, stack, .. } = &mut caller {
        let kept = kept_stack(stacks, *stack);
        *stack = kept.stack;
        if kept.is_cut {
            caller = Caller::Process {
                process: *process,
                reason: Unknown::Lost,
            };
        }
    }
    Attribution {
        trace: attribution.trace,
        backend: Some(Arc::new(Backend {
            caller,
            ..Backend::clone(backend)
        })),
    }
}

#[cfg(test)]
mod tests {
    use agent_ebpf::sample::{Outcome, TraceContext};

    use super::*;
    use crate::profile::{Frame, ModuleId, Phase, ProcessIndex, RawSample, WaitEvent};

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

    fn addresses(window: &Window, stack: StackId) -> Vec<u64> {
        let frames: Vec<Frame> = window.frames().copied().collect();
        window.stack(stack).map(|f| frames[f].address).collect()
    }

    /// However many stacks are added, the frequent ones stay whole, every sample is counted, and there is
    /// room for new ones.
    #[test]
    fn rare_stacks_are_cut() {
        let mut window = Window::with_max_nodes(10_000);
        let heavy = [frame(3), frame(2), frame(1)];
        for number in 0..100_000 {
            if window.is_nearly_full() {
                window.prune();
                assert!(window.nodes.len() <= 5_000);
            }
            window.add(&sample(&[frame(1_000_000 + number), frame(2), frame(1)], 1));
            window.add(&sample(&heavy, 1));
        }
        assert!(!window.is_exhausted);
        assert_eq!(window.counters().stack_table_full, 0);
        let total: u64 = window.rows().map(|(_, tally)| tally.samples).sum();
        assert_eq!(total, 200_000);
        let of = |wanted: &[u64], cut: bool| {
            let rows = window.rows();
            let found = rows.filter(|(row, _)| row.is_cut == cut);
            let found = found.filter(|(row, _)| addresses(&window, row.stack) == wanted);
            found.map(|(_, tally)| tally.samples).sum::<u64>()
        };
        assert_eq!(of(&[3, 2, 1], false), 100_000);
        assert!(of(&[2, 1], true) > 90_000);
        assert_eq!(of(&[2, 1], true), window.counters().cut_short);
        assert_eq!(window.frames().len(), window.rows().len() + 1);
    }

    /// If rows are scarce, the rare ones lose their thread, and the others keep it.
    #[test]
    fn rare_rows_lose_their_thread() {
        let mut window = Window::new();
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
        assert_eq!(window.counters().stack_table_full, 0);
    }

    /// A caller's stack with many samples is still whole after pruning; that of a rare sample is reported
    /// as lost.
    #[test]
    fn callers_are_whole_or_lost() {
        let mut window = Window::with_max_nodes(10_000);
        let attribution = |stack| Attribution {
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
                caller: Caller::Known {
                    process: ProcessIndex(7),
                    stack,
                },
            })),
        };
        for (leaf, samples) in [(100, 1), (200, 50)] {
            let stack = window.intern(&[frame(leaf), frame(leaf + 1)], &[]);
            let stack = stack.expect("room");
            for _ in 0..samples {
                window.add(&RawSample {
                    attribution: Some(attribution(stack)),
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
}
