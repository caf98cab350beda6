//! Topic patterns.

/// The longest event type, in bytes: it is an AMQP routing key, which is a short string.
pub const MAX_TYPE_LEN: usize = 255;

/// An AMQP topic pattern: words separated by dots, `*` for exactly one word, `#` for any number of
/// words.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pattern(String);

impl Pattern {
    /// The pattern that matches every event type.
    pub fn all() -> Self {
        Self("#".to_owned())
    }

    /// # Errors
    /// Says what is wrong. For example, a broker would take `user*` as a literal word and
    /// match nothing.
    pub fn try_new(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("an empty pattern matches only an empty event type".to_owned());
        }
        if text.len() > MAX_TYPE_LEN {
            return Err(format!("a pattern has at most {MAX_TYPE_LEN} bytes"));
        }
        match text.split('.').find(|w| w.len() > 1 && w.contains(['*', '#'])) {
            Some(word) => Err(format!(
                "`{word}` mixes a wildcard with other characters; `*` and `#` stand for whole words between dots"
            )),
            None => Ok(Self(text.to_owned())),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the broker would route an event of this type to a queue bound with this pattern.
    pub fn matches(&self, event_type: &str) -> bool {
        // For a broker an empty key has no word, rather than an empty one.
        let words: Vec<&str> =
            if event_type.is_empty() { Vec::new() } else { event_type.split('.').collect() };
        // `reached[n]`: the pattern, as far as it was read, matches the first n words. All ways are
        // followed at once; one after the other takes exponential time with many `#`.
        let mut reached = vec![false; words.len() + 1];
        reached[0] = true;
        for part in self.0.split('.') {
            if part == "#" {
                let first = reached.iter().position(|r| *r).unwrap_or(reached.len());
                reached[first..].fill(true);
            } else {
                for n in (0..words.len()).rev() {
                    reached[n + 1] = reached[n] && (part == "*" || part == words[n]);
                }
                reached[0] = false;
            }
        }
        reached[words.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_a_topic_exchange_does() {
        for (pattern, event, expected) in [
            ("#", "a", true),
            ("#", "", true),
            ("*", "", false),
            ("#.*", "", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("a.#", "a", true),
            ("a.#", "a.b.c", true),
            ("a.#.z", "a.z", true),
            ("a.#.z", "a.b.c.z", true),
            ("a.#.z", "a.b.c", false),
            ("*.b", ".b", true),
            ("#.#.#.#.x", "a.b.c.d.e.f.g", false),
        ] {
            let p = Pattern::try_new(pattern).expect("a pattern");
            assert_eq!(p.matches(event), expected, "{pattern} on {event}");
        }
        for bad in ["", "user*", "a.#b", "a.**"] {
            assert!(Pattern::try_new(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_pattern_with_many_wildcards_is_not_tried_in_every_way() {
        let pattern = Pattern::try_new(&format!("{}b", "#.a.".repeat(60))).expect("a pattern");
        assert!(!pattern.matches(&["a"; 128].join(".")), "and says so before the end of time");
        assert!(pattern.matches(&format!("{}.b", ["a"; 120].join("."))));
    }
}
