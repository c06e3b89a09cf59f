//! Follows the paths through decoded instructions, and finds the state before each of them.

use super::decode::{Flow, Instruction, Target};
use super::state::State;

/// Most steps for each instruction on average; if the code takes more, it is given up. Compiled code needs
/// one step for an instruction, and one more for each join of paths at which knowledge is lost.
pub(super) const MAX_STEPS_PER_INSTRUCTION: usize = 16;

/// Functions begin at multiples of this many bytes. If padding after a call ends at such an address, and no
/// jump leads there, another function begins there, and the called function does not return.
const FUNCTION_ALIGNMENT: u64 = 16;

/// The state before each instruction; `None` if no path leads to it, or for all if the code took too many
/// steps.
pub(super) fn states(instructions: &[Instruction], svma: u64) -> Vec<Option<State>> {
    let mut paths = Paths::new(instructions, svma);
    let mut deferred = Vec::new();
    let mut index = 0;
    while index < instructions.len() {
        let at = &instructions[index];
        if paths.states[index].is_some() || at.padding {
            index += 1;
        } else if paths.jumps_to[index] > 0 && !paths.called[index] {
            // Code that was not followed yet jumps here. Its state is more precise than the guess that a
            // function begins, so this place is left for later.
            deferred.push(index);
            index = paths.behind(index);
        } else {
            paths.function(index);
            index += 1;
        }
    }
    for index in deferred {
        let block = index..paths.behind(index);
        for (at, instruction) in block.clone().zip(&instructions[block]) {
            if paths.states[at].is_none() && !instruction.padding {
                paths.function(at);
            }
        }
    }
    if paths.steps == 0 {
        return vec![None; instructions.len()];
    }
    paths.states
}

struct Paths<'code> {
    instructions: &'code [Instruction],
    svma: u64,
    states: Vec<Option<State>>,
    /// For each instruction, the number of the run that set its state.
    runs: Vec<u32>,
    /// Number of the current run of [`Self::follow`].
    run: u32,
    /// For each instruction, the number of jumps to it from instructions that no path has reached yet.
    jumps_to: Vec<u32>,
    /// For each instruction, whether any jump leads to it.
    is_target: Vec<bool>,
    /// For each instruction, whether a call leads to it, so that a function begins there.
    called: Vec<bool>,
    /// What this run replaced: the instruction's index, and its state and run from before.
    replaced: Vec<(u32, Option<State>, u32)>,
    /// Instructions from which paths are still to be followed.
    pending: Vec<u32>,
    /// The state at the last jump through a table in the middle of a frame; the cases of the table may
    /// follow.
    table: Option<State>,
    /// Whether what this run followed contradicts itself, so that it cannot be a function.
    contradiction: bool,
    /// Steps that may still be taken.
    steps: usize,
}

impl<'code> Paths<'code> {
    fn new(instructions: &'code [Instruction], svma: u64) -> Paths<'code> {
        let length = instructions.len();
        let mut paths = Paths {
            instructions,
            svma,
            states: vec![None; length],
            runs: vec![0; length],
            run: 0,
            jumps_to: vec![0; length],
            is_target: vec![false; length],
            called: vec![false; length],
            replaced: Vec::new(),
            pending: Vec::new(),
            table: None,
            contradiction: false,
            steps: length * MAX_STEPS_PER_INSTRUCTION,
        };
        for instruction in instructions {
            if let Some(target) = instruction.flow.jump() {
                paths.jumps_to[target as usize] += 1;
                paths.is_target[target as usize] = true;
            } else if let Flow::Call(Target::Inside(target)) = instruction.flow {
                paths.called[target as usize] = true;
            }
        }
        paths
    }

    /// Index of the end of the straight code that begins at `index`: after the first instruction from which
    /// the next one in memory is not reached.
    fn behind(&self, index: usize) -> usize {
        let rest = self.instructions[index..].iter();
        let last = rest.take_while(|i| !i.flow.ends()).count();
        (index + last + 1).min(self.instructions.len())
    }

    /// Follows all paths from what may be the first instruction of a function. After a jump through a table
    /// it may also be one of the table's cases. Then both are tried, and the result is used only if exactly
    /// one of them is possible.
    fn function(&mut self, start: usize) {
        let table = self.table.take();
        let function = self.follow(start, &State::ENTRY);
        let case = match &table {
            Some(state) if !self.called[start] => {
                let inside = self.table.take();
                self.take_back(false);
                let case = self.follow(start, state);
                if function && !case {
                    self.take_back(false);
                    self.follow(start, &State::ENTRY);
                    self.table = inside;
                }
                case
            }
            _ => false,
        };
        if function == case {
            self.take_back(true);
        }
        if !function || case {
            self.table = table;
        }
    }

    /// Undoes this run. With `lost`, instructions that only this run had reached count as reached, but
    /// nothing is known about their state.
    fn take_back(&mut self, lost: bool) {
        while let Some((index, state, run)) = self.replaced.pop() {
            let index = index as usize;
            if state.is_none() {
                self.count_jump(index, true);
            }
            self.states[index] = state;
            self.runs[index] = run;
            if lost && self.states[index].is_none() {
                self.states[index] = Some(State::LOST);
                self.count_jump(index, false);
            }
        }
    }

    fn count_jump(&mut self, from: usize, unreached: bool) {
        if let Some(target) = self.instructions[from].flow.jump() {
            let jumps = &mut self.jumps_to[target as usize];
            *jumps = if unreached { *jumps + 1 } else { *jumps - 1 };
        }
    }

    /// Follows every path from an instruction, and continues after a contradiction, since all of these
    /// instructions belong to one function. Returns whether there was no contradiction.
    fn follow(&mut self, start: usize, state: &State) -> bool {
        self.run += 1;
        self.contradiction = false;
        self.replaced.clear();
        self.pending.clear();
        self.reach(start, state);
        while let Some(index) = self.pending.pop() {
            let Some(steps) = self.steps.checked_sub(1) else {
                return false;
            };
            self.steps = steps;
            self.step(index as usize);
        }
        !self.contradiction
    }

    /// Records that a path leads to an instruction with this state.
    fn reach(&mut self, index: usize, state: &State) {
        let mut new = state.clone();
        if let Some(old) = &self.states[index] {
            if self.runs[index] != self.run {
                // An earlier run has found the state here, so this is a jump from one function to another,
                // and the earlier state is kept. If both depths are known they must be equal.
                match (old.depth(), state.depth()) {
                    (Some(old), Some(new)) if old == new => {}
                    (Some(_), Some(_)) => {
                        self.contradiction = true;
                        return;
                    }
                    _ => return,
                }
            }
            new.meet(old);
            if new == *old {
                return;
            }
        } else {
            self.count_jump(index, false);
        }
        let old = self.states[index].replace(new);
        if self.runs[index] != self.run {
            self.replaced.push((index as u32, old, self.runs[index]));
            self.runs[index] = self.run;
        }
        self.pending.push(index as u32);
    }

    fn step(&mut self, index: usize) {
        let instruction = &self.instructions[index];
        let Some(mut state) = self.states[index].clone() else {
            return;
        };
        let balanced = state.is_balanced();
        if state.execute(instruction).is_err() {
            self.contradiction = true;
            state = State::LOST;
        }
        if let Some(target) = instruction.flow.jump() {
            self.reach(target as usize, &state);
        }
        match instruction.flow {
            Flow::Return => self.contradiction |= !balanced,
            Flow::NotCode => self.contradiction = true,
            Flow::JumpTable if !balanced || state.depth().is_none() => self.table = Some(state),
            flow if flow.ends() => {}
            _ => self.fall_through(index, &state),
        }
    }

    fn fall_through(&mut self, index: usize, state: &State) {
        let calls = matches!(self.instructions[index].flow, Flow::Call(_));
        let next = index + 1;
        if next == self.instructions.len() {
            self.contradiction |= !calls && !state.is_balanced();
            return;
        }
        let begins = self.called[next] || calls && self.padded_function(next);
        if !begins || state.is_balanced() {
            self.reach(next, state);
        }
    }

    /// Whether padding begins at this instruction and ends where a function may begin, without a jump to
    /// that place.
    fn padded_function(&self, index: usize) -> bool {
        let rest = self.instructions[index..].iter();
        let padding = rest.take_while(|i| i.padding).count();
        let end = index + padding;
        padding > 0
            && self.instructions.get(end).is_some_and(|end| {
                (self.svma + u64::from(end.start)).is_multiple_of(FUNCTION_ALIGNMENT)
            })
            && !self.is_target[end]
    }
}
