//! Processes and what they have mapped: the agent's view of `/proc`, kept up to date by the
//! kernel's own events instead of by polling.

mod proc;
mod registry;
pub mod service;
mod space;

pub use proc::{
    exists, has_threads, in_initial_pid_namespace, is_trusted_by, living_thread, mapped_objects,
    own_pid, parent_of, pids, process_exe, process_name, process_of_thread,
};
pub use registry::{MappingReader, Process, Registry};
pub use space::{AddressSpace, Backing, ExecutableMapping, MAX_KEPT_MAPPINGS, ObjectId};
