//! The database `productcatalog`: pools, migrations, statements, and what their failures mean to a
//! client.

mod failure;
mod pool;

use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, PgPool};

pub use failure::Failure;
pub use pool::{Connection, Pool, PoolHealth, QueryCounts, Statement, acquire, run, run_on};

use crate::telemetry::database::Target;

/// The database that all services of the shop share.
pub const DATABASE: &str = "productcatalog";

/// One service's share of the shop's budget of 45 connections.
pub const POOL_MAX: u32 = 15;

/// PostgreSQL cancels a service's statement after this long.
pub const STATEMENT_TIMEOUT: Duration = Duration::from_millis(3200);

/// A request gives up waiting for a connection after this long: a little less than a statement
/// may take, so that an emptied pool shows as itself and not as a slow answer.
pub const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

/// What control connections are called after the name of their service.
pub const CONTROL_SUFFIX: &str = " (control)";

/// One for what takes long (an index), one for questions meanwhile.
const CONTROL_MAX: u32 = 2;

/// A control connection that nobody needs is closed after this long.
const CONTROL_IDLE: Duration = Duration::from_secs(30);

/// A database that cannot be used at all.
#[derive(Debug, thiserror::Error)]
pub enum DbError {
    /// The URL is not one of PostgreSQL's.
    #[error(
        "the database URL cannot be read ({reason}); it looks like \
         postgresql://user:password@127.0.0.1:5432/{DATABASE}"
    )]
    Url {
        /// What the parser said.
        reason: String,
    },
    /// Nothing answers, or it refuses us.
    #[error(
        "cannot connect to {place}: {source}; \
         check DATABASE_URL, or start a private server with `workload postgres`"
    )]
    Connect {
        /// Host, port and database, without the password.
        place: String,
        /// What sqlx said.
        source: sqlx::Error,
    },
    /// The schema could not be brought up to date.
    #[error("cannot migrate {place}: {source}")]
    Migrate {
        /// Host, port and database, without the password.
        place: String,
        /// What sqlx said.
        source: sqlx::migrate::MigrateError,
    },
}

/// Where the database is: a checked `DATABASE_URL`.
#[derive(Debug, Clone)]
pub struct Database {
    options: PgConnectOptions,
}

impl Database {
    /// Reads a `postgresql://` URL.
    pub fn from_url(url: &str) -> Result<Self, DbError> {
        let unreadable = |reason: String| DbError::Url { reason };
        if !["postgresql://", "postgres://"]
            .iter()
            .any(|scheme| url.starts_with(scheme))
        {
            return Err(unreadable("it is not a PostgreSQL URL".to_owned()));
        }
        let options: PgConnectOptions = url
            .parse()
            .map_err(|error: sqlx::Error| unreadable(error.to_string()))?;
        // sqlx's own log would repeat each slow statement, which here are all of them.
        let options = options.disable_statement_logging();
        Ok(Self { options })
    }

    /// Host, port and database for messages; never the password.
    pub fn place(&self) -> String {
        format!(
            "{}:{}/{}",
            self.options.get_host(),
            self.options.get_port(),
            self.options.get_database().unwrap_or("")
        )
    }

    /// A service's pool: bounded, impatient, and with the server's own limit on a statement.
    /// One connection is made at once, so that a wrong URL is an error now and not at the first
    /// request.
    pub async fn pool(&self, service: &'static str) -> Result<Pool, DbError> {
        let timeout = STATEMENT_TIMEOUT.as_millis().to_string();
        let options = self.options.clone().application_name(service).options([
            ("statement_timeout", timeout.as_str()),
            // What a search costs depends on its words: a plan made for any word suits none.
            ("plan_cache_mode", "force_custom_plan"),
        ]);
        let pool = PgPoolOptions::new()
            .max_connections(POOL_MAX)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_with(options)
            .await
            .map_err(|source| self.cannot_connect(source))?;
        Ok(Pool::new(pool, service, self.target()))
    }

    /// Connections beside a service's pool, made when they are needed: for questions and actions
    /// that must not stand in the queue that they are about.
    pub fn control(&self, service: &str) -> PgPool {
        let application = format!("{service}{CONTROL_SUFFIX}");
        PgPoolOptions::new()
            .max_connections(CONTROL_MAX)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .idle_timeout(CONTROL_IDLE)
            .connect_lazy_with(self.options.clone().application_name(&application))
    }

    /// The database as telemetry names it.
    fn target(&self) -> Target {
        let database = self.options.get_database().unwrap_or(DATABASE);
        Target::new(database, self.options.get_host(), self.options.get_port())
    }

    /// One connection without a statement timeout, for migrations and the catalogue. Closing
    /// it gives back every lock it holds.
    pub async fn connect(&self) -> Result<PgPool, DbError> {
        PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_with(self.options.clone().application_name("workload-setup"))
            .await
            .map_err(|source| self.cannot_connect(source))
    }

    /// Brings the schema up to date. Safe when several processes start at once: sqlx takes an
    /// advisory lock, and whoever comes second finds nothing to do.
    pub async fn migrate(&self, connection: &PgPool) -> Result<(), DbError> {
        sqlx::migrate!("./migrations")
            .run(connection)
            .await
            .map_err(|source| DbError::Migrate {
                place: self.place(),
                source,
            })
    }

    fn cannot_connect(&self, source: sqlx::Error) -> DbError {
        DbError::Connect {
            place: self.place(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message about a database names the place and keeps the password to itself.
    #[test]
    fn a_place_has_no_password() {
        let database =
            Database::from_url("postgresql://shop:s3cret@127.0.0.1:5433/productcatalog").unwrap();
        assert_eq!(database.place(), "127.0.0.1:5433/productcatalog");
    }

    /// What is not a URL says how one looks.
    #[test]
    fn a_wrong_url_is_explained() {
        for url in ["what", "mysql://somewhere", "postgresql://host:port/x"] {
            let error = Database::from_url(url).unwrap_err().to_string();
            assert!(error.contains("postgresql://"), "{error}");
        }
    }
}
