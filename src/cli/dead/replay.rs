//! `dead replay`: sends dead letters again.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::{
    choice::{Choice, Which},
    group::{GROUP_LETTERS, Group},
    report::{finished, progress},
    walk::close,
};
use crate::{
    cli::{failed::Failed, text::visible},
    clock,
    delivery::{MessageKind, Reason},
    queue::{DeadLetters, Held, QueueError},
    supervisor::signal::Stops,
    wording::counted,
};

/// The most groups a second of a replay with a rate, as long as a group has room.
const GROUPS_A_SECOND: f64 = 20.0;

/// The duration after which a slow replay requeues the letters that it has passed by and starts
/// another walk: RabbitMQ closes a channel that holds a message for half an hour.
const MAX_ROUND: Duration = Duration::from_secs(600);

/// Skipped letters that are listed; the rest are only counted.
const MOST_SHOWN: usize = 100;

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

pub(super) struct Replay<'r> {
    choice: Choice<'r>,
    stops: &'r Stops,
    dry_run: bool,
    pace: Option<Pace>,
    /// The longest duration of a round.
    max_round: Duration,
    group: Group<Held>,
    bar: ProgressBar,
    /// Letters that were chosen and can be sent.
    chosen: usize,
    replayed: usize,
    /// Letters that were chosen and stay.
    skipped: usize,
}

impl<'r> Replay<'r> {
    pub(super) fn new(
        which: &'r Which,
        rate: Option<f64>,
        dry_run: bool,
        stops: &'r Stops,
    ) -> Self {
        // A group must not be a burst: one letter, or as many as are due within a twentieth of a
        // second.
        let most = rate.map_or(GROUP_LETTERS, |rate| {
            ((rate / GROUPS_A_SECOND) as usize).clamp(1, GROUP_LETTERS)
        });
        let pace = rate.filter(|_| !dry_run).map(|rate| Pace { rate, next: clock::instant() });
        let (choice, group) = (Choice::new(which), Group::new(most));
        Self {
            choice,
            stops,
            dry_run,
            pace,
            max_round: MAX_ROUND,
            group,
            bar: ProgressBar::hidden(),
            chosen: 0,
            replayed: 0,
            skipped: 0,
        }
    }

    pub(super) async fn run<D: DeadLetters>(
        mut self,
        first: D,
        open: impl AsyncFn() -> Result<D, QueueError>,
        json: bool,
    ) -> Result<(), Failed> {
        let total = first.left();
        self.bar = progress(total);
        let mut letters = first;
        loop {
            let walked = self.round(&mut letters, total as usize).await;
            let again = close(letters, walked).await.map_err(|e| self.failed(e))?;
            if !again {
                break;
            }
            letters = open().await?;
        }
        self.bar.finish_and_clear();
        let of = if self.stops.is_asked() { total as usize } else { self.choice.number };
        let done = if self.dry_run { self.chosen } else { self.replayed };
        finished("replay", done, self.skipped, of, &self.choice, self.dry_run, json);
        if self.stops.is_asked() {
            return Err(Failed::Runtime("interrupted: the others are where they were, in their order; run it again for them".to_owned()));
        }
        self.choice.complete()?;
        if self.skipped > 0 && self.choice.which.has_names() {
            return Err(Failed::Runtime(format!(
                "{} cannot be replayed; see above for the remedy",
                counted(self.skipped, "letter(s)")
            )));
        }
        Ok(())
    }

    fn failed(&self, why: Failed) -> Failed {
        self.bar.finish_and_clear();
        match why {
            Failed::Runtime(why) if self.replayed > 0 => {
                Failed::Runtime(format!("{why}; {} were replayed before", self.replayed))
            }
            other => other,
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
        while self.choice.number < total && !self.stops.is_asked() {
            // Each walk handles at least one letter.
            if self.choice.number > before && end.is_some_and(|end| clock::instant() >= end) {
                let rest = self.group.take();
                self.send(letters, rest).await?;
                return Ok(true);
            }
            let Some(held) = letters.next().await? else { break };
            self.bar.inc(1);
            if !self.choice.includes(&held) {
                continue;
            }
            if let Some(why) = cannot_be_replayed(&held, self.choice.which.orphans()) {
                self.skipped += 1;
                self.report(&held, why);
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

    /// Sends a group when it is due, unless the replay is interrupted before.
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
                () = self.stops.times(1) => {}
            }
        }
        if self.stops.is_asked() {
            return Ok(());
        }
        let count = group.len();
        if let Some(pace) = &mut self.pace {
            pace.sent(count);
        }
        let left = letters.replay(group).await?;
        self.replayed += count - left.len();
        for held in left {
            self.skipped += 1;
            self.report(&held, "its subscriber has no retry queue any more: when it is configured again its daemon takes it back");
        }
        Ok(())
    }

    /// Reports a letter that stays, with the number that it has then.
    fn report(&self, held: &Held, why: &str) {
        if self.skipped > MOST_SHOWN {
            if self.skipped == MOST_SHOWN + 1 {
                self.bar.suspend(|| {
                    eprintln!("more such letters follow; they are counted and not shown")
                });
            }
            return;
        }
        let (number, which) = (self.choice.number, self.choice.which);
        let arguments = which.arguments();
        let error = visible(&held.letter.error);
        if which.orphans() {
            let name = held.letter.id.as_deref().map_or_else(|| format!("@{number}"), visible);
            self.bar.suspend(|| {
                eprintln!("`{name}` is not replayed: {why} ({error}); inspect it with `hooktrail dead show {arguments} {name}`, delete it with `hooktrail dead purge {arguments} {name}`");
            });
            return;
        }
        let left = if self.dry_run { number } else { number - self.chosen };
        let moved = if left == number { String::new() } else { format!(" (@{left} from now on)") };
        self.bar.suspend(|| {
            eprintln!(
                "@{number}{moved} is not replayed, {why}: {error}; inspect it with `hooktrail dead show {arguments} @{left}`, then delete it with `hooktrail dead purge {arguments} @{left}`"
            );
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::Cli,
        delivery::{AttemptLog, DeadLetter},
    };
    use clap::Parser as _;
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
        let stops = Stops::never();
        let command = Cli::parse_from([
            "hooktrail",
            "dead",
            "replay",
            "a",
            "@1",
            "@3",
            "@4",
            "@11",
            "@19",
            "--status",
            "501",
        ]);
        let crate::cli::Command::Dead(command) = command.command else { unreachable!("parsed") };
        let (which, _) = command.split().expect("sound");
        let mut replay = Replay::new(&which, Some(100_000.0), false, &stops);
        replay.max_round = Duration::ZERO;
        // One of the named letters passes no filter.
        let done = replay.run(open().await.expect("opens"), open, true).await;
        assert!(
            matches!(done, Err(Failed::Runtime(why)) if why.contains("no dead letter with status 501 is @4;"))
        );
        assert_eq!(*sent.lock().expect("not poisoned"), ["msg_1", "msg_3", "msg_11", "msg_19"]);
        assert_eq!(opened.load(Ordering::Relaxed), 20, "a round for each letter");
        assert_eq!(queue.lock().expect("not poisoned").len(), 20 - 4 + 19);
    }

    #[tokio::test]
    async fn a_replay_with_a_rate_is_spread_over_the_second() {
        for (rate, most) in [(0.5, 1), (5.0, 1), (39.0, 1), (100.0, 5), (100_000.0, GROUP_LETTERS)]
        {
            assert_eq!(
                Replay::new(&all_of_a(), Some(rate), false, &Stops::never()).group.most,
                most,
                "{rate}"
            );
        }
        let queue = Arc::new(Mutex::new((1..=6).map(letter).collect::<Vec<_>>()));
        let fake = Fake {
            queue: queue.clone(),
            sent: Arc::default(),
            walk: queue.lock().expect("not poisoned").clone().into(),
        };
        let (which, stops) = (all_of_a(), Stops::never());
        let begin = clock::instant();
        let open = async || Err(QueueError::new("it is opened once"));
        Replay::new(&which, Some(20.0), false, &stops)
            .run(fake, open, true)
            .await
            .expect("replays");
        // The first at once, each of the others a twentieth of a second after the one before.
        let took = clock::instant() - begin;
        assert!(took >= Duration::from_millis(5 * 50), "{took:?}");
    }

    fn all_of_a() -> Which {
        let crate::cli::Command::Dead(command) =
            Cli::parse_from(["hooktrail", "dead", "replay", "a"]).command
        else {
            unreachable!("parsed")
        };
        command.split().expect("sound").0
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
