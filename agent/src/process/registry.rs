//! Every process that is known, and its address space.

use std::{
    collections::{HashMap, VecDeque},
    path::PathBuf,
    rc::Rc,
};

use super::{
    proc::{mapped_objects, parent_of, pids, process_exe, process_name},
    space::AddressSpace,
};
use crate::kernel::{Event, EventKind, MappedObject};

/// Processes that have ended and are still remembered: a first thread may end before the others,
/// whose samples then still find their mappings.
const REMEMBERED: usize = 1024;

/// A process.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its pid.
    pub pid: u32,
    /// Its name: that of its first thread.
    pub name: String,
    /// Path of its executable, as it sees it.
    pub exe: PathBuf,
    /// What it has mapped.
    pub space: Rc<AddressSpace>,
    /// The process that forked it.
    pub parent: Option<u32>,
    /// Tells one run of a program from the next: changes with every fork, exec and new name.
    pub incarnation: u64,
    /// Tells one program that was started from the next: changes with an exec only, so that it is also a
    /// forked child's.
    pub image: u64,
    /// When it was forked, nanoseconds, if it still runs what its parent did.
    pub forked: Option<u64>,
}

/// All processes.
#[derive(Debug, Default)]
pub struct Registry {
    processes: HashMap<u32, Process>,
    ended: VecDeque<(u32, u64)>,
    incarnations: u64,
}

impl Registry {
    /// Reads every process there is. Events must already be flowing, so that none falls between.
    pub fn scan(&mut self) {
        for pid in pids() {
            self.scan_process(pid);
        }
    }

    fn scan_process(&mut self, pid: u32) -> Option<&Process> {
        let name = process_name(pid)?;
        let incarnation = self.next_incarnation();
        let process = Process {
            pid,
            name,
            exe: process_exe(pid).unwrap_or_default(),
            space: Rc::new(AddressSpace::new(mapped_objects(pid))),
            parent: parent_of(pid),
            incarnation,
            image: incarnation,
            forked: None,
        };
        self.processes.insert(pid, process);
        self.processes.get(&pid)
    }

    /// A process; one that was missed so far is read from `/proc`.
    pub fn get(&mut self, pid: u32) -> Option<&Process> {
        if self.processes.contains_key(&pid) {
            return self.processes.get(&pid);
        }
        self.scan_process(pid)
    }

    /// A process, if it is known.
    pub fn known(&self, pid: u32) -> Option<&Process> {
        self.processes.get(&pid)
    }

    /// All processes that are known.
    pub fn iter(&self) -> impl Iterator<Item = &Process> {
        self.processes.values()
    }

    /// Takes up what has happened to a process. True when its address space is another than before.
    pub fn apply(&mut self, event: Event) -> bool {
        let pid = event.pid;
        match event.kind {
            EventKind::Fork { parent } => {
                let incarnation = self.next_incarnation();
                let Some(parent) = self.processes.get(&parent) else {
                    return false;
                };
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
                };
                self.processes.insert(pid, process);
                true
            }
            EventKind::Rename { tid, name } => {
                let incarnation = self.next_incarnation();
                if let Some(process) = self.processes.get_mut(&pid)
                    && tid == pid
                {
                    process.name = name;
                    process.incarnation = incarnation;
                }
                false
            }
            EventKind::Exit => {
                self.end(pid);
                false
            }
            EventKind::Map(mapping) => self.map(pid, mapping),
        }
    }

    fn map(&mut self, pid: u32, mapping: MappedObject) -> bool {
        let Some(process) = self.processes.get_mut(&pid) else {
            // Not known: it will be read whole when it is first sampled.
            return false;
        };
        if process.space.contains(&mapping) {
            return false;
        }
        // In place, unless others share it.
        Rc::make_mut(&mut process.space).add(mapping)
    }

    fn end(&mut self, pid: u32) {
        let Some(process) = self.processes.get(&pid) else {
            return;
        };
        self.ended.push_back((pid, process.incarnation));
        if self.ended.len() <= REMEMBERED {
            return;
        }
        if let Some((pid, incarnation)) = self.ended.pop_front()
            && self
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

#[cfg(test)]
mod tests {
    use super::*;

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

    /// A child shares its parent's space until it maps something itself; an exec starts empty.
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

    /// Processes that ended are forgotten in the end, unless their pid lives again.
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
    }
}
