//! One step from a frame to its caller: pure, the same code in the kernel program and in user space.
//!
//! Everything that knows the architecture is [`Registers`] and the numbers of its registers
//! (System V psABI for x86_64, figure 3.36: DWARF register numbers).

/// DWARF register numbers of x86_64.
pub mod reg {
    #![expect(missing_docs, reason = "the psABI's own names")]
    pub const RAX: u8 = 0;
    pub const RDX: u8 = 1;
    pub const RCX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSI: u8 = 4;
    pub const RDI: u8 = 5;
    pub const RBP: u8 = 6;
    pub const RSP: u8 = 7;
    pub const R8: u8 = 8;
    pub const R9: u8 = 9;
    pub const R10: u8 = 10;
    pub const R11: u8 = 11;
    pub const R12: u8 = 12;
    pub const R13: u8 = 13;
    pub const R14: u8 = 14;
    pub const R15: u8 = 15;
    pub const RIP: u8 = 16;
}

/// The register file: sixteen general registers by DWARF number, and the instruction pointer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Registers {
    /// General registers, indexed by DWARF number.
    pub gp: [u64; 16],
    /// Instruction pointer.
    pub ip: u64,
}

impl Registers {
    /// Stack pointer.
    #[inline(always)]
    pub fn sp(&self) -> u64 {
        self.gp[reg::RSP as usize]
    }

    /// Frame pointer.
    #[inline(always)]
    pub fn fp(&self) -> u64 {
        self.gp[reg::RBP as usize]
    }
}

/// How the canonical frame address (CFA) of a frame is found. The rule's `reg`, `offset` and `aux`
/// are its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum CfaKind {
    /// No function covers the address. (All zero, so that a cleared table is invalid.)
    Invalid = 0,
    /// The end of the stack: the return address is undefined.
    End = 1,
    /// A rule that is not one of these; `reg` holds the number of an [`Unsupported`] reason.
    Unsupported = 2,
    /// CFA = reg + offset.
    Register = 3,
    /// CFA = *(reg + offset + 8 × index) + aux, where the index may be absent. (Realigned stacks;
    /// assembly that keeps the old stack pointer, on top of an array of computed length too.)
    Deref = 4,
    /// CFA = rsp + 8 + ((rip & 15) >= aux ? 8 : 0): the entries of a procedure linkage table.
    Plt = 5,
    /// A signal frame: every register is in the `sigcontext` at reg + offset.
    Signal = 6,
}

/// Why a rule is unsupported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Unsupported {
    /// A DWARF expression for the CFA that is none of the known patterns.
    CfaExpression = 0,
    /// A register is recovered by an expression that is none of the known patterns.
    RegisterExpression = 1,
    /// An offset that does not fit the rule's encoding.
    OffsetRange = 2,
    /// A rule for the return address that does not fit.
    ReturnAddress = 3,
    /// The call frame instructions themselves could not be decoded.
    Malformed = 4,
    /// More distinct rules than a file may have.
    TooManyRules = 5,
}

impl Unsupported {
    /// Every reason, in the order of their numbers.
    pub const ALL: [Unsupported; 6] = [
        Unsupported::CfaExpression,
        Unsupported::RegisterExpression,
        Unsupported::OffsetRange,
        Unsupported::ReturnAddress,
        Unsupported::Malformed,
        Unsupported::TooManyRules,
    ];

    /// The name used in summaries.
    pub const fn name(self) -> &'static str {
        match self {
            Unsupported::CfaExpression => "cfa_expression",
            Unsupported::RegisterExpression => "register_expression",
            Unsupported::OffsetRange => "offset_range",
            Unsupported::ReturnAddress => "return_address",
            Unsupported::Malformed => "malformed",
            Unsupported::TooManyRules => "too_many_rules",
        }
    }
}

/// How one register of the caller is found, in one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Slot(pub u8);

impl Slot {
    /// The register is as in the callee.
    pub const SAME: Slot = Slot(0);
    /// The value is lost.
    pub const UNDEFINED: Slot = Slot(254);

    /// Saved at CFA − 8 × `words`, 1 to 127.
    pub const fn below_cfa(words: u8) -> Slot {
        assert!(words >= 1 && words <= 127);
        Slot(words)
    }

    /// Saved at rbp + 8 × `words`, −32 to 31, with the callee's rbp. (Frames with a realigned
    /// stack.)
    pub const fn at_fp(words: i8) -> Slot {
        assert!(words >= -32 && words <= 31);
        Slot((words + 32) as u8 + 128)
    }

    /// In another register of the callee.
    pub const fn in_register(register: u8) -> Slot {
        assert!(register < 16);
        Slot(192 + register)
    }
}

/// One rule of a file's dictionary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct Rule {
    /// Operand of the CFA rule, bytes.
    pub offset: i32,
    /// Second operand of the CFA rule.
    pub aux: i16,
    /// A [`CfaKind`].
    pub kind: u8,
    /// DWARF number of the CFA rule's register.
    pub reg: u8,
    /// The return address.
    pub ra: Slot,
    /// The callee-saved registers, in the order of [`SAVED`].
    pub saved: [Slot; 6],
    /// For [`CfaKind::Deref`]: 1 + the DWARF number of the index register; 0 is none.
    pub index: u8,
}

const _: () = assert!(size_of::<Rule>() == 16);

/// The registers that a callee must preserve on x86_64, in the order of [`Rule::saved`].
pub const SAVED: [u8; 6] = [reg::RBX, reg::RBP, reg::R12, reg::R13, reg::R14, reg::R15];

impl Rule {
    const fn bare(kind: CfaKind, reg: u8) -> Rule {
        Rule {
            offset: 0,
            aux: 0,
            kind: kind as u8,
            reg,
            ra: Slot::SAME,
            saved: [Slot::SAME; 6],
            index: 0,
        }
    }

    /// No function covers the address.
    pub const INVALID: Rule = Rule::bare(CfaKind::Invalid, 0);
    /// The proven end of the stack.
    pub const END: Rule = Rule::bare(CfaKind::End, 0);

    /// A rule that cannot be followed, and why.
    pub const fn unsupported(reason: Unsupported) -> Rule {
        Rule::bare(CfaKind::Unsupported, reason as u8)
    }

    /// CFA = rbp + 16, return address and rbp in their usual places: for code that has no unwind
    /// tables and may keep a frame pointer. It is a guess, told apart by `aux` = 1, which a register
    /// rule does not use.
    pub const FRAME_POINTER: Rule = Rule {
        offset: 16,
        aux: 1,
        kind: CfaKind::Register as u8,
        reg: reg::RBP,
        ra: Slot::below_cfa(1),
        saved: [
            Slot::UNDEFINED,
            Slot::below_cfa(2),
            Slot::UNDEFINED,
            Slot::UNDEFINED,
            Slot::UNDEFINED,
            Slot::UNDEFINED,
        ],
        index: 0,
    };
}

impl Rule {
    /// Whether this is [`Rule::FRAME_POINTER`].
    #[inline(always)]
    pub const fn is_guess(&self) -> bool {
        self.kind == CfaKind::Register as u8 && self.aux == 1
    }
}

/// Words that one read below the CFA brings: the return address and the six saved registers.
pub const WINDOW: usize = 8;

/// Words of `struct sigcontext` up to and including `rip`.
pub const SIGCONTEXT: usize = 17;

/// DWARF number of each word of `struct sigcontext` (Linux, arch/x86/include/uapi/asm/sigcontext.h:
/// r8 … r15, di, si, bp, bx, dx, ax, cx, sp, ip).
pub const SIGCONTEXT_REGISTERS: [u8; SIGCONTEXT] = [
    reg::R8,
    reg::R9,
    reg::R10,
    reg::R11,
    reg::R12,
    reg::R13,
    reg::R14,
    reg::R15,
    reg::RDI,
    reg::RSI,
    reg::RBP,
    reg::RBX,
    reg::RDX,
    reg::RAX,
    reg::RCX,
    reg::RSP,
    reg::RIP,
];

/// The walk's state: registers of the current frame and room for what is read.
///
/// It lives in a map value in the kernel (the program's own stack is 512 bytes).
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Cursor {
    /// Registers of the current frame.
    pub regs: Registers,
    /// 1 when `regs.ip` is an interrupted instruction, to be looked up as it is; 0 when it is a
    /// return address, to be looked up at the byte before.
    pub exact_ip: u64,
    /// What was read last.
    pub words: [u64; SIGCONTEXT],
}

impl Cursor {
    /// A walk that begins at an interrupted instruction.
    pub const fn new(regs: Registers) -> Cursor {
        Cursor {
            regs,
            exact_ip: 1,
            words: [0; SIGCONTEXT],
        }
    }

    /// The address to look up: inside the calling instruction.
    #[inline(always)]
    pub fn lookup_ip(&self) -> u64 {
        self.regs.ip.wrapping_sub(1 - (self.exact_ip & 1))
    }
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Step {
    /// The cursor is at the caller.
    Caller = 0,
    /// The stack ends here: the rule says that there is no caller.
    End = 1,
    /// No function covers the address.
    NotCovered = 2,
    /// The rule is not supported.
    Unsupported = 3,
    /// The stack's memory could not be read.
    Unreadable = 4,
    /// The caller's frame does not lie above.
    NoProgress = 5,
    /// The return address is zero: the end, if the rules so far were right.
    ZeroReturn = 6,
}

/// Moves `cursor` from a frame to its caller by `rule`.
///
/// `read` fills the words from the address, or returns false and leaves them undefined. On anything
/// but [`Step::Caller`] the registers are unchanged.
#[inline(always)]
pub fn step(
    cursor: &mut Cursor,
    rule: &Rule,
    mut read: impl FnMut(u64, &mut [u64]) -> bool,
) -> Step {
    let kind = rule.kind;
    if kind == CfaKind::End as u8 {
        return Step::End;
    }
    if kind == CfaKind::Invalid as u8 {
        return Step::NotCovered;
    }
    if kind == CfaKind::Unsupported as u8 {
        return Step::Unsupported;
    }
    let base = cursor.regs.gp[(rule.reg & 15) as usize];
    let address = base.wrapping_add(rule.offset as i64 as u64);
    if kind == CfaKind::Signal as u8 {
        return signal_step(cursor, address, read);
    }
    let mut cfa = address;
    if kind == CfaKind::Plt as u8 {
        cfa = cfa.wrapping_add(((cursor.regs.ip & 15) >= rule.aux as u64) as u64 * 8);
    } else if kind == CfaKind::Deref as u8 {
        let index = cursor.regs.gp[(rule.index.wrapping_sub(1) & 15) as usize];
        // All ones where there is an index, without a branch.
        let present = ((rule.index == 0) as u64).wrapping_sub(1);
        if !read(
            address.wrapping_add((index << 3) & present),
            &mut cursor.words[..1],
        ) {
            return Step::Unreadable;
        }
        cfa = cursor.words[0].wrapping_add(rule.aux as i64 as u64);
    }
    let sp = cursor.regs.sp();
    // A frame may be empty only where the return address is in a register (or the interrupted
    // instruction has just popped it); a caller's frame lies above its callee's.
    if cfa < sp || (cfa == sp && cursor.exact_ip == 0) {
        return Step::NoProgress;
    }
    // One read brings the return address and, nearly always, every saved register. Below a very
    // small frame it may touch a page that was never used: then the words are read one by one.
    let window = read(
        cfa.wrapping_sub(WINDOW as u64 * 8),
        &mut cursor.words[..WINDOW],
    );
    let fp = cursor.regs.fp();
    let Some(ra) = recover(cursor, rule.ra, reg::RIP, cfa, fp, window, &mut read) else {
        return Step::Unreadable;
    };
    if ra == 0 {
        return Step::ZeroReturn;
    }
    // One by one: an array would be cleared first, and a loop needs the numbers of the registers from memory.
    macro_rules! saved {
        ($i:literal) => {
            match recover(
                cursor,
                rule.saved[$i],
                SAVED[$i],
                cfa,
                fp,
                window,
                &mut read,
            ) {
                Some(value) => value,
                None => return Step::Unreadable,
            }
        };
    }
    let saved = (
        saved!(0),
        saved!(1),
        saved!(2),
        saved!(3),
        saved!(4),
        saved!(5),
    );
    cursor.regs.gp[SAVED[0] as usize] = saved.0;
    cursor.regs.gp[SAVED[1] as usize] = saved.1;
    cursor.regs.gp[SAVED[2] as usize] = saved.2;
    cursor.regs.gp[SAVED[3] as usize] = saved.3;
    cursor.regs.gp[SAVED[4] as usize] = saved.4;
    cursor.regs.gp[SAVED[5] as usize] = saved.5;
    cursor.regs.gp[reg::RSP as usize] = cfa;
    cursor.regs.ip = ra;
    cursor.exact_ip = 0;
    Step::Caller
}

/// The value of one register of the caller. `None`: it was saved where nothing can be read.
#[inline(always)]
fn recover(
    cursor: &mut Cursor,
    slot: Slot,
    register: u8,
    cfa: u64,
    fp: u64,
    window: bool,
    read: &mut impl FnMut(u64, &mut [u64]) -> bool,
) -> Option<u64> {
    let Slot(slot) = slot;
    if slot == 0 {
        return Some(cursor.regs.gp[(register & 15) as usize]);
    }
    if slot <= WINDOW as u8 && window {
        return Some(cursor.words[(WINDOW - slot as usize) & (WINDOW - 1)]);
    }
    if slot >= 192 {
        if slot >= 208 {
            return Some(0);
        }
        return Some(cursor.regs.gp[(slot & 15) as usize]);
    }
    let address = if slot < 128 {
        cfa.wrapping_sub(slot as u64 * 8)
    } else {
        fp.wrapping_add((slot as u64 * 8).wrapping_sub(160 * 8))
    };
    // The last word is never part of the window.
    if !read(address, &mut cursor.words[SIGCONTEXT - 1..]) {
        return None;
    }
    Some(cursor.words[SIGCONTEXT - 1])
}

/// A signal frame: all registers come from the `sigcontext` at `address`.
#[inline(always)]
fn signal_step(
    cursor: &mut Cursor,
    address: u64,
    mut read: impl FnMut(u64, &mut [u64]) -> bool,
) -> Step {
    if !read(address, &mut cursor.words) {
        return Step::Unreadable;
    }
    let mut i = 0;
    while i < SIGCONTEXT - 1 {
        cursor.regs.gp[SIGCONTEXT_REGISTERS[i] as usize] = cursor.words[i];
        i += 1;
    }
    cursor.regs.ip = cursor.words[SIGCONTEXT - 1];
    // What the signal interrupted is an instruction, not a call.
    cursor.exact_ip = 1;
    if cursor.regs.ip == 0 {
        return Step::ZeroReturn;
    }
    Step::Caller
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory of a test: consecutive words from an address.
    fn memory(base: u64, words: &[u64]) -> impl FnMut(u64, &mut [u64]) -> bool + '_ {
        move |address, out| {
            for (i, word) in out.iter_mut().enumerate() {
                let Some(offset) = (address + i as u64 * 8).checked_sub(base) else {
                    return false;
                };
                match words.get(offset as usize / 8) {
                    Some(value) => *word = *value,
                    None => return false,
                }
            }
            true
        }
    }

    fn at(ip: u64, sp: u64, fp: u64) -> Cursor {
        let mut regs = Registers {
            ip,
            ..Registers::default()
        };
        regs.gp[reg::RSP as usize] = sp;
        regs.gp[reg::RBP as usize] = fp;
        Cursor::new(regs)
    }

    fn sp_rule(offset: i32) -> Rule {
        Rule {
            offset,
            kind: CfaKind::Register as u8,
            reg: reg::RSP,
            ra: Slot::below_cfa(1),
            ..Rule::INVALID
        }
    }

    /// The first instruction of a function: only the return address is on the stack, and the words
    /// below cannot be read.
    #[test]
    fn function_entry_reads_word_by_word() {
        let stack = [0x1234];
        let mut cursor = at(0x1000, 0x8000, 7);
        assert_eq!(
            step(&mut cursor, &sp_rule(8), memory(0x8000, &stack)),
            Step::Caller
        );
        assert_eq!(cursor.regs.ip, 0x1234);
        assert_eq!(cursor.regs.sp(), 0x8008);
        assert_eq!(cursor.regs.fp(), 7);
        assert_eq!(cursor.lookup_ip(), 0x1233);
    }

    /// Saved registers come out of one window, each from its slot.
    #[test]
    fn saved_registers_from_the_window() {
        let stack: Vec<u64> = (1..=8).collect();
        let mut rule = sp_rule(64);
        rule.saved = [2, 3, 4, 5, 6, 7].map(Slot::below_cfa);
        let mut cursor = at(0x1000, 0x8000, 99);
        assert_eq!(
            step(&mut cursor, &rule, memory(0x8000, &stack)),
            Step::Caller
        );
        assert_eq!(cursor.regs.ip, 8);
        let got = SAVED.map(|r| cursor.regs.gp[r as usize]);
        assert_eq!(got, [7, 6, 5, 4, 3, 2]);
    }

    /// A realigned stack: the CFA is found through memory, rbp at rbp itself.
    #[test]
    fn deref_and_fp_relative_slots() {
        let mut stack = [0u64; 64];
        stack[30] = 0x8000 + 50 * 8; // *(rbp - 16) = CFA
        stack[32] = 0xbeef; // *(rbp)
        stack[49] = 0x4242; // return address
        let rule = Rule {
            offset: -16,
            kind: CfaKind::Deref as u8,
            reg: reg::RBP,
            ra: Slot::below_cfa(1),
            saved: [
                Slot::SAME,
                Slot::at_fp(0),
                Slot::SAME,
                Slot::SAME,
                Slot::SAME,
                Slot::SAME,
            ],
            ..Rule::INVALID
        };
        let mut cursor = at(0x1000, 0x8000, 0x8000 + 32 * 8);
        assert_eq!(
            step(&mut cursor, &rule, memory(0x8000, &stack)),
            Step::Caller
        );
        assert_eq!(cursor.regs.ip, 0x4242);
        assert_eq!(cursor.regs.fp(), 0xbeef);
        assert_eq!(cursor.regs.sp(), 0x8000 + 50 * 8);
    }

    /// An array of r9 words lies between the stack pointer and the word that leads to the CFA
    /// (OpenSSL's `bn_mul_mont`).
    #[test]
    fn deref_with_an_index() {
        let mut stack = [0u64; 32];
        stack[1 + 5] = 0x8000 + 20 * 8; // *(rsp + 8 + 8 × r9)
        stack[20] = 0x4242; // return address
        let mut cursor = at(0x1000, 0x8000, 7);
        cursor.regs.gp[reg::R9 as usize] = 5;
        let rule = Rule {
            kind: CfaKind::Deref as u8,
            aux: 8,
            index: reg::R9 + 1,
            ..sp_rule(8)
        };
        assert_eq!(
            step(&mut cursor, &rule, memory(0x8000, &stack)),
            Step::Caller
        );
        assert_eq!(cursor.regs.ip, 0x4242);
        assert_eq!(cursor.regs.sp(), 0x8000 + 21 * 8);
    }

    /// The two halves of a PLT entry.
    #[test]
    fn plt() {
        let stack = [1, 2, 3];
        let rule = Rule {
            offset: 8,
            aux: 11,
            kind: CfaKind::Plt as u8,
            reg: reg::RSP,
            ra: Slot::below_cfa(1),
            ..Rule::INVALID
        };
        for (ip, expected) in [(0x1000, 1), (0x100a, 1), (0x100b, 2), (0x100f, 2)] {
            let mut cursor = at(ip, 0x8000, 0);
            assert_eq!(
                step(&mut cursor, &rule, memory(0x8000, &stack)),
                Step::Caller
            );
            assert_eq!(cursor.regs.ip, expected, "at {ip:#x}");
        }
    }

    /// Every register comes from the sigcontext, and the interrupted instruction is exact.
    #[test]
    fn signal_frame() {
        let context: Vec<u64> = (100..117).collect();
        let rule = Rule {
            offset: 40,
            kind: CfaKind::Signal as u8,
            reg: reg::RSP,
            ..Rule::INVALID
        };
        let mut cursor = at(0x1000, 0x8000, 0);
        cursor.exact_ip = 0;
        assert_eq!(
            step(&mut cursor, &rule, memory(0x8028, &context)),
            Step::Caller
        );
        assert_eq!(cursor.regs.ip, 116);
        assert_eq!(cursor.regs.sp(), 115);
        assert_eq!(cursor.regs.gp[reg::RBX as usize], 111);
        assert_eq!(cursor.lookup_ip(), 116);
    }

    /// Broken stacks end the walk, they do not loop.
    #[test]
    fn no_progress_and_unreadable() {
        let mut cursor = at(0x1000, 0x8000, 0x7000);
        assert_eq!(
            step(
                &mut cursor,
                &Rule::FRAME_POINTER,
                memory(0x8000, &[1, 2, 3])
            ),
            Step::NoProgress
        );
        assert_eq!(
            step(&mut cursor, &sp_rule(8), memory(0x9000, &[1])),
            Step::Unreadable
        );
        assert_eq!(
            step(&mut cursor, &sp_rule(8), memory(0x8000, &[0])),
            Step::ZeroReturn
        );
        assert_eq!(step(&mut cursor, &Rule::END, memory(0, &[])), Step::End);
        assert_eq!(
            step(&mut cursor, &Rule::INVALID, memory(0, &[])),
            Step::NotCovered
        );
    }
}
