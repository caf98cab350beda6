//! Sends dead letters again.

use std::{
    fmt,
    time::{Duration, Instant},
};

use super::{
    choice::{Choice, Selection},
    group::{GROUP_LETTERS, Group},
    walk::{Done, Staying, Stop, Watcher, close},
};
use crate::{
    clock,
    delivery::{MessageKind, Reason},
    queue::{DeadLetters, Held, QueueError},
};

/// The most groups a second of a replay with a rate, as long as a group has room.
const GROUPS_A_SECOND: f64 = 20.0;

/// The duration after which a slow replay requeues the letters that it has passed by and starts
/// another walk: RabbitMQ closes a channel that holds a message for half an hour.
const MAX_ROUND: Duration = Duration::from_secs(600);

/// The reason why a letter cannot be sent at all. A message of the retry queue that is not an
/// envelope was not made by hooktrail: as a batch it would be a request that no receiver
/// understands.
fn cannot_be_replayed(held: &Held, orphans: bool) -> Option<&'static str> {
    match (held.letter.kind, held.letter.reason) {
        (MessageKind::Batch, Reason::InvalidEvent) => Some("it never was a batch of hooktrail's"),
        (MessageKind::Event, _) if orphans => Some("it is no batch, so no subscriber waits for it"),
        _ if held.subscriber.is_none() => Some("nothing says whose it is"),
        _ => None,
    }
}

/// The pace of a replay with a rate.
struct Pace {
    rate: f64,
    next: Instant,
}

impl Pace {
    fn sent(&mut self, letters: usize) {
        self.next =
            self.next.max(clock::instant()) + Duration::from_secs_f64(letters as f64 / self.rate);
    }
}

/// A replay of the chosen letters, the oldest first.
pub struct Replay<'s, S, W> {
    choice: Choice<'s>,
    stop: &'s S,
    watcher: W,
    dry_run: bool,
    most: usize,
    pace: Option<Pace>,
    /// The longest duration of a round.
    max_round: Duration,
    group: Group<Held>,
    /// Letters that were chosen and can be sent.
    chosen: usize,
    replayed: usize,
    /// Letters that were chosen and stay.
    skipped: usize,
}

impl<S, W> fmt::Debug for Replay<'_, S, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replay").field("choice", &self.choice).finish_non_exhaustive()
    }
}

impl<'s, S: Stop, W: Watcher> Replay<'s, S, W> {
    pub fn new(selection: &'s Selection, stop: &'s S, watcher: W) -> Self {
        Self {
            choice: Choice::new(selection),
            stop,
            watcher,
            dry_run: false,
            most: usize::MAX,
            pace: None,
            max_round: MAX_ROUND,
            group: Group::new(GROUP_LETTERS),
            chosen: 0,
            replayed: 0,
            skipped: 0,
        }
    }

    /// Only counts.
    pub fn dry_run(mut self, dry_run: bool) -> Self {
        self.dry_run = dry_run;
        self
    }

    /// Sends at most so many.
    pub fn at_most(mut self, most: usize) -> Self {
        self.most = most;
        self
    }

    /// Sends at most so many in a second.
    pub fn rate(mut self, rate: Option<f64>) -> Self {
        if let Some(rate) = rate.filter(|_| !self.dry_run) {
            // A group must not be a burst: one letter, or as many as are due within a twentieth of
            // a second.
            let most = ((rate / GROUPS_A_SECOND) as usize).clamp(1, GROUP_LETTERS);
            self.group = Group::new(most);
            self.pace = Some(Pace { rate, next: clock::instant() });
        }
        self
    }

    /// Walks once, as a replay without a rate does.
    ///
    /// # Errors
    /// The queue was lost; [`replayed`](Self::replayed) says how many were sent before.
    pub async fn once(&mut self, mut letters: impl DeadLetters) -> Result<Done, QueueError> {
        let total = letters.left() as usize;
        let walked = self.round(&mut letters, total).await;
        close(letters, walked).await?;
        Ok(self.done())
    }

    /// Walks until all are sent, and opens another walk when one lasts too long.
    ///
    /// # Errors
    /// The queue was lost; [`replayed`](Self::replayed) says how many were sent before.
    pub async fn run<D: DeadLetters>(
        &mut self,
        first: D,
        open: impl AsyncFn() -> Result<D, QueueError>,
    ) -> Result<Done, QueueError> {
        let total = first.left() as usize;
        let mut letters = first;
        loop {
            let walked = self.round(&mut letters, total).await;
            if !close(letters, walked).await? {
                return Ok(self.done());
            }
            letters = open().await?;
        }
    }

    /// The number of letters that were sent so far.
    pub fn replayed(&self) -> usize {
        self.replayed
    }

    /// The choice so far, which knows what was not found.
    pub fn choice(&self) -> &Choice<'s> {
        &self.choice
    }

    fn done(&self) -> Done {
        Done {
            letters: if self.dry_run { self.chosen } else { self.replayed },
            skipped: self.skipped,
            passed: self.choice.number,
            latest: self.choice.latest,
        }
    }

    /// Goes on where the last walk ended; true if another one must follow.
    async fn round(
        &mut self,
        letters: &mut impl DeadLetters,
        total: usize,
    ) -> Result<bool, QueueError> {
        let end = self.pace.as_ref().map(|_| clock::instant() + self.max_round);
        // The letters that earlier walks have passed by come first.
        for _ in 0..self.choice.number - self.replayed {
            letters.next().await?;
        }
        let before = self.choice.number;
        while self.choice.number < total && self.chosen < self.most && !self.stop.is_asked() {
            // Each walk handles at least one letter.
            if self.choice.number > before && end.is_some_and(|end| clock::instant() >= end) {
                let rest = self.group.take();
                self.send(letters, rest).await?;
                return Ok(true);
            }
            let Some(held) = letters.next().await? else { break };
            self.watcher.passed();
            if !self.choice.includes(&held) {
                continue;
            }
            if let Some(why) = cannot_be_replayed(&held, self.choice.selection.orphans) {
                self.stays(&held, why);
                continue;
            }
            self.chosen += 1;
            if self.dry_run {
                continue;
            }
            let bytes = held.letter.body.len();
            if let Some(full) = self.group.push(held, bytes) {
                self.send(letters, full).await?;
            }
        }
        let rest = self.group.take();
        self.send(letters, rest).await?;
        Ok(false)
    }

    /// Sends a group when it is due, unless the replay is to end before.
    async fn send(
        &mut self,
        letters: &mut impl DeadLetters,
        group: Vec<Held>,
    ) -> Result<(), QueueError> {
        if group.is_empty() {
            return Ok(());
        }
        if let Some(pace) = &self.pace {
            tokio::select! {
                () = tokio::time::sleep_until(pace.next.into()) => {}
                () = self.stop.asked() => {}
            }
        }
        if self.stop.is_asked() {
            return Ok(());
        }
        let count = group.len();
        if let Some(pace) = &mut self.pace {
            pace.sent(count);
        }
        let left = letters.replay(group).await?;
        self.replayed += count - left.len();
        for held in left {
            self.stays(&held, "its subscriber has no retry queue any more: when it is configured again its daemon takes it back");
        }
        Ok(())
    }

    /// Tells of a letter that stays, with the number that it has then.
    fn stays(&mut self, held: &Held, why: &'static str) {
        self.skipped += 1;
        let number = self.choice.number;
        let left = if self.dry_run { number } else { number - self.chosen };
        self.watcher.stays(&Staying { held, number, left, why });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        delivery::{AttemptLog, DeadLetter},
        letters::{Filters, Name, Statuses},
        supervisor::signal::Stops,
    };
    use std::{
        collections::VecDeque,
        sync::{
            Arc, Mutex,
            atomic::{AtomicU16, Ordering},
        },
    };

    /// Dead letters in memory: a walk has those that were there when it began.
    struct Fake {
        queue: Arc<Mutex<Vec<DeadLetter>>>,
        sent: Arc<Mutex<Vec<String>>>,
        walk: VecDeque<DeadLetter>,
    }

    impl DeadLetters for Fake {
        fn left(&self) -> u32 {
            self.walk.len() as u32
        }

        async fn next(&mut self) -> Result<Option<Held>, QueueError> {
            Ok(self.walk.pop_front().map(|letter| Held::new(letter, Some("a".to_owned()))))
        }

        async fn replay(&mut self, letters: Vec<Held>) -> Result<Vec<Held>, QueueError> {
            for id in letters.into_iter().filter_map(|held| held.letter.id) {
                self.queue.lock().expect("not poisoned").retain(|l| l.id.as_ref() != Some(&id));
                self.sent.lock().expect("not poisoned").push(id);
            }
            Ok(Vec::new())
        }

        async fn purge(&mut self, _: Vec<Held>) -> Result<(), QueueError> {
            unreachable!("nothing is purged here")
        }

        async fn close(self) -> Result<(), QueueError> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_slow_replay_walks_many_times_and_each_walk_goes_on_where_the_last_ended() {
        let queue = Arc::new(Mutex::new((1..=20).map(letter).collect::<Vec<_>>()));
        let sent = Arc::new(Mutex::new(Vec::new()));
        let opened = AtomicU16::new(0);
        let open = async || {
            // More letters die meanwhile; they are not part of this walk.
            let n = opened.fetch_add(1, Ordering::Relaxed);
            queue.lock().expect("not poisoned").extend((n > 0).then(|| letter(99 + 2 * n)));
            let walk = queue.lock().expect("not poisoned").clone().into();
            Ok(Fake { queue: queue.clone(), sent: sent.clone(), walk })
        };
        let selection = Selection {
            names: [1, 3, 4, 11, 19].map(Name::Number).to_vec(),
            filters: Filters { status: Some(Statuses::One(501)), ..Filters::default() },
            ..of_a()
        };
        let stops = Stops::never();
        let mut replay = Replay::new(&selection, &stops, ()).rate(Some(100_000.0));
        replay.max_round = Duration::ZERO;
        let done = replay.run(open().await.expect("opens"), open).await.expect("replays");
        // One of the named letters passes no filter.
        assert_eq!((done.letters, done.passed), (4, 20));
        assert_eq!(replay.choice().missing(), [&Name::Number(4)]);
        assert_eq!(*sent.lock().expect("not poisoned"), ["msg_1", "msg_3", "msg_11", "msg_19"]);
        assert_eq!(opened.load(Ordering::Relaxed), 20, "a round for each letter");
        assert_eq!(queue.lock().expect("not poisoned").len(), 20 - 4 + 19);
    }

    #[tokio::test]
    async fn a_replay_with_a_rate_is_spread_over_the_second() {
        let (selection, stops) = (of_a(), Stops::never());
        for (rate, most) in [(0.5, 1), (5.0, 1), (39.0, 1), (100.0, 5), (100_000.0, GROUP_LETTERS)]
        {
            let replay = Replay::new(&selection, &stops, ()).rate(Some(rate));
            assert_eq!(replay.group.most, most, "{rate}");
        }
        let queue = Arc::new(Mutex::new((1..=6).map(letter).collect::<Vec<_>>()));
        let fake = Fake {
            queue: queue.clone(),
            sent: Arc::default(),
            walk: queue.lock().expect("not poisoned").clone().into(),
        };
        let begin = clock::instant();
        let open = async || Err(QueueError::new("it is opened once"));
        let mut replay = Replay::new(&selection, &stops, ()).rate(Some(20.0));
        replay.run(fake, open).await.expect("replays");
        // The first at once, each of the others a twentieth of a second after the one before.
        let took = clock::instant() - begin;
        assert!(took >= Duration::from_millis(5 * 50), "{took:?}");
    }

    fn of_a() -> Selection {
        Selection { subscriber: Some("a".to_owned()), ..Selection::default() }
    }

    fn letter(n: u16) -> DeadLetter {
        DeadLetter {
            content_encoding: None,
            kind: MessageKind::Batch,
            reason: Reason::Exhausted,
            body: bytes::Bytes::new(),
            content_type: None,
            id: Some(format!("msg_{n}")),
            events: 1,
            attempts: 1,
            status: Some(500 + n % 2),
            error: String::new(),
            first_attempt_at: None,
            died_at: None,
            attempt_log: AttemptLog::default(),
            prints: None,
        }
    }
}
