//! Bytes from the broker.

use crate::{
    clock,
    delivery::{AttemptLog, Print},
    queue::amqp,
};

/// Input: the length of a message's properties in two bytes, the properties, then the body.
pub fn message(bytes: &[u8]) {
    let Some(([a, b], rest)) = bytes.split_first_chunk() else { return };
    let (properties, body) =
        rest.split_at(usize::from(u16::from_be_bytes([*a, *b])).min(rest.len()));
    amqp::fuzzing::message(properties, body);
    prints(body);
}

/// Prints that are read are one for each event, and are written as the text that was read.
fn prints(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let events = u32::try_from(bytes.len() / 4 * 3 / Print::LEN).unwrap_or(u32::MAX);
    for events in [events, events.saturating_add(1)] {
        let prints = Print::read_text(&text, events);
        if let Some(known) = &prints {
            assert!(events > 0 && known.len() == events as usize);
            assert_eq!(Print::to_text(&prints).as_deref(), Some(&*text));
        }
    }
}

/// Input: the longest frame in two bytes (0: any), five sizes of pieces, then the bytes from the
/// broker.
pub fn wire(bytes: &[u8]) {
    let Some(([a, b, pieces @ ..], sent)) = bytes.split_first_chunk::<7>() else { return };
    let frame_max = match u16::from_be_bytes([*a, *b]) {
        0 => usize::MAX,
        n => n.into(),
    };
    amqp::fuzzing::wire(frame_max, sent, &pieces.map(usize::from));
}

/// An attempt log read from a text is written as a short text that reads as the same log.
pub fn story(bytes: &[u8]) {
    let log = AttemptLog::from_text(&String::from_utf8_lossy(bytes));
    let (first, _, last) = log.parts();
    assert!(first.len() <= AttemptLog::FIRST && last.len() <= AttemptLog::LAST);
    let text = log.to_text();
    assert!(
        text.len() < 3 * 1024 && text.bytes().all(|b| b.is_ascii_graphic()),
        "{} bytes",
        text.len()
    );
    assert_eq!(AttemptLog::from_text(&text), log);
    for attempt in first.iter().chain(last) {
        assert!(
            humantime::parse_rfc3339(&clock::rfc3339(attempt.at)).is_ok(),
            "its time can be shown"
        );
    }
}
