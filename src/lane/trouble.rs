//! Logs that the queue of a lane fails, and why.

use std::{collections::BTreeSet, fmt};

use crate::{delivery::SubscriberName, telemetry::status::LaneStatus};

/// Logs when the queue fails, when it fails for another reason, and when it works again, not each
/// try. That it can be opened does not mean that it works: some queues open each time and fail at
/// the first use.
#[derive(Debug)]
pub(super) struct Trouble {
    subscriber: SubscriberName,
    /// The reasons that were logged since it works no more.
    logged: BTreeSet<String>,
    status: LaneStatus,
}

/// More reasons than these are not logged.
const REASONS: usize = 5;

impl Trouble {
    pub(super) fn new(subscriber: SubscriberName, status: LaneStatus) -> Self {
        Self { subscriber, logged: BTreeSet::new(), status }
    }

    pub(super) fn is(&mut self, why: &dyn fmt::Display) {
        let why = why.to_string();
        self.status.trouble(Some(why.clone()));
        let again = self.is_now();
        if self.logged.len() >= REASONS || !self.logged.insert(why.clone()) {
            tracing::debug!(subscriber = self.subscriber.as_str(), error = %why, "the lane's queue still fails");
        } else if again {
            // A broker that comes back may have lost the queue: that asks for something else than
            // the first reason did.
            tracing::warn!(subscriber = self.subscriber.as_str(), error = %why, "the lane's queue still fails");
        } else {
            tracing::warn!(subscriber = self.subscriber.as_str(), error = %why, "the lane lost its queue; it opens it again");
        }
    }

    pub(super) fn is_now(&self) -> bool {
        !self.logged.is_empty()
    }

    pub(super) fn is_over(&mut self) {
        if !std::mem::take(&mut self.logged).is_empty() {
            self.status.trouble(None);
            tracing::info!(subscriber = self.subscriber.as_str(), "the lane has its queue again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{metrics::Metrics, status::Board};
    use std::{
        sync::{Arc, Mutex},
        time::SystemTime,
    };

    #[test]
    fn each_reason_why_a_queue_fails_is_told_once_until_it_works_again() {
        let log = Arc::new(Mutex::new(Vec::new()));
        let writer = {
            let log = log.clone();
            move || -> Box<dyn std::io::Write> { Box::new(Shared(log.clone())) }
        };
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::INFO)
            .with_ansi(false)
            .with_writer(writer)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let status = Board::new(Metrics::new(SystemTime::UNIX_EPOCH)).lane(&"a".into());
            let mut trouble = Trouble::new("a".into(), status);
            for why in ["reset", "refused", "refused", "reset", "broken", "broken"] {
                trouble.is(&why);
            }
            trouble.is_over();
            trouble.is(&"reset");
        });
        let log = String::from_utf8(log.lock().expect("no panic").clone()).expect("text");
        let told: Vec<&str> = log.lines().filter_map(|l| l.split("error=").nth(1)).collect();
        assert_eq!(told, ["reset", "refused", "broken", "reset"], "{log}");
        assert_eq!(
            (log.matches("lost its queue").count(), log.matches("has its queue again").count()),
            (2, 1),
            "{log}"
        );
    }

    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("no panic").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
}
