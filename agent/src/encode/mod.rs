//! From a [`ResolvedProfile`](crate::profile::ResolvedProfile) to bytes. Functions, no I/O.

pub mod folded;
pub mod pprof;
pub mod svg;
