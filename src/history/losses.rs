//! Changes of deliveries that were dropped, until the store has their gap.

use std::time::{Duration, Instant, SystemTime};

use crate::{clock, store::Gap};

/// What a [`Gap`] of deliveries lacks, and the label of the metric.
pub(super) const WHAT: &str = "deliveries";

/// The time without a loss after which a gap is over.
pub(super) const QUIET: Duration = Duration::from_secs(5);

/// The time of losses after which they are recorded, although they go on.
const LONG_GAP: Duration = Duration::from_secs(5 * 60);

/// Changes that were dropped and are in no gap of the store yet.
#[derive(Debug, Default)]
pub(super) struct Losses {
    pub(super) span: Option<(SystemTime, SystemTime)>,
    number: u64,
    /// When the last of them was dropped.
    last: Option<Instant>,
    /// Why the store took none; `None` if it was only too slow.
    pub(super) outage: Option<String>,
}

impl Losses {
    pub(super) fn add(&mut self, from: SystemTime, until: SystemTime, number: u64) {
        let (first, last) = self.span.unwrap_or((from, until));
        self.span = Some((first.min(from), last.max(until)));
        self.number += number;
        self.last = Some(clock::instant());
    }

    /// The store takes changes.
    pub(super) fn works(&mut self) {
        // What is lost from now on has another reason.
        self.outage = self.outage.take().filter(|_| self.span.is_some());
    }

    /// The gap that is to be recorded now. `end`: no more losses follow.
    pub(super) fn take(&mut self, end: bool) -> Option<Gap> {
        let (from, until) = self.span?;
        let is_over = self.last.is_none_or(|last| clock::instant() - last >= QUIET);
        let is_long = until.duration_since(from).is_ok_and(|long| long >= LONG_GAP);
        if !(end || is_over || is_long) {
            return None;
        }
        let why = match self.outage.take() {
            Some(why) => format!("the store did not take them: {why}"),
            None => "there were more than the store took".to_owned(),
        };
        self.span = None;
        let missing = Some(std::mem::take(&mut self.number));
        Some(Gap { from, until, what: WHAT, why, missing })
    }

    /// Takes back a gap that could not be recorded.
    pub(super) fn put_back(&mut self, gap: Gap, why: String) {
        let (first, last) = self.span.unwrap_or((gap.from, gap.until));
        self.span = Some((first.min(gap.from), last.max(gap.until)));
        self.number += gap.missing.unwrap_or_default();
        self.last = Some(clock::instant());
        self.outage = Some(why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn losses_are_one_gap_until_they_are_over_or_last_for_long() {
        let mut losses = Losses::default();
        assert_eq!(losses.take(true), None);
        losses.add(NOW + SECOND, NOW + SECOND, 1);
        losses.add(NOW, NOW + 2 * SECOND, 3);
        assert_eq!(losses.take(false), None, "more may follow");
        losses.outage = Some("the disk is full".to_owned());
        let gap = losses.take(true).expect("a gap");
        assert_eq!((gap.from, gap.until, gap.missing), (NOW, NOW + 2 * SECOND, Some(4)));
        assert!(gap.why.contains("the disk is full"), "{}", gap.why);
        losses.put_back(gap, "away".to_owned());
        losses.add(NOW, NOW + LONG_GAP, 1);
        let gap = losses.take(false).expect("it lasts for long");
        assert_eq!((gap.from, gap.until, gap.missing), (NOW, NOW + LONG_GAP, Some(5)));
        assert_eq!(losses.take(true), None);
    }
}
