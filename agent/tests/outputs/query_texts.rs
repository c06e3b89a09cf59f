//! Query texts that could make the agent leak a literal, crash, or use too much time.
//!
//! `FLAMESTORM_FUZZ_SECONDS` sets how long random texts are tried (2 seconds if it is not set),
//! `FLAMESTORM_FUZZ_SEED` the seed of the random numbers.

use std::time::{Duration, Instant};

use flamestorm::query::{
    MAX_QUERY_TEXT, QueryRef, TextMode, Texts, normalize, title, traceparent, traceparent_in_name,
    verbatim,
};
use rustix::time::{ClockId, clock_gettime};

/// The secret that must not appear. No part of it is in any word of the statements, or in what replaces a
/// literal.
const SECRET: &str = "Zq8WjK0vXz5QyH7";
const SECRET_NUMBER: &str = "918273645091827";

/// The generator xorshift64*, so that a failed try can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound as u64) as usize
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }
}

fn number_from(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |value| value.parse().unwrap())
}

/// A random statement with the secret in places that must be hidden, and words that must stay visible.
struct Made {
    text: String,
    visible: Vec<&'static str>,
    /// Whether the setting `standard_conforming_strings` is off where this statement runs.
    off: bool,
}

impl Made {
    fn new(random: &mut Random) -> Self {
        let mut made = Made {
            text: String::new(),
            visible: Vec::new(),
            off: random.below(3) == 0,
        };
        match random.below(8) {
            0 => made.setting(random),
            1 => made.copy(random),
            _ => {
                for _ in 0..random.below(12) + 1 {
                    made.code(random);
                    match random.below(4) {
                        0 => made.comment(random),
                        1 => made.number(random),
                        _ => made.string(random),
                    }
                }
                made.code(random);
            }
        }
        made
    }

    fn push(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Adds a token that stays visible and ends whatever token is before it.
    fn code(&mut self, random: &mut Random) {
        const CODE: &[&str] = &[
            "SELECT",
            "ponies",
            "IN (",
            ")",
            ",",
            "VALUES (",
            "), (",
            "ARRAY[",
            "]",
            "=",
            "- ",
            "<@",
            "::tint",
            "$1",
            "\"a'b\"",
            "\"a\"\"$$b\"",
            ";",
            "@-",
            "UPDATE t SET n =",
            "LIKE",
            "BETWEEN",
            "/ ",
            "* ",
            "d ? ",
            "é",
            "[1:2]",
            ".",
            "CREATE",
            "ALTER USER u",
        ];
        let code = random.pick(CODE);
        if matches!(code, "ponies" | "BETWEEN" | "\"a'b\"" | "UPDATE t SET n =") {
            self.visible.push(code);
        }
        self.push(random.pick(&[" ", "\n", "\t ", " \r\n "]));
        self.push(code);
        self.push(random.pick(&[" ", "\n", "  "]));
    }

    fn comment(&mut self, random: &mut Random) {
        let inside = random.pick(&["'", "\"", "$$", "", "\\'", "-- ", "/* b */", "/**/", "é"]);
        let text = match random.below(3) {
            0 => format!("-- {inside} {SECRET}{}", random.pick(&["\n", "\r"])),
            1 => format!("/*{inside}{SECRET}*/"),
            _ => format!("/* /*{SECRET}*/ {inside} {SECRET} **/"),
        };
        // Only an operator may be directly in front of a comment: other tokens could make it part of
        // themselves.
        self.push(random.pick(&["", "+", "@", "<"]));
        self.push(&text);
    }

    fn number(&mut self, random: &mut Random) {
        let text = random.pick(&[
            "N", "-N", "N.N", ".N", "NeN", "N_N", "0xN", "N.NE-N", "0bN", "NaN",
        ]);
        self.push(&text.replace('N', SECRET_NUMBER));
    }

    fn string(&mut self, random: &mut Random) {
        let text = match random.below(7) {
            0 | 1 => self.plain("", random),
            2 => {
                let prefix = random.pick(&["N", "n", "U&", "u&"]);
                self.plain(prefix, random)
            }
            3 => format!("{}'{}'", random.pick(&["E", "e"]), escaped(random)),
            4 => format!("{}'{SECRET}'", random.pick(&["B", "x", "X", "b"])),
            5 => format!(
                "E'{}'\n -- {SECRET}'\n '{}'",
                escaped(random),
                escaped(random)
            ),
            _ => {
                let tag = random.pick(&["", "tag", "_é", "A1"]);
                let inside =
                    random.pick(&["'", "$", "$b$", "\\", "--", "/*", "\"", "$ tag$", "$1"]);
                format!("${tag}$ {SECRET} {inside} {SECRET}${tag}$")
            }
        };
        self.push(&text);
        if random.below(12) == 0 {
            let escape = if self.off {
                " ESCAPE '\\\\' "
            } else {
                " ESCAPE '\\' "
            };
            self.push(escape);
        }
    }

    /// A string in which the setting decides what a backslash means.
    fn plain(&self, prefix: &str, random: &mut Random) -> String {
        if self.off {
            return format!("{prefix}'{}'", escaped(random));
        }
        let mut text = format!("{prefix}'");
        for _ in 0..random.below(4) + 1 {
            text.push_str(
                random.pick(&["''", "\\", "\\''", "$$", "--", "/*", "\"", "\n", "é", ";"]),
            );
            text.push_str(SECRET);
        }
        text + random.pick(&["'", "\\'", "'''", "'\n'more'"])
    }

    fn setting(&mut self, random: &mut Random) {
        let text = random.pick(&[
            "SET app.token TO #",
            "set local x = #, #",
            "SET x =#; SELECT ponies",
            "SET SESSION x TO \"#\"",
            "SET TIME ZONE #",
            "ALTER SYSTEM SET x = #.#",
            "ALTER ROLE u IN DATABASE d SET x TO a, #",
            "ALTER ROLE u PASSWORD #",
            "ALTER ROLE u PASSWORD 'a'#'",
            "CREATE USER u WITH PASSWORD \"#\" LOGIN",
            "ALTER USER u WITH ENCRYPTED PASSWORD = #-# LOGIN",
            "CREATE USER u IDENTIFIED BY #",
            "CREATE USER MAPPING FOR u SERVER s OPTIONS (user '#', password '#')",
            "ALTER SERVER s OPTIONS (SET password #)",
            "CREATE FUNCTION f() RETURNS int SET x TO # AS $$ # $$",
        ]);
        self.push(&text.replace('#', SECRET));
    }

    fn copy(&mut self, random: &mut Random) {
        self.push(random.pick(&[
            "COPY ponies FROM STDIN",
            "copy t (a) from stdin with (format csv)",
        ]));
        self.push(";");
        self.push(random.pick(&["\n", " ", "\n1\t", "\n/*x*/"]));
        self.push(SECRET);
        self.push(random.pick(&["\t", "'", " ", "\n\\.\n;"]));
        self.push(SECRET);
    }
}

/// The content of a string in which a backslash escapes.
fn escaped(random: &mut Random) -> String {
    let mut text = String::new();
    for _ in 0..random.below(4) + 1 {
        text.push_str(random.pick(&[
            "\\'", "''", "\\\\", "\\\\\\'", "\\x41", "\\zz", "$$", "--", "é",
        ]));
        text.push_str(SECRET);
    }
    text + random.pick(&["", "''", "\\\\"])
}

/// Checks that no part of the secret is in the result, and that the result keeps all promises.
fn check(raw: &[u8], cut: bool, what: &str) -> String {
    let normalized = normalize(raw, cut);
    let text = normalized.text;
    let show = || format!("{what}\n{}\n{text}", String::from_utf8_lossy(raw));
    for secret in [SECRET, SECRET_NUMBER] {
        for piece in secret.as_bytes().windows(4) {
            let leaks = text.as_bytes().windows(4).any(|window| window == piece);
            assert!(!leaks, "a leak: {}", show());
        }
    }
    promises(&text, normalized.cut, &show);
    text
}

fn promises(text: &str, cut: bool, show: &dyn Fn() -> String) {
    assert!(text.len() <= MAX_QUERY_TEXT, "too long: {}", show());
    assert!(
        !text.chars().any(char::is_control),
        "control characters: {}",
        show()
    );
    assert!(!cut || text.ends_with('…'), "not marked: {}", show());
    let again = normalize(text.as_bytes(), false).text;
    assert_eq!(again, text, "not the same again: {}", show());
}

/// Secrets in every kind of literal and comment, in whole statements and in statements truncated at every
/// byte, with either value of the setting.
#[test]
fn secrets_stay_secret() {
    let seed = number_from("FLAMESTORM_FUZZ_SEED", 1);
    let end = Instant::now() + Duration::from_secs(number_from("FLAMESTORM_FUZZ_SECONDS", 2));
    let (mut tried, mut whole) = (0u64, 0);
    while Instant::now() < end {
        let mut random = Random(seed.wrapping_add(tried).wrapping_mul(0x5851_f42d_4c95_7f2d) | 1);
        random.below(2);
        let made = Made::new(&mut random);
        let what = format!("seed {seed}, try {tried}");
        let text = check(made.text.as_bytes(), false, &what);
        // Words outside of literals are not hidden, unless a backslash makes the end of a literal
        // uncertain, or CREATE or ALTER make SET the beginning of a setting.
        let may_hide = ["\\", "CREATE", "ALTER"];
        let is_certain =
            !text.ends_with('…') && !may_hide.iter().any(|what| made.text.contains(what));
        if is_certain {
            whole += 1;
            for word in made.visible {
                assert!(
                    text.contains(word),
                    "{what}: {word} is missing\n{}\n{text}",
                    made.text
                );
            }
        }
        for length in 0..made.text.len() {
            check(&made.text.as_bytes()[..length], true, &what);
        }
        tried += 1;
    }
    println!("{tried} texts, {whole} of them shown whole");
    assert!(tried > 100 && whole > tried / 10, "{whole} of {tried}");
}

/// Random bytes, and SQL with damaged bytes, cause no panic, and the result keeps all promises.
#[test]
fn damaged_texts() {
    const PIECES: &[&str] = &[
        "'",
        "\"",
        "$",
        "$$",
        "$a$",
        "\\",
        "/*",
        "*/",
        "--",
        "\n",
        "\r",
        " ",
        "\0",
        "\u{b}",
        "E'",
        "U&'",
        "U&\"",
        "x'",
        "(",
        ")",
        "[",
        "]",
        ",",
        ";",
        ".",
        ":",
        "::",
        "?",
        "…",
        ", …",
        "-",
        "+",
        "=",
        "@",
        "1",
        "1.",
        "e5",
        "a",
        "IN",
        "IN (",
        "VALUES",
        "VALUES (",
        "ARRAY[",
        "SELECT ",
        "SET ",
        "TO ",
        "é",
        "\u{80}",
        "\u{202e}",
        "ESCAPE ",
        "ESCAPE '\\' ",
        "COPY ",
        "FROM STDIN",
        "PASSWORD ",
        "CREATE USER ",
        "NULL",
        "$1",
        "{",
    ];
    let seed = number_from("FLAMESTORM_FUZZ_SEED", 1);
    let end = Instant::now() + Duration::from_secs(number_from("FLAMESTORM_FUZZ_SECONDS", 2));
    let mut tried = 0u64;
    while Instant::now() < end {
        let mut random = Random(seed.wrapping_add(tried).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let length = if random.below(20) == 0 { 3_000 } else { 40 };
        let mut raw = Vec::new();
        for _ in 0..random.below(length) {
            match random.below(30) {
                0 => raw.push(random.below(256) as u8),
                _ => raw.extend(random.pick(PIECES).as_bytes()),
            }
        }
        let what = format!("seed {seed}, try {tried}");
        let show = || format!("{what}: {:?}", String::from_utf8_lossy(&raw));
        let normalized = normalize(&raw, random.below(2) == 0);
        promises(&normalized.text, normalized.cut, &show);
        let full = verbatim(&raw, false);
        assert!(full.text.len() <= MAX_QUERY_TEXT && !full.text.chars().any(char::is_control));
        traceparent(&raw);
        traceparent_in_name(&raw);
        title(&raw);
        title(&[b"postgres: ", raw.as_slice()].concat());
        tried += 1;
    }
    println!("{tried} texts");
    assert!(tried > 100);
}

/// The CPU time of this thread, which does not depend on other work of the machine.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// A megabyte of text takes time in proportion to its length, also of texts that would cost a careless
/// reader the square of it.
#[test]
fn linear_in_the_text() {
    let nested = "a IN (1, ".repeat(30_000);
    let pieces = [
        "'",
        "''",
        "'a' ",
        "'a'\n",
        "'a\\' ",
        "\\",
        "$a$ ",
        "$a",
        "$a$$b$",
        "$",
        "/*",
        "*/",
        "/**/",
        "--\n",
        "\"",
        "\"a\" ",
        "(",
        "((1),",
        "IN (",
        "IN ((1,2),",
        "ARRAY[[1],",
        "VALUES (1),(",
        "(1),",
        "1,",
        "a,",
        "-",
        "+ -",
        "?",
        "…",
        "U&",
        "E'",
        "1e",
        "a.b",
        ";",
        "SET a=b;",
        "COPY FROM STDIN;",
        "ESCAPE '\\' ",
        "é",
        "\n",
        "/*traceparent='00-",
        "%30",
        &nested,
    ];
    for piece in pieces {
        for start in [
            "",
            "SELECT '\\n' ",
            "a IN (1, ",
            "VALUES (1), ",
            "/*traceparent='",
        ] {
            let raw = format!("{start}{}", piece.repeat((1 << 20) / piece.len()));
            let begin = cpu_time();
            let normalized = normalize(raw.as_bytes(), false);
            traceparent(raw.as_bytes());
            let took = cpu_time() - begin;
            assert!(took < Duration::from_secs(1), "{took:?} for {start}{piece}");
            assert!(normalized.text.len() <= MAX_QUERY_TEXT);
        }
    }
}

/// The store of texts contains no more of a secret than the texts themselves.
#[test]
fn stored_texts() {
    let mut texts = Texts::new(TextMode::Normalized);
    let mut random = Random(7);
    for i in 0..20_000 {
        let made = Made::new(&mut random);
        let query = texts.insert(1, i % 3 * i, made.text.as_bytes(), false);
        assert!((query.0 as usize) < texts.queries().len());
    }
    assert!(texts.get(QueryRef::OTHER).text.starts_with('['));
    let all = format!("{texts:?}");
    for piece in SECRET.as_bytes().windows(4) {
        assert!(!all.contains(str::from_utf8(piece).unwrap()));
    }
}
