//! The children of a demo, and their end.

use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::process::Command;

use super::recording::Recording;
use super::{DemoError, Options};
use crate::child::Process;
use crate::postgres;
use crate::serve::LISTENING;
use crate::supervise;

/// A first start fetches and initialises; on a slow line that takes a while.
const POSTGRES_PATIENCE: Duration = Duration::from_secs(300);

/// The catalogue is there already.
const PRODUCT_PATIENCE: Duration = Duration::from_secs(30);

/// The supervisor waits 20 s for PostgreSQL before it kills it.
const POSTGRES_GRACE: Duration = Duration::from_secs(25);

/// The service gives its requests 8 s.
const PRODUCT_GRACE: Duration = Duration::from_secs(10);

/// An interrupted agent writes its files.
const AGENT_GRACE: Duration = Duration::from_secs(20);

/// Everything that runs besides us.
#[derive(Debug, Default)]
pub struct Stage {
    postgres: Option<Process>,
    product: Option<Process>,
    agent: Option<Process>,
}

impl Stage {
    /// Starts the private PostgreSQL's supervisor; gives its URL when it is ready.
    pub async fn start_postgres(
        &mut self,
        options: &Options,
        fresh: bool,
    ) -> Result<String, DemoError> {
        let (directory, user) = (options.directory.as_deref(), options.user.as_deref());
        let source = &options.source;
        let mut command = supervise::postgres_command(&options.program, source, directory, user);
        if fresh {
            command.arg("--fresh");
        }
        let process = self.postgres.insert(spawn(&mut command, "PostgreSQL")?);
        ready(process, "PostgreSQL", postgres::READY, POSTGRES_PATIENCE).await
    }

    /// Ends the private PostgreSQL alone.
    pub async fn stop_postgres(&mut self) {
        if let Some(mut postgres) = self.postgres.take() {
            end(&mut postgres, "PostgreSQL", Signal::SIGTERM, POSTGRES_GRACE).await;
        }
    }

    /// Starts the product service on a free port; gives its address when it is ready.
    pub async fn start_product(
        &mut self,
        options: &Options,
        database_url: &str,
    ) -> Result<String, DemoError> {
        let mut command = Command::new(&options.program);
        command
            .args(["product", "--with-parent", "--port", "0"])
            .args(["--products", &options.catalogue.products.to_string()])
            .arg(format!("--seed={}", options.catalogue.seed))
            .env("DATABASE_URL", database_url)
            .env("RUST_LOG", "warn");
        supervise::without_root(&mut command, options.user.as_deref())?;
        let process = self
            .product
            .insert(spawn(&mut command, "the product service")?);
        ready(process, "the product service", LISTENING, PRODUCT_PATIENCE).await
    }

    /// Starts the agent.
    pub fn start_agent(
        &mut self,
        options: &Options,
        recording: &Recording,
    ) -> Result<(), DemoError> {
        let mut command = Command::new(&options.agent);
        command
            .args(recording.arguments(options.seconds))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // Killed, not interrupted: nobody is left to read what it would write.
        let agent = Process::spawn_tied(&mut command, Signal::SIGKILL).map_err(|source| {
            DemoError::Agent {
                path: options.agent.clone(),
                source,
            }
        })?;
        self.agent = Some(agent);
        Ok(())
    }

    /// The agent that was started.
    pub fn agent(&mut self) -> Result<&mut Process, DemoError> {
        self.agent.as_mut().ok_or_else(|| DemoError::Child {
            name: "the agent",
            reason: "it was not started".to_owned(),
        })
    }

    /// Ends everything, in the order in which it depends on each other.
    pub async fn clear(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            end(&mut agent, "the agent", Signal::SIGINT, AGENT_GRACE).await;
        }
        if let Some(mut product) = self.product.take() {
            let name = "the product service";
            end(&mut product, name, Signal::SIGTERM, PRODUCT_GRACE).await;
        }
        self.stop_postgres().await;
    }
}

fn spawn(command: &mut Command, name: &'static str) -> Result<Process, DemoError> {
    command.stdout(Stdio::piped());
    Process::spawn_watching(command).map_err(|error| DemoError::Child {
        name,
        reason: error.to_string(),
    })
}

async fn end(process: &mut Process, name: &str, signal: Signal, grace: Duration) {
    if let Err(error) = process.stop(signal, grace).await {
        tracing::warn!(%error, name, "could not be stopped");
    }
}

async fn ready(
    process: &mut Process,
    name: &'static str,
    prefix: &str,
    patience: Duration,
) -> Result<String, DemoError> {
    let ready = process.ready(prefix, patience).await;
    ready.map_err(|error| DemoError::Child {
        name,
        reason: error.to_string(),
    })
}
