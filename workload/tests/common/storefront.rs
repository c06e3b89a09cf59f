//! The whole shop, one process per service, on a database of its own.

use std::path::Path;
use std::process::Command;

use sqlx::PgPool;

use crate::common::{Watched, database, program};

/// What a service says when it is ready.
const READY: &str = "listening on ";

/// The shop's four processes. They end with it.
pub struct Shop {
    pub gateway: Watched,
    pub product: Watched,
    _order: Watched,
    _inventory: Watched,
    database: String,
}

impl Shop {
    /// A shop whose demo's buttons work.
    pub async fn start() -> Self {
        Self::with(&["--demo"], &[]).await
    }

    /// A shop that cannot be broken.
    pub async fn without_demo() -> Self {
        Self::with(&[], &[]).await
    }

    /// A shop that shows the pictures of `folder`.
    pub async fn with_flame_graphs(folder: &Path) -> Self {
        Self::with(&["--demo"], &["--flamegraphs", folder.to_str().unwrap()]).await
    }

    async fn with(all: &[&'static str], gateway: &[&str]) -> Self {
        let database = database().await;
        let service = |name: &str| begin(service(name, "0", &database, all));
        let services = [service("product"), service("order"), service("inventory")];
        let [product, order, inventory] = services;
        let product = product.await.unwrap();
        let (order, inventory) = (order.await.unwrap(), inventory.await.unwrap());
        let mut command = program("gateway");
        command.args(["--with-parent", "--port", "0"]);
        command.args(["--product-url", &product.announced]);
        command.args(["--order-url", &order.announced]);
        command.args(["--inventory-url", &inventory.announced]);
        command.args(all).args(gateway);
        Self {
            gateway: begin(command).await.unwrap(),
            product,
            _order: order,
            _inventory: inventory,
            database,
        }
    }

    /// The gateway's address.
    pub fn gateway(&self) -> &str {
        &self.gateway.announced
    }

    /// The shop's database, for a look behind the counter.
    pub async fn database(&self) -> PgPool {
        PgPool::connect(&self.database).await.unwrap()
    }

    /// The product service again, where the gateway expects it.
    pub async fn restart_product(&mut self) {
        let port = self.product.announced.rsplit(':').next().unwrap();
        let command = service("product", port, &self.database, &["--demo"]);
        self.product = begin(command).await.unwrap();
    }
}

/// A service on the database, with a small catalogue.
fn service(name: &str, port: &str, database: &str, more: &[&str]) -> Command {
    let mut command = program(name);
    command.args(["--with-parent", "--port", port, "--products", "500"]);
    command.args(more).env("DATABASE_URL", database);
    command
}

fn begin(mut command: Command) -> tokio::task::JoinHandle<Watched> {
    tokio::task::spawn_blocking(move || Watched::start(&mut command, READY))
}
