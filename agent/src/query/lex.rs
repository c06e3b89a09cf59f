//! Splits SQL text into tokens, by the rules of PostgreSQL's scanner (versions 14 to 18).
//!
//! Follows `src/backend/parser/scan.l`
//! (<https://github.com/postgres/postgres/blob/REL_18_STABLE/src/backend/parser/scan.l>), on bytes:
//! every byte beyond ASCII may be part of an identifier, so invalid UTF-8 needs no special case. Where the
//! versions differ, or where the text is not SQL that anybody could have meant, the token is
//! [`Kind::Rest`], because nothing after that point can be classified reliably. Runs in linear time and
//! allocates no memory.

/// The kind of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A keyword or an identifier without quotes.
    Word,
    /// A quoted identifier, with its quotes.
    Quoted,
    /// A string, a bit string, a dollar-quoted string or a number; also a lone `?`, which stands
    /// for a literal in a text that was normalised before.
    Literal,
    /// A parameter: `$1`.
    Param,
    /// An operator; also `:`, `::` and `:=`.
    Operator,
    /// One of `( ) [ ] , ; .`.
    Punct,
    /// Either kind of comment.
    Comment,
    /// Everything from here to the end of the text, because the scanner cannot classify it.
    Rest,
}

/// A token, and its byte range in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub kind: Kind,
    pub start: usize,
    pub end: usize,
    /// Whether the text ends before the token is closed (an unterminated string, for example).
    pub open: bool,
}

/// The meaning of a backslash in a string without a prefix. It depends on the server's setting
/// `standard_conforming_strings`, which a client may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backslash {
    /// An ordinary character (`on`, the default).
    Plain,
    /// An escape for the next character (`off`).
    Escapes,
}

/// An iterator over the tokens of a text, comments included.
#[derive(Clone)]
pub(super) struct Lexer<'a> {
    text: &'a [u8],
    at: usize,
    backslash: Backslash,
    /// Whether the last token other than a comment was the word ESCAPE.
    after_escape: bool,
}

/// Whether a byte may start an identifier. Every byte of a character beyond ASCII may.
fn is_start(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || !byte.is_ascii()
}

/// Whether a byte may continue an identifier.
fn is_part(byte: u8) -> bool {
    is_start(byte) || byte.is_ascii_digit() || byte == b'$'
}

/// Whether a byte is white space. `\v` is white space only from version 16 on, so it does not count here.
pub(super) fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | b'\x0c')
}

fn is_operator(byte: u8) -> bool {
    b"~!@#^&|`?+-*/%<>=".contains(&byte)
}

impl<'a> Lexer<'a> {
    pub(super) fn new(text: &'a [u8], backslash: Backslash) -> Self {
        Lexer {
            text,
            at: 0,
            backslash,
            after_escape: false,
        }
    }

    fn byte(&self, at: usize) -> u8 {
        // The callers cut the text at its first zero byte, and no token begins with one, so 0 can stand for
        // the end of the text.
        self.text.get(at).copied().unwrap_or(0)
    }

    fn starts_with(&self, at: usize, what: &[u8]) -> bool {
        self.text[at.min(self.text.len())..].starts_with(what)
    }

    /// The first position from `at` on whose byte does not satisfy `fits`, or the end of the text.
    fn run(&self, at: usize, fits: impl Fn(u8) -> bool) -> usize {
        let length = self.text[at..].iter().position(|&byte| !fits(byte));
        length.map_or(self.text.len(), |length| at + length)
    }

    fn token(&self, kind: Kind, end: usize) -> Token {
        Token {
            kind,
            start: self.at,
            end,
            open: false,
        }
    }

    /// A token that ends at `end`. Without an `end` the token is open and extends to the end of the text.
    fn closed(&self, kind: Kind, end: Option<usize>) -> Token {
        Token {
            open: end.is_none(),
            ..self.token(kind, end.unwrap_or(self.text.len()))
        }
    }

    fn rest(&self) -> Token {
        self.closed(Kind::Rest, None)
    }

    fn read(&self) -> Token {
        let at = self.at;
        let (first, second) = (self.byte(at), self.byte(at + 1));
        match first {
            b'\'' => self.string(at, self.backslash == Backslash::Escapes, true),
            b'e' | b'E' if second == b'\'' => self.string(at + 1, true, true),
            b'b' | b'B' | b'x' | b'X' if second == b'\'' => self.string(at + 1, false, false),
            b'n' | b'N' if second == b'\'' => {
                self.string(at + 1, self.backslash == Backslash::Escapes, true)
            }
            b'u' | b'U' if second == b'&' && self.byte(at + 2) == b'\'' => {
                self.string(at + 2, self.backslash == Backslash::Escapes, true)
            }
            b'u' | b'U' if second == b'&' && self.byte(at + 2) == b'"' => self.quoted(at + 2),
            b'"' => self.quoted(at),
            b'$' => self.dollar(),
            b'-' if second == b'-' => {
                self.token(Kind::Comment, self.run(at, |b| !matches!(b, b'\n' | b'\r')))
            }
            b'/' if second == b'*' => self.closed(Kind::Comment, self.comment_end()),
            b'0'..=b'9' => self.number(),
            b'.' if second.is_ascii_digit() => self.number(),
            b':' => self.token(
                Kind::Operator,
                at + 1 + usize::from(matches!(second, b':' | b'=')),
            ),
            b'(' | b')' | b'[' | b']' | b',' | b';' | b'.' => self.token(Kind::Punct, at + 1),
            _ if is_operator(first) => self.operator(),
            _ if is_start(first) => self.word(),
            // Control characters, backslashes and braces begin no SQL token.
            _ => self.rest(),
        }
    }

    /// Reads a string whose opening quote is at `quote`. A string that is followed by white space with a
    /// line break and another quote continues there, by the rules of its first part. `escapes`: a backslash
    /// escapes the next character. `doubled`: two quotes in a row stand for one.
    fn string(&self, quote: usize, escapes: bool, doubled: bool) -> Token {
        if self.after_escape && self.is_escape_clause(quote) {
            return self.token(Kind::Literal, quote + 3);
        }
        let mut at = quote + 1;
        while at < self.text.len() {
            match self.byte(at) {
                b'\\' if escapes => at += 2,
                b'\'' if doubled && self.byte(at + 1) == b'\'' => at += 2,
                b'\'' => match self.continuation(at + 1) {
                    Some(quote) => at = quote + 1,
                    None => return self.token(Kind::Literal, at + 1),
                },
                _ => at += 1,
            }
        }
        self.closed(Kind::Literal, None)
    }

    /// Whether the string at `quote` is the one in `ESCAPE '\'`, which object mappers add to every LIKE. It
    /// is a complete literal whatever a backslash means: if the backslash escaped the quote, the string
    /// would be longer than the one character that PostgreSQL accepts there.
    fn is_escape_clause(&self, quote: usize) -> bool {
        let follows = self.byte(quote + 3);
        self.starts_with(quote, b"'\\'")
            && (matches!(follows, 0 | b')' | b',' | b';') || is_space(follows))
    }

    /// The position of the quote with which a string continues. `at` is just after the quote that would end
    /// it. `None` if the string ends there.
    fn continuation(&self, mut at: usize) -> Option<usize> {
        let mut line_break = false;
        loop {
            match self.byte(at) {
                b'\n' | b'\r' => line_break = true,
                byte if is_space(byte) => {}
                b'-' if self.byte(at + 1) == b'-' => {
                    at = self.run(at, |b| !matches!(b, b'\n' | b'\r'));
                    continue;
                }
                b'\'' if line_break => return Some(at),
                _ => return None,
            }
            at += 1;
        }
    }

    /// Reads a quoted identifier whose opening quote is at `quote`.
    fn quoted(&self, quote: usize) -> Token {
        let mut at = quote + 1;
        while at < self.text.len() {
            match (self.byte(at), self.byte(at + 1)) {
                (b'"', b'"') => at += 2,
                (b'"', _) => return self.token(Kind::Quoted, at + 1),
                _ => at += 1,
            }
        }
        self.closed(Kind::Quoted, None)
    }

    /// Reads `$1`, `$$…$$` or `$tag$…$tag$`. Any other `$` is an error in PostgreSQL. It may be a quote
    /// with a typo, or the beginning of a quote that was cut, so the rest of the text is [`Kind::Rest`].
    fn dollar(&self) -> Token {
        let at = self.at + 1;
        if self.byte(at).is_ascii_digit() {
            let end = self.run(at, |byte| byte.is_ascii_digit());
            return self.followed_by_junk(Kind::Param, end);
        }
        let tag = match is_start(self.byte(at)) {
            true => self.run(at, |byte| is_part(byte) && byte != b'$'),
            false => at,
        };
        if self.byte(tag) != b'$' {
            return self.rest();
        }
        let delimiter = &self.text[self.at..=tag];
        let mut from = tag + 1;
        while let Some(offset) = self.text[from..].iter().position(|&byte| byte == b'$') {
            if self.starts_with(from + offset, delimiter) {
                return self.token(Kind::Literal, from + offset + delimiter.len());
            }
            from += offset + 1;
        }
        self.closed(Kind::Literal, None)
    }

    /// The end of the block comment that begins here. Block comments nest.
    fn comment_end(&self) -> Option<usize> {
        let mut at = self.at + 2;
        let mut depth = 1;
        while at < self.text.len() {
            match (self.byte(at), self.byte(at + 1)) {
                (b'/', b'*') => (depth, at) = (depth + 1, at + 2),
                (b'*', b'/') => (depth, at) = (depth - 1, at + 2),
                _ => at += 1,
            }
            if depth == 0 {
                return Some(at);
            }
        }
        None
    }

    /// Reads `1`, `1_000`, `.5` or `1.5e-3`. `0x1f`, `0o17` and `0b1` are read as a zero together with the
    /// letters and digits that follow it.
    fn number(&self) -> Token {
        let digits = |at| self.run(at, |byte| byte.is_ascii_digit() || byte == b'_');
        let mut end = digits(self.at);
        if self.byte(end) == b'.' && self.byte(end + 1) != b'.' {
            end = digits(end + 1);
        }
        if matches!(self.byte(end), b'e' | b'E') {
            let sign = usize::from(matches!(self.byte(end + 1), b'+' | b'-'));
            if self.byte(end + 1 + sign).is_ascii_digit() {
                end = digits(end + 1 + sign);
            }
        }
        self.followed_by_junk(Kind::Literal, end)
    }

    /// A number or parameter, together with any letters that follow it directly. Up to version 14 these
    /// letters are a word or the prefix of a string, from version 15 on they are an error, and the versions
    /// differ in where the number ends. The letters are therefore hidden with the number, and if a quote
    /// follows them, the rest of the text is [`Kind::Rest`].
    fn followed_by_junk(&self, kind: Kind, end: usize) -> Token {
        if !is_start(self.byte(end)) {
            return self.token(kind, end);
        }
        let junk = self.run(end, is_part);
        if self.byte(junk) == b'\'' || has_dollars(&self.text[end..junk]) {
            return self.rest();
        }
        self.token(Kind::Literal, junk)
    }

    fn word(&self) -> Token {
        let end = self.run(self.at, is_part);
        if has_dollars(&self.text[self.at..end]) {
            return self.rest();
        }
        self.token(Kind::Word, end)
    }

    /// Reads an operator. It ends where a comment begins, and it does not end in `+` or `-` unless it
    /// contains a character that no operator of the SQL standard has.
    fn operator(&self) -> Token {
        let whole = &self.text[self.at..self.run(self.at, is_operator)];
        let comment = whole
            .windows(2)
            .position(|two| two == b"--" || two == b"/*");
        let whole = &whole[..comment.unwrap_or(whole.len())];
        let mut length = whole.len();
        while length > 1
            && matches!(whole[length - 1], b'+' | b'-')
            && !whole[..length - 1]
                .iter()
                .any(|b| b"~!@#^&|`?%".contains(b))
        {
            length -= 1;
        }
        match whole {
            b"?" => self.token(Kind::Literal, self.at + 1),
            _ => self.token(Kind::Operator, self.at + length),
        }
    }
}

/// Whether a word contains two dollar signs. To PostgreSQL they are part of the name, but the author of
/// `AS$$…$$` may have meant a literal.
fn has_dollars(word: &[u8]) -> bool {
    word.iter().filter(|&&byte| byte == b'$').count() > 1
}

impl Iterator for Lexer<'_> {
    type Item = Token;

    fn next(&mut self) -> Option<Token> {
        self.at = self.run(self.at, is_space);
        if self.at == self.text.len() {
            return None;
        }
        let token = self.read();
        self.at = token.end;
        if token.kind != Kind::Comment {
            self.after_escape = token.kind == Kind::Word
                && self.text[token.start..token.end].eq_ignore_ascii_case(b"escape");
        }
        Some(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokens as text: the first letter of the kind, `!` if the token is open, and the token's own
    /// text.
    fn tokens(text: &str, backslash: Backslash) -> Vec<String> {
        Lexer::new(text.as_bytes(), backslash)
            .map(|token| {
                let kind = format!("{:?}", token.kind);
                let open = if token.open { "!" } else { "" };
                format!("{}{open} {}", &kind[..1], &text[token.start..token.end])
            })
            .collect()
    }

    /// Tokens end where PostgreSQL's scanner ends them, also by its lesser known rules.
    #[test]
    fn follows_postgresql() {
        let cases: &[(&str, &[&str])] = &[
            ("a$1 b", &["W a$1", "W b"]),
            ("'it''s' 'x'", &["L 'it''s'", "L 'x'"]),
            // A string continues on the next line, also after a comment, by the rules of its first part.
            ("'a' -- c\n 'b'", &["L 'a' -- c\n 'b'"]),
            ("E'a'\n'b\\'c'd", &["L E'a'\n'b\\'c'", "W d"]),
            ("X'1''2'", &["L X'1'", "L '2'"]),
            ("U&'\\zz' U&\"a\"", &["L U&'\\zz'", "Q U&\"a\""]),
            ("\"a\"\"b\"c", &["Q \"a\"\"b\"", "W c"]),
            ("$a$ $b$ $a $a$ $1", &["L $a$ $b$ $a $a$", "P $1"]),
            ("$$ $ $", &["L! $$ $ $"]),
            ("/* /* */ */ b", &["C /* /* */ */", "W b"]),
            ("a <@-- c\nb", &["W a", "O <@", "C -- c", "W b"]),
            ("a @/* c */b", &["W a", "O @", "C /* c */", "W b"]),
            ("a=-1", &["W a", "O =", "O -", "L 1"]),
            ("a@-1", &["W a", "O @-", "L 1"]),
            ("1_000.5e-3+.5", &["L 1_000.5e-3", "O +", "L .5"]),
            ("0x1f 1e 5a", &["L 0x1f", "L 1e", "L 5a"]),
            ("a::b:=c", &["W a", "O ::", "W b", "O :=", "W c"]),
            ("1E'a' b", &["R! 1E'a' b"]),
            ("a {b", &["W a", "R! {b"]),
            ("as$$b c$$", &["R! as$$b c$$"]),
            ("$a b$", &["R! $a b$"]),
        ];
        for (text, expected) in cases {
            assert_eq!(tokens(text, Backslash::Plain), *expected, "{text}");
        }
    }

    /// Which tokens depend on `standard_conforming_strings`, and which do not.
    #[test]
    fn backslashes() {
        for text in ["'a\\' b", "n'a\\' b", "U&'a\\' b"] {
            assert_eq!(tokens(text, Backslash::Plain)[1], "W b");
            assert_eq!(tokens(text, Backslash::Escapes), [format!("L! {text}")]);
        }
        for backslash in [Backslash::Plain, Backslash::Escapes] {
            assert_eq!(tokens("E'a\\' b", backslash), ["L! E'a\\' b"]);
            assert_eq!(tokens("x'\\' b", backslash), ["L x'\\'", "W b"]);
            assert_eq!(tokens("escape '\\' b", backslash)[1..], ["L '\\'", "W b"]);
            assert_eq!(tokens("E'\\", backslash), ["L! E'\\"]);
        }
    }
}
