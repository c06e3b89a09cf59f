//! The processes of a window, by their incarnations.

use std::{collections::HashMap, path::PathBuf, rc::Rc};

use crate::{
    pool::{Subject, WorkerPool},
    process::{Process, Registry, service},
    profile::{self, MAX_PROGRAMS, ProcessIndex, Window},
    recent::Recent,
};

/// How long a forked child has to live before it is asked for a service of its own, nanoseconds. To ask is to
/// read its mappings, which costs as much as a few of its samples, and servers fork workers for every statement.
const SETTLED: u64 = 1_000_000_000;

/// A process in the window.
#[derive(Debug)]
struct WindowProcess {
    index: ProcessIndex,
    /// When it is to be asked for what it publishes, nanoseconds; `None` when it was.
    ask: Option<u64>,
    /// Whether it has sent something to a server.
    is_client: bool,
}

/// Images whose environment one half of [`Recent`] remembers.
const MAX_ENVIRONMENTS: usize = 4096;

/// The processes that were added to a window.
#[derive(Debug)]
pub struct Processes {
    /// By incarnation.
    known: HashMap<u64, WindowProcess>,
    /// Services in the environments with which programs were started, by image.
    environments: Recent<u64, String>,
    /// Those that stand for all processes of a program, by its name and path.
    programs: HashMap<(String, PathBuf), ProcessIndex>,
    /// Stands for the processes of programs for which there was no room.
    others: Option<ProcessIndex>,
}

impl Processes {
    /// None yet.
    pub fn new() -> Processes {
        Processes {
            known: HashMap::new(),
            environments: Recent::new(MAX_ENVIRONMENTS),
            programs: HashMap::new(),
            others: None,
        }
    }

    /// The process of a pid, seen at `time` (nanoseconds); `name` for one of which nothing is known.
    pub fn of_pid(
        &mut self,
        window: &mut Window,
        (pid, time): (u32, u64),
        name: &str,
        registry: &mut Registry,
        pool: &mut WorkerPool,
    ) -> ProcessIndex {
        if let Some(process) = registry.get(pid, &mut |pid| pool.mapped_objects(pid)) {
            return self.index(window, process, time, pool);
        }
        let unknown = Process {
            pid,
            name: name.to_owned(),
            exe: PathBuf::new(),
            space: Rc::default(),
            parent: None,
            incarnation: nobody(pid),
            image: nobody(pid),
            forked: None,
            renames: 0,
        };
        self.index(window, &unknown, time, pool)
    }

    fn index(
        &mut self,
        window: &mut Window,
        process: &Process,
        time: u64,
        pool: &mut WorkerPool,
    ) -> ProcessIndex {
        if let Some(known) = self.known.get_mut(&process.incarnation) {
            if known.ask.is_some_and(|ask| time >= ask) {
                known.ask = None;
                if let Some(name) = ask(pool, process.pid, service::published) {
                    rename(window, known.index, name);
                }
            }
            return known.index;
        }
        if window.is_crowded() {
            return self.program(window, process);
        }
        let ask = process.forked.map(|forked| forked.saturating_add(SETTLED));
        let ask = ask.filter(|ask| time < *ask);
        let published = match ask {
            None => self::ask(pool, process.pid, service::published),
            Some(_) => None,
        };
        let service = published.unwrap_or_else(|| self.environment(process, pool));
        let added = window.add_process(profile::Process {
            pid: process.pid,
            name: process.name.clone(),
            exe: process.exe.to_string_lossy().into_owned(),
            service,
        });
        let Some(index) = added else {
            return self.program(window, process);
        };
        let known = WindowProcess {
            index,
            ask,
            is_client: false,
        };
        self.known.insert(process.incarnation, known);
        index
    }

    /// Stands for all processes of a program that are not told apart.
    fn program(&mut self, window: &mut Window, process: &Process) -> ProcessIndex {
        let key = (process.name.clone(), process.exe.clone());
        if let Some(index) = self.programs.get(&key) {
            return *index;
        }
        if self.programs.len() >= MAX_PROGRAMS {
            return *self.others.get_or_insert_with(|| window.add_program(None));
        }
        let exe = process.exe.to_string_lossy();
        let index = window.add_program(Some((&process.name, &exe)));
        self.programs.insert(key, index);
        index
    }

    /// Programs whose processes were not all told apart.
    pub fn programs(&self) -> usize {
        self.programs.len()
    }

    /// The service in the environment of a process; empty for none.
    fn environment(&mut self, process: &Process, pool: &mut WorkerPool) -> String {
        if let Some(known) = self.environments.get(&process.image) {
            return known;
        }
        let Some(read) = ask(pool, process.pid, service::in_environment) else {
            return String::new();
        };
        self.environments.insert(process.image, read.clone());
        read
    }

    /// A process has sent something to a server, so it is ready with its start: at its first sample it may not
    /// have said its service yet, and at the end of the recording it may have gone.
    pub fn sent(
        &mut self,
        window: &mut Window,
        pid: u32,
        registry: &Registry,
        pool: &mut WorkerPool,
    ) {
        let incarnation = registry.known(pid).map_or(nobody(pid), |p| p.incarnation);
        if let Some(known) = self.known.get_mut(&incarnation)
            && !std::mem::replace(&mut known.is_client, true)
            && let Some(name) = ask(pool, pid, service::name_of)
        {
            known.ask = None;
            rename(window, known.index, name);
        }
    }

    /// Asks the processes that are still there once more for their service.
    pub fn learn_services(&self, window: &mut Window, registry: &Registry, pool: &mut WorkerPool) {
        for process in registry.iter() {
            if let Some(known) = self.known.get(&process.incarnation)
                && let Some(name) = ask(pool, process.pid, service::name_of)
            {
                rename(window, known.index, name);
            }
        }
    }
}

/// Asks a process for its service. That reads its memory, which can wait for whoever answers for it.
fn ask(pool: &mut WorkerPool, pid: u32, question: fn(u32) -> Option<String>) -> Option<String> {
    let answer = pool.call(Subject::process(pid), move || question(pid));
    answer.done().flatten()
}

fn rename(window: &mut Window, index: ProcessIndex, service: String) {
    if let Some(process) = window.process_mut(index) {
        process.service = service;
    }
}

/// Stands for the incarnation of a process of which nothing is known.
pub fn nobody(pid: u32) -> u64 {
    u64::MAX - u64::from(pid)
}

#[cfg(test)]
mod tests {
    use agent_ebpf::sample::Outcome;

    use super::*;

    fn process(pid: u32, name: &str) -> Process {
        Process {
            pid,
            name: name.to_owned(),
            exe: PathBuf::from("/bin").join(name),
            space: Rc::default(),
            parent: None,
            incarnation: u64::from(pid),
            image: u64::from(pid),
            forked: None,
            renames: 0,
        }
    }

    fn sample(process: ProcessIndex, tid: u32) -> profile::RawSample<'static> {
        profile::RawSample {
            process,
            tid,
            thread_name: [0; 16],
            outcome: Outcome::Complete,
            kernel: &[],
            user: &[],
            attribution: None,
            starts_execution: false,
        }
    }

    /// Rows crowd a window as processes do.
    #[test]
    fn rows_that_crowd_a_window() {
        let mut window = Window::new();
        let process = window.add_process(profile::Process {
            pid: 1,
            name: String::new(),
            exe: String::new(),
            service: String::new(),
        });
        let process = process.expect("the first");
        for tid in 0.. {
            if window.is_crowded() {
                break;
            }
            window.add(&sample(process, tid));
        }
        assert_eq!(window.rows().len(), profile::MAX_ROWS / 2);
    }

    /// In a crowded window processes that are new are counted by program, and those that were there before as before.
    #[test]
    fn a_crowded_window() {
        let (mut window, mut pool) = (Window::new(), WorkerPool::new());
        let mut processes = Processes::new();
        let gone = u32::MAX;
        let first = processes.index(&mut window, &process(gone, "a"), 0, &mut pool);
        while !window.is_crowded() {
            window.add_process(profile::Process {
                pid: 1,
                name: String::new(),
                exe: String::new(),
                service: String::new(),
            });
        }
        let mut index =
            |pid, name: &str| processes.index(&mut window, &process(pid, name), 0, &mut pool);
        assert_eq!(index(gone, "a"), first);
        let late = index(gone - 1, "a");
        assert_ne!(late, first);
        assert_eq!(index(gone - 2, "a"), late);
        assert_ne!(index(gone - 3, "b"), late);
        for pid in 0..MAX_PROGRAMS as u32 {
            index(pid, &format!("program {pid}"));
        }
        assert_eq!(index(gone - 4, "c"), index(gone - 5, "d"));
        assert_eq!(processes.programs(), MAX_PROGRAMS);
        for tid in [5, 6] {
            window.add(&sample(late, tid));
        }
        assert_eq!(window.rows().len(), 1, "their threads are not told apart");
        let late = &window.processes()[late.0 as usize];
        assert_eq!(
            (late.pid, late.name.as_str(), late.exe.as_str()),
            (0, "a", "/bin/a")
        );
    }
}
