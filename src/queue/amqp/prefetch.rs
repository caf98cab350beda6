//! The number of events that may be on their way to a lane: small until their sizes are known,
//! since a broker counts messages, not bytes.

use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldArray, FieldTable},
};

use crate::queue::{FEWEST, MOST_BYTES};

/// Messages, at least, of which the largest is remembered.
const MEMORY: u64 = 2000;

/// Factor by which the prefetch may exceed the number of messages seen.
const GROWTH: u64 = 8;

/// The known sizes of a subscriber's messages. They outlive a session: requeued messages are taken
/// again together, or they would change their order.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    seen: u64,
    /// The largest of the latest messages, and of those before them.
    largest: [u64; 2],
    /// Messages at most that the last session has left unacked.
    requeued: u64,
}

impl Sizes {
    pub(super) fn saw(&mut self, bytes: usize) {
        if self.seen > 0 && self.seen.is_multiple_of(MEMORY) {
            self.largest = [0, self.largest[0]];
        }
        self.seen += 1;
        self.largest[0] = self.largest[0].max(bytes as u64);
    }

    /// A session ends, and leaves so many messages unacked at most.
    pub(super) fn requeued(&mut self, messages: u64) {
        self.requeued = messages;
    }

    /// The first prefetch of a session: what was requeued has room in it. Else a part of it would be
    /// requeued behind the rest if this session ended soon.
    pub(super) fn first(&self, window: u16) -> u16 {
        self.allow(window).max(u16::try_from(self.requeued).unwrap_or(u16::MAX))
    }

    /// The number of messages that may be unacked, at most `window`. If the next ones are as large
    /// as those before, that is at most [`MOST_BYTES`], or [`FEWEST`] messages.
    pub(super) fn allow(&self, window: u16) -> u16 {
        let largest = self.largest.iter().copied().max().unwrap_or(0).max(1);
        let most = (MOST_BYTES / largest).min(self.seen.saturating_mul(GROWTH)).max(FEWEST.into());
        u16::try_from(most).unwrap_or(u16::MAX).min(window)
    }
}

/// Bytes of memory that a message takes. Headers take many times what they arrive as.
pub(super) fn size(body: usize, properties: &BasicProperties) -> usize {
    body + properties.headers().as_ref().map_or(0, of_table)
}

/// Bytes of a node of a `BTreeMap`, which has at least five entries unless it is the only one.
const NODE: usize = 640;

/// Bytes of an entry of a `Vec`, which may have twice the room that it needs.
const ENTRY: usize = 2 * size_of::<AMQPValue>();

fn of_table(table: &FieldTable) -> usize {
    let entries = table.inner();
    let inner: usize =
        entries.iter().map(|(key, value)| key.as_str().len() + of_value(value)).sum();
    entries.len().div_ceil(5) * NODE + inner
}

fn of_array(array: &FieldArray) -> usize {
    array.as_slice().iter().map(|value| ENTRY + of_value(value)).sum()
}

/// Those besides the value itself.
fn of_value(value: &AMQPValue) -> usize {
    match value {
        AMQPValue::ShortString(text) => text.as_str().len(),
        AMQPValue::LongString(text) => text.len(),
        AMQPValue::ByteArray(bytes) => bytes.len(),
        AMQPValue::FieldArray(array) => of_array(array),
        AMQPValue::FieldTable(table) => of_table(table),
        _ => 0,
    }
}

/// Whether a prefetch of `next` instead of `now` is worth another consumer.
pub(super) const fn is_other(now: u16, next: u16, window: u16) -> bool {
    next >= now.saturating_mul(2) || next <= now / 2 || (next == window && now != window)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(sizes: impl IntoIterator<Item = usize>) -> Sizes {
        let mut all = Sizes::default();
        sizes.into_iter().for_each(|bytes| all.saw(bytes));
        all
    }

    #[test]
    fn headers_count_by_the_memory_that_they_take() {
        let with = |headers| size(400, &BasicProperties::default().with_headers(headers));
        let mut usual = FieldTable::default();
        usual.insert("traceparent".into(), AMQPValue::LongString("t".repeat(55).into()));
        let usual = with(usual);
        assert_eq!((usual, after([usual; 9000]).allow(u16::MAX)), (1106, 60_677));
        // As long as the longest header of RabbitMQ, 128 KiB: nothings, and tables of one nothing.
        let nothings = FieldArray::from(vec![AMQPValue::Void; 128 << 10]);
        let mut table = FieldTable::default();
        table.insert("".into(), AMQPValue::Void);
        let tables = FieldArray::from(vec![AMQPValue::FieldTable(table); (128 << 10) / 7]);
        for (array, most) in [(nothings, 8 << 20), (tables, 13 << 20)] {
            let mut headers = FieldTable::default();
            headers.insert("a".into(), AMQPValue::FieldArray(array));
            let size = with(headers);
            assert!(size > most - (1 << 20) && size < most + (1 << 20), "{size}");
        }
    }

    #[test]
    fn a_session_begins_with_room_for_what_the_last_one_left() {
        let mut sizes = after([300; 16]);
        assert_eq!(sizes.first(20), 20);
        sizes.requeued(36);
        assert_eq!((sizes.first(20), sizes.allow(20)), (36, 20));
        assert!(is_other(36, 20, 20), "and goes back to its window");
        sizes.requeued(3);
        assert_eq!(sizes.first(20), 20);
    }

    #[test]
    fn small_messages_reach_the_whole_window_in_two_steps() {
        assert_eq!(Sizes::default().allow(1000), FEWEST);
        assert_eq!(after([300; 16]).allow(1000), 128);
        assert_eq!(after([300; 16 + 128]).allow(1000), 1000);
        assert_eq!(Sizes::default().allow(2), 2, "never more than the window");
    }

    #[test]
    fn no_more_are_taken_than_fit_into_the_bytes_if_all_are_as_large_as_the_largest() {
        let mib = 1 << 20;
        assert_eq!(after([4 * mib; 1000]).allow(1000), 16);
        assert_eq!(after([mib; 1000]).allow(1000), 64);
        assert_eq!(after([128 * mib; 1000]).allow(1000), FEWEST);
        let mut sizes = after(std::iter::repeat_n(300, 500).chain([4 * mib]));
        assert_eq!(sizes.allow(1000), 16, "one is enough");
        (0..MEMORY).for_each(|_| sizes.saw(300));
        assert_eq!(sizes.allow(1000), 16, "it is remembered for a while");
        (0..MEMORY).for_each(|_| sizes.saw(300));
        assert_eq!(sizes.allow(1000), 1000, "and not for ever");
    }
}
