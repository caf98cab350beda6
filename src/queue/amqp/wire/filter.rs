//! What becomes of the frames that come in: deliveries go to their consumers, all others to lapin, made
//! so that it can read them.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use lapin::types::FieldTable;

use super::content::{Contents, Inboxes};

/// Levels of tables and arrays; deeper ones are given to lapin as byte arrays.
const MAX_DEPTH: u32 = 32;

/// Bytes of one read from the socket.
const READ: usize = 64 * 1024;

/// The broker's first method, `connection.start`, which lapin reads and does not give out.
#[derive(Debug, Clone, Default)]
pub(in crate::queue::amqp) struct Greeting(Arc<OnceLock<Vec<u8>>>);

impl Greeting {
    /// The server's properties, such as product and version.
    pub(in crate::queue::amqp) fn server_properties(&self) -> Option<FieldTable> {
        let arguments = self.0.get()?.get(4..)?; // behind class and method
        lapin::protocol::connection::parse_start(arguments)
            .ok()
            .map(|(_, start)| start.server_properties)
    }

    fn heard(&self, payload: &[u8]) {
        if payload.starts_with(&[0, 10, 0, 10]) {
            self.0.set(payload.to_vec()).ok(); // it is said once
        }
    }
}

/// Sorts incoming bytes: received up to `there`, and done with up to `at`.
pub(in crate::queue::amqp) struct Filter {
    /// Bytes of the longest frame that lapin accepts.
    frame_max: usize,
    bytes: Vec<u8>,
    at: usize,
    there: usize,
    /// Whose the next bytes are, while they belong to a frame that is not buffered.
    rest: Rest,
    /// What is for lapin.
    out: Vec<u8>,
    greeting: Greeting,
    contents: Contents,
}

/// What is still to come of a frame.
#[derive(Debug, Clone, Copy)]
enum Rest {
    /// So many bytes for lapin.
    Lapin(usize),
    /// So many bytes of a delivery's body on this channel, and the end mark.
    Body(u16, usize),
}

const NOTHING: Rest = Rest::Lapin(0);

/// Bytes of the longest frame that is buffered: lapin refuses longer ones.
const MAX_LOOK: usize = 1 << 20;

/// Bytes of a frame before its payload (type, channel, length) and behind it (the end mark).
pub(in crate::queue::amqp) const FRAME_HEADER: usize = 7;
pub(in crate::queue::amqp) const FRAME_END: usize = 1;

/// The end mark.
const END: u8 = 0xce;

impl Filter {
    /// Keeps the broker's greeting.
    pub(super) fn hearing(self, greeting: Greeting) -> Self {
        Self { greeting, ..self }
    }

    /// Gives deliveries to these consumers.
    pub(in crate::queue::amqp) fn serving(self, inboxes: Inboxes) -> Self {
        Self { contents: Contents::new(inboxes), ..self }
    }

    pub(in crate::queue::amqp) fn new(frame_max: usize) -> Self {
        Self {
            frame_max,
            bytes: Vec::new(),
            at: 0,
            there: 0,
            rest: NOTHING,
            out: Vec::new(),
            greeting: Greeting::default(),
            contents: Contents::new(Inboxes::default()),
        }
    }

    /// Takes the bytes for lapin.
    pub(in crate::queue::amqp) fn take_rest(&mut self) -> Bytes {
        std::mem::take(&mut self.out).into()
    }

    /// Gives lapin a heartbeat if there is nothing but deliveries, and no frame of its own is under
    /// way.
    pub(super) fn beat(&mut self) {
        let is_between = !matches!(self.rest, Rest::Lapin(1..));
        if self.contents.has_taken && self.out.is_empty() && is_between {
            self.out.extend_from_slice(&[8, 0, 0, 0, 0, 0, 0, END]);
        }
    }

    /// The room for the next bytes.
    pub(in crate::queue::amqp) fn room(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.at..self.there, 0);
        self.there -= self.at;
        self.at = 0;
        if self.bytes.len() < self.there + READ {
            self.bytes.resize(self.there + READ, 0);
        }
        &mut self.bytes[self.there..]
    }

    pub(in crate::queue::amqp) fn filled(&mut self, n: usize) {
        self.there += n;
        while self.next() {}
        self.contents.deliver();
    }

    /// Sorts the next frame, or a part of one. Returns whether there may be another.
    fn next(&mut self) -> bool {
        let there = &mut self.bytes[self.at..self.there];
        match self.rest {
            Rest::Lapin(0) => {}
            Rest::Lapin(left) => {
                let n = left.min(there.len());
                self.out.extend_from_slice(&there[..n]);
                self.at += n;
                self.rest = Rest::Lapin(left - n);
                return n > 0;
            }
            Rest::Body(channel, left) => {
                let n = left.min(there.len());
                self.contents.body(channel, &there[..n]);
                self.at += n;
                let ended = n == left && there.len() > n;
                if ended && there[n] == END {
                    self.at += FRAME_END;
                    self.contents.body_ended(channel);
                } else if ended {
                    self.out.push(0xff); // it begins no frame, so that lapin does not wait for the rest of one
                    return self.misframed();
                }
                self.rest = if ended { NOTHING } else { Rest::Body(channel, left - n) };
                return ended;
            }
        }
        let [kind, high, low, a, b, c, d, ..] = *there else { return false };
        let channel = u16::from_be_bytes([high, low]);
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        let frame = length + FRAME_HEADER + FRAME_END;
        let is_here = there.len() >= frame;
        match kind {
            1 | 2 if frame > MAX_LOOK => {
                self.contents.broken(channel);
                self.rest = Rest::Lapin(frame);
            }
            1 | 2 if !is_here => return false,
            1 | 2 if there[frame - FRAME_END] != END => return self.misframed(),
            1 => {
                let frame = &mut there[..frame];
                let payload = &mut frame[FRAME_HEADER..FRAME_HEADER + length];
                if let Some(agreed) = method(payload) {
                    self.frame_max = self.frame_max.min(agreed);
                }
                if !self.contents.method(channel, payload) {
                    self.greeting.heard(payload);
                    self.out.extend_from_slice(frame);
                }
                self.at += frame.len();
            }
            2 => {
                let frame = &mut there[..frame];
                let payload = &mut frame[FRAME_HEADER..FRAME_HEADER + length];
                content_header(payload);
                if !self.contents.header(channel, payload) {
                    let is_long = frame.len() > self.frame_max;
                    let left = if is_long { without_headers(frame) } else { frame.len() };
                    self.out.extend_from_slice(&frame[..left]);
                }
                self.at += frame.len();
            }
            3 if self.contents.awaits_body(channel) => {
                self.at += FRAME_HEADER;
                self.rest = Rest::Body(channel, length);
            }
            3 | 8 => self.rest = Rest::Lapin(frame), // body, heartbeat
            _ => return self.misframed(),
        }
        true
    }

    /// What comes is not AMQP 0-9-1 after all: for lapin to say.
    fn misframed(&mut self) -> bool {
        self.contents.all_broken();
        self.rest = Rest::Lapin(usize::MAX);
        true
    }

    /// The stream has ended: what is buffered is a broken frame, and lapin may have it.
    pub(in crate::queue::amqp) fn end(&mut self) {
        self.out.extend_from_slice(&self.bytes[self.at..self.there]);
        self.at = self.there;
    }
}

/// Filters the methods that carry a foreign short string: a producer's name or key, or a text of
/// the broker, which cuts it at 255 bytes and not at a character. Returns the broker's longest
/// frame if the method says it.
fn method(payload: &mut [u8]) -> Option<usize> {
    let mut at = Cursor(payload);
    let (class, method) = (at.u16()?, at.u16()?);
    let (fixed, strings) = match (class, method) {
        (10, 50) | (20, 40) => (2, 1), // close of the connection, of a channel: code; text
        (10, 60) => (0, 1),            // blocked: reason
        (10, 10) => {
            // start: version; table of the peer at the broker's address
            at.take(2)?;
            at.table(0);
            return None;
        }
        (10, 30) => {
            // tune: channels, longest frame (0: any), heartbeat
            at.u16()?;
            let max = u32::from_be_bytes(at.take(4)?.try_into().ok()?);
            return (max > 0).then_some(max as usize);
        }
        (60, 50) => (2, 3), // return: code; text, exchange, key
        (60, 60) => {
            // deliver: the consumer's tag; number, redelivered; exchange, key
            at.short_string();
            (9, 2)
        }
        (60, 71) => (9, 2), // get-ok: number, redelivered; exchange, key
        _ => return None,
    };
    at.take(fixed)?;
    for _ in 0..strings {
        at.short_string()?;
    }
    None
}

/// Removes the table of headers from a frame that is too long for lapin. RabbitMQ makes such a
/// frame when it adds headers of its own to a message whose headers are as long as possible.
/// Returns the frame's new length.
fn without_headers(frame: &mut [u8]) -> usize {
    let length = frame.len();
    let mut at = Cursor(&mut frame[FRAME_HEADER..length - FRAME_END]);
    let found = (|| {
        at.take(12)?;
        let flags = at.u16()?;
        // Content type and encoding stand before it.
        for bit in [1 << 15, 1 << 14] {
            if flags & bit != 0 {
                at.short_string()?;
            }
        }
        let table = at.0.len();
        at.long()?;
        (flags & HEADERS != 0).then_some((flags & !HEADERS, table, at.0.len()))
    })();
    let Some((flags, before, after)) = found else { return length };
    let end = length - FRAME_END;
    frame.copy_within(end - after.., end - before);
    let left = length - (before - after);
    frame[FRAME_HEADER + 12..FRAME_HEADER + 14].copy_from_slice(&flags.to_be_bytes());
    let payload = u32::try_from(left - FRAME_HEADER - FRAME_END).unwrap_or(0);
    frame[3..7].copy_from_slice(&payload.to_be_bytes());
    left
}

/// The flag of the property `headers`.
const HEADERS: u16 = 1 << 13;

fn content_header(payload: &mut [u8]) {
    let mut at = Cursor(payload);
    at.take(12); // class, weight, body size
    let Some(flags) = at.u16() else { return };
    // In the order of the flags, from the highest bit.
    for (n, property) in "sstbbsssslssss".chars().enumerate() {
        if flags & (1 << (15 - n)) == 0 {
            continue;
        }
        match property {
            's' => drop(at.short_string()),
            'b' => drop(at.take(1)),
            'l' => drop(at.take(8)),
            _ => drop(at.table(0)),
        }
    }
}

/// Reads values; `None` when the bytes are no AMQP, which lapin reports.
struct Cursor<'a>(&'a mut [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Option<&'a mut [u8]> {
        let (taken, rest) = std::mem::take(&mut self.0).split_at_mut_checked(n)?;
        self.0 = rest;
        Some(taken)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn long(&mut self) -> Option<&'a mut [u8]> {
        let n = u32::from_be_bytes(self.take(4)?.try_into().ok()?);
        self.take(n as usize)
    }

    fn short_string(&mut self) -> Option<()> {
        let n = self.take(1)?[0];
        let mut rest = self.take(n.into())?;
        while let Err(e) = std::str::from_utf8(rest) {
            let bad = e.valid_up_to()..e.error_len().map_or(rest.len(), |n| e.valid_up_to() + n);
            rest[bad.clone()].fill(b'?');
            rest = &mut rest[bad.end..];
        }
        Some(())
    }

    fn table(&mut self, depth: u32) -> Option<()> {
        let mut entries = Cursor(self.long()?);
        while !entries.0.is_empty() {
            entries.short_string()?;
            entries.value(depth)?;
        }
        Some(())
    }

    fn array(&mut self, depth: u32) -> Option<()> {
        let mut values = Cursor(self.long()?);
        while !values.0.is_empty() {
            values.value(depth)?;
        }
        Some(())
    }

    fn value(&mut self, depth: u32) -> Option<()> {
        let kind = self.take(1)?;
        match kind[0] {
            b'F' | b'A' if depth == MAX_DEPTH => {
                kind[0] = b'x';
                self.long().map(drop)
            }
            b'F' => self.table(depth + 1),
            b'A' => self.array(depth + 1),
            b'S' | b'x' => self.long().map(drop),
            fixed => {
                let size = match fixed {
                    b'V' => 0,
                    b't' | b'b' | b'B' => 1,
                    b's' | b'U' | b'u' => 2,
                    b'I' | b'i' | b'f' => 4,
                    b'D' => 5,
                    b'L' | b'l' | b'd' | b'T' => 8,
                    _ => return None,
                };
                self.take(size).map(drop)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::amqp::fuzzing::through as limited;
    use lapin::{protocol::basic, types::AMQPValue};
    use proptest::prelude::*;

    fn short(text: &[u8]) -> Vec<u8> {
        [&[u8::try_from(text.len()).expect("short")], text].concat()
    }

    fn long(bytes: &[u8]) -> Vec<u8> {
        [&u32::try_from(bytes.len()).expect("long").to_be_bytes(), bytes].concat()
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        [&[kind, 0, 1][..], &long(payload), &[0xce]].concat()
    }

    fn header_frame(properties: &[u8]) -> Vec<u8> {
        frame(2, &[&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5], properties].concat())
    }

    fn parsed(frame: &[u8]) -> lapin::BasicProperties {
        let properties = &frame[FRAME_HEADER + 12..frame.len() - FRAME_END];
        let (rest, properties) = basic::parse_properties(properties).expect("lapin reads them");
        assert!(rest.is_empty());
        properties
    }

    /// The filtered bytes, when they arrive in pieces of these sizes.
    fn through(bytes: &[u8], pieces: &[usize]) -> Vec<u8> {
        limited(usize::MAX, bytes, pieces)
    }

    fn nested(depth: usize, kinds: &[u8]) -> Vec<u8> {
        let mut value = b"V".to_vec();
        for n in 0..depth {
            let kind = kinds[n % kinds.len()];
            let inner = if kind == b'F' { [short(b"k"), value].concat() } else { value };
            value = [vec![kind], long(&inner)].concat();
        }
        value
    }

    #[test]
    fn a_table_that_is_too_deep_becomes_a_byte_array() {
        for (kinds, deep) in [(&b"F"[..], 9_000), (b"A", 9_000), (b"FA", 9_000), (b"F", 33)] {
            let table =
                [short(b"deep"), nested(deep, kinds), short(b"after"), b"t\x01".to_vec()].concat();
            let frame = header_frame(&[vec![0x20, 0], long(&table)].concat());
            let headers = parsed(&through(&frame, &[1000])).headers().clone().expect("headers");
            assert_eq!(headers.inner().get("after"), Some(&AMQPValue::Boolean(true)));
            let mut levels = 0;
            let mut value = headers.inner()["deep"].clone();
            loop {
                value = match value {
                    AMQPValue::FieldTable(t) => t.inner()["k"].clone(),
                    AMQPValue::FieldArray(a) => a.as_slice()[0].clone(),
                    AMQPValue::ByteArray(_) => break,
                    other => panic!("{other:?}"),
                };
                levels += 1;
            }
            assert_eq!(levels, MAX_DEPTH);
        }
        let shallow = header_frame(
            &[vec![0x20, 0], long(&[short(b"k"), nested(32, b"FA")].concat())].concat(),
        );
        assert_eq!(through(&shallow, &[7]), shallow);
    }

    #[test]
    fn a_greeting_that_is_too_deep_does_not_end_the_process() {
        let table =
            [short(b"deep"), nested(9_000, b"F"), short(b"product"), b"S".to_vec(), long(b"R")]
                .concat();
        let start = frame(
            1,
            &[&[0, 10, 0, 10, 0, 9][..], &long(&table), &long(b"PLAIN"), &long(b"en_US")].concat(),
        );
        let mut filter = Filter::new(usize::MAX);
        filter.room()[..start.len()].copy_from_slice(&start);
        filter.filled(start.len());
        let properties = filter.greeting.server_properties().expect("lapin reads them");
        assert_eq!(properties.inner().get("product"), Some(&AMQPValue::LongString("R".into())));
    }

    #[test]
    fn a_header_frame_that_lapin_would_refuse_loses_its_headers_and_nothing_else() {
        let tune = |max: u32| {
            frame(1, &[&[0, 10, 0, 30, 0, 9][..], &max.to_be_bytes(), &[0, 10]].concat())
        };
        for pad in [0, 150, 151, 400] {
            let table = long(&[short(b"pad"), b"S".to_vec(), long(&vec![b'x'; pad])].concat());
            let header =
                header_frame(&[vec![0xa0, 0x80], short(b"a/b"), table, short(b"the id")].concat());
            let stream = [tune(200), header.clone(), frame(3, b"body"), header.clone()].concat();
            let found = limited(4096, &stream, &[7]);
            let at = tune(200).len();
            let length = if header.len() > 200 {
                header_frame(&[vec![0x80, 0x80], short(b"a/b"), short(b"the id")].concat()).len()
            } else {
                header.len()
            };
            let first = &found[at..at + length];
            let properties = parsed(first);
            assert_eq!(
                (
                    properties.content_type().as_ref().map(|t| t.as_str()),
                    properties.message_id().as_ref().map(|t| t.as_str())
                ),
                (Some("a/b"), Some("the id"))
            );
            assert_eq!(properties.headers().is_some(), header.len() <= 200, "{}", header.len());
            assert_eq!(found[at + length..], [&frame(3, b"body")[..], first].concat());
        }
    }

    #[test]
    fn the_strings_of_methods_are_made_utf_8() {
        for (ids, fixed_1, strings_1, fixed_2, strings_2) in [
            ([60, 60], 0, 1, 9, 2),
            ([60, 71], 9, 2, 4, 0),
            ([60, 50], 2, 3, 0, 0),
            ([20, 40], 2, 1, 4, 0),
            ([10, 50], 2, 1, 4, 0),
            ([10, 60], 0, 1, 0, 0),
        ] {
            let build = |text: &[u8]| {
                let strings = |n| short(text).repeat(n);
                let ids = [0, ids[0], 0, ids[1]];
                frame(
                    1,
                    &[
                        ids.to_vec(),
                        vec![0xff; fixed_1],
                        strings(strings_1),
                        vec![0xff; fixed_2],
                        strings(strings_2),
                    ]
                    .concat(),
                )
            };
            assert_eq!(through(&build(b"a\xffb\xe2\x82"), &[5]), build(b"a?b??"), "{ids:?}");
            assert_eq!(through(&build("é€".as_bytes()), &[5]), build("é€".as_bytes()), "{ids:?}");
        }
    }

    fn value() -> impl Strategy<Value = Vec<u8>> {
        let bytes = prop::collection::vec(any::<u8>(), 0..20);
        let fixed = prop::sample::select(vec![
            (b't', 1),
            (b'b', 1),
            (b'B', 1),
            (b's', 2),
            (b'u', 2),
            (b'I', 4),
            (b'f', 4),
            (b'D', 5),
            (b'l', 8),
            (b'd', 8),
            (b'T', 8),
            (b'V', 0),
        ]);
        let leaf = prop_oneof![
            (fixed, prop::collection::vec(any::<u8>(), 8)).prop_map(|((kind, n), bytes)| [
                &[kind],
                &bytes[..n]
            ]
            .concat()),
            (prop::sample::select(vec![b'S', b'x']), bytes).prop_map(|(kind, bytes)| [
                vec![kind],
                long(&bytes)
            ]
            .concat()),
        ];
        leaf.prop_recursive(40, 60, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(|values| [
                    b"A".to_vec(),
                    long(&values.concat())
                ]
                .concat()),
                prop::collection::vec((prop::collection::vec(any::<u8>(), 0..9), inner), 0..4)
                    .prop_map(|entries| {
                        let entries: Vec<u8> = entries
                            .into_iter()
                            .flat_map(|(k, v)| [short(&k), v].concat())
                            .collect();
                        [b"F".to_vec(), long(&entries)].concat()
                    }),
            ]
        })
    }

    proptest! {
        #[test]
        fn lapin_reads_whatever_a_producer_may_send(
            flags in any::<u16>(),
            texts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..30), 14),
            entries in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..9), value()), 0..5),
            pieces in prop::collection::vec(1_usize..50, 1..9),
            body in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut properties = flags.to_be_bytes().to_vec();
            for (n, kind) in "sstbbsssslssss".chars().enumerate().filter(|(n, _)| flags & (1 << (15 - n)) != 0) {
                properties.extend(match kind {
                    's' => short(&texts[n]),
                    'b' => vec![7],
                    'l' => vec![0xff; 8],
                    _ => long(&entries.iter().flat_map(|(k, v)| [short(k), v.clone()].concat()).collect::<Vec<_>>()),
                });
            }
            let header = header_frame(&properties);
            let stream = [&frame(3, &body)[..], &header, &frame(8, b""), &frame(3, &body), &header].concat();
            let found = through(&stream, &pieces);
            prop_assert_eq!(found.len(), stream.len());
            let at = frame(3, &body).len();
            parsed(&found[at..at + header.len()]);
            prop_assert_eq!(&found[..at], &stream[..at]);
            prop_assert_eq!(&found[found.len() - header.len()..], &found[at..at + header.len()]);
        }

        #[test]
        fn bytes_that_are_no_amqp_neither_panic_nor_get_lost(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
            kind in 1_u8..9,
            pieces in prop::collection::vec(1_usize..50, 1..9),
        ) {
            let stream = [frame(kind, &bytes), bytes].concat();
            prop_assert_eq!(through(&stream, &pieces).len(), stream.len());
        }
    }
}
