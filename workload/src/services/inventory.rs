//! inventory-service: what is in stock, reservations, and what runs low among what a search finds.

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, SqlStr};

use super::common::{self, Service};
use super::routes;
use super::search::{Search, SearchQuery};
use crate::db::{self, Connection, Statement};
use crate::problem::Problem;
use crate::simulate::Working;

/// The service's name, on its connections and in its answers.
pub const NAME: &str = "inventory-service";

const PAGES: &str = "/inventory/check/{id}, /inventory/reservations (POST), \
                     /inventory/low-stock?q=…, /health or /debug/pprof/profile";

/// The most that one reservation takes, as in an order.
const MAX_QUANTITY: i32 = 100;

/// The service's routes.
pub fn router(service: &Service) -> Router {
    let own = Router::new()
        .route("/inventory/check/{id}", get(check))
        .route("/inventory/reservations", post(reserve))
        .route("/inventory/low-stock", get(low_stock));
    routes::router(service, own, PAGES)
}

/// What there is of a product.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, sqlx::FromRow)]
pub struct Stock {
    /// The product's number.
    pub product_id: i64,
    /// Where it lies.
    pub warehouse: String,
    /// What lies there.
    pub on_hand: i32,
    /// How much of that is promised to somebody.
    pub reserved: i32,
    /// How much of it is not.
    pub available: i32,
    /// When less than this is available, more should be ordered.
    pub reorder_level: i32,
}

async fn check(
    State(service): State<Service>,
    Path(id): Path<String>,
) -> Result<Json<Stock>, Problem> {
    let id = common::id(&id, "product")?;
    db::run(service.pool(), &CHECK, async |connection, sql| {
        check_stock(connection, sql, id).await
    })
    .await?
    .map(Json)
    .ok_or_else(|| no_such_product(StatusCode::NOT_FOUND, id))
}

const CHECK: Statement = Statement::select(
    "stock",
    "SELECT product_id, warehouse, on_hand, reserved, on_hand - reserved AS available, \
            reorder_level FROM stock WHERE product_id = $1",
);

/// What there is of one product.
pub async fn check_stock(
    connection: &mut PgConnection,
    sql: SqlStr,
    id: i64,
) -> Result<Option<Stock>, sqlx::Error> {
    sqlx::query_as(sql)
        .bind(id)
        .fetch_optional(connection)
        .await
}

/// A product of which little is left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, sqlx::FromRow)]
pub struct LowStock {
    /// The product's number.
    pub id: i64,
    /// What it is called.
    pub name: String,
    /// Where it lies.
    pub warehouse: String,
    /// How much of it is not promised to anybody.
    pub available: i32,
    /// When less than this is available, more should be ordered.
    pub reorder_level: i32,
}

#[derive(Debug, Serialize)]
struct LowStockFound {
    q: String,
    count: usize,
    products: Vec<LowStock>,
}

async fn low_stock(
    State(service): State<Service>,
    query: Result<Query<SearchQuery>, QueryRejection>,
) -> Result<Json<LowStockFound>, Problem> {
    let search = common::query(query)?.check()?;
    let mut connection = db::acquire(service.pool()).await?;
    let products = low_stock_on(&mut connection, &search).await?;
    Ok(Json(LowStockFound {
        q: search.words.join(","),
        count: products.len(),
        products,
    }))
}

/// One of this service's heavy queries, on a connection that is held.
pub fn heavy<'a>(connection: &'a mut Connection, search: &'a Search) -> Working<'a> {
    Box::pin(async move { low_stock_on(connection, search).await.map(drop) })
}

async fn low_stock_on(
    connection: &mut Connection,
    search: &Search,
) -> Result<Vec<LowStock>, Problem> {
    db::run_on(connection, &LOW_STOCK, async |connection, sql| {
        low_stock_products(connection, sql, search).await
    })
    .await
}

/// Products that run low and whose description has any of the words. As with the product
/// service's search, a rare word costs a scan of all descriptions.
pub async fn low_stock_products(
    connection: &mut PgConnection,
    sql: SqlStr,
    search: &Search,
) -> Result<Vec<LowStock>, sqlx::Error> {
    sqlx::query_as(sql)
        .bind(search.patterns())
        .bind(search.limit)
        .fetch_all(connection)
        .await
}

/// The statement of [`low_stock_products`].
pub const LOW_STOCK: Statement = Statement::select(
    "products",
    "SELECT p.id, p.name, s.warehouse, s.on_hand - s.reserved AS available, s.reorder_level \
     FROM products AS p JOIN stock AS s ON s.product_id = p.id \
     WHERE p.description ILIKE ANY ($1) AND s.on_hand - s.reserved < s.reorder_level LIMIT $2",
);

#[derive(Debug, Deserialize)]
struct NewReservation {
    product_id: i64,
    quantity: i32,
}

/// A reservation that was made.
#[derive(Debug, Serialize, sqlx::FromRow)]
struct Reserved {
    id: i64,
    product_id: i64,
    quantity: i32,
    available: i32,
}

async fn reserve(
    State(service): State<Service>,
    wanted: Result<Json<NewReservation>, JsonRejection>,
) -> Result<(StatusCode, Json<Reserved>), Problem> {
    let wanted = common::body(wanted)?;
    if !(1..=MAX_QUANTITY).contains(&wanted.quantity) {
        let detail = format!("a quantity lies between 1 and {MAX_QUANTITY}");
        return Err(Problem::bad_request("quantity_out_of_range", detail));
    }
    let mut connection = db::acquire(service.pool()).await?;
    let reserved = db::run_on(&mut connection, &RESERVE, async |connection, sql| {
        reserve_stock(connection, sql, &wanted).await
    })
    .await?;
    if let Some(reserved) = reserved {
        return Ok((StatusCode::CREATED, Json(reserved)));
    }
    // Nothing was written: the product is not there, or there is not enough of it.
    let id = wanted.product_id;
    let stock = db::run_on(&mut connection, &CHECK, async |connection, sql| {
        check_stock(connection, sql, id).await
    });
    let Some(stock) = stock.await? else {
        return Err(no_such_product(StatusCode::UNPROCESSABLE_ENTITY, id));
    };
    let detail = format!("only {} of product {id} are available", stock.available);
    Err(Problem::new(StatusCode::CONFLICT, "out_of_stock", detail))
}

/// Takes from the stock and notes for what. The row of the stock is locked and looked at anew by
/// the update, so that two reservations never promise the same piece.
const RESERVE: Statement = Statement::insert(
    "reservations",
    "WITH taken AS ( \
         UPDATE stock SET reserved = reserved + $2 \
         WHERE product_id = $1 AND on_hand - reserved >= $2 \
         RETURNING product_id, on_hand - reserved AS available \
     ), noted AS ( \
         INSERT INTO reservations (product_id, quantity) SELECT product_id, $2 FROM taken \
         RETURNING id, product_id, quantity \
     ) \
     SELECT noted.id, noted.product_id, noted.quantity, taken.available FROM noted, taken",
);

async fn reserve_stock(
    connection: &mut PgConnection,
    sql: SqlStr,
    wanted: &NewReservation,
) -> Result<Option<Reserved>, sqlx::Error> {
    sqlx::query_as(sql)
        .bind(wanted.product_id)
        .bind(wanted.quantity)
        .fetch_optional(connection)
        .await
}

fn no_such_product(status: StatusCode, id: i64) -> Problem {
    Problem::new(
        status,
        "no_such_product",
        format!("there is no product {id}"),
    )
}
