//! Numbers with their units and nouns, in singular and plural.

use std::{fmt, time::Duration};

/// A duration as a configuration writes it: a whole number of the largest possible unit, such as
/// `7d`, `72h`, `90s` and `1500ms`.
pub fn span(d: Duration) -> String {
    const DAY: u128 = 86_400_000_000_000;
    let ns = d.as_nanos();
    let units = [
        (DAY, "d"),
        (DAY / 24, "h"),
        (DAY / 24 / 60, "m"),
        (1_000_000_000, "s"),
        (1_000_000, "ms"),
        (1000, "us"),
    ];
    // Below a week people write hours.
    let fits = |unit: u128| ns > 0 && ns.is_multiple_of(unit) && (unit < DAY || ns >= 7 * DAY);
    match units.into_iter().find(|(unit, _)| fits(*unit)) {
        Some((unit, name)) => format!("{}{name}", ns / unit),
        None if ns == 0 => "0s".to_owned(),
        None => format!("{ns}ns"),
    }
}

/// A number of bytes as a configuration writes it: `1MiB`, `64KiB`, `1500B`.
pub fn size(bytes: usize) -> String {
    let fits = |unit: &(usize, &str)| bytes > 0 && bytes.is_multiple_of(unit.0);
    match [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")].into_iter().find(fits) {
        Some((unit, name)) => format!("{}{name}", bytes / unit),
        None => format!("{bytes}B"),
    }
}

/// A number with its noun: `counted(1, "event(s)")` is `1 event`, `counted(3, "batch(es) to
/// retry")` is `3 batches to retry`.
pub fn counted<N: fmt::Display + PartialEq + From<u8>>(n: N, what: &str) -> String {
    let what = agreed(&n, what);
    format!("{n} {what}")
}

/// A text that agrees with a number: `(s)` and `(es)` stand for the plural's ending, and `(is|are)`
/// for the word of the singular and of the plural. Other parentheses stay.
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
    fn times_and_sizes_are_as_a_configuration_has_them() {
        let ms = Duration::from_millis;
        for (d, text) in [
            (ms(0), "0s"),
            (ms(1500), "1500ms"),
            (ms(90_000), "90s"),
            (ms(300_000), "5m"),
            (ms(72 * 3_600_000), "72h"),
            (ms(7 * 86_400_000), "7d"),
            (Duration::from_nanos(1), "1ns"),
        ] {
            assert_eq!(span(d), text);
            assert_eq!(humantime::parse_duration(text).expect("a configuration takes it"), d);
        }
        for (bytes, text) in
            [(1 << 20, "1MiB"), (3 << 19, "1536KiB"), (64, "64B"), (0, "0B"), (1 << 30, "1GiB")]
        {
            assert_eq!(size(bytes), text);
        }
    }

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
