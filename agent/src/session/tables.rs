//! Decides which unwind tables and address spaces the kernel has. They are built on demand, when a process
//! is sampled that the kernel does not know.
//!
//! The life of a process's tables:
//!
//! ```text
//!  kernel                           agent's loop                                       compiler thread
//!  ------                           ------------                                       ---------------
//!  a sample or caller's stack that
//!  needs more tables -------------> TableRequest { pid, mm } -> give
//!                                     open the mapped files; ask for each
//!                                     table that is new (Building) ------------------> Queue, unwind::compile
//!  SEGMENTS <---- space blocks ------ place: mappings whose table is missing are Pending         |
//!  PROCESSES[pid] <-- Space --------- PlacedSpace::write; noted in `given`                       |
//!                                                                                                |
//!  SEGMENTS <---- table blocks ---- settle: load a finished table <------------------------------+
//!  SEGMENTS <---- space blocks ------ replace: the spaces that waited for it are placed anew,
//!  PROCESSES[pid] <-- Space --------- written for each of their processes; old blocks rest
//!
//!  fork: entry copied to the child  changed: the child is given the space of its parent
//!  mmap ----------- event --------> changed: the space differs, so it is given anew, as above
//!  exec: entry removed              changed: `given` is cleared; a later sample asks again
//!  exit: entry removed              forget: `given` is cleared, and an entry written too late removed
//!
//!                                   sweep, free_unused: the blocks of spaces that no process has, and of
//!                                   tables to which no space has referred for a minute, rest
//!                                   BlockPool::settle: blocks that rest are free when every event from
//!                                   before that has been read, as a child forked then may still use them
//! ```
//!
//! `changed` only applies to processes that have an entry in the kernel. Two kinds of processes are given
//! an entry before they are sampled, so that their children inherit it: parents of processes that are given
//! one, and programs that are likely to be PostgreSQL servers (`give_unseen`).

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
};

use agent_ebpf::{
    postgres::StatusRevision,
    table::{BlockId, MappingKind, Space, pack_tree},
};

use super::{compiler::Compiler, coverage::Coverage};
use crate::{
    kernel::{BlockPool, Error, Kernel},
    mapped::Objects,
    postgres::{Facts, Servers},
    process::{AddressSpace, Backing, ObjectId, Registry, exists},
    profile::UnwindTables,
    unwind::{self, Table, space, space::MappingEntry, tree},
};

/// A loaded table, as the mappings of its object refer to it.
#[derive(Clone, Copy, Debug)]
struct Loaded {
    tree: u32,
    rules: BlockId,
    base_svma: u64,
}

/// How long a table is kept that no address space refers to, nanoseconds. A program that is started again
/// and again (such as a compiler) should find its tables still loaded.
const UNUSED_FOR: u64 = 60 * SECOND;

/// Interval at which unused tables are freed and failures are retried, nanoseconds.
const LOOK_EVERY: u64 = 10 * SECOND;

/// A second in nanoseconds.
const SECOND: u64 = 1_000_000_000;

#[derive(Debug)]
enum TableState {
    /// The compiler thread is compiling it, or it waits in that thread's queue.
    Building,
    /// It is in the kernel, in these blocks. `used` is when an address space last referred to it,
    /// nanoseconds.
    Loaded {
        table: Loaded,
        blocks: Vec<BlockId>,
        used: u64,
    },
    /// The object has no unwind entries, so its code is unwound by frame pointers.
    Absent,
    /// The kernel had no room for it, or no thread could compile it. It is retried later.
    NotNow,
    /// It could not be compiled. Samples in it are unwound in user space.
    Failed,
}

/// An address space that is in the kernel.
#[derive(Debug)]
struct PlacedSpace {
    /// What else the kernel needs to know about its processes.
    facts: Facts,
    /// The agent's address space. It is kept alive here, so that no other address space gets the same
    /// [`SpaceKey`].
    space: Rc<AddressSpace>,
    root: BlockId,
    depth: u32,
    /// See [`Space::number`].
    number: u32,
    blocks: Vec<BlockId>,
    /// Objects whose tables it refers to.
    objects: Vec<ObjectId>,
    /// Objects whose tables were still being compiled when it was written.
    waiting: HashSet<ObjectId>,
    /// Whether a file could not be opened, or a table did not fit. The space is then written again later.
    is_partial: bool,
    /// Number of the last attempt to write it, of all attempts.
    attempt: u64,
}

/// The objects of an address space, by the state of their tables, at the time when it is written.
#[derive(Debug, Default)]
struct Files {
    used: Vec<ObjectId>,
    waiting: HashSet<ObjectId>,
    is_partial: bool,
}

/// Maximum number of incomplete address spaces that are retried at a time, because each may open files.
const MAX_RETRIED: usize = 16;

impl PlacedSpace {
    /// Makes it the address space of a process in the kernel.
    fn write(&self, kernel: &mut Kernel, pid: u32, mm: u64) -> Result<(), Error> {
        if self.waiting.is_empty() {
            log::debug!("pid {pid}: every table is there");
        }
        let space = Space {
            mm,
            root: self.root,
            depth: self.depth,
            number: self.number,
            server: self.facts.server,
            trace_offset: self.facts.trace_offset,
            padding: 0,
            revision: StatusRevision::default(),
        };
        // If the process has ended by now, the program at its exit may have run before this entry existed,
        // so nothing else would remove it. If it ends later, that program removes the entry.
        if kernel.set_space(pid, space)? && !exists(pid) {
            kernel.remove_space(pid);
        }
        Ok(())
    }
}

/// The kernel's identity (`mm`) of an address space that was never sampled. No process has it, so such an
/// entry only serves to be inherited.
const UNSEEN: u64 = 0;

/// The agent's identity of an address space.
type SpaceKey = *const AddressSpace;

/// The tables and address spaces in the kernel, as the agent knows them.
pub struct Tables {
    pool: BlockPool,
    /// The PostgreSQL servers among the address spaces.
    pub servers: Servers,
    /// Number of the address space that was last written, see [`Space::number`].
    last_number: u32,
    /// Attempts to write an address space.
    attempts: u64,
    states: HashMap<ObjectId, TableState>,
    placed: HashMap<SpaceKey, PlacedSpace>,
    /// The entry that each process was given: the kernel's identity of its address space, and the agent's.
    given: HashMap<u32, (u64, SpaceKey)>,
    compiler: Compiler,
    coverage: Coverage,
    /// When [`Tables::look`] last ran, nanoseconds.
    looked: u64,
}

impl Tables {
    /// Starts with nothing in the kernel.
    pub fn new() -> Tables {
        Tables {
            pool: BlockPool::default(),
            servers: Servers::default(),
            last_number: 0,
            attempts: 0,
            states: HashMap::new(),
            placed: HashMap::new(),
            given: HashMap::new(),
            compiler: Compiler::new(),
            coverage: Coverage::default(),
            looked: 0,
        }
    }

    /// Gives the kernel the address space of a process that it did not know, or did not know completely,
    /// when the process was sampled with the kernel's identity `mm`.
    ///
    /// # Errors
    /// A map cannot be written.
    pub fn give(
        &mut self,
        kernel: &mut Kernel,
        objects: &mut Objects,
        pid: u32,
        mm: u64,
        space: &Rc<AddressSpace>,
    ) -> Result<(), Error> {
        let key = Rc::as_ptr(space);
        // The entry may have been removed since: an exec that came later removes it.
        let is_given = self.given.get(&pid) == Some(&(mm, key))
            && kernel.space(pid).is_some_and(|space| space.mm == mm);
        if is_given || space.mappings().is_empty() {
            return Ok(());
        }
        if !self.placed.contains_key(&key) {
            let facts = self.servers.facts(kernel, objects, pid, space)?;
            self.servers.refused += u64::from(facts.found_no_place);
            if !self.place(kernel, objects, pid, space, facts)? {
                return Ok(());
            }
        }
        let placed = &self.placed[&key];
        // Tables that a sampled process needs are compiled first. A server's are too, because its many
        // processes are what a recording is usually about.
        if mm != UNSEEN || placed.facts.server != 0 {
            for &id in &placed.waiting {
                self.compiler.hurry(id);
            }
        }
        placed.write(kernel, pid, mm)?;
        self.given.insert(pid, (mm, key));
        Ok(())
    }

    /// Gives the kernel the address space of a process that was not sampled, for its future children to
    /// inherit. The entry has no kernel identity, so the process itself is not unwound by it.
    ///
    /// # Errors
    /// A map cannot be written.
    pub fn give_unseen(
        &mut self,
        kernel: &mut Kernel,
        objects: &mut Objects,
        pid: u32,
        space: &Rc<AddressSpace>,
    ) -> Result<(), Error> {
        if self.given.contains_key(&pid) && kernel.space(pid).is_some() {
            return Ok(());
        }
        self.give(kernel, objects, pid, UNSEEN, space)
    }

    /// Updates the kernel after the address space of a process has changed, if the kernel has an entry for
    /// the process.
    ///
    /// # Errors
    /// A map cannot be written.
    pub fn changed(
        &mut self,
        kernel: &mut Kernel,
        objects: &mut Objects,
        pid: u32,
        space: &Rc<AddressSpace>,
    ) -> Result<(), Error> {
        // A child has the entry that its parent had in the kernel at the fork, which may be older than what
        // is known here.
        match kernel.space(pid) {
            // Just after an exec nothing is mapped yet.
            Some(_) if space.mappings().is_empty() => {
                kernel.remove_space(pid);
                self.given.remove(&pid);
                Ok(())
            }
            Some(given) => self.give(kernel, objects, pid, given.mm, space),
            None => {
                self.given.remove(&pid);
                Ok(())
            }
        }
    }

    /// Forgets a process that has ended. The program at its exit has removed its entry from the kernel, but
    /// an entry that was written after that is still there.
    pub fn forget(&mut self, kernel: &mut Kernel, pid: u32) {
        if self.given.remove(&pid).is_some() {
            kernel.remove_space(pid);
        }
    }

    /// Forgets the processes that have ended without an event.
    pub fn forget_missing(&mut self, kernel: &mut Kernel, registry: &Registry) {
        self.given.retain(|pid, _| registry.living(*pid).is_some());
        // A process that the registry does not know may be new, so `/proc` is checked as well.
        for pid in kernel.spaces() {
            if registry.living(pid).is_none() && !exists(pid) {
                kernel.remove_space(pid);
            }
        }
    }

    /// The numbers of processes with an entry, of placed address spaces, of known tables, and of blocks in
    /// use.
    pub fn sizes(&self) -> [(&'static str, u64); 4] {
        [
            ("given", self.given.len() as u64),
            ("placed", self.placed.len() as u64),
            ("tables", self.states.len() as u64),
            ("blocks", self.pool.in_use() as u64),
        ]
    }

    /// Loads the tables that were compiled since the last call, and frees what is not used any more. Every
    /// event before `time` (nanoseconds) must have been seen.
    ///
    /// # Errors
    /// A map cannot be written.
    pub fn settle(
        &mut self,
        kernel: &mut Kernel,
        objects: &mut Objects,
        time: u64,
    ) -> Result<(), Error> {
        self.pool.settle(time);
        let mut arrived = HashSet::new();
        // An error concerns one table or one address space. The others are processed nevertheless.
        let mut result = Ok(());
        while let Some((id, table)) = self.compiler.finished() {
            result = result.and(self.load(kernel, id, table, time));
            arrived.insert(id);
        }
        if !arrived.is_empty() {
            let is_waiting = |placed: &PlacedSpace| !placed.waiting.is_disjoint(&arrived);
            result = result.and(self.replace(kernel, objects, time, usize::MAX, is_waiting));
        }
        if objects.settle() {
            let is_partial = |placed: &PlacedSpace| placed.is_partial;
            result = result.and(self.replace(kernel, objects, time, usize::MAX, is_partial));
        }
        self.sweep(time);
        if time >= self.looked + LOOK_EVERY {
            self.looked = time;
            result = result.and(self.look(kernel, objects, time));
        }
        result
    }

    /// Frees what is not used any more, and retries what failed for lack of room or because a file did not
    /// answer.
    fn look(&mut self, kernel: &mut Kernel, objects: &mut Objects, time: u64) -> Result<(), Error> {
        self.free_unused(time, &kernel.roots()?);
        let servers = self.placed.values().map(|placed| placed.facts.server);
        let servers = servers.collect();
        self.servers.evict(kernel, &servers)?;
        objects.retry_lost();
        self.states
            .retain(|_, state| !matches!(state, TableState::NotNow));
        let has_place = self.servers.has_place();
        self.replace(kernel, objects, time, MAX_RETRIED, |placed| {
            placed.is_partial || has_place && placed.facts.found_no_place
        })
    }

    /// Forgets the tables of objects that were closed. Their numbers are not used again.
    pub fn forget_objects(&mut self, time: u64, closed: &[ObjectId]) {
        for id in closed {
            self.coverage.forget(*id);
            if let Some(TableState::Loaded { blocks, .. }) = self.states.remove(id) {
                self.pool.retire(time, blocks);
            }
        }
    }

    /// The objects whose tables the address spaces in the kernel refer to, or wait for.
    pub fn referred(&self) -> impl Iterator<Item = ObjectId> + '_ {
        let placed = self.placed.values();
        placed.flat_map(|p| p.objects.iter().chain(&p.waiting).copied())
    }

    /// The process with the most mappings that were left out.
    pub fn most_mapped(&self) -> u32 {
        self.coverage.most_mapped
    }

    /// The number of compiler threads that are blocked on a file and were abandoned.
    pub fn abandoned(&self) -> usize {
        self.compiler.abandoned()
    }

    /// How much code the compiled tables cover.
    pub fn coverage(&self) -> UnwindTables {
        self.coverage.figures()
    }

    /// The number of blocks in use.
    pub fn blocks_in_use(&self) -> usize {
        self.pool.in_use()
    }

    fn load(
        &mut self,
        kernel: &mut Kernel,
        id: ObjectId,
        table: Result<Table, unwind::Error>,
        time: u64,
    ) -> Result<(), Error> {
        let mut result = Ok(());
        let state = match table {
            Ok(table) => {
                let state = self.write(kernel, &table, time).unwrap_or_else(|error| {
                    result = Err(error);
                    TableState::NotNow
                });
                if matches!(state, TableState::Loaded { .. }) {
                    self.coverage.add(id, &table);
                }
                state
            }
            Err(unwind::Error::NoUnwindInformation) => TableState::Absent,
            Err(unwind::Error::Unavailable) => TableState::NotNow,
            Err(error) => {
                log::debug!("object {}: {error}", id.0);
                TableState::Failed
            }
        };
        if matches!(state, TableState::Failed | TableState::NotNow) {
            self.coverage.add_failed(id);
        }
        self.states.insert(id, state);
        result
    }

    fn write(
        &mut self,
        kernel: &mut Kernel,
        table: &Table,
        time: u64,
    ) -> Result<TableState, Error> {
        let Ok(layout) = tree::layout(table) else {
            return Ok(TableState::Failed);
        };
        let Some(blocks) = self.pool.allocate(layout.blocks()) else {
            return Ok(TableState::NotNow);
        };
        let mut result = Ok(());
        let placement = layout.write(&blocks, |id, block| {
            if result.is_ok() {
                result = kernel.write_block(id, block);
            }
        });
        if let Err(error) = result {
            self.pool.give_back(blocks);
            return Err(error);
        }
        Ok(TableState::Loaded {
            table: Loaded {
                tree: pack_tree(MappingKind::Table, placement.depth, placement.root),
                rules: placement.rules_directory,
                base_svma: table.base_svma,
            },
            blocks,
            used: time,
        })
    }

    /// Writes an address space to the kernel. Returns false if there is no room for it.
    fn place(
        &mut self,
        kernel: &mut Kernel,
        objects: &mut Objects,
        pid: u32,
        address_space: &Rc<AddressSpace>,
        facts: Facts,
    ) -> Result<bool, Error> {
        let (mappings, files) = self.mappings(objects, pid, address_space);
        let Some(blocks) = self.pool.allocate(space::blocks(mappings.len())) else {
            return Ok(false);
        };
        let mut result = Ok(());
        let written = space::write(&mappings, &blocks, |id, block| {
            if result.is_ok() {
                result = kernel.write_block(id, &block.block());
            }
        });
        if let Err(error) = result {
            self.pool.give_back(blocks);
            return Err(error);
        }
        let left_out = mappings.len() - space::placeable(&mappings).len();
        self.coverage.left_out(pid, left_out as u64);
        let (root, depth) = (written.root, written.depth);
        // The number wraps around after four billion, but never becomes 0, which marks an empty cache.
        self.last_number = self.last_number.wrapping_add(1).max(1);
        self.attempts += 1;
        let placed = PlacedSpace {
            attempt: self.attempts,
            facts,
            space: Rc::clone(address_space),
            root,
            depth,
            number: self.last_number,
            blocks,
            objects: files.used,
            waiting: files.waiting,
            is_partial: files.is_partial,
        };
        self.placed.insert(Rc::as_ptr(address_space), placed);
        Ok(true)
    }

    fn mappings(
        &mut self,
        objects: &mut Objects,
        pid: u32,
        space: &AddressSpace,
    ) -> (Vec<MappingEntry>, Files) {
        let mut files = Files::default();
        let mut mappings = Vec::with_capacity(space.mappings().len());
        for mapping in space.mappings() {
            let mut entry = MappingEntry {
                start: mapping.start,
                end: mapping.end,
                bias: 0,
                tree: pack_tree(MappingKind::FramePointer, 0, 0),
                rules: 0,
            };
            let pending = pack_tree(MappingKind::Pending, 0, 0);
            match objects.backing(pid, mapping) {
                Backing::Private => {}
                Backing::Lost => {
                    entry.tree = pending;
                    files.is_partial = true;
                }
                Backing::Object(id) => match self.state(objects, id) {
                    TableState::Loaded { table, .. } => {
                        let table = *table;
                        if let Some(bias) = objects.get(id).and_then(|o| o.bias(mapping)) {
                            entry.bias = bias.wrapping_add(table.base_svma);
                            entry.tree = table.tree;
                            entry.rules = table.rules;
                            files.used.push(id);
                        }
                    }
                    TableState::Absent => {}
                    TableState::Failed => entry.tree = pending,
                    TableState::NotNow => {
                        entry.tree = pending;
                        files.is_partial = true;
                    }
                    TableState::Building => {
                        entry.tree = pending;
                        files.waiting.insert(id);
                    }
                },
            }
            mappings.push(entry);
        }
        (mappings, files)
    }

    /// The state of an object's table. If it was not requested before, the compiler is asked for it.
    fn state(&mut self, objects: &Objects, id: ObjectId) -> &TableState {
        let compiler = &mut self.compiler;
        self.states.entry(id).or_insert_with(|| {
            let asked = objects
                .get(id)
                .is_some_and(|object| compiler.ask(id, &object.image));
            match asked {
                true => TableState::Building,
                false => TableState::NotNow,
            }
        })
    }

    /// Writes the wanted address spaces again, because more of their tables or files may be available now;
    /// at most `most` of them.
    fn replace(
        &mut self,
        kernel: &mut Kernel,
        objects: &mut Objects,
        time: u64,
        most: usize,
        is_wanted: impl Fn(&PlacedSpace) -> bool,
    ) -> Result<(), Error> {
        let wanted = self.placed.iter().filter(|(_, placed)| is_wanted(placed));
        let mut wanted: Vec<_> = wanted.map(|(key, placed)| (placed.attempt, *key)).collect();
        // The ones that were written longest ago come first, so that those that stay incomplete do not keep
        // the others from their turn.
        wanted.sort_unstable_by_key(|(attempt, _)| *attempt);
        let mut result = Ok(());
        for (_, key) in wanted.into_iter().take(most) {
            let Some(old) = self.placed.remove(&key) else {
                continue;
            };
            let users: Vec<_> = self
                .given
                .iter()
                .filter(|(_, (_, space))| *space == key)
                .map(|(pid, (mm, _))| (*pid, *mm))
                .collect();
            let pid = users.first().map_or(0, |(pid, _)| *pid);
            let is_placed = self.place_again(kernel, objects, pid, &old);
            if let Ok(true) = is_placed {
                for (pid, mm) in users {
                    let written = self.placed[&key].write(kernel, pid, mm);
                    if written.is_err() {
                        // The entry must not refer to blocks that will be reused. The process's next sample
                        // asks for a new entry.
                        kernel.remove_space(pid);
                        self.given.remove(&pid);
                    }
                    result = result.and(written);
                }
                self.pool.retire(time, old.blocks);
            } else {
                // There was no room, or an error occurred. The processes keep their present entry, and it
                // is retried later.
                self.attempts += 1;
                let placed = PlacedSpace {
                    attempt: self.attempts,
                    waiting: HashSet::new(),
                    is_partial: true,
                    ..old
                };
                self.placed.insert(key, placed);
                result = result.and(is_placed.map(drop));
            }
        }
        result
    }

    /// Writes an address space again. Returns false if there is no room for it.
    fn place_again(
        &mut self,
        kernel: &mut Kernel,
        objects: &mut Objects,
        pid: u32,
        old: &PlacedSpace,
    ) -> Result<bool, Error> {
        // The file that identifies a server may be the one that was unavailable before.
        let facts = match old.is_partial || old.facts.found_no_place {
            true => self.servers.facts(kernel, objects, pid, &old.space)?,
            false => old.facts,
        };
        self.place(kernel, objects, pid, &old.space, facts)
    }

    /// Frees the address spaces that neither a known process nor an entry in the kernel uses any more.
    fn sweep(&mut self, time: u64) {
        let (pool, given) = (&mut self.pool, &self.given);
        self.placed.retain(|key, placed| {
            // `placed.space` itself holds one reference.
            let used = Rc::strong_count(&placed.space) > 1
                || given.values().any(|(_, space)| space == key);
            if !used {
                pool.retire(time, std::mem::take(&mut placed.blocks));
            }
            used
        });
    }

    /// Frees the address spaces that no process has in the kernel, even if the agent still remembers an
    /// ended process that had one, and the tables that no address space has referred to for a minute.
    /// `roots` are the roots of the address spaces that are in use in the kernel. A child that was forked a
    /// moment ago may still use a freed address space. That is safe, because its blocks rest before they
    /// are reused, and the child is given an entry of its own.
    fn free_unused(&mut self, time: u64, roots: &HashSet<BlockId>) {
        let pool = &mut self.pool;
        self.placed.retain(|_, placed| {
            let used = roots.contains(&placed.root);
            if !used {
                pool.retire(time, std::mem::take(&mut placed.blocks));
            }
            used
        });
        let placed = &self.placed;
        self.given
            .retain(|_, (_, space)| placed.contains_key(space));
        let placed = self.placed.values();
        let referred: HashSet<ObjectId> = placed.flat_map(|p| p.objects.iter().copied()).collect();
        self.states.retain(|id, state| {
            let TableState::Loaded { blocks, used, .. } = state else {
                return true;
            };
            if referred.contains(id) {
                *used = time;
            }
            let keep = time < *used + UNUSED_FOR;
            if !keep {
                pool.retire(time, std::mem::take(blocks));
            }
            keep
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table is freed when no address space has referred to it for a minute, and its blocks are reused
    /// only after all events up to then have been seen.
    #[test]
    fn unused_tables_are_freed() {
        let mut tables = Tables::new();
        for id in [1, 2] {
            let table = Loaded {
                tree: 0,
                rules: 0,
                base_svma: 0,
            };
            let blocks = tables.pool.allocate(3).unwrap();
            let used = 0;
            let state = TableState::Loaded {
                table,
                blocks,
                used,
            };
            tables.states.insert(ObjectId(id), state);
        }
        let space = Rc::new(AddressSpace::default());
        let placed = PlacedSpace {
            attempt: 1,
            facts: Facts::default(),
            number: 1,
            space: Rc::clone(&space),
            root: 6,
            depth: 0,
            blocks: tables.pool.allocate(1).unwrap(),
            objects: vec![ObjectId(1)],
            waiting: HashSet::new(),
            is_partial: false,
        };
        tables.placed.insert(Rc::as_ptr(&space), placed);
        let kept = |tables: &Tables| {
            let mut ids: Vec<u32> = tables.states.keys().map(|id| id.0).collect();
            ids.sort_unstable();
            ids
        };
        let roots = HashSet::from([6]);
        tables.given.insert(7, (1, Rc::as_ptr(&space)));
        tables.free_unused(30 * SECOND, &roots);
        assert_eq!(kept(&tables), [1, 2]);
        tables.free_unused(60 * SECOND, &roots);
        assert_eq!(kept(&tables), [1]);
        tables.pool.settle(60 * SECOND);
        assert_eq!(tables.blocks_in_use(), 7, "retired blocks are not free yet");
        tables.pool.settle(60 * SECOND + 1);
        assert_eq!(tables.blocks_in_use(), 4);
        // The process ends, and its address space is still remembered. A minute later the other table is
        // freed too.
        let none = HashSet::new();
        tables.free_unused(119 * SECOND, &none);
        assert_eq!(kept(&tables), [1]);
        assert!(tables.placed.is_empty() && tables.given.is_empty());
        tables.free_unused(130 * SECOND, &none);
        assert!(kept(&tables).is_empty());
        tables.pool.settle(131 * SECOND);
        assert_eq!(tables.blocks_in_use(), 0);
    }
}
