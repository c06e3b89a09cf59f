//! Which query, and which function of which client, a PostgreSQL backend's CPU time was for.
//!
//! - `statements`: one client whose queries and callers are known, in every way to send a statement.
//! - `clients`: programs that people use, a connection pooler, and the server's own workers.
//! - `namespaces`: two servers whose addresses, ports, paths and process ids are the same.
//! - `attributed`: what the three share: a recording while such clients are at work, and its parts.
//!
//! Most tests take the machine's lock as exclusive, because they compare shares of CPU time.

#[path = "../common/mod.rs"]
mod common;

mod attributed;
mod clients;
mod namespaces;
mod statements;
