//! The encoders: from a [`ResolvedProfile`](crate::profile::ResolvedProfile) to bytes, without I/O.

pub mod folded;
pub mod pprof;
pub mod svg;
