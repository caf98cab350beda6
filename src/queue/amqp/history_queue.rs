//! The queue of history: declares it, binds it to every event once it is sound, and unbinds it when
//! it is not.
//!
//! A queue that cannot take a message makes the broker refuse the publish as a whole, for each
//! producer of the exchange. A broker that is killed within a second or two of declaring a quorum
//! queue leaves it in that state. So it is bound only when it is older than that and was consumed on
//! trial, and unbound at the first sign that it cannot be used: history has a gap then, and
//! producers go on. Only a channel on which an event was published before is held on: the broker
//! waits 65 s for the dead queue there (measured on 3.10), and then nacks that event.

use std::time::{Duration, Instant};

use tokio::{
    sync::watch,
    time::{sleep, sleep_until, timeout},
};

use super::{
    history_state::QueueState,
    pool::Quarantine,
    record::Lack,
    requests::Broker,
    restore::INTERVAL,
    shared::Shared,
    state_stream,
    topology::Topology,
    unusable::{try_consume, try_once},
};
use crate::{
    clock,
    queue::QueueError,
    telemetry::{outage::ReportedOutage, troubles::Harms},
};

/// Age at which a quorum queue outlives a killed broker. Measured: declared 0.5 s before it is lost,
/// 2 s before it is not.
const GROWN: Duration = Duration::from_secs(2);

/// Timeout of consuming the queue on trial. A broken queue does not answer at all, and as long as it
/// is bound it holds up producers.
const TRIAL: Duration = Duration::from_secs(5);

/// Time for which the queue has to be unusable, alone among the queues, before it is deleted with
/// what may be in it.
const GIVEN_UP: Duration = Duration::from_secs(30);

/// Shortest time between two trials of a queue that is bound.
const SOONEST: Duration = Duration::from_secs(5);

/// What the outage of the queue is called, and that of trying it.
const ABOUT: &str = "the queue of history";
const TRYING: &str = "trying the queue of history";

/// Why the queue is not kept as it should be.
enum Failed {
    Queue(QueueError),
    /// It could not be asked about or tried, which says nothing of it: the broker limits connections
    /// and channels.
    Untried(QueueError),
}

impl From<QueueError> for Failed {
    fn from(e: QueueError) -> Self {
        Self::Queue(e)
    }
}

/// Keeps the queue of history bound while this daemon has history, and unbinds it when it cannot be
/// used; deletes it where no history is configured.
pub(super) async fn keep(shared: &Shared) {
    let mut keeping = ReportedOutage::new(ABOUT, Harms::History, &shared.troubles);
    if !shared.topology.keeps_history() {
        while let Err(e) = remove(shared).await {
            keeping.failed(&e).await;
        }
        return;
    }
    let mut trying = ReportedOutage::new(TRYING, Harms::History, &shared.troubles);
    let mut keeper = Keeper::new(shared);
    let mut wanted = shared.history.wanted.subscribe();
    let mut lack = shared.history.recorded_lack.subscribe();
    loop {
        let is_wanted = *wanted.borrow_and_update();
        let checked = keeper.check(is_wanted).await;
        let tried = clock::instant();
        let again = async {
            match &checked {
                Ok(()) => {
                    trying.recovered();
                    keeping.recovered();
                    tokio::select! {
                        () = shared.history.suspected.notified() => {
                            keeper.tried = None;
                            sleep_until((tried + SOONEST).into()).await;
                        }
                        () = sleep(INTERVAL) => {}
                    }
                }
                // History goes on all the same, and lacks nothing.
                Err(Failed::Untried(error)) if shared.history.is_consuming() => {
                    trying.end();
                    tracing::debug!(%error, "the queue of history cannot be tried, and is consumed");
                    sleep(SOONEST).await;
                }
                Err(Failed::Untried(e)) => trying.failed(e).await,
                Err(Failed::Queue(e)) => {
                    trying.recovered();
                    keeping.failed(e).await;
                }
            }
        };
        tokio::select! {
            () = again => {}
            // An error means that the sender is gone, and everything with it.
            _ = wanted.changed() => {}
            // Another daemon has found that the queue is not bound.
            _ = lack.changed() => {}
        }
    }
}

/// Unbinds and deletes the queue, unless a daemon takes from it: that one keeps history.
async fn remove(shared: &Shared) -> Result<(), QueueError> {
    let mut broker = shared.broker();
    let queue = shared.topology.history();
    let Some(depth) = broker.depth(&queue).await? else { return Ok(()) };
    if depth.consumers > 0 {
        tracing::warn!(
            queue,
            "history is off in this configuration, and another daemon takes its events: the queue stays"
        );
        return Ok(());
    }
    shared.topology.unbind_history(&mut broker).await?;
    broker.delete_queue(&queue).await?;
    tracing::info!(queue, "history is off: its queue is unbound and deleted");
    Ok(())
}

struct Keeper<'a> {
    shared: &'a Shared,
    topology: &'a Topology,
    /// When this daemon declared the queue, or first found it.
    found: Option<Instant>,
    is_bound: bool,
    /// This daemon declared it and has never bound it: nothing is in it.
    is_empty: bool,
    /// Since when it cannot be used.
    broken: Option<Instant>,
    /// Why history lacks what is published now.
    lacking: Option<Lack>,
    /// Connections that had been made when it was last tried: without another one the broker was
    /// not restarted.
    tried: Option<usize>,
    /// Events that history lacks, by the record.
    recorded: watch::Receiver<Option<Lack>>,
}

impl<'a> Keeper<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self {
            shared,
            topology: &shared.topology,
            found: None,
            is_bound: false,
            is_empty: false,
            broken: None,
            lacking: None,
            tried: None,
            recorded: shared.history.recorded_lack.subscribe(),
        }
    }

    /// Tries the queue, and unbinds it if it cannot be used. If it `is_wanted`, declares it where it
    /// is missing, and binds it as soon as it is sound and old enough.
    async fn check(&mut self, is_wanted: bool) -> Result<(), Failed> {
        let mut broker = self.shared.broker();
        broker.ready().await.map_err(Failed::Untried)?;
        if !is_wanted {
            self.unbound();
            // Another daemon may have bound it.
            let queue = self.topology.history();
            return match broker.depth(&queue).await? {
                Some(_) => self.try_if_reconnected(&mut broker).await,
                None => Ok(()),
            };
        }
        self.topology.ensure_history(&mut broker).await?;
        if broker.take_declared().contains(&self.topology.history()) {
            // First: whoever takes from it waits for the next binding.
            self.unbound();
            if self.found.is_some() || self.shared.history.last_stored().is_some() {
                self.lack("its queue in RabbitMQ was deleted").await;
            }
            (self.found, self.is_empty) = (Some(clock::instant()), true);
        } else {
            self.try_if_reconnected(&mut broker).await?;
        }
        let found = *self.found.get_or_insert_with(clock::instant);
        if !self.is_bound {
            sleep_until((found + GROWN).into()).await;
            // The broker may have been killed meanwhile.
            self.tried = None;
            self.try_if_reconnected(&mut broker).await?;
            self.topology.bind_history(&mut broker).await?;
            self.bound();
        } else if self.recorded.has_changed().is_ok_and(|changed| changed)
            && self.recorded.borrow().is_some()
        {
            // Another daemon has found that it is not. It may have unbound a broken one. Until that
            // is reported the record counts as unread: one of these steps may fail.
            self.tried = None;
            self.try_if_reconnected(&mut broker).await?;
            self.topology.bind_history(&mut broker).await?;
            self.report_lack();
        }
        Ok(())
    }

    /// History lacks what is published from now on. That is recorded, unless it is already: if this
    /// daemon ends before the queue is bound, or is not the one with history, another one reports it.
    async fn lack(&mut self, why: &'static str) {
        let since = self.shared.history.last_stored();
        let lack = Lack { why: why.to_owned(), since, at: clock::now() };
        if self.recorded.borrow().is_none() {
            state_stream::record_lack(self.shared, lack.clone()).await;
        }
        self.lacking = Some(match self.lacking.take() {
            Some(known) => known.joined(lack),
            None => lack,
        });
    }

    /// The queue is bound: reports what history lacks, as this daemon or the record knows it.
    fn report_lack(&mut self) {
        let recorded = self.recorded.borrow_and_update().clone();
        let lack = match (recorded, self.lacking.take()) {
            (Some(recorded), Some(own)) => Some(recorded.joined(own)),
            (recorded, own) => recorded.or(own),
        };
        if let Some(lack) = lack {
            self.shared.history.lacked(&lack, clock::now());
        }
    }

    /// Tries the queue, unless it was found sound and no connection was made since: then the broker
    /// was not restarted.
    async fn try_if_reconnected(&mut self, broker: &mut Broker<'_>) -> Result<(), Failed> {
        // Before the trial: the broker may be restarted during it.
        let made = self.shared.dialer.connects();
        if self.tried != Some(made) {
            self.tried = None;
            let is_tried = self.try_queue(broker).await?;
            self.tried = is_tried.then_some(made);
        }
        Ok(())
    }

    /// Whether it was tried: it can be used.
    async fn try_queue(&mut self, broker: &mut Broker<'_>) -> Result<bool, Failed> {
        let (queue, began) = (self.topology.history(), clock::instant());
        let history = &self.shared.history;
        // What takes from it may have the only connection that history may have.
        let (connection, is_shared) = match self.shared.consuming.for_history().await {
            Ok(connection) => (connection, false),
            Err(_) if self.is_bound && history.is_consumed() => return Ok(false),
            Err(e) => match history.connection().filter(|_| self.is_bound) {
                Some(connection) => (connection, true),
                None => return Err(Failed::Untried(e)),
            },
        };
        let why = match tried(&connection, &queue).await? {
            Ok(()) => {
                self.broken = None;
                history.tried(began);
                tracing::debug!(queue, is_shared, "the queue of history can be used");
                // It may be the only one for which there is room.
                if !is_shared {
                    connection.close().await;
                }
                return Ok(true);
            }
            Err(why) => why,
        };
        self.topology.unbind_history(broker).await?;
        if std::mem::take(&mut self.is_bound) {
            tracing::warn!(
                queue,
                error = why,
                "the queue of history cannot be used: it is unbound, so that it does not hold up producers"
            );
        }
        self.unbound();
        self.lack("its queue in RabbitMQ could not be used").await;
        let broken = *self.broken.get_or_insert_with(clock::instant);
        let is_over = self.is_empty || clock::instant() - broken >= GIVEN_UP;
        if is_over && self.others_work().await {
            broker.delete_queue(&queue).await?;
            (self.found, self.broken) = (None, None);
            tracing::warn!(
                queue,
                "the queue of history cannot be used: it is deleted and redeclared"
            );
        }
        Err(Failed::Queue(QueueError::new(format!(
            "queue `{queue}` cannot be consumed: {why}; events are not kept meanwhile"
        ))))
    }

    /// Whether another queue can be used: otherwise a node is missing, and what is in the queue may
    /// come back.
    async fn others_work(&self) -> bool {
        let other = self.topology.orphans();
        let Ok(connection) = self.shared.consuming.for_history().await else { return false };
        matches!(timeout(TRIAL, try_once(connection, &other)).await, Ok(Ok(Ok(()))))
    }

    fn bound(&mut self) {
        (self.is_bound, self.is_empty) = (true, false);
        self.report_lack();
        let history = &self.shared.history;
        history.queue.send_replace(QueueState::Bound);
        self.shared.dialer.metrics.set_history_bound(true);
        tracing::info!(queue = self.topology.history(), "every event goes into history");
    }

    fn unbound(&mut self) {
        self.is_bound = false;
        // Only a trial shows whether it may be bound.
        self.shared.history.ends_consuming();
        self.shared.history.queue.send_replace(QueueState::Unbound);
        self.shared.dialer.metrics.set_history_bound(false);
    }
}

/// Tries whether the queue can be consumed; the inner error is why it cannot.
async fn tried(connection: &Quarantine, queue: &str) -> Result<Result<(), String>, Failed> {
    let silent = || format!("the broker does not answer within {} s", TRIAL.as_secs());
    let lease = match timeout(TRIAL, connection.lease()).await {
        Ok(leased) => leased.map_err(Failed::Untried)?,
        Err(_) => return Err(Failed::Untried(QueueError::new(silent()))),
    };
    Ok(match timeout(TRIAL, try_consume(&lease, queue)).await {
        Ok(tried) => tried.map_err(|unusable| unusable.why.to_string()),
        Err(_) => Err(silent()),
    })
}
