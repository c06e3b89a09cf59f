//! The shop's services, one file each: `router()` and the queries beside their routes.
//!
//! - [`product`], [`order`], [`inventory`]: each on its own pool of the one database;
//! - [`gateway`]: the shop's API, in front of the three;
//! - [`common`], `routes`, [`demo`]: what the three have in common: limits, health, the demo's endpoints;
//! - [`upstream`]: a request to a service.

pub mod common;
pub mod demo;
pub mod gateway;
pub mod inventory;
pub mod order;
pub mod product;
mod routes;
pub mod search;
pub mod upstream;
