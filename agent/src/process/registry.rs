//! All processes that are known, and their address spaces.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    rc::Rc,
};

use super::{
    proc::{exists, has_threads, living_thread, parent_of, pids, process_exe, process_name},
    space::AddressSpace,
};
use crate::kernel::{Event, EventKind, MappedObject};

/// Maximum number of ended processes that are remembered. Records that are read later may refer
/// to them: a statement refers to the process that sent it.
pub const REMEMBERED: usize = 1024;

/// Maximum number of changes of a process's name that are followed. Each one makes it another
/// process in the profile.
const MAX_RENAMES: u32 = 64;

/// Maximum number of processes without their first thread that are checked in one call.
const MAX_LOOKS: usize = 64;

/// A process.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    /// Its name, which is that of its first thread.
    pub name: String,
    /// Path of its executable, as the process sees it.
    pub exe: PathBuf,
    /// Its executable mappings.
    pub space: Rc<AddressSpace>,
    /// The process that forked it, if known.
    pub parent: Option<u32>,
    /// Distinguishes one run of a program from the next: changes with every fork, exec and new name.
    pub incarnation: u64,
    /// Distinguishes one started program from the next: changes only with an exec, so a forked
    /// child has its parent's.
    pub image: u64,
    /// When it was forked, nanoseconds; `None` if it has called exec since, or the fork was not seen.
    pub forked: Option<u64>,
    /// How often its name has changed, up to the number that is followed.
    pub renames: u32,
}

/// Reads the executable mappings of a process. Returns `None` if that takes too long, because
/// the kernel may make it wait for locks that the process holds.
pub type MappingReader<'a> = &'a mut dyn FnMut(u32) -> Option<Vec<MappedObject>>;

/// The processes that are known.
#[derive(Debug, Default)]
pub struct Registry {
    processes: HashMap<u32, Process>,
    /// Those of the processes that have ended, oldest first, and their incarnations.
    ended: VecDeque<(u32, u64)>,
    /// The incarnations of ended processes, by pid.
    last_ended: HashMap<u32, u64>,
    /// Processes that have, or have had, more than one thread.
    threaded: HashSet<u32>,
    /// Processes whose first thread has ended, and perhaps all others too. True if it must be
    /// checked whether any is alive.
    leaderless: HashMap<u32, bool>,
    /// Processes whose mappings must be read again: they could not be read in time, or seem to
    /// be more than are kept (some may be unmapped, which the kernel does not report).
    incomplete: HashSet<u32>,
    incarnations: u64,
}

impl Registry {
    /// Reads all processes from `/proc`. Events must already be recorded, so that no process is missed in between.
    pub fn scan(&mut self, read: MappingReader<'_>) {
        for pid in pids() {
            self.scan_process(pid, read);
        }
    }

    fn scan_process(&mut self, pid: u32, read: MappingReader<'_>) -> Option<&Process> {
        let name = process_name(pid)?;
        if has_threads(pid) {
            self.threaded.insert(pid);
        }
        let incarnation = self.next_incarnation();
        let mappings = read(pid);
        if mappings.is_none() {
            self.incomplete.insert(pid);
        }
        let process = Process {
            pid,
            name,
            exe: process_exe(pid).unwrap_or_default(),
            space: Rc::new(AddressSpace::new(mappings.unwrap_or_default())),
            parent: parent_of(pid),
            incarnation,
            image: incarnation,
            forked: None,
            renames: 0,
        };
        self.processes.insert(pid, process);
        self.processes.get(&pid)
    }

    /// A process; it is read from `/proc` if it is not known yet.
    pub fn get(&mut self, pid: u32, read: MappingReader<'_>) -> Option<&Process> {
        if self.processes.contains_key(&pid) {
            return self.processes.get(&pid);
        }
        self.scan_process(pid, read)
    }

    /// A process, if it is known. It may have ended.
    pub fn known(&self, pid: u32) -> Option<&Process> {
        self.processes.get(&pid)
    }

    /// A process, if it is known and has not ended.
    pub fn living(&self, pid: u32) -> Option<&Process> {
        let process = self.processes.get(&pid)?;
        (self.last_ended.get(&pid) != Some(&process.incarnation)).then_some(process)
    }

    /// Whether a process is known to have ended.
    pub fn has_ended(&self, pid: u32) -> bool {
        self.processes.contains_key(&pid) && self.living(pid).is_none()
    }

    /// Pids of the living processes, the youngest first.
    pub fn youngest_first(&self) -> Vec<u32> {
        let mut living: Vec<&Process> = self
            .iter()
            .filter(|p| self.living(p.pid).is_some())
            .collect();
        living.sort_unstable_by_key(|process| std::cmp::Reverse(process.incarnation));
        living.into_iter().map(|process| process.pid).collect()
    }

    /// Processes whose mappings must be read again.
    pub fn incomplete(&self) -> impl Iterator<Item = u32> {
        self.incomplete.iter().copied()
    }

    /// The number of known processes, and how many of them have ended.
    pub fn sizes(&self) -> (usize, usize) {
        (self.processes.len(), self.last_ended.len())
    }

    /// All processes that are known.
    pub fn iter(&self) -> impl Iterator<Item = &Process> {
        self.processes.values()
    }

    /// Applies an event. Returns true if the process's address space is a different one now.
    pub fn apply(&mut self, event: Event) -> bool {
        let pid = event.pid;
        match event.kind {
            EventKind::Fork { parent } => {
                self.begin(pid);
                let incarnation = self.next_incarnation();
                let Some(parent) = self.processes.get(&parent) else {
                    return false;
                };
                if self.incomplete.contains(&parent.pid) {
                    self.incomplete.insert(pid);
                }
                let child = Process {
                    pid,
                    parent: Some(parent.pid),
                    incarnation,
                    forked: Some(event.time),
                    ..parent.clone()
                };
                self.processes.insert(pid, child);
                true
            }
            EventKind::Exec { name } => {
                self.begin(pid);
                let incarnation = self.next_incarnation();
                let process = Process {
                    pid,
                    name,
                    exe: process_exe(pid).unwrap_or_default(),
                    space: Rc::default(),
                    parent: self.processes.get(&pid).and_then(|before| before.parent),
                    incarnation,
                    image: incarnation,
                    forked: None,
                    renames: 0,
                };
                self.processes.insert(pid, process);
                true
            }
            EventKind::Rename { tid, name } => {
                let incarnation = self.next_incarnation();
                if let Some(process) = self.processes.get_mut(&pid)
                    && tid == pid
                    && process.renames < MAX_RENAMES
                {
                    process.name = name;
                    process.incarnation = incarnation;
                    process.renames += 1;
                }
                false
            }
            EventKind::Thread => {
                self.threaded.insert(pid);
                false
            }
            EventKind::Exit => {
                // Most processes have one thread, and then `/proc` need not be read.
                if self.threaded.contains(&pid) {
                    self.leaderless.insert(pid, true);
                } else {
                    self.end(pid);
                }
                false
            }
            EventKind::ThreadExit => {
                if let Some(look) = self.leaderless.get_mut(&pid) {
                    *look = true;
                }
                false
            }
            EventKind::Map(mapping) => self.map(pid, mapping),
        }
    }

    /// Forgets what was known about the threads and mappings behind a pid: it belongs to a new
    /// process, to one that has a single thread after an exec, or to none any more.
    fn begin(&mut self, pid: u32) {
        self.threaded.remove(&pid);
        self.leaderless.remove(&pid);
        self.incomplete.remove(&pid);
    }

    /// Ends the processes whose first thread ended before, and whose last thread has ended by
    /// now. Returns their pids.
    pub fn end_leaderless(&mut self) -> Vec<u32> {
        let to_look = self.leaderless.iter_mut().filter(|(_, look)| **look);
        let looked: Vec<u32> = to_look
            .take(MAX_LOOKS)
            .map(|(pid, look)| {
                *look = false;
                *pid
            })
            .collect();
        let ended = looked
            .into_iter()
            .filter(|pid| living_thread(*pid).is_none());
        let ended: Vec<u32> = ended.collect();
        for &pid in &ended {
            self.end(pid);
        }
        ended
    }

    /// Ends the processes that no longer exist, although no event has reported their end. Returns their pids.
    pub fn end_missing(&mut self) -> Vec<u32> {
        for look in self.leaderless.values_mut() {
            *look = true;
        }
        let pids = self.processes.keys().copied();
        let missing: Vec<u32> = pids
            .filter(|pid| self.living(*pid).is_some() && !exists(*pid))
            .collect();
        for &pid in &missing {
            self.end(pid);
        }
        self.threaded.retain(|pid| exists(*pid));
        missing
    }

    /// Reads a living process again, after events were missed. Returns true if its address
    /// space differs from what was known.
    pub fn read_again(&mut self, pid: u32, read: MappingReader<'_>) -> bool {
        let Some(mappings) = read(pid) else {
            return false;
        };
        let exe = process_exe(pid).unwrap_or_default();
        // An empty answer means that it has ended. If its pid is in use again, events report the new process.
        let is_whole = !mappings.is_empty() && !exe.as_os_str().is_empty();
        let Some(name) = process_name(pid).filter(|_| is_whole) else {
            return false;
        };
        self.incomplete.remove(&pid);
        let was = self.living(pid).cloned();
        let Some(was) = was.filter(|was| program(&was.exe) == program(&exe)) else {
            self.last_ended.remove(&pid);
            return self.scan_process(pid, read).is_some();
        };
        let space = AddressSpace::new(mappings);
        if space.is_like(&was.space) && name == was.name {
            return false;
        }
        let is_like = space.is_like(&was.space);
        let incarnation = match name == was.name {
            true => was.incarnation,
            false => self.next_incarnation(),
        };
        let process = Process {
            name,
            incarnation,
            space: if is_like {
                was.space.clone()
            } else {
                Rc::new(space)
            },
            ..was
        };
        self.processes.insert(pid, process);
        !is_like
    }

    fn map(&mut self, pid: u32, mapping: MappedObject) -> bool {
        let Some(process) = self.processes.get_mut(&pid) else {
            // An unknown process is read from `/proc` when it is first sampled.
            return false;
        };
        if process.space.is_up_to_date(&mapping) {
            return false;
        }
        // This changes the address space in place, unless other processes share it.
        let has_room = Rc::make_mut(&mut process.space).add(mapping);
        if !has_room {
            self.incomplete.insert(pid);
        }
        has_room
    }

    fn end(&mut self, pid: u32) {
        self.begin(pid);
        let Some(process) = self.living(pid) else {
            return;
        };
        let incarnation = process.incarnation;
        self.ended.push_back((pid, incarnation));
        self.last_ended.insert(pid, incarnation);
        if self.ended.len() <= REMEMBERED {
            return;
        }
        let Some((pid, incarnation)) = self.ended.pop_front() else {
            return;
        };
        // The pid may belong to a new process by now.
        if self.last_ended.get(&pid) == Some(&incarnation) {
            self.last_ended.remove(&pid);
        }
        if self
            .processes
            .get(&pid)
            .is_some_and(|p| p.incarnation == incarnation)
        {
            self.processes.remove(&pid);
        }
    }

    fn next_incarnation(&mut self) -> u64 {
        self.incarnations += 1;
        self.incarnations
    }
}

/// A path without the suffix that the kernel appends if the file was deleted.
fn program(exe: &Path) -> &[u8] {
    let path = exe.as_os_str().as_bytes();
    path.strip_suffix(b" (deleted)").unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::mapped_objects;

    fn mapping(start: u64, end: u64, offset: u64) -> MappedObject {
        MappedObject {
            start,
            end,
            offset,
            file: None,
            name: PathBuf::from(format!("{start:x}")),
        }
    }

    fn event(pid: u32, kind: EventKind) -> Event {
        Event { time: 0, pid, kind }
    }

    /// A child shares its parent's address space until it maps something itself. An exec starts with an empty one.
    #[test]
    fn fork_map_exec() {
        let mut registry = Registry::default();
        registry.apply(event(1, EventKind::Exec { name: "a".into() }));
        registry.apply(event(1, EventKind::Map(mapping(0x1000, 0x2000, 0))));
        assert!(registry.apply(event(2, EventKind::Fork { parent: 1 })));
        let parent = registry.processes[&1].space.clone();
        assert!(Rc::ptr_eq(&parent, &registry.processes[&2].space));
        assert_eq!(registry.processes[&1].image, registry.processes[&2].image);
        assert_eq!(registry.processes[&2].forked, Some(0));
        assert!(registry.apply(event(2, EventKind::Map(mapping(0x5000, 0x6000, 0)))));
        assert!(!Rc::ptr_eq(&parent, &registry.processes[&2].space));
        assert_eq!(registry.processes[&1].space.mappings().len(), 1);
        assert_eq!(registry.processes[&2].space.mappings().len(), 2);
        registry.apply(event(2, EventKind::Exec { name: "b".into() }));
        assert!(registry.processes[&2].space.mappings().is_empty());
        assert_eq!(registry.processes[&2].name, "b");
        assert_ne!(registry.processes[&1].image, registry.processes[&2].image);
        assert_eq!(registry.processes[&2].forked, None);
    }

    /// Ended processes are forgotten eventually. One whose pid is in use again is kept.
    #[test]
    fn ended_processes() {
        let mut registry = Registry::default();
        for pid in 1..=REMEMBERED as u32 + 10 {
            registry.apply(event(
                pid,
                EventKind::Exec {
                    name: String::new(),
                },
            ));
            registry.apply(event(pid, EventKind::Exit));
            if pid == 1 {
                registry.apply(event(
                    1,
                    EventKind::Exec {
                        name: "again".into(),
                    },
                ));
            }
        }
        assert_eq!(registry.processes.len(), REMEMBERED + 1);
        assert_eq!(registry.processes[&1].name, "again");
        assert_eq!(registry.sizes(), (REMEMBERED + 1, REMEMBERED));
        assert!(registry.living(1).is_some() && registry.has_ended(1024));
    }

    /// A process is alive as long as any of its threads is. The test's own process stands for such a process.
    #[test]
    fn a_process_outlives_its_first_thread() {
        let mut registry = Registry::default();
        let pid = std::process::id();
        let name = String::new();
        registry.apply(event(pid, EventKind::Exec { name }));
        registry.apply(event(pid, EventKind::Thread));
        registry.apply(event(pid, EventKind::Exit));
        assert!(registry.end_leaderless().is_empty());
        assert!(registry.living(pid).is_some());
        // No process has this pid.
        let gone = u32::MAX;
        let name = String::new();
        registry.apply(event(gone, EventKind::Exec { name }));
        registry.apply(event(gone, EventKind::Thread));
        registry.apply(event(gone, EventKind::Exit));
        assert!(registry.living(gone).is_some());
        assert_eq!(registry.end_leaderless(), [gone]);
        assert!(registry.has_ended(gone));
    }

    /// A process whose mappings could not be read in time is read again until they can be, and so are its children.
    #[test]
    fn mappings_that_are_not_read_in_time() {
        let mut registry = Registry::default();
        let own = std::process::id();
        registry.scan_process(own, &mut |_| None);
        registry.apply(event(u32::MAX, EventKind::Fork { parent: own }));
        let mut incomplete: Vec<u32> = registry.incomplete().collect();
        incomplete.sort_unstable();
        assert_eq!(incomplete, [own, u32::MAX]);
        registry.apply(event(u32::MAX, EventKind::Exit));
        assert!(!registry.read_again(own, &mut |_| None));
        assert_eq!(registry.incomplete().collect::<Vec<_>>(), [own]);
        assert!(registry.read_again(own, &mut |pid| mapped_objects(pid).ok()));
        assert_eq!(registry.incomplete().count(), 0);
        assert!(!registry.processes[&own].space.mappings().is_empty());
    }

    /// A process that ended without an event is found, and so are mappings without an event.
    #[test]
    fn missed_events_are_made_up_for() {
        let mut registry = Registry::default();
        let (own, gone) = (std::process::id(), u32::MAX);
        let name = String::new();
        registry.apply(event(gone, EventKind::Exec { name }));
        registry.scan_process(own, &mut |pid| mapped_objects(pid).ok());
        assert_eq!(registry.end_missing(), [gone]);
        assert!(registry.living(own).is_some() && registry.has_ended(gone));
        assert!(
            !registry.read_again(own, &mut |pid| mapped_objects(pid).ok()),
            "nothing was missed"
        );
        let known = registry.processes.get_mut(&own).unwrap();
        known.space = Rc::default();
        let incarnation = known.incarnation;
        assert!(registry.read_again(own, &mut |pid| mapped_objects(pid).ok()));
        assert!(!registry.processes[&own].space.mappings().is_empty());
        assert_eq!(registry.processes[&own].incarnation, incarnation);
        registry.processes.get_mut(&own).unwrap().exe = "/another".into();
        assert!(registry.read_again(own, &mut |pid| mapped_objects(pid).ok()));
        assert_ne!(registry.processes[&own].incarnation, incarnation);
    }
}
