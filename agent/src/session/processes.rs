//! The processes of a window, by their incarnations.

use std::{collections::HashMap, path::PathBuf, rc::Rc};

use crate::{
    process::{Process, Registry, service},
    profile::{self, ProcessIndex, Window},
};

/// The processes that were added to a window.
#[derive(Debug, Default)]
pub struct Processes(HashMap<u64, ProcessIndex>);

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
        if let Some(index) = self.0.get(&process.incarnation) {
            return *index;
        }
        let added = window.add_process(profile::Process {
            pid: process.pid,
            name: process.name.clone(),
            exe: process.exe.to_string_lossy().into_owned(),
            service: service::name_of(process.pid).unwrap_or_default(),
        });
        // Beyond the bound everything is counted under the first process.
        let index = added.unwrap_or(ProcessIndex(0));
        self.0.insert(process.incarnation, index);
        index
    }

    /// Asks the processes that are still there once more for their service.
    pub fn learn_services(&self, window: &mut Window, registry: &Registry) {
        for process in registry.iter() {
            if let Some(index) = self.0.get(&process.incarnation)
                && let Some(name) = service::name_of(process.pid)
                && let Some(process) = window.process_mut(*index)
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
