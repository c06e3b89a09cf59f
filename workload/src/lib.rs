//! The demo workload: a shop whose product search has no index, on a real PostgreSQL.
//!
//! - [`services`]: the shop's HTTP services, each with its routes and its queries;
//! - [`db`]: pools, migrations, statements, and what their failures mean;
//! - [`catalogue`]: products, customers, orders and stock, generated inside the database;
//! - [`storm`]: 43 queries at once, measured; [`calibrate`]: the catalogue that they need here, and
//!   [`calibration`], where that is remembered;
//! - [`load`]: steady background traffic, measured;
//! - [`simulate`]: what the demo does to a service on purpose; [`index`]: the fix;
//! - [`supervise`]: the whole shop, one process per service;
//! - [`postgres`]: a private PostgreSQL that never outlives the process that asked for it;
//! - [`telemetry`]: traces, metrics and logs;
//! - [`scene`]: the investigator's script, which has all of it measured and recorded, and concludes.

pub mod calibrate;
pub mod calibration;
pub mod catalogue;
pub mod child;
pub mod db;
pub mod index;
pub mod live;
pub mod load;
pub mod postgres;
pub mod problem;
pub mod profiling;
pub mod scene;
pub mod serve;
pub mod services;
pub mod simulate;
pub mod storm;
pub mod supervise;
pub mod telemetry;
pub mod user;
