//! The table for the terminal: what grew and what shrank.

use std::cmp::Ordering;

use super::compare::{Change, Difference, FunctionChange, Normalisation, Side};
use crate::encode::svg::grouped;
use crate::report::{Style, fit, printable, push};

/// The maximum number of rows of each part.
const ROWS: usize = 12;
/// Width of a function's name, columns.
const NAME: usize = 56;
/// Width of a module's name, columns.
const MODULE: usize = 16;
/// Width of a figure, columns.
const FIGURE: usize = 7;

/// The order of functions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SortBy {
    /// By the change in the function itself, which shows where the CPU time is used.
    #[default]
    Own,
    /// By the change in the function and in all that it calls, which shows what causes the CPU time.
    Total,
}

impl SortBy {
    fn change(self, function: &FunctionChange) -> &Change {
        match self {
            SortBy::Own => &function.own,
            SortBy::Total => &function.total,
        }
    }

    /// Sorts by the amount of change, largest first. Equal functions have a fixed order.
    pub(super) fn sort(self, functions: &mut [FunctionChange]) {
        let amount = |f: &FunctionChange, by: SortBy| by.change(f).difference.abs();
        let most = |a: &FunctionChange, b: &FunctionChange, by| {
            amount(b, by)
                .partial_cmp(&amount(a, by))
                .unwrap_or(Ordering::Equal)
        };
        let other = match self {
            SortBy::Own => SortBy::Total,
            SortBy::Total => SortBy::Own,
        };
        functions.sort_by(|a, b| {
            most(a, b, self)
                .then_with(|| most(a, b, other))
                .then_with(|| (&a.function, &a.module).cmp(&(&b.function, &b.module)))
        });
    }
}

/// The table of the functions that grew and that shrank, and of the queries, followed by the two
/// recordings.
pub fn table(difference: &Difference, sort: SortBy, style: Style) -> String {
    let mut out = String::new();
    let unit = difference.normalisation;
    let (mut queries, mut functions): (Vec<_>, Vec<_>) = difference
        .functions
        .iter()
        .cloned()
        .partition(FunctionChange::is_query);
    sort.sort(&mut functions);
    SortBy::Total.sort(&mut queries);
    let visible = |f: &&FunctionChange| unit.shows(sort.change(f));
    let grew = |f: &&FunctionChange| sort.change(f).difference > 0.0;
    let (more, less): (Vec<_>, Vec<_>) = functions.iter().filter(visible).partition(grew);
    let queries: Vec<_> = queries.iter().filter(|f| unit.shows(&f.total)).collect();
    rows(&mut out, "grew", &more, unit, style);
    rows(&mut out, "shrank", &less, unit, style);
    rows(&mut out, "query", &queries, unit, style);
    if more.is_empty() && less.is_empty() && queries.is_empty() {
        push(&mut out, "nothing grew or shrank");
        out.push('\n');
    }
    side(&mut out, "before", &difference.before, style);
    side(&mut out, "after", &difference.after, style);
    let total = &difference.total;
    let text = format!(
        "{} → {} ({}){}",
        unit.figure(total.before),
        unit.figure(total.after),
        unit.signed(total.difference),
        chance(total),
    );
    push(&mut out, &format!("total   {text}"));
    push(&mut out, &format!("unit    {}", unit.told()));
    push(
        &mut out,
        "~       so few samples that chance alone explains the difference",
    );
    out
}

fn rows(out: &mut String, name: &str, rows: &[&FunctionChange], unit: Normalisation, style: Style) {
    if rows.is_empty() {
        return;
    }
    let figures = FIGURE * 3 + 5;
    let (what, module, line) = match name {
        "query" => ("query", "", ""),
        _ => ("function", "module", "line"),
    };
    let heading = format!(
        "{:<figures$}    {:<figures$}    {what:<NAME$}  {module:<MODULE$}  {line}",
        match name {
            "query" => "self".to_owned(),
            name => format!("{name}: self"),
        },
        "total",
    );
    push(out, &style.heading(&heading));
    for row in rows.iter().take(ROWS) {
        let module = if row.is_query() { "" } else { &row.module };
        let text = format!(
            "{}   {}   {}  {}  {}",
            change(&row.own, unit, style),
            change(&row.total, unit, style),
            fit(&row.function, NAME),
            fit(module, MODULE),
            printable(&row.place),
        );
        push(out, &text);
    }
    if rows.len() > ROWS {
        push(out, &format!("and {} more", rows.len() - ROWS));
    }
    out.push('\n');
}

/// A change as text: `-1.234  1.300 → 0.066 `, in the colour of its direction.
fn change(change: &Change, unit: Normalisation, style: Style) -> String {
    let difference = if change.difference == 0.0 {
        unit.figure(0.0)
    } else {
        unit.signed(change.difference)
    };
    let difference = format!("{difference:>FIGURE$}");
    let colour = match change {
        change if change.within_chance => "2",
        change if change.difference > 0.0 => "31",
        _ => "34",
    };
    format!(
        "{}{} {:>FIGURE$} → {:<FIGURE$}",
        style.paint(colour, &difference),
        chance(change),
        unit.figure(change.before),
        unit.figure(change.after),
    )
}

fn chance(change: &Change) -> &'static str {
    if change.within_chance && change.difference != 0.0 {
        "~"
    } else {
        " "
    }
}

fn side(out: &mut String, name: &str, side: &Side, style: Style) {
    let mut text = format!("{name:<6}  {}, ", style.paint("36", &printable(&side.name)));
    if side.compared < side.samples {
        text += &format!("{} of ", grouped(side.compared));
    }
    text += &format!("{} samples", grouped(side.samples));
    if let Some(seconds) = side.seconds {
        text += &format!(" in {seconds:.1} s");
    }
    push(out, &text);
}

impl Normalisation {
    /// The unit, and how it was computed.
    pub(super) fn told(self) -> &'static str {
        match self {
            Normalisation::Duration => {
                "CPU seconds per second: each recording is normalised by its length"
            }
            Normalisation::Total => {
                "share of all samples of the recording, since its length is not known: \
                 a change that affects everything alike does not show"
            }
        }
    }

    /// Whether a change is visible in the digits that are printed.
    fn shows(self, change: &Change) -> bool {
        self.signed(change.difference)
            .chars()
            .any(|c| matches!(c, '1'..='9'))
    }

    pub(super) fn figure(self, value: f64) -> String {
        match self {
            Normalisation::Duration => format!("{value:.3}"),
            Normalisation::Total => format!("{:.1}%", value * 100.0),
        }
    }

    pub(super) fn signed(self, value: f64) -> String {
        match self {
            Normalisation::Duration => format!("{value:+.3}"),
            Normalisation::Total => format!("{:+.1}%", value * 100.0),
        }
    }
}
