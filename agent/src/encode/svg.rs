//! The interactive flame graph, drawn by inferno.
//!
//! Colours show where code comes from: the kernel is blue, names with `::` are red, other names with a
//! symbol amber, code compiled at run time green, frames without a symbol pale, and queries violet. Within
//! such a kind, the shade is derived from the name, so that a function has the same colour in every
//! picture.

use inferno::flamegraph::color::{BackgroundColor, Color, PaletteMap};
use inferno::flamegraph::{self, Direction, Options};

use super::folded;
use crate::profile::{CALLER_MODULE, PROCESS_MODULE, QUERY_MODULE, ResolvedProfile};

/// Frames that are narrower than this share of the picture (per cent) are left out. It is half a pixel on a
/// wide screen. The `.folded` and the `.pb.gz` contain these frames.
pub(crate) const MIN_WIDTH_PERCENT: f64 = 0.03;

/// The colour of the background.
pub(crate) const BACKGROUND: Color = Color {
    r: 252,
    g: 252,
    b: 250,
};

/// Why the picture could not be drawn.
#[derive(Debug, thiserror::Error)]
pub enum SvgError {
    /// The drawing library failed.
    #[error("drawing the flame graph failed: {0}")]
    Draw(String),
}

/// The profile as an interactive SVG, titled with host, time, frequency and sample count.
///
/// # Errors
/// The drawing library fails, which is not known to happen for profiles of this crate.
pub fn encode(profile: &ResolvedProfile) -> Result<Vec<u8>, SvgError> {
    let lines = folded::lines(profile);
    if lines.values().all(|count| *count == 0) {
        return Ok(empty(profile));
    }
    let mut palette = palette(profile);
    let mut options = Options::default();
    options.title = title(profile);
    options.subtitle = subtitle(profile);
    options.bgcolors = Some(BackgroundColor::Flat(BACKGROUND));
    options.palette_map = Some(&mut palette);
    options.min_width = MIN_WIDTH_PERCENT;
    // The roots are at the top, as in pprof and speedscope: a browser shows the top of a picture first,
    // which would be nearly empty if the roots were at the bottom and a few stacks had a hundred frames.
    options.direction = Direction::Inverted;
    options.deterministic = true;
    // `lines` is sorted, as the library requires.
    options.no_sort = true;
    let lines: Vec<String> = lines
        .into_iter()
        .map(|(stack, count)| format!("{stack} {count}"))
        .collect();
    let mut svg = Vec::new();
    flamegraph::from_lines(&mut options, lines.iter().map(String::as_str), &mut svg)
        .map_err(|error| SvgError::Draw(error.to_string()))?;
    Ok(match_at_the_head(svg))
}

/// Moves the result of a search to the line of a frame's details. The library writes it at the bottom of
/// the picture, which is rarely in view.
pub(crate) fn match_at_the_head(svg: Vec<u8>) -> Vec<u8> {
    let mut text = match String::from_utf8(svg) {
        Ok(text) => text,
        Err(error) => return error.into_bytes(),
    };
    let height = |text: &str, id: &str| {
        let element = text.find(&format!("<text id=\"{id}\""))?;
        let start = element + text[element..].find(" y=\"")? + " y=\"".len();
        Some(start..start + text[start..].find('"')?)
    };
    if let (Some(from), Some(to)) = (height(&text, "details"), height(&text, "matched")) {
        let details = text[from].to_owned();
        text.replace_range(to, &details);
    }
    text.into_bytes()
}

/// The title of the picture: `flamestorm · host · 2026-01-02T03:04:05Z · 99 Hz · 1,234 samples`.
pub fn title(profile: &ResolvedProfile) -> String {
    let meta = &profile.meta;
    let mut parts = vec!["flamestorm".to_owned()];
    if !meta.host.is_empty() {
        parts.push(meta.host.clone());
    }
    if meta.start_unix_ns > 0 {
        let start = std::time::Duration::from_nanos(meta.start_unix_ns as u64);
        let start = std::time::UNIX_EPOCH + start;
        parts.push(humantime::format_rfc3339_seconds(start).to_string());
    }
    if meta.frequency_hz > 0 {
        parts.push(format!("{} Hz", meta.frequency_hz));
    }
    parts.push(format!("{} samples", grouped(profile.total_count())));
    parts.join(" · ")
}

fn subtitle(profile: &ResolvedProfile) -> Option<String> {
    let meta = &profile.meta;
    if meta.target.is_empty() {
        return None;
    }
    let seconds = meta.duration_ns as f64 / 1e9;
    Some(format!(
        "{}, {seconds:.1} s on {} CPUs",
        meta.target, meta.cpus
    ))
}

/// Formats `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A picture that says why it is empty.
fn empty(profile: &ResolvedProfile) -> Vec<u8> {
    let title = xml(&title(profile));
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
         <svg xmlns=\"http://www.w3.org/2000/svg\" width=\"1200\" height=\"80\">\n\
         <text x=\"600\" y=\"30\" text-anchor=\"middle\" font-family=\"monospace\" \
         font-size=\"17\">{title}</text>\n\
         <text x=\"600\" y=\"58\" text-anchor=\"middle\" font-family=\"monospace\" \
         font-size=\"12\">No samples: nothing that was recorded used a CPU.</text>\n\
         </svg>\n"
    )
    .into_bytes()
}

fn xml(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// Where code comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The process's name at the root: grey.
    Process,
    /// The kernel: blue.
    Kernel,
    /// Rust and C++ (names with `::`): orange to red.
    Namespaced,
    /// C and everything else with a symbol: yellow to amber.
    Plain,
    /// Code compiled at run time: green.
    Jit,
    /// Code without a symbol, named by its module: pale.
    ModuleOnly,
    /// A query: violet.
    Query,
}

impl Kind {
    /// The range of the hue (from, to; degrees), saturation and lightness (per cent).
    const fn colours(self) -> (f32, f32, f32, f32) {
        match self {
            Kind::Process => (220.0, 220.0, 6.0, 82.0),
            Kind::Kernel => (202.0, 222.0, 62.0, 76.0),
            Kind::Namespaced => (10.0, 26.0, 84.0, 71.0),
            Kind::Plain => (34.0, 50.0, 88.0, 68.0),
            Kind::Jit => (100.0, 140.0, 45.0, 70.0),
            Kind::ModuleOnly => (40.0, 50.0, 30.0, 80.0),
            Kind::Query => (262.0, 282.0, 55.0, 82.0),
        }
    }
}

fn palette(profile: &ResolvedProfile) -> PaletteMap {
    let mut palette = PaletteMap::default();
    for frame in profile.locations.iter().flat_map(|l| profile.frames_at(l)) {
        let kind = if &*frame.mapping.name == QUERY_MODULE {
            Kind::Query
        } else if matches!(&*frame.mapping.name, PROCESS_MODULE | CALLER_MODULE) {
            Kind::Process
        } else if frame.mapping.is_kernel {
            Kind::Kernel
        } else if frame.function.is_module_only() {
            Kind::ModuleOnly
        } else if &*frame.mapping.name == "[jit]" {
            Kind::Jit
        } else if frame.function.name.contains("::") {
            Kind::Namespaced
        } else {
            Kind::Plain
        };
        let name = folded::frame_name(&frame);
        let colour = shade(kind, &name);
        if let Some(leaf) = folded::unambiguous(&name) {
            palette.insert(leaf, colour);
        }
        palette.insert(name, colour);
    }
    for sample in &profile.samples {
        let name = folded::root_name(sample);
        if palette.get(&name).is_none() {
            let colour = shade(Kind::Process, &name);
            palette.insert(name, colour);
        }
    }
    let all = Color {
        r: 228,
        g: 228,
        b: 226,
    };
    palette.insert("all", all);
    palette
}

/// The colour of a name: hue and lightness of its kind, varied by the hash of the name.
fn shade(kind: Kind, name: &str) -> Color {
    let (from, to, saturation, lightness) = kind.colours();
    let hash = fnv(name);
    let first = (hash & 0xffff) as f32 / 65535.0;
    let second = (hash >> 16 & 0xffff) as f32 / 65535.0;
    let hue = from + (to - from) * first;
    hsl(
        hue,
        saturation / 100.0,
        (lightness - 4.0 + 8.0 * second) / 100.0,
    )
}

/// 32-bit FNV-1a, which is the same on every machine and in every version.
fn fnv(name: &str) -> u32 {
    name.bytes().fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}

/// Converts a colour from HSL (CSS Color Module Level 4, "HSL to RGB").
fn hsl(hue: f32, saturation: f32, lightness: f32) -> Color {
    let channel = |n: f32| {
        let k = (n + hue / 30.0) % 12.0;
        let a = saturation * lightness.min(1.0 - lightness);
        let value = lightness - a * (k - 3.0).min(9.0 - k).clamp(-1.0, 1.0);
        (value * 255.0).round() as u8
    };
    Color {
        r: channel(0.0),
        g: channel(8.0),
        b: channel(4.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1_000), "1,000");
        assert_eq!(grouped(12_345_678), "12,345,678");
    }

    /// The conversion is right for well-known colours.
    #[test]
    fn hsl_to_rgb() {
        let rgb = |h, s, l| {
            let c = hsl(h, s, l);
            (c.r, c.g, c.b)
        };
        assert_eq!(rgb(0.0, 1.0, 0.5), (255, 0, 0));
        assert_eq!(rgb(120.0, 1.0, 0.25), (0, 128, 0));
        assert_eq!(rgb(240.0, 1.0, 0.5), (0, 0, 255));
        assert_eq!(rgb(50.0, 0.0, 1.0), (255, 255, 255));
    }
}
