//! The fix: an index of the descriptions' trigrams, by which PostgreSQL finds a word in the middle
//! of a text without reading all of them.

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use sqlx::{Acquire, PgConnection, PgPool};

use crate::db::{Failure, STATEMENT_TIMEOUT};
use crate::problem::Problem;
use crate::services::common::Service;
use crate::services::demo::{self, INDEX_PATH};

/// The index's name.
pub const NAME: &str = "products_description_trgm";

/// What PostgreSQL says when an extension's files are not installed.
const NOT_INSTALLED: [&str; 2] = ["0A000", "58P01"];

/// What to do with the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Make it, where it is not there.
    Create,
    /// Remove it, where it is there.
    Drop,
}

/// An index that could not be made or dropped.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The server has no trigrams.
    #[error(
        "this PostgreSQL has no extension pg_trgm, of which the index is made; install the \
         package that has its contributed extensions (postgresql-contrib), or use the private \
         PostgreSQL, which has it"
    )]
    NoTrigrams,
    /// The role may not install an extension into the database.
    #[error(
        "this database role may not install the extension pg_trgm; have the database's owner \
         execute: CREATE EXTENSION pg_trgm"
    )]
    NotAllowed,
    /// Anything else.
    #[error("the index cannot be changed: {0}")]
    Database(#[from] sqlx::Error),
}

/// Whether the index is there and can be used.
pub async fn exists(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT FROM pg_index WHERE indexrelid = to_regclass($1) AND indisvalid)",
    )
    .bind(NAME)
    .fetch_one(connection)
    .await
}

/// Makes or drops the index. Searches go on while it is made; a drop waits for those that run.
pub async fn apply(connection: &mut PgConnection, action: Action) -> Result<(), IndexError> {
    // Two at once would not be harmful, but one of them would fail.
    let mut transaction = connection.begin().await?;
    sqlx::query("SELECT pg_advisory_xact_lock(hashtext($1))")
        .bind(NAME)
        .execute(&mut *transaction)
        .await?;
    match action {
        Action::Create => {
            let install = sqlx::raw_sql("CREATE EXTENSION IF NOT EXISTS pg_trgm");
            install.execute(&mut *transaction).await.map_err(explain)?;
            sqlx::raw_sql(
                "CREATE INDEX IF NOT EXISTS products_description_trgm \
                 ON products USING gin (description gin_trgm_ops)",
            )
            .execute(&mut *transaction)
            .await?;
        }
        Action::Drop => {
            sqlx::raw_sql("DROP INDEX IF EXISTS products_description_trgm")
                .execute(&mut *transaction)
                .await?;
        }
    }
    transaction.commit().await?;
    Ok(())
}

fn explain(error: sqlx::Error) -> IndexError {
    let code = error.as_database_error().and_then(|error| error.code());
    match code.as_deref() {
        Some(code) if NOT_INSTALLED.contains(&code) => IndexError::NoTrigrams,
        Some("42501") => IndexError::NotAllowed,
        _ => IndexError::Database(error),
    }
}

/// What the product service tells of the database that all share.
#[derive(Debug, Serialize, sqlx::FromRow)]
struct DatabaseState {
    name: String,
    version: String,
    search_index: bool,
    backends_active: i64,
}

/// `GET /debug/database`, and `POST /demo/index`.
pub fn router() -> Router<Service> {
    Router::new()
        .route("/debug/database", get(database))
        .route(INDEX_PATH, post(change))
}

async fn database(State(service): State<Service>) -> Result<Json<DatabaseState>, Problem> {
    let state = database_state(service.simulation().control()).await;
    state.map(Json).map_err(|error| {
        tracing::warn!(%error, "the database's state cannot be had");
        Failure::of(&error, STATEMENT_TIMEOUT).problem()
    })
}

async fn database_state(control: &PgPool) -> Result<DatabaseState, sqlx::Error> {
    sqlx::query_as(
        "SELECT current_database()::text AS name, \
                current_setting('server_version') AS version, \
                EXISTS (SELECT FROM pg_index \
                        WHERE indexrelid = to_regclass($1) AND indisvalid) AS search_index, \
                (SELECT count(*) FROM pg_stat_activity \
                 WHERE datname = current_database() AND backend_type = 'client backend' \
                   AND state = 'active' AND pid <> pg_backend_pid()) AS backends_active",
    )
    .bind(NAME)
    .fetch_one(control)
    .await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    action: Action,
}

/// What became of the index.
#[derive(Debug, Serialize)]
struct Changed {
    search_index: bool,
    seconds: f64,
}

async fn change(
    State(service): State<Service>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Changed>, Problem> {
    demo::check_allowed(service.simulation().is_enabled(), &headers)?;
    let Change { action } = demo::options(&body)?;
    // A task of its own: what was begun is finished, also when nobody waits for it any more.
    let control = service.simulation().control().clone();
    let changed = tokio::spawn(async move { change_by(&control, action).await });
    let changed = changed.await.map_err(|error| {
        tracing::error!(%error, "the index was not changed");
        Failure::DatabaseError.problem()
    })?;
    changed.map(Json).map_err(problem)
}

async fn change_by(control: &PgPool, action: Action) -> Result<Changed, IndexError> {
    let start = std::time::Instant::now();
    let mut connection = control.acquire().await?;
    apply(&mut connection, action).await?;
    let changed = Changed {
        search_index: exists(&mut connection).await?,
        seconds: start.elapsed().as_secs_f64(),
    };
    tracing::info!(
        search_index = changed.search_index,
        seconds = changed.seconds,
        "the index of descriptions was changed"
    );
    Ok(changed)
}

fn problem(error: IndexError) -> Problem {
    tracing::warn!(%error, "the index was not changed");
    match error {
        IndexError::Database(error) => Failure::of(&error, STATEMENT_TIMEOUT).problem(),
        _ => Problem::new(
            StatusCode::NOT_IMPLEMENTED,
            "no_trigrams",
            error.to_string(),
        ),
    }
}
