//! Words: what a search by text compares.
//!
//! A word is a run of letters and digits of any script, in lower case. An emoji or a sign is no
//! word, it only separates words.

use std::borrow::Cow;

use crate::event::details::{Details, Party};

/// Bytes of a word that count.
pub const MAX_WORD: usize = 64;

/// Bytes of a body whose words count: a longer event is searched by its begin.
pub const MAX_BODY: usize = 256 << 10;

/// Whether a text has a word to search for.
pub fn is_searchable(text: &str) -> bool {
    text.contains(char::is_alphanumeric)
}

/// Calls `each` with the words of a text, in their order and as often as they occur.
pub fn of_text(text: &str, mut each: impl FnMut(&str)) {
    words(text, &mut String::new(), &mut each);
}

/// Calls `each` with the words of an event's strings and numbers. Names of fields do not count, nor
/// do `true`, `false` and `null`. A body that is no JSON object is taken as a text.
pub fn of_body(body: &[u8], mut each: impl FnMut(&str)) {
    let body = &body[..body.len().min(MAX_BODY)];
    let mut lower = String::new();
    if body.trim_ascii_start().first() != Some(&b'{') {
        words(&String::from_utf8_lossy(body), &mut lower, &mut each);
        return;
    }
    let mut at = 0;
    while let Some(byte) = body.get(at) {
        match byte {
            b'"' => {
                let (text, has_escapes, end) = string(body, at + 1);
                at = end;
                if !is_name(body, end) {
                    let text = String::from_utf8_lossy(text);
                    let text = if has_escapes { unescaped(&text) } else { text };
                    words(&text, &mut lower, &mut each);
                }
            }
            b'-' | b'0'..=b'9' => {
                let rest = &body[at..];
                let is_number =
                    |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'-' | b'.');
                let len = rest.iter().position(|b| !is_number(b)).unwrap_or(rest.len());
                words(&String::from_utf8_lossy(&rest[..len]), &mut lower, &mut each);
                at += len;
            }
            _ => at += 1,
        }
    }
}

/// Calls `each` with the words of an event that is kept without its bytes: those of its details.
pub fn of_details(details: &Details, mut each: impl FnMut(&str)) {
    let Details { timestamp, actor, resource, description } = details;
    let party = |p: &Party| [p.id.clone(), p.kind.clone(), p.name.clone()];
    let mut lower = String::new();
    let texts = [description.clone(), timestamp.clone()];
    for text in texts.into_iter().chain(party(actor)).chain(party(resource)).flatten() {
        words(&text, &mut lower, &mut each);
    }
}

/// The bytes of a string that begins here, whether it has escapes, and where what follows it begins.
fn string(body: &[u8], start: usize) -> (&[u8], bool, usize) {
    let (mut at, mut has_escapes) = (start, false);
    while let Some(byte) = body.get(at) {
        match byte {
            b'"' => return (&body[start..at], has_escapes, at + 1),
            b'\\' => {
                has_escapes = true;
                at += 2;
            }
            _ => at += 1,
        }
    }
    (&body[start..], has_escapes, body.len())
}

/// Whether a string that ended here was a field's name.
fn is_name(body: &[u8], end: usize) -> bool {
    body[end..].iter().find(|b| !b.is_ascii_whitespace()) == Some(&b':')
}

/// The text of a string with escapes. An escaped half of a surrogate pair separates words.
fn unescaped(text: &str) -> Cow<'_, str> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let mut chars = after.chars();
        match chars.next() {
            Some('u') => {
                let (c, len) = unicode(after);
                out.push(c);
                rest = &after[len..];
                continue;
            }
            Some(c @ ('"' | '\\' | '/')) => out.push(c),
            // A control character, or no JSON: no part of a word either way.
            Some(_) => out.push(' '),
            None => {}
        }
        rest = chars.as_str();
    }
    out.push_str(rest);
    Cow::Owned(out)
}

/// The character of an escape that begins with its `u`, and the bytes that it takes.
fn unicode(text: &str) -> (char, usize) {
    let unit = |text: &str| u32::from_str_radix(text.get(..4)?, 16).ok();
    let Some(first) = unit(&text[1..]) else { return (' ', 1) };
    if let Some(c) = char::from_u32(first) {
        return (c, 5);
    }
    let second = text[5..].strip_prefix("\\u").and_then(unit);
    let pair = second
        .filter(|s| first < 0xdc00 && (0xdc00..0xe000).contains(s))
        .and_then(|s| char::from_u32(0x10000 + ((first - 0xd800) << 10) + (s - 0xdc00)));
    pair.map_or((' ', 5), |c| (c, 11))
}

fn words(text: &str, lower: &mut String, each: &mut impl FnMut(&str)) {
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()) {
        lower.clear();
        if word.is_ascii() {
            lower.push_str(&word[..word.len().min(MAX_WORD)]);
            lower.make_ascii_lowercase();
        } else {
            // A sigma has two small letters.
            let small = |c: char| c.to_lowercase().map(|c| if c == 'ς' { 'σ' } else { c });
            for c in word.chars().flat_map(small) {
                if lower.len() + c.len_utf8() > MAX_WORD {
                    break;
                }
                lower.push(c);
            }
        }
        each(lower);
    }
}

/// A text that is searched for: all its words must occur, the last one as the begin of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Without repeats.
    pub whole: Vec<String>,
    pub prefix: String,
}

impl Wanted {
    /// `None` if the text has no word: nothing can be found by it.
    pub fn of(text: &str) -> Option<Self> {
        let mut whole = Vec::new();
        of_text(text, |word| whole.push(word.to_owned()));
        let prefix = whole.pop()?;
        whole.sort_unstable();
        whole.dedup();
        Some(Self { whole, prefix })
    }

    /// Whether these words have all that is wanted.
    pub fn is_in(&self, words: impl FnOnce(&mut dyn FnMut(&str))) -> bool {
        let mut found = vec![false; self.whole.len()];
        let mut has_prefix = false;
        words(&mut |word| {
            has_prefix |= word.starts_with(&self.prefix);
            if let Ok(n) = self.whole.binary_search_by(|w| w.as_str().cmp(word)) {
                found[n] = true;
            }
        });
        has_prefix && found.iter().all(|f| *f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn in_body(body: &str) -> Vec<String> {
        let mut found = Vec::new();
        of_body(body.as_bytes(), |word| found.push(word.to_owned()));
        found
    }

    #[test]
    fn words_are_runs_of_letters_and_digits_in_lower_case() {
        for (text, expected) in [
            ("Jane O'Neill-Smith", "jane o neill smith"),
            ("ÄRGER straße ΟΔΟΣ οδος", "ärger straße οδοσ οδοσ"),
            ("東京 2026年", "東京 2026年"),
            ("a_b.c@d", "a b c d"),
            ("🙂 … \0 \u{202e}", ""),
        ] {
            let mut found = Vec::new();
            of_text(text, |word| found.push(word.to_owned()));
            assert_eq!(found.join(" "), expected, "{text}");
            assert_eq!(is_searchable(text), !expected.is_empty());
        }
        let long = "é".repeat(100);
        of_text(&long, |word| assert_eq!(word.len(), MAX_WORD));
    }

    #[test]
    fn the_words_of_an_event_are_those_of_its_values() {
        let body = r#"{"event":"user.updated","ok":true,"none":null,"n":[-1.5e300,7],
            "actor" : {"name":"J\u0061ne \"D\\oe\ud83d\ude42x\ud800y\n\u00e9t\u00e9"}}"#;
        let words = "user updated 1 5e300 7 jane d oe x y été";
        assert_eq!(in_body(body).join(" "), words);
        assert_eq!(in_body("Not JSON, \"but\": text"), ["not", "json", "but", "text"]);
        for cut in ["{\"a\":\"b\\", "{\"a\":\"\\u", "{\"a\":\"\\u00e", "{\"a\":\"\\ud800\\u1", "{"]
        {
            assert!(in_body(cut).len() < 2, "{cut}");
        }
        let large = format!("{{\"a\":\"{}\"}}", "b ".repeat(MAX_BODY));
        assert_eq!(in_body(&large).len(), (MAX_BODY - 6) / 2);
    }

    #[test]
    fn all_wanted_words_must_occur_and_the_last_one_may_go_on() {
        let body = r#"{"event":"a","description":"Updated the profile"}"#;
        let is_in = |text: &str| {
            Wanted::of(text).is_some_and(|w| w.is_in(|each| of_body(body.as_bytes(), each)))
        };
        for text in ["updated", "PROFILE updated", "the pro", "a", "the the, up"] {
            assert!(is_in(text), "{text}");
        }
        for text in ["pro the", "dated", "description", "the profiles", "", "!"] {
            assert!(!is_in(text), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_string_has_the_same_words_with_and_without_escapes(text in "\\PC{0,40}") {
            let mut expected = Vec::new();
            of_text(&text, |word| expected.push(word.to_owned()));
            let plain = serde_json::json!({"k": text}).to_string();
            prop_assert_eq!(&in_body(&plain), &expected);
            let escaped: String = text.encode_utf16().map(|u| format!("\\u{u:04x}")).collect();
            prop_assert_eq!(&in_body(&format!("{{\"k\":\"{escaped}\"}}")), &expected);
        }

        #[test]
        fn no_body_is_too_strange(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            of_body(&body, |word| assert!(!word.is_empty() && word.len() <= MAX_WORD));
            let object = [b"{\"a\":\"", &body[..]].concat();
            of_body(&object, |word| assert!(!word.is_empty() && word.len() <= MAX_WORD));
        }
    }
}
