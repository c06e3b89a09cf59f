//! The database `productcatalog`: the pool, the migrations, and what its errors mean to a client.

use std::time::Duration;

use axum::http::StatusCode;
use serde::Serialize;
use sqlx::pool::PoolConnection;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, PgPool, Postgres};

use crate::problem::Problem;

/// The database that all services of the shop share.
pub const DATABASE: &str = "productcatalog";

/// One service's share of the shop's budget of 45 connections.
pub const POOL_MAX: u32 = 15;

/// PostgreSQL cancels a service's statement after this long.
pub const STATEMENT_TIMEOUT: Duration = Duration::from_millis(3200);

/// A request gives up waiting for a connection after this long: a little less than a statement
/// may take, so that an emptied pool shows as itself and not as a slow answer.
pub const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);

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
    pub async fn pool(&self, application: &str) -> Result<PgPool, DbError> {
        let timeout = STATEMENT_TIMEOUT.as_millis().to_string();
        let options = self
            .options
            .clone()
            .application_name(application)
            .options([("statement_timeout", timeout.as_str())]);
        PgPoolOptions::new()
            .max_connections(POOL_MAX)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .connect_with(options)
            .await
            .map_err(|source| self.cannot_connect(source))
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

/// How full a pool is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PoolHealth {
    /// Connections that a request holds now.
    pub active: u32,
    /// Connections that the pool may open.
    pub max: u32,
    /// `active` of `max`, in percent.
    pub utilization_percent: f64,
}

impl PoolHealth {
    /// Reads the pool's state now.
    pub fn of(pool: &PgPool) -> Self {
        let max = pool.options().get_max_connections();
        let idle = u32::try_from(pool.num_idle()).unwrap_or(u32::MAX);
        let active = pool.size().saturating_sub(idle);
        Self {
            active,
            max,
            utilization_percent: f64::from(active) * 100.0 / f64::from(max.max(1)),
        }
    }

    fn is_exhausted(&self) -> bool {
        self.active >= self.max
    }
}

/// A connection for one request. Giving up has two causes that a client should tell apart: the
/// others hold all connections, or the server gives none.
pub async fn acquire(pool: &PgPool) -> Result<PoolConnection<Postgres>, Problem> {
    match pool.acquire().await {
        Err(sqlx::Error::PoolTimedOut) if PoolHealth::of(pool).is_exhausted() => {
            tracing::warn!(code = POOL_EXHAUSTED, max = POOL_MAX, "no connection");
            Err(Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                POOL_EXHAUSTED,
                "all database connections are busy; try again later",
            ))
        }
        acquired => Ok(acquired?),
    }
}

/// The code of a request that waited for a connection in vain while others held them all.
const POOL_EXHAUSTED: &str = "pool_exhausted";

/// SQLSTATE `query_canceled`: here always the statement timeout.
const QUERY_CANCELED: &str = "57014";

impl From<sqlx::Error> for Problem {
    /// Logs the whole error and tells the client only its kind.
    fn from(error: sqlx::Error) -> Self {
        let unavailable = StatusCode::SERVICE_UNAVAILABLE;
        let problem = match &error {
            sqlx::Error::Database(db) if db.code().as_deref() == Some(QUERY_CANCELED) => Self::new(
                unavailable,
                "statement_timeout",
                "the database took too long; try again later",
            ),
            sqlx::Error::Io(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::WorkerCrashed => Self::new(
                unavailable,
                "database_unreachable",
                "the database cannot be reached; try again later",
            ),
            sqlx::Error::Database(db) if is_shutting_down(db.code().as_deref()) => Self::new(
                unavailable,
                "database_unreachable",
                "the database is restarting; try again later",
            ),
            _ => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "database_error",
                "the database could not answer",
            ),
        };
        tracing::warn!(code = problem.code, %error, "database error");
        problem
    }
}

/// SQLSTATE class 57P (operator intervention: shutting down, starting up) and 53300 (too many
/// connections): the server is there, but not for us, now.
fn is_shutting_down(code: Option<&str>) -> bool {
    code.is_some_and(|code| code.starts_with("57P") || code == "53300")
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

    /// Each cause has its own code, and the driver's text stays inside.
    #[test]
    fn errors_keep_their_text_to_themselves() {
        let problem = Problem::from(sqlx::Error::PoolTimedOut);
        assert_eq!(problem.code, "database_unreachable");
        assert_eq!(problem.status(), StatusCode::SERVICE_UNAVAILABLE);

        let secret = "relation \"secret_table\" does not exist";
        let problem = Problem::from(sqlx::Error::Protocol(secret.to_owned()));
        assert_eq!(problem.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert!(!problem.detail.contains("secret"));
    }
}
