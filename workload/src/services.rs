//! The shop's services, one file each: `router()` and the queries beside their routes.
//!
//! - [`product`], [`order`], [`inventory`]: each on its own pool of the one database;
//! - [`gateway`]: the shop's API, in front of the three;
//! - [`common`]: what the three have in common: health, demo endpoints, limits.

pub mod common;
pub mod gateway;
pub mod inventory;
pub mod order;
pub mod product;
pub mod search;
