//! Numbers and the nouns that go with them: the one place that knows the plural.

use std::fmt;

/// A number with what it counts: `counted(1, "event(s)")` is `1 event`, `counted(3, "batch(es) to retry")` is `3 batches to retry`.
pub fn counted<N: fmt::Display + PartialEq + From<u8>>(n: N, what: &str) -> String {
    let what = agreed(&n, what);
    format!("{n} {what}")
}

/// A text as it goes with a number that stands elsewhere. `(s)` and `(es)` are there for all numbers but one;
/// of `(is|are)` one has the first word, all others the second. Other parentheses stay.
pub fn agreed<N: PartialEq + From<u8>>(n: &N, text: &str) -> String {
    let one = *n == N::from(1);
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('(') {
        out.push_str(before);
        let Some((inside, after)) = after.split_once(')') else {
            rest = &rest[before.len()..];
            break;
        };
        match (inside.split_once('|'), inside) {
            (Some((singular, plural)), _) => out.push_str(if one { singular } else { plural }),
            (None, "s" | "es") => out.push_str(if one { "" } else { inside }),
            (None, _) => {
                out.push('(');
                out.push_str(inside);
                out.push(')');
            }
        }
        rest = after;
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_singular_and_every_other_number_plural() {
        for (n, text) in [(0_u32, "0 events"), (1, "1 event"), (2, "2 events"), (21, "21 events")] {
            assert_eq!(counted(n, "event(s)"), text);
        }
        assert_eq!(counted(1_usize, "batch(es) to retry"), "1 batch to retry");
        assert_eq!(counted(7_u64, "batch(es) to retry"), "7 batches to retry");
        assert_eq!(counted(-1_i64, "event(s)"), "-1 events");
    }

    #[test]
    fn a_verb_agrees_too_and_other_parentheses_stay() {
        let text = "the key(s) (has|have) changed (f(x), all)";
        assert_eq!(agreed(&1_u8, text), "the key has changed (f(x), all)");
        assert_eq!(agreed(&2_u8, text), "the keys have changed (f(x), all)");
        assert_eq!(agreed(&1_u8, "no end ("), "no end (");
        assert_eq!(agreed(&1_u8, ""), "");
    }
}
