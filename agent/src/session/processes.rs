//! The sampled processes, by incarnation, with their services. A process is asked for its service only a
//! few times in its life, and the answer is used for every window.

use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
    rc::Rc,
    sync::Arc,
};

use super::open_window::Places;
use crate::{
    pool::{Subject, WorkerPool},
    process::{Process, Registry, service},
    profile::{self, ProcessIndex, SharedProcess},
    recent::Recent,
};

/// How long a forked child must have lived before it is asked for a service of its own, nanoseconds. Asking
/// means reading its mappings, which costs as much as a few samples, and servers fork workers for every
/// statement.
const SETTLED: u64 = 1_000_000_000;

/// A process that was sampled.
#[derive(Debug)]
struct SampledProcess {
    shared: Arc<SharedProcess>,
    /// When to ask the process for the resource that it publishes, nanoseconds; `None` if it has been
    /// asked.
    ask: Option<u64>,
    /// Whether it has sent something to a PostgreSQL server.
    is_client: bool,
}

impl SampledProcess {
    fn set_service(&mut self, places: &mut Places, service: String) {
        places.set_service(self.shared.incarnation, &service);
        Arc::make_mut(&mut self.shared).process.service = service;
    }
}

/// The number of images whose environment one half of [`Recent`] remembers.
const MAX_ENVIRONMENTS: usize = 4096;

/// The processes that were sampled and are still alive, or were sampled in the window that is being filled.
#[derive(Debug)]
pub struct Processes {
    /// By incarnation.
    sampled: HashMap<u64, SampledProcess>,
    /// Services from the environments with which programs were started, by image; empty for none.
    environments: Recent<u64, String>,
}

impl Processes {
    /// Starts without processes.
    pub fn new() -> Processes {
        Processes {
            sampled: HashMap::new(),
            environments: Recent::new(MAX_ENVIRONMENTS),
        }
    }

    /// The index of the process with a pid, seen at `time` (nanoseconds). `name` is used if nothing is
    /// known about the process.
    pub fn of_pid(
        &mut self,
        places: &mut Places,
        (pid, time): (u32, u64),
        name: &str,
        registry: &mut Registry,
        pool: &mut WorkerPool,
    ) -> ProcessIndex {
        if let Some(process) = registry.get(pid, &mut |pid| pool.mapped_objects(pid)) {
            return self.index(places, process, time, pool);
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
        self.index(places, &unknown, time, pool)
    }

    fn index(
        &mut self,
        places: &mut Places,
        process: &Process,
        time: u64,
        pool: &mut WorkerPool,
    ) -> ProcessIndex {
        if let Some(sampled) = self.sampled.get_mut(&process.incarnation) {
            let index = places.process(&sampled.shared);
            if sampled.ask.is_some_and(|ask| time >= ask) {
                sampled.ask = None;
                if let Some(name) = ask(pool, process.pid, service::published) {
                    sampled.set_service(places, name);
                }
            }
            return index;
        }
        // Processes that are counted by program are not asked for their service.
        if places.window.is_crowded() {
            let exe = process.exe.to_string_lossy();
            return places.window.program(&process.name, &exe);
        }
        let ask = process.forked.map(|forked| forked.saturating_add(SETTLED));
        let ask = ask.filter(|ask| time < *ask);
        let published = match ask {
            None => self::ask(pool, process.pid, service::published),
            Some(_) => None,
        };
        let service = published.unwrap_or_else(|| self.environment(process, pool));
        let shared = Arc::new(SharedProcess {
            incarnation: process.incarnation,
            process: profile::Process {
                pid: process.pid,
                name: process.name.clone(),
                exe: process.exe.to_string_lossy().into_owned(),
                service,
            },
        });
        let index = places.process(&shared);
        let sampled = SampledProcess {
            shared,
            ask,
            is_client: false,
        };
        self.sampled.insert(process.incarnation, sampled);
        index
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

    /// Notes that a process has sent something to a server, and returns the process. At its first send it
    /// is asked for its service once more: it has finished starting by now, whereas at its first sample it
    /// may not have published its service yet, and at the end of the recording it may be gone. Returns
    /// `None` if the process is not told apart from others.
    pub fn sent(
        &mut self,
        places: &mut Places,
        pid: u32,
        registry: &Registry,
        pool: &mut WorkerPool,
    ) -> Option<Arc<SharedProcess>> {
        let incarnation = registry.known(pid).map_or(nobody(pid), |p| p.incarnation);
        let sampled = self.sampled.get_mut(&incarnation)?;
        if !std::mem::replace(&mut sampled.is_client, true)
            && let Some(name) = ask(pool, pid, service::name_of)
        {
            sampled.ask = None;
            sampled.set_service(places, name);
        }
        Some(Arc::clone(&sampled.shared))
    }

    /// A process that was sampled and is still known.
    pub fn shared(&self, incarnation: u64) -> Option<Arc<SharedProcess>> {
        let sampled = self.sampled.get(&incarnation)?;
        Some(Arc::clone(&sampled.shared))
    }

    /// Asks the processes that are still alive for their service once more.
    pub fn learn_services(
        &mut self,
        places: &mut Places,
        registry: &Registry,
        pool: &mut WorkerPool,
    ) {
        for process in registry.iter() {
            if let Some(sampled) = self.sampled.get_mut(&process.incarnation)
                && let Some(name) = ask(pool, process.pid, service::name_of)
            {
                sampled.set_service(places, name);
            }
        }
    }

    /// Forgets processes that have ended.
    pub fn evict(&mut self, registry: &Registry) {
        let alive: HashSet<u64> = registry.iter().map(|p| p.incarnation).collect();
        self.sampled
            .retain(|incarnation, _| alive.contains(incarnation));
    }
}

/// Asks a process for its service. This reads the process's memory, which may block, so it is done by a
/// thread of the pool.
fn ask(pool: &mut WorkerPool, pid: u32, question: fn(u32) -> Option<String>) -> Option<String> {
    let answer = pool.call(Subject::process(pid), move || question(pid));
    answer.done().flatten()
}

/// A made-up incarnation for a process about which nothing is known.
pub fn nobody(pid: u32) -> u64 {
    u64::MAX - u64::from(pid)
}

#[cfg(test)]
mod tests {
    use agent_ebpf::sample::Outcome;

    use super::*;
    use crate::profile::MAX_PROGRAMS;

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

    /// Many rows make a window crowded, as many processes do.
    #[test]
    fn rows_that_crowd_a_window() {
        let mut places = Places::new();
        let process = places.window.add_process(profile::Process {
            pid: 1,
            name: String::new(),
            exe: String::new(),
            service: String::new(),
        });
        let process = process.expect("the first");
        for tid in 0.. {
            if places.window.is_crowded() {
                break;
            }
            places.window.add(&sample(process, tid));
        }
        assert_eq!(places.window.rows().len(), profile::MAX_ROWS / 2);
    }

    /// In a crowded window new processes are counted by program, and processes that were there before keep
    /// their own entry.
    #[test]
    fn a_crowded_window() {
        let (mut places, mut pool) = (Places::new(), WorkerPool::new());
        let mut processes = Processes::new();
        let gone = u32::MAX;
        let first = processes.index(&mut places, &process(gone, "a"), 0, &mut pool);
        while !places.window.is_crowded() {
            places.window.add_process(profile::Process {
                pid: 1,
                name: String::new(),
                exe: String::new(),
                service: String::new(),
            });
        }
        let mut index =
            |pid, name: &str| processes.index(&mut places, &process(pid, name), 0, &mut pool);
        assert_eq!(index(gone, "a"), first);
        let late = index(gone - 1, "a");
        assert_ne!(late, first);
        assert_eq!(index(gone - 2, "a"), late);
        assert_ne!(index(gone - 3, "b"), late);
        for pid in 0..MAX_PROGRAMS as u32 {
            index(pid, &format!("program {pid}"));
        }
        assert_eq!(index(gone - 4, "c"), index(gone - 5, "d"));
        assert_eq!(places.window.programs(), MAX_PROGRAMS);
        for tid in [5, 6] {
            places.window.add(&sample(late, tid));
        }
        assert_eq!(
            places.window.rows().len(),
            1,
            "their threads are not told apart"
        );
        let late = &places.window.processes()[late.0 as usize];
        assert_eq!(
            (late.pid, late.name.as_str(), late.exe.as_str()),
            (0, "a", "/bin/a")
        );
    }
}
