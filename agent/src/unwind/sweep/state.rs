//! What is known of a frame before an instruction, and what the instruction makes of it.

use super::decode::{Effect, Instruction};
use agent_ebpf::unwind::{CfaKind, Rule, SAVED, Slot, reg};

/// Bytes from the CFA down to where something is; [`UNKNOWN`] otherwise.
type Distance = i32;

const UNKNOWN: Distance = Distance::MIN;

/// Frames larger than this are taken for a mistake.
const MAX_DISTANCE: i64 = 1 << 24;

/// The caller's value is in the register itself.
const IN_PLACE: Distance = 0;

/// Bytes between the CFA and the stack pointer when a function begins: the return address.
const RETURN_ADDRESS: Distance = 8;

/// Registers that are tried for the CFA, in this order.
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

/// A frame before an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    /// CFA − register, by DWARF number.
    registers: [Distance; 16],
    /// Where each of [`SAVED`] was saved, or [`IN_PLACE`].
    saved: [Distance; SAVED.len()],
    /// Which of [`SAVED`] still hold the caller's value, a bit each, wherever else it was saved.
    intact: u8,
}

/// The code takes something off the stack that is not its own, or finds its frame by a register
/// that it has not set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Underflow;

impl State {
    /// At the first instruction of a function.
    pub(super) const ENTRY: State = {
        let mut registers = [UNKNOWN; 16];
        registers[reg::RSP as usize] = RETURN_ADDRESS;
        State {
            registers,
            saved: [IN_PLACE; SAVED.len()],
            intact: 0x3f,
        }
    };

    /// Nothing is known.
    pub(super) const LOST: State = State {
        registers: [UNKNOWN; 16],
        saved: [UNKNOWN; SAVED.len()],
        intact: 0,
    };

    /// CFA − rsp, when it is known.
    pub(super) fn depth(&self) -> Option<i32> {
        let depth = self.registers[usize::from(reg::RSP)];
        (depth != UNKNOWN).then_some(depth)
    }

    /// Whether the stack pointer, if it is known, is where a function finds it and must leave it.
    pub(super) fn is_balanced(&self) -> bool {
        self.depth().is_none_or(|depth| depth == RETURN_ADDRESS)
    }

    /// Leaves only what both know.
    pub(super) fn meet(&mut self, other: &State) {
        let pairs = self.registers.iter_mut().zip(&other.registers);
        for (mine, theirs) in pairs.chain(self.saved.iter_mut().zip(&other.saved)) {
            if mine != theirs {
                *mine = UNKNOWN;
            }
        }
        self.intact &= other.intact;
    }

    /// The rule, when the CFA can be found. During a call only the registers that a function
    /// preserves are there.
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

    /// Executes the instruction, up to the next one in memory.
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

    /// What was saved below the stack pointer, and not loaded back, may be gone at any time; most
    /// often nothing had changed the register.
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

    /// A register gets a value of its own.
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
        // The return address, or something above it.
        if at != UNKNOWN && at <= RETURN_ADDRESS {
            return Err(Underflow);
        }
        self.shift(8);
        self.load(to, at);
        Ok(())
    }

    /// A register that belongs to the caller cannot tell where this frame is.
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

    /// Eight bytes of the stack get another value.
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

/// The distance of what lies `bytes` above.
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
