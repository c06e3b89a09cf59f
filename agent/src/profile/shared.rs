//! What outlives a window: named by identity, not by an index into a window.

use std::sync::Arc;

use super::window::{Module, Process};

/// Identity of a module. It is never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModuleKey {
    /// The kernel.
    Kernel,
    /// Addresses outside every mapping.
    Unknown,
    /// A file in one version, or the vDSO, by its number.
    File(u32),
    /// Code that a process compiled just in time, by the process's incarnation.
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
    /// A process from one exec to the next; a number is never used again.
    pub incarnation: u64,
    /// The process.
    pub process: Process,
}

/// As [`Frame`](super::Frame), with the module itself in place of its index in a window.
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

/// A stack in terms that outlive a window, leaf first.
pub type SharedStack = Arc<[SharedFrame]>;
