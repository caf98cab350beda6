//! Finds all patterns that match an event type at once, however many there are.
//!
//! The patterns are a tree, word by word, so that an event type is compared with those that begin
//! as it does. The answers of recent types are remembered: most events have one of few types.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use super::pattern::Pattern;

/// The most types whose answers are remembered.
const MAX_TYPES: usize = 10_000;

/// The most owners in all remembered answers together: 4 MiB.
const MAX_OWNERS: usize = 1 << 20;

/// The number of a word that no pattern has.
const UNKNOWN: u32 = u32::MAX;

/// Patterns, each with the number of its owner.
pub struct Matcher {
    words: HashMap<Box<str>, u32>,
    nodes: Vec<Node>,
    /// The node behind a node and a word that is no wildcard.
    children: HashMap<(u32, u32), u32>,
    remembers: bool,
    work: Mutex<Work>,
}

/// The place behind the words of a pattern, as far as they were read; the first node is that of
/// none.
#[derive(Debug, Default)]
struct Node {
    star: Option<u32>,
    hash: Option<u32>,
    /// It is behind a `#`, which takes any further word.
    is_hash: bool,
    /// The owners of patterns that end here.
    owners: Vec<u32>,
}

/// What a lookup needs besides the patterns, and what earlier ones have found.
#[derive(Default)]
struct Work {
    /// The last step in which each node was reached, so that none is followed twice.
    reached: Vec<u64>,
    step: u64,
    found: HashMap<Box<str>, Arc<[u32]>>,
    owners: usize,
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher").field("nodes", &self.nodes.len()).finish_non_exhaustive()
    }
}

impl Default for Matcher {
    fn default() -> Self {
        Self::new([])
    }
}

/// The words of an event type. For a broker an empty key has no word, rather than an empty one.
fn words(event_type: &str) -> impl Iterator<Item = &str> {
    event_type.split('.').take(if event_type.is_empty() { 0 } else { usize::MAX })
}

impl Matcher {
    pub fn new<'p>(patterns: impl IntoIterator<Item = (u32, &'p Pattern)>) -> Self {
        let mut matcher = Self {
            words: HashMap::new(),
            nodes: vec![Node::default()],
            children: HashMap::new(),
            remembers: true,
            work: Mutex::default(),
        };
        for (owner, pattern) in patterns {
            matcher.add(owner, pattern);
        }
        matcher.work =
            Mutex::new(Work { reached: vec![0; matcher.nodes.len()], ..Work::default() });
        matcher
    }

    /// The same for one of very many, each of a few patterns: it remembers no answers, which would
    /// take more memory than they save time.
    pub fn of_few<'p>(patterns: impl IntoIterator<Item = (u32, &'p Pattern)>) -> Self {
        Self { remembers: false, ..Self::new(patterns) }
    }

    fn add(&mut self, owner: u32, pattern: &Pattern) {
        let mut at = 0;
        for word in pattern.as_str().split('.') {
            at = match word {
                // Two in a row match what one does.
                "#" if self.nodes[at].is_hash => at,
                "#" => {
                    let next = self.nodes[at].hash.unwrap_or_else(|| self.node(true));
                    self.nodes[at].hash = Some(next);
                    next as usize
                }
                "*" => {
                    let next = self.nodes[at].star.unwrap_or_else(|| self.node(false));
                    self.nodes[at].star = Some(next);
                    next as usize
                }
                word => {
                    let count = u32::try_from(self.words.len()).unwrap_or(UNKNOWN);
                    let word = match self.words.get(word) {
                        Some(word) => *word,
                        None => *self.words.entry(word.into()).or_insert(count),
                    };
                    let edge = (u32::try_from(at).unwrap_or(UNKNOWN), word);
                    let next = match self.children.get(&edge) {
                        Some(next) => *next,
                        None => self.node(false),
                    };
                    self.children.insert(edge, next);
                    next as usize
                }
            };
        }
        let owners = &mut self.nodes[at].owners;
        if owners.last() != Some(&owner) {
            owners.push(owner);
        }
    }

    fn node(&mut self, is_hash: bool) -> u32 {
        self.nodes.push(Node { is_hash, ..Node::default() });
        u32::try_from(self.nodes.len() - 1)
            .expect("a pattern has at most 255 bytes, and there is memory for less than 2^32 nodes")
    }

    /// The owners of the patterns that match, each once, in their order.
    pub fn lookup(&self, event_type: &str) -> Arc<[u32]> {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = work.found.get(event_type) {
            return found.clone();
        }
        let found = self.find(event_type, &mut work);
        if !self.remembers {
            return found;
        }
        if work.found.len() >= MAX_TYPES || work.owners + found.len() > MAX_OWNERS {
            work.found.clear();
            work.owners = 0;
        }
        work.owners += found.len();
        work.found.insert(event_type.into(), found.clone());
        found
    }

    /// Whether a pattern matches.
    pub fn matches(&self, event_type: &str) -> bool {
        !self.lookup(event_type).is_empty()
    }

    fn find(&self, event_type: &str, work: &mut Work) -> Arc<[u32]> {
        let mut now = Vec::new();
        work.step += 1;
        self.reach(0, work, &mut now);
        let mut next = Vec::new();
        for word in words(event_type) {
            let word = self.words.get(word).copied().unwrap_or(UNKNOWN);
            work.step += 1;
            for &at in &now {
                let node = &self.nodes[at as usize];
                if node.is_hash {
                    self.reach(at, work, &mut next);
                }
                if let Some(star) = node.star {
                    self.reach(star, work, &mut next);
                }
                if let Some(&child) = self.children.get(&(at, word)) {
                    self.reach(child, work, &mut next);
                }
            }
            std::mem::swap(&mut now, &mut next);
            next.clear();
        }
        let owners = now.iter().flat_map(|at| &self.nodes[*at as usize].owners);
        let mut found: Vec<u32> = owners.copied().collect();
        found.sort_unstable();
        found.dedup();
        found.into()
    }

    /// Adds a node, and that behind a `#`, which may take no word.
    fn reach(&self, at: u32, work: &mut Work, into: &mut Vec<u32>) {
        let mut at = Some(at);
        while let Some(node) = at {
            if std::mem::replace(&mut work.reached[node as usize], work.step) == work.step {
                return;
            }
            into.push(node);
            at = self.nodes[node as usize].hash;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn patterns(texts: &[impl AsRef<str>]) -> Vec<Pattern> {
        texts.iter().map(|p| Pattern::try_new(p.as_ref()).expect("a pattern")).collect()
    }

    fn matcher(patterns: &[Pattern]) -> Matcher {
        Matcher::new((0..).zip(patterns))
    }

    /// The numbers of the patterns that match by themselves.
    fn each(patterns: &[Pattern], event_type: &str) -> Vec<u32> {
        (0..).zip(patterns).filter(|(_, p)| p.matches(event_type)).map(|(n, _)| n).collect()
    }

    fn agrees(patterns: &[Pattern], types: &[&str]) {
        let matcher = matcher(patterns);
        for event_type in types.iter().chain(types) {
            let found = matcher.lookup(event_type);
            assert_eq!(found[..], each(patterns, event_type), "{event_type}");
            assert_eq!(matcher.matches(event_type), !found.is_empty());
        }
    }

    #[test]
    fn unusual_patterns_and_types_are_found_as_one_by_one() {
        let (ab, hashes) = (["a"; 100].join("."), ["#"; 100].join("."));
        let (stars, longest) = (["*"; 100].join("."), "x".repeat(255));
        let texts = [
            "#",
            "*",
            "a",
            "a..b",
            "a.",
            ".",
            "..",
            "#.#.#.*",
            "#.*.#",
            "*.#.*",
            "a.#",
            "#.a",
            "a.#.b",
            "#.a.#.b.#",
            "a.#.#.b",
            "*.*",
            &ab,
            &hashes,
            &stars,
            &longest,
        ];
        let (deep, deeper) = (["a"; 100].join("."), ["a"; 101].join("."));
        let types = [
            "", "a", "b", ".", "..", "a.", ".a", "a..b", "a.b", "a.x.b", "a.b.a.b", &deep, &deeper,
            &longest, "*", "#", "a.#.b",
        ];
        agrees(&patterns(&texts), &types);
        agrees(&[], &types);
    }

    #[test]
    fn an_owner_of_several_patterns_that_match_is_found_once() {
        let all = patterns(&["a.*", "#", "a.b", "b"]);
        let matcher =
            Matcher::new([(7, &all[0]), (3, &all[1]), (7, &all[2]), (7, &all[1]), (9, &all[3])]);
        assert_eq!(matcher.lookup("a.b")[..], [3, 7]);
        assert_eq!(matcher.lookup("b")[..], [3, 7, 9]);
    }

    #[test]
    fn ten_thousand_equal_patterns_are_one_path() {
        let all = patterns(&vec!["a.#.b"; 10_000]);
        let matcher = matcher(&all);
        assert_eq!(matcher.nodes.len(), 4);
        assert_eq!(matcher.lookup("a.b").len(), 10_000);
        assert!(!matcher.matches("a"));
    }

    #[test]
    fn many_wildcards_are_not_tried_in_every_way() {
        let all = patterns(&[format!("{}b", "#.a.".repeat(60)), "#.".repeat(120) + "*"]);
        let matcher = matcher(&all);
        assert_eq!(
            matcher.lookup(&["a"; 128].join("."))[..],
            [1],
            "and says so before the end of time"
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let wide = patterns(&vec!["#"; 1000]);
        let narrow = patterns(&["x"]);
        for (all, most) in [(wide, MAX_OWNERS / 1000), (narrow, MAX_TYPES)] {
            let matcher = matcher(&all);
            for n in 0..most + 10 {
                assert_eq!(matcher.lookup(&n.to_string())[..], each(&all, &n.to_string()));
                let work = matcher.work.lock().expect("not poisoned");
                assert!(work.found.len() <= most, "{} types", work.found.len());
            }
            assert!(matcher.work.lock().expect("not poisoned").found.len() <= 10, "it began again");
        }
    }

    /// Few words, so that many match.
    fn text(wildcards: &'static str) -> impl Strategy<Value = String> {
        let word = prop_oneof![
            3 => proptest::sample::select(vec!["a", "b", "c", ""]),
            2 => proptest::sample::select(wildcards.split(' ').collect::<Vec<_>>()),
        ];
        prop::collection::vec(word, 1..8).prop_map(|words| words.join("."))
    }

    proptest! {
        #[test]
        fn finds_what_each_pattern_matches(
            texts in prop::collection::vec(text("* #"), 0..40),
            types in prop::collection::vec(text("d e"), 1..20),
        ) {
            let all: Vec<Pattern> = texts.iter().filter_map(|p| Pattern::try_new(p).ok()).collect();
            let matcher = matcher(&all);
            for event_type in types.iter().chain(&types) {
                let found = matcher.lookup(event_type);
                prop_assert_eq!(&found[..], each(&all, event_type), "{}", event_type);
            }
        }
    }
}
