//! The tokens of the full-text index: words as they are, and exact values escaped to one token.
//!
//! No text of an event or a user reaches the syntax of FTS5: a word has only letters and digits,
//! and an exact token only `a-z`, `0-9` and `_`.

use std::fmt::Write as _;

use sha2::{Digest as _, Sha256};

use crate::{
    event::details::Details,
    store::{EventFilter, words},
};

/// Bytes of a token; a longer value has the token of its digest.
const MAX_TOKEN: usize = 64;

/// The most words and alternatives of a query that the index is asked for. All others are compared
/// with the events that it finds.
pub(super) const MAX_TERMS: usize = 64;

/// What an exact token is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exact {
    ActorId,
    ActorName,
    ResourceId,
    ResourceName,
    Type,
    Tenant,
}

impl Exact {
    const fn letter(self) -> char {
        match self {
            Self::ActorId => 'a',
            Self::ActorName => 'b',
            Self::ResourceId => 'r',
            Self::ResourceName => 's',
            Self::Type => 't',
            Self::Tenant => 'w',
        }
    }

    /// Appends the token of a value: `_`, a letter, and the value with all but `a-z` and `0-9`
    /// escaped. Different values have different tokens, up to their digests.
    pub(super) fn push(self, value: &str, into: &mut String) {
        let start = into.len();
        into.extend(['_', self.letter()]);
        for byte in value.bytes() {
            match byte {
                b'a'..=b'z' | b'0'..=b'9' => into.push(char::from(byte)),
                _ => push_escaped(byte, into),
            }
            if into.len() - start > MAX_TOKEN {
                into.truncate(start);
                into.push_str("_h");
                let digest = Sha256::new()
                    .chain_update([self.letter() as u8])
                    .chain_update(value)
                    .finalize();
                return push_hex(&digest, into);
            }
        }
    }
}

fn push_escaped(byte: u8, into: &mut String) {
    into.push('_');
    push_hex(&[byte], into);
}

pub(super) fn push_hex(bytes: &[u8], into: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        into.push(char::from(DIGITS[usize::from(byte >> 4)]));
        into.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

/// Bytes of a digest that stand for an id. Each event that is found is compared with the whole id.
const ID_DIGEST: usize = 8;

/// Appends the token of a message id. A digest is shorter than the id, and the index's size is that
/// of its tokens.
fn push_id(id: &str, into: &mut String) {
    into.push_str("_i");
    push_hex(&Sha256::digest(id)[..ID_DIGEST], into);
}

/// Appends the token of an event's bytes.
fn push_digest(sha256: &[u8; 32], into: &mut String) {
    into.push_str("_p");
    push_hex(&sha256[..ID_DIGEST], into);
}

/// The parts of an event that are indexed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Indexed<'e> {
    pub(super) event_type: &'e str,
    pub(super) message_id: Option<&'e str>,
    pub(super) sha256: &'e [u8; 32],
    pub(super) details: &'e Details,
    /// `None` if it is not kept.
    pub(super) body: Option<&'e [u8]>,
    pub(super) tenant: Option<&'e str>,
}

impl Indexed<'_> {
    /// Writes the tokens of an event.
    pub(super) fn write(self, into: &mut String) {
        into.clear();
        let add = |word: &str| {
            into.push_str(word);
            into.push(' ');
        };
        match self.body {
            Some(body) => words::of_body(body, add),
            None => words::of_details(self.details, add),
        }
        let Details { actor, resource, .. } = self.details;
        for (kind, value) in [
            (Exact::Type, Some(self.event_type)),
            (Exact::Tenant, self.tenant),
            (Exact::ActorId, actor.id.as_deref()),
            (Exact::ActorName, actor.name.as_deref()),
            (Exact::ResourceId, resource.id.as_deref()),
            (Exact::ResourceName, resource.name.as_deref()),
        ] {
            if let Some(value) = value {
                kind.push(value, into);
                into.push(' ');
            }
        }
        if let Some(id) = self.message_id {
            push_id(id, into);
            into.push(' ');
        }
        push_digest(self.sha256, into);
    }
}

/// Whether the index has anything to select by.
pub(super) fn is_indexed(filter: &EventFilter) -> bool {
    let EventFilter { actor, resource, id, text, tenant, .. } = filter;
    actor.is_some()
        || tenant.is_some()
        || resource.is_some()
        || id.is_some()
        || text.as_ref().is_some_and(|t| words::is_searchable(t))
}

/// The query for a filter, with one of these types; `None` if it would select everything.
pub(super) fn query(filter: &EventFilter, types: Option<&[&str]>) -> Option<String> {
    let mut terms: Vec<String> = Vec::new();
    let party = |value: &str, kinds: [Exact; 2]| {
        any(kinds.into_iter().map(|kind| {
            let mut token = String::new();
            kind.push(value, &mut token);
            token
        }))
    };
    if let Some(id) = &filter.id {
        terms.push(any(id_tokens(id)));
    }
    if let Some(tenant) = &filter.tenant {
        let mut token = String::new();
        Exact::Tenant.push(tenant.as_str(), &mut token);
        terms.push(any([token]));
    }
    if let Some(actor) = &filter.actor {
        terms.push(party(actor, [Exact::ActorId, Exact::ActorName]));
    }
    if let Some(resource) = &filter.resource {
        terms.push(party(resource, [Exact::ResourceId, Exact::ResourceName]));
    }
    if let Some(types) = types {
        terms.push(any(types.iter().map(|event_type| {
            let mut token = String::new();
            Exact::Type.push(event_type, &mut token);
            token
        })));
    }
    if let Some(wanted) = filter.text.as_deref().and_then(words::Wanted::of) {
        terms.push(format!("\"{}\"*", wanted.prefix));
        terms.extend(wanted.whole.iter().take(MAX_TERMS).map(|word| format!("\"{word}\"")));
    }
    (!terms.is_empty()).then(|| terms.join(" AND "))
}

/// The query for a message id alone.
pub(super) fn id_query(id: &str) -> String {
    any(id_tokens(id))
}

fn id_tokens(id: &str) -> Vec<String> {
    let mut tokens = vec![String::new()];
    push_id(id, &mut tokens[0]);
    // The token of the bytes has the first digits of the digest itself.
    let digest = id.strip_prefix("sha256-").filter(|digits| digits.len() == 64);
    let is_hex = |digits: &&str| digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if let Some(digits) = digest.filter(is_hex) {
        tokens.push(format!("_p{}", &digits[..2 * ID_DIGEST]));
    }
    tokens
}

fn any(tokens: impl IntoIterator<Item = String>) -> String {
    let mut query = String::new();
    for token in tokens {
        let or = if query.is_empty() { "(" } else { " OR " };
        write!(query, "{or}\"{token}\"").ok(); // a String takes everything
    }
    query + ")"
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token(kind: Exact, value: &str) -> String {
        let mut token = String::new();
        kind.push(value, &mut token);
        token
    }

    /// Reads an escaped value; `None` if it is a digest.
    fn value(token: &str) -> Option<Vec<u8>> {
        let mut rest = &token[2..];
        let mut bytes = Vec::new();
        while let Some(first) = rest.chars().next() {
            if first == '_' {
                bytes.push(u8::from_str_radix(&rest[1..3], 16).expect("two digits"));
                rest = &rest[3..];
            } else {
                bytes.push(first as u8);
                rest = &rest[1..];
            }
        }
        (!token.starts_with("_h")).then_some(bytes)
    }

    #[test]
    fn an_exact_value_is_one_token() {
        assert_eq!(token(Exact::Type, "user.updated"), "_tuser_2eupdated");
        assert_eq!(token(Exact::ActorName, "Jane_ä"), "_b_4aane_5f_c3_a4");
        assert_eq!(token(Exact::ActorId, ""), "_a");
        let (long, other) = ("x".repeat(63), "x".repeat(64));
        assert_eq!(token(Exact::ActorId, &long[1..]), format!("_a{}", &long[1..]));
        let digests = [
            token(Exact::ActorId, &long),
            token(Exact::ActorId, &other),
            token(Exact::ActorName, &long),
        ];
        for digest in &digests {
            assert!(digest.starts_with("_h") && digest.len() == 66, "{digest}");
            assert_eq!(digests.iter().filter(|d| *d == digest).count(), 1);
        }
    }

    #[test]
    fn a_query_has_no_syntax_of_its_caller() {
        let text = "\"x\" OR NEAR(a b) words:* ^c; DROP TABLE chunk --";
        let filter = EventFilter {
            actor: Some("a\" OR \"b".to_owned()),
            text: Some(text.to_owned()),
            ..EventFilter::default()
        };
        assert_eq!(
            query(&filter, None).as_deref(),
            Some(
                "(\"_aa_22_20_4f_52_20_22b\" OR \"_ba_22_20_4f_52_20_22b\") AND \"chunk\"* AND \"a\" AND \"b\" AND \"c\" AND \"drop\" AND \"near\" AND \"or\" AND \"table\" AND \"words\" AND \"x\""
            )
        );
        assert_eq!(query(&EventFilter::default(), None), None);
        let many = EventFilter {
            text: Some((0..10_000).map(|n| format!("{n} ")).collect()),
            ..EventFilter::default()
        };
        let terms = query(&many, None).map(|q| q.matches(" AND ").count());
        assert_eq!(terms, Some(MAX_TERMS));
    }

    proptest! {
        #[test]
        fn a_short_value_can_be_read_from_its_token(text in "\\PC{0,70}") {
            let token = token(Exact::ResourceId, &text);
            prop_assert!(token.len() <= 66);
            prop_assert!(token.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_')));
            if let Some(read) = value(&token) {
                prop_assert_eq!(read, text.as_bytes());
            } else {
                prop_assert!(text.len() * 3 > 62);
            }
        }
    }
}
