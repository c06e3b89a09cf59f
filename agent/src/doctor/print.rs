//! Prints a diagnosis.

use std::io::{self, Write};

use super::{Diagnosis, State};

/// One JSON object on one line.
pub fn json(diagnosis: &Diagnosis, out: &mut impl Write) -> io::Result<()> {
    serde_json::to_writer(&mut *out, diagnosis)?;
    writeln!(out)
}

/// Text for people: the state of each finding, what was examined and what was found, and below that how to fix it.
pub fn text(diagnosis: &Diagnosis, out: &mut impl Write) -> io::Result<()> {
    let lines = &diagnosis.findings;
    let width = lines.iter().map(|line| line.name.len()).max().unwrap_or(0);
    for line in lines {
        let state = match line.state {
            State::Ok => "ok",
            State::Limited => "limited",
            State::Missing => "missing",
        };
        writeln!(out, "{state:<8} {:<width$}  {}", line.name, line.found)?;
        if let Some(mend) = &line.mend {
            writeln!(out, "{:<8} {:<width$}  → {mend}", "", "")?;
        }
    }
    let names = |state| {
        let named = lines.iter().filter(|line| line.state == state);
        let named: Vec<&str> = named.map(|line| line.name.as_str()).collect();
        named.join(", ")
    };
    writeln!(out)?;
    if !diagnosis.can_record {
        writeln!(
            out,
            "Recording cannot work here: {}.",
            names(State::Missing)
        )
    } else if lines.iter().any(|line| line.state == State::Limited) {
        writeln!(
            out,
            "Recording works, with limits: {}.",
            names(State::Limited)
        )
    } else {
        writeln!(out, "Recording works here.")
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Finding, *};

    fn diagnosis(states: &[State]) -> Diagnosis {
        let line = |(number, state): (usize, &State)| Finding {
            name: format!("thing {number}"),
            state: *state,
            found: "found".to_owned(),
            mend: (*state != State::Ok).then(|| "do something".to_owned()),
        };
        Diagnosis::of(states.iter().enumerate().map(line).collect())
    }

    fn printed(states: &[State]) -> String {
        let mut out = Vec::new();
        text(&diagnosis(states), &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    /// The last line is the verdict, and names what is missing or limited.
    #[test]
    fn last_line() {
        let last = |states: &[State]| printed(states).lines().last().unwrap_or("").to_owned();
        assert_eq!(last(&[State::Ok]), "Recording works here.");
        assert_eq!(
            last(&[State::Ok, State::Limited]),
            "Recording works, with limits: thing 1."
        );
        assert_eq!(
            last(&[State::Missing, State::Limited, State::Missing]),
            "Recording cannot work here: thing 0, thing 2."
        );
    }

    /// The fix is printed below the finding.
    #[test]
    fn ways_out() {
        let text = printed(&[State::Missing]);
        assert!(text.starts_with("missing  thing 0  found\n"), "{text}");
        assert!(text.contains("→ do something\n"), "{text}");
    }

    /// The JSON form has the same content.
    #[test]
    fn json_form() {
        let mut out = Vec::new();
        json(&diagnosis(&[State::Ok, State::Missing]), &mut out).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(value["can_record"], false);
        assert_eq!(value["findings"][0]["state"], "ok");
        assert_eq!(value["findings"][1]["mend"], "do something");
        assert!(value["findings"][0].get("mend").is_none());
    }
}
