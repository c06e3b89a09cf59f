//! order-service: orders, a customer's history, and what is ordered most among what a search
//! finds.

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use sqlx::{PgConnection, SqlStr};

use super::common::{self, Service};
use super::routes;
use super::search::{Search, SearchQuery, check_limit};
use crate::db::{self, Connection, Statement};
use crate::problem::Problem;
use crate::simulate::Working;

/// The service's name, on its connections and in its answers.
pub const NAME: &str = "order-service";

const PAGES: &str = "/orders (POST), /orders/history?customer_id=…, /orders/popular-products?q=…, \
                     /health or /debug/pprof/profile";

/// The most lines of one order: a shopping cart, not a wholesaler's truck.
const MAX_ITEMS: usize = 20;

/// The most of one product in an order.
const MAX_QUANTITY: i32 = 100;

/// The service's routes.
pub fn router(service: &Service) -> Router {
    let own = Router::new()
        .route("/orders", post(place))
        .route("/orders/history", get(history))
        .route("/orders/popular-products", get(popular));
    routes::router(service, own, PAGES)
}

/// A product and how often it was ordered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, sqlx::FromRow)]
pub struct PopularProduct {
    /// The product's number.
    pub id: i64,
    /// What it is called.
    pub name: String,
    /// Where in the shop it stands.
    pub department: String,
    /// Its price, in cents.
    pub price_cents: i32,
    /// How many pieces were ordered.
    pub units: i64,
}

#[derive(Debug, Serialize)]
struct Popular {
    q: String,
    count: usize,
    products: Vec<PopularProduct>,
}

async fn popular(
    State(service): State<Service>,
    query: Result<Query<SearchQuery>, QueryRejection>,
) -> Result<Json<Popular>, Problem> {
    let search = common::query(query)?.check()?;
    let mut connection = db::acquire(service.pool()).await?;
    let products = popular_on(&mut connection, &search).await?;
    Ok(Json(Popular {
        q: search.words.join(","),
        count: products.len(),
        products,
    }))
}

/// One of this service's heavy queries, on a connection that is held.
pub fn heavy<'a>(connection: &'a mut Connection, search: &'a Search) -> Working<'a> {
    Box::pin(async move { popular_on(connection, search).await.map(drop) })
}

async fn popular_on(
    connection: &mut Connection,
    search: &Search,
) -> Result<Vec<PopularProduct>, Problem> {
    db::run_on(connection, &POPULAR, async |connection, sql| {
        popular_products(connection, sql, search).await
    })
    .await
}

/// The most ordered among the first 200 products whose description has any of the words. As with
/// the product service's search, a rare word costs a scan of all descriptions.
pub async fn popular_products(
    connection: &mut PgConnection,
    sql: SqlStr,
    search: &Search,
) -> Result<Vec<PopularProduct>, sqlx::Error> {
    sqlx::query_as(sql)
        .bind(search.patterns())
        .bind(search.limit)
        .fetch_all(connection)
        .await
}

/// The statement of [`popular_products`].
pub const POPULAR: Statement = Statement::select(
    "products",
    "SELECT found.id, found.name, found.department, found.price_cents, \
            coalesce(ordered.units, 0) AS units \
     FROM (SELECT id, name, department, price_cents FROM products \
           WHERE description ILIKE ANY ($1) LIMIT 200) AS found \
     CROSS JOIN LATERAL (SELECT sum(quantity) AS units FROM order_items \
                         WHERE product_id = found.id) AS ordered \
     ORDER BY units DESC, found.id LIMIT $2",
);

#[derive(Debug, Deserialize)]
struct HistoryQuery {
    customer_id: i64,
    #[serde(default = "default_limit")]
    limit: i64,
}

fn default_limit() -> i64 {
    20
}

/// One line of an order in the history.
#[derive(Debug, sqlx::FromRow)]
struct HistoryRow {
    order_id: i64,
    status: String,
    ordered_at: String,
    product_id: i64,
    name: String,
    quantity: i32,
    unit_price_cents: i32,
}

/// An order, with what was ordered.
#[derive(Debug, Serialize)]
struct Order {
    id: i64,
    status: String,
    /// In UTC, by RFC 3339.
    ordered_at: String,
    total_cents: i64,
    items: Vec<Item>,
}

#[derive(Debug, Serialize)]
struct Item {
    product_id: i64,
    name: String,
    quantity: i32,
    unit_price_cents: i32,
}

#[derive(Debug, Serialize)]
struct History {
    customer_id: i64,
    count: usize,
    orders: Vec<Order>,
}

async fn history(
    State(service): State<Service>,
    query: Result<Query<HistoryQuery>, QueryRejection>,
) -> Result<Json<History>, Problem> {
    let query = common::query(query)?;
    check_limit(query.limit)?;
    let customer = query.customer_id;
    let mut connection = db::acquire(service.pool()).await?;
    let rows = db::run_on(&mut connection, &HISTORY, async |connection, sql| {
        order_history(connection, sql, customer, query.limit).await
    })
    .await?;
    if rows.is_empty() {
        let known = db::run_on(&mut connection, &CUSTOMER, async |connection, sql| {
            customer_exists(connection, sql, customer).await
        });
        if !known.await? {
            return Err(no_such_customer(StatusCode::NOT_FOUND, customer));
        }
    }
    let orders = orders_of(rows);
    Ok(Json(History {
        customer_id: customer,
        count: orders.len(),
        orders,
    }))
}

const HISTORY: Statement = Statement::select(
    "orders",
    "SELECT o.id AS order_id, o.status, \
            to_char(o.ordered_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') AS ordered_at, \
            i.product_id, p.name, i.quantity, i.unit_price_cents \
     FROM (SELECT id, status, ordered_at FROM orders WHERE customer_id = $1 \
           ORDER BY ordered_at DESC, id DESC LIMIT $2) AS o \
     JOIN order_items AS i ON i.order_id = o.id \
     JOIN products AS p ON p.id = i.product_id \
     ORDER BY o.ordered_at DESC, o.id DESC, i.line",
);

async fn order_history(
    connection: &mut PgConnection,
    sql: SqlStr,
    customer: i64,
    limit: i64,
) -> Result<Vec<HistoryRow>, sqlx::Error> {
    sqlx::query_as(sql)
        .bind(customer)
        .bind(limit)
        .fetch_all(connection)
        .await
}

const CUSTOMER: Statement = Statement::select(
    "customers",
    "SELECT EXISTS (SELECT FROM customers WHERE id = $1)",
);

async fn customer_exists(
    connection: &mut PgConnection,
    sql: SqlStr,
    customer: i64,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(sql)
        .bind(customer)
        .fetch_one(connection)
        .await
}

/// Lines become orders; those of one order follow each other.
fn orders_of(rows: Vec<HistoryRow>) -> Vec<Order> {
    let mut orders: Vec<Order> = Vec::new();
    for row in rows {
        if orders.last().is_none_or(|order| order.id != row.order_id) {
            orders.push(Order {
                id: row.order_id,
                status: row.status,
                ordered_at: row.ordered_at,
                total_cents: 0,
                items: Vec::new(),
            });
        }
        if let Some(order) = orders.last_mut() {
            order.total_cents += i64::from(row.quantity) * i64::from(row.unit_price_cents);
            order.items.push(Item {
                product_id: row.product_id,
                name: row.name,
                quantity: row.quantity,
                unit_price_cents: row.unit_price_cents,
            });
        }
    }
    orders
}

#[derive(Debug, Deserialize)]
struct NewOrder {
    customer_id: i64,
    items: Vec<NewItem>,
}

#[derive(Debug, Deserialize)]
struct NewItem {
    product_id: i64,
    quantity: i32,
}

/// An order that was placed.
#[derive(Debug, Serialize, sqlx::FromRow)]
struct Placed {
    id: i64,
    customer_id: i64,
    status: String,
    total_cents: i64,
}

impl NewOrder {
    fn check(&self) -> Result<(), Problem> {
        if !(1..=MAX_ITEMS).contains(&self.items.len()) {
            let detail = format!("an order has between 1 and {MAX_ITEMS} items");
            return Err(Problem::bad_request("items_out_of_range", detail));
        }
        let in_range = |item: &NewItem| (1..=MAX_QUANTITY).contains(&item.quantity);
        if !self.items.iter().all(in_range) {
            let detail = format!("a quantity lies between 1 and {MAX_QUANTITY}");
            return Err(Problem::bad_request("quantity_out_of_range", detail));
        }
        Ok(())
    }
}

async fn place(
    State(service): State<Service>,
    order: Result<Json<NewOrder>, JsonRejection>,
) -> Result<(StatusCode, Json<Placed>), Problem> {
    let order = common::body(order)?;
    order.check()?;
    let mut connection = db::acquire(service.pool()).await?;
    let placed = db::run_on(&mut connection, &PLACE, async |connection, sql| {
        place_order(connection, sql, &order).await
    })
    .await?;
    if let Some(placed) = placed {
        return Ok((StatusCode::CREATED, Json(placed)));
    }
    // Nothing was written: either the customer or a product is not there.
    let customer = order.customer_id;
    let known = db::run_on(&mut connection, &CUSTOMER, async |connection, sql| {
        customer_exists(connection, sql, customer).await
    });
    if !known.await? {
        return Err(no_such_customer(StatusCode::UNPROCESSABLE_ENTITY, customer));
    }
    Err(Problem::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        "no_such_product",
        "a product of this order is not in the catalogue; nothing was ordered",
    ))
}

/// The order and its lines, at today's prices: all of it or nothing.
const PLACE: Statement = Statement::insert(
    "orders",
    "WITH wanted AS ( \
         SELECT w.line, w.product_id, w.quantity, p.price_cents \
         FROM unnest($2::bigint[], $3::integer[]) WITH ORDINALITY AS w(product_id, quantity, line) \
         JOIN products AS p ON p.id = w.product_id \
     ), placed AS ( \
         INSERT INTO orders (customer_id) \
         SELECT id FROM customers \
         WHERE id = $1 AND (SELECT count(*) FROM wanted) = cardinality($2) \
         RETURNING id, customer_id, status \
     ), lines AS ( \
         INSERT INTO order_items (order_id, line, product_id, quantity, unit_price_cents) \
         SELECT placed.id, line, product_id, quantity, price_cents FROM placed, wanted \
     ) \
     SELECT id, customer_id, status, \
            (SELECT sum(quantity::bigint * price_cents)::bigint FROM wanted) AS total_cents \
     FROM placed",
);

async fn place_order(
    connection: &mut PgConnection,
    sql: SqlStr,
    order: &NewOrder,
) -> Result<Option<Placed>, sqlx::Error> {
    let products: Vec<i64> = order.items.iter().map(|item| item.product_id).collect();
    let quantities: Vec<i32> = order.items.iter().map(|item| item.quantity).collect();
    sqlx::query_as(sql)
        .bind(order.customer_id)
        .bind(products)
        .bind(quantities)
        .fetch_optional(connection)
        .await
}

fn no_such_customer(status: StatusCode, customer: i64) -> Problem {
    let detail = format!("there is no customer {customer}");
    Problem::new(status, "no_such_customer", detail)
}
