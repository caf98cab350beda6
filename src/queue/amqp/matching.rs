//! The patterns by which an event finds a subscriber. The broker does not say whether it found one:
//! the queue of history takes every event, so that none is returned.

use std::collections::BTreeSet;

use super::record::Patterns;
use crate::event::Pattern;

/// The patterns that are bound to the exchange of the events.
#[derive(Debug, Default, Clone)]
pub(super) struct Matching {
    /// By the record, of all daemons.
    recorded: Vec<Pattern>,
    /// Bound by this process, and perhaps not recorded yet.
    own: Vec<Pattern>,
}

impl Matching {
    #[must_use]
    pub(super) fn with_recorded(&self, patterns: &Patterns) -> Self {
        Self { recorded: distinct(patterns.values().flatten()), own: self.own.clone() }
    }

    #[must_use]
    pub(super) fn with_own<'p>(&self, patterns: impl Iterator<Item = &'p String>) -> Self {
        Self { recorded: self.recorded.clone(), own: distinct(patterns) }
    }

    /// Whether a subscriber's queue gets an event of this type.
    pub(super) fn matches(&self, event_type: &str) -> bool {
        self.own.iter().chain(&self.recorded).any(|pattern| pattern.matches(event_type))
    }
}

/// The patterns, each once. A record with one that is no pattern is another version's.
fn distinct<'p>(patterns: impl Iterator<Item = &'p String>) -> Vec<Pattern> {
    let all: BTreeSet<&String> = patterns.collect();
    all.into_iter().filter_map(|pattern| Pattern::try_new(pattern).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_and_what_was_bound_since_match() {
        let patterns = |all: &[&str]| -> Patterns {
            [("a".into(), all.iter().map(|p| (*p).to_owned()).collect())].into()
        };
        let matching = Matching::default();
        assert!(!matching.matches("user.login"));
        let recorded = matching.with_recorded(&patterns(&["user.*", "not*one"]));
        assert!(recorded.matches("user.login") && !recorded.matches("file.read"));
        let own = recorded.with_own(["file.#".to_owned()].iter());
        assert!(own.matches("user.login") && own.matches("file.read"));
        let own = own.with_recorded(&Patterns::new());
        assert!(!own.matches("user.login") && own.matches("file.read"));
    }
}
