//! Text for people.

use std::{io::Write as _, time::SystemTime};

use crate::{clock, config};

/// A text as it can be shown: control characters could drive the terminal, so each is spelled out.
pub(super) fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out
}

/// Prints a line; false when nobody reads any more, as with `| head`.
pub(super) fn print(line: &str) -> bool {
    writeln!(std::io::stdout(), "{line}").is_ok()
}

/// A point in time to the second, or what stands for none.
pub(super) fn time(at: Option<SystemTime>, none: &str) -> String {
    at.map_or_else(|| none.to_owned(), clock::rfc3339_seconds)
}

/// What may have been meant by a name that nobody has, and which names there are.
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
    fn a_name_that_nobody_has_is_answered_with_the_one_that_may_be_meant() {
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
        let said = there_are("nobody", &many);
        assert!(said.len() < 200 && said.ends_with("s019 and 980 more"), "{said}");
    }

    #[test]
    fn nothing_that_is_shown_drives_the_terminal() {
        assert_eq!(
            visible("é \u{1b}[2J\u{7f}\u{9b}1m\t\r\n"),
            r"é \u{1b}[2J\u{7f}\u{9b}1m\u{9}\u{d}\u{a}"
        );
    }
}
