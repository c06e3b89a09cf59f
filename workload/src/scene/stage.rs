//! The shop of a story: one that is open already, or one that is opened for it and closed with it.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{ChildStderr, Command};
use tokio::task::JoinHandle;

use super::narrator::Narrator;
use super::shop::Shop;
use super::{Options, SceneError};
use crate::calibration::Calibration;
use crate::child::Process;
use crate::postgres::Source;
use crate::serve::LISTENING;

/// A first start fetches PostgreSQL and fills the catalogue; on a slow line that takes a while.
const OPEN_PATIENCE: Duration = Duration::from_secs(600);

/// The shop gives its parts 25 s.
const CLOSE_GRACE: Duration = Duration::from_secs(40);

/// Lines of the shop's log that are told when it closes by itself.
const LAST_LINES: usize = 5;

/// How long to wait for them.
const LOG_PATIENCE: Duration = Duration::from_secs(1);

/// A shop of the story's own.
#[derive(Debug, Clone)]
pub struct Own {
    /// This program, to be started again.
    pub program: PathBuf,
    /// A PostgreSQL to use instead of a private one.
    pub database_url: Option<String>,
    /// Where the private one's programs come from.
    pub source: Source,
    /// The private one's directory.
    pub directory: Option<PathBuf>,
    /// The user that the shop runs as where root calls.
    pub user: Option<String>,
    /// How large the catalogue is; `None` is what this machine needs, found out first where it is not known yet.
    pub products: Option<u32>,
    /// Which catalogue.
    pub seed: i64,
}

impl Own {
    /// One of our own commands, with what all of them are told alike.
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg(name)
            .arg("--source")
            .arg(self.source.to_string());
        command.arg(format!("--seed={}", self.seed));
        if let Some(directory) = &self.directory {
            command.arg("--directory").arg(directory);
        }
        if let Some(user) = &self.user {
            command.args(["--user", user]);
        }
        command
    }
}

/// What the story is told on.
#[derive(Debug, Default)]
pub struct Stage {
    shop: Option<Shop>,
    /// Whether anything was done to it.
    touched: bool,
    process: Option<Process>,
    /// The last lines of our own shop's log, when it has ended.
    log: Option<JoinHandle<Vec<String>>>,
}

impl Stage {
    /// The shop; opened, where one is to be and is not yet.
    pub async fn shop(
        &mut self,
        options: &Options,
        narrator: &Narrator,
    ) -> Result<Shop, SceneError> {
        if let Some(shop) = &self.shop {
            return Ok(shop.clone());
        }
        let url = match &options.url {
            Some(url) => url.clone(),
            None => self.open(options, narrator).await?,
        };
        Ok(self.shop.insert(Shop::at(&url)?).clone())
    }

    /// The shop, from now on another than before.
    pub async fn touch(
        &mut self,
        options: &Options,
        narrator: &Narrator,
    ) -> Result<Shop, SceneError> {
        self.touched = true;
        self.shop(options, narrator).await
    }

    /// Whether the shop closes with us.
    pub fn is_ours(&self) -> bool {
        self.process.is_some()
    }

    async fn open(&mut self, options: &Options, narrator: &Narrator) -> Result<String, SceneError> {
        let own = &options.own;
        let mut products = own.products;
        // A calibration has storms.
        if products.is_none() && own.database_url.is_none() && !options.rehearse {
            narrator.say("how large a catalogue does this machine need?");
            products = calibrate(own, narrator).await?;
        }
        narrator.say("opening the shop: PostgreSQL, three services and their gateway");
        let mut command = own.command("all");
        command.args(["--demo", "--with-parent", "--port", "0"]);
        command.arg("--flamegraphs").arg(&options.output_dir);
        if let Some(products) = products {
            command.args(["--products", &products.to_string()]);
        }
        if let Some(url) = &own.database_url {
            command.env("DATABASE_URL", url);
        }
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let process = Process::spawn_watching(&mut command);
        let process = process.map_err(|error| SceneError::Open(error.to_string()))?;
        let process = self.process.insert(process);
        // The log of a storm is long; scene 10 reads it where it is kept.
        self.log = Some(tokio::spawn(last_lines(process.child().stderr.take())));
        let ready = process.ready(LISTENING, OPEN_PATIENCE).await;
        let url = match ready {
            Ok(url) => url,
            Err(error) => {
                self.close(narrator).await;
                return Err(SceneError::Open(error.to_string()));
            }
        };
        narrator.say(&format!("the shop is open at {url}"));
        Ok(url)
    }

    /// Ends what is ours. After a story that broke off, a shop that is not ours gets back what was taken from it.
    pub async fn clear(&mut self, narrator: &Narrator, broke_off: bool) {
        if self.is_ours() {
            self.close(narrator).await;
        } else if broke_off
            && self.touched
            && let Some(shop) = &self.shop
        {
            match give_back(shop).await {
                Ok(()) => narrator.say("the shop was reset"),
                Err(error) => narrator.say(&format!("the shop could not be reset: {error}")),
            }
        }
    }

    async fn close(&mut self, narrator: &Narrator) {
        let Some(mut process) = self.process.take() else {
            return;
        };
        let has_died = matches!(process.child().try_wait(), Ok(Some(_)));
        if let Err(error) = process.stop(Signal::SIGTERM, CLOSE_GRACE).await {
            narrator.say(&format!("the shop could not be closed: {error}"));
        }
        // It ends with the process, unless a part of that is still there.
        let log = self
            .log
            .take()
            .map(|log| tokio::time::timeout(LOG_PATIENCE, log));
        if has_died
            && let Some(log) = log
            && let Ok(Ok(lines)) = log.await
        {
            narrator.say("the shop closed by itself; its last words:");
            lines.iter().for_each(|line| narrator.line(line));
        }
    }
}

/// A shop as it was: nothing simulated, no storm, no index. (A story begins without one.)
async fn give_back(shop: &Shop) -> Result<(), SceneError> {
    shop.reset().await?;
    shop.drop_index().await?;
    Ok(())
}

/// Reads a log to its end, and gives the last lines.
async fn last_lines(log: Option<ChildStderr>) -> Vec<String> {
    let mut last = VecDeque::new();
    if let Some(log) = log {
        let mut lines = BufReader::new(log).split(b'\n');
        while let Ok(Some(line)) = lines.next_segment().await {
            if last.len() == LAST_LINES {
                last.pop_front();
            }
            last.push_back(String::from_utf8_lossy(&line).into_owned());
        }
    }
    last.into()
}

/// Has the catalogue's size found out. Where no size gives the storm that is wanted it is the nearest one: such a
/// machine has a story all the same, with other figures. `None` is a calibration that did not come about.
async fn calibrate(own: &Own, narrator: &Narrator) -> Result<Option<u32>, SceneError> {
    let failed = |error: std::io::Error| SceneError::Open(format!("calibrate: {error}"));
    let mut command = own.command("calibrate");
    command.arg("--json");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    // Its shops' logs are of no interest; it tells its steps, and what went wrong, itself.
    command.env("RUST_LOG", "off");
    let mut process = Process::spawn_tied(&mut command, Signal::SIGTERM).map_err(failed)?;
    if let Some(stderr) = process.child().stderr.take() {
        let mut lines = BufReader::new(stderr).split(b'\n');
        while let Some(line) = lines.next_segment().await.map_err(failed)? {
            narrator.line(&String::from_utf8_lossy(&line));
        }
    }
    let mut json = String::new();
    if let Some(mut stdout) = process.child().stdout.take() {
        stdout.read_to_string(&mut json).await.map_err(failed)?;
    }
    let certain = process.wait().await.map_err(failed)?.success();
    let found: Option<Calibration> = serde_json::from_str(&json).ok();
    if !certain {
        let size = found.as_ref().map(|found| found.products.to_string());
        let size = size
            .as_deref()
            .unwrap_or("as many as are remembered, else the default");
        narrator.line(&format!(
            "products: {size}; the figures may be others than expected"
        ));
    }
    Ok(found.map(|found| found.products))
}
