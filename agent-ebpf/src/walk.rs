//! The walk up the user stack. Each frame is one call of a `bpf_loop` callback; the state is in a map value.

use core::ffi::c_void;

use agent_ebpf::{
    limits::{CACHES, MAX_KERNEL_FRAMES, MAX_USER_FRAMES, SEGMENT_BLOCKS},
    sample::{EXACT_IP, GUESSED, Outcome, SIGNAL_FRAME_BIT},
    table::{
        Block, BlockId, IndexEntry, MappingEntry, MappingKind, RULES_PER_BLOCK, SpaceIndex,
        SpaceLeaf, search_index, search_rows, search_space_index, search_space_leaf, tree_depth,
        tree_kind, tree_root,
    },
    unwind::{Rule, Step, WINDOW, step},
};
use aya_ebpf::helpers::bpf_loop;

use crate::{
    maps::{CACHE, PROCESSES, SEGMENTS, WALK},
    state::{CACHED, CALLER, CachedRule, FRAMES, SLOTS, STRETCH, Stretch, Walk},
    task,
    user::read_words,
    verifier::bounded,
    words,
};

/// Bytes of the buffer for the kernel stack.
pub const KERNEL_STACK_BYTES: u32 = MAX_KERNEL_FRAMES * 8;

/// Multiplier of Fibonacci hashing (2⁶⁴ / golden ratio). The upper bits of a product depend on all bits of
/// the key.
const FIBONACCI: u64 = 0x9e37_79b9_7f4a_7c15;

/// Low bits of an address that do not enter its hash in the rule cache, so that nearby instructions, as
/// those of a loop, share the entry of their row's rule.
const CACHED_BITS: u32 = 6;

/// A rule found in the tables, and the addresses for which it is known to be valid: `length` bytes from
/// `start` (avma).
struct Found {
    rule: &'static Rule,
    start: u64,
    length: u32,
}

/// The outcome of the walk.
#[inline(always)]
pub fn outcome(walk: &Walk) -> Outcome {
    Outcome::from_u8(walk.record.header.outcome).unwrap_or(Outcome::KernelOnly)
}

/// The flags of a stack copy: how the walk reached the frame at which it stopped.
#[inline(always)]
pub fn flags(walk: &Walk) -> u32 {
    (walk.cursor.exact_ip as u32 & EXACT_IP) | walk.frame_pointers * GUESSED
}

/// Walks from `walk.cursor.regs` to the end of the stack. Stores the frames and the outcome in the record.
#[inline(always)]
pub fn user_stack<const SLOT: u32>(walk: &mut Walk) {
    walk_up::<SLOT>(walk);
    // In the middle of execve a task already has the new program's address space but still the registers of
    // the old one. A stack that could not be walked to its end there is not a user stack.
    if !Outcome::is_complete(outcome(walk)) && task::is_in_execve() {
        walk.record.header.user_frames = 0;
        walk.record.header.outcome = Outcome::KernelOnly as u8;
    }
}

/// Start of a piece of the stack that holds nothing: so far from every user address that no window lies in it.
const NOWHERE: u64 = 1 << 62;

#[inline(always)]
fn walk_up<const SLOT: u32>(walk: &mut Walk) {
    walk.cursor.exact_ip = 1;
    walk.frame_pointers = 0;
    walk.hash = 0;
    walk.stretch.start = NOWHERE;
    walk.stretch.ended = 0;
    // SAFETY: the value is copied at once.
    let space = unsafe { PROCESSES.get(walk.record.header.pid) };
    match space {
        Some(space) if space.mm == walk.record.header.mm => words::copy(&mut walk.space, space),
        unseen => {
            // An entry without an identity was made before the process was sampled, only to be inherited by
            // children. Its tables do not apply here, but its server and its trace offset do.
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

/// Handles one frame: stores its address, finds its rule, and steps to its caller. Returns 1 to end the loop.
extern "C" fn frame<const SLOT: u32>(index: u32, _: *mut c_void) -> i64 {
    let Some(walk) = WALK.get_ptr_mut(SLOT) else {
        return 1;
    };
    // SAFETY: only this program uses this CPU's slot.
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

/// Steps to the caller. Returns `Some` when the walk has ended.
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
        // The psABI marks the deepest frame by a frame pointer of zero, but code without tables may use the
        // register for anything.
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
        Step::Unreadable if task::is_exiting() => Some(Outcome::KernelOnly),
        Step::Unreadable | Step::NoProgress if guess => Some(Outcome::BrokenFramePointer),
        Step::Unreadable => Some(Outcome::UnreadableStack),
        Step::NoProgress => Some(Outcome::NoProgress),
    }
}

/// The rule of `ip`, from the [`RuleCache`](crate::state::RuleCache) or else from the tables.
#[inline(always)]
fn look_up<const SLOT: u32>(walk: &mut Walk, ip: u64) -> Result<&'static Rule, Outcome> {
    let space = u64::from(walk.space.number).wrapping_mul(FIBONACCI) >> (64 - CACHES.ilog2());
    let slot = walk.record.header.cpu * SLOTS + SLOT;
    let Some(cache) = CACHE.get_ptr_mut(slot * CACHES + space as u32) else {
        return Err(Outcome::TablesPending);
    };
    // SAFETY: the cache belongs to this CPU and this slot, so only this program uses it.
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

/// Finds the rule for `ip` in the tables: first its mapping, then the row in the mapping's table.
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

/// Finds the mapping of `ip`, and stores it in `walk.mapping`. Returns false if there is none.
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

/// Finds the rule for `ip` in its mapping's table. `None` if a block is missing.
#[inline(always)]
fn find_row(mapping: &MappingEntry, ip: u64) -> Option<Found> {
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
    // A row may extend beyond the mapping, where another mapping may begin. And the last row of a leaf has
    // no known length. In both cases the rule is only known to be valid for this address.
    let end = found.start.wrapping_add(u64::from(row.length));
    if row.length == 0 || found.start < mapping.start || end > mapping.end {
        found.start = ip;
        found.length = 1;
    }
    Some(found)
}

/// A block of the pool, as the type that the layout of the tables says it holds. `None` if its segment is
/// missing.
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
    /// Reads words of the user stack. The [`WINDOW`] of a frame is taken from the copied piece; if it does
    /// not lie there, a new piece that begins with the window is copied first. Other reads go directly to
    /// user memory.
    #[inline(always)]
    fn read(&mut self, address: u64, words: &mut [u64]) -> bool {
        if words.len() != WINDOW || address % 8 != 0 {
            return read_words(address, words);
        }
        let mut at = address.wrapping_sub(self.start) / 8;
        if at > (STRETCH - WINDOW) as u64 {
            if self.ended == 0 && read_words(address, &mut self.words) {
                self.start = address;
                at = 0;
            } else {
                self.ended = 1;
                // The failed read has overwritten the piece with zeros.
                self.start = NOWHERE;
                return read_words(address, words);
            }
        }
        let Some(at) = bounded(at as usize, STRETCH - WINDOW) else {
            return false;
        };
        let mut word = 0;
        while word < WINDOW {
            // SAFETY: `WINDOW` words from `at` lie within the piece.
            words[word] = unsafe { *self.words.as_ptr().add(at).add(word) };
            word += 1;
        }
        true
    }
}
