//! Compares two recordings and shows what grew and what shrank ([`Pair`] → [`Difference`]): as a table, a
//! picture, folded stacks and figures. Only [`load`] does I/O.

mod compare;
mod figures;
mod folded;
mod pair;
mod picture;
mod table;

pub use compare::{Change, Difference, FunctionChange, Normalisation, Side};
pub use figures::{Figures, MAX_FUNCTIONS};
pub use pair::{Error, Kind, Pair, Recording, load};
pub use table::{SortBy, table};

use crate::encode::svg::SvgError;
use crate::report::Format;

impl Difference {
    /// The difference in this format. A `.pb.gz` holds a recording, which a difference is not;
    /// [`Outputs::refuse_recordings`](crate::report::Outputs::refuse_recordings) refuses it earlier.
    ///
    /// # Errors
    /// The picture could not be drawn, or the format is that of a recording.
    pub fn encode(&self, format: Format) -> Result<Vec<u8>, SvgError> {
        match format {
            Format::Svg => picture::encode(self),
            Format::Folded => Ok(folded::encode(self)),
            Format::Pprof => Err(SvgError::Draw("a difference is not a recording".to_owned())),
        }
    }
}
