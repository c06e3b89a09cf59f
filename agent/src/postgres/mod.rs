//! PostgreSQL as seen from outside: which processes are servers, what their backends were doing when they
//! were sampled, and which callers sent the statements.

mod backends;
mod callers;
mod counts;
mod names;
mod servers;
mod status;
mod workers;

pub use backends::{Backends, SampleAttribution, WindowQueries};
pub use callers::{FoundCaller, KnownSend};
pub use counts::Counts;
pub use servers::{Facts, Servers, is_likely_server};
pub use workers::complete as complete_workers;
