//! Finds what must not be shown of a query: literals, comments, and any other text in a place where a
//! literal belongs.

use super::lex::{Backslash, Kind, Lexer, Token};

/// The tokens of a text, each with a flag that says whether it must be hidden.
///
/// Besides literals and comments, these are hidden:
/// - the value in `SET name TO value` and `SET name = value`, also within ALTER and CREATE, up to the end
///   of the statement;
/// - what follows PASSWORD in CREATE and ALTER of a role, user, group or server, and what follows
///   IDENTIFIED: PostgreSQL accepts only a string there, but the text is visible before that is checked;
/// - what follows `COPY … FROM STDIN;`, because a dump that was sent as a query has its data there.
pub(super) struct Private<'a> {
    text: &'a [u8],
    lexer: Lexer<'a>,
    statement: Statement,
    /// Whether the previous statement read data from the client (`COPY … FROM STDIN`), which may follow in
    /// the text.
    data: bool,
}

/// What is known about the statement so far.
#[derive(Default)]
struct Statement {
    verb: Option<Verb>,
    /// Whether the statement concerns an object that has a password.
    account: bool,
    /// COPY: FROM has been seen.
    from: bool,
    /// COPY: FROM STDIN has been seen.
    stdin: bool,
    setting: Setting,
    hiding: Hiding,
    words: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verb {
    Set,
    Alter,
    Create,
    Copy,
    Other,
}

/// How far the name of a setting has been read.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Setting {
    #[default]
    No,
    Name,
    /// After `SET TIME`, where ZONE may follow.
    Time,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Hiding {
    #[default]
    Nothing,
    /// Everything is hidden until the statement ends.
    All,
    /// If a literal comes next, only that is hidden; otherwise everything is hidden until the statement
    /// ends.
    AllButLiteral,
    /// The state after that literal, with the offset of its end. A token that directly follows it may be
    /// the rest of a password that contains a quote.
    Behind(usize),
}

impl<'a> Private<'a> {
    pub(super) fn new(text: &'a [u8], backslash: Backslash) -> Self {
        Private {
            text,
            lexer: Lexer::new(text, backslash),
            statement: Statement::default(),
            data: false,
        }
    }

    /// One token for the whole text from `token` on, because that text is not certain to be SQL, whatever
    /// it looks like.
    fn rest(&mut self, token: Token) -> Token {
        self.lexer = Lexer::new(&[], Backslash::Plain);
        Token {
            kind: Kind::Rest,
            end: self.text.len(),
            open: true,
            ..token
        }
    }

    /// Whether `token` is in a place where the text is private. It is neither a comment nor `;`.
    fn is_secret(&mut self, token: &Token) -> bool {
        let statement = &mut self.statement;
        let text = &self.text[token.start..token.end];
        match statement.hiding {
            Hiding::Nothing => {}
            Hiding::All => return true,
            Hiding::AllButLiteral if text == b"=" => return false,
            Hiding::AllButLiteral => {
                statement.hiding = match token.kind {
                    Kind::Literal => Hiding::Behind(token.end),
                    _ => Hiding::All,
                };
                return true;
            }
            Hiding::Behind(end) => {
                // A normalised text has no spaces around these tokens, so a space before them makes no
                // difference.
                let adjoins = end == token.start || matches!(text, b"." | b"::");
                if adjoins && !matches!(text, b")" | b",") {
                    statement.hiding = Hiding::All;
                    return true;
                }
                statement.hiding = Hiding::Nothing;
            }
        }
        match token.kind {
            Kind::Word => statement.word(text),
            Kind::Operator if text.starts_with(b"=") && statement.setting != Setting::No => {
                statement.hiding = Hiding::All;
            }
            // Every command begins with a keyword, so a statement that does not is none of those with
            // private values.
            _ if statement.verb.is_none() => statement.verb = Some(Verb::Other),
            Kind::Quoted => statement.words += 1,
            _ if text == b"." => {}
            _ => statement.setting = Setting::No,
        }
        false
    }
}

impl Statement {
    fn word(&mut self, word: &[u8]) {
        let is = |keyword: &str| word.eq_ignore_ascii_case(keyword.as_bytes());
        self.words += 1;
        let Some(verb) = self.verb else {
            let verb = match () {
                () if is("SET") => Verb::Set,
                () if is("ALTER") => Verb::Alter,
                () if is("CREATE") => Verb::Create,
                () if is("COPY") => Verb::Copy,
                () => Verb::Other,
            };
            self.verb = Some(verb);
            if verb == Verb::Set {
                self.setting = Setting::Name;
            }
            return;
        };
        match verb {
            Verb::Other => {}
            Verb::Copy if is("FROM") => self.from = true,
            Verb::Copy => {
                self.stdin |= self.from && is("STDIN");
                self.from = false;
            }
            Verb::Set | Verb::Alter | Verb::Create => {
                let is_account = ["ROLE", "USER", "GROUP", "SERVER"].into_iter().any(is);
                self.account |= self.words == 2 && is_account;
                self.setting = match self.setting {
                    Setting::Time if is("ZONE") => {
                        self.hiding = Hiding::All;
                        Setting::No
                    }
                    Setting::No if !is("SET") => Setting::No,
                    Setting::Name if is("TIME") => Setting::Time,
                    _ => Setting::Name,
                };
                if is("TO") && self.setting != Setting::No || is("IDENTIFIED") {
                    self.hiding = Hiding::All;
                } else if is("PASSWORD") && self.account {
                    self.hiding = Hiding::AllButLiteral;
                }
            }
        }
    }
}

impl Iterator for Private<'_> {
    type Item = (Token, bool);

    fn next(&mut self) -> Option<(Token, bool)> {
        let mut token = self.lexer.next()?;
        let hidden = match token.kind {
            Kind::Comment => true,
            _ if self.data => {
                token = self.rest(token);
                true
            }
            Kind::Punct if &self.text[token.start..token.end] == b";" => {
                self.data = self.statement.stdin;
                self.statement = Statement::default();
                false
            }
            _ => self.is_secret(&token) || matches!(token.kind, Kind::Literal | Kind::Rest),
        };
        Some((token, hidden))
    }
}

/// The tokens to show, as they are with `standard_conforming_strings` on. Every token that must be hidden
/// is a [`Kind::Literal`], and closed comments are left out. At the first token to show that would have to
/// be hidden with the setting *off*, the rest of the text becomes one [`Kind::Rest`].
pub(super) struct Hidden<'a> {
    tokens: Private<'a>,
    /// The reading with the setting off, and the token that was last read from it. `None` if the text has
    /// no backslash, because both readings are then equal.
    other: Option<(Private<'a>, Option<(Token, bool)>)>,
}

impl<'a> Hidden<'a> {
    pub(super) fn new(text: &'a [u8]) -> Self {
        Hidden {
            tokens: Private::new(text, Backslash::Plain),
            other: text.contains(&b'\\').then(|| {
                let mut other = Private::new(text, Backslash::Escapes);
                let first = other.next();
                (other, first)
            }),
        }
    }

    /// Whether any byte of the token is hidden in the other reading.
    fn is_hidden_in_other(&mut self, token: &Token) -> bool {
        let Some((rest, current)) = &mut self.other else {
            return false;
        };
        while let Some((other, hidden)) = current
            && other.start < token.end
        {
            if *hidden && other.end > token.start {
                return true;
            }
            if other.end > token.end {
                break;
            }
            *current = rest.next();
        }
        false
    }
}

/// A token to show.
pub(super) struct Shown {
    pub token: Token,
    /// Whether the token is hidden although it is not a literal. Several such tokens in a row are shown as
    /// one `?`.
    pub secret: bool,
}

impl Iterator for Hidden<'_> {
    type Item = Shown;

    fn next(&mut self) -> Option<Shown> {
        let (mut token, hidden) = self
            .tokens
            .find(|(token, _)| token.kind != Kind::Comment || token.open)?;
        if !hidden && self.is_hidden_in_other(&token) {
            token = self.tokens.rest(token);
        }
        let secret = (hidden && token.kind != Kind::Literal) || token.kind == Kind::Rest;
        if hidden && !matches!(token.kind, Kind::Rest | Kind::Comment) {
            token.kind = Kind::Literal;
        }
        Some(Shown { token, secret })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text, with its hidden parts in angle brackets.
    fn marked(text: &str) -> String {
        let mut out = String::new();
        for Shown { token, .. } in Hidden::new(text.as_bytes()) {
            let piece = &text[token.start..token.end];
            match token.kind {
                Kind::Literal | Kind::Rest => out.push_str(&format!("<{piece}> ")),
                _ => out.push_str(&format!("{piece} ")),
            }
        }
        out.trim_end().replace("> <", " ")
    }

    #[test]
    fn values_without_quotes() {
        for (text, expected) in [
            (
                "SET a.b TO c, \"d\"; SELECT e",
                "SET a . b TO <c , \"d\"> ; SELECT e",
            ),
            ("set local a = b-c", "set local a = <b - c>"),
            ("SET TIME ZONE x", "SET TIME ZONE <x>"),
            ("SET ROLE x", "SET ROLE x"),
            ("ALTER SYSTEM SET a = b", "ALTER SYSTEM SET a = <b>"),
            (
                "ALTER ROLE r IN DATABASE d SET a TO b",
                "ALTER ROLE r IN DATABASE d SET a TO <b>",
            ),
            ("UPDATE t SET a = b", "UPDATE t SET a = b"),
            (
                "ALTER TABLE t ALTER c SET NOT NULL",
                "ALTER TABLE t ALTER c SET NOT NULL",
            ),
            (
                "ALTER USER u PASSWORD a!b VALID",
                "ALTER USER u PASSWORD <a ! b VALID>",
            ),
            (
                "ALTER USER u PASSWORD 'a' VALID",
                "ALTER USER u PASSWORD <'a'> VALID",
            ),
            (
                "ALTER USER u PASSWORD 'a'b c",
                "ALTER USER u PASSWORD <'a' b c>",
            ),
            (
                "CREATE USER u WITH PASSWORD = a",
                "CREATE USER u WITH PASSWORD = <a>",
            ),
            (
                "CREATE USER u IDENTIFIED BY a",
                "CREATE USER u IDENTIFIED <BY a>",
            ),
            (
                "CREATE TABLE user (password text)",
                "CREATE TABLE user ( password text )",
            ),
            (
                "CREATE USER MAPPING FOR u SERVER s OPTIONS (password 'a', b 'c')",
                "CREATE USER MAPPING FOR u SERVER s OPTIONS ( password <'a'> , b <'c'> )",
            ),
            ("COPY t FROM STDIN; a b", "COPY t FROM STDIN ; <a b>"),
            (
                "COPY t FROM stdin (FORMAT csv);",
                "COPY t FROM stdin ( FORMAT csv ) ;",
            ),
            ("COPY t TO STDOUT; SELECT a", "COPY t TO STDOUT ; SELECT a"),
        ] {
            assert_eq!(marked(text), expected);
        }
    }

    /// A token is shown if it is not part of a literal in either reading of the backslash, up to where the
    /// readings differ.
    #[test]
    fn both_readings() {
        for (text, expected) in [
            ("SELECT 'a\\', b, 'c'", "SELECT <'a\\' , b, 'c'>"),
            ("SELECT 'a\\n', b, '\\\\'", "SELECT <'a\\n'> , b , <'\\\\'>"),
            ("SELECT '\\' \"x' 12 \" b", "SELECT <'\\' \"x' 12 \" b>"),
            ("SELECT '\\' /* ' b */ c ' d", "SELECT <'\\'> c <' d>"),
            (
                "a LIKE $1 ESCAPE '\\' AND b = 'c'",
                "a LIKE $1 ESCAPE <'\\'> AND b = <'c'>",
            ),
        ] {
            assert_eq!(marked(text), expected);
        }
    }
}
