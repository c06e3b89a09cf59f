//! One step of the unwinder, from a frame to its caller. It is pure code, shared by the kernel program and
//! user space.
//!
//! The code that depends on the architecture is [`Registers`], the register numbers in [`reg`] (System V
//! psABI for x86_64, figure 3.36: DWARF register numbers), [`SAVED`], and the layout of the signal frame.

/// DWARF register numbers of x86_64.
pub mod reg {
    #![expect(missing_docs, reason = "these are the names used by the psABI")]
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

/// How the canonical frame address (CFA) of a frame is computed. Its operands are the fields `reg`,
/// `offset`, `aux` and `index` of the [`Rule`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum CfaKind {
    /// No function covers the address. The value is 0, so that a cleared table has only invalid rules.
    Invalid = 0,
    /// The end of the stack: the return address is undefined.
    End = 1,
    /// A rule that cannot be expressed here; `reg` holds the number of an [`Unsupported`] reason.
    Unsupported = 2,
    /// CFA = reg + offset.
    Register = 3,
    /// CFA = *(reg + offset + 8 × index) + aux, where the index may be absent. Used by functions that
    /// realign their stack, and by assembly that saves the old stack pointer, possibly above an array of
    /// computed length.
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
    /// The DWARF expression of the CFA matches none of the known patterns.
    CfaExpression = 0,
    /// The DWARF expression that recovers a register matches none of the known patterns.
    RegisterExpression = 1,
    /// An offset that does not fit the rule's encoding.
    OffsetRange = 2,
    /// The rule for the return address cannot be encoded.
    ReturnAddress = 3,
    /// The call frame instructions themselves could not be decoded.
    Malformed = 4,
    /// The file has more distinct rules than [`crate::limits::MAX_RULES`].
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

/// Where the value of one register of the caller is found, encoded in one byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct Slot(pub u8);

impl Slot {
    /// The register has the same value as in the callee.
    pub const SAME: Slot = Slot(0);
    /// The caller's value is lost.
    pub const UNDEFINED: Slot = Slot(254);

    /// Saved at CFA − 8 × `words`; `words` is 1 to 127.
    pub const fn below_cfa(words: u8) -> Slot {
        assert!(words >= 1 && words <= 127);
        Slot(words)
    }

    /// Saved at rbp + 8 × `words`, where rbp is the callee's and `words` is −32 to 31. Used by frames with
    /// a realigned stack.
    pub const fn at_fp(words: i8) -> Slot {
        assert!(words >= -32 && words <= 31);
        Slot((words + 32) as u8 + 128)
    }

    /// The value is in another register of the callee, given by its DWARF number.
    pub const fn in_register(register: u8) -> Slot {
        assert!(register < 16);
        Slot(192 + register)
    }
}

/// How to get from a frame to its caller. The rules of a file are kept in a dictionary, to which its rows
/// refer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(C)]
pub struct Rule {
    /// Operand of the CFA rule, in bytes.
    pub offset: i32,
    /// Second operand of the CFA rule; its meaning depends on `kind`.
    pub aux: i16,
    /// A [`CfaKind`].
    pub kind: u8,
    /// DWARF number of the CFA rule's register.
    pub reg: u8,
    /// Where the return address is found.
    pub ra: Slot,
    /// Where the callee-saved registers are found, in the order of [`SAVED`].
    pub saved: [Slot; 6],
    /// For [`CfaKind::Deref`]: 1 + the DWARF number of the index register, or 0 if there is none.
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
    /// The proven end of the stack: the frame has no caller.
    pub const END: Rule = Rule::bare(CfaKind::End, 0);

    /// A rule that cannot be followed, for this reason.
    pub const fn unsupported(reason: Unsupported) -> Rule {
        Rule::bare(CfaKind::Unsupported, reason as u8)
    }

    /// CFA = rbp + 16, with the return address and rbp in their usual places: for code that has no unwind
    /// tables and may keep a frame pointer. It is a guess. It is distinguished from a real rule by `aux` =
    /// 1, because [`CfaKind::Register`] does not use `aux` otherwise.
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

/// Words below the CFA that are fetched by one read. The return address and the six saved registers usually
/// lie there.
pub const WINDOW: usize = 8;

/// Number of words of `struct sigcontext` up to and including `rip`.
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

/// The state of a walk: the registers of the current frame, and a buffer for the words that a step reads.
///
/// In the kernel it is part of a map value, because a BPF program's stack has only 512 bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Cursor {
    /// Registers of the current frame.
    pub regs: Registers,
    /// 1 when `regs.ip` is an interrupted instruction, whose rule is looked up at this address; 0 when it
    /// is a return address, whose rule is looked up at the byte before.
    pub exact_ip: u64,
    /// The words that were read last.
    pub words: [u64; SIGCONTEXT],
}

impl Cursor {
    /// The start of a walk, at an interrupted instruction.
    pub const fn new(regs: Registers) -> Cursor {
        Cursor {
            regs,
            exact_ip: 1,
            words: [0; SIGCONTEXT],
        }
    }

    /// The address by which the rule is looked up. For a return address it lies inside the call
    /// instruction, because the call may be the last instruction of its function.
    #[inline(always)]
    pub fn lookup_ip(&self) -> u64 {
        self.regs.ip.wrapping_sub(1 - (self.exact_ip & 1))
    }
}

/// The result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Step {
    /// The cursor has moved to the caller.
    Caller = 0,
    /// The stack ends here: the rule says that there is no caller.
    End = 1,
    /// No function covers the address.
    NotCovered = 2,
    /// The rule is not supported.
    Unsupported = 3,
    /// The stack's memory could not be read.
    Unreadable = 4,
    /// The caller's frame does not lie above the callee's: the stack or the unwind information is broken.
    NoProgress = 5,
    /// The return address is zero. This is the end of the stack, provided that the rules so far were right.
    ZeroReturn = 6,
}

/// Moves `cursor` from a frame to its caller by `rule`.
///
/// `read` fills the words from the memory at the address, or returns false and leaves them undefined. With
/// any result other than [`Step::Caller`] the registers are unchanged, except in a signal frame whose saved
/// `rip` is zero.
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
        // All ones if there is an index, else zero, computed without a branch.
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
    // A caller's frame lies above its callee's. Only the interrupted frame may be empty: its return address
    // may be in a register, or may just have been popped.
    if cfa < sp || (cfa == sp && cursor.exact_ip == 0) {
        return Step::NoProgress;
    }
    // One read fetches the return address and, nearly always, every saved register. If the frame is very
    // small, the read may touch a page below the stack that was never used; then the words are read one by
    // one.
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
    // Unrolled by hand: an array of results would be cleared first, and a loop would load the register
    // numbers from memory.
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

/// The value of one register of the caller. `None` if it was saved at an address that cannot be read.
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
    // The last word is not part of the window, so the window stays intact.
    if !read(address, &mut cursor.words[SIGCONTEXT - 1..]) {
        return None;
    }
    Some(cursor.words[SIGCONTEXT - 1])
}

/// A step out of a signal frame: all registers are read from the `sigcontext` at `address`.
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
    // A signal interrupts an instruction, so the address is not a return address.
    cursor.exact_ip = 1;
    if cursor.regs.ip == 0 {
        return Step::ZeroReturn;
    }
    Step::Caller
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a `read` function for a memory that holds these words from the address `base` on.
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

    /// At the first instruction of a function only the return address is on the stack. If the words below
    /// cannot be read, the return address is read by itself.
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

    /// Saved registers are taken from the one window that is read, each from its slot.
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

    /// With a realigned stack, the CFA is loaded from memory and rbp was saved at the address in rbp.
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

    /// An array of r9 words lies between the stack pointer and the word from which the CFA is loaded, as in
    /// OpenSSL's `bn_mul_mont`.
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

    /// The CFA differs between the two halves of a PLT entry.
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

    /// Every register is read from the sigcontext, and the resulting address is an interrupted instruction.
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

    /// A broken stack ends the walk; it does not make it loop.
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
