//! Why the database gave no answer, in words for clients and for counting.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::http::StatusCode;

use super::STATEMENT_TIMEOUT;
use crate::problem::Problem;

/// SQLSTATE `query_canceled`: by the statement timeout, or by somebody.
const QUERY_CANCELED: &str = "57014";

/// Why a request got nothing from the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// PostgreSQL cancelled the statement after [`STATEMENT_TIMEOUT`].
    StatementTimeout,
    /// Somebody cancelled the statement: a reset of the demo, or an administrator.
    StatementCancelled,
    /// Other requests held all connections for as long as this one waited.
    PoolExhausted,
    /// The server is away, starting, stopping, or takes no more connections.
    DatabaseUnreachable,
    /// Anything else: a fault of ours.
    DatabaseError,
}

impl Failure {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 5] = [
        Self::StatementTimeout,
        Self::StatementCancelled,
        Self::PoolExhausted,
        Self::DatabaseUnreachable,
        Self::DatabaseError,
    ];

    /// The failure behind an error that came after `took`.
    pub fn of(error: &sqlx::Error, took: Duration) -> Self {
        let code = error.as_database_error().and_then(|error| error.code());
        match (error, code.as_deref()) {
            // One SQLSTATE for both, and a message in whatever language: the time tells.
            (_, Some(QUERY_CANCELED)) if took >= STATEMENT_TIMEOUT => Self::StatementTimeout,
            (_, Some(QUERY_CANCELED)) => Self::StatementCancelled,
            // Class 57P is operator intervention, 53300 too many connections: the server is
            // there, but not for us, now.
            (_, Some(code)) if code.starts_with("57P") || code == "53300" => {
                Self::DatabaseUnreachable
            }
            (
                sqlx::Error::Io(_)
                | sqlx::Error::PoolTimedOut
                | sqlx::Error::PoolClosed
                | sqlx::Error::WorkerCrashed,
                _,
            ) => Self::DatabaseUnreachable,
            _ => Self::DatabaseError,
        }
    }

    /// A stable word for it.
    pub fn code(self) -> &'static str {
        match self {
            Self::StatementTimeout => "statement_timeout",
            Self::StatementCancelled => "statement_cancelled",
            Self::PoolExhausted => "pool_exhausted",
            Self::DatabaseUnreachable => "database_unreachable",
            Self::DatabaseError => "database_error",
        }
    }

    /// What a client is told: its kind, and never the database's own words.
    pub fn problem(self) -> Problem {
        let status = match self {
            Self::DatabaseError => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        let detail = match self {
            Self::StatementTimeout => "the database took too long; try again later",
            Self::StatementCancelled => "the statement was cancelled; try again",
            Self::PoolExhausted => "all database connections are busy; try again later",
            Self::DatabaseUnreachable => "the database cannot be reached; try again later",
            Self::DatabaseError => "the database could not answer",
        };
        Problem::new(status, self.code(), detail)
    }
}

/// How often each failure happened.
#[derive(Debug, Default)]
pub(super) struct Failures([AtomicU64; Failure::ALL.len()]);

impl Failures {
    pub(super) fn add(&self, failure: Failure) {
        self.0[failure as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn counts(&self) -> BTreeMap<&'static str, u64> {
        let counts = Failure::ALL.iter().zip(&self.0);
        counts
            .map(|(failure, count)| (failure.code(), count.load(Ordering::Relaxed)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each cause has its own code, and the driver's text stays inside.
    #[test]
    fn errors_keep_their_text_to_themselves() {
        let failure = Failure::of(&sqlx::Error::PoolTimedOut, Duration::ZERO);
        assert_eq!(failure, Failure::DatabaseUnreachable);
        assert_eq!(failure.problem().status(), StatusCode::SERVICE_UNAVAILABLE);

        let secret = "relation \"secret_table\" does not exist";
        let failure = Failure::of(&sqlx::Error::Protocol(secret.to_owned()), Duration::ZERO);
        let problem = failure.problem();
        assert_eq!(problem.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert!(!problem.detail.contains("secret"));
    }

    /// Each failure is counted under its own name.
    #[test]
    fn failures_are_counted_apart() {
        let failures = Failures::default();
        for (times, failure) in Failure::ALL.into_iter().enumerate() {
            (0..times).for_each(|_| failures.add(failure));
        }
        let counts = failures.counts();
        assert_eq!(counts.len(), Failure::ALL.len());
        for (times, failure) in Failure::ALL.into_iter().enumerate() {
            assert_eq!(counts[failure.code()], times as u64);
        }
    }
}
