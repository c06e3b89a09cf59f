//! `workload product|order|inventory|gateway`: one service, until it is told to stop.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::Context;
use axum::Router;
use clap::Args;
use workload::child;
use workload::db::Database;
use workload::serve::{LISTENING, Listener};
use workload::services::common::Service;
use workload::services::gateway::{self, Gateway};
use workload::services::{inventory, order, product};
use workload::simulate::HeavyQuery;
use workload::telemetry::{self, Lines};
use workload::user::Account;

use super::{Shop, announce, lines, runtime};

/// What each service is told.
#[derive(Debug, Args)]
struct Common {
    /// The address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    bind: IpAddr,
    /// Let /demo/… make this service slow, exhaust it, and change the search's index
    #[arg(long)]
    demo: bool,
    /// End when standard input closes, which it does when the parent has gone
    #[arg(long, hide = true)]
    with_parent: bool,
    /// When called by root, become this user
    #[arg(long)]
    user: Option<String>,
}

/// A service on the database.
#[derive(Debug, Args)]
pub struct OnDatabase {
    #[command(flatten)]
    common: Common,
    /// The shop's database: postgresql://user:password@host:port/productcatalog
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    #[command(flatten)]
    shop: Shop,
}

/// The product service.
#[derive(Debug, Args)]
pub struct Product {
    /// The port to listen on; 0 takes any free one
    #[arg(long, default_value_t = 8014)]
    port: u16,
    #[command(flatten)]
    service: OnDatabase,
}

/// The order service.
#[derive(Debug, Args)]
pub struct Order {
    /// The port to listen on; 0 takes any free one
    #[arg(long, default_value_t = 8015)]
    port: u16,
    #[command(flatten)]
    service: OnDatabase,
}

/// The inventory service.
#[derive(Debug, Args)]
pub struct Inventory {
    /// The port to listen on; 0 takes any free one
    #[arg(long, default_value_t = 8016)]
    port: u16,
    #[command(flatten)]
    service: OnDatabase,
}

/// The gateway.
#[derive(Debug, Args)]
pub struct GatewayService {
    /// The port to listen on; 0 takes any free one
    #[arg(long, default_value_t = 8010)]
    port: u16,
    /// Where the product service is
    #[arg(long, default_value = "http://127.0.0.1:8014")]
    product_url: String,
    /// Where the order service is
    #[arg(long, default_value = "http://127.0.0.1:8015")]
    order_url: String,
    /// Where the inventory service is
    #[arg(long, default_value = "http://127.0.0.1:8016")]
    inventory_url: String,
    /// Where the pictures are that are shown
    #[arg(long, default_value = "flamegraphs")]
    flamegraphs: PathBuf,
    #[command(flatten)]
    common: Common,
}

/// What tells a service on the database from the others.
struct Part {
    name: &'static str,
    /// The name of its threads, under which a profile shows them.
    threads: &'static str,
    port: u16,
    router: fn(&Service) -> Router,
    heavy: HeavyQuery,
}

impl Product {
    /// How its log lines look.
    pub fn lines(&self) -> Lines {
        lines(self.service.common.with_parent)
    }

    /// Runs it.
    pub fn run(self) -> anyhow::Result<()> {
        self.service.run(Part {
            name: product::NAME,
            threads: "workload",
            port: self.port,
            router: product::router,
            heavy: product::heavy,
        })
    }
}

impl Order {
    /// How its log lines look.
    pub fn lines(&self) -> Lines {
        lines(self.service.common.with_parent)
    }

    /// Runs it.
    pub fn run(self) -> anyhow::Result<()> {
        self.service.run(Part {
            name: order::NAME,
            threads: "order",
            port: self.port,
            router: order::router,
            heavy: order::heavy,
        })
    }
}

impl Inventory {
    /// How its log lines look.
    pub fn lines(&self) -> Lines {
        lines(self.service.common.with_parent)
    }

    /// Runs it.
    pub fn run(self) -> anyhow::Result<()> {
        self.service.run(Part {
            name: inventory::NAME,
            threads: "inventory",
            port: self.port,
            router: inventory::router,
            heavy: inventory::heavy,
        })
    }
}

impl Common {
    /// Gives up root, and runs `work` with the telemetry of `service` around it.
    fn run(
        &self,
        service: &'static str,
        threads: &str,
        work: impl Future<Output = anyhow::Result<()>>,
    ) -> anyhow::Result<()> {
        if let Some(user) = &self.user {
            Account::unprivileged(Some(user))?.become_it()?;
        }
        let telemetry = telemetry::start(service, lines(self.with_parent));
        let served = runtime(threads).and_then(|runtime| runtime.block_on(work));
        telemetry.shutdown();
        served
    }

    /// Serves `app` until it is told to stop.
    async fn serve(&self, listener: Listener, app: Router) -> anyhow::Result<()> {
        announce(&format!("{LISTENING}http://{}", listener.address()));
        let with_parent = self.with_parent;
        let stop = async move {
            if let Err(error) = child::told_to_stop(with_parent).await {
                tracing::error!(%error, "no signal can be received: stopping");
            }
        };
        Ok(listener.serve(app, stop).await?)
    }

    fn listener(&self, port: u16) -> anyhow::Result<Listener> {
        Ok(Listener::bind(SocketAddr::new(self.bind, port))?)
    }
}

impl OnDatabase {
    fn run(&self, part: Part) -> anyhow::Result<()> {
        self.common.run(part.name, part.threads, self.serve(part))
    }

    async fn serve(&self, part: Part) -> anyhow::Result<()> {
        let listener = self.common.listener(part.port)?;
        let database = Database::from_url(&self.database_url)?;
        let setup = database.connect().await?;
        database.migrate(&setup).await?;
        let outcome = self.shop.catalogue().ensure(&setup).await;
        outcome.context("cannot fill the catalogue")?;
        setup.close().await;
        let pool = database.pool(part.name).await?;
        let control = database.control(part.name);
        let service = Service::new(pool, control, part.heavy, self.common.demo);
        let app = (part.router)(&service);
        let served = self.common.serve(listener, app).await;
        service.close().await;
        served
    }
}

impl GatewayService {
    /// How its log lines look.
    pub fn lines(&self) -> Lines {
        lines(self.common.with_parent)
    }

    /// Runs it.
    pub fn run(self) -> anyhow::Result<()> {
        let options = gateway::Options {
            product_url: self.product_url,
            order_url: self.order_url,
            inventory_url: self.inventory_url,
            demo: self.common.demo,
            flamegraphs: std::path::absolute(self.flamegraphs)?,
        };
        let (common, port) = (self.common, self.port);
        common.run(gateway::NAME, "gateway", async {
            let listener = common.listener(port)?;
            let gateway = Gateway::new(options)?;
            common.serve(listener, gateway::router(&gateway)).await
        })
    }
}
