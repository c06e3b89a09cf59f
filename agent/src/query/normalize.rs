//! The text of a query without its literals.

use std::borrow::Cow;
use std::ops::RangeInclusive;

use super::MAX_QUERY_TEXT;
use super::lex::{Kind, Token, is_space};
use super::private::{Hidden, Shown};

/// Marks where a text was cut, and stands for the elements that are left out of a list.
const ELLIPSIS: &str = "…";

/// The text of a query in the form in which it is shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Normalized {
    /// The text, at most [`MAX_QUERY_TEXT`] bytes, without control characters.
    pub text: String,
    /// Whether the end is missing. The text then ends with `…`.
    pub cut: bool,
}

/// The text of a query with every literal replaced by `?`.
///
/// `raw` is the text that PostgreSQL reports as a backend's activity. It is used up to the first zero byte,
/// and may have been cut at any byte. `cut` says that the caller knows that it was cut (its length is
/// `track_activity_query_size` less one). A text that ends within a literal, a comment or a character is
/// recognised as cut in any case.
///
/// - Literals are numbers and strings of every kind (`''`, `E''`, `U&''`, `B''`, `X''`, `N''`,
///   `$tag$…$tag$`). `$1` and quoted identifiers are kept, comments are removed, and white space is made
///   uniform.
/// - Lists in `IN (…)` and `ARRAY[…]`, and the rows of VALUES, are reduced to their first element and `…`,
///   as far as the other elements have the same form. `;` is kept only between statements.
/// - The values of `SET name TO value` (also within ALTER and CREATE), what follows PASSWORD without
///   quotes, and what follows `COPY … FROM STDIN;` are hidden as well.
///
/// No byte of a literal or comment is in the result, whatever the server's `standard_conforming_strings`
/// is. A text with backslashes is read both ways. At the first token that one reading would show and the
/// other takes for part of a literal or comment (after `'a\'`, for example), the rest of the text becomes
/// one `?…`. The exception is `ESCAPE '\'`, which is known to be complete, because PostgreSQL refuses any
/// other meaning of it.
/// The rest of the text is also hidden where the scanner cannot continue: at a stray `$`, `\` or control
/// character; at a number directly followed by a string, which versions read differently; and at `AS$$…`,
/// which PostgreSQL takes for an identifier. Text in double quotes is an identifier and is kept, even where
/// a string was meant.
///
/// Normalising a result again does not change it. Time is linear in the length of `raw`. Memory is little
/// more than the result, plus a copy of `raw` if that is not valid UTF-8.
pub fn normalize(raw: &[u8], cut: bool) -> Normalized {
    let (text, cut) = trim(raw, cut);
    let text = valid(text);
    let mut shaper = Shaper {
        text: text.as_bytes(),
        pieces: Vec::new(),
        lists: Vec::new(),
        after_secret: false,
    };
    let cut = shaper.read() | cut;
    shaper.write(cut)
}

/// The text up to the first zero byte, without an incomplete character or the `…` of an earlier result at
/// its end; and whether the text is cut.
fn trim(raw: &[u8], cut: bool) -> (&[u8], bool) {
    let text = raw.split(|&byte| byte == 0).next().unwrap_or_default();
    let tail = (1..=text.len().min(3))
        .map(|length| &text[text.len() - length..])
        .find(|tail| tail[0] >= 0xc0)
        .filter(|tail| str::from_utf8(tail).is_err_and(|error| error.error_len().is_none()));
    if let Some(tail) = tail {
        return (&text[..text.len() - tail.len()], true);
    }
    match text.strip_suffix(ELLIPSIS.as_bytes()) {
        // After `, ` the `…` belongs to a list.
        Some(short) if !short.ends_with(b", ") => (short, true),
        _ => (text, cut),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Word,
    Quoted,
    Literal,
    Param,
    Operator,
    /// `-` or `+` as the sign of the operand that follows.
    Sign,
    Punct(u8),
    Ellipsis,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    form: Form,
    start: usize,
    end: usize,
    /// Whether white space or a comment precedes it.
    gap: bool,
}

/// A list, or anything else in brackets, that has not ended yet.
struct List {
    /// Whether these are the rows of VALUES, which end at the first token that is neither a row nor a
    /// comma.
    is_values: bool,
    /// Whether elements of equal form are left out. False for brackets that hold no list.
    folds: bool,
    /// The range of the first element in `pieces`, once that element has ended.
    first: Option<(usize, usize)>,
    /// Where the current element begins in `pieces`.
    current: usize,
    folded: bool,
}

struct Shaper<'a> {
    text: &'a [u8],
    pieces: Vec<Piece>,
    lists: Vec<List>,
    /// Whether the last piece is a literal that stands for any number of hidden tokens.
    after_secret: bool,
}

/// Keywords after which `-` is a sign, and after which `(` is separated by a space.
const BEFORE_OPERAND: [&str; 28] = [
    "ALL",
    "AND",
    "ANY",
    "AS",
    "BETWEEN",
    "BY",
    "CASE",
    "DEFAULT",
    "DISTINCT",
    "ELSE",
    "FETCH",
    "FROM",
    "HAVING",
    "ILIKE",
    "IN",
    "IS",
    "LIKE",
    "LIMIT",
    "NOT",
    "OFFSET",
    "ON",
    "OR",
    "RETURNING",
    "SELECT",
    "THEN",
    "VALUES",
    "WHEN",
    "WHERE",
];

/// Words that can take the place of a literal.
const CONSTANTS: [&str; 4] = ["NULL", "DEFAULT", "TRUE", "FALSE"];

impl<'a> Shaper<'a> {
    fn bytes(&self, piece: &Piece) -> &'a [u8] {
        &self.text[piece.start..piece.end]
    }

    fn is_one_of(&self, piece: &Piece, words: &[&str]) -> bool {
        let is = |word: &&str| self.bytes(piece).eq_ignore_ascii_case(word.as_bytes());
        piece.form == Form::Word && words.iter().any(is)
    }

    /// Reads the text, and returns whether it was cut.
    fn read(&mut self) -> bool {
        let mut cut = false;
        let mut last = 0;
        for Shown { token, secret } in Hidden::new(self.text) {
            cut |= token.open;
            let Some(form) = self.form(&token) else {
                break;
            };
            let piece = Piece {
                form,
                start: token.start,
                end: token.end,
                gap: token.start > last,
            };
            last = token.end;
            self.take(piece, secret);
            // Each piece takes at least one byte of the result, so more pieces would not fit.
            if self.pieces.len() > MAX_QUERY_TEXT {
                cut = true;
                break;
            }
        }
        self.end_statement();
        while self.ends_with(Form::Punct(b';')) {
            self.pieces.pop();
        }
        cut
    }

    /// The form of a token; `None` for a comment that does not end.
    fn form(&self, token: &Token) -> Option<Form> {
        let text = &self.text[token.start..token.end];
        Some(match token.kind {
            Kind::Comment => return None,
            Kind::Literal | Kind::Rest => Form::Literal,
            // After a comma, `…` comes from a list in an earlier result. Anywhere else it is treated like a
            // literal.
            Kind::Word if is_ellipsis(text) => match self.ends_with(Form::Punct(b',')) {
                true => Form::Ellipsis,
                false => Form::Literal,
            },
            Kind::Word => Form::Word,
            Kind::Quoted => Form::Quoted,
            Kind::Param => Form::Param,
            Kind::Operator => Form::Operator,
            Kind::Punct => Form::Punct(text[0]),
        })
    }

    fn ends_with(&self, form: Form) -> bool {
        self.pieces.last().is_some_and(|last| last.form == form)
    }

    fn take(&mut self, piece: Piece, secret: bool) {
        let after_secret = std::mem::replace(&mut self.after_secret, secret);
        let is_row = matches!(piece.form, Form::Punct(b'(' | b',') | Form::Ellipsis);
        if !is_row && self.lists.last().is_some_and(|list| list.is_values) {
            self.end_list();
        }
        let last = self.pieces.last().copied();
        match piece.form {
            Form::Punct(b';') => {
                self.end_statement();
                if last.is_some_and(|last| last.form != piece.form) {
                    self.pieces.push(piece);
                }
            }
            Form::Punct(b'(' | b'[') => {
                self.pieces.push(piece);
                self.begin_list(false, self.is_list(last, piece.form));
            }
            Form::Punct(b')' | b']') => {
                self.end_list();
                self.pieces.push(piece);
            }
            Form::Punct(b',') => {
                self.end_element();
                self.pieces.push(piece);
                let next = self.pieces.len();
                if let Some(list) = self.lists.last_mut() {
                    list.current = next;
                }
            }
            Form::Literal => self.literal(piece, after_secret || secret),
            Form::Operator if self.is_sign(&piece) => {
                self.pieces.push(Piece {
                    form: Form::Sign,
                    ..piece
                });
            }
            _ => {
                self.pieces.push(piece);
                if self.is_one_of(&piece, &["VALUES"]) {
                    self.begin_list(true, true);
                }
            }
        }
    }

    fn literal(&mut self, piece: Piece, merges: bool) {
        if merges && self.ends_with(Form::Literal) {
            return;
        }
        while self.ends_with(Form::Sign) {
            self.pieces.pop();
        }
        self.pieces.push(piece);
    }

    /// Whether a bracket after `last` opens a list whose elements are likely to have the same form.
    fn is_list(&self, last: Option<Piece>, bracket: Form) -> bool {
        let Some(last) = last else { return false };
        match bracket {
            Form::Punct(b'(') => self.is_one_of(&last, &["IN"]),
            _ => {
                let within = self.lists.last().is_some_and(|list| list.folds);
                self.is_one_of(&last, &["ARRAY"])
                    || within && matches!(last.form, Form::Punct(b'[' | b','))
            }
        }
    }

    /// Whether a `-` or `+` after the pieces so far is a sign.
    fn is_sign(&self, piece: &Piece) -> bool {
        matches!(self.bytes(piece), b"-" | b"+")
            && self.pieces.last().is_none_or(|last| match last.form {
                Form::Operator | Form::Sign | Form::Punct(b'(' | b'[' | b',' | b';') => true,
                _ => self.is_one_of(last, &BEFORE_OPERAND),
            })
    }

    fn begin_list(&mut self, is_values: bool, folds: bool) {
        self.lists.push(List {
            is_values,
            folds,
            first: None,
            current: self.pieces.len(),
            folded: false,
        });
    }

    fn end_statement(&mut self) {
        while !self.lists.is_empty() {
            self.end_list();
        }
    }

    fn end_list(&mut self) {
        self.end_element();
        self.lists.pop();
    }

    /// Leaves out the current element if it has the same form as the first. The first element that is left
    /// out becomes `…`.
    ///
    /// Each comparison costs no more than its shorter side, and equal elements are removed afterwards, so
    /// all comparisons together take roughly linear time.
    fn end_element(&mut self) {
        let Some(list) = self.lists.last().filter(|list| list.folds) else {
            return;
        };
        let element = &self.pieces[list.current..];
        let equal = match list.first {
            _ if element.is_empty() => return,
            Some((start, end)) => {
                let first = &self.pieces[start..end];
                element[0].form == Form::Ellipsis && element.len() == 1
                    || first.len() == element.len()
                        && first.iter().zip(element).all(|(a, b)| self.is_alike(a, b))
            }
            None => false,
        };
        let (current, folded, last) = (list.current, list.folded, element[element.len() - 1]);
        if equal && folded {
            self.pieces.truncate(current - 1);
        } else if equal {
            self.pieces.truncate(current);
            self.pieces.push(Piece {
                form: Form::Ellipsis,
                ..last
            });
        }
        let end = self.pieces.len();
        if let Some(list) = self.lists.last_mut() {
            list.folded |= equal;
            list.first.get_or_insert((current, end));
        }
    }

    fn is_alike(&self, a: &Piece, b: &Piece) -> bool {
        let is_constant = |piece: &Piece| {
            matches!(piece.form, Form::Literal | Form::Param) || self.is_one_of(piece, &CONSTANTS)
        };
        a.form == b.form && (a.form == Form::Ellipsis || is_same(self.bytes(a), self.bytes(b)))
            || is_constant(a) && is_constant(b)
    }

    /// Writes the pieces as text.
    fn write(&self, mut cut: bool) -> Normalized {
        let mut text = String::new();
        let mut last: Option<&Piece> = None;
        for piece in &self.pieces {
            let space = last.is_some_and(|last| self.is_apart(last, piece));
            let shown = match piece.form {
                Form::Literal => "?".into(),
                Form::Ellipsis => ELLIPSIS.into(),
                _ => printable(&String::from_utf8_lossy(self.bytes(piece))),
            };
            if text.len() + usize::from(space) + shown.len() + ELLIPSIS.len() > MAX_QUERY_TEXT {
                cut = true;
                break;
            }
            if space {
                text.push(' ');
            }
            text.push_str(&shown);
            last = Some(piece);
        }
        if cut {
            // White space at the end can only come from a quoted identifier. It is removed, because a text
            // that ends in `, …` would be read as the end of a list.
            text.truncate(text.trim_ascii_end().len());
            text.push_str(ELLIPSIS);
        }
        Normalized { text, cut }
    }

    /// Whether a space separates two pieces: as SQL is usually written, and so that the result, when read
    /// again, has the same tokens.
    fn is_apart(&self, last: &Piece, piece: &Piece) -> bool {
        let colons = |piece: &Piece| {
            (piece.form == Form::Operator)
                .then(|| self.bytes(piece))
                .filter(|bytes| matches!(*bytes, b"::" | b":"))
        };
        match (last.form, piece.form) {
            (_, Form::Punct(b',' | b';' | b')' | b']')) => false,
            (Form::Punct(b'(' | b'['), _) => false,
            (Form::Punct(b',' | b';'), _) => true,
            (Form::Punct(b'.'), _) | (_, Form::Punct(b'.')) => false,
            (Form::Sign, Form::Operator | Form::Sign) => true,
            (Form::Sign, _) => false,
            (Form::Operator, Form::Operator) => true,
            _ if colons(last).is_some() || colons(piece).is_some() => {
                let both = colons(last) == Some(b"::") || colons(piece) == Some(b"::");
                piece.gap && !both
            }
            (Form::Operator, _) | (_, Form::Operator | Form::Sign) => true,
            (_, Form::Punct(_)) => piece.gap || self.is_one_of(last, &BEFORE_OPERAND),
            _ => true,
        }
    }
}

/// Whether a word consists only of `…`.
fn is_ellipsis(word: &[u8]) -> bool {
    let mut parts = word.chunks(ELLIPSIS.len());
    parts.all(|part| part == ELLIPSIS.as_bytes())
}

/// Whether two tokens are equal, apart from case and from characters that are shown as spaces.
fn is_same(a: &[u8], b: &[u8]) -> bool {
    let shown = |byte: &u8| match byte.is_ascii_control() {
        true => b' ',
        false => byte.to_ascii_lowercase(),
    };
    a.len() == b.len() && a.iter().map(shown).eq(b.iter().map(shown))
}

/// Replaces invalid UTF-8, and characters beyond ASCII that control the output or change the direction of
/// writing. All of these are parts of words, so the tokens stay the same.
fn valid(text: &[u8]) -> Cow<'_, str> {
    const BAD: [RangeInclusive<char>; 3] = [
        '\u{80}'..='\u{9f}',
        '\u{2028}'..='\u{202e}',
        '\u{2066}'..='\u{2069}',
    ];
    let is_bad = |c: char| BAD.iter().any(|range| range.contains(&c));
    let text = String::from_utf8_lossy(text);
    match text.contains(is_bad) {
        true => text.replace(is_bad, "\u{fffd}").into(),
        false => text,
    }
}

/// Replaces control characters by spaces. Within a token they occur only inside quotes.
fn printable(text: &str) -> String {
    text.replace(|c: char| c.is_ascii_control(), " ")
}

/// The text with its literals, for users who ask for it: up to the first zero byte, made valid UTF-8,
/// control characters replaced, at most [`MAX_QUERY_TEXT`] bytes. Ends with `…` when cut.
pub fn verbatim(raw: &[u8], cut: bool) -> Normalized {
    let (text, mut cut) = trim(raw, cut);
    // No replacement is shorter than what it replaces, so bytes beyond this length would not fit.
    let mut whole = printable(&valid(&text[..text.len().min(MAX_QUERY_TEXT)]));
    let room = MAX_QUERY_TEXT - ELLIPSIS.len();
    if text.len() > room || whole.len() > room {
        cut = true;
        whole.truncate(whole.floor_char_boundary(room));
    }
    whole.truncate(
        whole
            .trim_end_matches(|c: char| c.is_ascii() && is_space(c as u8))
            .len(),
    );
    if cut {
        whole.push_str(ELLIPSIS);
    }
    Normalized { text: whole, cut }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(raw: &str) -> String {
        normalize(raw.as_bytes(), false).text
    }

    #[test]
    fn literals() {
        for (raw, expected) in [
            ("select * from t where a=1", "select * from t where a = ?"),
            (
                "SELECT -1, - 2, a-1, a - -.5, +1e5",
                "SELECT ?, ?, a - ?, a - ?, ?",
            ),
            ("SELECT 1_000, 0x1F, 1.5e-3, 5a", "SELECT ?, ?, ?, ?"),
            (
                "SELECT 'a' , E'\\'', U&'x' UESCAPE '!', B'1', x'f', N'n'",
                "SELECT ?, ?, ? UESCAPE ?, ?, ?, ?",
            ),
            ("SELECT 'a'\n  'b', $$c$$, $t$ $$ $t$", "SELECT ?, ?, ?"),
            ("SELECT $1::int, '1'::text", "SELECT $1::int, ?::text"),
            ("DO $$ BEGIN x; END $$", "DO ?"),
            (
                "EXPLAIN (ANALYZE, COSTS off) SELECT 1",
                "EXPLAIN (ANALYZE, COSTS off) SELECT ?",
            ),
            (
                "SELECT \"a b\".\"c\"\"d\" FROM \"1\"",
                "SELECT \"a b\".\"c\"\"d\" FROM \"1\"",
            ),
            (
                "SELECT data->>'key', d ? 'x', a[1:2]",
                "SELECT data ->> ?, d ? ?, a[?:?]",
            ),
            ("ALTER ROLE x PASSWORD 'y'", "ALTER ROLE x PASSWORD ?"),
            ("SET x TO secretword", "SET x TO ?"),
            ("SET x = a, b; SELECT c", "SET x = ?; SELECT c"),
            (
                "CREATE USER MAPPING FOR u SERVER s OPTIONS (password 'x')",
                "CREATE USER MAPPING FOR u SERVER s OPTIONS (password ?)",
            ),
            ("COPY t (a) FROM STDIN;\n1\tx", "COPY t (a) FROM STDIN; ?…"),
            (
                "SELECT interval '1 day', date'2020-01-01'",
                "SELECT interval ?, date ?",
            ),
        ] {
            assert_eq!(text(raw), expected, "{raw}");
        }
    }

    #[test]
    fn lists() {
        for (raw, expected) in [
            ("a IN (1)", "a IN (?)"),
            ("a in(1,2,3) and b", "a in (?, …) and b"),
            ("a IN ($1, $2, NULL, -5)", "a IN ($1, …)"),
            ("a IN ('x'::text, 'y'::text)", "a IN (?::text, …)"),
            ("a IN (1, 2, f(x), 3)", "a IN (?, …, f(x))"),
            ("(a, b) IN ((1, 2), (3, 4))", "(a, b) IN ((?, ?), …)"),
            ("ARRAY[1,2]", "ARRAY[?, …]"),
            ("ARRAY[[1,2],[3,4]]", "ARRAY[[?, …], …]"),
            (
                "INSERT INTO t (a, b) VALUES (1, 'x'), (2, 'y'), (DEFAULT, $1) ON CONFLICT DO NOTHING",
                "INSERT INTO t (a, b) VALUES (?, ?), … ON CONFLICT DO NOTHING",
            ),
            (
                "VALUES (1, now()), (2, now()), (3, 4)",
                "VALUES (?, now()), …, (?, ?)",
            ),
            (
                "SELECT * FROM (VALUES (1), (2)) v(x), t",
                "SELECT * FROM (VALUES (?), …) v(x), t",
            ),
            ("f(1, 2)", "f(?, ?)"),
        ] {
            assert_eq!(text(raw), expected, "{raw}");
        }
    }

    #[test]
    fn spaces_comments_statements() {
        for (raw, expected) in [
            ("  SELECT\n\t1 ;  ", "SELECT ?"),
            (
                "/* a */ SELECT /* b /* c */ d */ count( * ) -- e",
                "SELECT count(*)",
            ),
            ("BEGIN;;SELECT 1;COMMIT;", "BEGIN; SELECT ?; COMMIT"),
            ("a>=b AND c<>-d", "a >= b AND c <> -d"),
            ("SELECT t . *,a", "SELECT t.*, a"),
            ("", ""),
            (" ; ", ""),
        ] {
            assert_eq!(text(raw), expected, "{raw}");
        }
    }

    /// The rest of a text is hidden after anything that the scanner cannot read, and a cut text is marked
    /// as cut.
    #[test]
    fn cut_short() {
        for (raw, expected) in [
            ("SELECT 'unterminated; x", "SELECT ?…"),
            ("SELECT a /* unterminated", "SELECT a…"),
            ("SELECT \"unterm", "SELECT \"unterm…"),
            ("SELECT $tag", "SELECT ?…"),
            ("SELECT $tag$ x", "SELECT ?…"),
            ("SELECT a\\b c", "SELECT a ?…"),
            ("SELECT 'a\\' b, 'c'", "SELECT ?…"),
        ] {
            let normalized = normalize(raw.as_bytes(), false);
            assert_eq!(
                normalized,
                Normalized {
                    text: expected.into(),
                    cut: true
                },
                "{raw}"
            );
        }
        assert_eq!(
            normalize(b"SELECT a FROM tab", true).text,
            "SELECT a FROM tab…"
        );
        assert_eq!(normalize(b"SELECT \xc3", false).text, "SELECT…");
        assert_eq!(
            normalize(b"SELECT \xc3\xa9\0secret", false).text,
            "SELECT é"
        );
        assert_eq!(
            normalize(b"SELECT \"\xff\n\"", false).text,
            "SELECT \"\u{fffd} \""
        );
    }

    #[test]
    fn bounded() {
        let long = "a, ".repeat(10_000);
        let normalized = normalize(long.as_bytes(), false);
        assert!(normalized.cut && normalized.text.len() <= MAX_QUERY_TEXT);
        assert!(normalized.text.len() > MAX_QUERY_TEXT - 8);
        let list = format!("a IN (1{}) AND b", ", 1".repeat(100_000));
        assert_eq!(text(&list), "a IN (?, …) AND b");
        assert_eq!(text(&"x".repeat(5_000)), "…");
    }

    #[test]
    fn verbatim_is_bounded_and_printable() {
        assert_eq!(
            verbatim(b"SELECT 'a\n\xff' \0x", false).text,
            "SELECT 'a \u{fffd}'"
        );
        for raw in [
            "é".repeat(5_000),
            "a".repeat(5_000),
            "\u{1}".repeat(MAX_QUERY_TEXT),
        ] {
            let full = verbatim(raw.as_bytes(), false);
            assert!(full.cut && full.text.len() <= MAX_QUERY_TEXT);
        }
    }
}
