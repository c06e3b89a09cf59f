//! Decodes bytes to instructions, and reduces these to their effects on the stack pointer, on saved
//! registers, and on the flow of control.

use agent_ebpf::unwind::reg;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, InstructionInfoFactory, InstructionInfoOptions,
    Mnemonic, OpAccess, OpKind, Register,
};

/// The effect of an instruction on the tracked registers, which are given by DWARF number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// No effect except that of [`Instruction::written`].
    None,
    /// Pushes eight bytes: a register, or something else (`None`).
    Push(Option<u8>),
    /// Pops eight bytes into a register.
    Pop(u8),
    /// rsp += bytes, by pushes and pops of anything else.
    Stack(i32),
    /// `to` = `from` + `offset`.
    Copy { to: u8, from: u8, offset: i64 },
    /// \*(`base` + `offset`) = `from`.
    Store { base: u8, offset: i64, from: u8 },
    /// `to` = \*(`base` + `offset`).
    Load { to: u8, base: u8, offset: i64 },
    /// `leave`.
    Leave,
    /// `enter`, with the number of bytes that it reserves.
    Enter(u16),
}

/// Where a jump leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// To the instruction with this index.
    Inside(u32),
    /// Out of the decoded bytes.
    Outside,
}

/// What is executed after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// The next instruction.
    Next,
    /// The called function, and then the next instruction.
    Call(Target),
    /// The target or the next instruction.
    Branch(Target),
    /// The target.
    Jump(Target),
    /// An address that is loaded from a fixed place in memory: another function.
    JumpThroughMemory,
    /// An address from a register or a table: another function, or a case of this one.
    JumpTable,
    /// The caller.
    Return,
    /// Nothing, since this is a trap.
    End,
    /// Nothing, since no program contains such an instruction, so these bytes are not code.
    NotCode,
}

impl Flow {
    /// Whether the next instruction in memory is not reached from this one.
    pub(super) fn ends(self) -> bool {
        !matches!(self, Flow::Next | Flow::Call(_) | Flow::Branch(_))
    }

    /// The instruction that a jump or branch leads to.
    pub(super) fn jump(self) -> Option<u32> {
        match self {
            Flow::Branch(Target::Inside(index)) | Flow::Jump(Target::Inside(index)) => Some(index),
            _ => None,
        }
    }
}

/// One instruction, or a stretch of padding, or of bytes that are not code.
#[derive(Clone, Copy, Debug)]
pub(super) struct Instruction {
    /// Offset of its first byte in the decoded bytes.
    pub(super) start: u32,
    /// Length in bytes.
    pub(super) length: u32,
    pub(super) effect: Effect,
    pub(super) flow: Flow,
    /// Bit set of the registers that get an untracked value, by DWARF number.
    pub(super) written: u16,
    /// Whether it may be padding: it does nothing or traps, and no function begins with it.
    pub(super) padding: bool,
    /// Whether it is `mov $15, %eax`. Followed by `syscall`, this is the return from a signal handler.
    sigreturn_number: bool,
    /// Whether it is the `syscall` of such a return.
    pub(super) sigreturn: bool,
}

/// Registers that a called function may change.
const CALL_CLOBBERS: u16 = 1 << reg::RAX
    | 1 << reg::RDX
    | 1 << reg::RCX
    | 1 << reg::RSI
    | 1 << reg::RDI
    | 1 << reg::R8
    | 1 << reg::R9
    | 1 << reg::R10
    | 1 << reg::R11;

/// Number of the system call `rt_sigreturn` (Linux, arch/x86/entry/syscalls/syscall_64.tbl).
const RT_SIGRETURN: u64 = 15;

/// Compilers and assemblers align the start of functions to this many bytes.
const FUNCTION_ALIGNMENT: u64 = 16;

/// Decodes `code` from its first to its last byte, at most `u32::MAX` bytes. `svma` is the address of the
/// first byte.
pub(super) fn decode(code: &[u8], svma: u64) -> Vec<Instruction> {
    let mut decoder = Decoder::with_ip(64, code, svma, DecoderOptions::NONE);
    let mut factory = InstructionInfoFactory::new();
    let mut raw = iced_x86::Instruction::default();
    let mut found: Vec<Instruction> = Vec::with_capacity(code.len() / 4);
    let mut targets = Vec::with_capacity(code.len() / 4);
    // Whether the next byte can only be reached by a jump or a call, so that it may be padding.
    let mut fresh = true;
    let mut position = 0;
    while position < code.len() {
        let filler = if fresh { filler(&code[position..]) } else { 0 };
        let traps = matches!(code[position], 0 | 0xcc);
        let flow = if traps { Flow::End } else { Flow::Next };
        let (mut next, mut target) = (bare(position, filler, flow), 0);
        next.padding = filler > 0;
        if filler == 0 {
            // The position is inside the code; the decoder starts at the same byte.
            let _ = decoder.set_position(position);
            decoder.set_ip(svma + position as u64);
            decoder.decode_out(&mut raw);
            next = instruction(&raw, position, &mut factory);
            target = raw.near_branch_target();
            let call_number = found.last().is_some_and(|before| before.sigreturn_number);
            if call_number && raw.code() == Code::Syscall {
                (next.sigreturn, next.flow) = (true, Flow::End);
            }
        }
        if next.flow == Flow::NotCode {
            // It is not known where these bytes end, so decoding continues where the next function may begin.
            let address = svma + position as u64;
            let boundary = (address / FUNCTION_ALIGNMENT + 1) * FUNCTION_ALIGNMENT - svma;
            next = bare(position, boundary as usize - position, Flow::NotCode);
        }
        next.length = next.length.min((code.len() - position) as u32);
        position += next.length as usize;
        fresh = next.flow.ends() || fresh && next.padding;
        found.push(next);
        targets.push(target);
    }
    resolve(&mut found, &targets, svma, code.len() as u64);
    found
}

/// Length of the padding instruction at the start of the bytes; 0 if there is none.
pub(super) fn filler(bytes: &[u8]) -> usize {
    if let Some(0 | 0xcc | 0x90) = bytes.first() {
        return 1;
    }
    let prefixes = bytes.iter().take_while(|b| matches!(b, 0x66 | 0x2e));
    let prefixes = prefixes.count();
    if prefixes > 12 {
        return 0;
    }
    match bytes[prefixes..] {
        [0x90, ..] => prefixes + 1,
        // nopw and nopl, which have a memory operand that is not accessed (Intel SDM, NOP).
        [0x0f, 0x1f, modrm, ref rest @ ..] if modrm & 0x38 == 0 => {
            let sib = modrm & 7 == 4;
            let no_base = if sib {
                rest.first().is_some_and(|sib| sib & 7 == 5)
            } else {
                modrm & 7 == 5
            };
            let displacement = match modrm >> 6 {
                0 if no_base => 4,
                1 => 1,
                2 => 4,
                3 => return 0,
                _ => 0,
            };
            let length = prefixes + 3 + usize::from(sib) + displacement;
            if length <= bytes.len() { length } else { 0 }
        }
        _ => 0,
    }
}

fn bare(position: usize, length: usize, flow: Flow) -> Instruction {
    Instruction {
        start: position as u32,
        length: length as u32,
        effect: Effect::None,
        flow,
        written: 0,
        padding: false,
        sigreturn_number: false,
        sigreturn: false,
    }
}

/// Replaces the addresses of targets by indices. A jump or call to a place between two instructions means
/// that its bytes are not code.
fn resolve(found: &mut [Instruction], targets: &[u64], svma: u64, length: u64) {
    for index in 0..found.len() {
        if !matches!(
            found[index].flow,
            Flow::Branch(_) | Flow::Jump(_) | Flow::Call(_)
        ) {
            continue;
        }
        let target = targets[index];
        let offset = target.wrapping_sub(svma);
        let inside = offset < length;
        let position = found.binary_search_by_key(&offset, |at| u64::from(at.start));
        let resolved = match position {
            Ok(position) => Some(Target::Inside(position as u32)),
            Err(_) if inside => None,
            Err(_) => Some(Target::Outside),
        };
        let at = &mut found[index];
        at.flow = match (at.flow, resolved) {
            (Flow::Branch(_) | Flow::Jump(_), None) => Flow::NotCode,
            (Flow::Branch(_), Some(target)) => Flow::Branch(target),
            (Flow::Jump(_), Some(target)) => Flow::Jump(target),
            (Flow::Call(_), resolved) if target != 0 => {
                let next = offset == u64::from(at.start + at.length);
                if next {
                    // A `call` to the next instruction only pushes the code's own address.
                    at.effect = Effect::Push(None);
                    Flow::Next
                } else {
                    at.written |= CALL_CLOBBERS;
                    resolved.map_or(Flow::NotCode, Flow::Call)
                }
            }
            (Flow::Call(_), _) => {
                at.written |= CALL_CLOBBERS;
                Flow::Call(Target::Outside)
            }
            (flow, _) => flow,
        };
    }
}

fn instruction(
    raw: &iced_x86::Instruction,
    position: usize,
    factory: &mut InstructionInfoFactory,
) -> Instruction {
    let mut found = bare(position, raw.len(), flow(raw));
    if found.flow == Flow::NotCode {
        return found;
    }
    let nothing = matches!(raw.mnemonic(), Mnemonic::Nop);
    let (effect, handled) = effect(raw);
    found.effect = effect;
    found.padding = nothing || found.flow == Flow::End;
    if !nothing {
        found.written = written(raw, factory) & !handled;
    }
    found.sigreturn_number = raw.mnemonic() == Mnemonic::Mov
        && number(raw.op0_register().full_register()) == Some(reg::RAX)
        && raw.op_count() == 2
        && is_immediate(raw.op1_kind())
        && raw.immediate(1) == RT_SIGRETURN;
    found
}

fn flow(raw: &iced_x86::Instruction) -> Flow {
    let unresolved = Target::Outside;
    match (raw.code(), raw.flow_control()) {
        (Code::Hlt | Code::Int3 | Code::Ud0_r32_rm32 | Code::Ud1_r32_rm32 | Code::Ud2, _) => {
            Flow::End
        }
        (Code::Syscall | Code::Sysenter | Code::Int_imm8, _) => Flow::Next,
        _ if raw.is_invalid() || raw.is_privileged() => Flow::NotCode,
        // `add %al, (%rax)`: two zero bytes.
        (Code::Add_rm8_r8, _) if is_zeros(raw) => Flow::NotCode,
        (_, FlowControl::Next | FlowControl::XbeginXabortXend) => Flow::Next,
        (_, FlowControl::ConditionalBranch) => Flow::Branch(unresolved),
        (Code::Jmp_rel8_64 | Code::Jmp_rel32_64, _) => Flow::Jump(unresolved),
        (Code::Jmp_rm64, _) if raw.is_ip_rel_memory_operand() => Flow::JumpThroughMemory,
        (Code::Jmp_rm64, _) => Flow::JumpTable,
        (Code::Retnq | Code::Retnq_imm16, _) => Flow::Return,
        (Code::Call_rel32_64 | Code::Call_rm64, _) => Flow::Call(unresolved),
        // Far jumps and calls, returns from interrupts, and software interrupts do not occur in programs.
        _ => Flow::NotCode,
    }
}

fn is_zeros(raw: &iced_x86::Instruction) -> bool {
    raw.op0_kind() == OpKind::Memory
        && raw.memory_base() == Register::RAX
        && raw.memory_index() == Register::None
        && raw.op1_register() == Register::AL
        && raw.memory_displ_size() == 0
        && raw.len() == 2
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// DWARF number of a 64-bit register.
fn number(register: Register) -> Option<u8> {
    const IN_CODE_ORDER: [u8; 8] = [
        reg::RAX,
        reg::RCX,
        reg::RDX,
        reg::RBX,
        reg::RSP,
        reg::RBP,
        reg::RSI,
        reg::RDI,
    ];
    if !register.is_gpr64() {
        return None;
    }
    let number = register.number();
    Some(IN_CODE_ORDER.get(number).copied().unwrap_or(number as u8))
}

/// Bit set of the registers that the instruction writes, fully or partly, always or conditionally.
fn written(raw: &iced_x86::Instruction, factory: &mut InstructionInfoFactory) -> u16 {
    let info = factory.info_options(raw, InstructionInfoOptions::NO_MEMORY_USAGE);
    let mut mask = 0;
    for used in info.used_registers() {
        let writes = !matches!(
            used.access(),
            OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
        );
        if writes && let Some(register) = number(used.register().full_register()) {
            mask |= 1 << register;
        }
    }
    mask
}

/// The effect of an instruction, and the bit set of the registers whose new value it describes.
fn effect(raw: &iced_x86::Instruction) -> (Effect, u16) {
    const RSP: u16 = 1 << reg::RSP;
    let plain = (Effect::None, 0);
    let register = |operand| {
        let is_register = raw.op_kind(operand) == OpKind::Register;
        is_register.then(|| number(raw.op_register(operand)))?
    };
    match raw.mnemonic() {
        Mnemonic::Leave if raw.code() == Code::Leaveq => (Effect::Leave, RSP | 1 << reg::RBP),
        Mnemonic::Enter if raw.code() == Code::Enterq_imm16_imm8 && raw.immediate8_2nd() == 0 => {
            (Effect::Enter(raw.immediate16()), RSP | 1 << reg::RBP)
        }
        // For the next instruction in memory, rsp is the same as before the `call` or `ret`.
        Mnemonic::Call | Mnemonic::Ret => (Effect::None, RSP),
        Mnemonic::Leave | Mnemonic::Enter => plain,
        Mnemonic::Push if raw.stack_pointer_increment() == -8 => {
            let pushed = raw.op_kind(0) == OpKind::Register;
            let pushed = pushed.then(|| number(raw.op0_register())).flatten();
            (Effect::Push(pushed), RSP)
        }
        Mnemonic::Pop if raw.stack_pointer_increment() == 8 => match register(0) {
            Some(reg::RSP) => plain,
            Some(to) => (Effect::Pop(to), RSP | 1 << to),
            None => (Effect::Stack(8), RSP),
        },
        Mnemonic::Mov | Mnemonic::Lea | Mnemonic::Add | Mnemonic::Sub => {
            let Some((effect, to)) = moved(raw, register(0), || register(1)) else {
                return plain;
            };
            (effect, to.map_or(0, |to| 1 << to))
        }
        _ => match raw.stack_pointer_increment() {
            0 => plain,
            bytes => (Effect::Stack(bytes), RSP),
        },
    }
}

/// The effect of `mov`, `lea`, and `add` and `sub` of a constant, and the register that they write. `None`
/// for forms that are not tracked.
fn moved(
    raw: &iced_x86::Instruction,
    first: Option<u8>,
    second: impl Fn() -> Option<u8>,
) -> Option<(Effect, Option<u8>)> {
    // A memory operand that consists of a base register and a displacement only.
    let memory = || {
        let plain = raw.memory_index() == Register::None
            && !matches!(raw.memory_segment(), Register::FS | Register::GS);
        let base = number(raw.memory_base()).filter(|_| plain)?;
        Some((base, raw.memory_displacement64() as i64))
    };
    let immediate = || is_immediate(raw.op1_kind()).then(|| raw.immediate(1) as i64);
    Some(match (raw.mnemonic(), first) {
        (Mnemonic::Mov, Some(to)) if raw.op1_kind() == OpKind::Register => {
            let (from, offset) = (second()?, 0);
            (Effect::Copy { to, from, offset }, Some(to))
        }
        (Mnemonic::Mov, Some(to)) if raw.op1_kind() == OpKind::Memory => {
            let (base, offset) = memory()?;
            (Effect::Load { to, base, offset }, Some(to))
        }
        (Mnemonic::Mov, None) if raw.op0_kind() == OpKind::Memory => {
            let (base, offset) = memory()?;
            let from = second()?;
            (Effect::Store { base, offset, from }, None)
        }
        (Mnemonic::Lea, Some(to)) => {
            let (from, offset) = memory()?;
            (Effect::Copy { to, from, offset }, Some(to))
        }
        (Mnemonic::Add, Some(to)) => {
            let (from, offset) = (to, immediate()?);
            (Effect::Copy { to, from, offset }, Some(to))
        }
        (Mnemonic::Sub, Some(to)) => {
            let (from, offset) = (to, immediate()?.checked_neg()?);
            (Effect::Copy { to, from, offset }, Some(to))
        }
        _ => return None,
    })
}
