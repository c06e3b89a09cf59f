//! What a scene needs, looked at before it begins.

use std::fs;
use std::path::Path;

use tokio::process::Command;

use super::outcome::Check;
use super::recording::answer;
use super::shop::Shop;
use super::{Options, SceneError};
use crate::user;

/// The agent, what it may do here, and where its pictures go.
pub async fn of_the_agent(options: &Options) -> Vec<Check> {
    let mut command = Command::new(&options.agent);
    command.arg("doctor");
    let path = options.agent.display();
    let agent = match fs::metadata(&options.agent) {
        Ok(_) => match answer("doctor", &mut command).await {
            Ok(_) => Check::good("profiler", format!("{path} can record here")),
            Err(error) => {
                let hint = if nix::unistd::Uid::effective().is_root() {
                    format!("`{path} doctor` tells how to mend it")
                } else {
                    "recording needs root: try it with sudo".to_owned()
                };
                Check::bad(
                    "profiler",
                    format!("{path} cannot record here ({hint}): {error}"),
                )
            }
        },
        Err(error) => Check::bad(
            "profiler",
            format!("{path}: {error}; build it with `make build`, or name it with --agent"),
        ),
    };
    let directory = options.output_dir.display();
    let pictures = match prepare(&options.output_dir) {
        Ok(()) => Check::good("pictures", format!("{directory} can be written to")),
        Err(error) => Check::bad(
            "pictures",
            format!(
                "cannot write to {directory}: {error}; choose another directory with --output-dir"
            ),
        ),
    };
    vec![agent, pictures]
}

/// Makes the directory, and tries whether it can be written to.
fn prepare(directory: &Path) -> std::io::Result<()> {
    let existed = directory.exists();
    fs::create_dir_all(directory)?;
    if !existed {
        user::give_to_sudo_user(directory)?;
    }
    let probe = directory.join(format!(".probe-{}", std::process::id()));
    fs::write(&probe, b"")?;
    fs::remove_file(&probe)
}

/// The gateway, the services behind it, and the database behind them.
pub async fn of_the_shop(shop: &Shop) -> Result<Vec<Check>, SceneError> {
    let status = shop.status().await?;
    let mut checks = vec![Check::good("gateway", shop.url().to_owned())];
    for service in &status.services {
        checks.push(match service.up {
            true => Check::good(&service.name, service.url.clone()),
            false => Check::bad(&service.name, format!("does not answer at {}", service.url)),
        });
    }
    checks.push(match &status.database {
        Some(it) => {
            let index = match it.search_index {
                true => "the search has its index, which the scene drops",
                false => "the search has no index",
            };
            Check::good(
                "database",
                format!("{}, PostgreSQL {}; {index}", it.name, it.version),
            )
        }
        None => Check::bad(
            "database",
            "the product-service cannot tell of it".to_owned(),
        ),
    });
    checks.push(match status.demo {
        true => Check::good("demo", "its buttons work".to_owned()),
        false => Check::bad(
            "demo",
            "the shop was opened without --demo: it may not be taken down".to_owned(),
        ),
    });
    if let Some(storm) = status.storm.filter(|storm| storm.running) {
        checks.push(Check::bad(
            "storm",
            format!(
                "one is running, in round {} of {}; wait for its end",
                storm.round, storm.rounds
            ),
        ));
    }
    let lines = shop.lines(None, "warn").await;
    checks.push(match lines {
        Ok(_) => Check::good("log", "the services remember their lines".to_owned()),
        Err(error) => Check::bad("log", error.to_string()),
    });
    Ok(checks)
}
