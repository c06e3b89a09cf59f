//! Types for what lives longer than a window. They refer to modules, processes and frames by identity, not
//! by an index into a window.

use std::sync::Arc;

use super::window::{Module, Process};

/// Identity of a module. It is never reused for another module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModuleKey {
    /// The kernel.
    Kernel,
    /// Addresses outside every mapping.
    Unknown,
    /// One version of a file, or the vDSO, by its object number.
    File(u32),
    /// Code that a process compiled just in time, by the incarnation of the process.
    Jit(u64),
}

/// A module with its identity.
#[derive(Clone, Debug)]
pub struct SharedModule {
    /// The identity.
    pub key: ModuleKey,
    /// The module.
    pub module: Module,
}

/// A process with its identity.
#[derive(Clone, Debug)]
pub struct SharedProcess {
    /// The process's incarnation, which changes with every fork, exec and new name. It is never reused.
    pub incarnation: u64,
    /// The process.
    pub process: Process,
}

/// Like [`Frame`](super::Frame), but with the module itself instead of its index in a window.
#[derive(Clone, Debug)]
pub struct SharedFrame {
    /// The module.
    pub module: Arc<SharedModule>,
    /// See [`Frame::address`](super::Frame::address).
    pub address: u64,
    /// See [`Frame::exact`](super::Frame::exact).
    pub exact: bool,
}

impl SharedFrame {
    fn identity(&self) -> (ModuleKey, u64, bool) {
        (self.module.key, self.address, self.exact)
    }
}

impl PartialEq for SharedFrame {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for SharedFrame {}

impl std::hash::Hash for SharedFrame {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.identity().hash(state);
    }
}

/// A stack that does not depend on a window, leaf first.
pub type SharedStack = Arc<[SharedFrame]>;
