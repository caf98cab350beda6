//! Events on their way from the queue into the store.

use std::{
    pin::Pin,
    time::{Duration, Instant, SystemTime},
};

use tokio::{sync::watch, time::sleep};

use crate::{
    clock,
    config::Subscribers,
    failpoint::{Step, reached},
    policy::retry::Backoff,
    queue::{HistorySource, HistoryStart, Queue, QueueError},
    store::{Gap, MAX_APPEND, NewRow, Reach, Store, StoreError},
    telemetry::outage::{News, Outage},
};

/// The shortest and the longest time between two tries.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// The time between two groups while few events come: one commit for them costs those who wait for
/// deliveries less than many.
const GATHER: Duration = Duration::from_millis(100);

/// While events come faster than that, history lets deliveries go first: it rests three times as long
/// as it has worked, but no longer than this at once, and not after these seconds: what goes on for
/// longer it has to keep up with, so that the queue does not lose what waits for history. Measured
/// with `cargo bench --bench history_price`: a backlog is delivered at 0.92 instead of 0.75 of the
/// speed without history.
const REST: u32 = 3;
const MAX_REST: Duration = Duration::from_millis(250);
const BURST: Duration = Duration::from_secs(10);

/// The time between two looks for what is older than the retention or too much.
const TRIM_INTERVAL: Duration = Duration::from_secs(5);

/// Whether the store of this daemon has the history of the queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Keeps {
    /// That is not known yet: the store or the queue is away.
    #[default]
    Unknown,
    Here,
    /// Another store has it: neither events nor deliveries are recorded here.
    Elsewhere,
}

/// The time after which a gap is recorded again that grows: while another store has history.
const GROWS: Duration = Duration::from_secs(60);

/// Why history lacks what happened while another store had it.
const ELSEWHERE: &str = "another store had the history of this queue";

/// Takes events from the queue into the store, until `stopped` completes. An event is removed from
/// the queue only when it is durable in the store; with the store away it waits in the queue. Reports
/// which store `keeps` history.
pub(super) async fn record<Q: Queue, S: Store>(
    queue: &Q,
    store: &S,
    keeps: &watch::Sender<Keeps>,
    stopped: impl Future<Output = ()>,
) {
    let mut stopped = std::pin::pin!(stopped);
    let mut recorder = Recorder {
        queue,
        store,
        keeps,
        outages: (Outage::default(), Outage::default()),
        gaps: Gaps::default(),
        elsewhere: None,
        backoff: Backoff::new(FIRST_BACKOFF, MAX_BACKOFF),
    };
    loop {
        let opened = tokio::select! {
            opened = recorder.open() => opened,
            () = &mut stopped => break,
        };
        let ended = match opened {
            Ok(source) => match recorder.session(source, stopped.as_mut()).await {
                Some(ended) => ended,
                None => break,
            },
            Err(ended) => ended,
        };
        recorder.log(&ended);
        tokio::select! {
            () = sleep(recorder.backoff.grow()) => {}
            () = &mut stopped => break,
        }
    }
    // The queue does not say again what it lacks.
    if let Err(e) = recorder.gaps.record(store).await {
        tracing::debug!(error = %e, "what history lacks is not recorded");
    }
}

/// Why a session ended.
enum Ended {
    Queue(QueueError),
    Store(StoreError),
}

impl From<QueueError> for Ended {
    fn from(e: QueueError) -> Self {
        Self::Queue(e)
    }
}

impl From<StoreError> for Ended {
    fn from(e: StoreError) -> Self {
        Self::Store(e)
    }
}

/// Gaps that the store does not have yet. One of each cause, and a queue has few of these.
#[derive(Debug, Default)]
struct Gaps(Vec<Gap>);

impl Gaps {
    /// Adds a gap; true if there was none of its cause.
    fn add(&mut self, gap: Gap) -> bool {
        let known =
            self.0.iter_mut().find(|known| (known.what, &known.why) == (gap.what, &gap.why));
        let Some(known) = known else {
            self.0.push(gap);
            return true;
        };
        known.from = known.from.min(gap.from);
        known.until = known.until.max(gap.until);
        // It may be the same gap, found again and longer.
        known.missing = None;
        false
    }

    async fn record<S: Store>(&mut self, store: &S) -> Result<(), StoreError> {
        while let Some(gap) = self.0.last() {
            store.add_gap(gap.clone()).await?;
            self.0.pop();
        }
        Ok(())
    }
}

/// How history gives way to deliveries.
#[derive(Debug, Default)]
struct Pace {
    /// When it began to store the last group.
    group: Option<Instant>,
    /// Since when groups have been large.
    burst: Option<Instant>,
}

impl Pace {
    /// A group of so many events is stored now.
    fn begin(&mut self, events: usize, now: Instant) {
        self.group = Some(now);
        if events < MAX_APPEND / 4 {
            self.burst = None;
        } else {
            self.burst.get_or_insert(now);
        }
    }

    /// The time before the next group is taken.
    fn rest(&self, now: Instant) -> Duration {
        let Some(began) = self.group else { return Duration::ZERO };
        let worked = now - began;
        match self.burst {
            None => GATHER.saturating_sub(worked),
            Some(since) if now - since < BURST => (worked * REST).min(MAX_REST),
            Some(_) => Duration::ZERO,
        }
    }
}

struct Recorder<'a, Q, S> {
    queue: &'a Q,
    store: &'a S,
    keeps: &'a watch::Sender<Keeps>,
    /// Of the queue, and of the store.
    outages: (Outage, Outage),
    gaps: Gaps,
    /// When history was found elsewhere, and when that was recorded last.
    elsewhere: Option<(SystemTime, Instant)>,
    backoff: Backoff,
}

impl<Q: Queue, S: Store> Recorder<'_, Q, S> {
    async fn open(&mut self) -> Result<Q::History, Ended> {
        // Before anything is taken: it would go back to the queue, again and again.
        self.store.writable().await?;
        self.gaps.record(self.store).await?;
        let reach = self.store.reach().await?;
        // Without it history goes on where the queue allows that.
        let start = HistoryStart {
            store: self.store.id().await.ok(),
            last: reach.last,
            known_until: reach.known_until(),
        };
        let claimed = self.queue.claim_history(&start).await;
        let keeps = match &claimed {
            Ok(()) => Keeps::Here,
            Err(e) if e.is_of_another_store() => Keeps::Elsewhere,
            Err(e) => return Err(e.clone().into()),
        };
        // Before the queue is open: on RabbitMQ it is bound first, which can take a minute, and
        // deliveries would be dropped meanwhile.
        self.keeps.send_if_modified(|known| std::mem::replace(known, keeps) != keeps);
        self.add_elsewhere(&reach, keeps);
        claimed?;
        Ok(self.queue.history(start).await?)
    }

    /// Adds the time in which another store has had history: from when that is found, and again until
    /// it ends. It may have begun in an earlier process, of which the gap tells that nothing was
    /// stored since.
    fn add_elsewhere(&mut self, reach: &Reach, keeps: Keeps) {
        let (now, last) = (clock::now(), reach.last.map(|(_, at)| at));
        let is_open = |gap: &Gap| {
            gap.what == "events" && gap.why == ELSEWHERE && last.is_some_and(|at| gap.until >= at)
        };
        let since = match (keeps, self.elsewhere) {
            (Keeps::Elsewhere, Some((_, told))) if clock::instant() - told < GROWS => return,
            (Keeps::Elsewhere, known) => {
                let since = known.map_or(now, |(since, _)| since);
                self.elsewhere = Some((since, clock::instant()));
                since
            }
            (_, Some((since, _))) => since,
            (_, None) => match reach.gaps.iter().find(|gap| is_open(gap)) {
                Some(gap) => gap.from,
                None => return,
            },
        };
        if keeps == Keeps::Here {
            self.elsewhere = None;
        }
        let from = last.unwrap_or(since).min(since);
        for what in ["events", "deliveries"] {
            self.gaps.add(Gap { from, until: now, what, why: ELSEWHERE.to_owned(), missing: None });
        }
    }

    /// Runs until the source's end, or the store's; `None` if it was stopped.
    async fn session(
        &mut self,
        mut source: Q::History,
        mut stopped: Pin<&mut impl Future<Output = ()>>,
    ) -> Option<Ended> {
        let mut taken = Vec::with_capacity(MAX_APPEND);
        let mut pace = Pace::default();
        let ended = loop {
            let take = async {
                sleep(pace.rest(clock::instant())).await;
                source.take(&mut taken, MAX_APPEND).await
            };
            let took = tokio::select! {
                took = take => took,
                () = &mut stopped => break None,
            };
            pace.begin(taken.len(), clock::instant());
            // To its end, also when the daemon ends: what is stored and not removed from the queue
            // would be stored again.
            let stored = match took {
                Ok(()) => self.keep(&mut source, std::mem::take(&mut taken)).await,
                Err(e) => Err(e.into()),
            };
            match stored {
                Ok(()) => {
                    self.backoff.reset();
                    if self.outages.0.end() | self.outages.1.end() {
                        tracing::info!("history takes events again");
                    }
                }
                Err(ended) => break Some(ended),
            }
        };
        self.take_gaps(&mut source);
        // What is not stored goes back to the queue, which bears unsettled events for minutes only.
        source.close().await;
        ended
    }

    /// Stores one group.
    async fn keep(&mut self, source: &mut Q::History, taken: Vec<NewRow>) -> Result<(), Ended> {
        self.take_gaps(source);
        self.gaps.record(self.store).await?;
        self.store.append(taken).await?;
        reached(Step::Remembered);
        source.stored().await?;
        reached(Step::Released);
        Ok(())
    }

    fn take_gaps(&mut self, source: &mut Q::History) {
        for gap in source.gaps() {
            let (from, until) =
                (clock::rfc3339_seconds(gap.from), clock::rfc3339_seconds(gap.until));
            let why = gap.why.clone();
            if self.gaps.add(gap) {
                tracing::warn!(from, until, why, "history lacks events");
            }
        }
    }

    fn log(&mut self, ended: &Ended) {
        let first = |outage: &mut Outage, why: &str| outage.failed(why) != News::Known;
        match ended {
            Ended::Queue(e) if first(&mut self.outages.0, &e.to_string()) => {
                tracing::warn!(error = %e, "history gets no events from the queue; trying again");
            }
            Ended::Queue(e) => tracing::debug!(error = %e, "history still gets no events"),
            // The store has logged why it is away.
            Ended::Store(e) if !e.is_away() && first(&mut self.outages.1, &e.to_string()) => {
                tracing::warn!(
                    error = %e,
                    "the store takes no events; they wait in the queue, and deliveries go on"
                );
            }
            Ended::Store(e) => tracing::debug!(error = %e, "the store takes no events"),
        }
    }
}

/// Removes what is older than the retention, or more than fits, until it is dropped.
pub(super) async fn trim<S: Store>(store: &S) {
    let mut outage = Outage::default();
    loop {
        match store.trim(clock::now()).await {
            // The next part at once: each is small, and others come in between.
            Ok(true) => continue,
            Ok(false) => drop(outage.end()),
            // Away: that is logged by whoever found it.
            Err(e) if e.is_away() => {}
            Err(e) => {
                if outage.failed(&e.to_string()) == News::First {
                    tracing::warn!(error = %e, "old events and deliveries cannot be removed; trying again");
                }
            }
        }
        sleep(TRIM_INTERVAL).await;
    }
}

/// Records the patterns of each configuration from its time on, until it is dropped.
pub(super) async fn record_patterns<S: Store>(
    store: &S,
    mut subscribers: watch::Receiver<Subscribers>,
) {
    loop {
        let (current, since): (Subscribers, SystemTime) =
            (subscribers.borrow_and_update().clone(), clock::now());
        let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
        let all = || current.iter().map(|s| (s.name.clone(), s.interest())).collect();
        let record = async {
            while let Err(e) = store.subscribed(all(), since).await {
                tracing::debug!(error = %e, "the patterns of subscribers are not recorded yet");
                sleep(backoff.grow()).await;
            }
        };
        let mut changed = subscribers.clone();
        tokio::select! {
            () = record => {}
            // A later configuration replaces one that could not be recorded.
            changed = changed.changed() => if changed.is_err() { return } else { continue },
        }
        if subscribers.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;
    use crate::{queue::fake::Fake, store::fake::FakeStore};

    const EVENTS: usize = 100_000;

    #[test]
    fn it_gathers_what_is_few_rests_in_a_burst_and_keeps_up_with_what_goes_on() {
        let ms = Duration::from_millis;
        let start = clock::instant();
        let mut pace = Pace::default();
        assert_eq!(pace.rest(start), Duration::ZERO, "the first is stored at once");
        pace.begin(1, start);
        assert_eq!(pace.rest(start + ms(30)), GATHER - ms(30));
        assert_eq!(pace.rest(start + GATHER + ms(1)), Duration::ZERO, "it was quiet since");
        pace.begin(MAX_APPEND, start);
        assert_eq!(pace.rest(start + ms(20)), ms(60));
        assert_eq!(pace.rest(start + ms(200)), MAX_REST);
        let later = start + BURST - ms(10);
        pace.begin(MAX_APPEND, later);
        assert_eq!(pace.rest(later + ms(9)), ms(27));
        assert_eq!(pace.rest(later + ms(10)), Duration::ZERO, "it goes on for too long");
        pace.begin(1, later);
        pace.begin(MAX_APPEND, later);
        assert_eq!(pace.rest(later + ms(20)), ms(60), "another burst");
    }

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(second)
    }

    fn events(number: usize) -> impl Iterator<Item = NewRow> {
        let row = NewRow {
            number: None,
            at: at(10),
            event_type: "a".to_owned(),
            message_id: None,
            body: "{}".into(),
            redelivered: false,
            tenant: None,
        };
        std::iter::repeat_n(row, number)
    }

    fn gap(what: &'static str, until: u64, why: &str) -> Gap {
        Gap { from: at(1), until: at(until), what, why: why.to_owned(), missing: None }
    }

    async fn eventually(what: &str, is_so: impl Fn() -> bool) {
        let waiting = async {
            while !is_so() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(60), waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    fn recorder<'a>(
        queue: &'a Fake,
        store: &'a FakeStore,
        keeps: &'a watch::Sender<Keeps>,
    ) -> Recorder<'a, Fake, FakeStore> {
        Recorder {
            queue,
            store,
            keeps,
            outages: Default::default(),
            gaps: Gaps::default(),
            elsewhere: None,
            backoff: Backoff::new(FIRST_BACKOFF, MAX_BACKOFF),
        }
    }

    #[tokio::test]
    async fn nothing_is_taken_from_the_queue_while_the_store_cannot_be_written() {
        let (queue, store) = (Fake::default(), FakeStore::default());
        let tried = || store.memory().tried;
        store.memory().away = Some(StoreError::away("the disk is almost full"));
        queue.put_history(events(EVENTS));
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn({
            let (queue, store) = (queue.clone(), store.clone());
            async move {
                let keeps = watch::Sender::new(Keeps::Unknown);
                record(&queue, &store, &keeps, async { drop(stopped.await) }).await;
            }
        });
        eventually("it waits for the store", || tried() >= 5).await;
        assert_eq!((queue.opened_history(), queue.history_waits()), (0, EVENTS));
        // Not stopped, and refuses each write.
        store.memory().away = Some(StoreError::new("the disk is full"));
        let before = tried();
        eventually("it tries the store", || tried() >= before + 3).await;
        assert_eq!((queue.opened_history(), queue.history_waits()), (0, EVENTS));
        store.memory().away = None;
        eventually("all are stored", || queue.history_waits() == 0).await;
        assert_eq!((queue.opened_history(), store.memory().events.len()), (1, EVENTS));
        drop(stop);
        running.await.expect("ends");
    }

    #[tokio::test]
    async fn while_a_gap_cannot_be_recorded_nothing_more_is_taken() {
        let (queue, store) = (Fake::default(), FakeStore::default());
        let keeps = watch::Sender::new(Keeps::Unknown);
        let mut recorder = recorder(&queue, &store, &keeps);
        queue.put_history(events(EVENTS));
        queue.lack(Some(gap("events", 9, "deleted")));
        store.memory().refuses = Some(StoreError::new("no room"));
        for _ in 0..500 {
            if let Ok(source) = recorder.open().await {
                let ended = recorder.session(source, std::pin::pin!(std::future::pending())).await;
                assert!(matches!(ended, Some(Ended::Store(_))));
            }
        }
        assert_eq!((recorder.gaps.0.len(), queue.opened_history()), (1, 1));
        store.memory().refuses = None;
        let source = recorder.open().await.unwrap_or_else(|_| panic!("opens"));
        let stopped = eventually("all are stored", || queue.history_waits() == 0);
        assert!(recorder.session(source, std::pin::pin!(stopped)).await.is_none());
        assert_eq!(store.memory().gaps[0], gap("events", 9, "deleted"));
        assert!(recorder.gaps.0.is_empty());
    }

    #[tokio::test]
    async fn gaps_of_one_cause_are_one_from_the_earliest_to_the_latest() {
        let mut gaps = Gaps::default();
        for n in 0..100_000 {
            let why = ["deleted", "unbound", "full"][n as usize % 3];
            let found = Gap { from: at(200_000 - n), missing: Some(n), ..gap("events", n, why) };
            assert_eq!(gaps.add(found), n < 3);
        }
        let store = FakeStore::default();
        gaps.record(&store).await.expect("records");
        let mut recorded = store.memory().gaps.clone();
        recorded.sort_by_key(|gap| gap.until);
        let whole = |n: u64, why| Gap { from: at(200_000 - n), ..gap("events", n, why) };
        let expected = [whole(99_997, "unbound"), whole(99_998, "full"), whole(99_999, "deleted")];
        assert_eq!(recorded, expected);
    }

    #[tokio::test]
    async fn what_the_queue_has_lost_is_recorded_although_the_daemon_ends() {
        let (queue, store) = (Fake::default(), FakeStore::default());
        let keeps = watch::Sender::new(Keeps::Unknown);
        queue.put_history(events(1));
        queue.lack(Some(gap("events", 9, "deleted")));
        store.memory().refuses = Some(StoreError::new("no room"));
        let stopped = async {
            eventually("the event is given", || queue.given_to_history() > 0).await;
            store.memory().refuses = None;
        };
        record(&queue, &store, &keeps, stopped).await;
        assert_eq!(store.memory().gaps, [gap("events", 9, "deleted")]);
    }

    #[tokio::test]
    async fn this_store_has_history_although_its_queue_is_not_open_yet() {
        let (queue, store) = (Fake::default(), FakeStore::default());
        let keeps = watch::Sender::new(Keeps::Unknown);
        queue.hold_history(true);
        let mut recorder = recorder(&queue, &store, &keeps);
        let mut known = keeps.subscribe();
        let known = known.wait_for(|keeps| *keeps == Keeps::Here);
        tokio::select! {
            _ = recorder.open() => panic!("it is not open"),
            known = timeout(Duration::from_secs(60), known) => drop(known.expect("in time")),
        }
        queue.hold_history(false);
        assert!(recorder.open().await.is_ok());
    }

    #[tokio::test]
    async fn a_store_that_has_history_no_more_lacks_the_time_of_the_other() {
        let (queue, store) = (Fake::default(), FakeStore::default());
        let keeps = watch::Sender::new(Keeps::Unknown);
        let mut new = recorder(&queue, &store, &keeps);
        queue.give_history_away(true);
        assert!(new.open().await.is_err());
        assert_eq!(*keeps.borrow(), Keeps::Elsewhere);
        let found: Vec<_> =
            new.gaps.0.iter().map(|gap| (gap.what, gap.until == gap.from)).collect();
        assert_eq!(found, [("events", true), ("deliveries", true)]);
        let lacks = |store: &FakeStore| {
            let memory = store.memory();
            let of = |what| {
                let all = memory.gaps.iter().filter(move |gap| gap.what == what);
                all.filter(|gap| gap.why == ELSEWHERE).map(|gap| gap.until).max()
            };
            (of("events"), of("deliveries"))
        };
        store.append(events(3).collect()).await.expect("appends");
        let keeps = watch::Sender::new(Keeps::Unknown);
        let mut first = recorder(&queue, &store, &keeps);
        let before = clock::now();
        assert!(first.open().await.is_err());
        assert!(first.open().await.is_err());
        let (events, deliveries) = lacks(&store);
        assert!(events == deliveries && events.is_some_and(|until| until >= before));
        let number = store.memory().gaps.len();
        assert!(first.open().await.is_err());
        assert_eq!(store.memory().gaps.len(), number, "once");
        // Another process of the same store, after it was adopted.
        queue.give_history_away(false);
        let keeps = watch::Sender::new(Keeps::Unknown);
        let mut later = recorder(&queue, &store, &keeps);
        let before = clock::now();
        assert!(later.open().await.is_ok());
        assert_eq!(*keeps.borrow(), Keeps::Here);
        later.gaps.record(&store).await.expect("records");
        assert!(lacks(&store).0.is_some_and(|until| until >= before));
    }
}
