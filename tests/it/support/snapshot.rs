//! The whole output of the program, held against the files in `tests/it/snapshots`.
//!
//! After a change that is meant, have them written: `INSTA_UPDATE=always scripts/test --quick`, and
//! read `git diff`.

use std::path::{Path, PathBuf};

/// The folder that they are in.
pub(crate) fn snapshots() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/snapshots")
}

/// Compares a text with its snapshot, in which `[…]` stands for what is another each time.
#[track_caller]
pub(crate) fn assert_printed(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(snapshots());
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, masked(text)));
}

/// Like [`assert_printed`], for a daemon's report of its work: also hides how long something took,
/// and the padding and the line breaks that depend on it.
#[track_caller]
pub(crate) fn assert_reported(name: &str, text: &str) {
    assert_printed(name, &without_measures(text));
}

/// The number of bytes at the begin of a text that differ from run to run, and their replacement.
type Mask = fn(&str) -> Option<(usize, &'static str)>;

const MASKS: [Mask; 4] = [id, time, port, folder];

pub(crate) fn masked(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if let Some((length, shown)) = MASKS.iter().find_map(|mask| mask(rest)) {
            out.push_str(shown);
            rest = &rest[length..];
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    out
}

fn id(text: &str) -> Option<(usize, &'static str)> {
    let digits = text.strip_prefix("msg_")?.bytes().take_while(u8::is_ascii_hexdigit).count();
    (digits == 32).then_some((4 + digits, "msg_[id]"))
}

fn time(text: &str) -> Option<(usize, &'static str)> {
    const SHAPE: &[u8] = b"0000-00-00T00:00:00";
    let same = |(shape, byte): (&u8, u8)| {
        if *shape == b'0' { byte.is_ascii_digit() } else { byte == *shape }
    };
    if text.len() < SHAPE.len() || !SHAPE.iter().zip(text.bytes()).all(same) {
        return None;
    }
    let fraction =
        text[SHAPE.len()..].bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
    let length = SHAPE.len() + fraction;
    text[length..].starts_with('Z').then_some((length + 1, "[time]"))
}

/// Ports that a system or a test gives to a process have five digits.
fn port(text: &str) -> Option<(usize, &'static str)> {
    const HOST: &str = "127.0.0.1:";
    let digits = text.strip_prefix(HOST)?.bytes().take_while(u8::is_ascii_digit).count();
    (digits >= 5).then_some((HOST.len() + digits, "127.0.0.1:[port]"))
}

/// A path of a test's own, with the folder that it is in.
fn folder(text: &str) -> Option<(usize, &'static str)> {
    let parent = std::env::temp_dir();
    let begin = format!("{}/.tmp", parent.to_str().expect("text"));
    let name = text.strip_prefix(&begin)?.bytes().take_while(u8::is_ascii_alphanumeric).count();
    Some((begin.len() + name, "[folder]"))
}

fn without_measures(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let indent = &line[..line.len() - line.trim_start().len()];
        let columns: Vec<&str> =
            line.split("  ").map(str::trim).filter(|part| !part.is_empty()).collect();
        let words = measures(&columns.join("  "));
        match lines.last_mut() {
            Some(last) if line.starts_with("    ") => *last += &format!(" {words}"),
            _ => lines.push(format!("{indent}{words}")),
        }
    }
    lines.join("\n") + "\n"
}

/// Replaces numbers with a unit of time, and numbers with a point.
pub(crate) fn measures(text: &str) -> String {
    const UNITS: [&str; 7] = ["ms", "s", "m", "h", "d", "day", "days"];
    let mut out: Vec<String> = Vec::new();
    for word in text.split(' ') {
        // `<1ms` is a duration too: on a quick machine an answer takes no whole millisecond.
        let word = word.strip_prefix('<').filter(|rest| rest.ends_with("ms")).unwrap_or(word);
        let begin = word
            .find(|c: char| c.is_ascii_digit())
            .filter(|at| !word[..*at].contains(|c: char| c.is_alphanumeric() || c == '['));
        let Some(begin) = begin else {
            out.push(word.to_owned());
            continue;
        };
        let number = word[begin..].bytes().take_while(|b| b.is_ascii_digit() || *b == b'.').count();
        let (number, rest) = word[begin..].split_at(number);
        let unit = rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let shown = if UNITS.contains(&&rest[..unit]) {
            format!("{}[duration]{}", &word[..begin], &rest[unit..])
        } else if number.trim_end_matches('.').contains('.') {
            format!("{}[number]{rest}", &word[..begin])
        } else {
            word.to_owned()
        };
        // `2h 3m` is one.
        if shown.starts_with("[duration]")
            && out.last().is_some_and(|last| last.ends_with("[duration]"))
        {
            out.pop();
        }
        out.push(shown);
    }
    out.join(" ")
}
