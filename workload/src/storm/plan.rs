//! What a storm asks, and what the shop is asked when there is none.
//!
//! Searches of equal cost on shared cores would all end together, and the catalogue's size alone
//! would decide between no failure and nothing but failures. So the cost varies, as with real
//! searches: nearly all look for one rare word, which costs a scan of the whole catalogue, and a
//! few look for eight at once and run into the statement timeout.

use crate::catalogue::{COMMON_WORDS, RARE_WORDS};

/// How many queries each service is asked at once: product, order, inventory.
pub const QUERIES: [usize; 3] = [15, 15, 13];

/// All of them: 43 of the shop's budget of 45 connections.
pub const QUERIES_OF_A_ROUND: usize = QUERIES[0] + QUERIES[1] + QUERIES[2];

/// In as many rounds there are as many searches for eight words as a round has queries: 43 of 516,
/// which are the 8.3 % that fail.
const ROUNDS_OF_A_CYCLE: usize = 12;

/// The words of such a search, the most that a service takes.
const MANY_WORDS: usize = 8;

/// Products that the background asks for: the smallest catalogue has as many.
const FAMILIAR: usize = 100;

/// Customers that the background asks for: there is one for twenty products.
const FAMILIAR_CUSTOMERS: usize = 20;

/// Where each service's heavy query is.
const HEAVY: [&str; 3] = [
    "/products/search",
    "/orders/popular-products",
    "/inventory/low-stock",
];

/// A request to a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Which service: product, order or inventory, by its place in that order.
    pub service: usize,
    /// The path without what differs from request to request.
    pub template: &'static str,
    /// The path with its query.
    pub path: String,
    /// How many words it looks for; none when it is no search.
    pub words: usize,
}

/// All queries of a round; the first round is 0.
pub fn round(round: u32) -> Vec<Ask> {
    let round = round as usize;
    let large = large_until(round)..large_until(round + 1);
    let mut asks: Vec<Ask> = Vec::with_capacity(QUERIES_OF_A_ROUND);
    for (service, count) in QUERIES.into_iter().enumerate() {
        // The services take turns with the large ones.
        let large = large.clone().filter(|number| number % 3 == service).count();
        for number in 0..count {
            let first = round * QUERIES_OF_A_ROUND + asks.len();
            let words = if number < large { MANY_WORDS } else { 1 };
            asks.push(heavy(service, first, words));
        }
    }
    asks
}

/// How many searches for eight words there are in all rounds before this one.
fn large_until(round: usize) -> usize {
    round * QUERIES_OF_A_ROUND / ROUNDS_OF_A_CYCLE
}

/// A service's heavy query for `words` rare words, beginning with the word of that number.
fn heavy(service: usize, first: usize, words: usize) -> Ask {
    let chosen: Vec<&str> = RARE_WORDS
        .iter()
        .cycle()
        .skip(first % RARE_WORDS.len())
        .take(words)
        .copied()
        .collect();
    // The words are plain letters: nothing to escape.
    let query = match chosen.as_slice() {
        [word] => format!("q={word}"),
        words => format!("any={}", words.join(",")),
    };
    let template = HEAVY[service];
    Ask {
        service,
        template,
        path: format!("{template}?{query}"),
        words,
    }
}

/// The storm's most frequent query, to be asked alone.
pub fn single(number: usize) -> Ask {
    heavy(0, number, 1)
}

/// The request of that number of the shop's background: visitors who look at products and stock,
/// look for what is common, and at what they have ordered. Each costs the database little.
pub fn background(number: usize) -> Ask {
    let id = 1 + number * 7 % FAMILIAR;
    let customer = 1 + number * 7 % FAMILIAR_CUSTOMERS;
    let word = COMMON_WORDS[number % COMMON_WORDS.len()];
    let (service, template, path) = match number % 6 {
        0 => (0, HEAVY[0], format!("{}?q={word}", HEAVY[0])),
        1 => (0, "/products/{id}", format!("/products/{id}")),
        2 => (2, "/inventory/check/{id}", format!("/inventory/check/{id}")),
        3 => (1, HEAVY[1], format!("{}?q={word}", HEAVY[1])),
        4 => (
            1,
            "/orders/history",
            format!("/orders/history?customer_id={customer}"),
        ),
        _ => (2, HEAVY[2], format!("{}?q={word}", HEAVY[2])),
    };
    let words = usize::from(path.contains("?q="));
    Ask {
        service,
        template,
        path,
        words,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn large(asks: &[Ask]) -> usize {
        asks.iter().filter(|ask| ask.words == MANY_WORDS).count()
    }

    /// Twelve rounds have 516 queries, 43 of them for eight words, three or four in each round.
    #[test]
    fn a_cycle_has_the_mixture_of_the_scenario() {
        let mut total = 0;
        for number in 0..12 {
            let asks = round(number);
            assert_eq!(asks.len(), 43);
            for (service, count) in QUERIES.into_iter().enumerate() {
                let of_service = asks.iter().filter(|ask| ask.service == service);
                assert_eq!(of_service.count(), count);
            }
            assert!((3..=4).contains(&large(&asks)), "{}", large(&asks));
            total += large(&asks);
        }
        assert_eq!(total, 43);
    }

    /// The large searches are spread over the services.
    #[test]
    fn the_services_take_turns() {
        for number in 0..12 {
            let asks = round(number);
            for service in 0..3 {
                let of_service: Vec<Ask> = asks
                    .iter()
                    .filter(|ask| ask.service == service)
                    .cloned()
                    .collect();
                assert!((1..=2).contains(&large(&of_service)));
            }
        }
    }

    /// A large search has eight different rare words; rounds do not begin with the same word.
    #[test]
    fn words_are_rare_and_different() {
        let asks = round(1);
        let ask = asks.iter().find(|ask| ask.words == 8).unwrap();
        let (_, words) = ask.path.split_once("any=").unwrap();
        let words: std::collections::BTreeSet<&str> = words.split(',').collect();
        assert_eq!(words.len(), 8);
        assert!(words.iter().all(|word| RARE_WORDS.contains(word)));
        assert_ne!(round(0)[14], round(1)[14]);
    }

    /// The background reaches each service, and its searches are for common words.
    #[test]
    fn the_background_is_light_and_everywhere() {
        let asks: Vec<Ask> = (0..60).map(background).collect();
        for service in 0..3 {
            assert!(asks.iter().any(|ask| ask.service == service));
        }
        for ask in &asks {
            if let Some((_, word)) = ask.path.split_once("?q=") {
                assert!(COMMON_WORDS.contains(&word), "{word}");
            }
        }
    }
}
