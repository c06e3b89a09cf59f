//! What is known about a frame before an instruction, and how the instruction changes it.

use super::decode::{Effect, Instruction};
use agent_ebpf::unwind::{CfaKind, Rule, SAVED, Slot, reg};

/// The distance in bytes from a place, or from the value of a register, up to the CFA; [`UNKNOWN`] if it is
/// not known.
type Distance = i32;

const UNKNOWN: Distance = Distance::MIN;

/// A frame that seems larger than this many bytes is taken for an error of the analysis.
const MAX_DISTANCE: i64 = 1 << 24;

/// Means that the register itself still has the caller's value.
const IN_PLACE: Distance = 0;

/// Bytes between the CFA and the stack pointer when a function begins: the return address.
const RETURN_ADDRESS: Distance = 8;

/// Registers by which the CFA may be expressed, in the order in which they are tried.
const BASES: [u8; 16] = [
    reg::RSP,
    reg::RBP,
    reg::RBX,
    reg::R12,
    reg::R13,
    reg::R14,
    reg::R15,
    reg::R10,
    reg::R11,
    reg::RAX,
    reg::RDX,
    reg::RCX,
    reg::RSI,
    reg::RDI,
    reg::R8,
    reg::R9,
];

/// What is known about a frame before an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    /// CFA − register, indexed by DWARF number.
    registers: [Distance; 16],
    /// Where each register of [`SAVED`] was saved, or [`IN_PLACE`].
    saved: [Distance; SAVED.len()],
    /// Bit set of the registers of [`SAVED`] that still have the caller's value, whether or not they were
    /// also saved.
    intact: u8,
}

/// A contradiction: the code pops something that its function did not push, or sets rsp from a register
/// that still belongs to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Underflow;

impl State {
    /// The state before the first instruction of a function.
    pub(super) const ENTRY: State = {
        let mut registers = [UNKNOWN; 16];
        registers[reg::RSP as usize] = RETURN_ADDRESS;
        State {
            registers,
            saved: [IN_PLACE; SAVED.len()],
            intact: 0x3f,
        }
    };

    /// The state in which nothing is known.
    pub(super) const LOST: State = State {
        registers: [UNKNOWN; 16],
        saved: [UNKNOWN; SAVED.len()],
        intact: 0,
    };

    /// CFA − rsp, if it is known.
    pub(super) fn depth(&self) -> Option<i32> {
        let depth = self.registers[usize::from(reg::RSP)];
        (depth != UNKNOWN).then_some(depth)
    }

    /// Whether the stack pointer is unknown, or has the value that it had at the function's start and must
    /// have at its return.
    pub(super) fn is_balanced(&self) -> bool {
        self.depth().is_none_or(|depth| depth == RETURN_ADDRESS)
    }

    /// Keeps only what this state and the other agree on.
    pub(super) fn meet(&mut self, other: &State) {
        let pairs = self.registers.iter_mut().zip(&other.registers);
        for (mine, theirs) in pairs.chain(self.saved.iter_mut().zip(&other.saved)) {
            if mine != theirs {
                *mine = UNKNOWN;
            }
        }
        self.intact &= other.intact;
    }

    /// The rule, if the CFA can be computed. During a call it can only be computed from rsp and the
    /// registers that the called function preserves.
    pub(super) fn rule(&self, during_call: bool) -> Option<Rule> {
        let known = |base: &&u8| {
            let kept = !during_call || **base == reg::RSP || SAVED.contains(base);
            kept && self.registers[usize::from(**base)] != UNKNOWN
        };
        let base = *BASES.iter().find(known)?;
        Some(Rule {
            offset: self.registers[usize::from(base)],
            kind: CfaKind::Register as u8,
            reg: base,
            ra: Slot::below_cfa(1),
            saved: self.saved.map(slot),
            ..Rule::INVALID
        })
    }

    /// Applies the effects of the instruction, so that the state is that before its successor.
    pub(super) fn execute(&mut self, instruction: &Instruction) -> Result<(), Underflow> {
        match instruction.effect {
            Effect::None => {}
            Effect::Push(from) => self.push(from),
            Effect::Pop(to) => self.pop(to)?,
            Effect::Stack(bytes) => self.shift(i64::from(bytes)),
            Effect::Copy { to, from, offset } => {
                if to == reg::RSP {
                    self.must_be_set(from)?;
                }
                let value = moved(self.registers[usize::from(from)], offset);
                self.write(to);
                self.registers[usize::from(to)] = value;
            }
            Effect::Store { base, offset, from } => {
                self.store(moved(self.registers[usize::from(base)], offset), from);
            }
            Effect::Load { to, base, offset } => {
                let from = moved(self.registers[usize::from(base)], offset);
                self.load(to, from);
            }
            Effect::Leave => self.leave()?,
            Effect::Enter(bytes) => {
                self.push(Some(reg::RBP));
                let stack = self.registers[usize::from(reg::RSP)];
                self.write(reg::RBP);
                self.registers[usize::from(reg::RBP)] = stack;
                self.shift(-i64::from(bytes));
            }
        }
        for register in 0..16 {
            if instruction.written & 1 << register != 0 {
                self.write(register);
            }
        }
        let above = |depth| depth < RETURN_ADDRESS;
        if self.depth().is_some_and(above) {
            return Err(Underflow);
        }
        self.drop_freed();
        Ok(())
    }

    /// Memory below the stack pointer may be overwritten at any time. So for a register that was saved
    /// there, but still has the caller's value, the register itself is used.
    fn drop_freed(&mut self) {
        let Some(depth) = self.depth() else {
            return;
        };
        for (index, place) in self.saved.iter_mut().enumerate() {
            if *place > depth && self.intact & 1 << index != 0 {
                *place = IN_PLACE;
            }
        }
    }

    /// A register gets a value that has no known relation to the frame.
    fn write(&mut self, register: u8) {
        self.registers[usize::from(register)] = UNKNOWN;
        if let Some(index) = saved_index(register) {
            self.intact &= !(1 << index);
            if self.saved[index] == IN_PLACE {
                self.saved[index] = UNKNOWN;
            }
        }
    }

    fn shift(&mut self, bytes: i64) {
        let stack = &mut self.registers[usize::from(reg::RSP)];
        *stack = moved(*stack, bytes);
    }

    fn push(&mut self, from: Option<u8>) {
        self.shift(-8);
        let at = self.registers[usize::from(reg::RSP)];
        match from {
            Some(from) => self.store(at, from),
            None => self.overwrite(at),
        }
    }

    fn pop(&mut self, to: u8) -> Result<(), Underflow> {
        let at = self.registers[usize::from(reg::RSP)];
        // This would pop the return address, or something above it.
        if at != UNKNOWN && at <= RETURN_ADDRESS {
            return Err(Underflow);
        }
        self.shift(8);
        self.load(to, at);
        Ok(())
    }

    /// Returns an error if rsp is to be set from a register that the function has not set: such a register
    /// belongs to the caller, and cannot point into this frame.
    fn must_be_set(&self, register: u8) -> Result<(), Underflow> {
        let untouched = saved_index(register).is_some_and(|index| self.saved[index] == IN_PLACE);
        if untouched && self.registers[usize::from(register)] == UNKNOWN {
            return Err(Underflow);
        }
        Ok(())
    }

    fn leave(&mut self) -> Result<(), Underflow> {
        self.must_be_set(reg::RBP)?;
        self.registers[usize::from(reg::RSP)] = self.registers[usize::from(reg::RBP)];
        self.pop(reg::RBP)
    }

    /// Eight bytes of the stack are overwritten; registers that were saved there are lost.
    fn overwrite(&mut self, at: Distance) {
        if at == UNKNOWN {
            return;
        }
        for place in &mut self.saved {
            if *place != UNKNOWN && *place != IN_PLACE && (*place - at).abs() < 8 {
                *place = UNKNOWN;
            }
        }
    }

    fn store(&mut self, at: Distance, from: u8) {
        self.overwrite(at);
        if let Some(index) = saved_index(from)
            && self.saved[index] == IN_PLACE
            && at > RETURN_ADDRESS
        {
            self.saved[index] = at;
        }
    }

    fn load(&mut self, to: u8, from: Distance) {
        let restored = saved_index(to).filter(|index| {
            let place = self.saved[*index];
            place == from && place != UNKNOWN && place != IN_PLACE
        });
        self.write(to);
        if let Some(index) = restored {
            self.saved[index] = IN_PLACE;
            self.intact |= 1 << index;
        }
    }
}

/// The distance of the place that lies `bytes` above the given one.
fn moved(from: Distance, bytes: i64) -> Distance {
    if from == UNKNOWN {
        return UNKNOWN;
    }
    match i64::from(from).checked_sub(bytes) {
        Some(distance) if distance.abs() <= MAX_DISTANCE => distance as Distance,
        _ => UNKNOWN,
    }
}

fn saved_index(register: u8) -> Option<usize> {
    SAVED.iter().position(|saved| *saved == register)
}

fn slot(place: Distance) -> Slot {
    let words = place / 8;
    match place {
        IN_PLACE => Slot::SAME,
        _ if place % 8 == 0 && (2..=127).contains(&words) => Slot::below_cfa(words as u8),
        _ => Slot::UNDEFINED,
    }
}
