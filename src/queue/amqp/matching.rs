//! The patterns by which an event finds a subscriber. The broker does not say whether it found one:
//! the queue of history takes every event, so that none is returned.

use std::{collections::BTreeSet, sync::Arc};

use super::record::Patterns;
use crate::event::{Pattern, matcher::Matcher};

/// The patterns that are bound to the exchange of the events.
#[derive(Debug, Default, Clone)]
pub(super) struct Matching {
    /// By the record, of all daemons.
    recorded: Arc<Matcher>,
    /// Bound by this process, and perhaps not recorded yet.
    own: Arc<Matcher>,
}

impl Matching {
    #[must_use]
    pub(super) fn with_recorded(&self, patterns: &Patterns) -> Self {
        Self { recorded: matcher(patterns.values().flatten()), own: self.own.clone() }
    }

    #[must_use]
    pub(super) fn with_own<'p>(&self, patterns: impl Iterator<Item = &'p String>) -> Self {
        Self { recorded: self.recorded.clone(), own: matcher(patterns) }
    }

    /// Whether a subscriber's queue gets an event of this type.
    pub(super) fn matches(&self, event_type: &str) -> bool {
        self.own.matches(event_type) || self.recorded.matches(event_type)
    }
}

/// A matcher that says whether one of the patterns matches. A record with one that is no pattern is
/// another version's.
fn matcher<'p>(patterns: impl Iterator<Item = &'p String>) -> Arc<Matcher> {
    let all: BTreeSet<&String> = patterns.collect();
    let all: Vec<Pattern> = all.into_iter().filter_map(|p| Pattern::try_new(p).ok()).collect();
    Arc::new(Matcher::new(all.iter().map(|pattern| (0, pattern))))
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
