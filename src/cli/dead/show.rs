//! `dead show` and `dead export`: dead letters with their attempts and their body.

use serde_json::value::RawValue;

use super::{choice::all_found, walk::each};
use crate::{
    admin::view::WholeLetter,
    cli::{
        failed::Failed,
        text::{as_json, print, time, visible},
    },
    clock,
    delivery::FailedAttempt,
    letters::{Choice, Selection},
    queue::{DeadLetters, Held},
    supervisor::signal::Stops,
    wording::counted,
};

pub(super) async fn export(
    letters: impl DeadLetters,
    selection: &Selection,
    stops: &Stops,
) -> Result<(), Failed> {
    let mut choice = Choice::new(selection);
    let line = |number, held: &Held| print(&as_json(&WholeLetter::new(number, held)));
    match each(letters, &mut choice, stops, line).await? {
        None => Ok(()),
        Some(_) => all_found(&choice),
    }
}

pub(super) async fn show(
    letters: impl DeadLetters,
    selection: &Selection,
    json: bool,
    stops: &Stops,
) -> Result<(), Failed> {
    let mut choice = Choice::new(selection);
    let mut found = None;
    // The first of several with the same id.
    let keep = |number, held: &Held| {
        found = Some(if json {
            let mut letter = WholeLetter::new(number, held);
            let lossy = || String::from_utf8_lossy(&held.letter.body).into_owned();
            letter.body.get_or_insert_with(lossy);
            as_json(&letter)
        } else {
            for_reading(number, held)
        });
        false
    };
    each(letters, &mut choice, stops, keep).await?;
    match found {
        Some(text) => {
            print(&text);
            Ok(())
        }
        None => all_found(&choice),
    }
}

fn for_reading(number: usize, held: &Held) -> String {
    let l = &held.letter;
    let mut lines: Vec<String> = Vec::new();
    let whose = held.subscriber.as_deref().map_or_else(|| "-".to_owned(), visible);
    for (name, value) in [
        ("number", format!("@{number}")),
        ("subscriber", whose),
        ("id", l.id.as_deref().map_or_else(|| "-".to_owned(), visible)),
        ("kind", l.kind.name().to_owned()),
        ("reason", l.reason.name().to_owned()),
        ("status", l.status.map_or_else(|| "-".to_owned(), |s| s.to_string())),
        ("error", visible(&l.error)),
        ("events", l.events.to_string()),
        ("attempts", l.attempts.to_string()),
        ("first attempt at", time(l.first_attempt_at, "-")),
        ("died at", time(l.died_at, "-")),
        ("content type", l.content_type.as_deref().map_or_else(|| "-".to_owned(), visible)),
        ("bytes", l.body.len().to_string()),
    ] {
        lines.push(format!("{name:<17} {value}"));
    }
    lines.extend(
        l.content_encoding
            .iter()
            .map(|encoding| format!("{:<17} {}", "content encoding", visible(encoding))),
    );
    let (first, left_out, last) = l.attempt_log.parts();
    if !first.is_empty() {
        lines.extend([String::new(), "the failed attempts:".to_owned()]);
    }
    let one =
        |a: &FailedAttempt| format!("{:>6}  {}  {}", a.number, clock::rfc3339(a.at), a.result);
    lines.extend(first.iter().map(one));
    lines
        .extend((left_out > 0).then(|| {
            format!("     …  {} left out here", counted(left_out, "attempt(s) (is|are)"))
        }));
    lines.extend(last.iter().map(one));
    lines.extend([String::new(), readable(&l.body)]);
    lines.join("\n")
}

/// A body for reading: each token as it is stored, the events of a batch on a line each, and
/// nothing that drives the terminal.
fn readable(body: &[u8]) -> String {
    let by_line = std::str::from_utf8(body).ok().and_then(event_a_line);
    let mut out = String::new();
    for chunk in by_line.as_deref().map_or(body, str::as_bytes).utf8_chunks() {
        for (n, line) in chunk.valid().split('\n').enumerate() {
            out.extend((n > 0).then_some('\n'));
            out.push_str(&visible(line));
        }
        out.extend(chunk.invalid().iter().map(|b| format!("\\x{b:02x}")));
    }
    out
}

/// Inserts a line break before each event of `{"events":[…]}` and changes nothing else: parsing and
/// printing would lose the spelling of numbers, and repeated fields.
fn event_a_line(body: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Payload<'b> {
        #[serde(borrow)]
        events: Vec<&'b RawValue>,
    }
    let mut out = String::with_capacity(body.len());
    let mut from = 0;
    for event in serde_json::from_str::<Payload<'_>>(body).ok()?.events {
        // The events are slices of the body.
        let at = event.get().as_ptr() as usize - body.as_ptr() as usize;
        out.push_str(&body[from..at]);
        out.push('\n');
        from = at;
    }
    Some(out + &body[from..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_shown_with_its_own_tokens() {
        let batch = r#"{"events":[{"n":18446744073709551616,"a":1.0,"a":2},{"s":"\u001b\/[{,"} , {"x":[1,{"y":-0.0}]}]}"#;
        let shown = readable(batch.as_bytes());
        assert_eq!(shown.replace('\n', ""), batch);
        let starts: Vec<&str> = shown.lines().map(|l| &l[..5]).collect();
        assert_eq!(starts, [r#"{"eve"#, r#"{"n":"#, r#"{"s":"#, r#"{"x":"#]);
        for other in [
            "{\"event\":\"a\",\n\"n\":1e400}",
            "{\"event\":1}\n{\"event\":2}\n",
            "{\"events\":[",
            "{\"events\":[],\"events\":[1]}",
            "",
        ] {
            assert_eq!(readable(other.as_bytes()), other);
        }
        assert_eq!(
            readable(b"a\x1b[2J\r\nb\xff\xfe \xc2\x9b c\0"),
            "a\\u{1b}[2J\\u{d}\nb\\xff\\xfe \\u{9b} c\\u{0}"
        );
    }
}
