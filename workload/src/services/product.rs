//! product-service: the search that no index helps, and a product by its id.

use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{MatchedPath, Path, Query, Request, State};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, PgPool};

use crate::db::{self, ACQUIRE_TIMEOUT, PoolHealth, STATEMENT_TIMEOUT};
use crate::problem::Problem;
use crate::{profiling, telemetry};

/// The service's name, on its connections and in its answers.
pub const NAME: &str = "product-service";

/// A word shorter than this finds half of the catalogue.
const MIN_QUERY_CHARS: usize = 2;

/// Longer than any description's sentence: nobody searches for that.
const MAX_QUERY_CHARS: usize = 100;

/// The most products in one answer: a page of them.
const MAX_LIMIT: i64 = 100;

/// A request may wait for a connection, then run a statement, and needs a moment of its own.
const REQUEST_TIMEOUT: Duration =
    ACQUIRE_TIMEOUT.saturating_add(STATEMENT_TIMEOUT.saturating_add(Duration::from_secs(1)));

/// The service's routes on `pool`.
pub fn router(pool: PgPool) -> Router {
    Router::new()
        .route("/products/search", get(search))
        .route("/products/{id}", get(product))
        .route("/health", get(health))
        .with_state(pool)
        .layer(middleware::from_fn(time_limit))
        .merge(profiling::router())
        .merge(telemetry::routes())
        .fallback(no_such_page)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn(telemetry::http::serve))
}

/// One product, as a search lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, sqlx::FromRow)]
pub struct Product {
    /// Its number, from 1.
    pub id: i64,
    /// What it is called.
    pub name: String,
    /// Where in the shop it stands.
    pub department: String,
    /// Several sentences about it.
    pub description: String,
    /// Its price, in cents.
    pub price_cents: i32,
}

/// What a search found.
#[derive(Debug, Serialize, Deserialize)]
pub struct SearchResult {
    /// The word that was searched.
    pub q: String,
    /// How many products are listed.
    pub count: usize,
    /// The first of them that the database came across.
    pub products: Vec<Product>,
}

#[derive(Debug, Deserialize)]
struct SearchQuery {
    q: Option<String>,
    #[serde(default = "default_limit")]
    limit: i64,
}

fn default_limit() -> i64 {
    20
}

impl SearchQuery {
    /// The word to search for, or what is wrong with it.
    fn word(&self) -> Result<&str, Problem> {
        let word = self.q.as_deref().map(str::trim).unwrap_or_default();
        if word.is_empty() {
            let detail = "say what to search for: /products/search?q=…";
            return Err(Problem::bad_request("q_missing", detail));
        }
        if word.contains('\0') {
            let detail = "q must not contain a NUL character";
            return Err(Problem::bad_request("q_invalid", detail));
        }
        let chars = word.chars().count();
        if chars < MIN_QUERY_CHARS {
            let detail = format!("q must have at least {MIN_QUERY_CHARS} characters");
            return Err(Problem::bad_request("q_too_short", detail));
        }
        if chars > MAX_QUERY_CHARS {
            let detail = format!("q must have at most {MAX_QUERY_CHARS} characters");
            return Err(Problem::bad_request("q_too_long", detail));
        }
        if !(1..=MAX_LIMIT).contains(&self.limit) {
            let detail = format!("limit must lie between 1 and {MAX_LIMIT}");
            return Err(Problem::bad_request("limit_out_of_range", detail));
        }
        Ok(word)
    }
}

async fn search(
    State(pool): State<PgPool>,
    query: Result<Query<SearchQuery>, QueryRejection>,
) -> Result<Json<SearchResult>, Problem> {
    let Query(query) =
        query.map_err(|error| Problem::bad_request("bad_query", error.body_text()))?;
    let word = query.word()?;
    let mut connection = db::acquire(&pool).await?;
    let products = search_products_unindexed(&mut connection, word, query.limit).await?;
    Ok(Json(SearchResult {
        q: word.to_owned(),
        count: products.len(),
        products,
    }))
}

/// Searches the descriptions for `word`, anywhere and in any case.
///
/// No index can serve a pattern that starts with `%`: PostgreSQL reads every product, and
/// lower-cases every description, until it has found `limit` of them. A common word is found at
/// once; a rare one costs a scan of the whole table.
pub async fn search_products_unindexed(
    connection: &mut PgConnection,
    word: &str,
    limit: i64,
) -> Result<Vec<Product>, sqlx::Error> {
    sqlx::query_as(SEARCH)
        .bind(escape_like(word))
        .bind(limit)
        .fetch_all(connection)
        .await
}

/// The statement of [`search_products_unindexed`].
pub const SEARCH: &str = "SELECT id, name, department, description, price_cents \
     FROM products WHERE description ILIKE '%' || $1 || '%' LIMIT $2";

/// Takes the meaning from LIKE's own characters, so that `100%` finds what it says.
fn escape_like(word: &str) -> String {
    let mut escaped = String::with_capacity(word.len() + 4);
    for character in word.chars() {
        if matches!(character, '\\' | '%' | '_') {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

async fn product(
    State(pool): State<PgPool>,
    Path(id): Path<String>,
) -> Result<Json<Product>, Problem> {
    let id: i64 = id.parse().map_err(|_| {
        Problem::bad_request("bad_id", "a product's id is a whole number, such as 42")
    })?;
    let mut connection = db::acquire(&pool).await?;
    product_by_id(&mut connection, id)
        .await?
        .map(Json)
        .ok_or_else(|| Problem::not_found("no_such_product", format!("there is no product {id}")))
}

async fn product_by_id(
    connection: &mut PgConnection,
    id: i64,
) -> Result<Option<Product>, sqlx::Error> {
    sqlx::query_as(
        "SELECT id, name, department, description, price_cents FROM products WHERE id = $1",
    )
    .bind(id)
    .fetch_optional(connection)
    .await
}

/// What `GET /health` tells.
#[derive(Debug, Serialize)]
struct Health {
    status: &'static str,
    service: &'static str,
    pool: PoolHealth,
}

/// Alive, and how full its pool is. Asks the database nothing: with an exhausted pool that
/// question would wait in the same queue.
async fn health(State(pool): State<PgPool>) -> Json<Health> {
    Json(Health {
        status: "ok",
        service: NAME,
        pool: PoolHealth::of(&pool),
    })
}

/// Ends a request that takes too long. Its future is dropped, and the connection given back.
async fn time_limit(path: Option<MatchedPath>, request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let path = path.as_ref().map_or("?", MatchedPath::as_str);
            tracing::warn!(path, "request timed out");
            axum::response::IntoResponse::into_response(Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "request_timeout",
                "the request took too long; try again later",
            ))
        }
    }
}

async fn no_such_page() -> Problem {
    Problem::not_found(
        "no_such_page",
        "try /products/search?q=…, /products/{id}, /health or /debug/pprof/profile",
    )
}

async fn no_such_method() -> Problem {
    Problem::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "no_such_method",
        "this service only answers GET",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// LIKE's own characters are searched for like any other.
    #[test]
    fn like_characters_lose_their_meaning() {
        assert_eq!(escape_like("100% wool_mix\\"), "100\\% wool\\_mix\\\\");
        assert_eq!(escape_like("wireless"), "wireless");
    }

    /// Characters are counted, not bytes.
    #[test]
    fn a_word_is_checked() {
        let code = |q: Option<&str>, limit| {
            let q = q.map(str::to_owned);
            SearchQuery { q, limit }
                .word()
                .map(str::to_owned)
                .map_err(|problem| problem.code)
        };
        assert_eq!(code(Some(" zither "), 20), Ok("zither".to_owned()));
        assert_eq!(code(Some("äö"), 20), Ok("äö".to_owned()));
        assert_eq!(code(None, 20), Err("q_missing"));
        assert_eq!(code(Some("  "), 20), Err("q_missing"));
        assert_eq!(code(Some("ä"), 20), Err("q_too_short"));
        assert_eq!(code(Some(&"x".repeat(101)), 20), Err("q_too_long"));
        assert_eq!(code(Some("a\0b"), 20), Err("q_invalid"));
        assert_eq!(code(Some("zither"), 0), Err("limit_out_of_range"));
        assert_eq!(code(Some("zither"), 101), Err("limit_out_of_range"));
    }
}
