//! The comparison of two recordings: the table, the picture, folded stacks and figures.

use flamestorm::diff::{
    Difference, Error, Figures, FunctionChange, Kind, Normalisation, Pair, Recording, SortBy, table,
};
use flamestorm::encode::folded;
use flamestorm::profile::{QUERY_MODULE, ResolvedProfile};
use flamestorm::report::{Filter, Format, Style};

use crate::profiles::{self, At, Builder};

/// The shop before the fix: ten seconds in which searches scan the table.
fn storm() -> ResolvedProfile {
    shop(10, |b, pg| {
        let scan = [
            ("comm", "postgres"),
            ("caller_comm", "product"),
            ("outcome", "complete"),
        ];
        let stack = [pg.lower, pg.scan, pg.query, pg.search, pg.main];
        b.sample(&scan, &stack, 900);
        let stack = [pg.scan, pg.query, pg.search, pg.main];
        b.sample(&scan, &stack, 90);
        let other = [("comm", "product"), ("outcome", "complete")];
        b.sample(&other, &[pg.read, pg.main], 100);
    })
}

/// The shop with the index, for twenty seconds. What did not change has twice as many samples.
fn fixed() -> ResolvedProfile {
    shop(20, |b, pg| {
        let scan = [
            ("comm", "postgres"),
            ("caller_comm", "product"),
            ("outcome", "complete"),
        ];
        let stack = [pg.index, pg.query, pg.search, pg.main];
        b.sample(&scan, &stack, 60);
        let other = [("comm", "product"), ("outcome", "complete")];
        b.sample(&other, &[pg.read, pg.main], 204);
    })
}

struct Places {
    main: flamestorm::profile::LocationId,
    search: flamestorm::profile::LocationId,
    query: flamestorm::profile::LocationId,
    scan: flamestorm::profile::LocationId,
    lower: flamestorm::profile::LocationId,
    index: flamestorm::profile::LocationId,
    read: flamestorm::profile::LocationId,
}

fn shop(seconds: u64, samples: impl FnOnce(&mut Builder, &Places)) -> ResolvedProfile {
    let mut b = Builder::default();
    b.profile.meta.duration_ns = seconds * 1_000_000_000;
    b.profile.meta.frequency_hz = 100;
    let (pg, shop) = ("/usr/lib/postgresql/15/bin/postgres", "/srv/product");
    let text = "SELECT id FROM products WHERE description ILIKE $1 LIMIT 5";
    let places = Places {
        main: b.location(1, &[At("product::main", shop, "src/main.rs", 12)]),
        search: b.location(
            2,
            &[At(
                "product::search_products_unindexed",
                shop,
                "src/product.rs",
                144,
            )],
        ),
        query: b.location(3, &[At(text, QUERY_MODULE, "", 0)]),
        scan: b.location(4, &[At("ExecScan", pg, "executor/execScan.c", 199)]),
        lower: b.location(5, &[At("towlower", "/lib/libc.so.6", "", 0)]),
        index: b.location(6, &[At("gingetbitmap", pg, "gin/ginget.c", 1882)]),
        read: b.location(7, &[At("ksys_read", "[kernel]", "", 0)]),
    };
    samples(&mut b, &places);
    b.profile
}

fn recording(name: &str, profile: ResolvedProfile) -> Recording {
    Recording::new(name.to_owned(), Kind::Pprof, profile)
}

fn pair() -> Pair {
    let before = recording("out/storm.pb.gz", storm());
    Pair::of(before, recording("out/fixed.pb.gz", fixed())).unwrap()
}

fn function(difference: &Difference, name: &str) -> FunctionChange {
    let mut functions = difference.functions.iter();
    functions.find(|f| f.function == name).unwrap().clone()
}

/// Removes the script and the style, which belong to the drawing library and change with its version.
fn without_script_and_style(svg: &str) -> String {
    let (head, rest) = svg.split_once("<style").unwrap();
    let (_, frames) = rest.split_once("</script>").unwrap();
    format!("{head}{frames}").replace("><", ">\n<")
}

fn svg(difference: &Difference) -> String {
    String::from_utf8(difference.encode(Format::Svg).unwrap()).unwrap()
}

#[test]
fn golden() {
    let difference = pair().compare();
    let plain = Style { colour: false };
    let text = table(&difference, SortBy::Own, plain);
    profiles::assert_golden("diff.table.txt", &text);
    profiles::assert_golden("diff.total.txt", &table(&difference, SortBy::Total, plain));
    let text = String::from_utf8(difference.encode(Format::Folded).unwrap()).unwrap();
    profiles::assert_golden("diff.folded", &text);
    let figures = Figures::of(&difference, SortBy::Own, vec!["out.svg".to_owned()]);
    let mut text = serde_json::to_string_pretty(&figures).unwrap();
    text.push('\n');
    profiles::assert_golden("diff.json", &text);
    let back: Figures = serde_json::from_str(&text).unwrap();
    assert_eq!(back, figures);
    let text = svg(&difference);
    assert!(text.contains("<script"), "it must be interactive");
    profiles::assert_golden("diff.svg.txt", &without_script_and_style(&text));
}

/// Twice as many samples in twice the time is no change.
#[test]
fn normalised_for_duration() {
    let difference = pair().compare();
    assert_eq!(difference.normalisation, Normalisation::Duration);
    let read = function(&difference, "ksys_read").own;
    assert!((read.before - 0.1).abs() < 1e-9 && (read.after - 0.102).abs() < 1e-9);
    assert!(read.within_chance);
    let search = function(&difference, "product::search_products_unindexed");
    assert!((search.total.before - 0.99).abs() < 1e-9, "{search:?}");
    assert!((search.total.after - 0.03).abs() < 1e-9, "{search:?}");
    assert!(!search.total.within_chance && search.own.before == 0.0);
    assert_eq!(search.place, "src/product.rs:144");
}

/// If the length of a recording is missing, shares are compared, and the table and the picture say so.
#[test]
fn normalised_by_the_sum() {
    let mut after = fixed();
    after.meta.duration_ns = 0;
    let before = recording("a.pb.gz", storm());
    let difference = Pair::of(before, recording("b.pb.gz", after))
        .unwrap()
        .compare();
    assert_eq!(difference.normalisation, Normalisation::Total);
    let read = function(&difference, "ksys_read").own;
    assert!((read.before - 100.0 / 1090.0).abs() < 1e-9);
    assert!((read.after - 204.0 / 264.0).abs() < 1e-9);
    let text = table(&difference, SortBy::Own, Style::default());
    assert!(text.contains("since its length is not known"), "{text}");
    assert!(svg(&difference).contains("normalised by the sum of each"));
}

/// Folded stacks contain neither the length of the recording nor modules. They give the same shares as the
/// `.pb.gz` files.
#[test]
fn folded_stacks() {
    let folded = |name: &str, profile: &ResolvedProfile| {
        let profile = folded::decode(&folded::encode(profile)).unwrap();
        Recording::new(name.to_owned(), Kind::Folded, profile)
    };
    let before = folded("a.folded", &storm());
    let difference = Pair::of(before, folded("b.folded", &fixed()))
        .unwrap()
        .compare();
    assert_eq!(difference.normalisation, Normalisation::Total);
    assert!((difference.total.before - 1.0).abs() < 1e-9);
    let scan = function(&difference, "ExecScan");
    assert!((scan.total.before - 990.0 / 1090.0).abs() < 1e-9);
    assert_eq!((scan.total.after, &*scan.module), (0.0, ""));
    assert_eq!(function(&difference, "ksys_read").module, "[kernel]");
    let picture = svg(&difference);
    assert!(
        picture.contains("LIMIT 5 ("),
        "a number at the end of a name belongs to the name"
    );
}

/// If a filter matches nothing in one of the two, that side is zero. Figures stay relative to the whole
/// recording.
#[test]
fn filtered() {
    let filter = |text: &str| vec![text.parse::<Filter>().unwrap()];
    let difference = pair()
        .filter(&filter("function=towlower"))
        .unwrap()
        .compare();
    assert!((difference.total.before - 0.9).abs() < 1e-9);
    assert_eq!(
        (difference.total.after, difference.after.compared),
        (0.0, 0)
    );
    assert_eq!(difference.after.samples, 264);
    let refused = |text: &str| pair().filter(&filter(text)).unwrap_err().to_string();
    let error = refused("comm=nobody");
    assert!(
        error.contains("storm.pb.gz") && error.contains("the values of comm are"),
        "{error}"
    );
    assert!(refused("pod=x").contains("the keys of this profile are"));
}

/// Recordings that cannot be compared are refused, with a message that names the file.
#[test]
fn refused() {
    let nothing = || recording("empty.pb.gz", ResolvedProfile::default());
    let error = Pair::of(nothing(), nothing()).unwrap_err();
    assert!(matches!(error, Error::Empty(..)));
    assert!(error.to_string().contains("empty.pb.gz"));
    assert!(Pair::of(nothing(), recording("b.pb.gz", fixed())).is_ok());
    let stacks = Recording::new("a.folded".to_owned(), Kind::Folded, storm());
    let error = Pair::of(stacks, recording("b.pb.gz", fixed()))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("different kinds") && error.contains("report b.pb.gz"),
        "{error}"
    );
}

/// Names that contain markup or escape sequences are shown as text, and processes with unusual names have
/// their rectangle.
#[test]
fn hostile_names() {
    let mut b = Builder::default();
    b.profile.meta.duration_ns = 1_000_000_000;
    b.profile.meta.frequency_hz = 100;
    let odd = b.location(1, &[At("<b>f</b> (x)\x1b[2J 7", "m", "", 0)]);
    for comm in ["# comment", "  padded", "a", "a b", "#", "</svg>", "7"] {
        b.sample(&[("comm", comm)], &[odd], 50);
        b.sample(&[("comm", comm)], &[], 50);
    }
    let after = recording("b.pb.gz", ResolvedProfile { ..fixed() });
    let difference = Pair::of(recording("a.pb.gz", b.profile), after)
        .unwrap()
        .compare();
    let picture = svg(&difference);
    assert!(!picture.contains("<b>f") && picture.contains("&lt;b&gt;f&lt;/b&gt; (x)"));
    assert_eq!(picture.matches("</svg>").count(), 2);
    let text = table(&difference, SortBy::Own, Style::default());
    assert!(!text.contains('\x1b'), "{text:?}");
}

/// Every rectangle has the sums of the stacks that it stands for.
#[test]
fn rectangles_have_their_sums() {
    let picture = svg(&pair().compare());
    let title = |name: &str| {
        let (_, rest) = picture.split_once(&format!("<title>{name} (")).unwrap();
        rest.split_once(')').unwrap().0.to_owned()
    };
    assert_eq!(title("all"), "1.090 → 0.132 CPU seconds per second, -0.958");
    assert_eq!(
        title("product::search_products_unindexed"),
        "0.990 → 0.030 CPU seconds per second, -0.960"
    );
    assert_eq!(
        title("gingetbitmap"),
        "0.000 → 0.030 CPU seconds per second, +0.030"
    );
    assert_eq!(
        title("ksys_read"),
        "0.100 → 0.102 CPU seconds per second, +0.002, no more than chance"
    );
}
