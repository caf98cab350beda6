//! Text for people.

use std::{io::Write as _, time::SystemTime};

use serde::Serialize;

pub(super) use crate::wording::{grouped, rounded, rounded_size, visible};
use crate::{clock, config};

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
}
