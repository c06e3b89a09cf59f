//! The results of a recording: figures ([`Summary`]), a table for the terminal ([`table()`]) and files
//! ([`Outputs`]). A `.pb.gz` gives the same results later ([`load`], [`filter`]).

mod callers;
mod filter;
mod load;
mod outputs;
mod printable;
mod queries;
mod style;
mod summary;
mod table;
mod top;
mod view;

pub use callers::caller_notes;
pub use filter::{Filter, FilterError, filter};
pub use load::{LoadError, MAX_FILE, load};
pub use outputs::{Format, OutputError, Outputs, Unnamed, WriteReport, Written};
pub use printable::{causes, printable};
pub use queries::{CallerCost, QueryCost, queries, queries_table};
pub use style::Style;
pub(crate) use style::{fit, push};
pub use summary::{ProcessSummary, StackDepth, Summary};
pub use table::table;
pub(crate) use top::place;
pub use top::{TopFunction, top_functions};
pub use view::{View, fold_frames};
