//! The processes of a window, by their incarnations.

use std::{collections::HashMap, path::PathBuf, rc::Rc};

use crate::{
    process::{Process, Registry, service},
    profile::{self, ProcessIndex, Window},
};

/// How long a forked child has to live before it is asked for a service of its own, nanoseconds. To ask is to
/// read its mappings, which costs as much as a few of its samples, and servers fork workers for every statement.
const SETTLED: u64 = 1_000_000_000;

/// A process in the window.
#[derive(Debug)]
struct Known {
    index: ProcessIndex,
    /// When it is to be asked for what it publishes, nanoseconds; `None` when it was.
    ask: Option<u64>,
    /// Whether it has sent something to a server.
    is_client: bool,
}

/// The processes that were added to a window.
#[derive(Debug, Default)]
pub struct Processes {
    /// By incarnation.
    known: HashMap<u64, Known>,
    /// Services in the environments with which programs were started, by image.
    environments: HashMap<u64, String>,
}

impl Processes {
    /// The process of a pid, seen at `time` (nanoseconds); `name` for one of which nothing is known.
    pub fn of_pid(
        &mut self,
        window: &mut Window,
        (pid, time): (u32, u64),
        name: &str,
        registry: &mut Registry,
    ) -> ProcessIndex {
        if let Some(process) = registry.get(pid) {
            return self.index(window, process, time);
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
        };
        self.index(window, &unknown, time)
    }

    fn index(&mut self, window: &mut Window, process: &Process, time: u64) -> ProcessIndex {
        if let Some(known) = self.known.get_mut(&process.incarnation) {
            if known.ask.is_some_and(|ask| time >= ask) {
                known.ask = None;
                if let Some(name) = service::published(process.pid) {
                    rename(window, known.index, name);
                }
            }
            return known.index;
        }
        let ask = process.forked.map(|forked| forked.saturating_add(SETTLED));
        let ask = ask.filter(|ask| time < *ask);
        let published = match ask {
            None => service::published(process.pid),
            Some(_) => None,
        };
        let service = published.unwrap_or_else(|| self.environment(process));
        let added = window.add_process(profile::Process {
            pid: process.pid,
            name: process.name.clone(),
            exe: process.exe.to_string_lossy().into_owned(),
            service,
        });
        // Beyond the bound everything is counted under the first process.
        let index = added.unwrap_or(ProcessIndex(0));
        let known = Known {
            index,
            ask,
            is_client: false,
        };
        self.known.insert(process.incarnation, known);
        index
    }

    /// The service in the environment of a process; empty for none.
    fn environment(&mut self, process: &Process) -> String {
        if let Some(known) = self.environments.get(&process.image) {
            return known.clone();
        }
        let Some(read) = service::in_environment(process.pid) else {
            return String::new();
        };
        self.environments.insert(process.image, read.clone());
        read
    }

    /// A process has sent something to a server, so it is ready with its start: at its first sample it may not
    /// have said its service yet, and at the end of the recording it may have gone.
    pub fn sent(&mut self, window: &mut Window, pid: u32, registry: &Registry) {
        let incarnation = registry.known(pid).map_or(nobody(pid), |p| p.incarnation);
        if let Some(known) = self.known.get_mut(&incarnation)
            && !std::mem::replace(&mut known.is_client, true)
            && let Some(name) = service::name_of(pid)
        {
            known.ask = None;
            rename(window, known.index, name);
        }
    }

    /// Asks the processes that are still there once more for their service.
    pub fn learn_services(&self, window: &mut Window, registry: &Registry) {
        for process in registry.iter() {
            if let Some(known) = self.known.get(&process.incarnation)
                && let Some(name) = service::name_of(process.pid)
            {
                rename(window, known.index, name);
            }
        }
    }
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
