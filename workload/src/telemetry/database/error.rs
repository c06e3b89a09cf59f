//! Why a statement failed, in words that hold nothing of what it was about.

use std::borrow::Cow;

use opentelemetry::KeyValue;

/// A failure, as spans and metrics name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    /// The server's five characters, where it was the server who failed.
    sqlstate: Option<String>,
    /// `error.type` where there is none.
    kind: &'static str,
}

impl Failure {
    /// Nobody waits for the answer any more: the request's client has gone, or its time was over.
    pub(super) const ABANDONED: Self = Self {
        sqlstate: None,
        kind: "abandoned",
    };

    pub(super) fn of(error: &sqlx::Error) -> Self {
        let sqlstate = error.as_database_error().and_then(|error| error.code());
        Self {
            sqlstate: sqlstate.map(Cow::into_owned),
            kind: match error {
                sqlx::Error::PoolTimedOut => "pool_timed_out",
                sqlx::Error::PoolClosed => "pool_closed",
                sqlx::Error::Io(_) => "connection_lost",
                sqlx::Error::Protocol(_) => "protocol",
                sqlx::Error::RowNotFound => "row_not_found",
                // The conventions' word for anything else.
                _ => "_OTHER",
            },
        }
    }

    /// `error.type`, and the server's own code.
    pub(super) fn attributes(&self) -> Vec<KeyValue> {
        match &self.sqlstate {
            None => vec![KeyValue::new("error.type", self.kind)],
            Some(code) => vec![
                KeyValue::new("error.type", code.clone()),
                KeyValue::new("db.response.status_code", code.clone()),
            ],
        }
    }

    /// For people. Never the server's message: that may quote a value.
    pub(super) fn reason(&self) -> &'static str {
        match self.sqlstate.as_deref() {
            None => self.kind,
            Some("57014") => "canceled by the statement timeout",
            Some("53300") => "the server has too many connections",
            Some(code) if code.starts_with("57P") => "the server is shutting down or starting",
            Some(_) => "the server refused",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A failure is named by its kind, and says nothing of what the statement was about.
    #[test]
    fn a_driver_s_words_stay_inside() {
        let secret = sqlx::Error::Protocol("the secret value 4711".to_owned());
        let failure = Failure::of(&secret);
        assert_eq!(
            failure.attributes(),
            [KeyValue::new("error.type", "protocol")]
        );
        assert_eq!(failure.reason(), "protocol");
        let timed_out = Failure::of(&sqlx::Error::PoolTimedOut);
        assert_eq!(timed_out.reason(), "pool_timed_out");
    }
}
