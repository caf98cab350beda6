//! What a look at a queue or an endpoint found, and what is to be done about it.

use std::fmt;

use serde::Serialize;

/// How bad it is, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Ok,
    /// For an operator to know; what could not be looked at is among these.
    Note,
    /// It can become harmful, or delivers later or more than is wanted.
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

/// One thing that was found. The texts may name what others chose: a queue, a policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    /// It was not looked at, so that what could be wrong with it is not known.
    #[serde(skip)]
    pub(crate) unseen: bool,
    /// What can go wrong harms all subscribers, although it is about what belongs to one.
    #[serde(skip)]
    pub(crate) for_all: bool,
    /// Of what it was found; of several where it is the same.
    pub about: Vec<String>,
    pub found: String,
    /// What can go wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub risk: Option<String>,
    /// What mends it: a command where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// So many names of what a finding is about are shown; the number of the others is.
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

    /// What could not be looked at, and why; `look` says how an operator can.
    pub fn unseen(
        what: impl Into<String>,
        why: impl fmt::Display,
        look: impl Into<String>,
    ) -> Self {
        Self { unseen: true, ..Self::note(what, format!("not looked at: {why}")).mended(look) }
    }

    /// Whether it says that something was not looked at.
    pub fn is_unseen(&self) -> bool {
        self.unseen
    }

    /// Whether the harm is for all subscribers.
    #[must_use]
    pub fn harming_all(self, for_all: bool) -> Self {
        Self { for_all, ..self }
    }

    #[must_use]
    pub fn risking(self, risk: impl Into<String>) -> Self {
        Self { risk: Some(risk.into()), ..self }
    }

    #[must_use]
    pub fn mended(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }

    /// The names of what it is about, the first few of many.
    pub fn names(&self) -> String {
        let shown =
            self.about.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
        match self.about.len().saturating_sub(SHOWN) {
            0 => shown,
            more => format!("{shown} and {more} more"),
        }
    }
}

/// Makes one of those that say the same of several things, and puts the worst last, where a
/// reader's eye is.
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

/// A word for a shell, whatever is in it: whoever names a policy must not choose what an operator
/// runs.
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
    fn what_is_found_of_many_is_told_once_and_the_worst_last() {
        let bad = |about: &str| Finding::harmful(about, "is bad").risking("loss").mended("mend it");
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
        let other = summarized(vec![bad("a"), bad("b").mended("mend it in another way")]);
        assert_eq!(other.len(), 2, "what is mended in another way is another finding");
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
