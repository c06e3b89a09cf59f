//! The trace that a query belongs to, as its client states it.

use super::lex::{Backslash, Kind, Lexer};

/// The span in which a query was made.
///
/// <https://www.w3.org/TR/trace-context/#traceparent-header>
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Traceparent {
    /// The id of the trace, never all zero.
    pub trace_id: [u8; 16],
    /// The id of the calling span, never all zero.
    pub span_id: [u8; 8],
}

/// The length of a traceparent, in bytes: `00-`, trace id, `-`, span id, `-`, flags.
const TRACEPARENT: usize = 55;

/// The trace context in a comment of a query, as sqlcommenter writes it:
/// `/*key='value',traceparent='00-…-…-01'*/`, URL-encoded, before or after the whole query.
///
/// `raw` is as for [`super::normalize`]. A comment in the middle does not count, nor does a comment that is
/// part of a literal in either reading of a backslash. In a text that was cut, the value must be complete.
///
/// <https://google.github.io/sqlcommenter/spec/>
pub fn traceparent(raw: &[u8]) -> Option<Traceparent> {
    let text = raw.split(|&byte| byte == 0).next()?;
    let found = in_comments(text, Backslash::Plain)?;
    let is_certain = !text.contains(&b'\\') || in_comments(text, Backslash::Escapes) == Some(found);
    is_certain.then_some(found)
}

/// The first context in the comments before the query, or else in the comments after it.
fn in_comments(text: &[u8], backslash: Backslash) -> Option<Traceparent> {
    let mut found = None;
    let mut begun = false;
    for token in Lexer::new(text, backslash) {
        let content = &text[token.start..token.end];
        match token.kind {
            Kind::Comment => found = found.or_else(|| in_comment(content)),
            Kind::Punct if content == b";" => {}
            _ if !begun && found.is_some() => return found,
            _ => (begun, found) = (true, None),
        }
    }
    found
}

fn in_comment(comment: &[u8]) -> Option<Traceparent> {
    let content = comment.strip_prefix(b"/*")?;
    content
        .split(|&byte| byte == b',')
        .find_map(|pair| parse(&decoded(value(pair)?)))
}

/// The value of `traceparent='value'`.
fn value(pair: &[u8]) -> Option<&[u8]> {
    let (key, value) = pair.split_at(pair.iter().position(|&byte| byte == b'=')?);
    if key.trim_ascii() != b"traceparent" {
        return None;
    }
    let value = value[1..].trim_ascii_start().strip_prefix(b"'")?;
    Some(&value[..value.iter().position(|&byte| byte == b'\'')?])
}

/// Decodes the URL encoding, as far as a traceparent needs it.
fn decoded(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = value;
    while let [first, tail @ ..] = rest
        && out.len() <= TRACEPARENT
    {
        rest = tail;
        match (first, tail) {
            (b'%', [high, low, tail @ ..]) if let Some(byte) = hex_byte(*high, *low) => {
                out.push(byte);
                rest = tail;
            }
            _ => out.push(*first),
        }
    }
    out
}

/// The trace context in an `application_name`, for clients that pass it there: a traceparent (55 of the 63
/// bytes that PostgreSQL keeps), alone or separated from other letters and digits.
pub fn traceparent_in_name(application_name: &[u8]) -> Option<Traceparent> {
    let name = application_name.split(|&byte| byte == 0).next()?;
    let is_apart =
        |byte: Option<&u8>| byte.is_none_or(|b| !b.is_ascii_alphanumeric() && *b != b'-');
    name.windows(TRACEPARENT)
        .enumerate()
        .filter(|(at, _)| is_apart(at.checked_sub(1).and_then(|before| name.get(before))))
        .filter(|(at, _)| is_apart(name.get(at + TRACEPARENT)))
        .find_map(|(_, window)| parse(window))
}

/// Parses a traceparent of version 00, strictly: lower case, and no id that is all zero.
fn parse(text: &[u8]) -> Option<Traceparent> {
    let (text, flags) = text.strip_prefix(b"00-")?.split_at_checked(49)?;
    let (trace_id, span_id) = (text.get(..32)?, text.get(33..49)?);
    let flags = flags.strip_prefix(b"-")?;
    let context = Traceparent {
        trace_id: hex(trace_id)?,
        span_id: hex(span_id)?,
    };
    let is_valid = text[32] == b'-'
        && hex::<1>(flags).is_some()
        && context.trace_id != [0; 16]
        && context.span_id != [0; 8];
    is_valid.then_some(context)
}

/// `N` bytes in lower-case hexadecimal.
fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let is_lower = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    if text.len() != 2 * N || !text.iter().all(is_lower) {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = hex_byte(pair[0], pair[1])?;
    }
    Some(bytes)
}

fn hex_byte(high: u8, low: u8) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    Some((digit(high)? << 4 | digit(low)?) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALUE: &str = "00-5bd66ef5095369c7b0d1f8f4bd33716a-c532cb4098ac3dd2-01";
    const CONTEXT: Traceparent = Traceparent {
        trace_id: 0x5bd6_6ef5_0953_69c7_b0d1_f8f4_bd33_716a_u128.to_be_bytes(),
        span_id: 0xc532_cb40_98ac_3dd2_u64.to_be_bytes(),
    };

    #[test]
    fn comments() {
        for query in [
            "SELECT 1 /*traceparent='VALUE'*/",
            "SELECT 1 /*traceparent='VALUE'*/ ; ",
            "/*traceparent='VALUE'*/ SELECT 1 /* b */",
            "/* a */ /* traceparent = 'VALUE' */ SELECT 1; SELECT 2",
            "SELECT 1 /*action='%2Fparam*d',tracestate='congo%3Dt61',traceparent='VALUE',x='y'*/",
            "SELECT 1 /*traceparent='%30%30-5bd66ef5095369c7b0d1f8f4bd33716a%2Dc532cb4098ac3dd2-01'*/",
            "SELECT 'a\\n' /*traceparent='VALUE'*/",
            // Cut, but after the value.
            "SELECT 1 /*traceparent='VALUE',trace",
        ] {
            let query = query.replace("VALUE", VALUE);
            assert_eq!(traceparent(query.as_bytes()), Some(CONTEXT), "{query}");
        }
        for query in [
            "SELECT '/*traceparent=''VALUE''*/'",
            "SELECT $$ /*traceparent='VALUE'*/ $$",
            "SELECT 1 /*traceparent='VALUE'*/ + 2",
            "SELECT 'a\\' /*traceparent='VALUE'*/",
            "SELECT 1 -- traceparent='VALUE'",
            "SELECT 1 /*xtraceparent='VALUE'*/",
            "SELECT 1 /*traceparent='VALUE",
            "SELECT 1 /*traceparent=VALUE*/",
            "SELECT 1\0/*traceparent='VALUE'*/",
        ] {
            let query = query.replace("VALUE", VALUE);
            assert_eq!(traceparent(query.as_bytes()), None, "{query}");
        }
    }

    #[test]
    fn strictly_by_the_letter() {
        let bad = [
            VALUE.replacen("00", "01", 1),
            VALUE.replacen("00", "ff", 1),
            VALUE.to_uppercase(),
            VALUE.replace("5bd66ef5095369c7b0d1f8f4bd33716a", &"0".repeat(32)),
            VALUE.replace("c532cb4098ac3dd2", &"0".repeat(16)),
            VALUE.replace("6a-c5", "6a_c5"),
            VALUE.replace("-01", "-0g"),
            VALUE.replace("-01", "-1"),
            format!("{VALUE}-x"),
            format!("{VALUE}0"),
        ];
        for value in bad {
            let query = format!("SELECT 1 /*traceparent='{value}'*/");
            assert_eq!(traceparent(query.as_bytes()), None, "{value}");
            assert_eq!(traceparent_in_name(value.as_bytes()), None, "{value}");
        }
    }

    #[test]
    fn names() {
        for name in [
            VALUE.to_owned(),
            format!("shop {VALUE}"),
            format!("a:{VALUE};b"),
        ] {
            assert_eq!(
                traceparent_in_name(name.as_bytes()),
                Some(CONTEXT),
                "{name}"
            );
        }
        for name in ["psql", "", &format!("a{VALUE}"), &VALUE[1..]] {
            assert_eq!(traceparent_in_name(name.as_bytes()), None, "{name}");
        }
    }
}
