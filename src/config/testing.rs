//! Configurations for the unit tests of all rooms.

use super::{Config, Subscriber, from_text};

/// The table of a subscriber that signs nothing, with these lines in it.
pub(crate) fn table(name: &str, lines: &str) -> String {
    let has_url = lines.lines().any(|line| line.starts_with("url = "));
    let url = if has_url { "" } else { "url = \"https://example.com/\"\n" };
    format!("[[subscriber]]\nname = \"{name}\"\n{url}signatures = []\n{lines}\n")
}

/// A configuration that refers to no variable of the environment and to no other file.
pub(crate) fn config(text: &str) -> Config {
    from_text(text, &|_| None, &[]).unwrap_or_else(|e| panic!("{e}"))
}

/// A configuration with the embedded queue and these tables.
pub(crate) fn embedded(tables: &str) -> Config {
    config(&format!("[queue]\nurl = \"embedded\"\n{tables}"))
}

/// A subscriber that signs nothing, with these lines in its table.
pub(crate) fn subscriber(name: &str, lines: &str) -> Subscriber {
    Subscriber::clone(&embedded(&table(name, lines)).subscribers[0])
}
