//! PostgreSQL as it is seen from outside: servers, what their backends say at samples, who asked, and for what.

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
