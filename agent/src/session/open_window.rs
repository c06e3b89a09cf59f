//! The window that is being filled.

use std::{collections::HashMap, sync::Arc};

use crate::{
    cost::without_real_time,
    postgres::{Counts, KnownSend, complete_workers},
    profile::{
        Caller, Frame, MAX_MODULES, Module, ModuleId, ModuleKey, ProcessIndex, Query, SharedFrame,
        SharedModule, SharedProcess, SharedStack, StackId, Unknown, Window,
    },
    query::{self, TextMode, Texts},
};

/// Maximum number of callers' stacks whose [`StackId`] is remembered, so that the frames of a caller are
/// not looked up again for every sample of its statement.
const MAX_PLACED: usize = 4096;

/// The window that is being filled, and everything that refers to it by index. All of it is replaced when
/// the window is rotated. What lives longer than a window refers to modules, processes and stacks by their
/// identity ([`SharedModule`], [`SharedProcess`], [`SharedStack`]).
pub struct OpenWindow {
    /// The samples, and the modules, processes and stacks that they refer to.
    pub places: Places,
    /// The queries.
    pub texts: Texts,
    /// How well samples could be attributed.
    pub counts: Counts,
    /// Records whose stack was unwound further by the agent.
    pub continued: u64,
    /// Records whose stack could not be unwound further by the agent, because a file did not answer in
    /// time.
    pub not_continued: u64,
}

impl OpenWindow {
    /// An empty window.
    pub fn new(mode: TextMode) -> OpenWindow {
        OpenWindow {
            places: Places::new(),
            texts: Texts::new(mode),
            counts: Counts::default(),
            continued: 0,
            not_continued: 0,
        }
    }

    /// Makes room for the next sample if the window is nearly full. This invalidates every [`StackId`], so
    /// the caller must not hold one.
    pub fn make_room(&mut self) {
        if self.places.window.is_nearly_full() {
            let dropped = without_real_time(|| self.places.window.prune());
            self.places.callers.clear();
            self.counts.drop_callers(dropped);
        }
    }

    /// Attributes the samples at which parallel workers reported no statement. To be called when all
    /// samples have been added.
    pub fn complete_workers(&mut self) {
        complete_workers(&mut self.places.window, &mut self.counts);
    }

    /// Returns the window, with its queries. To be called when all samples have been added.
    pub fn finish(self) -> Window {
        let query = |query: &query::Query| Query {
            id: match query.id {
                0 => format!("text:{:016x}", query.key),
                id => id.to_string(),
            },
            text: Arc::clone(&query.text),
        };
        let mut window = self.places.window;
        window.set_queries(self.texts.queries().iter().map(query).collect());
        window
    }
}

/// A window, and the indices of its modules, processes and stacks by identity.
pub struct Places {
    /// The counted samples.
    pub window: Window,
    modules: HashMap<ModuleKey, ModuleId>,
    unknown_module: ModuleId,
    /// By incarnation.
    processes: HashMap<u64, ProcessIndex>,
    /// Indices of callers' stacks, by the address of the shared stack. The address identifies the stack
    /// because the stack is kept alive here.
    callers: HashMap<*const SharedFrame, (SharedStack, StackId)>,
}

impl Places {
    /// Makes an empty window.
    pub fn new() -> Places {
        let mut window = Window::new();
        let mut modules = HashMap::new();
        // The unknown module is added first, so that it exists when there is no room for others.
        let unknown_module = window.add_module(Module::unknown()).unwrap_or(ModuleId(0));
        modules.insert(ModuleKey::Unknown, unknown_module);
        Places {
            window,
            modules,
            unknown_module,
            processes: HashMap::new(),
            callers: HashMap::new(),
        }
    }

    /// Whether a module has an index in this window.
    pub fn has_module(&self, key: ModuleKey) -> bool {
        self.modules.contains_key(&key)
    }

    /// The index of a module. `shared` provides the description of a module that is new in this window.
    /// Once the bound is reached, code in further modules counts under the module of unknown addresses, and
    /// `shared` is not called.
    pub fn module(
        &mut self,
        key: ModuleKey,
        shared: impl FnOnce() -> Arc<SharedModule>,
    ) -> ModuleId {
        if let Some(id) = self.modules.get(&key) {
            return *id;
        }
        if self.window.modules().len() >= MAX_MODULES {
            return self.unknown_module;
        }
        let Some(id) = self.window.add_module(shared().module.clone()) else {
            return self.unknown_module;
        };
        self.modules.insert(key, id);
        id
    }

    /// The index of a process. In a crowded window a process that is new there gets the index of its
    /// program.
    pub fn process(&mut self, shared: &SharedProcess) -> ProcessIndex {
        if let Some(index) = self.processes.get(&shared.incarnation) {
            return *index;
        }
        let process = &shared.process;
        let added = match self.window.is_crowded() {
            true => None,
            false => self.window.add_process(process.clone()),
        };
        match added {
            Some(index) => {
                self.processes.insert(shared.incarnation, index);
                index
            }
            None => self.window.program(&process.name, &process.exe),
        }
    }

    /// Corrects the service of a process that is in this window.
    pub fn set_service(&mut self, incarnation: u64, service: &str) {
        if let Some(index) = self.processes.get(&incarnation)
            && let Some(process) = self.window.process_mut(*index)
        {
            service.clone_into(&mut process.service);
        }
    }

    /// Converts a send whose stack is known into a caller with the indices of this window.
    pub fn caller(&mut self, send: &KnownSend) -> Caller {
        let process = self.process(&send.process);
        match self.stack(&send.stack) {
            Some(stack) => send.caller(process, stack),
            None => Caller::Process {
                process,
                reason: Unknown::Lost,
            },
        }
    }

    fn stack(&mut self, shared: &SharedStack) -> Option<StackId> {
        if let Some((_, stack)) = self.callers.get(&shared.as_ptr()) {
            return Some(*stack);
        }
        let frames: Vec<Frame> = shared
            .iter()
            .map(|frame| Frame {
                module: self.module(frame.module.key, || Arc::clone(&frame.module)),
                address: frame.address,
                exact: frame.exact,
            })
            .collect();
        let stack = self.window.intern(&frames, &[]);
        // There may be room again later, so what found none is not remembered.
        if let Some(stack) = stack {
            if self.callers.len() >= MAX_PLACED {
                self.callers.clear();
            }
            self.callers
                .insert(shared.as_ptr(), (Arc::clone(shared), stack));
        }
        stack
    }
}

#[cfg(test)]
mod tests {
    use agent_ebpf::sample::Outcome;

    use super::*;
    use crate::profile::Process;

    fn shared_module(key: ModuleKey, name: &str) -> Arc<SharedModule> {
        let module = Module {
            name: name.to_owned(),
            ..Module::unknown()
        };
        Arc::new(SharedModule { key, module })
    }

    /// A caller's stack, which the kernel hands over only once, can also be placed in later windows,
    /// whatever their indices are.
    #[test]
    fn a_caller_outlives_a_window() {
        let frame = |module: &Arc<SharedModule>, address| SharedFrame {
            module: Arc::clone(module),
            address,
            exact: false,
        };
        let (program, library) = (
            shared_module(ModuleKey::File(1), "program"),
            shared_module(ModuleKey::File(2), "library"),
        );
        let send = KnownSend {
            process: Arc::new(SharedProcess {
                incarnation: 7,
                process: Process {
                    pid: 42,
                    name: "shop".to_owned(),
                    exe: "/bin/shop".to_owned(),
                    service: "product-service".to_owned(),
                },
            }),
            stack: [frame(&library, 3), frame(&program, 2), frame(&program, 1)].into(),
            outcome: Outcome::Complete,
        };
        for others in 0..3 {
            let mut places = Places::new();
            for other in 0..others {
                let module = shared_module(ModuleKey::Jit(other), "other");
                places.module(module.key, || Arc::clone(&module));
            }
            let Caller::Known { process, stack } = places.caller(&send) else {
                panic!("not known");
            };
            assert_eq!(places.caller(&send), Caller::Known { process, stack });
            let frames: Vec<Frame> = places.window.frames().copied().collect();
            let stack: Vec<_> = places
                .window
                .stack(stack)
                .map(|index| {
                    let Frame {
                        module, address, ..
                    } = frames[index];
                    (
                        places.window.modules()[module.0 as usize].name.as_str(),
                        address,
                    )
                })
                .collect();
            assert_eq!(stack, [("library", 3), ("program", 2), ("program", 1)]);
            let process = &places.window.processes()[process.0 as usize];
            assert_eq!(process, &send.process.process);
        }
    }
}
