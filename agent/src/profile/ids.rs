//! Numbers of what one window holds.

/// A module of one window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModuleId(pub u32);

/// A process of one window. Not a pid: pids are used again, and an exec makes a new process here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessIndex(pub u32);

/// A stack of one window: the trie's node of its leaf. [`StackId::EMPTY`] has no frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StackId(pub(super) u32);

impl StackId {
    /// The stack without frames.
    pub const EMPTY: StackId = StackId(u32::MAX);
}

/// A query of one window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueryIndex(pub u32);
