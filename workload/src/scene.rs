//! `workload scene`: the investigator's script. Scene 9 exhausts the database, scene 9.5 finds the function that does
//! it and shows what the fix changes, scene 10 reads the errors.
//!
//! Nothing is staged: traffic and storms are requests to a running shop (`shop`), profiles are the agent's
//! (`recording`), and what is concluded from them is read from the agent's answers (`evidence`). Each figure is
//! told beside what the audience was told to expect.

mod checks;
mod errors;
mod evidence;
mod fire;
mod investigation;
mod narrator;
mod outcome;
mod readme;
mod recording;
mod shop;
mod stage;

use std::path::PathBuf;

pub use errors::{Errors, Failed};
pub use evidence::{Caller, Query, Step};
pub use investigation::Investigation;
pub use outcome::{Check, Outcome};
pub use recording::RecordingError;
pub use stage::Own;

use self::narrator::Narrator;
use self::recording::Recording;
use self::stage::Stage;
use crate::child;
use crate::services::upstream::UpstreamError;
use crate::user::UserError;

/// Which part of the story.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Act {
    /// The database is exhausted
    #[value(name = "9")]
    Fire,
    /// Which function? Recordings, the verdict, the fix, the difference
    #[value(name = "9.5")]
    Investigation,
    /// The errors, by their traces
    #[value(name = "10")]
    Errors,
    /// All three
    #[value(name = "all")]
    All,
}

impl Act {
    fn name(self) -> &'static str {
        match self {
            Self::Fire => "9",
            Self::Investigation => "9.5",
            Self::Errors => "10",
            Self::All => "all",
        }
    }

    fn has(self, part: Self) -> bool {
        self == part || self == Self::All
    }
}

/// What is to be told, and where.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which part of the story.
    pub act: Act,
    /// The gateway of the shop; `None` opens one for as long as the story takes.
    pub url: Option<String>,
    /// The shop that is opened where there is none.
    pub own: Own,
    /// The profiler.
    pub agent: PathBuf,
    /// Where the pictures go.
    pub output_dir: PathBuf,
    /// Rounds of 43 queries in each storm.
    pub rounds: u32,
    /// Check everything, and begin nothing.
    pub rehearse: bool,
    /// Go on without anybody pressing Enter.
    pub unattended: bool,
    /// The story on standard error: standard output is for the result.
    pub json: bool,
}

/// A story that could not be told to its end.
#[derive(Debug, thiserror::Error)]
pub enum SceneError {
    /// The gateway does not answer.
    #[error(
        "no shop at {url}: {reason}; open one with `workload all --demo`, name another with --url, or have one opened \
         with --open"
    )]
    NoShop {
        /// Where.
        url: String,
        /// What happened there.
        reason: String,
    },
    /// The gateway answers, but not as it should.
    #[error("{0}")]
    Answer(String),
    /// An address that is none.
    #[error(transparent)]
    Address(#[from] UpstreamError),
    /// The shop did not open. Its own message stands above.
    #[error("the shop did not open: {0}")]
    Open(String),
    /// No user to become.
    #[error(transparent)]
    User(#[from] UserError),
    /// The agent failed.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// The pictures cannot be written.
    #[error("cannot write to {path}: {source}; choose another directory with --output-dir")]
    Output {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The recording does not lead to a function.
    #[error(
        "the storm's recording names no function of the product-service as the caller of a query: {0}"
    )]
    NoFunction(String),
    /// Nobody can press Enter.
    #[error(
        "nobody is there to press Enter: standard input is no terminal, or was closed; --yes goes on without"
    )]
    NobodyThere,
    /// Somebody pressed Ctrl-C or sent a signal.
    #[error("interrupted")]
    Interrupted,
    /// Signals cannot be received.
    #[error("cannot watch for signals: {0}")]
    Signals(std::io::Error),
}

/// Tells the story. To be called on the process' main thread: the agent is tied to the thread that starts it.
pub async fn run(options: &Options) -> Result<Outcome, SceneError> {
    let narrator = Narrator::new(options.json, !options.unattended && !options.rehearse)?;
    let mut stage = Stage::default();
    let result = tokio::select! {
        result = play(options, &narrator, &mut stage) => result,
        signal = child::shutdown_signal() => {
            Err(signal.map_or_else(SceneError::Signals, |()| SceneError::Interrupted))
        }
    };
    stage.clear(&narrator, result.is_err()).await;
    result
}

async fn play(
    options: &Options,
    narrator: &Narrator,
    stage: &mut Stage,
) -> Result<Outcome, SceneError> {
    let act = options.act;
    let mut outcome = Outcome::new(act.name());
    if act.has(Act::Investigation) {
        outcome.checks = checks::of_the_agent(options).await;
    }
    if options.rehearse || outcome.checks.iter().all(|check| check.ok) {
        let looked = async {
            let shop = stage.shop(options, narrator).await?;
            checks::of_the_shop(&shop).await
        };
        match looked.await {
            Ok(checks) => outcome.checks.extend(checks),
            // A rehearsal tells all that is missing.
            Err(error) if options.rehearse => {
                outcome
                    .checks
                    .push(Check::bad("gateway", error.to_string()));
            }
            Err(error) => return Err(error),
        }
    }
    narrator.heading("Is everything there?");
    outcome.checks.iter().for_each(|check| check.tell(narrator));
    let missing: Vec<&Check> = outcome.checks.iter().filter(|check| !check.ok).collect();
    let missing: Vec<String> = missing.iter().map(|check| check.to_string()).collect();
    if options.rehearse || !missing.is_empty() {
        outcome.success = missing.is_empty();
        outcome.problems = missing;
        return Ok(outcome);
    }
    let shop = stage.touch(options, narrator).await?;
    shop.reset().await?;
    if shop.drop_index().await? {
        narrator.say("the search had its index from an earlier time: it is dropped, since the story begins without");
    }
    if act.has(Act::Fire) {
        let (traffic, storm) = fire::tell(narrator, &shop, options.rounds).await?;
        outcome.problems.extend(fire::problems(&storm));
        (outcome.traffic, outcome.storm) = (Some(traffic), Some(storm));
    }
    if act.has(Act::Investigation) {
        let (mut investigation, storm) = investigation::tell(narrator, &shop, options).await?;
        readme::add(&mut investigation, &storm, options)?;
        outcome.problems.extend(investigation.problems());
        outcome.investigation = Some(investigation);
        outcome.storm.get_or_insert(storm);
    }
    if act.has(Act::Errors) {
        let storm = match outcome.storm.take() {
            Some(storm) => storm,
            None => fire::last_or_new(narrator, &shop, options.rounds).await?,
        };
        let errors = errors::tell(narrator, &shop, &storm, outcome.investigation.as_ref()).await?;
        outcome.problems.extend(errors.problems());
        (outcome.storm, outcome.errors) = (Some(storm), Some(errors));
    }
    shop.reset().await?;
    outcome.tell(narrator, shop.url(), stage.is_ours());
    Ok(outcome)
}
