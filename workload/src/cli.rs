//! Arguments as they are typed, and the commands that they become.

mod all;
mod calibrate;
mod index;
mod load;
mod scene;
mod service;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use tokio::runtime::{Builder, Runtime};
use workload::catalogue::{Catalogue, MAX_PRODUCTS};
use workload::telemetry::{Lines, terminal};
use workload::user::Account;
use workload::{child, postgres};

use all::All;
use calibrate::Calibrate;
use index::Index;
use load::Load;
use scene::Scene;
use service::{GatewayService, Inventory, Order, Product};

/// A shop on a real PostgreSQL whose product search has no index.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The gateway: the shop's API and its pages, in front of the three services
    Gateway(GatewayService),
    /// The product service: the catalogue and its search, health, and its own profile
    Product(Product),
    /// The order service: orders, their history, and what is popular
    Order(Order),
    /// The inventory service: stock and reservations
    Inventory(Inventory),
    /// The whole shop: PostgreSQL, and one process per service, until Ctrl-C
    All(All),
    /// The fix: make or drop the index that the search lacks
    Index(Index),
    /// Steady background traffic through the gateway, measured
    Load(Load),
    /// How large the catalogue has to be on this machine for the storm to be what it should
    Calibrate(Calibrate),
    /// A private PostgreSQL, until Ctrl-C; prints its DATABASE_URL when it is ready
    Postgres(Postgres),
    /// The investigator's script: the storm, the function behind it, the fix, the errors
    Scene(Scene),
}

impl Command {
    /// Services start telemetry, which has the log.
    fn is_service(&self) -> bool {
        matches!(
            self,
            Self::Gateway(_) | Self::Product(_) | Self::Order(_) | Self::Inventory(_)
        )
    }

    fn lines(&self) -> Lines {
        match self {
            Self::Gateway(service) => service.lines(),
            Self::Product(service) => service.lines(),
            Self::Order(service) => service.lines(),
            Self::Inventory(service) => service.lines(),
            Self::All(all) => lines(all.with_parent),
            Self::Postgres(postgres) => lines(postgres.with_parent),
            Self::Index(_) | Self::Load(_) | Self::Calibrate(_) | Self::Scene(_) => Lines::Timed,
        }
    }
}

/// A child's lines stand among its parent's, which tell the time.
fn lines(is_child: bool) -> Lines {
    if is_child {
        Lines::Untimed
    } else {
        Lines::Timed
    }
}

/// Below the cliff on two cores of most machines: those measured need 43,000 to 80,000 for the storm of the scenario.
const DEFAULT_PRODUCTS: u32 = 50_000;

#[derive(Debug, Args)]
struct Shop {
    /// How many products the catalogue has [default: with a private PostgreSQL what `calibrate`
    /// found, else 50000]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PRODUCTS)))]
    products: Option<u32>,
    /// Which catalogue of that size
    #[arg(long, default_value_t = 1)]
    seed: i64,
}

impl Shop {
    fn catalogue(&self) -> Catalogue {
        Catalogue {
            products: self.products.unwrap_or(DEFAULT_PRODUCTS),
            seed: self.seed,
        }
    }
}

#[derive(Debug, Args)]
struct Cluster {
    /// Where PostgreSQL's programs come from: auto, embedded (fetched once), embedded:VERSION,
    /// system, or an absolute directory
    #[arg(long, default_value_t = postgres::Source::Auto)]
    source: postgres::Source,
    /// The cluster's own directory [default: a cache directory]
    #[arg(long)]
    directory: Option<PathBuf>,
    /// When called by root, the user to run PostgreSQL as [default: the one behind sudo, or nobody]
    #[arg(long)]
    user: Option<String>,
}

#[derive(Debug, Args)]
struct Postgres {
    #[command(flatten)]
    cluster: Cluster,
    /// Throw away the data of an earlier run first
    #[arg(long)]
    fresh: bool,
    /// Remove the cluster's directory at the end
    #[arg(long, requires = "directory")]
    temporary: bool,
    /// Keep the server to so many processors
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    cpus: Option<u16>,
    /// Fetch the programs into the cache and end
    #[arg(long)]
    fetch_only: bool,
    /// End when standard input closes, which it does when the parent has gone
    #[arg(long, hide = true)]
    with_parent: bool,
}

impl Arguments {
    /// Runs the command and tells what went wrong.
    pub fn run(self) -> ExitCode {
        let default_level = match &self.command {
            // It tells its steps itself; the log is for what goes wrong.
            Command::Calibrate(_) => "warn",
            // What fails is counted, and told at the end.
            Command::Load(_) | Command::Scene(_) => "error",
            _ => "info,sqlx=warn",
        };
        if !self.command.is_service() {
            terminal::start(self.command.lines(), default_level);
        }
        match run(self.command) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("workload: {}", explain(&error));
                ExitCode::FAILURE
            }
        }
    }
}

/// An error with its causes, without those that it quotes already.
fn explain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Gateway(arguments) => arguments.run(),
        Command::Product(arguments) => arguments.run(),
        Command::Order(arguments) => arguments.run(),
        Command::Inventory(arguments) => arguments.run(),
        Command::All(arguments) => arguments.run(),
        Command::Index(arguments) => arguments.run(),
        Command::Load(arguments) => arguments.run(),
        Command::Calibrate(arguments) => arguments.run(),
        Command::Postgres(arguments) => arguments.run(),
        Command::Scene(arguments) => arguments.run(),
    }
}

/// A runtime whose threads carry `name`, under which a profile shows them.
fn runtime(name: &str) -> anyhow::Result<Runtime> {
    Builder::new_multi_thread()
        .thread_name(name)
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

/// Says on standard output what a parent waits for. A parent that has gone will be noticed by
/// other means.
fn announce(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

impl Cluster {
    /// Where things are for the user that PostgreSQL runs as; and that user.
    fn resolve(self) -> anyhow::Result<(postgres::Options, Account)> {
        let account = Account::unprivileged(self.user.as_deref())?;
        let cache = account.cache()?;
        let directory = match self.directory {
            Some(directory) => std::path::absolute(directory)?,
            None => cache.join("cluster"),
        };
        let options = postgres::Options {
            source: self.source,
            cache,
            directory,
            fresh: false,
            temporary: false,
        };
        Ok((options, account))
    }
}

impl Postgres {
    fn run(self) -> anyhow::Result<()> {
        let (options, account) = self.cluster.resolve()?;
        let options = postgres::Options {
            fresh: self.fresh,
            temporary: self.temporary,
            ..options
        };
        account.become_it()?;
        if let Some(cpus) = self.cpus {
            postgres::pin(cpus.into()).context("cannot choose processors")?;
        }
        // One thread: PostgreSQL is tied to the thread that starts it.
        let runtime = Builder::new_current_thread().enable_all().build()?;
        if self.fetch_only {
            let find = postgres::Binaries::find(&options.source, &options.cache);
            let binaries = runtime.block_on(find)?;
            tracing::info!(
                version = binaries.version(),
                "PostgreSQL's programs are there"
            );
            return Ok(());
        }
        let stop = child::told_to_stop(self.with_parent);
        let ready = |url: &str| announce(&format!("{}{url}", postgres::READY));
        runtime.block_on(postgres::run(&options, ready, stop))?;
        Ok(())
    }
}
