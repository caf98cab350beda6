//! Text for people.

use std::{
    io::Write as _,
    time::{Duration, SystemTime},
};

use bytesize::ByteSize;
use serde::Serialize;

use crate::{clock, config};

/// Makes a text safe to show: control characters, which could drive the terminal, are spelled out.
pub(super) fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out
}

/// Prints a line; false if the reader has left, as with `| head`.
pub(super) fn print(line: &str) -> bool {
    writeln!(std::io::stdout(), "{line}").is_ok()
}

/// A line of JSON.
pub(super) fn as_json(value: &impl Serialize) -> String {
    // Cannot fail with today's values, which are plain data.
    serde_json::to_string(value).unwrap_or_else(|e| e.to_string())
}

/// A point in time to the second, or `none`.
pub(super) fn time(at: Option<SystemTime>, none: &str) -> String {
    at.map_or_else(|| none.to_owned(), clock::rfc3339_seconds)
}

/// A number of bytes in units of 1024.
pub(super) fn rounded_size(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// A number with commas between thousands.
pub(super) fn grouped(n: impl Into<u64>) -> String {
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
pub(super) fn rounded(d: Duration) -> String {
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

/// The name most like an unknown one, and all known names.
pub(super) fn there_are(name: &str, names: &[&str]) -> String {
    const SHOWN: usize = 20;
    if names.is_empty() {
        return "there is none".to_owned();
    }
    let near = names
        .iter()
        .filter(|n| n.len() > 2)
        .filter_map(|n| Some((config::nearness(name, n)?, n)))
        .min_by_key(|(letters, _)| *letters);
    let near = near.map(|(_, n)| format!("did you mean `{n}`? ")).unwrap_or_default();
    let more = names.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{near}there are: {}{more}", names[..names.len().min(SHOWN)].join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_is_answered_with_the_most_similar_known_one() {
        assert_eq!(
            there_are("seim", &["crm", "siem"]),
            "did you mean `siem`? there are: crm, siem"
        );
        assert_eq!(
            there_are("crm-2", &["crm-01", "crm-20"]),
            "did you mean `crm-20`? there are: crm-01, crm-20"
        );
        assert_eq!(there_are("b", &["a", "c"]), "there are: a, c");
        assert_eq!(there_are("b", &[]), "there is none");
        let many: Vec<String> = (0..1000).map(|n| format!("s{n:03}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let said = there_are("unknown", &many);
        assert!(said.len() < 200 && said.ends_with("s019 and 980 more"), "{said}");
    }

    #[test]
    fn nothing_that_is_shown_drives_the_terminal() {
        assert_eq!(
            visible("é \u{1b}[2J\u{7f}\u{9b}1m\t\r\n"),
            r"é \u{1b}[2J\u{7f}\u{9b}1m\u{9}\u{d}\u{a}"
        );
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
