//! The stages of a recording's data. Samples from the kernel are counted in a [`Window`];
//! [`naming`](crate::naming) adds names and converts it into a [`ResolvedProfile`], which is the input of
//! every encoder.
//!
//! Nothing here does I/O. Each stage is a type, and no stage changes its input.

mod attribution;
mod ids;
mod meta;
mod prune;
mod resolved;
mod shared;
mod wait_event;
mod window;

pub use attribution::{Attribution, Backend, Caller, KNOWN, PARTIAL, Phase, Query, Unknown};
pub use ids::{ModuleId, ProcessIndex, QueryIndex, StackId};
pub use meta::{
    AgentCost, AttributionStats, CpuSeconds, KernelCost, MaxRss, RecordingMeta, Runtime,
    StackCopies, Ticks, UnwindTables,
};
pub use prune::{DroppedCallers, Pruned};
pub use resolved::{
    ADDRESS_ONLY, CALLER_MODULE, FrameRef, Function, FunctionId, Labels, Line, Location,
    LocationId, Mapping, MappingId, PROCESS_MODULE, QUERY_MODULE, ResolvedProfile, ResolvedSample,
    key,
};
pub use shared::{ModuleKey, SharedFrame, SharedModule, SharedProcess, SharedStack};
pub use wait_event::WaitEvent;
pub use window::{
    Frame, MAX_FRAMES, MAX_MODULES, MAX_PROCESSES, MAX_PROGRAMS, MAX_ROWS, MAX_STACK_NODES, Module,
    Process, RARE_STACKS, RawSample, RowKey, STACK_TABLE_FULL, Source, Tally, ThreadName, Window,
    WindowCounters,
};
