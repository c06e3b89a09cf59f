//! Arguments as they are typed, and the commands that they become.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;
use workload::catalogue::{Catalogue, MAX_PRODUCTS};
use workload::db::Database;
use workload::serve::Listener;
use workload::services::product;
use workload::user::Account;
use workload::{child, demo, postgres};

/// A shop on a real PostgreSQL whose product search has no index.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The product service: search, products, health, and its own profile
    Product(Product),
    /// A private PostgreSQL, until Ctrl-C; prints its DATABASE_URL when it is ready
    Postgres(Postgres),
    /// Everything at once: PostgreSQL, the shop, searches, and a recording of it all
    Demo(Demo),
}

impl Command {
    fn is_child(&self) -> bool {
        match self {
            Self::Product(product) => product.with_parent,
            Self::Postgres(postgres) => postgres.with_parent,
            Self::Demo(_) => false,
        }
    }
}

#[derive(Debug, Args)]
struct Shop {
    /// How many products the catalogue has
    #[arg(long, default_value_t = 70_000, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PRODUCTS)))]
    products: u32,
    /// Which catalogue of that size
    #[arg(long, default_value_t = 1)]
    seed: i64,
}

impl Shop {
    fn catalogue(&self) -> Catalogue {
        Catalogue {
            products: self.products,
            seed: self.seed,
        }
    }
}

#[derive(Debug, Args)]
struct Product {
    /// The port to listen on; 0 takes any free one
    #[arg(long, default_value_t = 8014)]
    port: u16,
    /// The address to listen on
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    bind: IpAddr,
    /// The shop's database: postgresql://user:password@host:port/productcatalog
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
    #[command(flatten)]
    shop: Shop,
    /// End when standard input closes, which it does when the parent has gone
    #[arg(long, hide = true)]
    with_parent: bool,
    /// When called by root, become this user
    #[arg(long)]
    user: Option<String>,
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
    /// Fetch the programs into the cache and end
    #[arg(long)]
    fetch_only: bool,
    /// End when standard input closes, which it does when the parent has gone
    #[arg(long, hide = true)]
    with_parent: bool,
}

#[derive(Debug, Args)]
struct Demo {
    /// The profiler: the path of the program `flamestorm`
    #[arg(long)]
    agent: PathBuf,
    /// How long to record
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Where to put the pictures
    #[arg(long, default_value = "flamegraphs")]
    output_dir: PathBuf,
    /// A PostgreSQL of your own, instead of a private one; its table `products` is replaced
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    #[command(flatten)]
    cluster: Cluster,
    #[command(flatten)]
    shop: Shop,
    /// Print the result as one JSON object on standard output
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// Runs the command and tells what went wrong.
    pub fn run(self) -> ExitCode {
        let default_level = match &self.command {
            // The demo tells its own story; the log is for what goes wrong.
            Command::Demo(_) => "warn",
            _ => "info,sqlx=warn",
        };
        let filter =
            EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_level));
        let log = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .with_target(false);
        if self.command.is_child() {
            // Its lines stand among the parent's, which tell the time.
            log.without_time().init();
        } else {
            log.init();
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
        Command::Product(arguments) => arguments.run(),
        Command::Postgres(arguments) => arguments.run(),
        Command::Demo(arguments) => arguments.run(),
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

impl Product {
    fn run(self) -> anyhow::Result<()> {
        if let Some(user) = &self.user {
            Account::unprivileged(Some(user))?.become_it()?;
        }
        let runtime = runtime("workload")?;
        runtime.block_on(self.serve())
    }

    async fn serve(self) -> anyhow::Result<()> {
        let listener = Listener::bind(SocketAddr::new(self.bind, self.port))?;
        let database = Database::from_url(&self.database_url)?;
        let setup = database.connect().await?;
        database.migrate(&setup).await?;
        let outcome = self.shop.catalogue().ensure(&setup).await;
        outcome.context("cannot fill the catalogue")?;
        setup.close().await;
        let pool = database.pool(product::NAME).await?;
        let app = product::router(pool.clone());
        announce(&format!("listening on http://{}", listener.address()));
        let with_parent = self.with_parent;
        let stop = async move {
            if let Err(error) = child::told_to_stop(with_parent).await {
                tracing::error!(%error, "no signal can be received: stopping");
            }
        };
        listener.serve(app, stop).await?;
        pool.close().await;
        Ok(())
    }
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

impl Demo {
    fn run(self) -> anyhow::Result<()> {
        let options = demo::Options {
            program: std::env::current_exe().context("cannot find this program's own path")?,
            agent: self.agent,
            seconds: self.seconds,
            output_dir: self.output_dir,
            database_url: self.database_url,
            source: self.cluster.source,
            directory: self.cluster.directory,
            user: self.cluster.user,
            catalogue: self.shop.catalogue(),
        };
        let report = runtime("demo-visitors")?.block_on(demo::run(&options))?;
        if self.json {
            announce(&serde_json::to_string(&report)?);
        } else {
            announce(&report.to_string());
        }
        report.verdict()?;
        Ok(())
    }
}
