//! Properties that hold for any bytes that a broker sends; see `src/fuzzing.rs`.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use lapin::{
    BasicProperties,
    message::Delivery,
    protocol::{basic, parse_class},
    types::{AMQPValue, FieldTable, ShortString},
};

use sha2::{Digest as _, Sha256};

use super::{
    message::{self, dead_letter, read_dead_letter, taken_envelope},
    wire::{
        Arrival, Inboxes,
        content::{Opened, delivery as delivery_of},
        filter::{FRAME_END, FRAME_HEADER, Filter},
    },
};
use crate::delivery::{Batch, DeadLetter, MessageKind, Reason, cut_error};
use crate::queue::{MAX_TRACEPARENT, Taken};

/// What becomes of bytes from the broker.
#[derive(Debug, PartialEq)]
pub(super) struct Sorted {
    pub(super) for_lapin: Vec<u8>,
    /// Of each consumer: what has arrived, and whether a delivery was broken off.
    pub(super) taken: Vec<(Vec<Arrival>, bool)>,
}

/// Sorts bytes that arrive in pieces of these sizes, with these consumers on these channels.
pub(super) fn sorted(
    frame_max: usize,
    consumers: &[(u16, &str)],
    bytes: &[u8],
    pieces: &[usize],
) -> Sorted {
    let inboxes = Inboxes::default();
    let opened: Vec<_> =
        consumers.iter().map(|(channel, tag)| inboxes.open(*channel, tag)).collect();
    let mut filter = Filter::new(frame_max).serving(inboxes);
    let mut for_lapin = Vec::new();
    let mut rest = bytes;
    let mut pieces = pieces.iter().cycle();
    while !rest.is_empty() {
        let room = filter.room();
        let n = (*pieces.next().expect("at least one size")).clamp(1, rest.len().min(room.len()));
        room[..n].copy_from_slice(&rest[..n]);
        rest = &rest[n..];
        filter.filled(n);
        for_lapin.extend_from_slice(&filter.take_rest());
    }
    filter.end();
    for_lapin.extend_from_slice(&filter.take_rest());
    Sorted { for_lapin, taken: opened.iter().map(Opened::take_arrived).collect() }
}

/// The filtered bytes, when no consumer takes its deliveries itself.
pub(super) fn through(frame_max: usize, bytes: &[u8], pieces: &[usize]) -> Vec<u8> {
    sorted(frame_max, &[], bytes, pieces).for_lapin
}

/// The whole frames, and the bytes behind them.
fn frames(mut bytes: &[u8]) -> (Vec<&[u8]>, &[u8]) {
    let mut frames = Vec::new();
    while let [1 | 2 | 3 | 8, _, _, a, b, c, d, ..] = *bytes {
        let length = u32::from_be_bytes([a, b, c, d]) as usize + FRAME_HEADER + FRAME_END;
        let Some((frame, rest)) = bytes.split_at_checked(length) else { break };
        frames.push(frame);
        bytes = rest;
    }
    (frames, bytes)
}

/// However the bytes are divided, lapin and the consumers get the same; lapin reads or refuses it
/// without a panic.
pub(crate) fn wire(frame_max: usize, bytes: &[u8], pieces: &[usize]) {
    let whole = through(frame_max, bytes, &[usize::MAX]);
    assert_eq!(
        through(frame_max, bytes, pieces),
        whole,
        "pieces of {pieces:?} bytes make a difference"
    );
    assert_eq!(
        through(frame_max, &whole, &[usize::MAX]),
        whole,
        "what is harmless is changed again"
    );
    deliveries(frame_max, bytes, pieces);

    let ((came, came_last), (went, went_last)) = (frames(bytes), frames(&whole));
    assert_eq!((came.len(), came_last), (went.len(), went_last));
    for (came, went) in came.into_iter().zip(went) {
        assert_eq!(came[..3], went[..3], "type and channel");
        let payload = &went[FRAME_HEADER..went.len() - FRAME_END];
        match came[0] {
            1 => {
                assert_eq!(came.len(), went.len());
                parse_class(payload).ok();
            }
            2 => {
                // Only the table of headers is ever taken out.
                let fixed = FRAME_HEADER + 12;
                assert!(
                    came.len() == went.len()
                        || came.len() > went.len()
                            && came[FRAME_HEADER..fixed] == went[FRAME_HEADER..fixed]
                );
                payload.get(12..).map(|properties| basic::parse_properties(properties).ok());
            }
            _ => assert_eq!(came, went, "a body is touched"),
        }
    }
}

/// Consumers that take their deliveries themselves. Their tags are short, for a fuzzer to find.
const CONSUMERS: [(u16, &str); 3] = [(1, "a"), (1, "b"), (2, "a")];

/// A delivery of which not everything was seen.
struct Content {
    /// The consumer.
    to: usize,
    tag: u64,
    /// Bytes of the body, once its header was seen.
    missing: Option<u64>,
    body: Vec<u8>,
}

/// What the consumers take is what stands in the frames, read one after the other.
fn deliveries(frame_max: usize, bytes: &[u8], pieces: &[usize]) {
    let found = sorted(frame_max, &CONSUMERS, bytes, pieces);
    assert_eq!(
        sorted(frame_max, &CONSUMERS, bytes, &[usize::MAX]),
        found,
        "pieces of {pieces:?} bytes make a difference"
    );
    let (frames, _) = frames(bytes);
    let is_sound = |frame: &&[u8]| frame.ends_with(&[0xce]) && frame.len() <= 1 << 20;
    let all_are = frames.iter().all(is_sound);
    let frames = frames.into_iter().take_while(is_sound);
    let mut expected = CONSUMERS.map(|_| Vec::new());
    let mut open: HashMap<[u8; 2], Content> = HashMap::new();
    for frame in frames {
        let channel = [frame[1], frame[2]];
        let payload = &frame[FRAME_HEADER..frame.len() - FRAME_END];
        match frame[0] {
            1 => {
                open.remove(&channel);
                if let Some((consumer, number, _)) = delivery_of(payload)
                    && let Some(to) = CONSUMERS.iter().position(|(on, tag)| {
                        on.to_be_bytes() == channel && tag.as_bytes() == consumer
                    })
                {
                    open.insert(
                        channel,
                        Content { to, tag: number, missing: None, body: Vec::new() },
                    );
                }
            }
            2 | 3 => {
                let Some(content) = open.remove(&channel) else { continue };
                let Content { to, tag, missing, mut body } = content;
                let missing = match (frame[0], missing) {
                    (2, None) if payload.len() >= 12 => {
                        u64::from_be_bytes(payload[4..12].try_into().expect("eight"))
                    }
                    (3, Some(missing)) if payload.len() as u64 <= missing => {
                        body.extend_from_slice(payload);
                        missing - payload.len() as u64
                    }
                    _ => continue,
                };
                if missing > 0 {
                    open.insert(channel, Content { to, tag, missing: Some(missing), body });
                } else {
                    expected[to].push((tag, body));
                }
            }
            _ => {}
        }
    }
    for (taken, expected) in found.taken.iter().zip(expected) {
        let taken: Vec<_> = taken.0.iter().map(|a| (a.tag, a.body.to_vec())).collect();
        assert!(taken.starts_with(&expected), "{taken:?} is not {expected:?}");
        assert!(!all_are || taken.len() == expected.len(), "{taken:?} is not {expected:?}");
    }
}

/// Bytes that an event can have here.
const MOST: usize = 64 * 1024;

fn delivery(body: &[u8], properties: &BasicProperties) -> Delivery {
    let mut d = Delivery::mock(7, "".into(), "".into(), false, body.to_vec());
    d.properties = properties.clone();
    d
}

/// A time in the precision in which it is written.
fn in_millis(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH
        + Duration::from_millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn headers_len(properties: &BasicProperties) -> usize {
    let value =
        |v: &AMQPValue| if let AMQPValue::LongString(s) = v { s.as_bytes().len() } else { 8 };
    properties
        .headers()
        .iter()
        .flat_map(FieldTable::inner)
        .map(|(k, v)| k.as_str().len() + 6 + value(v))
        .sum()
}

/// Takes the properties of a content header, and a body. In each queue of hooktrail the message is
/// read as something, with its bytes, and what is written for that is read as the same.
pub(crate) fn message(properties: &[u8], body: &[u8]) {
    let header = [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], properties].concat();
    let Ok(length) = u32::try_from(header.len()) else { return };
    let frame = [&[2, 0, 1][..], &length.to_be_bytes(), &header, &[0xce]].concat();
    let frame = through(usize::MAX, &frame, &[usize::MAX]);
    let Ok((_, properties)) =
        basic::parse_properties(&frame[FRAME_HEADER + 12..frame.len() - FRAME_END])
    else {
        return;
    };
    let arrived = || delivery(body, &properties);
    in_main_queue(body, &properties);
    in_retry_queue(body, &properties);
    for letter in [
        read_dead_letter(arrived()),
        message::read_orphan(arrived(), Some("a")),
        message::read_orphan(arrived(), None),
    ] {
        assert_eq!(letter.body, body);
        keeps(letter);
    }
}

fn taken_event(d: Delivery) -> Taken {
    let sha256 = Sha256::digest(&d.data).into();
    message::taken_event(d.into(), &sha256, MOST)
}

fn in_main_queue(body: &[u8], properties: &BasicProperties) {
    match taken_event(delivery(body, properties)) {
        Taken::Event(event) => {
            let as_decoded = message::decoded(properties, body, MOST).ok().flatten();
            assert_eq!(event.body, as_decoded.as_deref().unwrap_or(body));
            let Taken::Event(again) =
                taken_event(delivery(&event.body, &message::relayed(properties)))
            else {
                panic!("what is relayed is plain")
            };
            assert_eq!(again.body, event.body);
            assert_eq!(
                (again.message_id, again.traceparent.clone()),
                (event.message_id, event.traceparent),
                "the relay keeps them"
            );
            assert!(again.traceparent.is_none_or(|t| t.len() <= MAX_TRACEPARENT));
        }
        Taken::Unusable(letter, _) => {
            assert!(
                letter.body == body
                    && letter.content_encoding.is_some()
                    && !letter.error.is_empty()
            );
            keeps(letter);
        }
        other => panic!("in a main queue: {other:?}"),
    }
}

fn in_retry_queue(body: &[u8], properties: &BasicProperties) {
    let (kept, own) = message::untouched(delivery(body, properties));
    assert_eq!(kept, body);
    match taken_envelope(delivery(body, properties).into()) {
        Taken::Batch(envelope, _) => {
            assert_eq!(
                read(taken_envelope(delivery(&kept, &own).into())),
                envelope,
                "as an orphan that is put back"
            );
            let envelope =
                Batch { first_attempt_at: envelope.first_attempt_at.map(in_millis), ..envelope };
            let (body, properties) = message::envelope(&envelope);
            assert_eq!(read(taken_envelope(delivery(&body, &properties).into())), envelope);
        }
        Taken::Unusable(letter, _) => {
            assert!(
                letter.body == body
                    && letter.reason == Reason::InvalidEvent
                    && !letter.error.is_empty()
            );
            keeps(letter);
        }
        other => panic!("in a retry queue: {other:?}"),
    }
}

fn read(taken: Taken) -> Batch {
    match taken {
        Taken::Batch(envelope, _) => envelope,
        other => panic!("{other:?}"),
    }
}

fn keeps(letter: DeadLetter) {
    let (body, properties) = dead_letter(&letter);
    // The id of a batch stands in a header, and may be longer than one of hooktrail's own.
    let long_id = letter.id.as_ref().is_some_and(|id| id.len() > 255);
    assert!(
        long_id || headers_len(&properties) < 16 * 1024,
        "{} bytes of headers",
        headers_len(&properties)
    );
    if letter.kind == MessageKind::Batch {
        let envelope = letter.to_batch();
        let (again, _) = message::envelope(&envelope);
        assert!(again == letter.body && envelope.replay && envelope.attempts == 0);
    } else {
        assert_eq!(message::event_again(&letter).0, letter.body);
    }
    let as_written = DeadLetter {
        error: cut_error(&letter.error).to_owned(),
        id: letter.id.filter(|id| {
            letter.kind == MessageKind::Batch || ShortString::try_new(id.as_str()).is_ok()
        }),
        first_attempt_at: letter.first_attempt_at.map(in_millis),
        died_at: letter.died_at.map(in_millis),
        ..letter
    };
    assert_eq!(read_dead_letter(delivery(&body, &properties)), as_written);
}
