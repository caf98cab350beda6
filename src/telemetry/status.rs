//! The state of lanes and queue: for `/metrics`, for `hooktrail status`, for the API.
//!
//! A lane reports its events to its [`LaneReporter`]; the [`Board`] has a [`View`] of each lane. The
//! figures are this daemon's own: several daemons on the same queues know their own work each. One
//! word goes the other way: an operator requests a retry now ([`Board::request_retry`]).

mod hour;
mod lane;
mod scheduled;
mod view;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{Notify, watch};

use self::lane::Moment;
pub use self::{
    hour::LastHour,
    lane::{LaneReporter, Observer},
    view::{LastError, State, View},
};
use crate::{
    delivery::{Depth, Depths, SubscriberName},
    telemetry::{
        metrics::{Exposition, Metrics},
        troubles::Troubles,
    },
};

/// Older depths are polled again on request. The request waits this long at most.
const MAX_DEPTHS_AGE: Duration = Duration::from_secs(1);

/// Everything that is known of the lanes and the queue. Clones are the same.
#[derive(Debug, Clone)]
pub struct Board(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    metrics: Metrics,
    observers: Arc<[Observer]>,
    lanes: Mutex<BTreeMap<SubscriberName, LaneReporter>>,
    depths: watch::Sender<Option<Polled>>,
    poll_wanted: Notify,
    troubles: Mutex<Option<watch::Receiver<Troubles>>>,
}

/// The result of the latest poll of the queues' depths.
#[derive(Debug, Clone)]
pub struct Polled {
    pub at: SystemTime,
    /// An error says why they could not be polled.
    pub depths: Result<Depths, String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Board {
    pub fn new(metrics: Metrics) -> Self {
        Self::observed(metrics, [])
    }

    /// A board whose lanes report each event to `observers` too, in their order.
    pub fn observed(metrics: Metrics, observers: impl Into<Arc<[Observer]>>) -> Self {
        Self(Arc::new(Inner {
            metrics,
            observers: observers.into(),
            lanes: Mutex::default(),
            depths: watch::Sender::default(),
            poll_wanted: Notify::new(),
            troubles: Mutex::default(),
        }))
    }

    pub fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    /// The reporter of a subscriber that is configured now.
    pub fn lane(&self, subscriber: &SubscriberName) -> LaneReporter {
        let new = || {
            let metrics = self.0.metrics.subscriber(subscriber);
            LaneReporter::new(subscriber.clone(), metrics, self.0.observers.clone())
        };
        lock(&self.0.lanes).entry(subscriber.clone()).or_insert_with(new).clone()
    }

    /// Has the lane try one batch as soon as it has none in flight, if the subscriber's circuit is
    /// open or its endpoint held; otherwise nothing follows.
    pub fn request_retry(&self, subscriber: &str) {
        if let Some(lane) = lock(&self.0.lanes).get(subscriber) {
            lane.request_retry();
        }
    }

    /// Forgets a subscriber that is not configured any more, after its lane has ended.
    pub fn forget(&self, subscriber: &str) {
        lock(&self.0.lanes).remove(subscriber);
        self.0.metrics.forget(subscriber);
    }

    /// Takes the queue's troubles from here on.
    pub fn follow(&self, troubles: watch::Receiver<Troubles>) {
        *lock(&self.0.troubles) = Some(troubles);
    }

    fn troubles(&self) -> Troubles {
        lock(&self.0.troubles)
            .as_ref()
            .map(|troubles| troubles.borrow().clone())
            .unwrap_or_default()
    }

    /// What is wrong with the queue: what it reports of itself, or else why it could not be polled.
    pub fn queue_error(&self) -> Option<String> {
        self.troubles()
            .of_queue()
            .or_else(|| self.0.depths.borrow().as_ref()?.depths.as_ref().err().cloned())
    }

    /// Why events do not come into history.
    pub fn history_error(&self) -> Option<String> {
        self.troubles().of_history().map(str::to_owned)
    }

    /// `now` and `time` are the same moment on the monotonic and the wall clock: durations are
    /// measured by the one, and points in time are shown by the other.
    pub fn view(&self, subscriber: &str, now: Instant, time: SystemTime) -> Option<View> {
        let lane = lock(&self.0.lanes).get(subscriber)?.clone();
        let mut view = lane.view(Moment { instant: now, time });
        // What the queue reports comes before what the lane has met, which may be an earlier error.
        if !matches!(view.state, State::Paused(_))
            && let Some(why) = self.troubles().of_subscriber(subscriber)
        {
            view.state = State::QueueFails(why.to_owned());
        }
        Some(view)
    }

    /// The batches of a subscriber that wait for an attempt, by the latest poll and by what this
    /// daemon has scheduled since.
    pub fn batches_waiting(&self, subscriber: &str, now: Instant, time: SystemTime) -> u64 {
        let scheduled = self.view(subscriber, now, time).map_or(0, |v| v.retries_scheduled as u64);
        let polled = self.0.depths.borrow();
        let depths = polled.as_ref().and_then(|polled| polled.depths.as_ref().ok());
        let depth = depths.and_then(|depths| depths.subscribers.get(subscriber));
        let Depth { retries, delayed, .. } = depth.copied().unwrap_or_default();
        retries + delayed.max(scheduled)
    }

    /// What a lane has done in the last hour.
    pub fn last_hour(&self, subscriber: &str, now: Instant) -> Option<LastHour> {
        let lane = lock(&self.0.lanes).get(subscriber)?.clone();
        Some(lane.last_hour(now))
    }

    /// All metrics in a format, as they are now.
    pub fn expose_as(&self, format: Exposition) -> String {
        let troubles = self.troubles();
        for (name, lane) in &*lock(&self.0.lanes) {
            lane.expose(troubles.of_subscriber(name).is_none());
        }
        self.metrics().expose_as(format)
    }

    /// The number of requests without an answer, of each subscriber that has any.
    pub fn in_flight(&self) -> BTreeMap<SubscriberName, usize> {
        let lanes = lock(&self.0.lanes);
        lanes
            .iter()
            .map(|(name, lane)| (name.clone(), lane.in_flight()))
            .filter(|(_, n)| *n > 0)
            .collect()
    }

    /// Takes the result of a poll of the queues.
    pub fn polled(&self, at: SystemTime, depths: Result<Depths, String>) {
        let lanes = lock(&self.0.lanes);
        // A lane without work reports nothing.
        lanes.values().for_each(|lane| lane.forget_missed(at));
        if let Ok(depths) = &depths {
            let metrics = &self.0.metrics;
            let of_each = || depths.subscribers.values().map(|d| d.delayed).sum();
            metrics.set_delayed_retries(depths.delayed.unwrap_or_else(of_each));
            metrics.set_orphans(depths.orphans);
            if let Some(messages) = depths.history {
                metrics.set_history_queue(messages);
            }
            metrics.set_removed(
                &depths
                    .removed
                    .iter()
                    .map(|(name, d)| (name.clone(), d.events + d.batches() + d.dead))
                    .collect(),
            );
            for (name, lane) in &*lanes {
                let Depth { events, retries, dead, .. } =
                    depths.subscribers.get(name).copied().unwrap_or_default();
                lane.metrics().set_queues([events, retries, dead]);
            }
        }
        self.0.depths.send_replace(Some(Polled { at, depths }));
    }

    /// The latest poll of the queues; a new one if the latest is old and a new one ends soon.
    pub async fn depths(&self, now: SystemTime) -> Option<Polled> {
        let mut depths = self.0.depths.subscribe();
        let polled = depths.borrow_and_update().clone();
        let is_old = |at: SystemTime| now.duration_since(at).is_ok_and(|age| age >= MAX_DEPTHS_AGE);
        if polled.is_some_and(|polled| is_old(polled.at)) {
            self.0.poll_wanted.notify_one();
            let _in_time = tokio::time::timeout(MAX_DEPTHS_AGE, depths.changed()).await.is_ok();
        }
        depths.borrow().clone()
    }

    /// Completes when the depths are asked for and are old.
    pub async fn poll_wanted(&self) {
        self.0.poll_wanted.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock,
        delivery::{Batch, BatchId, Disposition, Failure, FailureKind, Outcome, Pause},
        event::payload::Format,
        telemetry::{
            lane_event::{AttemptEnded, Circuit, LaneEvent, Settled},
            outage::News,
        },
    };

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn batch() -> Batch {
        Batch {
            id: BatchId::from("msg_1"),
            body: "{}".into(),
            format: Format::Json,
            events: 1,
            attempts: 1,
            first_attempt_at: None,
            traceparent: None,
            attempt_log: Default::default(),
            prints: None,
            replay: false,
        }
    }

    /// A lane, and the board with it, at a moment that tests move.
    struct Fixture {
        board: Board,
        lane: LaneReporter,
        now: Moment,
    }

    impl Fixture {
        fn new() -> Self {
            let board = Board::new(Metrics::new(SystemTime::UNIX_EPOCH));
            let lane = board.lane(&"a".into());
            Self { board, lane, now: Moment { instant: clock::instant(), time: clock::now() } }
        }

        fn after(&self, passed: Duration) -> Moment {
            Moment { instant: self.now.instant + passed, time: self.now.time + passed }
        }

        fn report(&self, event: &LaneEvent<'_>) {
            self.report_after(Duration::ZERO, event);
        }

        fn report_after(&self, passed: Duration, event: &LaneEvent<'_>) {
            self.lane.report_at(event, self.after(passed));
        }

        fn starts(&self, passed: Duration, number: u64, id: &str) {
            let batch = &Batch { id: BatchId::from(id), ..batch() };
            let event = LaneEvent::AttemptStarted { number, batch, sha256: None };
            self.report_after(passed, &event);
        }

        /// The attempt `number` ends; its outcome is that of an answer 200 or 503.
        fn ends(&self, passed: Duration, number: u64, accepted: bool, took: Duration) {
            let (outcome, disposition) = if accepted {
                (Outcome::Delivered { status: 200 }, Disposition::Delivered)
            } else {
                let failure = Failure::Status { status: 503, excerpt: String::new() };
                (Outcome::Retry { failure, retry_after: None }, Disposition::Retry { delay: took })
            };
            let batch = &batch();
            let outcome = &outcome;
            let shortened_from = None;
            let ended = AttemptEnded { number, batch, outcome, disposition, shortened_from, took };
            self.report_after(passed, &LaneEvent::AttemptEnded(ended));
        }

        fn view(&self, passed: Duration) -> View {
            let Moment { instant, time } = self.after(passed);
            self.board.view("a", instant, time).expect("it is there")
        }

        fn state(&self) -> State {
            self.view(Duration::ZERO).state
        }
    }

    #[test]
    fn the_state_is_what_an_operator_has_to_know_first() {
        let f = Fixture::new();
        let (now, time) = (Duration::ZERO, f.now.time);
        assert_eq!(f.state(), State::Ok);
        f.ends(now, 1, false, secs(1));
        assert_eq!(f.state(), State::Retrying);
        let is = |circuit, hold_until| LaneEvent::CircuitIs { circuit, hold_until };
        let hold = Some(time + secs(5));
        f.report(&is(Circuit::Closed, hold));
        assert_eq!(f.state(), State::Held { until: time + secs(5) });
        f.report(&is(Circuit::Open { until: time + secs(9) }, hold));
        assert_eq!(f.state(), State::CircuitOpen { until: time + secs(9) });
        f.report(&LaneEvent::QueueFailed { why: "gone", news: News::First });
        assert_eq!(f.state(), State::QueueFails("gone".to_owned()));
        let pause = Pause { why: "w".to_owned(), since: time, by: "operator".to_owned() };
        f.report(&LaneEvent::Paused { pause: &pause, known: false });
        assert_eq!(f.state(), State::Paused(pause));
        f.report(&LaneEvent::Resumed { by: "operator", paused_by: "operator" });
        f.report(&LaneEvent::QueueRestored);
        f.report(&is(Circuit::Closed, Some(time)));
        f.ends(now, 2, true, secs(1));
        assert_eq!(f.state(), State::Ok, "a hold ends at its time");
        let error =
            LastError { at: time, failure: FailureKind::Status, status: Some(503), cause: None };
        assert_eq!(f.view(now).last_error, Some(error), "the last error stays known");
        assert_eq!(f.board.view("b", f.now.instant, time), None);
    }

    #[test]
    fn a_request_without_an_answer_is_shown_unless_others_are_accepted() {
        let f = Fixture::new();
        let (state, time) = (|after| f.view(after).state, f.now.time);
        f.starts(secs(0), 1, "msg_1");
        assert_eq!(state(secs(4)), State::Ok);
        assert_eq!(state(secs(18)), State::Waiting { since: time });
        f.starts(secs(1), 2, "msg_2");
        assert_eq!(f.board.in_flight(), [("a".into(), 2)].into());
        f.ends(secs(2), 2, true, secs(1));
        assert_eq!(state(secs(18)), State::Ok, "others are accepted");
        f.report_after(
            secs(3),
            &LaneEvent::Unsent { number: 1, batch_id: &batch().id, why: "no port" },
        );
        assert_eq!(f.board.in_flight(), [].into(), "an unsent request is not in flight");
        f.starts(secs(20), 3, "msg_3");
        assert_eq!(state(secs(30)), State::Waiting { since: time + secs(20) });
        f.ends(secs(30), 3, false, secs(1));
        assert_eq!(state(secs(40)), State::Retrying, "the reason is known");
    }

    #[test]
    fn rates_and_percentiles_are_of_the_latest() {
        let f = Fixture::new();
        for n in 0..100 {
            f.ends(Duration::ZERO, n, n % 10 != 0, secs(n));
            let delivered = LaneEvent::Delivered { events: 3, lag: None, since_arrival: None };
            f.report_after(Duration::from_millis(n * 100), &delivered);
        }
        let view = f.view(secs(10));
        assert_eq!(
            (view.delivered, view.delivered_per_s_milli, view.success_milli),
            (300, 5000, Some(900))
        );
        assert_eq!((view.p50, view.p99), (Some(secs(49)), Some(secs(98))));
        let later = f.view(secs(1000));
        assert_eq!(
            (later.delivered, later.delivered_per_s_milli, later.success_milli, later.p50),
            (300, 0, None, None)
        );
    }

    #[test]
    fn the_oldest_event_is_unsettled_or_in_a_retry() {
        let f = Fixture::new();
        let (now, time) = (Duration::ZERO, f.now.time);
        let oldest = "hooktrail_oldest_event_timestamp_seconds{subscriber=\"a\"} 0";
        let has = |part: &str| f.board.metrics().expose().contains(part);
        let retry = |id: &str, delay, arrived_at| {
            let batches = vec![Batch { id: BatchId::from(id), ..batch() }];
            LaneEvent::Settled(Settled::Retries { batches, split: None, delay, arrived_at })
        };
        let unsettled =
            |events, oldest_arrived_at| LaneEvent::Unsettled { events, oldest_arrived_at };
        f.report(&unsettled(2, Some(time - secs(10))));
        f.report(&retry("msg_1", secs(60), time - secs(30)));
        f.report(&retry("msg_2", secs(30), time - secs(20)));
        let view = f.view(now);
        assert_eq!((view.oldest_event_at, view.retries_scheduled), (Some(time - secs(30)), 2));
        assert_eq!((view.next_retry_at, view.unsettled), (Some(time + secs(30)), 2));
        f.starts(now, 1, "msg_1");
        f.report(&LaneEvent::SessionEnded);
        let view = f.view(now);
        assert_eq!(
            (view.oldest_event_at, view.unsettled, view.retries_scheduled),
            (Some(time - secs(20)), 0, 1)
        );
        assert!(has("hooktrail_retries_waiting{subscriber=\"a\"} 1"));
        assert_eq!(f.view(secs(3600)).retries_scheduled, 0, "another daemon took it");
        f.report(&unsettled(0, None));
        f.report(&retry("msg_3", Duration::ZERO, time));
        assert!(!has(oldest));
        f.board.polled(time + secs(3600), Err("away".to_owned()));
        assert!(has(oldest), "without any client of the API");
    }

    #[test]
    fn a_poll_of_the_queues_is_shown_by_subscriber() {
        let Fixture { board, .. } = Fixture::new();
        let depth = Depth { events: 5, retries: 1, delayed: 3, dead: 2 };
        let depths = Depths {
            subscribers: [("a".into(), depth)].into(),
            removed: [("gone".into(), depth)].into(),
            delayed: Some(7),
            orphans: 4,
            history: Some(6),
        };
        board.polled(clock::now(), Ok(depths.clone()));
        let text = board.metrics().expose();
        for line in [
            "hooktrail_queue_messages{subscriber=\"a\",queue=\"dead\"} 2",
            "hooktrail_queue_messages{subscriber=\"a\",queue=\"retry\"} 1",
            "hooktrail_removed_subscriber_messages{subscriber=\"gone\"} 11",
            "hooktrail_delayed_retries 7",
            "hooktrail_orphans 4",
            "hooktrail_history_queue_messages 6",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        board.polled(clock::now(), Ok(Depths { delayed: None, ..depths }));
        let text = board.metrics().expose();
        assert!(
            text.contains("hooktrail_delayed_retries 3"),
            "the sum of each subscriber's: {text}"
        );
        board.forget("a");
        assert!(!board.metrics().expose().contains("subscriber=\"a\""));
    }

    #[test]
    fn observers_get_each_event_with_its_subscriber_and_digests_if_one_wants_them() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let observer = |name: &'static str| {
            let into = seen.clone();
            Observer::new(move |subscriber, event| {
                lock(&into).push(format!("{name} {subscriber}: {event:?}"));
            })
        };
        let metrics = Metrics::new(SystemTime::UNIX_EPOCH);
        let board = Board::observed(metrics.clone(), [observer("1"), observer("2")]);
        assert!(!board.lane(&"a".into()).wants_digests());
        board.lane(&"a".into()).report(&LaneEvent::QueueRestored);
        board.lane(&"b".into()).report(&LaneEvent::Taken { events: 3 });
        let expected = [
            "1 a: QueueRestored",
            "2 a: QueueRestored",
            "1 b: Taken { events: 3 }",
            "2 b: Taken { events: 3 }",
        ];
        assert_eq!(*lock(&seen), expected);
        let board = Board::observed(metrics, [observer("1"), observer("2").with_digests()]);
        assert!(board.lane(&"a".into()).wants_digests());
    }
}
