//! The dictionary of a file's distinct rules.

use agent_ebpf::limits::MAX_RULES;
use agent_ebpf::unwind::{Rule, Unsupported};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Distinct rules, numbered in the order in which they were added. The first is [`Rule::INVALID`].
pub(super) struct Dictionary {
    rules: Vec<Rule>,
    indices: HashMap<Key, u16, BuildHasherDefault<Mix>>,
}

/// Number of the rule that stands for all rules that no longer fit.
const OVERFLOW: u16 = (MAX_RULES - 1) as u16;

impl Dictionary {
    pub(super) fn new() -> Dictionary {
        let mut dictionary = Dictionary {
            rules: Vec::new(),
            indices: HashMap::default(),
        };
        dictionary.index(&Rule::INVALID);
        dictionary
    }

    /// The number of a rule, which is added if it is new. Once all other numbers are taken, a new rule gets
    /// the last number, which stands for an unsupported rule.
    pub(super) fn index(&mut self, rule: &Rule) -> u16 {
        let key = Key::new(rule);
        if let Some(index) = self.indices.get(&key) {
            return *index;
        }
        let index = u16::try_from(self.rules.len()).unwrap_or(OVERFLOW);
        if index == OVERFLOW {
            if self.rules.len() == usize::from(OVERFLOW) {
                self.rules
                    .push(Rule::unsupported(Unsupported::TooManyRules));
            }
            return OVERFLOW;
        }
        self.rules.push(*rule);
        self.indices.insert(key, index);
        index
    }

    /// The rule with a number that [`Self::index`] returned.
    pub(super) fn rule(&self, index: u16) -> Rule {
        self.rules
            .get(usize::from(index))
            .copied()
            .unwrap_or(Rule::INVALID)
    }

    pub(super) fn into_rules(mut self) -> Vec<Rule> {
        self.rules.shrink_to_fit();
        self.rules
    }
}

/// A rule as two words, so that comparing and hashing it is cheap. This is done for nearly every row of a
/// file.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key([u64; 2]);

impl Key {
    fn new(rule: &Rule) -> Key {
        let [a, b, c, d] = rule.offset.to_le_bytes();
        let [e, f] = rule.aux.to_le_bytes();
        let [s0, s1, s2, s3, s4, s5] = rule.saved.map(|slot| slot.0);
        Key([
            u64::from_le_bytes([a, b, c, d, e, f, rule.kind, rule.reg]),
            u64::from_le_bytes([rule.ra.0, s0, s1, s2, s3, s4, s5, rule.index]),
        ])
    }
}

impl std::hash::Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0[0]);
        state.write_u64(self.0[1]);
    }
}

/// A hash by multiplication and rotation. A file that was crafted to cause collisions only slows its own
/// compilation, and [`MAX_RULES`] bounds by how much.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, word: u64) {
        // 2⁶⁴ / golden ratio.
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All rules that no longer fit share the last number, which stands for an unsupported rule.
    #[test]
    fn overflow() {
        let mut dictionary = Dictionary::new();
        for offset in 1..70_000 {
            let index = dictionary.index(&Rule {
                offset,
                ..Rule::FRAME_POINTER
            });
            assert_eq!(usize::from(index), (offset as usize).min(MAX_RULES - 1));
        }
        assert_eq!(dictionary.index(&Rule::INVALID), 0);
        let rules = dictionary.into_rules();
        assert_eq!(rules.len(), MAX_RULES);
        assert_eq!(
            rules[MAX_RULES - 1],
            Rule::unsupported(Unsupported::TooManyRules)
        );
    }
}
