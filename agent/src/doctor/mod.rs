//! `flamestorm doctor`: what this machine offers for recording, and how to fix what is missing.
//!
//! `facts` queries the machine, `judge` interprets the answers (a pure function), `print` prints the result.

mod bpf;
mod capability;
mod facts;
mod judge;
mod print;

use std::io;

use serde::Serialize;

use self::{facts::Facts, judge::judge};

/// The state of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Everything is as recording needs it.
    Ok,
    /// Recording works, but some information is unavailable.
    Limited,
    /// Recording cannot work.
    Missing,
}

/// One line of the diagnosis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was examined.
    pub name: String,
    /// Its state.
    pub state: State,
    /// What was found.
    pub found: String,
    /// How to fix it; `None` if there is nothing to fix.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

/// The complete diagnosis.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnosis {
    /// Whether recording has everything that it cannot do without.
    pub can_record: bool,
    /// The findings, in the order in which they are printed.
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

/// Examines this machine with the privileges of this process.
pub fn examine() -> Diagnosis {
    Diagnosis::of(judge(&Facts::gather()))
}

/// Examines the machine and prints the diagnosis, as text or as one JSON object. Returns the
/// exit status: 0 if recording can work, 1 if it cannot.
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
        // The reader has closed the pipe (`| head`).
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        printed => printed?,
    }
    Ok(u8::from(!diagnosis.can_record))
}
