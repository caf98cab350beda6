//! The consumers of one queue on one channel, of which the broker lets the first take.
//!
//! A consumer's prefetch cannot be changed, only that of the next one. Of a queue with a single active
//! consumer another daemon's waits as well, and a cancelled consumer gives way to the one that has
//! waited longest. So those with a larger prefetch wait from the beginning, before any other daemon's:
//! the prefetch grows, and the queue stays here.

use std::{
    collections::VecDeque,
    future::poll_fn,
    task::{Context, Poll},
};

use futures_util::{FutureExt as _, StreamExt as _};
use lapin::{
    Consumer,
    message::Delivery,
    options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions},
    types::FieldTable,
};

use super::{
    broker_error::{BrokerError, answer},
    pool::Lease,
    prefetch::{Sizes, is_other},
    unusable::Unusable,
};
use crate::queue::MAX_GROUP;

/// The prefetches between the first and the largest. [`Sizes`] allow at most eight times what they
/// have seen; and a larger one than the largest group is never exhausted by one.
const STEPS: [u16; 2] = [128, MAX_GROUP as u16];

/// Whether other consumers may wait for the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sharing {
    /// One of all its consumers is active.
    SingleActive,
    /// No other consumer is allowed.
    Exclusive,
}

pub(super) struct Line {
    pub(super) lease: Lease,
    queue: String,
    sharing: Sharing,
    /// The largest prefetch.
    most: u16,
    consumers: VecDeque<(Consumer, u16)>,
    /// The first consumer is cancelled; what was delivered to it is still to be taken.
    is_cancelled: bool,
}

impl Line {
    pub(super) async fn open(
        lease: Lease,
        queue: String,
        sharing: Sharing,
        most: u16,
        sizes: &Sizes,
    ) -> Result<Self, Unusable> {
        let consumers = VecDeque::new();
        let mut line = Self { lease, queue, sharing, most, consumers, is_cancelled: false };
        line.begin(sizes).await?;
        Ok(line)
    }

    /// Begins to consume, where no consumer is left.
    pub(super) async fn begin(&mut self, sizes: &Sizes) -> Result<(), Unusable> {
        for prefetch in prefetches(sizes.allow(self.most), self.most, self.sharing) {
            let options = BasicConsumeOptions {
                exclusive: self.sharing == Sharing::Exclusive,
                ..BasicConsumeOptions::default()
            };
            let channel = &self.lease.channel;
            let consume = async {
                channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
                let queue = self.queue.as_str().into();
                channel.basic_consume(queue, "".into(), options, FieldTable::default()).await
            };
            match answer(consume).await {
                Ok(consumer) => self.consumers.push_back((consumer, prefetch)),
                Err(why) => return Err(Unusable { queue: self.queue.clone(), why }),
            }
        }
        Ok(())
    }

    /// The next delivery; `None` where no consumer is left, and others have to [begin](Self::begin).
    /// Loses none if it is dropped while it waits.
    ///
    /// # Errors
    /// The consumer ended; or another one of the line was let in, as a cluster does whose nodes had
    /// lost each other: what that has taken comes again once the channel is closed.
    pub(super) async fn next(&mut self) -> Result<Option<Delivery>, BrokerError> {
        while !self.consumers.is_empty() {
            match poll_fn(|context| self.poll_first(context)).await? {
                Some(delivery) => return delivery.map(Some).map_err(BrokerError::from),
                None if self.is_cancelled => {
                    self.consumers.pop_front();
                    self.is_cancelled = false;
                }
                None => {
                    return Err(lost("the broker cancelled its consumer: it was deleted or moved"));
                }
            }
        }
        Ok(None)
    }

    fn poll_first(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<lapin::Result<Delivery>>, BrokerError>> {
        let mut consumers = self.consumers.iter_mut();
        if let Some((first, _)) = consumers.next()
            && let Poll::Ready(next) = first.poll_next_unpin(context)
        {
            return Poll::Ready(Ok(next));
        }
        for (waiting, _) in consumers {
            if waiting.poll_next_unpin(context).is_ready() {
                return Poll::Ready(Err(lost("the broker let another consumer of this daemon in")));
            }
        }
        Poll::Pending
    }

    /// The most messages that the first consumer may have unacked.
    pub(super) fn prefetch(&self) -> usize {
        self.consumers.front().map_or(0, |(_, prefetch)| usize::from(*prefetch))
    }

    /// Gives way to a consumer with the prefetch that the sizes of the messages allow now, if that is
    /// much more or less. `unacked`: messages that were taken, and all before them are acked.
    ///
    /// To a larger one only when the prefetch is exhausted: messages on their way are requeued, and
    /// come behind later ones. To a smaller one at once: memory comes before their order.
    pub(super) async fn fit(&mut self, sizes: &Sizes, unacked: usize) -> Result<(), BrokerError> {
        let allowed = sizes.allow(self.most);
        let Some((_, now)) = self.consumers.front().filter(|_| !self.is_cancelled) else {
            return Ok(());
        };
        let grows = unacked >= usize::from(*now);
        let waiting = self.consumers.get(1).map(|(_, prefetch)| *prefetch);
        let leaving = match waiting {
            _ if is_other(*now, allowed, self.most) && allowed < *now => self.consumers.len(),
            Some(next) if grows && allowed >= next => 1,
            None if grows && is_other(*now, allowed, self.most) => 1,
            _ => return Ok(()),
        };
        // The last one first, so that none of them is let in.
        for n in (0..leaving).rev() {
            let tag = self.consumers[n].0.tag();
            answer(self.lease.channel.basic_cancel(tag, BasicCancelOptions::default())).await?;
            let left = if n > 0 { self.consumers.remove(n) } else { None };
            // Its messages would be acked with later ones.
            if let Some((mut waited, _)) = left
                && waited.next().now_or_never().flatten().is_some()
            {
                return Err(lost("the broker let another consumer of this daemon in"));
            }
        }
        self.is_cancelled = true;
        Ok(())
    }

    /// Requeues what is not acked.
    pub(super) async fn close(self) {
        if let Err(why) = answer(self.lease.channel.close(200, "requeued".into())).await {
            tracing::debug!(queue = self.queue, error = %why, "the channel was gone before it was closed");
        }
    }
}

fn lost(text: &str) -> BrokerError {
    BrokerError { code: None, silent: false, text: text.to_owned() }
}

/// The prefetches of the consumers, in their order.
fn prefetches(first: u16, most: u16, sharing: Sharing) -> Vec<u16> {
    let larger = STEPS.into_iter().chain([most]).filter(|p| *p > first && *p <= most);
    match sharing {
        Sharing::SingleActive => std::iter::once(first).chain(larger).collect(),
        Sharing::Exclusive => vec![first],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn larger_prefetches_wait_from_the_beginning_unless_the_consumer_is_alone() {
        use Sharing::{Exclusive, SingleActive};
        assert_eq!(prefetches(16, 5000, SingleActive), [16, 128, 1000, 5000]);
        assert_eq!(prefetches(300, 5000, SingleActive), [300, 1000, 5000]);
        assert_eq!(prefetches(5000, 5000, SingleActive), [5000]);
        assert_eq!(prefetches(16, 100, SingleActive), [16, 100]);
        assert_eq!(prefetches(16, 5000, Exclusive), [16]);
    }
}
