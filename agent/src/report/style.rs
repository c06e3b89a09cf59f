//! Colours for text on a terminal, and the formats of shares and names.

use std::io::IsTerminal;

use super::printable;

/// How text is coloured on a terminal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    /// Whether escape sequences for colours are used.
    pub colour: bool,
}

impl Style {
    /// Uses colours on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
    pub fn detect(stream: &impl IsTerminal) -> Style {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Style {
            colour: stream.is_terminal() && !refused,
        }
    }

    pub(crate) fn paint(self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    pub(crate) fn heading(self, text: &str) -> String {
        self.paint("1", text)
    }

    /// Green when good, yellow when not.
    pub(super) fn verdict(self, good: bool, text: &str) -> String {
        self.paint(if good { "32" } else { "33" }, text)
    }
}

pub(crate) fn push(out: &mut String, row: &str) {
    out.push_str(row.trim_end());
    out.push('\n');
}

pub(super) fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

/// A percentage with two decimals. It is rounded down, so that only a share of 1 becomes 100 %. The small
/// constant makes up for rounding errors of the multiplication.
pub(super) fn exact(share: f64) -> String {
    let hundredths = (share * 10_000.0 + 1e-6).floor();
    format!("{:.2}%", hundredths / 100.0)
}

/// The text in exactly `width` columns: shortened in the middle, because both ends of a name are
/// informative, or padded with spaces.
pub(crate) fn fit(text: &str, width: usize) -> String {
    let text: Vec<char> = printable(text).chars().collect();
    if text.len() <= width {
        let fill = width - text.len();
        return text.into_iter().collect::<String>() + &" ".repeat(fill);
    }
    let head = (width - 1) / 2;
    let tail = width - 1 - head;
    let cut = text[..head]
        .iter()
        .chain(['…'].iter())
        .chain(&text[text.len() - tail..]);
    cut.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_their_column() {
        assert_eq!(fit("short", 8), "short   ");
        assert_eq!(fit("alpha::beta::gamma", 9), "alph…amma");
        assert_eq!(fit("a\x1b[31mred", 10), "a?[31mred ");
    }

    /// 99.996 % is not shown as 100 %.
    #[test]
    fn shares_are_not_rounded_up() {
        assert_eq!(exact(1.0), "100.00%");
        assert_eq!(exact(0.99996), "99.99%");
        assert_eq!(exact(0.999), "99.90%");
    }
}
