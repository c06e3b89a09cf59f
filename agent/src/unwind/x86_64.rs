//! Turns an evaluated row of call frame information into a rule. What this module contains is specific to
//! x86_64: registers, the entries of procedure linkage tables, signal frames.

use super::fdes::{Cie, Reader};
use agent_ebpf::unwind::{CfaKind, Rule, SAVED, SIGCONTEXT_REGISTERS, Slot, Unsupported, reg};
use gimli::{CfaRule, EhFrame, Register, RegisterRule, UnwindContextStorage, UnwindTableRow};

/// Number of registers whose rules matter: the sixteen general ones and the return address.
const REGISTERS: usize = 17;

type Registers<'row> = [Option<&'row RegisterRule<usize>>; REGISTERS];

/// Turns a row into a rule; an unsupported one if the row cannot be expressed.
pub(super) fn rule<S: UnwindContextStorage<usize>>(
    row: &UnwindTableRow<usize, S>,
    cie: &Cie<'_>,
    section: &EhFrame<Reader<'_>>,
) -> Rule {
    let mut registers: Registers<'_> = [None; REGISTERS];
    for (Register(number), rule) in row.registers() {
        if let Some(slot) = registers.get_mut(usize::from(*number)) {
            *slot = Some(rule);
        }
    }
    if cie.return_address_register() != Register(u16::from(reg::RIP)) {
        return Rule::unsupported(Unsupported::ReturnAddress);
    }
    let compiler = Compiler { registers, section };
    compiler.rule(row.cfa()).unwrap_or_else(Rule::unsupported)
}

/// Where a register was saved.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// At CFA + this many bytes.
    Cfa(i64),
    /// At the callee's value of a register + this many bytes.
    Register(u8, i64),
}

struct Compiler<'row, 'data> {
    registers: Registers<'row>,
    section: &'row EhFrame<Reader<'data>>,
}

impl Compiler<'_, '_> {
    fn rule(&self, cfa: &CfaRule<usize>) -> Result<Rule, Unsupported> {
        if matches!(self.of(reg::RIP), Some(RegisterRule::Undefined)) {
            return Ok(Rule::END);
        }
        let cfa = self.cfa(cfa)?;
        match self.of(reg::RSP) {
            None | Some(RegisterRule::ValOffset(0)) => {}
            Some(RegisterRule::Register(Register(number))) => return self.moved_stack(*number),
            Some(_) => return self.signal(&cfa),
        }
        let mut rule = Rule {
            ra: self.return_address(&cfa)?,
            ..cfa
        };
        for (slot, register) in rule.saved.iter_mut().zip(SAVED) {
            *slot = match self.slot(register, &cfa) {
                Ok(slot) => slot,
                Err(reason) if register == reg::RBP => return Err(reason),
                // A lost register matters only if the CFA of a caller is computed from it.
                Err(_) => Slot::UNDEFINED,
            };
        }
        Ok(rule)
    }

    fn of(&self, register: u8) -> Option<&RegisterRule<usize>> {
        self.registers.get(usize::from(register)).copied().flatten()
    }

    /// A rule that contains only the CFA.
    fn cfa(&self, cfa: &CfaRule<usize>) -> Result<Rule, Unsupported> {
        match cfa {
            CfaRule::RegisterAndOffset { register, offset } => cfa_register(*register, *offset),
            CfaRule::Expression(expression) => {
                let bytes = expression.get(self.section);
                let bytes = bytes.map_err(|_| Unsupported::Malformed)?.0.slice();
                cfa_expression(bytes)
            }
        }
    }

    fn return_address(&self, cfa: &Rule) -> Result<Slot, Unsupported> {
        match self.slot(reg::RIP, cfa) {
            // The current address itself cannot be the return address.
            Ok(Slot::SAME) => Err(Unsupported::ReturnAddress),
            Ok(slot) => Ok(slot),
            Err(_) => Err(Unsupported::ReturnAddress),
        }
    }

    fn slot(&self, register: u8, cfa: &Rule) -> Result<Slot, Unsupported> {
        match self.of(register) {
            // A register without a rule is preserved: this function is called for the psABI's callee-saved
            // registers, and the caller rejects this result for the return address.
            None | Some(RegisterRule::SameValue) => Ok(Slot::SAME),
            Some(RegisterRule::Undefined) => Ok(Slot::UNDEFINED),
            Some(RegisterRule::Register(Register(number))) if *number == u16::from(register) => {
                Ok(Slot::SAME)
            }
            Some(RegisterRule::Register(Register(number))) => match u8::try_from(*number) {
                Ok(number) if number < reg::RIP => Ok(Slot::in_register(number)),
                _ => Err(Unsupported::RegisterExpression),
            },
            Some(rule) => {
                let place = self.place(rule).ok_or(Unsupported::RegisterExpression)?;
                encode(place, cfa).ok_or(Unsupported::OffsetRange)
            }
        }
    }

    /// Where a rule says that its register was saved; `None` if it does not say so, or not in a known form.
    fn place(&self, rule: &RegisterRule<usize>) -> Option<Place> {
        match rule {
            RegisterRule::Offset(offset) => Some(Place::Cfa(*offset)),
            RegisterRule::Expression(expression) => {
                let mut ops = Ops(expression.get(self.section).ok()?.0.slice());
                let (register, offset) = ops.register_offset()?;
                ops.0
                    .is_empty()
                    .then_some(Place::Register(register, offset))
            }
            _ => None,
        }
    }

    /// The rule if the caller's stack pointer is in another register, as in longjmp after it has loaded its
    /// target. That register is then used as the CFA, and registers that were saved relative to the row's
    /// own CFA count as lost.
    fn moved_stack(&self, register: u16) -> Result<Rule, Unsupported> {
        let kept = |register| match self.of(register) {
            Some(RegisterRule::Register(Register(number))) if *number < u16::from(reg::RIP) => {
                Some(Slot::in_register(*number as u8))
            }
            None | Some(RegisterRule::SameValue) => Some(Slot::SAME),
            _ => None,
        };
        let mut rule = cfa_register(Register(register), 0)?;
        rule.ra = match kept(reg::RIP) {
            Some(slot) if slot != Slot::SAME => slot,
            _ => return Err(Unsupported::ReturnAddress),
        };
        rule.saved = SAVED.map(|register| kept(register).unwrap_or(Slot::UNDEFINED));
        Ok(rule)
    }

    /// The rule if all registers, including the stack pointer, were saved in one structure: that is a
    /// signal frame (glibc's `__restore_rt`), or a context that is about to be installed (`setcontext`).
    /// Both have the order of `struct sigcontext`.
    fn signal(&self, cfa: &Rule) -> Result<Rule, Unsupported> {
        let place = |register| {
            let place = self.place(self.of(register)?)?;
            match place {
                Place::Register(register, offset) => Some((register, offset)),
                Place::Cfa(offset) if cfa.kind == CfaKind::Register as u8 => {
                    Some((cfa.reg, offset.checked_add(i64::from(cfa.offset))?))
                }
                Place::Cfa(_) => None,
            }
        };
        let word = |register| SIGCONTEXT_REGISTERS.iter().position(|r| *r == register);
        let base_by = |register| {
            let (base, offset) = place(register)?;
            Some((base, offset.checked_sub(word(register)? as i64 * 8)?))
        };
        let base = base_by(reg::RIP).ok_or(Unsupported::RegisterExpression)?;
        let agrees = |register: &u8| base_by(*register) == Some(base);
        if !agrees(&reg::RSP) || !SAVED.iter().all(agrees) {
            return Err(Unsupported::RegisterExpression);
        }
        let offset = i32::try_from(base.1).map_err(|_| Unsupported::OffsetRange)?;
        Ok(Rule {
            offset,
            kind: CfaKind::Signal as u8,
            reg: base.0,
            ..Rule::INVALID
        })
    }
}

/// The slot for a place, relative to the CFA if possible, else to rbp. `None` if it can be expressed in
/// neither way.
fn encode(place: Place, cfa: &Rule) -> Option<Slot> {
    let below = match place {
        Place::Cfa(offset) => offset.checked_neg()?,
        Place::Register(register, offset)
            if cfa.kind == CfaKind::Register as u8 && cfa.reg == register =>
        {
            i64::from(cfa.offset).checked_sub(offset)?
        }
        Place::Register(reg::RBP, offset) => {
            let words = offset / 8;
            return (offset % 8 == 0 && (-32..=31).contains(&words))
                .then(|| Slot::at_fp(words as i8));
        }
        Place::Register(..) => return None,
    };
    let words = below / 8;
    if below % 8 == 0 && (1..=127).contains(&words) {
        return Some(Slot::below_cfa(words as u8));
    }
    // Too far from the CFA to be encoded, but perhaps not too far from rbp.
    if let Place::Register(reg::RBP, offset) = place
        && offset % 8 == 0
        && (-32..=31).contains(&(offset / 8))
    {
        return Some(Slot::at_fp((offset / 8) as i8));
    }
    None
}

fn cfa_register(Register(register): Register, offset: i64) -> Result<Rule, Unsupported> {
    if register >= u16::from(reg::RIP) {
        return Err(Unsupported::CfaExpression);
    }
    Ok(Rule {
        offset: i32::try_from(offset).map_err(|_| Unsupported::OffsetRange)?,
        kind: CfaKind::Register as u8,
        reg: register as u8,
        ..Rule::INVALID
    })
}

/// The expression that GNU ld writes for `.plt` (bfd/elfxx-x86.c), split around N: `DW_OP_breg7 8;
/// DW_OP_breg16 0; DW_OP_lit15; DW_OP_and; DW_OP_lit<N>; DW_OP_ge; DW_OP_lit3; DW_OP_shl; DW_OP_plus`.
const PLT_BEFORE: [u8; 6] = [0x77, 8, 0x80, 0, 0x3f, 0x1a];
const PLT_AFTER: [u8; 4] = [0x2a, 0x33, 0x24, 0x22];
const DW_OP_LIT0: u8 = 0x30;
const DW_OP_LIT31: u8 = 0x4f;
const DW_OP_BREG0: u8 = 0x70;
const DW_OP_DEREF: u8 = 0x06;
const DW_OP_LIT8: u8 = DW_OP_LIT0 + 8;
const DW_OP_MUL: u8 = 0x1e;
const DW_OP_PLUS: u8 = 0x22;
const DW_OP_PLUS_UCONST: u8 = 0x23;

fn cfa_expression(bytes: &[u8]) -> Result<Rule, Unsupported> {
    if let Some([lit, after @ ..]) = bytes.strip_prefix(&PLT_BEFORE)
        && after == PLT_AFTER
        && (DW_OP_LIT0..=DW_OP_LIT31).contains(lit)
    {
        return Ok(Rule {
            offset: 8,
            aux: i16::from(lit - DW_OP_LIT0),
            kind: CfaKind::Plt as u8,
            reg: reg::RSP,
            ..Rule::INVALID
        });
    }
    let mut ops = Ops(bytes);
    let unknown = Unsupported::CfaExpression;
    let (register, offset) = ops.register_offset().ok_or(unknown)?;
    let base = cfa_register(Register(u16::from(register)), offset)?;
    if ops.0.is_empty() {
        return Ok(base);
    }
    let index = ops.index();
    if ops.byte() != Some(DW_OP_DEREF) {
        return Err(unknown);
    }
    let plus = match ops.byte() {
        None => 0,
        Some(DW_OP_PLUS_UCONST) => ops.uleb().ok_or(unknown)?,
        Some(_) => return Err(unknown),
    };
    if !ops.0.is_empty() {
        return Err(unknown);
    }
    Ok(Rule {
        kind: CfaKind::Deref as u8,
        aux: i16::try_from(plus).map_err(|_| Unsupported::OffsetRange)?,
        index: index.map_or(0, |register| register + 1),
        ..base
    })
}

/// The part of an expression that was not parsed yet.
struct Ops<'data>(&'data [u8]);

impl Ops<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// Parses `DW_OP_breg<N>` of a general register, and its offset.
    fn register_offset(&mut self) -> Option<(u8, i64)> {
        let register = self.byte()?.checked_sub(DW_OP_BREG0)?;
        if register >= reg::RIP {
            return None;
        }
        let mut value = 0i64;
        for shift in (0..63).step_by(7) {
            let byte = self.byte()?;
            value |= i64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                let unused = 64 - (shift + 7).min(64);
                return Some((register, value << unused >> unused));
            }
        }
        None
    }

    /// Parses an index register, `DW_OP_breg<N> 0; DW_OP_lit8; DW_OP_mul; DW_OP_plus`, as in OpenSSL's
    /// Montgomery multiplication. Consumes nothing if the expression continues differently.
    fn index(&mut self) -> Option<u8> {
        let [register, 0, DW_OP_LIT8, DW_OP_MUL, DW_OP_PLUS, rest @ ..] = self.0 else {
            return None;
        };
        let register = register.checked_sub(DW_OP_BREG0)?;
        if register >= reg::RIP {
            return None;
        }
        self.0 = rest;
        Some(register)
    }

    fn uleb(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..63).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}
