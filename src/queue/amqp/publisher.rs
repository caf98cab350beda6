//! Confirmed publishing, from one task on one channel of its own connection.
//!
//! One task, because several that publish on one channel mix up who was confirmed. A connection of
//! its own, because the broker blocks a publishing connection as a whole (memory or disk alarm),
//! acks on it included.

use std::{collections::HashMap, fmt, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures_util::{
    FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream::FuturesUnordered,
};
use lapin::{
    Channel, Confirmation, Event,
    message::BasicReturnMessage,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use super::{
    broker_error::{BrokerError, answer},
    connection::{Dialer, Role, close},
    declarations::log_put_back,
    message::Message,
    pool::Pool,
    requests::Broker,
    topology::Topology,
};
use crate::{
    failpoint::{Step, reached},
    queue::QueueError,
    telemetry::{outage::ReportedOutage, troubles::Troubles},
};

/// From handing a group over to the last of its confirms.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);

/// Groups that wait to be published; more wait to be handed over. How many wait for confirms has no
/// limit here, or one queue that answers nobody would hold up all others: the requests in flight
/// bound it.
const MAX_INBOX: usize = 64;

/// A queue that never answers leaves its confirms behind; with so many of them the connection is
/// made anew.
const MAX_ABANDONED: usize = 10_000;

/// What the broker said of one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// In every queue that it was routed to.
    Stored,
    /// In no queue: nothing is bound for it.
    Unroutable,
    /// Negatively acknowledged; a queue did not take it, others may have.
    Refused,
}

/// Whether messages can be published now.
#[derive(Debug, Clone)]
enum State {
    Writable,
    /// By the broker, with its reason.
    Blocked(String),
    /// There is no connection that can be used; why, once that is known.
    Away(Option<QueueError>),
}

impl State {
    fn is_writable(&self) -> bool {
        matches!(self, Self::Writable)
    }

    /// What keeps the broker from confirming.
    fn why_not(&self) -> String {
        match self {
            Self::Blocked(why) => format!(": it blocks publishing ({why})"),
            Self::Away(Some(why)) => format!(": {why}"),
            Self::Writable | Self::Away(None) => String::new(),
        }
    }
}

struct Group {
    messages: Vec<Message>,
    reply: oneshot::Sender<Result<Vec<Fate>, QueueError>>,
}

/// Hands messages to the publishing task. Clones share it; the last one ends it.
#[derive(Debug, Clone)]
pub(super) struct Publisher {
    groups: mpsc::Sender<Group>,
    state: watch::Receiver<State>,
    stop: Arc<Notify>,
    task: Arc<AbortOnDrop>,
}

#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Publisher {
    /// Starts the task. On each new connection it sees first that hooktrail's own shared queues and
    /// exchanges are there.
    pub(super) fn start(
        topology: Topology,
        dialer: Dialer,
        declaring: Arc<Pool>,
        role: Role,
        troubles: &watch::Sender<Troubles>,
    ) -> Self {
        let publishing = role.outage(troubles);
        let (groups, inbox) = mpsc::channel(MAX_INBOX);
        let (tells, state) = watch::channel(State::Away(None));
        let stop = Arc::new(Notify::new());
        let task = tokio::spawn(
            Task {
                topology,
                dialer,
                declaring,
                role,
                inbox,
                state: tells,
                stop: stop.clone(),
                found_own: false,
            }
            .keep(publishing),
        );
        Self { groups, state, stop, task: Arc::new(AbortOnDrop(task)) }
    }

    /// Says goodbye to the broker, if it is there, and ends the task. Nothing can be published
    /// afterwards.
    pub(super) async fn close(&self) {
        let mut state = self.state.clone();
        if state.borrow().is_writable() {
            self.stop.notify_one();
            // The channel ends with the task.
            let ended = async { while state.changed().await.is_ok() {} };
            timeout(Duration::from_secs(3), ended).await.ok();
        }
    }

    /// Publishes a group, mandatory, and returns the fate of each message in order.
    ///
    /// # Errors
    /// The fate is unknown: not confirmed in time, or the connection was lost.
    pub(super) async fn publish(&self, messages: Vec<Message>) -> Result<Vec<Fate>, QueueError> {
        debug_assert!(!self.task.0.is_finished());
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.groups.send(Group { messages, reply }).await.ok()?;
            answer.await.ok()
        };
        // If this gives up first, the dropped `answer` tells the task not to publish the group any
        // more.
        match timeout(CONFIRM_TIMEOUT, exchange).await {
            Ok(Some(result)) => result,
            Ok(None) => {
                Err(QueueError::new("the connection to the broker was lost before it confirmed"))
            }
            Err(_) => Err(self.too_late()),
        }
    }

    fn too_late(&self) -> QueueError {
        QueueError::new(format!(
            "the broker did not confirm within {} s{}",
            CONFIRM_TIMEOUT.as_secs(),
            self.state.borrow().why_not()
        ))
    }

    /// Waits until it can publish. For those who publish because somebody asked for it and waits:
    /// what others hold is safe meanwhile, and they rather wait for an operator too.
    ///
    /// # Errors
    /// That takes an operator, or too long.
    pub(super) async fn ready(&self) -> Result<(), QueueError> {
        let refused = |s: &State| matches!(s, State::Away(Some(why)) if why.is_for_operator());
        let decided = async {
            let mut state = self.state.clone();
            // What it was refused for a moment ago may be mended: the next try tells.
            if refused(&state.borrow_and_update()) {
                state.changed().await.ok()?;
            }
            let state = state.wait_for(|s| s.is_writable() || refused(s)).await.ok()?;
            if let State::Away(why) = &*state { why.clone() } else { None }
        };
        match timeout(CONFIRM_TIMEOUT, decided).await {
            Ok(None) => Ok(()), // also when the task has ended: `publish` says so
            // It is whoever asked that fails, not the daemon.
            Ok(Some(why)) => Err(QueueError::new(why.to_string())),
            Err(_) => Err(self.too_late()),
        }
    }

    /// Whether there is a connection that the broker does not block.
    pub(super) fn is_writable(&self) -> bool {
        self.state.borrow().is_writable()
    }

    /// Waits until there is a connection that the broker does not block.
    pub(super) async fn writable(&self) {
        // An error means that the task has ended, and with it whoever would wait.
        self.state.clone().wait_for(State::is_writable).await.ok();
    }
}

struct Task {
    topology: Topology,
    dialer: Dialer,
    declaring: Arc<Pool>,
    role: Role,
    inbox: mpsc::Receiver<Group>,
    state: watch::Sender<State>,
    stop: Arc<Notify>,
    /// All of hooktrail's own was there before; what is missing from then on was deleted or lost.
    found_own: bool,
}

impl Task {
    /// Nothing is ever settled without this task, so not even a panic ends it.
    async fn keep(mut self, mut publishing: ReportedOutage) {
        loop {
            let why = match AssertUnwindSafe(self.generation(&mut publishing)).catch_unwind().await
            {
                Ok(Ok(())) => return,
                Ok(Err(e)) => e,
                Err(_) => QueueError::new(
                    "publishing panicked; what was not confirmed is delivered again",
                ),
            };
            self.state.send_replace(State::Away(Some(why.clone()))); // after a panic too
            publishing.failed(&why).await;
        }
    }

    /// One connection, from its beginning to its end, which is an error unless it was asked for.
    async fn generation(&mut self, publishing: &mut ReportedOutage) -> Result<(), QueueError> {
        let (connection, _open) = self.dialer.connect(self.role).await?;
        let ended = async {
            // Not the producers' exchange: whoever deletes it to declare it anew must find none of
            // ours in its place.
            let mut broker = Broker::new(&self.declaring);
            let ensured = self.topology.ensure_own(&mut broker).await;
            if self.found_own {
                log_put_back(&mut broker);
            }
            ensured?;
            self.found_own = true;
            drop(broker);
            let open = async {
                let channel = connection.create_channel().await?;
                channel.confirm_select(ConfirmSelectOptions::default()).await?;
                Ok(channel)
            };
            let channel = answer(open).await;
            let channel = channel.map_err(|why| {
                QueueError::new(format!("the broker opens no channel for publishing: {why}"))
            })?;
            publishing.recovered();
            let generation = Generation::new(channel, self.role);
            let why = generation
                .serve(&mut self.inbox, &self.state, connection.events_listener(), &self.stop)
                .await;
            why.map_or(Ok(()), Err)
        };
        let ended = ended.await;
        self.state.send_replace(State::Away(ended.as_ref().err().cloned()));
        close(&connection).await;
        ended
    }
}

/// A group that waits for its confirms.
struct Pending {
    /// Exchange, routing key and message id of each message: how a returned one is recognised.
    keys: Vec<(String, String, Option<String>)>,
    fates: Vec<Option<Fate>>,
    left: usize,
    /// A return of another group came with one of its confirms, so one of its own may be elsewhere.
    in_doubt: bool,
    reply: oneshot::Sender<Result<Vec<Fate>, QueueError>>,
    deadline: Instant,
}

type Confirmed = ((u64, usize), Result<Confirmation, lapin::Error>);

/// The time from one connection to the next.
struct Generation {
    channel: Channel,
    role: Role,
    next_group: u64,
    groups: HashMap<u64, Pending>,
    confirms: FuturesUnordered<BoxFuture<'static, Confirmed>>,
    /// Confirms that nobody waits for any more and that have not come.
    abandoned: usize,
}

impl Generation {
    fn new(channel: Channel, role: Role) -> Self {
        Self {
            channel,
            role,
            next_group: 0,
            groups: HashMap::new(),
            confirms: FuturesUnordered::new(),
            abandoned: 0,
        }
    }

    /// Publishes what comes in until the connection fails; `None` when it was told to stop.
    async fn serve(
        mut self,
        inbox: &mut mpsc::Receiver<Group>,
        state: &watch::Sender<State>,
        events: impl Stream<Item = Event>,
        stop: &Notify,
    ) -> Option<QueueError> {
        let mut events = std::pin::pin!(events);
        let mut blocked = false;
        state.send_replace(State::Writable);
        loop {
            let deadline = self.groups.values().map(|g| g.deadline).min();
            tokio::select! {
                biased;
                () = stop.notified() => return None,
                Some(event) = events.next() => match event {
                    Event::ConnectionBlocked(why) => {
                        tracing::warn!(reason = why, "the broker blocks publishing ({}): no retries, dead letters or relayed events until it unblocks", self.role.name());
                        blocked = true;
                        state.send_replace(State::Blocked(why));
                    }
                    Event::ConnectionUnblocked => {
                        tracing::info!("the broker unblocked publishing ({})", self.role.name());
                        blocked = false;
                        state.send_replace(State::Writable);
                    }
                    Event::Error(e) => return Some(self.fail(&BrokerError::from(e))),
                    _ => {}
                },
                Some(confirmed) = self.confirms.next(), if !self.confirms.is_empty() => {
                    if let Err(e) = self.confirmed(confirmed).await {
                        return Some(self.fail(&BrokerError::from(e)));
                    }
                }
                () = sleep_until(deadline.unwrap_or_else(far_future)), if deadline.is_some() => {
                    self.expire();
                    if self.abandoned > MAX_ABANDONED {
                        return Some(self.fail("too many messages were never confirmed"));
                    }
                }
                group = inbox.recv(), if !blocked => {
                    let group = group?;
                    match timeout(CONFIRM_TIMEOUT, self.publish(group)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(e)) => return Some(self.fail(&BrokerError::from(e))),
                        Err(_) => return Some(self.fail("the broker takes no more bytes")),
                    }
                }
            }
        }
    }

    async fn publish(&mut self, group: Group) -> Result<(), lapin::Error> {
        // Whoever asked has given up: its messages are being delivered again, a late copy would
        // only repeat them.
        if group.reply.is_closed() {
            return Ok(());
        }
        let id = self.next_group;
        self.next_group += 1;
        let count = group.messages.len();
        let mut pending = Pending {
            keys: Vec::with_capacity(count),
            fates: vec![None; count],
            left: count,
            in_doubt: false,
            reply: group.reply,
            deadline: Instant::from_std(crate::clock::instant()) + CONFIRM_TIMEOUT,
        };
        let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
        for (n, m) in group.messages.into_iter().enumerate() {
            let message_id = m.properties.message_id().as_ref().map(|id| id.as_str().to_owned());
            let confirm = self
                .channel
                .basic_publish(
                    m.exchange.as_str().into(),
                    m.routing_key.as_str().into(),
                    options,
                    &m.body,
                    m.properties,
                )
                .await?;
            pending.keys.push((m.exchange, m.routing_key, message_id));
            self.confirms.push(async move { ((id, n), confirm.await) }.boxed());
        }
        self.groups.insert(id, pending);
        reached(Step::Published);
        self.finish(); // an empty group has nothing to wait for
        Ok(())
    }

    /// Takes in a confirm and all others that are there: a message's return can come attached to a
    /// confirm that was resolved just before its own, and must be known before its group ends.
    async fn confirmed(&mut self, first: Confirmed) -> Result<(), lapin::Error> {
        let mut next = Some(first);
        let mut again = true;
        while let Some(((group, n), confirmation)) = next {
            let (fate, returned) = match confirmation? {
                Confirmation::Ack(returned) => (Fate::Stored, returned),
                Confirmation::Nack(returned) => (Fate::Refused, returned),
                // Not in confirm mode: cannot be, and if it were nothing would be known.
                Confirmation::NotRequested => (Fate::Refused, None),
            };
            match self.groups.get_mut(&group) {
                Some(pending) => {
                    pending.left -= 1;
                    // A return may have settled it already.
                    pending.fates[n].get_or_insert(fate);
                }
                None => self.abandoned = self.abandoned.saturating_sub(1),
            }
            if let Some(returned) = returned {
                self.returned(group, &returned);
            }
            next = self.confirms.next().now_or_never().flatten();
            if next.is_none() && std::mem::take(&mut again) {
                // lapin's thread may be about to hand over the confirm that the return came with.
                tokio::task::yield_now().await;
                next = self.confirms.next().now_or_never().flatten();
            }
        }
        self.finish();
        Ok(())
    }

    fn returned(&mut self, carrier: u64, returned: &BasicReturnMessage) {
        let d = &returned.delivery;
        let id = d.properties.message_id().as_ref().map(|id| id.as_str());
        let find = |p: &Pending| {
            let same = |(key, fate): (&(String, String, Option<String>), &Option<Fate>)| {
                *fate != Some(Fate::Unroutable)
                    && key.0 == d.exchange.as_str()
                    && key.1 == d.routing_key.as_str()
                    && key.2.as_deref() == id
            };
            p.keys.iter().zip(&p.fates).position(same)
        };
        if let Some(pending) = self.groups.get_mut(&carrier) {
            if let Some(n) = find(pending) {
                pending.fates[n] = Some(Fate::Unroutable);
                return;
            }
            pending.in_doubt = true;
        }
        match self.groups.values_mut().find_map(|p| find(p).map(|n| (p, n))) {
            Some((pending, n)) => pending.fates[n] = Some(Fate::Unroutable),
            None => tracing::error!(
                exchange = d.exchange.as_str(),
                routing_key = d.routing_key.as_str(),
                "the broker returned a message that nobody waits for"
            ),
        }
    }

    /// Answers the groups that are complete.
    fn finish(&mut self) {
        let done: Vec<u64> =
            self.groups.iter().filter(|(_, p)| p.left == 0).map(|(id, _)| *id).collect();
        for id in done {
            let Some(p) = self.groups.remove(&id) else { continue };
            let result = if p.in_doubt {
                Err(QueueError::new("the broker's answers could not be told apart"))
            } else {
                Ok(p.fates.into_iter().map(|f| f.unwrap_or(Fate::Refused)).collect())
            };
            p.reply.send(result).ok(); // whoever asked may have given up
        }
    }

    /// Gives up on groups whose time is over. The others go on: one queue without a leader answers
    /// nobody, and must not hold up the rest.
    fn expire(&mut self) {
        let now = Instant::from_std(crate::clock::instant());
        let late: Vec<u64> =
            self.groups.iter().filter(|(_, p)| p.deadline <= now).map(|(id, _)| *id).collect();
        for id in late {
            let Some(p) = self.groups.remove(&id) else { continue };
            let key = p.keys.first().map(|k| k.1.clone()).unwrap_or_default();
            self.abandoned += p.left;
            let why = format!(
                "the broker did not confirm a message for `{key}` within {} s",
                CONFIRM_TIMEOUT.as_secs()
            );
            p.reply.send(Err(QueueError::new(why))).ok();
        }
    }

    fn fail(&mut self, why: &(impl fmt::Display + ?Sized)) -> QueueError {
        let why = QueueError::new(format!(
            "the connection to the broker was lost before it confirmed: {why}"
        ));
        for (_, p) in self.groups.drain() {
            p.reply.send(Err(why.clone())).ok();
        }
        why
    }
}

fn far_future() -> Instant {
    Instant::from_std(crate::clock::instant()) + Duration::from_secs(86_400)
}
