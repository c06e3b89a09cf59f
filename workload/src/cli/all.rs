//! `workload all`: the whole shop, one process per service.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use workload::serve::LISTENING;
use workload::user::Account;
use workload::{calibration, child, supervise};

use super::{Cluster, Shop, announce, runtime};

/// The whole shop.
#[derive(Debug, Args)]
pub struct All {
    /// The gateway's port; product, order and inventory follow at +4, +5 and +6. 0 takes any free ones
    #[arg(long, default_value_t = 8010, value_parser = clap::value_parser!(u16).range(..=65_529))]
    port: u16,
    /// Let /demo/… make the services slow, exhaust them, and change the search's index
    #[arg(long)]
    demo: bool,
    /// Where the pictures are that are shown
    #[arg(long, default_value = "flamegraphs")]
    flamegraphs: PathBuf,
    /// A PostgreSQL of your own, instead of a private one; the tables of the shop are replaced
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    #[command(flatten)]
    cluster: Cluster,
    #[command(flatten)]
    shop: Shop,
    /// End when standard input closes, which it does when the parent has gone
    #[arg(long, hide = true)]
    pub with_parent: bool,
}

impl All {
    /// Runs it.
    pub fn run(self) -> anyhow::Result<()> {
        let remembered = match (&self.database_url, self.shop.products) {
            (None, None) => {
                let account = Account::unprivileged(self.cluster.user.as_deref())?;
                Some(calibration::path(&account.cache()?))
            }
            _ => None,
        };
        let options = supervise::Options {
            program: std::env::current_exe().context("cannot find this program's own path")?,
            database_url: self.database_url,
            source: self.cluster.source,
            directory: self.cluster.directory,
            user: self.cluster.user,
            catalogue: self.shop.catalogue(),
            remembered,
            port: self.port,
            demo: self.demo,
            flamegraphs: self.flamegraphs,
        };
        let ready = |address: &str| announce(&format!("{LISTENING}{address}"));
        let stop = child::told_to_stop(self.with_parent);
        runtime("supervisor")?.block_on(supervise::run(&options, ready, stop))?;
        Ok(())
    }
}
