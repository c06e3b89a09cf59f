//! What may be searched for: one word, or any of several.

use serde::Deserialize;

use crate::problem::Problem;

/// A word shorter than this finds half of the catalogue.
const MIN_WORD_CHARS: usize = 2;

/// Longer than any description's sentence: nobody searches for that.
const MAX_WORD_CHARS: usize = 100;

/// The most words in one search. Each costs as much as a search for it alone.
const MAX_WORDS: usize = 8;

/// The most products in one answer: a page of them.
const MAX_LIMIT: i64 = 100;

/// The query of every search: `?q=word` or `?any=word,word,…`, and `&limit=…`.
#[derive(Debug, Deserialize)]
pub struct SearchQuery {
    q: Option<String>,
    any: Option<String>,
    #[serde(default = "default_limit")]
    limit: i64,
}

fn default_limit() -> i64 {
    20
}

/// A checked search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Search {
    /// What to search for: a product that has any of these will do. At least one.
    pub words: Vec<String>,
    /// The most products to find.
    pub limit: i64,
}

impl SearchQuery {
    /// What is searched for, or what is wrong with it.
    pub fn check(&self) -> Result<Search, Problem> {
        let words = match (self.q.as_deref(), self.any.as_deref()) {
            (Some(_), Some(_)) => {
                let detail = "give either q (one word) or any (several), not both";
                return Err(Problem::bad_request("q_and_any", detail));
            }
            (_, Some(any)) => any.split(',').map(check_word).collect::<Result<_, _>>()?,
            (q, None) => vec![check_word(q.unwrap_or_default())?],
        };
        if words.len() > MAX_WORDS {
            let detail = format!("any must have at most {MAX_WORDS} words");
            return Err(Problem::bad_request("too_many_words", detail));
        }
        check_limit(self.limit)?;
        Ok(Search {
            words,
            limit: self.limit,
        })
    }
}

impl Search {
    /// The words as patterns of LIKE, for `ILIKE ANY`.
    pub fn patterns(&self) -> Vec<String> {
        let patterns = self.words.iter();
        patterns
            .map(|word| format!("%{}%", escape_like(word)))
            .collect()
    }
}

/// How many products may be asked for.
pub fn check_limit(limit: i64) -> Result<(), Problem> {
    if (1..=MAX_LIMIT).contains(&limit) {
        return Ok(());
    }
    let detail = format!("limit must lie between 1 and {MAX_LIMIT}");
    Err(Problem::bad_request("limit_out_of_range", detail))
}

fn check_word(word: &str) -> Result<String, Problem> {
    let word = word.trim();
    if word.is_empty() {
        let detail = "say what to search for: ?q=word, or ?any=word,word for any of several";
        return Err(Problem::bad_request("q_missing", detail));
    }
    if word.contains('\0') {
        let detail = "a word must not contain a NUL character";
        return Err(Problem::bad_request("q_invalid", detail));
    }
    let chars = word.chars().count();
    if chars < MIN_WORD_CHARS {
        let detail = format!("a word must have at least {MIN_WORD_CHARS} characters");
        return Err(Problem::bad_request("q_too_short", detail));
    }
    if chars > MAX_WORD_CHARS {
        let detail = format!("a word must have at most {MAX_WORD_CHARS} characters");
        return Err(Problem::bad_request("q_too_long", detail));
    }
    Ok(word.to_owned())
}

/// Takes the meaning from LIKE's own characters, so that `100%` finds what it says.
pub fn escape_like(word: &str) -> String {
    let mut escaped = String::with_capacity(word.len() + 4);
    for character in word.chars() {
        if matches!(character, '\\' | '%' | '_') {
            escaped.push('\\');
        }
        escaped.push(character);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    /// LIKE's own characters are searched for like any other.
    #[test]
    fn like_characters_lose_their_meaning() {
        assert_eq!(escape_like("100% wool_mix\\"), "100\\% wool\\_mix\\\\");
        assert_eq!(escape_like("wireless"), "wireless");
    }

    fn check(q: Option<&str>, any: Option<&str>, limit: i64) -> Result<Vec<String>, &'static str> {
        let query = SearchQuery {
            q: q.map(str::to_owned),
            any: any.map(str::to_owned),
            limit,
        };
        let checked = query.check();
        checked.map(|s| s.words).map_err(|problem| problem.code)
    }

    /// Characters are counted, not bytes.
    #[test]
    fn a_word_is_checked() {
        let word = |word: &str| Ok(vec![word.to_owned()]);
        assert_eq!(check(Some(" zither "), None, 20), word("zither"));
        assert_eq!(check(Some("äö"), None, 20), word("äö"));
        assert_eq!(check(Some("one, two"), None, 20), word("one, two"));
        assert_eq!(check(None, None, 20), Err("q_missing"));
        assert_eq!(check(Some("  "), None, 20), Err("q_missing"));
        assert_eq!(check(Some("ä"), None, 20), Err("q_too_short"));
        assert_eq!(check(Some(&"x".repeat(101)), None, 20), Err("q_too_long"));
        assert_eq!(check(Some("a\0b"), None, 20), Err("q_invalid"));
        assert_eq!(check(Some("zither"), None, 0), Err("limit_out_of_range"));
        assert_eq!(check(Some("zither"), None, 101), Err("limit_out_of_range"));
    }

    /// Several words are checked one by one, and bounded.
    #[test]
    fn several_words_are_checked() {
        let words = ["zither", "yurt"].map(str::to_owned).to_vec();
        assert_eq!(check(None, Some("zither, yurt"), 20), Ok(words));
        assert_eq!(check(None, Some("zither,,yurt"), 20), Err("q_missing"));
        assert_eq!(check(None, Some("zither,y"), 20), Err("q_too_short"));
        assert_eq!(check(Some("a"), Some("b"), 20), Err("q_and_any"));
        let many = ["word"; MAX_WORDS + 1].join(",");
        assert_eq!(check(None, Some(&many), 20), Err("too_many_words"));
    }
}
