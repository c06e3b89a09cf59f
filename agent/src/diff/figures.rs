//! `--json`: the difference in machine-readable form.

use serde::{Deserialize, Serialize};

use super::compare::{Change, Difference, FunctionChange, Normalisation, Side};
use super::table::SortBy;

/// The maximum number of functions that are listed. These are the functions that changed most. A whole
/// machine has ten thousand.
pub const MAX_FUNCTIONS: usize = 1_000;

/// The JSON object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// The recording before.
    pub before: Side,
    /// The recording after.
    pub after: Side,
    /// How they were made comparable.
    pub normalised_by: Normalisation,
    /// The unit of the numbers: `cpu_seconds_per_second` or `share`.
    pub unit: String,
    /// The sum of everything that was compared.
    pub total: Change,
    /// The functions that changed most.
    pub functions: Vec<FunctionChange>,
    /// The number of functions that were left out, because there are more than [`MAX_FUNCTIONS`].
    pub functions_left_out: usize,
    /// The queries, if the recordings contain any.
    pub queries: Vec<FunctionChange>,
    /// The files that were written.
    pub files: Vec<String>,
}

impl Figures {
    /// The figures of a difference, with the functions in this order.
    pub fn of(difference: &Difference, sort: SortBy, files: Vec<String>) -> Figures {
        let (mut queries, mut functions): (Vec<_>, Vec<_>) = difference
            .functions
            .iter()
            .cloned()
            .partition(FunctionChange::is_query);
        sort.sort(&mut functions);
        SortBy::Total.sort(&mut queries);
        let functions_left_out = functions.len().saturating_sub(MAX_FUNCTIONS);
        functions.truncate(MAX_FUNCTIONS);
        queries.truncate(MAX_FUNCTIONS);
        let unit = match difference.normalisation {
            Normalisation::Duration => "cpu_seconds_per_second",
            Normalisation::Total => "share",
        };
        Figures {
            before: difference.before.clone(),
            after: difference.after.clone(),
            normalised_by: difference.normalisation,
            unit: unit.to_owned(),
            total: difference.total,
            functions,
            functions_left_out,
            queries,
            files,
        }
    }
}
