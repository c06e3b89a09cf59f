//! The files that processes have mapped: opened once, kept open while anybody maps them; and the code of a process, told
//! apart by file.

mod code;
mod objects;

pub use code::Code;
pub use objects::{Image, Mapped, Objects, OpenFailures};
