//! What happens in a lane, as values. One report of each (`LaneReporter::report`) logs it, counts it
//! (`SubscriberMetrics::count`), and changes the lane's status.

use std::time::{Duration, SystemTime};

use crate::{
    delivery::{
        Batch, BatchId, DeadLetter, Disposition, Failure, MessageKind, Outcome, Pause, Prints,
        Reason,
    },
    event::payload::Format,
    policy::circuit_breaker::{Change, CircuitState},
    telemetry::{outage::News, resources},
};

/// Something that happened in a lane.
#[derive(Debug)]
pub enum LaneEvent<'a> {
    /// Events were taken from the queue, valid or not.
    Taken {
        events: u64,
    },
    /// Redeliveries of settled events are acked without an attempt.
    Recognised {
        events: u64,
    },
    /// Messages that can never be delivered become dead letters; reason and error of the first.
    Undeliverable {
        letters: usize,
        reason: Reason,
        error: &'a str,
    },
    /// `number` counts the attempts of the session. `sha256`: that of the body, at the batch's first
    /// attempt and if an observer wants it.
    AttemptStarted {
        number: u64,
        batch: &'a Batch,
        sha256: Option<[u8; 32]>,
    },
    AttemptEnded(AttemptEnded<'a>),
    /// Nothing of a request was sent, because this machine lacks file descriptors or ports, or over
    /// HTTP/2 no stream got free: it was no attempt.
    Unsent {
        number: u64,
        batch_id: &'a BatchId,
        why: &'a str,
    },
    /// The receiver accepted a batch, `lag` after the timestamp of its first event and
    /// `since_arrival` after that event arrived.
    Delivered {
        events: u32,
        lag: Option<Duration>,
        since_arrival: Option<Duration>,
    },
    /// A settlement is durable.
    Settled(Settled),
    /// A settlement failed: its messages are delivered again.
    NotSettled(Settled),
    /// The events that are taken and not settled, and when the oldest of them arrived.
    Unsettled {
        events: u64,
        oldest_arrived_at: Option<SystemTime>,
    },
    /// What was not settled is back in the queue.
    SessionEnded,
    /// The circuit and the hold as they are now; reported at each change, and again without one.
    CircuitIs {
        circuit: Circuit,
        hold_until: Option<SystemTime>,
    },
    CircuitChanged(Change),
    /// The receiver takes no compressed request, or is sent compressed ones again.
    Compression {
        refused: bool,
    },
    /// `match` has kept this many events away, and let none through since.
    NothingMatches {
        events: u64,
    },
    /// A batch waits for `http.rate`; once for each that does.
    RateWaits,
    /// An operator wants a retry although the circuit is open or the endpoint held.
    RetryRequested,
    /// It is still unknown whether the subscriber is paused.
    PauseStateLate,
    /// `known`: that pause was reported before, with a time that was less exact.
    Paused {
        pause: &'a Pause,
        known: bool,
    },
    Resumed {
        by: &'a str,
        paused_by: &'a str,
    },
    /// An operator resumed a subscriber that was not paused.
    ResumedUnpaused,
    /// The queue cannot be used.
    QueueFailed {
        why: &'a str,
        news: News,
    },
    QueueRestored,
    Panicked {
        error: &'a str,
        restart_in: Duration,
    },
}

/// An attempt with its outcome, and what follows from it.
#[derive(Debug)]
pub struct AttemptEnded<'a> {
    /// As in [`LaneEvent::AttemptStarted`].
    pub number: u64,
    /// This attempt is among its attempts.
    pub batch: &'a Batch,
    pub outcome: &'a Outcome,
    pub disposition: Disposition,
    /// The receiver asked for this wait, and gets a shorter one.
    pub shortened_from: Option<Duration>,
    pub took: Duration,
}

/// What was settled.
#[derive(Debug)]
pub enum Settled {
    Delivered,
    Recognised {
        events: u64,
    },
    /// Events that the subscriber does not want, by its key `match`.
    Filtered {
        events: u64,
    },
    DeadLetters(Vec<Died>),
    /// Batches that are due in `delay`; their first event had arrived at `arrived_at`. `split`: the
    /// batch that they are the halves of.
    Retries {
        batches: Vec<Batch>,
        split: Option<BatchId>,
        delay: Duration,
        arrived_at: SystemTime,
    },
    /// The batch waits until its subscriber is resumed.
    Paused(BatchId),
}

/// A message that became a dead letter, without its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Died {
    pub reason: Reason,
    /// `None` of an event, and of a message that was never attempted as a batch.
    pub batch_id: Option<BatchId>,
    /// The format of a batch's body.
    pub format: Option<Format>,
    pub events: u32,
    pub bytes: usize,
    pub prints: Prints,
}

impl Died {
    pub fn of(letter: &DeadLetter) -> Self {
        let is_batch = letter.kind == MessageKind::Batch;
        let id = letter.id.clone().filter(|_| is_batch && letter.attempts > 0);
        Self {
            reason: letter.reason,
            batch_id: id.map(BatchId::from),
            format: letter.format().filter(|_| is_batch),
            events: letter.events,
            bytes: letter.body.len(),
            prints: letter.prints.clone(),
        }
    }
}

/// The circuit as an operator sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Circuit {
    #[default]
    Closed,
    /// Nothing is sent before then.
    Open {
        until: SystemTime,
    },
    HalfOpen,
}

impl Circuit {
    pub const fn state(self) -> CircuitState {
        match self {
            Self::Closed => CircuitState::Closed,
            Self::Open { .. } => CircuitState::Open,
            Self::HalfOpen => CircuitState::HalfOpen,
        }
    }
}

/// What a change of the circuit means, for the log and the demo.
pub const fn meaning(change: Change) -> &'static str {
    match change {
        Change::Opened { .. } => {
            "circuit open: nothing is sent, the backlog stays in the queue; then one batch is tried"
        }
        Change::StillOpen { .. } => "circuit open again: the probe failed",
        Change::Closed => "circuit closed: the subscriber accepts batches again",
    }
}

impl LaneEvent<'_> {
    /// Writes the event's line, if it has one.
    pub(super) fn log(&self, subscriber: &str) {
        match self {
            Self::Recognised { events } => {
                tracing::debug!(
                    subscriber,
                    events,
                    "redeliveries acked without an attempt: they were settled before"
                )
            }
            Self::Undeliverable { letters, reason, error } => tracing::warn!(
                subscriber,
                letters,
                reason = reason.name(),
                error,
                "dead-lettered without an attempt"
            ),
            Self::AttemptEnded(ended) => ended.log(subscriber),
            Self::Unsent { why, .. } => resources::report(subscriber, why, crate::clock::instant()),
            Self::CircuitChanged(change) => log_circuit(subscriber, *change),
            Self::Compression { refused: true } => tracing::warn!(
                subscriber,
                "its receiver answered 415 to a compressed request and accepted the same one plain: requests are sent plain until the next reload; \
                 set http.compression = \"none\""
            ),
            Self::NothingMatches { events } => tracing::warn!(
                subscriber,
                events,
                "`match` has kept all of the last events away; if that is not meant, compare its places and values with an event"
            ),
            Self::RetryRequested => {
                tracing::info!(subscriber, "an operator wants a retry now: one batch is tried")
            }
            Self::PauseStateLate => tracing::warn!(
                subscriber,
                "nothing is sent before it is known whether the subscriber is paused"
            ),
            Self::Paused { pause, known: false } => log_pause(subscriber, pause),
            Self::Resumed { by, paused_by } => {
                tracing::info!(subscriber, by, paused_by, "resumed")
            }
            Self::ResumedUnpaused => {
                tracing::info!(subscriber, "resumed: one batch is tried now")
            }
            Self::QueueFailed { why, news } => log_outage(subscriber, why, *news),
            Self::QueueRestored => tracing::info!(subscriber, "the lane has its queue again"),
            Self::Panicked { error, restart_in } => tracing::error!(
                subscriber,
                %error,
                again_in_s = restart_in.as_secs_f64(),
                "the lane panicked; what it had taken is delivered again"
            ),
            Self::Taken { .. }
            | Self::AttemptStarted { .. }
            | Self::Delivered { .. }
            | Self::Settled(_)
            | Self::NotSettled(_)
            | Self::Unsettled { .. }
            | Self::SessionEnded
            | Self::CircuitIs { .. }
            | Self::Compression { refused: false }
            | Self::RateWaits
            | Self::Paused { known: true, .. } => {}
        }
    }
}

impl AttemptEnded<'_> {
    /// The one line of an attempt: no body, no secret, no URL, and nothing that the receiver wrote,
    /// which may be what it was sent; that is in the dead letter alone.
    fn log(&self, subscriber: &str) {
        let Some(disposition) = self.disposition.kind() else { return };
        let (batch, failure) = (self.batch, self.outcome.failure());
        let status = match self.outcome {
            Outcome::Delivered { status } => Some(*status),
            _ => failure.and_then(Failure::status),
        };
        let seconds = |d: Duration| d.as_millis() as f64 / 1000.0;
        macro_rules! attempt {
            ($level:ident) => {
                tracing::$level!(
                    subscriber,
                    batch_id = batch.id.as_str(),
                    attempt = batch.attempts,
                    events = batch.events,
                    bytes = batch.body.len(),
                    outcome = disposition.name(),
                    reason = self.disposition.reason().map(Reason::name),
                    status,
                    failure = failure.map(Failure::name),
                    error = failure.and_then(Failure::cause),
                    duration_ms = self.took.as_millis() as u64,
                    next_attempt_in_s = self.disposition.delay().map(seconds),
                    retry_after_shortened_from_s = self.shortened_from.map(seconds),
                    traceparent = batch.traceparent,
                    "attempt"
                )
            };
        }
        if failure.is_some() { attempt!(warn) } else { attempt!(info) }
    }
}

fn log_circuit(subscriber: &str, change: Change) {
    let meaning = meaning(change);
    match change {
        Change::Opened { failures, open_for } => {
            tracing::warn!(subscriber, failures, open_for_s = open_for.as_secs_f64(), "{meaning}")
        }
        Change::StillOpen { open_for } => {
            tracing::warn!(subscriber, open_for_s = open_for.as_secs_f64(), "{meaning}")
        }
        Change::Closed => tracing::info!(subscriber, "{meaning}"),
    }
}

fn log_pause(subscriber: &str, Pause { why, by, .. }: &Pause) {
    let until = if by == "configuration" {
        "that is taken out of it".to_owned()
    } else {
        format!("`hooktrail resume {subscriber}`")
    };
    tracing::warn!(subscriber, why, by, "paused: its events wait in the queue until {until}");
}

fn log_outage(subscriber: &str, error: &str, news: News) {
    match news {
        News::First => {
            tracing::warn!(subscriber, %error, "the lane lost its queue; it opens it again")
        }
        // A broker that comes back may have lost the queue: that asks for another remedy than the
        // first reason did.
        News::OtherReason => tracing::warn!(subscriber, %error, "the lane's queue still fails"),
        News::Known => tracing::debug!(subscriber, %error, "the lane's queue still fails"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock,
        delivery::{AttemptLog, PauseCause, Print},
        telemetry::{metrics::Metrics, status::Board},
    };
    use std::{
        collections::BTreeSet,
        io,
        sync::{Arc, Mutex},
    };
    use tracing_subscriber::fmt::MakeWriter;

    const SECOND: Duration = Duration::from_secs(1);
    const T0: SystemTime = SystemTime::UNIX_EPOCH;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no panic").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Written {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    /// The lines that an event logs, and the samples of its subscriber that it changes.
    fn reported(before: &[LaneEvent<'_>], event: &LaneEvent<'_>) -> (String, Vec<String>) {
        let board = Board::new(Metrics::new(T0));
        let lane = board.lane(&"a".into());
        before.iter().for_each(|event| lane.report(event));
        let samples = || -> BTreeSet<String> {
            let text = board.metrics().expose();
            let own = |line: &&str| line.contains("subscriber=\"a\"") && !line.contains("_bucket");
            text.lines()
                .filter(own)
                .map(|line| {
                    line.replace("subscriber=\"a\"", "").replace("{}", "").replace("{,", "{")
                })
                .collect()
        };
        let unchanged = samples();
        let written = Written::default();
        let log = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_ansi(false)
            .with_target(false)
            .without_time()
            .with_writer(written.clone())
            .finish();
        tracing::subscriber::with_default(log, || lane.report(event));
        let log = String::from_utf8(written.0.lock().expect("no panic").clone()).expect("text");
        let changed = samples()
            .difference(&unchanged)
            .map(|line| line.trim_start_matches("hooktrail_").to_owned())
            .collect();
        (log.trim().to_owned(), changed)
    }

    fn check(event: &LaneEvent<'_>, log: &str, samples: &[&str]) {
        check_after(&[], event, log, samples);
    }

    fn check_after(before: &[LaneEvent<'_>], event: &LaneEvent<'_>, log: &str, samples: &[&str]) {
        let (logged, changed) = reported(before, event);
        assert_eq!(logged, log, "{event:?}");
        assert_eq!(changed, samples, "{event:?}");
    }

    fn batch() -> Batch {
        Batch {
            id: BatchId::from("msg_1"),
            body: "{}".into(),
            format: Format::Json,
            events: 3,
            attempts: 2,
            first_attempt_at: None,
            traceparent: Some("00-1".to_owned()),
            attempt_log: AttemptLog::default(),
            prints: None,
            replay: false,
        }
    }

    fn started(batch: &Batch) -> LaneEvent<'_> {
        LaneEvent::AttemptStarted { number: 7, batch, sha256: None }
    }

    fn died(reason: Reason) -> Died {
        Died { reason, batch_id: None, format: None, events: 1, bytes: 2, prints: None }
    }

    fn ended<'a>(
        batch: &'a Batch,
        outcome: &'a Outcome,
        disposition: Disposition,
    ) -> LaneEvent<'a> {
        LaneEvent::AttemptEnded(AttemptEnded {
            number: 7,
            batch,
            outcome,
            disposition,
            shortened_from: None,
            took: SECOND,
        })
    }

    #[test]
    fn an_attempt_has_one_line_and_counts_by_disposition_and_failure() {
        let batch = batch();
        let before = [started(&batch)];
        check(
            &before[0],
            "",
            &[
                "batch_bytes_count 1",
                "batch_bytes_sum 2.0",
                "batch_events_count 1",
                "batch_events_sum 3.0",
                "requests_in_flight 1.0",
            ],
        );
        let common = r#"attempt subscriber="a" batch_id="msg_1" attempt=2 events=3 bytes=2"#;
        let took = ["attempt_duration_seconds_count 1", "attempt_duration_seconds_sum 1.0"];
        let failed = |why: &str, outcome: &str| {
            [
                took[0].to_owned(),
                took[1].to_owned(),
                format!("attempt_failures_total{{failure=\"{why}\"}} 1"),
                format!("attempts_total{{outcome=\"{outcome}\"}} 1"),
                "requests_in_flight 0.0".to_owned(),
            ]
        };
        let failure =
            Failure::Status { status: 503, excerpt: "what the receiver wrote".to_owned() };
        let status = Outcome::Retry { failure, retry_after: None };
        let tls = Outcome::Retry { failure: Failure::Tls("expired".to_owned()), retry_after: None };
        for (outcome, disposition, line, samples) in [
            (
                &Outcome::Delivered { status: 204 },
                Disposition::Delivered,
                format!(
                    r#"INFO {common} outcome="delivered" status=204 duration_ms=1000 traceparent="00-1""#
                ),
                [
                    took[0],
                    took[1],
                    "attempts_total{outcome=\"delivered\"} 1",
                    "requests_in_flight 0.0",
                ]
                .map(str::to_owned)
                .to_vec(),
            ),
            (
                &status,
                Disposition::Retry { delay: SECOND * 5 },
                format!(
                    r#"WARN {common} outcome="retry" status=503 failure="status" duration_ms=1000 next_attempt_in_s=5.0 traceparent="00-1""#
                ),
                failed("status", "retry").to_vec(),
            ),
            (
                &status,
                Disposition::DeadLetter(Reason::Refused),
                format!(
                    r#"WARN {common} outcome="dead_letter" reason="refused" status=503 failure="status" duration_ms=1000 traceparent="00-1""#
                ),
                failed("status", "dead_letter").to_vec(),
            ),
            (
                &tls,
                Disposition::Split { delay: Duration::ZERO },
                format!(
                    r#"WARN {common} outcome="split" failure="tls" error="expired" duration_ms=1000 next_attempt_in_s=0.0 traceparent="00-1""#
                ),
                failed("tls", "split").to_vec(),
            ),
            (
                &tls,
                Disposition::Paused(PauseCause::Exhausted),
                format!(
                    r#"WARN {common} outcome="paused" failure="tls" error="expired" duration_ms=1000 traceparent="00-1""#
                ),
                failed("tls", "paused").to_vec(),
            ),
        ] {
            let samples: Vec<&str> = samples.iter().map(String::as_str).collect();
            check_after(&before, &ended(&batch, outcome, disposition), &line, &samples);
        }
        let unsent = LaneEvent::Unsent { number: 7, batch_id: &batch.id, why: "no port is left" };
        check_after(
            &before,
            &unsent,
            r#"ERROR requests cannot be sent; they are no attempts, and their events wait in the queue subscriber="a" error="no port is left""#,
            &["requests_in_flight 0.0", "unsent_requests_total 1"],
        );
    }

    #[test]
    fn a_dead_letter_is_reported_with_the_id_of_its_batch_if_that_was_attempted() {
        let batch = Batch { prints: Some([Print::of(b"{}")].into()), ..batch() };
        let prints = batch.prints.clone();
        let letter = DeadLetter::of_batch(batch, Reason::Refused, &Failure::Timeout, None, T0);
        let expected = Died {
            reason: Reason::Refused,
            batch_id: Some(BatchId::from("msg_1")),
            format: Some(Format::Json),
            events: 3,
            bytes: 2,
            prints: prints.clone(),
        };
        assert_eq!(Died::of(&letter), expected);
        let (id, why) = (Some("msg_1".to_owned()), String::new());
        let event =
            DeadLetter::of_event("{}".into(), None, id.clone(), Reason::TooLarge, why.clone(), T0);
        assert_eq!(Died::of(&event), Died { prints, ..died(Reason::TooLarge) });
        let content_type = Some("application/json".to_owned());
        let foreign = Died::of(&DeadLetter::not_a_batch("{}".into(), content_type, id, why, T0));
        assert_eq!((foreign.batch_id, foreign.prints), (None, None), "any client can write an id");
    }

    #[test]
    fn what_is_taken_delivered_and_settled_is_counted() {
        let delivered =
            LaneEvent::Delivered { events: 3, lag: Some(SECOND), since_arrival: Some(SECOND * 2) };
        let retries = Settled::Retries {
            batches: vec![batch()],
            split: None,
            delay: SECOND,
            arrived_at: T0 + SECOND,
        };
        for (event, log, samples) in [
            (LaneEvent::Taken { events: 2 }, "", &["events_received_total 2"][..]),
            (
                LaneEvent::Recognised { events: 2 },
                r#"DEBUG redeliveries acked without an attempt: they were settled before subscriber="a" events=2"#,
                &[],
            ),
            (
                LaneEvent::Settled(Settled::Recognised { events: 2 }),
                "",
                &["events_recognised_total 2"],
            ),
            (
                LaneEvent::Undeliverable {
                    letters: 2,
                    reason: Reason::InvalidEvent,
                    error: "no JSON",
                },
                r#"WARN dead-lettered without an attempt subscriber="a" letters=2 reason="invalid_event" error="no JSON""#,
                &[],
            ),
            (
                LaneEvent::Settled(Settled::DeadLetters(vec![
                    died(Reason::InvalidEvent),
                    died(Reason::TooLarge),
                ])),
                "",
                &[
                    "dead_letters_total{reason=\"invalid_event\"} 1",
                    "dead_letters_total{reason=\"too_large\"} 1",
                ],
            ),
            (
                delivered,
                "",
                &[
                    "delivery_duration_seconds_count 1",
                    "delivery_duration_seconds_sum 2.0",
                    "delivery_lag_seconds_count 1",
                    "delivery_lag_seconds_sum 1.0",
                    "events_delivered_total 3",
                ],
            ),
            (LaneEvent::Settled(Settled::Delivered), "", &[]),
            (LaneEvent::Settled(Settled::Paused(BatchId::from("msg_1"))), "", &[]),
            (LaneEvent::NotSettled(Settled::DeadLetters(vec![died(Reason::TooLarge)])), "", &[]),
            (
                LaneEvent::Unsettled { events: 2, oldest_arrived_at: Some(T0 + SECOND) },
                "",
                &["oldest_event_timestamp_seconds 1.0"],
            ),
            (LaneEvent::SessionEnded, "", &[]),
        ] {
            check(&event, log, samples);
        }
        let (log, samples) = reported(&[], &LaneEvent::Settled(retries));
        assert_eq!((log.as_str(), samples.len()), ("", 3), "{samples:?}");
        assert!(samples.contains(&"retries_waiting 1.0".to_owned()), "{samples:?}");
    }

    #[test]
    fn the_circuit_and_its_changes_are_shown() {
        let open =
            |until| LaneEvent::CircuitIs { circuit: Circuit::Open { until }, hold_until: None };
        let (log, samples) = reported(&[], &open(T0));
        assert_eq!((log.as_str(), samples.len()), ("", 3), "{samples:?}");
        let (_, samples) = reported(&[open(T0)], &open(T0 + SECOND));
        assert_eq!(samples, Vec::<String>::new(), "it is open since then all the same");
        for (change, log) in [
            (
                Change::Opened { failures: 5, open_for: SECOND },
                r#"WARN circuit open: nothing is sent, the backlog stays in the queue; then one batch is tried subscriber="a" failures=5 open_for_s=1.0"#,
            ),
            (
                Change::StillOpen { open_for: SECOND },
                r#"WARN circuit open again: the probe failed subscriber="a" open_for_s=1.0"#,
            ),
            (
                Change::Closed,
                r#"INFO circuit closed: the subscriber accepts batches again subscriber="a""#,
            ),
        ] {
            check(&LaneEvent::CircuitChanged(change), log, &[]);
        }
    }

    #[test]
    fn pauses_outages_and_panics_are_shown_until_they_end() {
        let pause =
            |by: &str| Pause { why: "w".to_owned(), since: clock::now(), by: by.to_owned() };
        let (operator, configured) = (pause("operator"), pause("configuration"));
        let paused = || LaneEvent::Paused { pause: &operator, known: false };
        let failed = |news| LaneEvent::QueueFailed { why: "reset", news };
        let batch = batch();
        let line = r#"subscriber="a" why="w" by="#;
        for (before, event, log, samples) in [
            (
                vec![],
                paused(),
                format!("WARN paused: its events wait in the queue until `hooktrail resume a` {line}\"operator\""),
                &["paused 1.0"][..],
            ),
            (
                vec![],
                LaneEvent::Paused { pause: &configured, known: false },
                format!("WARN paused: its events wait in the queue until that is taken out of it {line}\"configuration\""),
                &["paused 1.0"],
            ),
            (vec![paused()], LaneEvent::Paused { pause: &operator, known: true }, String::new(), &[]),
            (
                vec![paused()],
                LaneEvent::Resumed { by: "operator", paused_by: "receiver" },
                r#"INFO resumed subscriber="a" by="operator" paused_by="receiver""#.to_owned(),
                &["paused 0.0"],
            ),
            (
                vec![],
                LaneEvent::ResumedUnpaused,
                r#"INFO resumed: one batch is tried now subscriber="a""#.to_owned(),
                &[],
            ),
            (
                vec![],
                LaneEvent::RetryRequested,
                r#"INFO an operator wants a retry now: one batch is tried subscriber="a""#.to_owned(),
                &[],
            ),
            (
                vec![],
                LaneEvent::PauseStateLate,
                r#"WARN nothing is sent before it is known whether the subscriber is paused subscriber="a""#.to_owned(),
                &[],
            ),
            (
                vec![],
                failed(News::First),
                r#"WARN the lane lost its queue; it opens it again subscriber="a" error=reset"#.to_owned(),
                &["lane_up 0.0"],
            ),
            (
                vec![failed(News::First)],
                failed(News::OtherReason),
                r#"WARN the lane's queue still fails subscriber="a" error=reset"#.to_owned(),
                &[],
            ),
            (
                vec![failed(News::First)],
                failed(News::Known),
                r#"DEBUG the lane's queue still fails subscriber="a" error=reset"#.to_owned(),
                &[],
            ),
            (
                vec![failed(News::First)],
                LaneEvent::QueueRestored,
                r#"INFO the lane has its queue again subscriber="a""#.to_owned(),
                &["lane_up 1.0"],
            ),
            (
                vec![paused(), failed(News::First), started(&batch)],
                LaneEvent::Panicked { error: "e", restart_in: SECOND },
                r#"ERROR the lane panicked; what it had taken is delivered again subscriber="a" error=e again_in_s=1.0"#.to_owned(),
                &["lane_panics_total 1", "lane_up 1.0", "paused 0.0", "requests_in_flight 0.0"],
            ),
        ] {
            check_after(&before, &event, &log, samples);
        }
    }
}
