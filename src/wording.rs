//! Text for people: numbers with their units and nouns, and what strangers wrote.

use std::{fmt, time::Duration};

use bytesize::ByteSize;

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

/// Makes a text safe to show: control characters, which could drive a terminal, are spelled out, and
/// so are those that turn the direction of what follows (Unicode Standard Annex #9, section 2) and
/// those that nobody sees. What emoji and scripts need to join or not to join stays.
pub fn visible(text: &str) -> String {
    let turns = |c| matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let is_unseen = |c| matches!(c, '\u{ad}' | '\u{115f}' | '\u{1160}' | '\u{180e}' | '\u{200b}' | '\u{2028}' | '\u{2029}' | '\u{2060}'..='\u{2064}' | '\u{3164}' | '\u{feff}' | '\u{ffa0}' | '\u{e0000}'..='\u{e007f}');
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || turns(c) || is_unseen(c) {
            out.extend(c.escape_unicode())
        } else {
            out.push(c)
        }
    }
    out
}

/// A number of bytes in units of 1024.
pub fn rounded_size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// A number with commas between thousands.
pub fn grouped(n: impl Into<u64>) -> String {
    let digits = n.into().to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, c) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A duration as its two largest units, rounded: `46h 34m`, `2m 15s`, `1.5s`.
pub fn rounded(d: Duration) -> String {
    if d.is_zero() {
        return "0s".to_owned();
    }
    if d < Duration::from_millis(9950) {
        let tenths = (d.as_millis() + 50) / 100;
        return match (tenths, tenths % 10) {
            (0, _) => format!("{}ms", d.as_millis().max(1)),
            (_, 0) => format!("{}s", tenths / 10),
            (_, rest) => format!("{}.{rest}s", tenths / 10),
        };
    }
    // Seconds of a unit, and its letter.
    const UNITS: [(u64, char); 4] = [(86_400, 'd'), (3600, 'h'), (60, 'm'), (1, 's')];
    let round = |unit: u64| (d.as_secs_f64() / unit as f64).round() as u64 * unit;
    // Days only from 100 hours: retry schedules are usually given in hours.
    let from = if round(3600) >= 100 * 3600 { 0 } else { 1 };
    for (n, (unit, letter)) in UNITS.iter().enumerate().skip(from) {
        let Some((below, small)) = UNITS.get(n + 1) else { break };
        let rounded = round(*below);
        if rounded >= *unit {
            let rest = rounded % unit / below;
            return if rest == 0 {
                format!("{}{letter}", rounded / unit)
            } else {
                format!("{}{letter} {rest}{small}", rounded / unit)
            };
        }
    }
    format!("{}s", round(1))
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

    #[test]
    fn nothing_that_is_shown_drives_the_terminal_or_turns_what_follows() {
        assert_eq!(
            visible("é \u{1b}[2J\u{7f}\u{9b}1m\t\r\n"),
            r"é \u{1b}[2J\u{7f}\u{9b}1m\u{9}\u{d}\u{a}"
        );
        assert_eq!(visible("exe.\u{202e}fdp \u{2067}x"), r"exe.\u{202e}fdp \u{2067}x");
        assert_eq!(visible("ad\u{200b}min\u{feff}"), r"ad\u{200b}min\u{feff}");
        assert_eq!(visible("👩\u{200d}🔧 می\u{200c}خواهم"), "👩\u{200d}🔧 می\u{200c}خواهم");
    }

    #[test]
    fn durations_are_shown_by_their_two_largest_units() {
        for (ms, text) in [
            (0, "0s"),
            (3, "3ms"),
            (1500, "1.5s"),
            (9999, "10s"),
            (59_600, "1m"),
            (135_000, "2m 15s"),
            (3_599_900, "1h"),
            (21_600_000, "6h"),
            (168_000_000, "46h 40m"),
            (900_000_000, "10d 10h"),
        ] {
            assert_eq!(rounded(Duration::from_millis(ms)), text);
        }
        assert_eq!(
            (grouped(1_u32), grouped(1000_u32), grouped(51_841_u64)),
            ("1".to_owned(), "1,000".to_owned(), "51,841".to_owned())
        );
    }
}
