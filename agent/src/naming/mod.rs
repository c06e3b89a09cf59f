//! From a recorded [`Window`](crate::profile::Window) to a profile with names.
//!
//! Two promises: a frame is never without a name (without a symbol it is called after its module and its function's start,
//! `postgres+0x31e800`, and that is counted apart); and memory stays moderate, since modules are named one after the other, and
//! what was read for one is dropped before the next.
//!
//! The files were written by others and may be hostile. The agent therefore reads none of them: it asks a child process
//! with limits ([`Namer`], [`serve_names`]), which looks names up by [`crate::symbolize`] and is killed when it takes too
//! long.

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
