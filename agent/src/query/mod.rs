//! Prepares what PostgreSQL reports about its work for display: the text of a query without its secrets,
//! the trace that a query belongs to, and the kind of a process from its title.
//!
//! All input is untrusted, because every client that may connect chooses the text. Nothing here does I/O,
//! panics, or takes more than linear time.

mod lex;
mod normalize;
mod private;
mod texts;
mod title;
mod trace;

pub use normalize::{Normalized, normalize, verbatim};
pub use texts::{MAX_NUMBERS, MAX_TEXT_BYTES, MAX_TEXTS, Query, QueryRef, TextMode, Texts};
pub use title::{Client, Kind, Title, title};
pub use trace::{Traceparent, traceparent, traceparent_in_name};

/// The longest text of a query that is kept, in bytes. It is twice what PostgreSQL reports by default
/// (`track_activity_query_size` is 1,024), and short enough for a label.
pub const MAX_QUERY_TEXT: usize = 2048;
