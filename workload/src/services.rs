//! The shop's services, one file each: `router()` and the queries beside their routes.

pub mod product;
