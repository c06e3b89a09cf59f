//! `workload scene`: the investigator's script.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use workload::catalogue::MAX_PRODUCTS;
use workload::scene::{self, Act, Options, Own};
use workload::storm::MAX_ROUNDS;

use super::{Cluster, runtime};

/// The profiler's name, beside this program or in the path.
const AGENT: &str = "flamestorm";

/// The investigator's script.
#[derive(Debug, Args)]
pub struct Scene {
    /// Which part of the story
    #[arg(value_enum, default_value_t = Act::All)]
    act: Act,
    /// The gateway of a shop that is open with --demo
    #[arg(long, default_value = "http://127.0.0.1:8010", conflicts_with = "open")]
    url: String,
    /// Open a shop for as long as the story takes, on free ports; calibrates the machine where that was not done yet
    #[arg(long)]
    open: bool,
    /// Go on without anybody pressing Enter
    #[arg(long, short)]
    yes: bool,
    /// Check everything that the scene needs, and begin nothing
    #[arg(long)]
    rehearse: bool,
    /// Rounds of 43 queries in each storm
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_ROUNDS)))]
    rounds: u32,
    /// The profiler, for scene 9.5, which needs root [default: flamestorm beside this program, else in the path]
    #[arg(long)]
    agent: Option<PathBuf>,
    /// Where to put the pictures
    #[arg(long, default_value = "flamegraphs")]
    output_dir: PathBuf,
    /// Print the result as one JSON object on standard output, and the story on standard error
    #[arg(long)]
    json: bool,
    /// With --open: a PostgreSQL of your own, instead of a private one; the tables of the shop are replaced
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    #[command(flatten)]
    cluster: Cluster,
    /// With --open: how many products the catalogue has [default: what `calibrate` found]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_PRODUCTS)))]
    products: Option<u32>,
    /// With --open: which catalogue of that size
    #[arg(long, default_value_t = 1)]
    seed: i64,
}

impl Scene {
    /// Runs it.
    pub fn run(self) -> anyhow::Result<()> {
        let program = std::env::current_exe().context("cannot find this program's own path")?;
        let beside = program.with_file_name(AGENT);
        let agent = match self.agent {
            Some(agent) => agent,
            None if beside.exists() => beside,
            None => in_path(AGENT).unwrap_or(beside),
        };
        let options = Options {
            act: self.act,
            url: (!self.open).then_some(self.url),
            own: Own {
                program,
                database_url: self.database_url,
                source: self.cluster.source,
                directory: self.cluster.directory,
                user: self.cluster.user,
                products: self.products,
                seed: self.seed,
            },
            agent,
            output_dir: self.output_dir,
            rounds: self.rounds,
            rehearse: self.rehearse,
            unattended: self.yes,
            json: self.json,
        };
        let outcome = runtime("scene")?.block_on(scene::run(&options))?;
        if self.json {
            let mut stdout = std::io::stdout().lock();
            let written = writeln!(stdout, "{}", serde_json::to_string(&outcome)?);
            let written = written.and_then(|()| stdout.flush());
            written.context("cannot write the result to standard output")?;
        }
        let what = if outcome.checks.iter().all(|check| check.ok) {
            "the story did not show what it should"
        } else {
            "not ready"
        };
        anyhow::ensure!(outcome.success, "{what}: {}", outcome.problems.join("; "));
        Ok(())
    }
}

/// A program of that name in the path.
fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}
