//! The picture of a profile (SVG).

use flamestorm::encode::{folded, svg};
use flamestorm::profile::ResolvedProfile;

use crate::profiles;

/// Removes the script and the style, which belong to the drawing library and change with its version.
fn without_script_and_style(svg: &str) -> String {
    let mut rest = svg;
    let mut out = String::new();
    while let Some(start) = ["<script", "<style"]
        .iter()
        .filter_map(|t| rest.find(t))
        .min()
    {
        let end = ["</script>", "</style>"]
            .iter()
            .filter_map(|tag| Some(rest[start..].find(tag)? + start + tag.len()))
            .min()
            .unwrap();
        out.push_str(&rest[..start]);
        rest = &rest[end..];
    }
    out.push_str(rest);
    out.replace("><", ">\n<")
}

#[test]
fn golden() {
    let text = String::from_utf8(svg::encode(&profiles::shop()).unwrap()).unwrap();
    assert!(text.contains("<script"), "it must be interactive");
    let text = without_script_and_style(&text);
    profiles::assert_golden("shop.svg.txt", &text);
    // The roots and the result of a search are at the top, which a browser shows first.
    let y = |element: &str| -> f64 {
        let line = text.lines().skip_while(|line| !line.contains(element));
        let mut heights = line.filter_map(|line| Some(line.split_once(" y=\"")?.1));
        heights
            .next()
            .unwrap()
            .split('"')
            .next()
            .unwrap()
            .parse()
            .unwrap()
    };
    assert!(y("<title>_start") < y("<title>main"));
    assert!(y("<title>main") < y("<title>towlower"));
    assert_eq!(y("id=\"matched\""), y("id=\"details\""));
}

/// The title contains host, time, frequency and the number of samples.
#[test]
fn title() {
    assert_eq!(
        svg::title(&profiles::shop()),
        "flamestorm · shop-1 · 2026-01-02T03:04:05Z · 99 Hz · 189 samples"
    );
}

/// A profile without samples gives a picture that says so, not an error.
#[test]
fn empty() {
    let svg = String::from_utf8(svg::encode(&ResolvedProfile::default()).unwrap()).unwrap();
    assert!(svg.starts_with("<?xml") && svg.contains("No samples"));
}

/// Names that contain markup are shown as text.
#[test]
fn names_are_escaped() {
    let mut b = profiles::Builder::default();
    let odd = b.location(1, &[profiles::At("<script>alert(1)</script>", "a", "", 0)]);
    b.sample(&[("comm", "</svg>\"'&")], &[odd], 5);
    b.profile.meta.host = "<b>host</b>".to_owned();
    let svg = String::from_utf8(svg::encode(&b.profile).unwrap()).unwrap();
    assert!(!svg.contains("<script>alert") && !svg.contains("<b>host"));
    assert_eq!(
        svg.matches("</svg>").count(),
        2,
        "one of the frames and one of the document"
    );
}

/// A query that ends in a number, as the leaf of a stack, is not read as a name with two counts.
#[test]
fn numbers_at_the_end() {
    let text = "shop;main;SELECT a FROM t LIMIT 20 7\nshop;LIMIT 20;read 3\n";
    let profile = folded::decode(text.as_bytes()).unwrap();
    let svg = String::from_utf8(svg::encode(&profile).unwrap()).unwrap();
    for title in [
        "<title>SELECT a FROM t LIMIT\u{a0}20 (7 samples, 70.00%)</title>",
        "<title>LIMIT 20 (3 samples, 30.00%)</title>",
        "<title>all (10 samples, 100%)</title>",
    ] {
        assert!(svg.contains(title), "{title}: {svg}");
    }
}
