//! The walk up the user stack: one frame a `bpf_loop` callback, its state in a map value.

use core::ffi::c_void;

use agent_ebpf::{
    limits::{CACHES, MAX_KERNEL_FRAMES, MAX_USER_FRAMES, SEGMENT_BLOCKS},
    sample::{EXACT_IP, GUESSED, Outcome, SIGNAL_FRAME_BIT, SampleHeader},
    table::{
        Block, BlockId, IndexEntry, Mapping, MappingKind, RULES_PER_BLOCK, Space, SpaceIndex,
        SpaceLeaf, search_index, search_rows, search_space_index, search_space_leaf, tree_depth,
        tree_kind, tree_root,
    },
    unwind::{Cursor, Rule, Step, WINDOW, step},
};
use aya_ebpf::helpers::{
    bpf_get_current_task, bpf_loop,
    generated::{bpf_get_current_comm, bpf_probe_read_user},
};

use crate::{
    lifecycle::field,
    maps::{
        CACHE, PROCESSES, SEGMENTS, TASK_FLAGS, TASK_IN_EXECVE, TASK_IN_EXECVE_MASK, TASK_MM, WALK,
    },
    words,
};

/// Slot of the sampling program in what each CPU has for walks. It may interrupt the other, so they share
/// nothing that is written.
pub const SAMPLER: u32 = 0;
/// Slot of the program at sends.
pub const CALLER: u32 = 1;
/// How many walks may be under way on a CPU.
pub const SLOTS: u32 = 2;

/// Frames of a sample, kernel's and user's.
pub const FRAMES: usize = (MAX_KERNEL_FRAMES + MAX_USER_FRAMES) as usize;

/// Bytes offered for the kernel stack.
pub const KERNEL_STACK_BYTES: u32 = MAX_KERNEL_FRAMES * 8;

/// `PF_EXITING` of `task_struct.flags` (Linux, include/linux/sched.h).
const PF_EXITING: u32 = 0x4;

/// Multiplier of Fibonacci hashing: the upper bits of a product depend on all bits of the key.
const FIBONACCI: u64 = 0x9e37_79b9_7f4a_7c15;

/// A CPU's own time keeping.
#[repr(C)]
pub struct Clock {
    /// Tick before this one, nanoseconds; 0 before the first.
    pub last_tick: u64,
    /// Start of the second in which `copies` were sent.
    pub window: u64,
    /// Stack copies sent in that second.
    pub copies: u64,
}

/// The state of a walk and, behind it, the record being built. What each frame needs lies together: between
/// two samples the measured program has driven this out of the caches, and a page more costs more than a line.
#[repr(C)]
pub struct Walk {
    stretch: Stretch,
    /// Registers of the current frame.
    pub cursor: Cursor,
    /// The CPU's time keeping.
    pub clock: Clock,
    /// What is known of its process.
    pub space: Space,
    /// The mapping that was looked for last; the next address is often in the same, in the next sample too.
    mapping: Mapping,
    /// [`Space::number`] of the address space in which it was found.
    mapping_of: u32,
    /// Place of the current frame's rule in the [`Cache`].
    place: u8,
    /// That of the last walk's first frame.
    first: u8,
    frame_pointers: u32,
    /// Hash of the user frames of a [`CALLER`].
    pub hash: u64,
    /// What is sent.
    pub record: Record,
}

/// A sample as it is sent.
#[repr(C)]
pub struct Record {
    /// Its start.
    pub header: SampleHeader,
    /// Kernel frames and then user frames.
    pub frames: [u64; FRAMES],
}

impl Record {
    /// Bytes of a record with so many frames.
    #[inline(always)]
    pub fn bytes(frames: usize) -> usize {
        core::mem::offset_of!(Record, frames) + frames * 8
    }
}

const _: () = assert!(core::mem::offset_of!(Record, frames) == size_of::<SampleHeader>());

/// Words of the user stack that are read at once. Frame by frame each read waits for memory that the measured
/// program has not touched for long; in one piece the processor fetches ahead.
const STRETCH: usize = 256;

/// A piece of the user stack.
#[repr(C)]
struct Stretch {
    /// Where it begins; 0: nothing is there yet.
    start: u64,
    /// 1 when a piece could not be read: near the end of the stack words are read one by one.
    ended: u64,
    words: [u64; STRETCH],
}

/// Rules that a [`Cache`] holds: as many as a byte counts.
const CACHED: usize = 1 << u8::BITS;

/// Bits of an address that do not choose its place: a loop's instructions share their row's rule.
const CACHED_BITS: u32 = 6;

/// Rules that were found before, in the order in which they were: a caller's nearly always comes after its callee's, as
/// on the stack. So the next is at hand when the one before was found, and the processor has fetched it ahead: between
/// two samples the measured program has driven all of this out of its caches.
#[repr(C)]
pub struct Cache {
    /// Where the rule of an address is, by the address's hash.
    places: [u8; CACHED],
    /// The place of the next rule that is found: the oldest's.
    next: u8,
    padding: [u8; 7],
    rules: [CachedRule; CACHED],
}

/// A rule that was found before.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct CachedRule {
    /// The first address for which it is known to be valid.
    start: u64,
    /// [`Space::number`] of the address space in which; 0 is none.
    space: u32,
    /// Bytes for which.
    length: u32,
    rule: Rule,
}

/// A rule of the tables, and for which addresses it is known to be valid.
struct Found {
    rule: &'static Rule,
    start: u64,
    length: u32,
}

/// `value` if it is at most `limit`, in a form that the verifier sees: the bound is checked on the very
/// register that is used. Without the black box the compiler proves the bound earlier, on another
/// register or on 32 of its bits, and drops it here.
#[inline(always)]
pub fn bounded(value: usize, limit: usize) -> Option<usize> {
    let value = core::hint::black_box(value);
    (value <= limit).then_some(value)
}

/// The outcome so far.
#[inline(always)]
pub fn outcome(walk: &Walk) -> Outcome {
    Outcome::from_u8(walk.record.header.outcome).unwrap_or(Outcome::KernelOnly)
}

/// How the frame was reached at which the walk stopped, for a stack copy.
#[inline(always)]
pub fn flags(walk: &Walk) -> u32 {
    (walk.cursor.exact_ip as u32 & EXACT_IP) | walk.frame_pointers * GUESSED
}

/// Walks from `walk.cursor.regs` to the end of the stack.
#[inline(always)]
pub fn user_stack<const SLOT: u32>(walk: &mut Walk) {
    walk_up::<SLOT>(walk);
    // In the middle of execve a task has the new program's address space and still the registers of
    // the old one. What cannot be walked there is no user stack.
    if !Outcome::is_complete(outcome(walk)) && is_in_execve() {
        walk.record.header.user_frames = 0;
        walk.record.header.outcome = Outcome::KernelOnly as u8;
    }
}

#[inline(always)]
fn walk_up<const SLOT: u32>(walk: &mut Walk) {
    walk.cursor.exact_ip = 1;
    walk.frame_pointers = 0;
    walk.hash = 0;
    walk.stretch.start = 0;
    walk.stretch.ended = 0;
    // SAFETY: the value is copied at once.
    let space = unsafe { PROCESSES.get(walk.record.header.pid) };
    match space {
        Some(space) if space.mm == walk.record.header.mm => words::copy(&mut walk.space, space),
        unseen => {
            // What was made for the children serves for more than their tables.
            if let Some(space) = unseen
                && space.mm == 0
            {
                walk.space.server = space.server;
                walk.space.trace_offset = space.trace_offset;
            }
            walk.record.header.outcome = Outcome::UnknownProcess as u8;
            return;
        }
    }
    if walk.mapping_of != walk.space.number {
        walk.mapping_of = walk.space.number;
        walk.mapping.start = 0;
        walk.mapping.end = 0;
    }
    walk.place = walk.first.wrapping_sub(1);
    walk.record.header.outcome = Outcome::TooDeep as u8;
    // SAFETY: `frame` has the signature that the helper calls.
    unsafe {
        bpf_loop(
            MAX_USER_FRAMES,
            frame::<SLOT> as *mut c_void,
            core::ptr::null_mut(),
            0,
        )
    };
}

/// One frame: note its address, find its rule, step to its caller. 1 ends the loop.
extern "C" fn frame<const SLOT: u32>(index: u32, _: *mut c_void) -> i64 {
    let Some(walk) = WALK.get_ptr_mut(SLOT) else {
        return 1;
    };
    // SAFETY: this CPU's only user of its slot is this program.
    let walk = unsafe { &mut *walk };
    let at = walk.record.header.kernel_frames as usize + index as usize;
    let Some(at) = bounded(at, FRAMES - 1) else {
        return 1;
    };
    let interrupted = (walk.cursor.exact_ip != 0 && index != 0) as u64;
    walk.record.frames[at] = walk.cursor.regs.ip | interrupted * SIGNAL_FRAME_BIT;
    walk.record.header.user_frames = index + 1;
    if SLOT == CALLER {
        walk.hash = (walk.hash.rotate_left(7) ^ walk.cursor.regs.ip).wrapping_mul(FIBONACCI);
    }
    let outcome = next::<SLOT>(walk);
    if index == 0 {
        walk.first = walk.place;
    }
    match outcome {
        None => 0,
        Some(outcome) => {
            walk.record.header.outcome = outcome as u8;
            1
        }
    }
}

/// Steps to the caller; `Some` when the walk is over.
#[inline(always)]
fn next<const SLOT: u32>(walk: &mut Walk) -> Option<Outcome> {
    let ip = walk.cursor.lookup_ip();
    let rule = match look_up::<SLOT>(walk, ip) {
        Ok(rule) => rule,
        Err(outcome) => return Some(outcome),
    };
    let guess = rule.is_guess();
    if guess {
        walk.frame_pointers = 1;
        // The psABI marks the deepest frame so. But code without tables may use the register for anything.
        if walk.cursor.regs.fp() == 0 {
            return Some(Outcome::GuessedEnd);
        }
    }
    let stretch = &mut walk.stretch;
    let read = |address: u64, words: &mut [u64]| stretch.read(address, words);
    match step(&mut walk.cursor, rule, read) {
        Step::Caller => None,
        Step::End => Some(Outcome::of_end(true, walk.frame_pointers != 0)),
        Step::ZeroReturn => Some(Outcome::of_end(false, walk.frame_pointers != 0)),
        Step::NotCovered => Some(Outcome::NotCovered),
        Step::Unsupported => Some(Outcome::UnsupportedRule),
        Step::Unreadable if is_exiting() => Some(Outcome::KernelOnly),
        Step::Unreadable | Step::NoProgress if guess => Some(Outcome::BrokenFramePointer),
        Step::Unreadable => Some(Outcome::UnreadableStack),
        Step::NoProgress => Some(Outcome::NoProgress),
    }
}

/// The rule of `ip`, from the [`Cache`] or else from the tables.
#[inline(always)]
fn look_up<const SLOT: u32>(walk: &mut Walk, ip: u64) -> Result<&'static Rule, Outcome> {
    let space = u64::from(walk.space.number).wrapping_mul(FIBONACCI) >> (64 - CACHES.ilog2());
    let slot = walk.record.header.cpu * SLOTS + SLOT;
    let Some(cache) = CACHE.get_ptr_mut(slot * CACHES + space as u32) else {
        return Err(Outcome::TablesPending);
    };
    // SAFETY: it belongs to this CPU, and this program is its only user.
    let cache = unsafe { &mut *cache };
    walk.place = walk.place.wrapping_add(1);
    if !is_rule_of(&cache.rules[usize::from(walk.place)], walk, ip) {
        let hash = (ip >> CACHED_BITS).wrapping_mul(FIBONACCI) >> (64 - u8::BITS);
        walk.place = cache.places[hash as usize & (CACHED - 1)];
        if !is_rule_of(&cache.rules[usize::from(walk.place)], walk, ip) {
            let found = find_rule(walk, ip)?;
            walk.place = cache.next;
            cache.next = cache.next.wrapping_add(1);
            cache.places[hash as usize & (CACHED - 1)] = walk.place;
            cache.rules[usize::from(walk.place)] = CachedRule {
                start: found.start,
                space: walk.space.number,
                length: found.length,
                rule: *found.rule,
            };
        }
    }
    Ok(&cache.rules[usize::from(walk.place)].rule)
}

#[inline(always)]
fn is_rule_of(cached: &CachedRule, walk: &Walk, ip: u64) -> bool {
    ip.wrapping_sub(cached.start) < u64::from(cached.length) && cached.space == walk.space.number
}

/// Finds the rule for `ip`: first its mapping, then the row in the mapping's table.
#[inline(always)]
fn find_rule(walk: &mut Walk, ip: u64) -> Result<Found, Outcome> {
    if (ip < walk.mapping.start || ip >= walk.mapping.end) && !find_mapping(walk, ip) {
        return Err(Outcome::UnknownMapping);
    }
    let kind = tree_kind(walk.mapping.tree);
    if kind == MappingKind::FramePointer as u32 {
        return Ok(Found {
            rule: &Rule::FRAME_POINTER,
            start: ip,
            length: 1,
        });
    }
    if kind == MappingKind::Table as u32
        && let Some(found) = find_row(&walk.mapping, ip)
    {
        return Ok(found);
    }
    Err(Outcome::TablesPending)
}

/// Finds the mapping of `ip` and remembers it.
#[inline(always)]
fn find_mapping(walk: &mut Walk, ip: u64) -> bool {
    let mut root = walk.space.root;
    if walk.space.depth != 0 {
        let Some(index) = block::<SpaceIndex>(root) else {
            return false;
        };
        root = search_space_index(index, ip);
    }
    let Some(leaf) = block::<SpaceLeaf>(root) else {
        return false;
    };
    let Some(mapping) = search_space_leaf(leaf, ip) else {
        return false;
    };
    walk.mapping = mapping;
    true
}

/// Finds the rule for `ip` in its mapping's table. `None`: a block is missing.
#[inline(always)]
fn find_row(mapping: &Mapping, ip: u64) -> Option<Found> {
    let key = ip.wrapping_sub(mapping.bias);
    if key > u64::from(u32::MAX) {
        return Some(Found {
            rule: &Rule::INVALID,
            start: ip,
            length: 1,
        });
    }
    let mut entry = IndexEntry {
        child: tree_root(mapping.tree),
        first: 0,
    };
    let depth = tree_depth(mapping.tree);
    if depth > 1 {
        entry = search_index(block::<Block>(entry.child)?, key as u32);
    }
    if depth > 0 {
        entry = search_index(block::<Block>(entry.child)?, key as u32);
    }
    let offset = (key as u32).wrapping_sub(entry.first);
    let row = search_rows(block::<Block>(entry.child)?, offset);
    let directory = block::<Block>(mapping.rules)?;
    let rules = directory.0[(row.rule as usize / RULES_PER_BLOCK) & (directory.0.len() - 1)];
    let rules = block::<[Rule; RULES_PER_BLOCK]>(rules)?;
    let mut found = Found {
        rule: &rules[row.rule as usize & (RULES_PER_BLOCK - 1)],
        start: ip.wrapping_sub(u64::from(offset.wrapping_sub(row.offset))),
        length: row.length,
    };
    // A row may go on where the mapping has ended and another begins.
    let end = found.start.wrapping_add(u64::from(row.length));
    if row.length == 0 || found.start < mapping.start || end > mapping.end {
        found.start = ip;
        found.length = 1;
    }
    Some(found)
}

/// A block of the pool, seen as what the tables' layout says it holds.
#[inline(always)]
fn block<T>(id: BlockId) -> Option<&'static T> {
    const { assert!(size_of::<T>() == size_of::<Block>()) };
    let slot = id % SEGMENT_BLOCKS;
    let block = SEGMENTS.get_value(id / SEGMENT_BLOCKS, &slot)?;
    // SAFETY: every block type is plain data of the same size and of an alignment of at most 8, which
    // is that of map values.
    Some(unsafe { &*core::ptr::from_ref(block).cast::<T>() })
}

impl Stretch {
    /// Reads words of the user stack: the [`WINDOW`] of a frame from the piece that is there or a new one, which
    /// begins with it; others by themselves.
    #[inline(always)]
    fn read(&mut self, address: u64, words: &mut [u64]) -> bool {
        if words.len() != WINDOW || address % 8 != 0 {
            return read_user(address, words);
        }
        let mut at = address.wrapping_sub(self.start) / 8;
        if at > (STRETCH - WINDOW) as u64 {
            if self.ended == 0 && read_user(address, &mut self.words) {
                self.start = address;
                at = 0;
            } else {
                self.ended = 1;
                return read_user(address, words);
            }
        }
        let Some(at) = bounded(at as usize, STRETCH - WINDOW) else {
            return false;
        };
        let mut word = 0;
        while word < WINDOW {
            // SAFETY: `at` + `WINDOW` words lie within the piece.
            words[word] = unsafe { *self.words.as_ptr().add(at).add(word) };
            word += 1;
        }
        true
    }
}

/// Reads words of user memory.
#[inline(always)]
fn read_user(address: u64, words: &mut [u64]) -> bool {
    // SAFETY: the helper checks the address and writes only what was asked for.
    unsafe {
        bpf_probe_read_user(
            words.as_mut_ptr().cast(),
            size_of_val(words) as u32,
            address as *const c_void,
        ) == 0
    }
}

/// The name of the current thread.
#[inline(always)]
pub fn name_of_current(to: &mut [u8; 16]) {
    // SAFETY: the buffer is as large as the size says, and there is always a current task.
    unsafe { bpf_get_current_comm(to.as_mut_ptr().cast(), size_of_val(to) as u32) };
}

/// Identity of the current task's address space.
#[inline(always)]
pub fn current_mm() -> u64 {
    // SAFETY: the current task, and an offset from the kernel's own BTF.
    unsafe { field(bpf_get_current_task() as *const c_void, TASK_MM.load()).unwrap_or(0) }
}

/// Whether the current task is exiting: its address space may already be gone, so it has no user
/// stack any more.
#[inline(always)]
fn is_exiting() -> bool {
    // SAFETY: the current task, and an offset from the kernel's own BTF.
    unsafe {
        let task = bpf_get_current_task() as *const c_void;
        field::<u32>(task, TASK_FLAGS.load()).is_some_and(|flags| flags & PF_EXITING != 0)
    }
}

/// Whether the current task is becoming another program.
#[inline(always)]
fn is_in_execve() -> bool {
    // SAFETY: the current task, and an offset from the kernel's own BTF.
    unsafe {
        let task = bpf_get_current_task() as *const c_void;
        let bits = field::<u8>(task, TASK_IN_EXECVE.load()).unwrap_or(0);
        bits & TASK_IN_EXECVE_MASK.load() != 0
    }
}
