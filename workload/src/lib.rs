//! The demo workload: a shop whose product search has no index, on a real PostgreSQL.
//!
//! - [`services`]: the shop's HTTP services, each with its routes and its queries;
//! - [`db`]: the pool, the migrations, and what a database error means;
//! - [`catalogue`]: the products, generated inside the database;
//! - [`postgres`]: a private PostgreSQL that never outlives the process that asked for it;
//! - [`telemetry`]: traces, metrics and logs;
//! - [`demo`]: one command that starts all of it, records it with the agent, and reports.

pub mod catalogue;
pub mod child;
pub mod db;
pub mod demo;
pub mod postgres;
pub mod problem;
pub mod profiling;
pub mod serve;
pub mod services;
pub mod telemetry;
pub mod user;
