//! What a profiler of the whole machine can read of this process without asking it: which service
//! it is ([`process`]), and which span each thread works for ([`thread`]).

pub(super) mod process;
pub(super) mod thread;
