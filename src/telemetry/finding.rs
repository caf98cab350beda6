//! The findings of an inspection of a queue or an endpoint, with their remedies.

use std::fmt;

use serde::Serialize;

/// The severity of a finding, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Ok,
    /// For an operator to know; what could not be inspected is a note too.
    Note,
    /// It can become harmful, or makes events arrive late or more than once.
    Warning,
    /// Events can be lost, or cannot be delivered.
    Harmful,
}

impl Severity {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Harmful => "harmful",
        }
    }
}

/// One result of an inspection. Its texts may hold names that others chose: of a queue, a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    /// It was not inspected: its risks are unknown.
    #[serde(skip)]
    pub(crate) unseen: bool,
    /// The risk is one for all subscribers, although the subject belongs to one.
    #[serde(skip)]
    pub(crate) for_all: bool,
    /// The subjects of the finding; several where it is the same.
    pub about: Vec<String>,
    pub found: String,
    /// What can go wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub risk: Option<String>,
    /// What fixes it: a command where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// The subjects of a finding that are shown by name; of the others the number is.
const SHOWN: usize = 3;

impl Finding {
    pub fn ok(about: impl Into<String>, found: impl Into<String>) -> Self {
        let (about, found) = (vec![about.into()], found.into());
        Self {
            severity: Severity::Ok,
            unseen: false,
            for_all: false,
            about,
            found,
            risk: None,
            remedy: None,
        }
    }

    pub fn note(about: impl Into<String>, found: impl Into<String>) -> Self {
        Self { severity: Severity::Note, ..Self::ok(about, found) }
    }

    pub fn warning(about: impl Into<String>, found: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::ok(about, found) }
    }

    pub fn harmful(about: impl Into<String>, found: impl Into<String>) -> Self {
        Self { severity: Severity::Harmful, ..Self::ok(about, found) }
    }

    /// A note that `about` could not be inspected, and why; `remedy` says how an operator can.
    pub fn unseen(
        about: impl Into<String>,
        why: impl fmt::Display,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            unseen: true,
            ..Self::note(about, format!("not inspected: {why}")).with_remedy(remedy)
        }
    }

    /// Whether the finding says that something was not inspected.
    pub fn is_unseen(&self) -> bool {
        self.unseen
    }

    /// Says whether the risk is one for all subscribers.
    #[must_use]
    pub fn harming_all(self, for_all: bool) -> Self {
        Self { for_all, ..self }
    }

    #[must_use]
    pub fn risking(self, risk: impl Into<String>) -> Self {
        Self { risk: Some(risk.into()), ..self }
    }

    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    /// The subjects, the first few of many.
    pub fn names(&self) -> String {
        let shown =
            self.about.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
        match self.about.len().saturating_sub(SHOWN) {
            0 => shown,
            more => format!("{shown} and {more} more"),
        }
    }
}

/// Joins findings that say the same of several subjects, and puts the worst last, where a reader
/// sees them first.
pub fn summarized(findings: Vec<Finding>) -> Vec<Finding> {
    let mut all: Vec<Finding> = Vec::new();
    for f in findings {
        match all.iter_mut().find(|a| {
            (a.severity, &a.found, &a.risk, &a.remedy) == (f.severity, &f.found, &f.risk, &f.remedy)
        }) {
            Some(same) => {
                same.about.extend(f.about);
                same.for_all |= f.for_all;
            }
            None => all.push(f),
        }
    }
    all.sort_by_key(|f| f.severity);
    all
}

/// The text as one word for a shell: the name of a policy must not decide what an operator runs.
pub fn shell_word(text: &str) -> String {
    let plain = !text.is_empty()
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_./:@%+".contains(&b))
        && !text.starts_with('-');
    if plain { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_of_many_subjects_is_shown_once_and_the_worst_last() {
        let bad =
            |about: &str| Finding::harmful(about, "is bad").risking("loss").with_remedy("fix it");
        let findings = vec![
            bad("a"),
            Finding::ok("x", "is fine"),
            bad("b"),
            Finding::note("y", "is odd"),
            bad("c"),
            bad("d"),
            bad("e"),
        ];
        let found = summarized(findings);
        let order: Vec<_> = found.iter().map(|f| (f.severity, f.names())).collect();
        let expected = [
            (Severity::Ok, "x".to_owned()),
            (Severity::Note, "y".to_owned()),
            (Severity::Harmful, "a, b, c and 2 more".to_owned()),
        ];
        assert_eq!(order, expected);
        assert_eq!(found[2].about.len(), 5, "none is left out where machines read");
        let other = summarized(vec![bad("a"), bad("b").with_remedy("fix it in another way")]);
        assert_eq!(other.len(), 2, "another remedy makes another finding");
    }

    #[test]
    fn a_name_that_others_chose_stays_one_word_of_a_command() {
        assert_eq!(shell_word("hooktrail.sub-a_1"), "hooktrail.sub-a_1");
        for (text, word) in [
            ("/", "/"),
            ("my dir/h", "'my dir/h'"),
            ("$(x)", "'$(x)'"),
            ("", "''"),
            ("-p", "'-p'"),
            ("a; rm -rf $HOME", "'a; rm -rf $HOME'"),
            ("it's", r"'it'\''s'"),
        ] {
            assert_eq!(shell_word(text), word);
        }
    }
}
