//! `flamestorm doctor`: what this machine offers for recording, and how to mend what is missing.
//!
//! `facts` asks the machine, `judge` says what the answers mean (a pure function), `print`
//! tells it.

mod bpf;
mod capability;
mod facts;
mod judge;
mod print;

use std::io;

use serde::Serialize;

use self::{facts::Facts, judge::judge};

/// What a line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Recording works, with less in it.
    Limited,
    /// Recording cannot work.
    Missing,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub name: String,
    /// How it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

/// The whole answer.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnosis {
    /// Nothing that recording cannot do without is missing.
    pub can_record: bool,
    /// Line by line.
    pub findings: Vec<Finding>,
}

impl Diagnosis {
    fn of(findings: Vec<Finding>) -> Diagnosis {
        Diagnosis {
            can_record: findings.iter().all(|line| line.state != State::Missing),
            findings,
        }
    }
}

/// Examines this machine with the rights of this process.
pub fn examine() -> Diagnosis {
    Diagnosis::of(judge(&Facts::gather()))
}

/// Examines and prints, for people or as one JSON object. Returns the exit status: 0 when recording
/// can work, 1 when it cannot.
///
/// # Errors
/// Standard output cannot be written.
pub fn run(json: bool) -> io::Result<u8> {
    let diagnosis = examine();
    let mut stdout = io::stdout().lock();
    let printed = if json {
        print::json(&diagnosis, &mut stdout)
    } else {
        print::text(&diagnosis, &mut stdout)
    };
    match printed {
        // The reader has seen enough (`| head`).
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        printed => printed?,
    }
    Ok(u8::from(!diagnosis.can_record))
}
