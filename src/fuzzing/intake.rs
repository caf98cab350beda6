//! Bodies that producers POST.

use serde_json::value::RawValue;

use super::json::{Fields, WHITE_SPACE, plain_head};
use crate::admin;

/// The first byte of an input of [`intake`].
const LINES: u8 = b'L';
const GZIP: u8 = b'Z';
const GZIP_LINES: u8 = b'z';

/// The intake accepts the events that a plain parser finds, each with its bytes, and all or
/// nothing.
pub fn intake(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else { return };
    let (lines, gzip) = (matches!(*kind, LINES | GZIP_LINES), matches!(*kind, GZIP | GZIP_LINES));
    let Some((body, taken)) = admin::read_all(body, lines, gzip) else { return };
    let expected = if lines { events_in_lines(&body) } else { events_in_object(&body) };
    match (taken, expected) {
        (Ok(taken), Some(expected)) => {
            assert_eq!(taken.iter().map(|e| &e.body[..]).collect::<Vec<_>>(), expected);
            for event in taken {
                assert_eq!(
                    plain_head(&event.body).map(|(t, _)| t).as_ref(),
                    Some(&event.event_type)
                );
                assert!(event.message_id.is_some());
            }
        }
        (Ok(taken), None) => panic!("{} events of what is none", taken.len()),
        (Err((status, _)), Some(expected)) if expected.len() > admin::MAX_EVENTS => {
            assert_eq!(status, 413)
        }
        (Err((status, bad)), expected) => {
            let expected = expected.unwrap_or_default();
            let is_bad = |(n, event): (usize, &&[u8])| plain_head(event).is_none().then_some(n);
            let expected_bad: Vec<usize> =
                expected.iter().enumerate().filter_map(is_bad).take(100).collect();
            assert_eq!(status, 400);
            assert!(
                bad == expected_bad && (expected.is_empty() || !bad.is_empty()),
                "{bad:?}, not {expected_bad:?}"
            );
        }
    }
}

fn events_in_lines(body: &[u8]) -> Option<Vec<&[u8]>> {
    let is_blank = |line: &&[u8]| line.iter().all(|b| b" \t\r".contains(b));
    let lines = body.split(|b| *b == b'\n').filter(|line| !is_blank(line));
    Some(lines.map(without_space).collect())
}

fn without_space(text: &[u8]) -> &[u8] {
    let is_text = |b: &u8| !WHITE_SPACE.contains(&char::from(*b));
    match (text.iter().position(is_text), text.iter().rposition(is_text)) {
        (Some(first), Some(last)) => &text[first..=last],
        _ => &[],
    }
}

/// The events of one object, or the object itself if it is an event; `None` for any other body.
fn events_in_object(body: &[u8]) -> Option<Vec<&[u8]>> {
    let fields = Fields::of(body)?;
    if fields.last("event").is_some() {
        return Some(vec![without_space(body)]);
    }
    let mut events = fields.0.iter().filter(|(name, _)| name == "events");
    let (Some((_, events)), None) = (events.next(), events.next()) else { return None };
    let events: Vec<&RawValue> = serde_json::from_str(events.get()).ok()?;
    Some(events.into_iter().map(|e| e.get().as_bytes()).collect())
}
