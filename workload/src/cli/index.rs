//! `workload index create|drop`: the fix, and its undoing.

use anyhow::Context;
use clap::Args;
use workload::db::Database;
use workload::index::{self, Action};

use super::{announce, runtime};

/// The index that the search lacks.
#[derive(Debug, Args)]
pub struct Index {
    /// What to do with it
    action: Action,
    /// The shop's database: postgresql://user:password@host:port/productcatalog
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
}

impl Index {
    /// Runs it.
    pub fn run(self) -> anyhow::Result<()> {
        runtime("index")?.block_on(self.apply())
    }

    async fn apply(self) -> anyhow::Result<()> {
        let database = Database::from_url(&self.database_url)?;
        let pool = database.connect().await?;
        let start = std::time::Instant::now();
        let mut connection = pool.acquire().await.context("no connection")?;
        index::apply(&mut connection, self.action).await?;
        let seconds = start.elapsed().as_secs_f64();
        let name = index::NAME;
        let done = match self.action {
            Action::Create => format!("{name} is there (after {seconds:.1} s)"),
            Action::Drop => format!("{name} is not there any more (after {seconds:.1} s)"),
        };
        announce(&done);
        Ok(())
    }
}
