//! The number of events that may be on their way to a lane: small until their sizes are known,
//! since a broker counts messages, not bytes.

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
}

impl Sizes {
    pub(super) fn saw(&mut self, bytes: usize) {
        if self.seen > 0 && self.seen.is_multiple_of(MEMORY) {
            self.largest = [0, self.largest[0]];
        }
        self.seen += 1;
        self.largest[0] = self.largest[0].max(bytes as u64);
    }

    /// The number of messages that may be unacked, at most `window`. If the next ones are as large
    /// as those before, that is at most [`MOST_BYTES`], or [`FEWEST`] messages.
    pub(super) fn allow(&self, window: u16) -> u16 {
        let largest = self.largest.iter().copied().max().unwrap_or(0).max(1);
        let most = (MOST_BYTES / largest).min(self.seen.saturating_mul(GROWTH)).max(FEWEST.into());
        u16::try_from(most).unwrap_or(u16::MAX).min(window)
    }
}

/// Whether a prefetch of `next` instead of `now` is worth another consumer.
pub(super) const fn is_other(now: u16, next: u16, window: u16) -> bool {
    next >= now.saturating_mul(2) || next <= now / 2 || (next == window && now < window)
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
