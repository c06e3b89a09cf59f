//! A bounded map that evicts entries that have not been used for long.

use std::{collections::HashMap, hash::Hash};

/// A map of the most recently used keys. The least recently used keys are evicted, half of the map at once,
/// which needs no list in order of use.
#[derive(Debug)]
pub struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    half: usize,
}

impl<K: Copy + Eq + Hash, V: Clone> Recent<K, V> {
    /// Makes an empty map. It keeps at least the `half` most recently used keys, and never more than twice
    /// as many.
    pub fn new(half: usize) -> Self {
        Recent {
            young: HashMap::new(),
            old: HashMap::new(),
            half,
        }
    }

    /// The value of a key, which counts as used by this.
    pub fn get(&mut self, key: &K) -> Option<V> {
        if let Some(value) = self.young.get(key) {
            return Some(value.clone());
        }
        let value = self.old.remove(key)?;
        self.insert(*key, value.clone());
        Some(value)
    }

    /// Sets the value of a key.
    pub fn insert(&mut self, key: K, value: V) {
        if self.young.len() >= self.half && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.old.remove(&key);
        self.young.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However many keys are inserted, no more than two halves are kept.
    #[test]
    fn bounded() {
        let mut recent = Recent::new(10);
        for key in 0..1000 {
            recent.insert(key, ());
            assert_eq!(recent.get(&key), Some(()));
            assert!(recent.young.len() + recent.old.len() <= 20);
        }
    }

    /// Keys that are used are kept, others are evicted, and a replaced value does not come back.
    #[test]
    fn the_least_recently_used_go() {
        let mut recent = Recent::new(2);
        recent.insert(1, "one");
        recent.insert(2, "two");
        recent.insert(3, "three");
        assert_eq!(recent.get(&1), Some("one"));
        recent.insert(4, "four");
        assert_eq!(recent.get(&2), None);
        assert_eq!(recent.get(&1), Some("one"));
        recent.insert(1, "another");
        recent.insert(5, "five");
        recent.insert(6, "six");
        assert_eq!(recent.get(&3), None);
        for (key, value) in [(1, "another"), (1, "yet another")] {
            recent.insert(key, value);
            assert_eq!(recent.get(&key), Some(value));
        }
    }
}
