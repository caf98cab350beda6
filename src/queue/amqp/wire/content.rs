//! Deliveries on their way from the socket to the consumers that wait for them.
//!
//! They do not pass lapin, which would copy each of them through three threads: half of all that a
//! delivered event would cost. Everything else of a consumer is lapin's: its begin, its end, its acks,
//! and the end of its channel.

use std::{
    collections::{HashMap, VecDeque},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use futures_util::Stream as _;
use lapin::{
    BasicProperties, Channel,
    message::Delivery,
    options::BasicConsumeOptions,
    protocol::basic,
    types::{FieldTable, ShortString},
};

use crate::queue::amqp::broker_error::{BrokerError, answer};

/// A message that the broker has delivered.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::queue::amqp) struct Arrival {
    pub(in crate::queue::amqp) tag: u64,
    pub(in crate::queue::amqp) redelivered: bool,
    /// They are large, and an arrival is moved a few times.
    pub(in crate::queue::amqp) properties: Box<BasicProperties>,
    pub(in crate::queue::amqp) body: Bytes,
}

impl From<Delivery> for Arrival {
    fn from(d: Delivery) -> Self {
        let Delivery { delivery_tag: tag, redelivered, properties, data, .. } = d;
        Self { tag, redelivered, properties: Box::new(properties), body: data.into() }
    }
}

/// Bytes of a body for which there is room before any of them is there.
const BELIEVED: u64 = 1 << 20;

/// A consumer's channel and tag.
type Address = (u16, Vec<u8>);

type ByAddress = HashMap<Address, Arc<Inbox>>;

/// The consumers of a connection that take their deliveries themselves.
#[derive(Debug, Clone, Default)]
pub(in crate::queue::amqp) struct Inboxes(Arc<Mutex<ByAddress>>);

impl Inboxes {
    fn lock(&self) -> MutexGuard<'_, ByAddress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The inbox of a consumer that begins now.
    pub(in crate::queue::amqp) fn open(&self, channel: u16, tag: &str) -> Opened {
        let inbox = Arc::new(Inbox::default());
        let address = (channel, tag.as_bytes().to_vec());
        self.lock().insert(address.clone(), inbox.clone());
        Opened { inboxes: self.clone(), address, inbox }
    }
}

/// An inbox of a consumer; what comes after it is dropped is lapin's.
#[derive(Debug)]
pub(in crate::queue::amqp) struct Opened {
    inboxes: Inboxes,
    address: Address,
    inbox: Arc<Inbox>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.inbox.close();
        self.inboxes.lock().remove(&self.address);
    }
}

impl Opened {
    /// Takes everything that has arrived, or has `cx` woken when something does.
    fn poll(&self, into: &mut VecDeque<Arrival>, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let mut state = self.inbox.lock();
        if !state.arrived.is_empty() {
            *into = std::mem::take(&mut state.arrived);
            return Poll::Ready(Ok(()));
        }
        if state.broken {
            return Poll::Ready(Err(Broken));
        }
        if !state.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Everything that has arrived, and whether a delivery was broken off.
    #[cfg(any(test, fuzzing))]
    pub(in crate::queue::amqp) fn take_arrived(&self) -> (Vec<Arrival>, bool) {
        let mut state = self.inbox.lock();
        (state.arrived.drain(..).collect(), state.broken)
    }
}

/// A delivery was broken off: the broker speaks another protocol than it did.
#[derive(Debug)]
struct Broken;

/// As many messages at most as its consumer's prefetch.
#[derive(Debug, Default)]
struct Inbox {
    state: Mutex<State>,
    /// Set under the lock.
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    arrived: VecDeque<Arrival>,
    broken: bool,
    waker: Option<Waker>,
}

impl Inbox {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody takes from it any more, so it keeps nothing.
    fn close(&self) {
        let mut state = self.lock();
        self.closed.store(true, Ordering::Relaxed);
        state.arrived = VecDeque::new();
        state.waker = None;
    }

    fn push(&self, arrived: &mut VecDeque<Arrival>) {
        self.change(|state| {
            if self.closed.load(Ordering::Relaxed) {
                arrived.clear();
            } else if state.arrived.is_empty() {
                state.arrived = std::mem::take(arrived);
            } else {
                state.arrived.append(arrived);
            }
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let waker = {
            let mut state = self.lock();
            change(&mut state);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A message of which not everything is there.
#[derive(Debug)]
struct Partial {
    channel: u16,
    inbox: Arc<Inbox>,
    tag: u64,
    redelivered: bool,
    /// Once its header has come.
    head: Option<(Box<BasicProperties>, u64)>,
    body: Vec<u8>,
}

/// The messages that come over a connection, in the order of their frames.
#[derive(Debug)]
pub(super) struct Contents {
    inboxes: Inboxes,
    /// That of the latest delivery: the next one is mostly for the same.
    latest: Option<(Address, Arc<Inbox>)>,
    /// At most one of a channel.
    partial: Vec<Partial>,
    /// What is complete and not handed over, all for one inbox.
    ready: VecDeque<Arrival>,
    ready_for: Option<Arc<Inbox>>,
    /// There has been a delivery for one of the consumers.
    pub(super) has_taken: bool,
}

impl Contents {
    pub(super) const fn new(inboxes: Inboxes) -> Self {
        Self {
            inboxes,
            latest: None,
            partial: Vec::new(),
            ready: VecDeque::new(),
            ready_for: None,
            has_taken: false,
        }
    }

    /// Whether a method is a delivery for one of the consumers; its content follows.
    pub(super) fn method(&mut self, channel: u16, payload: &[u8]) -> bool {
        if payload.starts_with(CHANNEL_CLOSE) {
            // lapin says why the consumer ends.
            self.partial.retain(|partial| partial.channel != channel);
        }
        self.broken(channel);
        let Some((consumer, tag, redelivered)) = delivery(payload) else { return false };
        let Some(inbox) = self.inbox(channel, consumer) else { return false };
        self.has_taken = true;
        self.partial.push(Partial {
            channel,
            inbox,
            tag,
            redelivered,
            head: None,
            body: Vec::new(),
        });
        true
    }

    /// Whether a content header, which is harmless by now, belongs to a delivery.
    pub(super) fn header(&mut self, channel: u16, payload: &[u8]) -> bool {
        let Some(at) = self.at(channel) else { return false };
        let partial = &mut self.partial[at];
        let (true, Some((fixed, properties))) =
            (partial.head.is_none(), payload.split_at_checked(FIXED))
        else {
            self.broken(channel);
            return true;
        };
        let mut size = [0; 8];
        size.copy_from_slice(&fixed[FIXED - 8..]);
        let size = u64::from_be_bytes(size);
        // What cannot be read is left out, and the event is judged by its body.
        let properties = basic::parse_properties(properties).map(|(_, p)| p).unwrap_or_default();
        partial.head = Some((Box::new(properties), size));
        partial.body.reserve_exact(usize::try_from(size.min(BELIEVED)).unwrap_or(0));
        self.complete(at);
        true
    }

    /// Whether the next body on a channel belongs to a delivery.
    pub(super) fn awaits_body(&self, channel: u16) -> bool {
        self.at(channel).is_some()
    }

    /// Adds a part of a body.
    pub(super) fn body(&mut self, channel: u16, bytes: &[u8]) {
        let Some(at) = self.at(channel) else { return };
        let partial = &mut self.partial[at];
        let length = (partial.body.len() + bytes.len()) as u64;
        if partial.head.as_ref().is_none_or(|(_, size)| length > *size) {
            return self.broken(channel);
        }
        partial.body.extend_from_slice(bytes);
    }

    /// A part of a body has come whole.
    pub(super) fn body_ended(&mut self, channel: u16) {
        if let Some(at) = self.at(channel) {
            self.complete(at);
        }
    }

    /// A frame came that cannot follow what came before: what is missing of a message will not come.
    pub(super) fn broken(&mut self, channel: u16) {
        if let Some(at) = self.at(channel) {
            self.deliver(); // what was complete before it
            let partial = self.partial.swap_remove(at);
            partial.inbox.change(|state| state.broken = true);
        }
    }

    /// Nothing that comes belongs to a message any more.
    pub(super) fn all_broken(&mut self) {
        while let Some(channel) = self.partial.first().map(|partial| partial.channel) {
            self.broken(channel);
        }
    }

    /// Hands over what is complete.
    pub(super) fn deliver(&mut self) {
        if let Some(inbox) = self.ready_for.take() {
            inbox.push(&mut self.ready);
        }
    }

    fn at(&self, channel: u16) -> Option<usize> {
        self.partial.iter().position(|partial| partial.channel == channel)
    }

    fn complete(&mut self, at: usize) {
        let Partial { head: Some((_, size)), body, .. } = &self.partial[at] else { return };
        if body.len() as u64 != *size {
            return;
        }
        let Partial { inbox, tag, redelivered, head, mut body, .. } = self.partial.swap_remove(at);
        body.shrink_to_fit(); // it has grown if it is longer than was believed
        if !self.ready_for.as_ref().is_some_and(|ready| Arc::ptr_eq(ready, &inbox)) {
            self.deliver();
            self.ready_for = Some(inbox);
        }
        let (properties, _) = head.unwrap_or_default();
        self.ready.push_back(Arrival { tag, redelivered, properties, body: body.into() });
    }

    fn inbox(&mut self, channel: u16, consumer: &[u8]) -> Option<Arc<Inbox>> {
        if let Some(((of, tag), inbox)) = &self.latest
            && *of == channel
            && tag == consumer
            && !inbox.closed.load(Ordering::Relaxed)
        {
            return Some(inbox.clone());
        }
        let address = (channel, consumer.to_vec());
        let inbox = self.inboxes.lock().get(&address)?.clone();
        self.latest = Some((address, inbox.clone()));
        Some(inbox)
    }
}

/// The beginning of a method that is `channel.close`.
const CHANNEL_CLOSE: &[u8] = &[0, 20, 0, 40];

/// Bytes of a content header before the properties: class, weight, and the size of the body.
const FIXED: usize = 12;

/// The consumer's tag, the number and whether it is a redelivery, of a method that is
/// `basic.deliver`.
pub(in crate::queue::amqp) fn delivery(payload: &[u8]) -> Option<(&[u8], u64, bool)> {
    let rest = payload.strip_prefix(&[0, 60, 0, 60])?;
    let (length, rest) = rest.split_first()?;
    let (consumer, rest) = rest.split_at_checked((*length).into())?;
    let (tag, rest) = rest.split_first_chunk()?;
    Some((consumer, u64::from_be_bytes(*tag), *rest.first()? != 0))
}

/// A consumer that takes its deliveries from the socket.
pub(in crate::queue::amqp) struct Consumer {
    opened: Opened,
    /// Says when it ends.
    consumer: lapin::Consumer,
    taken: VecDeque<Arrival>,
    /// How it has ended.
    end: Option<Option<BrokerError>>,
}

/// The tags of consumers, which are not used twice.
static TAGS: AtomicU64 = AtomicU64::new(1);

impl Consumer {
    pub(in crate::queue::amqp) async fn begin(
        channel: &Channel,
        inboxes: &Inboxes,
        queue: &str,
    ) -> Result<Self, BrokerError> {
        // Known before the broker answers: deliveries may come with its answer.
        // The broker requeues in the order of the tags what several consumers of a channel have.
        let tag = format!("hooktrail-{:020}", TAGS.fetch_add(1, Ordering::Relaxed));
        let opened = inboxes.open(channel.id(), &tag);
        let consumer = answer(channel.basic_consume(
            queue.into(),
            tag.into(),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        ))
        .await?;
        Ok(Self { opened, consumer, taken: VecDeque::new(), end: None })
    }

    pub(in crate::queue::amqp) fn tag(&self) -> ShortString {
        self.consumer.tag()
    }

    /// The next delivery; `None` if the broker has cancelled the consumer.
    pub(in crate::queue::amqp) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Arrival, BrokerError>>> {
        loop {
            if let Some(arrival) = self.taken.pop_front() {
                return Poll::Ready(Some(Ok(arrival)));
            }
            self.taken = VecDeque::new(); // room for many is not kept: there are thousands of consumers
            match self.opened.poll(&mut self.taken, cx) {
                Poll::Ready(Ok(())) => continue,
                Poll::Ready(Err(Broken)) => {
                    return Poll::Ready(Some(Err(BrokerError {
                        code: None,
                        silent: false,
                        text: "a delivery was broken off".to_owned(),
                    })));
                }
                Poll::Pending => {}
            }
            if let Some(end) = self.end.take() {
                return Poll::Ready(end.map(Err));
            }
            match ready!(Pin::new(&mut self.consumer).poll_next(cx)) {
                // One that came before the inbox was open, which the broker cannot send.
                Some(Ok(delivery)) => return Poll::Ready(Some(Ok(delivery.into()))),
                // lapin gets an end after the inbox has what came before it: that is first.
                Some(Err(e)) => self.end = Some(Some(BrokerError::from(e))),
                None => self.end = Some(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::filter::Filter, *};
    use crate::queue::amqp::fuzzing::sorted;

    fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("short");
        let [high, low] = channel.to_be_bytes();
        [&[kind, high, low], &length.to_be_bytes()[..], payload, &[0xce]].concat()
    }

    fn deliver(channel: u16, consumer: &str, tag: u64, redelivered: bool) -> Vec<u8> {
        let short =
            |text: &str| [&[u8::try_from(text.len()).expect("short")], text.as_bytes()].concat();
        let fixed = [&tag.to_be_bytes()[..], &[redelivered.into()]].concat();
        let payload =
            [&[0, 60, 0, 60], &short(consumer)[..], &fixed, &short("x"), &short("k")].concat();
        frame(1, channel, &payload)
    }

    /// With a message id.
    fn header(channel: u16, size: u64) -> Vec<u8> {
        let payload = [&[0, 60, 0, 0], &size.to_be_bytes()[..], &[0, 0x80, 2], b"id"].concat();
        frame(2, channel, &payload)
    }

    fn body(channel: u16, bytes: &[u8]) -> Vec<u8> {
        frame(3, channel, bytes)
    }

    /// Any method but a delivery: `basic.ack`.
    fn method(channel: u16) -> Vec<u8> {
        frame(1, channel, &[0, 60, 0, 80, 0, 0, 0, 0, 0, 0, 0, 1, 0])
    }

    #[test]
    fn deliveries_go_to_their_consumers_and_everything_else_to_lapin() {
        let heartbeat = frame(8, 0, &[]);
        let foreign = [deliver(3, "a", 1, false), header(3, 3), body(3, b"for"), body(3, b"")];
        let stream = [
            method(1),
            deliver(1, "a", 1, false),
            header(1, 5),
            // Between the frames of one content may stand those of other channels.
            deliver(2, "a", 7, true),
            heartbeat.clone(),
            body(1, b"he"),
            header(2, 0),
            method(3),
            body(1, b""),
            body(1, b"llo"),
            foreign.concat(),
            deliver(1, "b", 2, false),
            header(1, 1),
            body(1, b"!"),
        ]
        .concat();
        let arrival = |tag, redelivered, body: &'static [u8]| Arrival {
            tag,
            redelivered,
            properties: Box::new(BasicProperties::default().with_message_id("id".into())),
            body: Bytes::from_static(body),
        };
        for pieces in [&[usize::MAX][..], &[1], &[7, 2, 40]] {
            let found = sorted(4096, &[(1, "a"), (2, "a"), (1, "b")], &stream, pieces);
            assert_eq!(
                found.taken,
                [
                    (vec![arrival(1, false, b"hello")], false),
                    (vec![arrival(7, true, b"")], false),
                    (vec![arrival(2, false, b"!")], false),
                ]
            );
            let rest = [method(1), heartbeat.clone(), method(3), foreign.concat()].concat();
            assert_eq!(found.for_lapin, rest);
        }
    }

    #[test]
    fn a_delivery_that_is_broken_off_ends_its_consumer_and_no_other() {
        let begun = [deliver(1, "a", 1, false), header(1, 3), body(1, b"ab")].concat();
        let whole = [deliver(2, "a", 4, false), header(2, 1), body(2, b"x")].concat();
        let wrong_end = {
            let mut frame = body(1, b"c");
            *frame.last_mut().expect("its end") = 0;
            frame
        };
        // What came whole before it, in the same read, arrives.
        let both = [&deliver(1, "a", 8, false), &header(1, 0), &begun[..], &method(1)].concat();
        let found = sorted(4096, &[(1, "a")], &both, &[usize::MAX]);
        assert_eq!((found.taken[0].0.len(), found.taken[0].1), (1, true));
        // Of a channel that is closed lapin says why.
        let closed = frame(1, 1, &[0, 20, 0, 40, 1, 64, 0, 0, 60, 0, 60]);
        let found = sorted(4096, &[(1, "a")], &[&begun[..], &closed].concat(), &[5]);
        assert_eq!((&found.taken[0], found.for_lapin), (&(vec![], false), closed));
        for (what, next) in [
            ("another delivery", deliver(1, "a", 2, false)),
            ("a method", method(1)),
            ("a second header", header(1, 3)),
            ("a body that is too long", body(1, b"cd")),
            ("a header without a size", frame(2, 1, &[0, 60, 0, 0])),
            ("a frame without an end", wrong_end),
            ("no frame", vec![9, 0, 1, 0, 0, 0, 0, 0xce]),
        ] {
            let stream = [&whole[..], &begun, &next].concat();
            let found = sorted(4096, &[(1, "a"), (2, "a")], &stream, &[5]);
            assert_eq!(found.taken[0], (vec![], true), "{what}");
            assert_eq!((found.taken[1].0.len(), found.taken[1].1), (1, false), "{what}");
        }
        let whole = [&begun[..], &body(1, b"c")].concat();
        let found = sorted(4096, &[(1, "a"), (2, "a")], &whole, &[5]);
        assert_eq!(
            (found.taken[0].0.len(), found.taken[0].1),
            (1, false),
            "but for that it arrives"
        );
    }

    #[test]
    fn what_comes_for_a_consumer_that_is_gone_is_for_lapin() {
        let inboxes = Inboxes::default();
        let (gone, there) = (inboxes.open(1, "a"), inboxes.open(1, "b"));
        let mut filter = Filter::new(4096).serving(inboxes);
        let mut feed = |bytes: &[u8]| {
            filter.room()[..bytes.len()].copy_from_slice(bytes);
            filter.filled(bytes.len());
            filter.take_rest()
        };
        let message = |consumer| [deliver(1, consumer, 1, false), header(1, 0)].concat();
        assert_eq!(feed(&message("a")), b""[..]);
        assert_eq!(feed(&message("b")), b""[..]);
        drop(gone);
        assert_eq!(feed(&message("b")), b""[..]);
        assert_eq!(feed(&message("a")), message("a"));
        // It goes while a message for it is under way, of which lapin has not seen the beginning.
        assert_eq!(there.take_arrived().0.len(), 2);
        let begun = [deliver(1, "b", 3, false), header(1, 2)].concat();
        assert_eq!(feed(&begun), b""[..]);
        drop(there);
        assert_eq!(feed(&body(1, b"ab")), b""[..]);
        assert_eq!(feed(&message("b")), message("b"));
    }
}
