//! The caller of a frame by gimli's rows, evaluated in the simplest way: each register of the row by its
//! rule, and expressions by gimli's own evaluator.

use agent_ebpf::unwind::{Cursor, Registers, reg};
use gimli::{
    BaseAddresses, CfaRule, EhFrame, EndianSlice, Evaluation, EvaluationResult, Expression,
    LittleEndian, Location, Register, RegisterRule, UnwindContext, UnwindExpression, UnwindSection,
    UnwindTableRow, Value,
};

use crate::inputs::word;

pub type Slice<'data> = EndianSlice<'data, LittleEndian>;

/// The caller's registers by the row; `None` if the value is lost.
pub struct Caller {
    pub cfa: u64,
    pub gp: [Option<u64>; 16],
    pub ip: Option<u64>,
}

/// Calls `row` for every row of `.eh_frame` with its start, its end, the registers of a frame at the start,
/// and that frame's caller.
pub fn for_each_row(
    eh_frame: &EhFrame<Slice<'_>>,
    bases: &BaseAddresses,
    mut registers_at: impl FnMut(u64) -> Registers,
    mut row: impl FnMut(u64, u64, &Registers, Caller),
) {
    let mut context = UnwindContext::new();
    let mut entries = eh_frame.entries(bases);
    while let Some(entry) = entries.next().expect("a sound section") {
        let gimli::CieOrFde::Fde(partial) = entry else {
            continue;
        };
        let fde = partial.parse(EhFrame::cie_from_offset).expect("an FDE");
        let cie = fde.cie();
        let mut rows = fde.rows(eh_frame, bases, &mut context).expect("rows");
        while let Some(next) = rows.next_row().expect("a sound program") {
            let (start, end) = (next.start_address(), next.end_address());
            if start >= end || end > fde.end_address() {
                continue;
            }
            let registers = registers_at(start);
            let caller = caller(eh_frame, next, cie.encoding(), &registers);
            row(start, end, &registers, caller);
        }
    }
}

fn caller(
    section: &EhFrame<Slice<'_>>,
    row: &UnwindTableRow<usize>,
    encoding: gimli::Encoding,
    registers: &Registers,
) -> Caller {
    let run = |expression: &UnwindExpression<usize>, initial| {
        let expression = expression.get(section).expect("an expression");
        evaluate(expression, encoding, registers, initial)
    };
    let cfa = match row.cfa() {
        CfaRule::RegisterAndOffset { register, offset } => {
            value(registers, *register).wrapping_add_signed(*offset)
        }
        CfaRule::Expression(expression) => run(expression, None),
    };
    let of = |number: u8| {
        let register = Register(u16::from(number));
        match row.register(register) {
            None if number == reg::RSP => Some(cfa),
            None | Some(RegisterRule::SameValue) => Some(value(registers, register)),
            Some(RegisterRule::Undefined) => None,
            Some(RegisterRule::Offset(n)) => Some(word(cfa.wrapping_add_signed(n))),
            Some(RegisterRule::ValOffset(n)) => Some(cfa.wrapping_add_signed(n)),
            Some(RegisterRule::Register(other)) => Some(value(registers, other)),
            Some(RegisterRule::Expression(e)) => Some(word(run(&e, Some(cfa)))),
            Some(RegisterRule::ValExpression(e)) => Some(run(&e, Some(cfa))),
            Some(rule) => panic!("a rule that x86_64 does not have: {rule:?}"),
        }
    };
    Caller {
        cfa,
        gp: std::array::from_fn(|number| of(number as u8)),
        ip: of(reg::RIP),
    }
}

fn value(registers: &Registers, register: Register) -> u64 {
    match register.0 {
        16 => registers.ip,
        number => registers.gp[usize::from(number)],
    }
}

fn evaluate(
    expression: Expression<Slice<'_>>,
    encoding: gimli::Encoding,
    registers: &Registers,
    initial: Option<u64>,
) -> u64 {
    let mut evaluation: Evaluation<Slice<'_>> = expression.evaluation(encoding);
    if let Some(initial) = initial {
        evaluation.set_initial_value(initial);
    }
    let mut state = evaluation.evaluate().expect("an expression");
    loop {
        state = match state {
            EvaluationResult::Complete => break,
            EvaluationResult::RequiresRegister { register, .. } => {
                let value = Value::Generic(value(registers, register));
                evaluation.resume_with_register(value)
            }
            EvaluationResult::RequiresMemory { address, .. } => {
                evaluation.resume_with_memory(Value::Generic(word(address)))
            }
            other => panic!("an expression asks for {other:?}"),
        }
        .expect("an expression");
    }
    match evaluation.result()[0].location {
        Location::Address { address } => address,
        ref other => panic!("an expression gives {other:?}"),
    }
}

/// Checks the cursor after a step against the reference. `lost` are the registers that the rule does not
/// restore ([`agent_ebpf::unwind::Slot::UNDEFINED`]).
pub fn check(cursor: &Cursor, caller: &Caller, lost: &[u8], context: &str) {
    assert_eq!(Some(cursor.regs.ip), caller.ip, "ip {context}");
    assert_eq!(Some(cursor.regs.sp()), caller.gp[7], "sp {context}");
    for register in agent_ebpf::unwind::SAVED {
        if !lost.contains(&register) {
            let got = Some(cursor.regs.gp[usize::from(register)]);
            let expected = caller.gp[usize::from(register)];
            assert_eq!(got, expected, "register {register} {context}");
        }
    }
}
