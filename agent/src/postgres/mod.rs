//! PostgreSQL as it is seen from outside: servers, what their backends say at samples, who asked, and for what.

mod backends;
mod callers;
mod counts;
mod names;
mod servers;
mod status;
mod workers;

pub use backends::{Backends, SampleAttribution};
pub use servers::{Facts, Server, Servers, is_likely_server};
