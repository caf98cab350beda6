//! The play itself: events are published, delivered, and all accounted for.

use std::{collections::BTreeSet, time::Duration};

use tokio::sync::{oneshot, watch};

use super::{
    account::{Account, acted_on, ended},
    narrator::narrate,
    receiver::Receiver,
    sample::{ODD, audit_event, event_ids, refused_event},
    stage::Stage,
};
use crate::{
    admin::Admin,
    cli::{failed::Failed, keeping::History},
    clock,
    config::Config,
    history::{newcomers::Newcomers, replay::Replays},
    queue::{DeadLetters as _, NewEvent, Queue},
    store::KeptSubscribers,
    supervisor::{
        fleet::{self, Controls, Phase},
        reload::Reloader,
    },
    telemetry::{
        log::Level,
        metrics::Metrics,
        status::{Board, Observer},
    },
    wording::counted,
};

/// The time for deliveries after the last event; with the default `--for` the demo ends within 30
/// s.
const DRAINING: Duration = Duration::from_secs(13);

pub(super) struct Play<'p> {
    pub(super) stage: Stage,
    pub(super) config: &'p Config,
    pub(super) receivers: [&'p Receiver; 2],
    pub(super) publish_for: Duration,
}

impl Play<'_> {
    pub(super) async fn run<Q: Queue>(&self, queue: Q, admin: Admin) -> Result<(), Failed> {
        queue.ensure(&self.config.subscribers).await?;
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async move { drop(stopped.await) };
        let (phase, phases) = watch::channel(Phase::Starting);
        let metrics = Metrics::new(clock::now());
        let history = History::start(self.config, &metrics);
        let board = self.board(&metrics, &history);
        let (reloader, changes) = Reloader::new(
            self.config.clone(),
            KeptSubscribers::default(), // the store is new
            board.clone(),
            queue.removals().clone(),
            Level::default(),
        );
        let (replays, store) = (Replays::default(), history.store.clone());
        let serving =
            admin.serve(queue.clone(), store.clone(), replays.clone(), &reloader, &board, phases);
        let (newcomers, announced) = Newcomers::new();
        let mut keeper = history.keep(&queue, &reloader, replays, announced);
        let limit = watch::Sender::new(Duration::from_secs(5)).subscribe();
        let controls = Controls {
            phase: &phase,
            changes,
            board,
            shutdown_timeout: limit.clone(),
            newcomers,
            hurry: Box::pin(std::future::pending()),
        };
        let queue_unused = async {
            let drains = serving.done_with_the_queue();
            match &mut keeper {
                Some(keeper) => keeper.done_with_the_queue(drains, &limit).await,
                None => drains.await,
            }
        };
        let subscribers = self.config.subscribers.clone();
        let daemon = fleet::run(queue.clone(), subscribers, shutdown, controls, queue_unused);
        let show = async {
            let published = self.publish(&queue).await?;
            self.drain(&queue, &published).await?;
            // Before the daemon ends, which closes the queue.
            let mut dead = Vec::new();
            for r in self.receivers {
                dead.push(dead_ids(&queue, r.name).await?);
            }
            let acted = acted_on(&store).await;
            stop.send(()).ok(); // the daemon may have ended in an error, which is returned below
            Ok::<_, Failed>((published, dead, acted))
        };
        let (ended, shown) = tokio::join!(daemon, show);
        self.stage.end();
        if let Some(keeper) = keeper {
            keeper.close(*limit.borrow(), std::future::pending()).await;
        }
        serving.close().await;
        ended?;
        let (published, dead, acted) = shown?;
        self.account(&published, &dead, &acted)
    }

    fn board(&self, metrics: &Metrics, history: &History) -> Board {
        let stage = self.stage.clone();
        let narrating = Observer::new(move |subscriber, event| narrate(&stage, subscriber, event));
        let recording = history.observers.iter().cloned();
        Board::observed(
            metrics.clone(),
            [narrating].into_iter().chain(recording).collect::<Vec<_>>(),
        )
    }

    /// Publishes for `publish_for`, or until Ctrl-C; returns the ids of all events.
    async fn publish(&self, queue: &impl Queue) -> Result<BTreeSet<String>, Failed> {
        self.stage.begin();
        let mut published = BTreeSet::new();
        let mut tick = tokio::time::interval(Duration::from_millis(200));
        let mut interrupted = std::pin::pin!(tokio::signal::ctrl_c());
        let (mut shown_at, mut since_shown) = (Duration::ZERO, 0);
        let mut odd = ODD.iter().cycle();
        let mut next_odd = Duration::from_secs(2);
        while self.stage.elapsed() < self.publish_for {
            tokio::select! {
                _ = tick.tick() => {}
                _ = &mut interrupted => break,
            }
            let mut events: Vec<NewEvent> =
                (0..rand::random_range(1..=8)).map(|n| audit_event(published.len() + n)).collect();
            if self.stage.elapsed() >= next_odd {
                next_odd += Duration::from_millis(3500);
                let make = odd.next().copied().unwrap_or(refused_event);
                events.push(make(published.len() + events.len()));
            }
            since_shown += events.len();
            published.extend(events.iter().filter_map(|e| e.message_id.clone()));
            queue.publish(events).await?;
            if self.stage.elapsed() >= shown_at + Duration::from_secs(1) {
                shown_at = self.stage.elapsed();
                self.stage.say(&format!(
                    "{:>5.1}s  {} published",
                    shown_at.as_secs_f64(),
                    counted(since_shown, "event(s)")
                ));
                since_shown = 0;
            }
            self.stage.status(self.counts(published.len()));
        }
        self.stage.say(&format!(
            "{:>5.1}s  no more events; the rest is delivered",
            self.stage.elapsed().as_secs_f64()
        ));
        Ok(published)
    }

    fn counts(&self, published: usize) -> String {
        let [a, b] = self.receivers.map(|r| format!("{} {}", r.name, r.accepted().len()));
        format!("published {published}, accepted: {a}, {b}")
    }

    /// Waits until every event is accepted or dead, for at most [`DRAINING`].
    async fn drain(&self, queue: &impl Queue, published: &BTreeSet<String>) -> Result<(), Failed> {
        let deadline = clock::instant() + DRAINING;
        while clock::instant() < deadline {
            let mut left = 0;
            for r in self.receivers {
                let dead = dead_ids(queue, r.name).await?;
                left += Account::of(published, &r.accepted(), &dead).lost.len();
            }
            if left == 0 {
                return Ok(());
            }
            self.stage.status(format!(
                "{}; {} to come",
                self.counts(published.len()),
                counted(left, "deliver(y|ies)")
            ));
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        Ok(())
    }

    /// `dead`: the events in each receiver's dead letters. `acted_on`: the subscribers whose events
    /// may be left behind, such as one that somebody has paused in the console.
    fn account(
        &self,
        published: &BTreeSet<String>,
        dead: &[BTreeSet<String>],
        acted_on: &BTreeSet<String>,
    ) -> Result<(), Failed> {
        self.stage.say(&format!(
            "\n{} published to each subscriber:",
            counted(published.len(), "event(s)")
        ));
        let mut missing = Vec::new();
        for (r, dead) in self.receivers.into_iter().zip(dead) {
            let Account { delivered, repeated, dead, lost } =
                Account::of(published, &r.accepted(), dead);
            missing.push((r.name, lost.len()));
            let repeated = match repeated {
                0 => String::new(),
                _ => format!(" ({repeated} delivered more than once)"),
            };
            self.stage.say(&format!(
                "  {:<6} {delivered} delivered + {dead} in dead letters = {}{repeated}",
                r.name,
                delivered + dead,
            ));
            for id in lost.iter().take(5) {
                self.stage.say(&format!("         NOT ACCOUNTED FOR: {id}"));
            }
        }
        if let Some(said) = ended(&missing, acted_on)? {
            self.stage.say(&said);
            return Ok(());
        }
        self.stage.say(
            "Every event is accounted for.\n\nTry next:\n  \
             hooktrail listen --addr 127.0.0.1:9000     a receiver to write your own against\n  \
             hooktrail --config my.toml init            a configuration to begin with, each key explained\n  \
             hooktrail demo --for 10m                   the same with time to watch; --amqp URL takes a RabbitMQ",
        );
        Ok(())
    }
}

/// The events of a subscriber's dead letters.
async fn dead_ids(queue: &impl Queue, subscriber: &str) -> Result<BTreeSet<String>, Failed> {
    let mut letters = queue.dead_letters(subscriber).await?;
    let mut ids = BTreeSet::new();
    while let Some(held) = letters.next().await? {
        ids.extend(event_ids(&held.letter.body));
    }
    letters.close().await?;
    Ok(ids)
}
