//! What must not be shown: literals, comments, and what stands where a literal should.

use super::lex::{Backslash, Kind, Lexer, Token};

/// The tokens of a text, each with whether it must be hidden.
///
/// Beyond literals that is:
/// - the value in `SET name TO value` and `SET name = value`, also within ALTER and CREATE: to the
///   end of the statement;
/// - what follows PASSWORD in CREATE and ALTER of a role, user, group or server, and IDENTIFIED:
///   PostgreSQL takes a string there only, but the text is seen before that is checked;
/// - what follows `COPY … FROM STDIN;`, where a dump that was sent as a query has its data.
pub(super) struct Private<'a> {
    text: &'a [u8],
    lexer: Lexer<'a>,
    statement: Statement,
    /// The statement before took data from the client, which may follow.
    data: bool,
}

/// What is known of the statement so far.
#[derive(Default)]
struct Statement {
    verb: Option<Verb>,
    /// Whether it is about an object that has a password.
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
    /// SET TIME.
    Time,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Hiding {
    #[default]
    Nothing,
    /// Until the statement ends.
    All,
    /// The next token, whatever it is.
    Next,
    /// What begins where the last token ended.
    Adjoining(usize),
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

    /// Whether `token`, neither comment nor `;`, stands where something private does.
    fn is_secret(&mut self, token: &Token) -> bool {
        let statement = &mut self.statement;
        let text = &self.text[token.start..token.end];
        match statement.hiding {
            Hiding::Nothing => {}
            Hiding::All => return true,
            Hiding::Next if text == b"=" => return false,
            Hiding::Next => {
                statement.hiding = Hiding::Adjoining(token.end);
                return true;
            }
            Hiding::Adjoining(end) if end == token.start && !matches!(text, b")" | b",") => {
                statement.hiding = Hiding::Adjoining(token.end);
                return true;
            }
            Hiding::Adjoining(_) => statement.hiding = Hiding::Nothing,
        }
        match token.kind {
            Kind::Word => statement.word(text),
            Kind::Operator if text.starts_with(b"=") && statement.setting != Setting::No => {
                statement.hiding = Hiding::All;
            }
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
                    self.hiding = Hiding::Next;
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
                // Whatever it looks like: not SQL.
                self.lexer = Lexer::new(&[], Backslash::Plain);
                token = Token {
                    kind: Kind::Rest,
                    end: self.text.len(),
                    open: true,
                    ..token
                };
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

/// The tokens to show, as they are with `standard_conforming_strings` on, in which every token that
/// must be hidden with the setting on *or off* is a [`Kind::Literal`] or a [`Kind::Rest`].
/// Comments are left out.
pub(super) struct Hidden<'a> {
    tokens: Private<'a>,
    /// The other reading, if there is a backslash at all; and its token that was read last.
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

    /// Whether any byte of the token is hidden in the other reading, and whether that is cut short.
    fn in_other(&mut self, token: &Token) -> (bool, bool) {
        let Some((rest, current)) = &mut self.other else {
            return (false, false);
        };
        let mut found = (false, false);
        while let Some((other, hidden)) = current {
            if other.start >= token.end {
                break;
            }
            if other.end > token.start && *hidden {
                found = (true, found.1 | other.open);
            }
            if other.end > token.end {
                break;
            }
            *current = rest.next();
        }
        found
    }
}

/// A token to show.
pub(super) struct Shown {
    pub token: Token,
    /// Hidden though it is no literal: one mark stands for all such in a row.
    pub secret: bool,
}

impl Iterator for Hidden<'_> {
    type Item = Shown;

    fn next(&mut self) -> Option<Shown> {
        loop {
            let (mut token, hidden) = self.tokens.next()?;
            if token.kind == Kind::Comment && !token.open {
                continue;
            }
            let (in_other, open) = self.in_other(&token);
            token.open |= open;
            let secret = (hidden || in_other) && token.kind != Kind::Literal;
            if secret && !matches!(token.kind, Kind::Rest | Kind::Comment) {
                token.kind = Kind::Literal;
            }
            return Some(Shown { token, secret });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text with what is hidden in brackets.
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
                "ALTER USER u PASSWORD <a ! b> VALID",
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
                "CREATE USER MAPPING FOR u SERVER s OPTIONS (password a)",
                "CREATE USER MAPPING FOR u SERVER s OPTIONS ( password <a> )",
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

    /// Hidden is what is a literal in either reading of the backslash.
    #[test]
    fn both_readings() {
        for (text, expected) in [
            ("SELECT 'a\\', b, 'c'", "SELECT <'a\\' , b , 'c'>"),
            ("SELECT 'a\\n', b", "SELECT <'a\\n'> , b"),
            (
                "SELECT '\\' \"x' 123456 \" b",
                "SELECT <'\\' \"x' 123456 \" b>",
            ),
            (
                "SELECT '\\' /* ' b */ c ' d",
                "SELECT <'\\' /* ' b */ c ' d>",
            ),
            (
                "a LIKE $1 ESCAPE '\\' AND b = 'c'",
                "a LIKE $1 ESCAPE <'\\'> AND b = <'c'>",
            ),
        ] {
            assert_eq!(marked(text), expected);
        }
    }
}
