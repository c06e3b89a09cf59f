//! The files that processes have mapped, opened once and kept open while any process maps them;
//! and the code of one process, by mapping.

mod code;
mod objects;

pub use code::Code;
pub use objects::{Image, Mapped, Objects};
