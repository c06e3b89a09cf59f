//! The catalogue and its trade: realistic products, customers, orders and stock, generated inside
//! the database.
//!
//! The same size and seed give the same shop. Common words (`wireless`) stand in many
//! descriptions, so that a search for them ends early; the [`RARE_WORDS`] stand in none to three,
//! so that a search for them reads everything.

use sqlx::{Connection, PgConnection, PgPool};

/// Grows with every change of the words or of the statements, so that an older catalogue is
/// replaced.
const GENERATION: i32 = 2;

/// The advisory lock that only one filling process holds: "catalog" in ASCII.
const FILL_LOCK: i64 = 0x63_61_74_61_6c_6f_67;

/// More than any demo needs, and about 10 GB: a slip of the keyboard should not fill a disk.
pub const MAX_PRODUCTS: u32 = 10_000_000;

/// Words that stand in at most three descriptions of the whole catalogue.
pub const RARE_WORDS: [&str; 48] = [
    "abacus",
    "axolotl",
    "baobab",
    "bergamot",
    "calliope",
    "cinnabar",
    "dulcimer",
    "eiderdown",
    "ermine",
    "farthing",
    "filigree",
    "gargoyle",
    "gossamer",
    "harlequin",
    "heliotrope",
    "ikebana",
    "jacaranda",
    "juniper",
    "kestrel",
    "kumquat",
    "lapislazuli",
    "limerick",
    "marzipan",
    "nacre",
    "narwhal",
    "obsidian",
    "ocarina",
    "pagoda",
    "periwinkle",
    "quetzal",
    "quince",
    "rhododendron",
    "samovar",
    "sextant",
    "tamarind",
    "tourmaline",
    "ukulele",
    "umbrage",
    "vermilion",
    "viaduct",
    "wisteria",
    "wolfram",
    "xylophone",
    "yarrow",
    "yurt",
    "zeppelin",
    "zinnia",
    "zither",
];

/// Words that stand in so many descriptions that twenty products are found at once.
pub const COMMON_WORDS: [&str; 8] = [
    "wireless",
    "wooden",
    "guarantee",
    "cotton",
    "colours",
    "portable",
    "europe",
    "battery",
];

/// What the catalogue is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Catalogue {
    /// How many products.
    pub products: u32,
    /// Which of the possible catalogues of that size.
    pub seed: i64,
}

/// What [`Catalogue::ensure`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The same catalogue was there already.
    AlreadyThere,
    /// It was written now.
    Filled,
}

impl Catalogue {
    /// How many customers the shop has: their ids are 1 to this.
    pub fn customers(self) -> u32 {
        (self.products / 20).max(1)
    }

    /// How many orders were generated; visitors place more.
    pub fn orders(self) -> u32 {
        (self.products / 4).max(1)
    }

    /// Makes the database hold exactly this catalogue. Any number of processes may call this
    /// at once: one fills, the others wait and find it done. A killed one leaves what was there.
    pub async fn ensure(self, pool: &PgPool) -> Result<Outcome, sqlx::Error> {
        let mut connection = pool.acquire().await?;
        let mut transaction = connection.begin().await?;
        sqlx::query("SELECT pg_advisory_xact_lock($1)")
            .bind(FILL_LOCK)
            .execute(&mut *transaction)
            .await?;
        if self.is_there(&mut transaction).await? {
            return Ok(Outcome::AlreadyThere);
        }
        self.fill(&mut transaction).await?;
        transaction.commit().await?;
        // Marks all rows visible, so that the first searches do not write.
        sqlx::raw_sql("VACUUM products, orders, order_items, stock")
            .execute(&mut *connection)
            .await?;
        Ok(Outcome::Filled)
    }

    /// Reads all of it: data that a crash or a full disk has broken is an error here, and not
    /// in the middle of a demo.
    pub async fn check(self, pool: &PgPool) -> Result<(), sqlx::Error> {
        let (count, _): (i64, i64) =
            sqlx::query_as("SELECT count(*), coalesce(sum(length(description)), 0) FROM products")
                .fetch_one(pool)
                .await?;
        if count == i64::from(self.products) {
            return Ok(());
        }
        Err(sqlx::Error::Protocol(format!(
            "the catalogue has {count} products instead of {}",
            self.products
        )))
    }

    async fn is_there(self, connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM catalogue \
             WHERE products = $1 AND seed = $2 AND generation = $3)",
        )
        .bind(i64::from(self.products))
        .bind(self.seed)
        .bind(GENERATION)
        .fetch_one(connection)
        .await
    }

    async fn fill(self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        // With the search's index a fill takes ten times as long. A new catalogue begins without.
        sqlx::raw_sql("DROP INDEX IF EXISTS products_description_trgm")
            .execute(&mut *connection)
            .await?;
        sqlx::raw_sql(
            "TRUNCATE products, customers, orders, order_items, stock, reservations \
             RESTART IDENTITY",
        )
        .execute(&mut *connection)
        .await?;
        sqlx::raw_sql(include_str!("catalogue/vocabulary.sql"))
            .execute(&mut *connection)
            .await?;
        sqlx::query(include_str!("catalogue/fill.sql"))
            .bind(i64::from(self.products))
            .bind(self.seed)
            .bind(RARE_WORDS.as_slice())
            .execute(&mut *connection)
            .await?;
        self.fill_trade(connection).await?;
        sqlx::query(
            "INSERT INTO catalogue (products, seed, generation) VALUES ($1, $2, $3) \
             ON CONFLICT (only_row) DO UPDATE SET products = excluded.products, \
             seed = excluded.seed, generation = excluded.generation, filled_at = now()",
        )
        .bind(i64::from(self.products))
        .bind(self.seed)
        .bind(GENERATION)
        .execute(&mut *connection)
        .await?;
        sqlx::raw_sql("ANALYZE products, customers, orders, order_items, stock")
            .execute(connection)
            .await?;
        Ok(())
    }

    /// Customers, orders and stock for the products that are there.
    async fn fill_trade(self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query(include_str!("catalogue/trade.sql"))
            .bind(i64::from(self.products))
            .bind(self.seed)
            .bind(i64::from(self.customers()))
            .bind(i64::from(self.orders()))
            .execute(&mut *connection)
            .await?;
        // The orders came with their numbers: the next one goes on from there.
        sqlx::raw_sql("SELECT setval(pg_get_serial_sequence('orders', 'id'), max(id)) FROM orders")
            .execute(connection)
            .await?;
        Ok(())
    }
}
