//! The query texts of a recording, each stored once.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use super::{Normalized, normalize, verbatim};
use crate::recent::Recent;

/// The maximum number of queries that are told apart at the same time. An application has hundreds of
/// queries. More come from a client that composes its SQL, and nobody reads such queries one by one.
pub const MAX_TEXTS: usize = 10_000;

/// The maximum number of query numbers that are assigned in a recording. Each takes at least one row of the
/// window ([`crate::profile::MAX_ROWS`]), and most rows are needed for other distinctions.
pub const MAX_NUMBERS: usize = 1 << 16;

/// The maximum number of bytes of text that are kept for all queries together.
pub const MAX_TEXT_BYTES: usize = 8 << 20;

/// The maximum number of raw texts that one half of [`Recent`] remembers, at 16 bytes each.
const MAX_RECENT: usize = 4096;

/// The text of [`QueryRef::OTHER`].
const OTHER: &str = "[other queries]";

/// The number of a query in a [`Texts`]. 0 is `[other queries]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueryRef(pub u32);

impl QueryRef {
    /// Stands for all queries for which there is no room.
    pub const OTHER: QueryRef = QueryRef(0);
}

/// A query that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    /// PostgreSQL's query id; 0 where it computed none.
    pub id: i64,
    /// The bits of the id; for a query without an id, a hash of the normalised text: 64-bit FNV-1a, which
    /// is the same on every machine and in every run. The hash does not protect against texts that were
    /// made to collide; within a [`Texts`] these are separate queries nevertheless.
    pub key: u64,
    /// The text, at most [`super::MAX_QUERY_TEXT`] bytes. With [`TextMode::Full`] it is the first of all
    /// texts that differ only in their literals.
    pub text: Arc<str>,
    /// Whether the end of the text is missing.
    pub cut: bool,
}

/// The form of a text that is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TextMode {
    /// The text without literals, see [`normalize`].
    #[default]
    Normalized,
    /// The text with its literals, see [`verbatim`]. Queries are still told apart without their literals.
    Full,
}

/// The queries of a recording.
///
/// When there is no room for another query, half of the queries are evicted at once, which needs no list in
/// order of use. The queries with the fewest samples are evicted, and among equals the least recently used.
/// A client that composes its SQL therefore evicts its own queries, and not a query that uses much CPU
/// time. Samples of an evicted query count as `[other queries]` from then on. If the query is seen again,
/// it gets a new number.
#[derive(Debug)]
pub struct Texts {
    mode: TextMode,
    queries: Vec<Query>,
    /// When and how often each query was used.
    uses: Vec<Use>,
    by_id: HashMap<(u64, i64), QueryRef>,
    /// By scope and normalised text.
    by_text: HashMap<(u64, Arc<str>), QueryRef>,
    /// Queries by the hash of their raw text.
    recent: Recent<u64, QueryRef>,
    /// Seeded at random, so that no client can construct texts with equal hashes.
    hasher: RandomState,
    told_apart: usize,
    bytes: usize,
    /// The number of uses of all queries so far. It serves as the clock of `Use::last`.
    now: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Use {
    last: u64,
    count: u64,
}

impl Texts {
    /// A store that holds only `[other queries]`.
    pub fn new(mode: TextMode) -> Self {
        let other = Query {
            id: 0,
            key: fnv1a(OTHER.as_bytes()),
            text: OTHER.into(),
            cut: false,
        };
        Texts {
            mode,
            queries: vec![other],
            uses: vec![Use::default()],
            by_id: HashMap::new(),
            by_text: HashMap::new(),
            recent: Recent::new(MAX_RECENT),
            hasher: RandomState::new(),
            told_apart: 0,
            bytes: 0,
            now: 0,
        }
    }

    /// The query with this id, or, if the id is 0, with this text. `raw` and `cut` are as for
    /// [`normalize`].
    ///
    /// The first text that is seen with an id is kept. `scope` says where ids have the same meaning. It is
    /// any number that differs by cluster and database, because two clusters may use the same id for
    /// different queries (ids are computed from the tables' OIDs). A server that computes ids has none yet
    /// while it parses a statement, so a text without an id belongs to the query whose id was seen, or is
    /// seen later, with that text in the same scope. A text that was seen a short time ago costs one hash.
    pub fn insert(&mut self, scope: u64, query_id: i64, raw: &[u8], cut: bool) -> QueryRef {
        let query = match query_id {
            0 => self.without_id(scope, raw, cut),
            id => match self.by_id.get(&(scope, id)) {
                Some(query) => *query,
                None => self.with_id(scope, id, raw, cut),
            },
        };
        self.now += 1;
        let used = &mut self.uses[query.0 as usize];
        used.last = self.now;
        used.count += 1;
        query
    }

    fn without_id(&mut self, scope: u64, raw: &[u8], cut: bool) -> QueryRef {
        let hash = self.hasher.hash_one((scope, raw, cut));
        if let Some(query) = self.recent.get(&hash) {
            return query;
        }
        let query = self.by_text(scope, raw, cut);
        self.recent.insert(hash, query);
        query
    }

    /// The query with an id that was not seen before.
    fn with_id(&mut self, scope: u64, id: i64, raw: &[u8], cut: bool) -> QueryRef {
        let (place, kept) = self.kept(scope, raw, cut);
        let key = id as u64;
        if let Some(known) = self.by_text.get(&place).copied() {
            let query = &mut self.queries[known.0 as usize];
            if query.id == 0 {
                (query.id, query.key) = (id, key);
                self.by_id.insert((scope, id), known);
                return known;
            }
        }
        let query = self.add(id, key, kept);
        if query != QueryRef::OTHER {
            self.by_id.insert((scope, id), query);
            self.by_text.entry(place).or_insert(query);
        }
        query
    }

    /// The query with this text and no id.
    fn by_text(&mut self, scope: u64, raw: &[u8], cut: bool) -> QueryRef {
        let (place, kept) = self.kept(scope, raw, cut);
        if let Some(query) = self.by_text.get(&place) {
            return *query;
        }
        let query = self.add(0, fnv1a(place.1.as_bytes()), kept);
        if query != QueryRef::OTHER {
            self.by_text.insert(place, query);
        }
        query
    }

    /// The key of a text, and the form of the text that is kept.
    fn kept(&self, scope: u64, raw: &[u8], cut: bool) -> ((u64, Arc<str>), (Arc<str>, bool)) {
        let normalized = normalize(raw, cut);
        let form: Arc<str> = normalized.text.into();
        let kept = match self.mode {
            TextMode::Normalized => (form.clone(), normalized.cut),
            TextMode::Full => {
                let Normalized { text, cut } = verbatim(raw, cut);
                (text.into(), cut)
            }
        };
        ((scope, form), kept)
    }

    fn add(&mut self, id: i64, key: u64, (text, cut): (Arc<str>, bool)) -> QueryRef {
        if self.queries.len() >= MAX_NUMBERS {
            return QueryRef::OTHER;
        }
        while self.told_apart >= MAX_TEXTS || self.bytes + text.len() > MAX_TEXT_BYTES {
            self.forget_half();
        }
        self.told_apart += 1;
        self.bytes += text.len();
        self.queries.push(Query { id, key, text, cut });
        self.uses.push(Use::default());
        QueryRef(self.queries.len() as u32 - 1)
    }

    /// Evicts the half of the queries that has the fewest samples: these become `[other queries]`.
    fn forget_half(&mut self) {
        let uses = &mut self.uses;
        let mut least: Vec<usize> = (1..uses.len()).filter(|n| uses[*n].count > 0).collect();
        least.sort_unstable_by_key(|n| (uses[*n].count, uses[*n].last));
        least.truncate(least.len().div_ceil(2));
        for n in &least {
            self.bytes -= self.queries[*n].text.len();
            self.queries[*n] = self.queries[0].clone();
            uses[0].count += std::mem::take(&mut uses[*n].count);
        }
        self.told_apart -= least.len();
        let is_known = |query: &QueryRef| uses[query.0 as usize].count > 0;
        self.by_id.retain(|_, query| is_known(query));
        self.by_text.retain(|_, query| is_known(query));
        self.recent = Recent::new(MAX_RECENT);
    }

    /// A query that [`Texts::insert`] of this store has returned; `[other queries]` if that query was
    /// evicted.
    pub fn get(&self, query: QueryRef) -> &Query {
        &self.queries[query.0 as usize]
    }

    /// All queries by their [`QueryRef`], `[other queries]` first.
    pub fn queries(&self) -> &[Query] {
        &self.queries
    }

    /// How many insertions count as `[other queries]` at present.
    pub fn overflow(&self) -> u64 {
        self.uses[0].count
    }
}

/// 64-bit FNV-1a, see <http://www.isthe.com/chongo/tech/comp/fnv/>.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The hash agrees with the published test vectors: a key in a file must keep its meaning in every
    /// version.
    #[test]
    fn keys_are_stable() {
        assert_eq!(fnv1a(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
        let mut texts = Texts::new(TextMode::Normalized);
        let query = texts.insert(1, 0, b"SELECT 'secret'", false);
        assert_eq!(texts.get(query).key, fnv1a(b"SELECT ?"));
        assert_eq!(texts.get(query).id, 0);
    }

    #[test]
    fn same_and_different() {
        let mut texts = Texts::new(TextMode::Normalized);
        let one = texts.insert(1, 0, b"SELECT 1", false);
        assert_eq!(texts.insert(1, 0, b"SELECT  2 /* x */", false), one);
        assert_ne!(texts.insert(1, 0, b"SELECT a", false), one);
        assert_ne!(texts.insert(2, 0, b"SELECT 1", false), one);
        let id = texts.insert(1, -7, b"SELECT 1, 2", false);
        assert_ne!(id, one);
        assert_eq!(texts.insert(1, -7, b"SELECT another", false), id);
        assert_ne!(texts.insert(2, -7, b"SELECT another", false), id);
        let query = texts.get(id);
        assert_eq!(
            (query.id, query.key, &*query.text),
            (-7, -7i64 as u64, "SELECT ?, ?")
        );
        assert_eq!(texts.queries().len(), 6);
        assert_eq!(texts.overflow(), 0);
    }

    /// A statement has no id yet while it is parsed, but it is the same query.
    #[test]
    fn ids_that_come_later() {
        let mut texts = Texts::new(TextMode::Normalized);
        let parsing = texts.insert(1, 0, b"SELECT a FROM t WHERE b = 1", false);
        assert_eq!(
            texts.insert(1, 7, b"SELECT a FROM t WHERE b = 2", false),
            parsing
        );
        assert_eq!((texts.get(parsing).id, texts.get(parsing).key), (7, 7));
        assert_eq!(
            texts.insert(1, 0, b"SELECT a FROM t WHERE b = 3", false),
            parsing
        );
        // The same text with another id (other tables), and with the first id in another database.
        let other = texts.insert(1, 8, b"SELECT a FROM t WHERE b = 2", false);
        assert_ne!(other, parsing);
        assert_ne!(
            texts.insert(2, 7, b"SELECT a FROM t WHERE b = 2", false),
            parsing
        );
        // A text that was seen with its id before it is seen without one.
        let known = texts.insert(1, 9, b"SELECT c", false);
        assert_eq!(texts.insert(1, 0, b"SELECT c", false), known);
        assert_eq!(texts.get(other).id, 8);
    }

    /// With full texts, queries are still told apart without their literals, and the first text is kept.
    #[test]
    fn full_texts() {
        let mut texts = Texts::new(TextMode::Full);
        let one = texts.insert(1, 0, b"SELECT 'a'", false);
        assert_eq!(texts.insert(1, 0, b"SELECT 'b'", false), one);
        assert_eq!(&*texts.get(one).text, "SELECT 'a'");
        assert_eq!(texts.get(one).key, fnv1a(b"SELECT ?"));
    }

    fn column(number: usize) -> String {
        format!("SELECT c{number}")
    }

    /// With more queries than there is room for, a query is kept if it is used often, if it was used once
    /// but recently, or if it was used several times long ago. The others are counted.
    #[test]
    fn the_least_used_go() {
        let mut texts = Texts::new(TextMode::Normalized);
        let hot = texts.insert(0, 5, b"SELECT hot", false);
        for _ in 0..3 {
            texts.insert(0, 6, b"SELECT early", false);
        }
        let early = texts.insert(0, 6, b"", false);
        let first = texts.insert(0, 0, b"SELECT c0", false);
        let mut samples = 6;
        for i in 1..3 * MAX_TEXTS {
            texts.insert(0, 0, column(i).as_bytes(), false);
            assert_eq!(texts.insert(0, 5, b"", false), hot);
            samples += 2;
        }
        assert_eq!(
            (texts.get(hot).id, &*texts.get(hot).text),
            (5, "SELECT hot")
        );
        assert_eq!(&*texts.get(early).text, "SELECT early");
        assert_eq!(&*texts.get(first).text, "[other queries]");
        // Every sample belongs to a query that is told apart, or is counted as overflow.
        let known: HashMap<_, _> = (1..texts.uses.len())
            .filter(|n| *texts.queries[*n].text != *OTHER)
            .map(|n| (n, texts.uses[n].count))
            .collect();
        assert!(known.len() <= MAX_TEXTS && known.len() >= MAX_TEXTS / 2);
        assert_eq!(known.values().sum::<u64>() + texts.overflow(), samples);
        assert!(texts.by_id.len() <= MAX_TEXTS && texts.by_text.len() <= MAX_TEXTS);
        // An evicted query that is seen again gets a new number.
        let again = texts.insert(0, 0, b"SELECT c0", false);
        assert_ne!(again, first);
        assert_eq!(&*texts.get(again).text, "SELECT c0");
        let last = 3 * MAX_TEXTS - 1;
        let known = texts.insert(0, 0, column(last).as_bytes(), false);
        assert_eq!(*texts.get(known).text, column(last));
        assert_eq!(known.0 + 1, again.0);
    }

    /// The numbers that are assigned are bounded, too.
    #[test]
    fn bounded_in_numbers() {
        let mut texts = Texts::new(TextMode::Normalized);
        for id in 1..MAX_NUMBERS as i64 {
            assert_ne!(texts.insert(0, id, b"SELECT c", false), QueryRef::OTHER);
        }
        let before = texts.overflow();
        assert_eq!(texts.insert(0, -1, b"SELECT c", false), QueryRef::OTHER);
        assert_eq!(texts.overflow(), before + 1);
        assert_eq!(texts.queries().len(), MAX_NUMBERS);
        let last = MAX_NUMBERS as i64 - 1;
        assert_eq!(
            texts.insert(0, last, b"", false).0 as usize,
            MAX_NUMBERS - 1
        );
    }

    #[test]
    fn bounded_in_bytes() {
        let mut texts = Texts::new(TextMode::Normalized);
        for i in 0..MAX_TEXTS {
            let text = format!("SELECT c{i} {}", "a, ".repeat(1000));
            texts.insert(0, i as i64 + 1, text.as_bytes(), false);
            assert!(texts.bytes <= MAX_TEXT_BYTES);
        }
        let kept = texts.queries().iter().filter(|query| *query.text != *OTHER);
        let bytes: usize = kept.map(|query| query.text.len()).sum();
        assert_eq!(bytes, texts.bytes);
        assert!(bytes > MAX_TEXT_BYTES / 3 && texts.overflow() > 0);
    }
}
