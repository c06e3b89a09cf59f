//! Turns a recorded [`Window`](crate::profile::Window) into a profile with names.
//!
//! Every frame gets a name: without a symbol it is named after its module and the start of its function
//! (`postgres+0x31e800`), and such frames are counted separately. Memory stays moderate, because modules
//! are named one after the other, and what was read for a module is dropped before the next.
//!
//! The files come from other users and may be hostile. The agent therefore reads none of them itself, but
//! asks a child process ([`Namer`], [`serve_names`]). The child runs under resource limits, looks names up
//! by [`crate::symbolize`], and is killed when it takes too long.

mod builder;
mod child;
mod fold;
mod namer;
mod resolve;
mod spawner;
mod wire;

pub use child::{NAMER_ARGUMENT, serve_names};
pub use fold::{fold, readable};
pub use namer::Namer;
pub use resolve::{Progress, resolve, resolve_apart, resolve_unnamed};
pub use spawner::Spawner;
