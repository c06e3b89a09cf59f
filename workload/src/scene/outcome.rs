//! What came of a story: one JSON object, and the last lines for people.

use std::fmt;

use serde::Serialize;

use super::errors::Errors;
use super::investigation::Investigation;
use super::narrator::{Narrator, Tone, toned};
use crate::load;
use crate::storm::StormReport;

/// Something that a scene needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What it is.
    pub name: String,
    /// Whether it is there.
    pub ok: bool,
    /// Where it is, or why it is not.
    pub detail: String,
}

impl Check {
    /// It is there.
    pub fn good(name: &str, detail: String) -> Self {
        let (name, ok) = (name.to_owned(), true);
        Self { name, ok, detail }
    }

    /// It is missing.
    pub fn bad(name: &str, detail: String) -> Self {
        let (name, ok) = (name.to_owned(), false);
        Self { name, ok, detail }
    }

    /// Tells it.
    pub fn tell(&self, narrator: &Narrator) {
        let mark = match self.ok {
            true => toned(Tone::Good, "ok     "),
            false => toned(Tone::Bad, "missing"),
        };
        narrator.line(&format!("{mark} {:<18} {}", self.name, self.detail));
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.detail)
    }
}

/// What came of a story. The figures of the storm and of the investigation stand in the object itself.
#[derive(Debug, Default, Serialize)]
pub struct Outcome {
    /// Which part of the story: `9`, `9.5`, `10` or `all`.
    pub scene: &'static str,
    /// Whether it showed what it is about. A rehearsal shows nothing, and succeeds when everything is there.
    pub success: bool,
    /// What it did not show.
    pub problems: Vec<String>,
    /// What was looked at before.
    pub checks: Vec<Check>,
    /// The light traffic before the storm of scene 9.
    pub traffic: Option<load::Report>,
    /// Scene 9's storm; where only 9.5 was told, the one that was recorded; in scene 10, the one whose errors it reads.
    #[serde(flatten)]
    pub storm: Option<StormReport>,
    /// What scene 9.5 found.
    #[serde(flatten)]
    pub investigation: Option<Investigation>,
    /// What scene 10 read.
    pub errors: Option<Errors>,
}

impl Outcome {
    /// Nothing yet, and nothing wrong.
    pub fn new(scene: &'static str) -> Self {
        Self {
            scene,
            success: true,
            ..Self::default()
        }
    }

    /// The end of the story.
    pub fn tell(&mut self, narrator: &Narrator, url: &str, closes: bool) {
        self.success = self.problems.is_empty();
        narrator.heading("The end");
        for problem in &self.problems {
            narrator.say(&toned(Tone::Bad, problem));
        }
        if self.success {
            narrator.say(&toned(
                Tone::Good,
                "shown as it should be; the shop is reset",
            ));
        }
        if let Some(investigation) = &self.investigation {
            for file in &investigation.files {
                narrator.line(&file.display().to_string());
            }
        }
        if closes {
            narrator.line("the shop closes. To click through the same in a browser: make shop");
        } else {
            narrator.line(&format!("the shop stays open at {url}"));
        }
    }
}
