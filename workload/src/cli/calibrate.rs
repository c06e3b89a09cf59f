//! `workload calibrate`: how large the catalogue has to be on this machine.

use anyhow::{Context, bail};
use clap::Args;
use workload::calibrate::{self, Outcome};
use workload::calibration;
use workload::user::Account;

use super::{Cluster, announce, runtime};

/// How large the catalogue has to be.
#[derive(Debug, Args)]
pub struct Calibrate {
    #[command(flatten)]
    cluster: Cluster,
    /// Which catalogue
    #[arg(long, default_value_t = 1)]
    seed: i64,
    /// Measure again what is remembered
    #[arg(long)]
    again: bool,
    /// Print the result as one JSON object on standard output, and the steps on standard error
    #[arg(long)]
    json: bool,
}

impl Calibrate {
    /// Runs it.
    pub fn run(self) -> anyhow::Result<()> {
        let account = Account::unprivileged(self.cluster.user.as_deref())?;
        let path = calibration::path(&account.cache()?);
        let options = calibrate::Options {
            program: std::env::current_exe().context("cannot find this program's own path")?,
            source: self.cluster.source,
            directory: self.cluster.directory,
            user: self.cluster.user,
            seed: self.seed,
            remembered: (!self.again).then(|| path.clone()),
        };
        let json = self.json;
        let tell = |line: &str| match json {
            true => eprintln!("{line}"),
            false => announce(line),
        };
        let outcome = runtime("calibrate")?.block_on(calibrate::run(&options, tell))?;
        // The cache is the account's, and nothing else is left to be done.
        account.become_it()?;
        let (calibration, what) = match &outcome {
            Outcome::Known(known) => (known, "known"),
            Outcome::Measured(measured) => {
                calibration::remember(&path, measured)?;
                (measured, "remembered")
            }
            Outcome::Nearest { found, refuted } => {
                if *refuted {
                    calibration::forget(&path)?;
                }
                (found, "the nearest, not remembered")
            }
        };
        if json {
            announce(&serde_json::to_string(calibration)?);
        } else {
            announce(&format!("{} products ({what})", calibration.products));
        }
        if let Outcome::Nearest { found, .. } = &outcome {
            bail!(
                "no size of the catalogue gave the storm that is wanted; of the nearest {}. Is the machine busy with \
                 something else? Try again when it is not",
                found.measured.faults().join("; ")
            );
        }
        Ok(())
    }
}
