//! A time in which something fails that is tried again: logged when it begins and when it ends, not
//! at each try.

use std::{collections::BTreeSet, fmt, time::Duration};

use tokio::sync::watch;

use super::troubles::{Harms, Troubles};
use crate::policy::retry::Backoff;

/// Reasons of one outage that are logged; the ones after these are not.
const MAX_REASONS: usize = 5;

/// Knows which reasons of an outage were logged.
#[derive(Debug, Default)]
pub struct Outage {
    reasons: BTreeSet<String>,
}

/// What a failure adds to an outage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// The outage begins with it.
    First,
    /// It has a reason that the outage did not have before.
    OtherReason,
    Known,
}

impl Outage {
    /// Something has failed, for this reason.
    pub fn failed(&mut self, why: &str) -> News {
        let is_first = self.reasons.is_empty();
        if self.reasons.len() >= MAX_REASONS || !self.reasons.insert(why.to_owned()) {
            News::Known
        } else if is_first {
            News::First
        } else {
            News::OtherReason
        }
    }

    pub fn is_open(&self) -> bool {
        !self.reasons.is_empty()
    }

    /// Ends the outage; returns whether there was one.
    pub fn end(&mut self) -> bool {
        let was_open = self.is_open();
        self.reasons.clear();
        was_open
    }
}

/// The outage of something that is retried indefinitely, with a backoff: logged, and reported among
/// the [`Troubles`] as long as it lasts.
#[derive(Debug)]
pub struct ReportedOutage {
    what: String,
    outage: Outage,
    backoff: Backoff,
    harms: Harms,
    troubles: watch::Sender<Troubles>,
}

impl ReportedOutage {
    /// `what` is the grammatical subject of the log lines.
    pub fn new(what: impl Into<String>, harms: Harms, troubles: &watch::Sender<Troubles>) -> Self {
        let backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let outage = Outage::default();
        Self { what: what.into(), outage, backoff, harms, troubles: troubles.clone() }
    }

    /// Logs and reports a failure, and waits until the next try.
    pub async fn failed(&mut self, why: &(dyn fmt::Display + Sync)) {
        self.fails(why);
        tokio::time::sleep(self.backoff.grow()).await;
    }

    /// Logs and reports a failure, without the wait.
    pub fn fails(&mut self, why: &(dyn fmt::Display + Sync)) {
        let why = why.to_string();
        match self.outage.failed(&why) {
            News::First => {
                tracing::warn!(error = %why, "{} fails; it is retried indefinitely", self.what)
            }
            News::OtherReason | News::Known => {
                tracing::debug!(error = %why, "{} still fails", self.what)
            }
        }
        self.troubles.send_if_modified(|all| all.begins(&self.what, self.harms.clone(), why));
    }

    /// A try has succeeded.
    pub fn recovered(&mut self) {
        self.backoff.reset();
        if self.end() {
            tracing::info!("{} works again", self.what);
        }
    }

    /// Ends the outage without a log line: nothing is tried any more. Returns whether there was
    /// one.
    pub fn end(&mut self) -> bool {
        let ended = self.outage.end();
        if ended {
            self.troubles.send_if_modified(|all| all.ends(&self.what));
        }
        ended
    }
}

impl Drop for ReportedOutage {
    /// A failure of something that is not tried any more is no trouble.
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_of_an_outage_counts_once_until_it_ends() {
        let mut outage = Outage::default();
        for (why, expected) in [
            ("reset", News::First),
            ("refused", News::OtherReason),
            ("refused", News::Known),
            ("reset", News::Known),
            ("broken", News::OtherReason),
        ] {
            assert_eq!(outage.failed(why), expected, "{why}");
        }
        assert!(outage.is_open() && outage.end() && !outage.end());
        assert_eq!(outage.failed("reset"), News::First);
        for n in 0..2 * MAX_REASONS {
            let expected = if n + 1 < MAX_REASONS { News::OtherReason } else { News::Known };
            assert_eq!(outage.failed(&n.to_string()), expected, "reason {n}");
        }
    }

    #[test]
    fn a_reported_outage_is_a_trouble_until_it_recovers_or_is_given_up() {
        let troubles = watch::Sender::default();
        let mut outage = ReportedOutage::new("the relay", Harms::Queue, &troubles);
        outage.fails(&"refused");
        assert_eq!(troubles.borrow().of_queue().as_deref(), Some("refused"));
        outage.fails(&"gone");
        assert_eq!(troubles.borrow().of_queue().as_deref(), Some("gone"), "the latest reason");
        outage.recovered();
        assert_eq!(troubles.borrow().of_queue(), None);
        outage.fails(&"refused");
        drop(outage);
        assert_eq!(troubles.borrow().of_queue(), None);
    }
}
