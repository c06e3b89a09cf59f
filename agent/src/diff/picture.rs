//! The differential flame graph, laid out by inferno.
//!
//! inferno's own differential pictures are as wide as the recording after: stacks that are gone have no
//! width, and only the leaves have a colour. Here a stack is as wide as the larger of its two values, so
//! that a tower that is gone remains visible, and each frame is coloured by its own sum. The layout, the
//! search and the zoom are inferno's. Its rectangles are identified by their depth and offset, which it
//! writes as attributes.

use std::collections::HashMap;
use std::path::Path;

use inferno::flamegraph::color::{BackgroundColor, Color};
use inferno::flamegraph::{self, Direction, Options};

use super::compare::{Both, Change, Difference, Normalisation};
use super::folded::scaled;
use crate::encode::svg::{BACKGROUND, MIN_WIDTH_PERCENT, SvgError, match_at_the_head};

/// Height of a frame with its gap, pixels.
const ROW: usize = 16;

/// The difference as an interactive SVG.
pub(super) fn encode(difference: &Difference) -> Result<Vec<u8>, SvgError> {
    let mut lines: Vec<(&str, u64, &Both)> = difference
        .stacks
        .iter()
        .map(|(stack, both)| (drawable(stack), width(both), both))
        .filter(|(stack, width, _)| !stack.is_empty() && *width > 0)
        .collect();
    lines.sort_by_key(|(stack, ..)| *stack);
    let mut options = Options::default();
    options.title = title(difference);
    options.subtitle = Some(subtitle(difference));
    options.bgcolors = Some(BackgroundColor::Flat(BACKGROUND));
    options.min_width = MIN_WIDTH_PERCENT;
    options.direction = Direction::Inverted;
    options.deterministic = true;
    options.frame_height = ROW;
    // The lines are sorted, as the library requires.
    options.no_sort = true;
    // With two counts in a line, the library does not take a number at the end of a name for a count.
    let text: Vec<String> = lines
        .iter()
        .map(|(stack, width, _)| format!("{stack} {width} {width}"))
        .collect();
    let mut svg = Vec::new();
    flamegraph::from_lines(&mut options, text.iter().map(String::as_str), &mut svg)
        .map_err(|error| SvgError::Draw(error.to_string()))?;
    let svg = String::from_utf8(match_at_the_head(svg))
        .map_err(|error| SvgError::Draw(error.to_string()))?;
    let frames = frames(&lines);
    paint(&svg, &frames, difference.normalisation)
        .ok_or_else(|| SvgError::Draw("the library's frames are not as expected".to_owned()))
        .map(String::into_bytes)
}

/// A stack as the library reads it: it removes leading spaces, and takes a line that begins with `# ` for a
/// comment.
fn drawable(stack: &str) -> &str {
    stack.trim_start_matches(['#', ' '])
}

fn width(both: &Both) -> u64 {
    scaled(both.before.value.max(both.after.value))
}

/// The title of the picture: `flamestorm diff · storm.pb.gz → fixed.pb.gz · 1.970 → 0.261 CPU seconds per
/// second`
fn title(difference: &Difference) -> String {
    let (before, after) = (&difference.before.name, &difference.after.name);
    let (short_before, short_after) = (short(before), short(after));
    let (before, after) = if short_before == short_after {
        (&**before, &**after)
    } else {
        (short_before, short_after)
    };
    let unit = difference.normalisation;
    let total = &difference.total;
    format!(
        "flamestorm diff · {before} → {after} · {} → {} {}",
        unit.figure(total.before),
        unit.figure(total.after),
        unit.name(),
    )
}

fn short(name: &str) -> &str {
    Path::new(name)
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or(name)
}

fn subtitle(difference: &Difference) -> String {
    let normalised = match (difference.before.seconds, difference.after.seconds) {
        (Some(before), Some(after)) if difference.normalisation == Normalisation::Duration => {
            format!("normalised for duration ({before:.1} s, {after:.1} s)")
        }
        _ => "normalised by the sum of each, as lengths are not known".to_owned(),
    };
    format!(
        "red grew, blue shrank, grey is no more than chance; as wide as the larger of both; {normalised}"
    )
}

/// The sums of every rectangle, by its depth and offset. A stack shares the rectangles of the names that it
/// has in common, from the root, with the stack before it, as in the library.
fn frames(lines: &[(&str, u64, &Both)]) -> HashMap<(usize, u64), Both> {
    let mut frames: HashMap<(usize, u64), Both> = HashMap::new();
    let mut open: Vec<(&str, u64)> = Vec::new();
    let mut offset = 0;
    for (stack, width, both) in lines {
        let names = std::iter::once("").chain(stack.split(';'));
        let names: Vec<&str> = names.collect();
        let shared = open
            .iter()
            .zip(&names)
            .take_while(|((open, _), name)| open == *name)
            .count();
        open.truncate(shared);
        open.extend(names[shared..].iter().map(|name| (*name, offset)));
        for (depth, (_, start)) in open.iter().enumerate() {
            frames.entry((depth, *start)).or_default().merge(both);
        }
        offset += width;
    }
    frames
}

/// Gives each rectangle its colour and its figures. `None` if the picture does not have the expected form.
fn paint(svg: &str, frames: &HashMap<(usize, u64), Both>, unit: Normalisation) -> Option<String> {
    const FRAME: &str = "<title>";
    let (head, rest) = svg.split_once("<svg id=\"frames\"")?;
    let top = heights(rest)?.min()?;
    let mut out = String::with_capacity(svg.len() + svg.len() / 4);
    out.push_str(head);
    out.push_str("<svg id=\"frames\"");
    let mut parts = rest.split(FRAME);
    out.push_str(parts.next()?);
    for part in parts {
        let depth = attribute(part, " y=\"")?
            .parse::<usize>()
            .ok()?
            .checked_sub(top)?
            / ROW;
        let offset = attribute(part, " fg:x=\"")?.parse().ok()?;
        let change = frames.get(&(depth, offset))?.change();
        // `name (1,234 samples, 5.67%; 0.00%)</title>…fill="rgb(…)"…`
        let (label, drawing) = part.split_once("</title>")?;
        let (name, _) = label.rsplit_once(" (")?;
        let (before_fill, fill) = drawing.split_once("fill=\"")?;
        let (_, after_fill) = fill.split_once('"')?;
        let Color { r, g, b } = colour(&change);
        let figures = figures(&change, unit);
        out.push_str(&format!(
            "{FRAME}{name} ({figures})</title>{before_fill}fill=\"rgb({r},{g},{b})\"{after_fill}"
        ));
    }
    Some(out)
}

/// The vertical positions of all frames, in pixels.
fn heights(frames: &str) -> Option<impl Iterator<Item = usize>> {
    let parts = frames.split("<title>").skip(1);
    let heights: Option<Vec<usize>> = parts
        .map(|part| attribute(part, " y=\"")?.parse().ok())
        .collect();
    Some(heights?.into_iter())
}

fn attribute<'a>(text: &'a str, start: &str) -> Option<&'a str> {
    let (_, value) = text.split_once(start)?;
    Some(value.split_once('"')?.0)
}

/// The figures of a frame: `1.300 → 0.066 CPU seconds per second, -1.234`
fn figures(change: &Change, unit: Normalisation) -> String {
    let chance = if change.within_chance {
        ", no more than chance"
    } else {
        ""
    };
    format!(
        "{} → {} {}, {}{chance}",
        unit.figure(change.before),
        unit.figure(change.after),
        unit.name(),
        unit.signed(change.difference),
    )
}

/// A mix of grey with red or blue, by the share of the larger figure that the difference makes up. A stack
/// that is new or gone has the full colour.
fn colour(change: &Change) -> Color {
    const GREY: Color = Color {
        r: 232,
        g: 232,
        b: 230,
    };
    const GREW: Color = Color {
        r: 236,
        g: 96,
        b: 78,
    };
    const SHRANK: Color = Color {
        r: 92,
        g: 146,
        b: 236,
    };
    let larger = change.before.max(change.after);
    if change.within_chance || larger <= 0.0 {
        return GREY;
    }
    let full = if change.difference > 0.0 {
        GREW
    } else {
        SHRANK
    };
    // The colour is never so pale that it could be taken for the grey of chance.
    let share = 0.15 + 0.85 * (change.difference.abs() / larger).min(1.0);
    let mix = |from: u8, to: u8| {
        let (from, to) = (f64::from(from), f64::from(to));
        (from + (to - from) * share).round() as u8
    };
    Color {
        r: mix(GREY.r, full.r),
        g: mix(GREY.g, full.g),
        b: mix(GREY.b, full.b),
    }
}

impl Normalisation {
    fn name(self) -> &'static str {
        match self {
            Normalisation::Duration => "CPU seconds per second",
            Normalisation::Total => "of all samples",
        }
    }
}
