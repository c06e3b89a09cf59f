//! The whole shop on one machine: a private PostgreSQL, unless there is another, and one process
//! for each service.
//!
//! What ends is not started again: a shop that limps on as if nothing had happened helps nobody to
//! find out what did. It is named, and the rest is ended in order. All of it ends with this
//! process, however that ends.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::calibration;
use crate::catalogue::Catalogue;
use crate::child::{Process, ReadyError};
use crate::postgres::{self, Source};
use crate::serve::LISTENING;
use crate::services::{gateway, inventory, order, product};
use crate::user::{UserError, without_root};

/// A first start fetches and initialises; on a slow line that takes a while.
const POSTGRES_PATIENCE: Duration = Duration::from_secs(300);

/// The first of the services fills the catalogue, the others wait for it.
const SERVICE_PATIENCE: Duration = Duration::from_secs(300);

/// PostgreSQL's own supervisor waits 20 s for it before it kills it.
const POSTGRES_GRACE: Duration = Duration::from_secs(25);

/// A service gives its requests 8 s, and its telemetry 3 s.
const SERVICE_GRACE: Duration = Duration::from_secs(13);

/// How far the services' ports are from the gateway's.
const PORT_OFFSETS: [u16; 3] = [4, 5, 6];

/// The PostgreSQL's name in messages.
const POSTGRES: &str = "postgresql";

/// What shop is wanted.
#[derive(Debug, Clone)]
pub struct Options {
    /// This program, to be started again for each part.
    pub program: PathBuf,
    /// A PostgreSQL to use instead of a private one.
    pub database_url: Option<String>,
    /// Where the private one's programs come from.
    pub source: Source,
    /// The private one's directory.
    pub directory: Option<PathBuf>,
    /// The user that everything runs as where root calls.
    pub user: Option<String>,
    /// What the shop sells.
    pub catalogue: Catalogue,
    /// Where a calibration may be remembered, whose size comes before the catalogue's own.
    pub remembered: Option<PathBuf>,
    /// The gateway's port; the services' follow at +4, +5 and +6. 0 takes any free ones.
    pub port: u16,
    /// Whether the demo's endpoints answer.
    pub demo: bool,
    /// Where the pictures are.
    pub flamegraphs: PathBuf,
}

/// A shop that could not be opened, or not be kept open.
#[derive(Debug, thiserror::Error)]
pub enum SuperviseError {
    /// A part could not be started. Its own message stands above.
    #[error("{name} did not start: {source}")]
    Start {
        /// Which.
        name: &'static str,
        /// What happened to it.
        source: ReadyError,
    },
    /// A part ended by itself.
    #[error("{name} ended by itself ({status}); its last words stand above. The shop is closed")]
    Ended {
        /// Which.
        name: &'static str,
        /// How.
        status: String,
    },
    /// No user to become.
    #[error(transparent)]
    User(#[from] UserError),
    /// Signals cannot be received.
    #[error("cannot watch for signals: {0}")]
    Signals(std::io::Error),
}

/// Opens the shop, tells `ready` the gateway's address, and keeps it open until `stop` resolves or
/// a part of it ends.
pub async fn run(
    options: &Options,
    ready: impl FnOnce(&str),
    stop: impl Future<Output = std::io::Result<()>>,
) -> Result<(), SuperviseError> {
    let mut parts = Parts::new();
    let result = tokio::select! {
        stopped = stop => stopped.map_err(SuperviseError::Signals),
        result = keep_open(options, ready, &mut parts) => result,
    };
    parts.close().await;
    result
}

async fn keep_open(
    options: &Options,
    ready: impl FnOnce(&str),
    parts: &mut Parts,
) -> Result<(), SuperviseError> {
    let url = match &options.database_url {
        Some(url) => url.clone(),
        None => {
            let (directory, user) = (options.directory.as_deref(), options.user.as_deref());
            let command = postgres::command(&options.program, &options.source, directory, user);
            parts.start_database(command).await?
        }
    };
    let [product_port, order_port, inventory_port] = options.ports();
    let catalogue = options.sized(&url).await;
    let service = |name, port| service_command(options, catalogue, name, port, &url);
    let commands = [
        (product::NAME, service("product", product_port)?),
        (order::NAME, service("order", order_port)?),
        (inventory::NAME, service("inventory", inventory_port)?),
    ];
    let [product, order, inventory] = parts.start_services(commands).await?;
    let mut command = Command::new(&options.program);
    command
        .args(["gateway", "--with-parent"])
        .args(["--port", &options.port.to_string()])
        .args(["--product-url", &product])
        .args(["--order-url", &order])
        .args(["--inventory-url", &inventory])
        .arg("--flamegraphs")
        .arg(&options.flamegraphs);
    options.finish(&mut command)?;
    let address = parts.start_gateway(command).await?;
    ready(&address);
    Err(parts.first_end().await)
}

impl Options {
    /// The catalogue, as large as this machine needs it.
    async fn sized(&self, url: &str) -> Catalogue {
        let known = match &self.remembered {
            Some(path) => calibration::known_size(path, url).await,
            None => None,
        };
        Catalogue {
            products: known.unwrap_or(self.catalogue.products),
            ..self.catalogue
        }
    }

    fn ports(&self) -> [u16; 3] {
        match self.port {
            0 => [0; 3],
            port => PORT_OFFSETS.map(|offset| port.saturating_add(offset)),
        }
    }

    /// What all services are told alike.
    fn finish(&self, command: &mut Command) -> Result<(), UserError> {
        if self.demo {
            command.arg("--demo");
        }
        // Each has a name of its own: one for all of them would make them one service.
        command.env_remove("OTEL_SERVICE_NAME");
        without_root(command, self.user.as_deref())
    }
}

fn service_command(
    options: &Options,
    catalogue: Catalogue,
    name: &str,
    port: u16,
    database_url: &str,
) -> Result<Command, UserError> {
    let mut command = Command::new(&options.program);
    command
        .args([name, "--with-parent"])
        .args(["--port", &port.to_string()])
        .args(["--products", &catalogue.products.to_string()])
        .arg(format!("--seed={}", catalogue.seed))
        .env("DATABASE_URL", database_url);
    options.finish(&mut command)?;
    Ok(command)
}

/// A part that ended by itself.
type End = (&'static str, std::io::Result<ExitStatus>);

/// Parts that are ended together.
#[derive(Debug)]
struct Group {
    /// Each watches over its process.
    watchers: JoinSet<Option<End>>,
    close: watch::Sender<()>,
}

impl Group {
    fn new() -> Self {
        Self {
            watchers: JoinSet::new(),
            close: watch::Sender::new(()),
        }
    }

    fn add(&mut self, name: &'static str, mut process: Process, grace: Duration) {
        let mut close = self.close.subscribe();
        self.watchers.spawn(async move {
            tokio::select! {
                biased;
                // An error says that the group has gone: as good a reason.
                _ = close.changed() => {
                    if let Err(error) = process.stop(Signal::SIGTERM, grace).await {
                        tracing::warn!(%error, name, "could not be stopped");
                    }
                    None
                }
                status = process.wait() => Some((name, status)),
            }
        });
    }

    /// The first part that ends by itself; never, when there is none.
    async fn first_end(&mut self) -> End {
        loop {
            match self.watchers.join_next().await {
                Some(Ok(Some(end))) => return end,
                Some(_) => {}
                None => std::future::pending().await,
            }
        }
    }

    async fn close(&mut self) {
        self.close.send_replace(());
        while self.watchers.join_next().await.is_some() {}
    }
}

/// Everything that runs, by the order in which it may end.
#[derive(Debug)]
struct Parts {
    gateway: Group,
    services: Group,
    database: Group,
}

impl Parts {
    fn new() -> Self {
        Self {
            gateway: Group::new(),
            services: Group::new(),
            database: Group::new(),
        }
    }

    async fn start_database(&mut self, mut command: Command) -> Result<String, SuperviseError> {
        let mut process = spawn(POSTGRES, &mut command)?;
        let ready = process.ready(postgres::READY, POSTGRES_PATIENCE).await;
        self.database.add(POSTGRES, process, POSTGRES_GRACE);
        ready.map_err(|source| SuperviseError::Start {
            name: POSTGRES,
            source,
        })
    }

    /// Starts all at once; gives their addresses when all are ready.
    async fn start_services<const N: usize>(
        &mut self,
        commands: [(&'static str, Command); N],
    ) -> Result<[String; N], SuperviseError> {
        let mut starting = Vec::new();
        for (name, mut command) in commands {
            starting.push((name, spawn(name, &mut command)?));
        }
        let mut addresses = [const { String::new() }; N];
        for (address, (name, mut process)) in addresses.iter_mut().zip(starting) {
            let ready = process.ready(LISTENING, SERVICE_PATIENCE).await;
            self.services.add(name, process, SERVICE_GRACE);
            *address = ready.map_err(|source| SuperviseError::Start { name, source })?;
            tracing::info!(service = name, url = *address, "open");
        }
        Ok(addresses)
    }

    async fn start_gateway(&mut self, mut command: Command) -> Result<String, SuperviseError> {
        let name = gateway::NAME;
        let mut process = spawn(name, &mut command)?;
        let ready = process.ready(LISTENING, SERVICE_PATIENCE).await;
        self.gateway.add(name, process, SERVICE_GRACE);
        ready.map_err(|source| SuperviseError::Start { name, source })
    }

    /// The first part that ends by itself.
    async fn first_end(&mut self) -> SuperviseError {
        let (name, status) = tokio::select! {
            // The database first: when it goes, others may go because of it.
            biased;
            end = self.database.first_end() => end,
            end = self.services.first_end() => end,
            end = self.gateway.first_end() => end,
        };
        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        SuperviseError::Ended { name, status }
    }

    async fn close(&mut self) {
        self.gateway.close().await;
        self.services.close().await;
        self.database.close().await;
    }
}

fn spawn(name: &'static str, command: &mut Command) -> Result<Process, SuperviseError> {
    command.stdout(std::process::Stdio::piped());
    Process::spawn_watching(command).map_err(|error| SuperviseError::Start {
        name,
        source: ReadyError::Failed(error),
    })
}
