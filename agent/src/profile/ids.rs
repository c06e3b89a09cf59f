//! Indices of the objects in a [`Window`](super::Window). Each is valid in its own window only.

/// The index of a module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModuleId(pub u32);

/// The index of a process. Unlike a pid, it is not reused, and a process gets a new one when it executes
/// another program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessIndex(pub u32);

/// The index of a stack: that of its leaf's node in the trie. [`StackId::EMPTY`] has no frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StackId(pub(super) u32);

impl StackId {
    /// The stack without frames.
    pub const EMPTY: StackId = StackId(u32::MAX);
}

/// The index of a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueryIndex(pub u32);
