//! product-service: the catalogue by pages, a product by its id, and the search that no index
//! helps.

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::routing::get;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, SqlStr};

use super::common::{self, Service};
use super::routes;
use super::search::{Search, SearchQuery, check_limit, escape_like};
use crate::db::{self, Connection, Statement};
use crate::index;
use crate::problem::Problem;
use crate::simulate::Working;

/// The service's name, on its connections and in its answers.
pub const NAME: &str = "product-service";

const PAGES: &str = "/products, /products/search?q=…, /products/{id}, /health or \
                     /debug/pprof/profile";

/// The service's routes.
pub fn router(service: &Service) -> Router {
    let own = Router::new()
        .route("/products", get(list))
        .route("/products/search", get(search))
        .route("/products/{id}", get(product))
        .merge(index::router());
    routes::router(service, own, PAGES)
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
    /// The words that were searched, with commas between them.
    pub q: String,
    /// How many products are listed.
    pub count: usize,
    /// The first of them that the database came across.
    pub products: Vec<Product>,
}

async fn search(
    State(service): State<Service>,
    query: Result<Query<SearchQuery>, QueryRejection>,
) -> Result<Json<SearchResult>, Problem> {
    let search = common::query(query)?.check()?;
    let mut connection = db::acquire(service.pool()).await?;
    let products = search_on(&mut connection, &search).await?;
    Ok(Json(SearchResult {
        q: search.words.join(","),
        count: products.len(),
        products,
    }))
}

/// One of this service's heavy queries, on a connection that is held.
pub fn heavy<'a>(connection: &'a mut Connection, search: &'a Search) -> Working<'a> {
    Box::pin(async move { search_on(connection, search).await.map(drop) })
}

async fn search_on(connection: &mut Connection, search: &Search) -> Result<Vec<Product>, Problem> {
    let statement = if search.words.len() == 1 {
        SEARCH_STATEMENT
    } else {
        SEARCH_ANY_STATEMENT
    };
    db::run_on(connection, &statement, async |connection, sql| {
        search_products_unindexed(connection, sql, search).await
    })
    .await
}

/// Searches the descriptions for a word, anywhere and in any case, or for any of several.
///
/// No index of the usual kind can serve a pattern that starts with `%`: PostgreSQL reads every
/// product, and lower-cases every description, until it has found `limit` of them. A common word
/// is found at once; a rare one costs a scan of the whole table, and each further word costs as
/// much again.
pub async fn search_products_unindexed(
    connection: &mut PgConnection,
    sql: SqlStr,
    search: &Search,
) -> Result<Vec<Product>, sqlx::Error> {
    let query = match search.words.as_slice() {
        [word] => sqlx::query_as(sql).bind(escape_like(word)),
        _ => sqlx::query_as(sql).bind(search.patterns()),
    };
    query.bind(search.limit).fetch_all(connection).await
}

/// The statement of [`search_products_unindexed`] for one word.
pub const SEARCH: &str = "SELECT id, name, department, description, price_cents \
     FROM products WHERE description ILIKE '%' || $1 || '%' LIMIT $2";

/// The statement of [`search_products_unindexed`] for any of several words.
pub const SEARCH_ANY: &str = "SELECT id, name, department, description, price_cents \
     FROM products WHERE description ILIKE ANY ($1) LIMIT $2";

const SEARCH_STATEMENT: Statement = Statement::select("products", SEARCH);
const SEARCH_ANY_STATEMENT: Statement = Statement::select("products", SEARCH_ANY);

async fn product(
    State(service): State<Service>,
    Path(id): Path<String>,
) -> Result<Json<Product>, Problem> {
    let id = common::id(&id, "product")?;
    db::run(service.pool(), &BY_ID, async |connection, sql| {
        product_by_id(connection, sql, id).await
    })
    .await?
    .map(Json)
    .ok_or_else(|| Problem::not_found("no_such_product", format!("there is no product {id}")))
}

const BY_ID: Statement = Statement::select(
    "products",
    "SELECT id, name, department, description, price_cents FROM products WHERE id = $1",
);

async fn product_by_id(
    connection: &mut PgConnection,
    sql: SqlStr,
    id: i64,
) -> Result<Option<Product>, sqlx::Error> {
    sqlx::query_as(sql)
        .bind(id)
        .fetch_optional(connection)
        .await
}

#[derive(Debug, Deserialize)]
struct ListQuery {
    department: Option<String>,
    #[serde(default)]
    after: i64,
    #[serde(default = "default_limit")]
    limit: i64,
}

fn default_limit() -> i64 {
    20
}

/// A page of the catalogue.
#[derive(Debug, Serialize)]
struct Page {
    count: usize,
    products: Vec<Product>,
    /// What to give as `after` for the next page; `null` on the last.
    next: Option<i64>,
}

async fn list(
    State(service): State<Service>,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<Json<Page>, Problem> {
    let query = common::query(query)?;
    check_limit(query.limit)?;
    let mut products = db::run(service.pool(), &LIST, async |connection, sql| {
        list_products(connection, sql, &query).await
    })
    .await?;
    // One more than asked for was fetched, to know whether there is a next page.
    let page = usize::try_from(query.limit).unwrap_or_default();
    let has_next = products.len() > page;
    products.truncate(page);
    Ok(Json(Page {
        count: products.len(),
        next: products.last().filter(|_| has_next).map(|last| last.id),
        products,
    }))
}

const LIST: Statement = Statement::select(
    "products",
    "SELECT id, name, department, description, price_cents FROM products \
     WHERE id > $1 AND ($2::text IS NULL OR department = $2) ORDER BY id LIMIT $3",
);

async fn list_products(
    connection: &mut PgConnection,
    sql: SqlStr,
    query: &ListQuery,
) -> Result<Vec<Product>, sqlx::Error> {
    sqlx::query_as(sql)
        .bind(query.after)
        .bind(query.department.as_deref())
        .bind(query.limit + 1)
        .fetch_all(connection)
        .await
}
