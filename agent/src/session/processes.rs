//! The processes of a window, by their incarnations.

use std::{collections::HashMap, path::PathBuf, rc::Rc};

use crate::{
    process::{Process, Registry, service},
    profile::{self, ProcessIndex, Window},
};

/// A process in the window.
#[derive(Debug)]
struct Known {
    index: ProcessIndex,
    /// Whether it has sent something to a server.
    is_client: bool,
}

/// The processes that were added to a window, by incarnation.
#[derive(Debug, Default)]
pub struct Processes(HashMap<u64, Known>);

impl Processes {
    /// The process of a pid; `name` for one of which nothing is known.
    pub fn of_pid(
        &mut self,
        window: &mut Window,
        pid: u32,
        name: &str,
        registry: &mut Registry,
    ) -> ProcessIndex {
        let unknown = Process {
            pid,
            name: name.to_owned(),
            exe: PathBuf::new(),
            space: Rc::default(),
            parent: None,
            incarnation: nobody(pid),
        };
        self.index(window, registry.get(pid).unwrap_or(&unknown))
    }

    fn index(&mut self, window: &mut Window, process: &Process) -> ProcessIndex {
        if let Some(known) = self.0.get(&process.incarnation) {
            return known.index;
        }
        let added = window.add_process(profile::Process {
            pid: process.pid,
            name: process.name.clone(),
            exe: process.exe.to_string_lossy().into_owned(),
            service: service::name_of(process.pid).unwrap_or_default(),
        });
        // Beyond the bound everything is counted under the first process.
        let index = added.unwrap_or(ProcessIndex(0));
        let known = Known {
            index,
            is_client: false,
        };
        self.0.insert(process.incarnation, known);
        index
    }

    /// A process has sent something to a server, so it is ready with its start: at its first sample it may not
    /// have said its service yet, and at the end of the recording it may have gone.
    pub fn sent(&mut self, window: &mut Window, pid: u32, registry: &Registry) {
        let incarnation = registry.known(pid).map_or(nobody(pid), |p| p.incarnation);
        if let Some(known) = self.0.get_mut(&incarnation)
            && !std::mem::replace(&mut known.is_client, true)
            && let Some(name) = service::name_of(pid)
            && let Some(process) = window.process_mut(known.index)
        {
            process.service = name;
        }
    }

    /// Asks the processes that are still there once more for their service.
    pub fn learn_services(&self, window: &mut Window, registry: &Registry) {
        for process in registry.iter() {
            if let Some(known) = self.0.get(&process.incarnation)
                && let Some(name) = service::name_of(process.pid)
                && let Some(process) = window.process_mut(known.index)
            {
                process.service = name;
            }
        }
    }
}

/// Stands for the incarnation of a process of which nothing is known.
pub fn nobody(pid: u32) -> u64 {
    u64::MAX - u64::from(pid)
}
