//! Makes text safe for a terminal.

use std::error::Error;

/// Replaces characters that a terminal interprets or that mislead a reader: control characters (escapes,
/// line ends), marks that change the direction of text, and invisible characters. The names of processes,
/// files and functions are untrusted.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if misleads(c) { '?' } else { c })
        .collect()
}

fn misleads(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{061c}' // Arabic letter mark
            | '\u{200b}'..='\u{200f}' // zero width, left-to-right and right-to-left marks
            | '\u{2028}'..='\u{202e}' // line and paragraph separators, embeddings, overrides
            | '\u{2060}'..='\u{206f}' // invisible operators, isolates
            | '\u{feff}' // zero width no-break space
        )
}

/// The message of an error, followed by those of its causes. A cause whose message is already part of the
/// text is left out.
pub fn causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = error.source();
    }
    printable(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys() {
        let hostile = "a\x1b[2J\r\nb\u{9b}31m\u{202e}c\u{2066}é…";
        assert_eq!(printable(hostile), "a?[2J??b?31m?c?é…");
    }

    /// A cause whose message is already part of the text is not repeated; other causes are added.
    #[test]
    fn each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("x cannot be read: {source}")]
        struct Told {
            source: std::io::Error,
        }
        let source = || std::io::Error::from_raw_os_error(libc::ENOSPC);
        let told = Told { source: source() };
        let message = format!("x cannot be read: {}", source());
        assert_eq!(causes(&told), message);
        let error = anyhow::Error::new(told).context("recording failed");
        assert_eq!(
            causes(error.as_ref()),
            format!("recording failed: {message}")
        );
    }
}
