//! Confirmed publishing, from one task on one channel of its own connection.
//!
//! One task, because several that publish on one channel mix up their confirms. A connection of its
//! own, because the broker blocks a publishing connection as a whole (memory or disk alarm), acks
//! on it included.

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
    connection::{Claim, Connected, Dialer, Role, close},
    declarations::log_redeclared,
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

/// Timeout from handing over a group to the last of its confirms.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);

/// Groups that wait to be published; more wait to be handed over. The number of groups that wait
/// for confirms has no limit here, or one queue that never answers would hold up all others: the
/// requests in flight bound it.
const MAX_INBOX: usize = 64;

/// Confirms that may be outstanding without a group that waits for them. With more, the connection
/// is reopened: a queue that never answers leaves its confirms behind.
const MAX_ABANDONED: usize = 10_000;

/// The result of publishing one message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PublishResult {
    /// The message is in every queue that it was routed to.
    Stored,
    /// The message is in no queue: none is bound for it.
    Unroutable,
    /// The message was negatively acknowledged: a queue did not take it, others may have.
    Refused,
}

/// Whether messages can be published now.
#[derive(Debug, Clone)]
enum State {
    Writable,
    /// The broker blocks publishing, for this reason.
    Blocked(String),
    /// There is no usable connection; with the reason, once it is known.
    Away(Option<QueueError>),
}

impl State {
    fn is_writable(&self) -> bool {
        matches!(self, Self::Writable)
    }

    /// Why the broker does not confirm.
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
    reply: oneshot::Sender<Result<Vec<PublishResult>, QueueError>>,
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
    /// Starts the task. On each new connection it first declares those of hooktrail's own shared
    /// queues and exchanges that are missing.
    pub(super) fn start(
        topology: Topology,
        dialer: Dialer,
        declaring: Arc<Pool>,
        role: Role,
        troubles: &watch::Sender<Troubles>,
    ) -> Self {
        let publishing = role.outage(troubles);
        let (groups, inbox) = mpsc::channel(MAX_INBOX);
        let (sender, state) = watch::channel(State::Away(None));
        let stop = Arc::new(Notify::new());
        let task = tokio::spawn(
            Task {
                topology,
                claim: dialer.claim(role),
                declaring,
                role,
                inbox,
                state: sender,
                stop: stop.clone(),
                found_own: false,
            }
            .keep(publishing),
        );
        Self { groups, state, stop, task: Arc::new(AbortOnDrop(task)) }
    }

    /// Closes the connection, if there is one, and ends the task. Nothing can be published
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

    /// Publishes a group, mandatory, and returns the result of each message in order.
    ///
    /// # Errors
    /// The result is unknown: it was not confirmed in time, or the connection was lost.
    pub(super) async fn publish(
        &self,
        messages: Vec<Message>,
    ) -> Result<Vec<PublishResult>, QueueError> {
        debug_assert!(!self.task.0.is_finished());
        let (reply, answer) = oneshot::channel();
        let exchange = async {
            self.groups.send(Group { messages, reply }).await.ok()?;
            answer.await.ok()
        };
        // If this gives up first, the dropped `answer` keeps the task from publishing the group.
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

    /// Waits until it can publish. For callers with a client that waits; the messages of all others
    /// are safe meanwhile, so that these wait for an operator too.
    ///
    /// # Errors
    /// An operator has to act first, or it takes too long.
    pub(super) async fn ready(&self) -> Result<(), QueueError> {
        let refused = |s: &State| matches!(s, State::Away(Some(why)) if why.is_for_operator());
        let decided = async {
            let mut state = self.state.clone();
            // The reason of the last refusal may be fixed by now: the next try shows it.
            if refused(&state.borrow_and_update()) {
                state.changed().await.ok()?;
            }
            let state = state.wait_for(|s| s.is_writable() || refused(s)).await.ok()?;
            if let State::Away(why) = &*state { why.clone() } else { None }
        };
        match timeout(CONFIRM_TIMEOUT, decided).await {
            Ok(None) => Ok(()), // also when the task has ended: `publish` says so
            // Only this caller's request fails; the daemon goes on.
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
        // An error means that the task has ended, and with it all that could wait.
        self.state.clone().wait_for(State::is_writable).await.ok();
    }
}

struct Task {
    topology: Topology,
    claim: Claim,
    declaring: Arc<Pool>,
    role: Role,
    inbox: mpsc::Receiver<Group>,
    state: watch::Sender<State>,
    stop: Arc<Notify>,
    /// All of hooktrail's own queues existed before; those that are missing from then on were
    /// deleted or lost.
    found_own: bool,
}

impl Task {
    /// Runs until it is closed. Nothing is settled without this task, so that not even a panic ends
    /// it.
    async fn keep(mut self, mut publishing: ReportedOutage) {
        loop {
            let why = match AssertUnwindSafe(self.generation(&mut publishing)).catch_unwind().await
            {
                Ok(Ok(())) => return,
                Ok(Err(e)) => e,
                Err(_) => {
                    QueueError::new("publishing panicked; what was not confirmed is redelivered")
                }
            };
            self.state.send_replace(State::Away(Some(why.clone()))); // after a panic too
            publishing.failed(&why).await;
        }
    }

    /// Serves one connection until its end, which is an error unless it was closed.
    async fn generation(&mut self, publishing: &mut ReportedOutage) -> Result<(), QueueError> {
        let Connected { connection, counted: _open, .. } = self.claim.connect().await?;
        let ended = async {
            // Not the producers' exchange: a producer that deletes it to redeclare it must find
            // none of ours in its place.
            let mut broker = Broker::new(&self.declaring);
            let ensured = self.topology.ensure_own(&mut broker).await;
            if self.found_own {
                log_redeclared(&mut broker);
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
    /// Exchange, routing key and message id of each message, by which a returned one is recognised.
    keys: Vec<(String, String, Option<String>)>,
    results: Vec<Option<PublishResult>>,
    left: usize,
    /// A return of another group arrived with one of its confirms, so that one of its own may have
    /// arrived with another group.
    in_doubt: bool,
    reply: oneshot::Sender<Result<Vec<PublishResult>, QueueError>>,
    deadline: Instant,
}

type Confirmed = ((u64, usize), Result<Confirmation, lapin::Error>);

/// The publishing on one connection.
struct Generation {
    channel: Channel,
    role: Role,
    next_group: u64,
    groups: HashMap<u64, Pending>,
    confirms: FuturesUnordered<BoxFuture<'static, Confirmed>>,
    /// Confirms that have not arrived, and for which no group waits any more.
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

    /// Publishes groups until the connection fails; `None` if it was stopped.
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
        // The caller has given up: its messages are redelivered, and a late copy would only repeat
        // them.
        if group.reply.is_closed() {
            return Ok(());
        }
        let id = self.next_group;
        self.next_group += 1;
        let count = group.messages.len();
        let mut pending = Pending {
            keys: Vec::with_capacity(count),
            results: vec![None; count],
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

    /// Handles a confirm and all others that have arrived: the return of a message can arrive with
    /// a confirm that was resolved just before its own, and must be known before its group ends.
    async fn confirmed(&mut self, first: Confirmed) -> Result<(), lapin::Error> {
        let mut next = Some(first);
        let mut again = true;
        while let Some(((group, n), confirmation)) = next {
            let (result, returned) = match confirmation? {
                Confirmation::Ack(returned) => (PublishResult::Stored, returned),
                Confirmation::Nack(returned) => (PublishResult::Refused, returned),
                // Not in confirm mode: cannot be, and if it were nothing would be known.
                Confirmation::NotRequested => (PublishResult::Refused, None),
            };
            match self.groups.get_mut(&group) {
                Some(pending) => {
                    pending.left -= 1;
                    // A return may have decided it already.
                    pending.results[n].get_or_insert(result);
                }
                None => self.abandoned = self.abandoned.saturating_sub(1),
            }
            if let Some(returned) = returned {
                self.returned(group, &returned);
            }
            next = self.confirms.next().now_or_never().flatten();
            if next.is_none() && std::mem::take(&mut again) {
                // lapin's thread may be about to hand over the confirm that the return arrived
                // with.
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
            let same =
                |(key, result): (&(String, String, Option<String>), &Option<PublishResult>)| {
                    *result != Some(PublishResult::Unroutable)
                        && key.0 == d.exchange.as_str()
                        && key.1 == d.routing_key.as_str()
                        && key.2.as_deref() == id
                };
            p.keys.iter().zip(&p.results).position(same)
        };
        if let Some(pending) = self.groups.get_mut(&carrier) {
            if let Some(n) = find(pending) {
                pending.results[n] = Some(PublishResult::Unroutable);
                return;
            }
            pending.in_doubt = true;
        }
        match self.groups.values_mut().find_map(|p| find(p).map(|n| (p, n))) {
            Some((pending, n)) => pending.results[n] = Some(PublishResult::Unroutable),
            None => tracing::error!(
                exchange = d.exchange.as_str(),
                routing_key = d.routing_key.as_str(),
                "the broker returned a message that no group waits for"
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
                Err(QueueError::new("the broker's answers could not be assigned to their messages"))
            } else {
                Ok(p.results.into_iter().map(|f| f.unwrap_or(PublishResult::Refused)).collect())
            };
            p.reply.send(result).ok(); // the caller may have given up
        }
    }

    /// Gives up groups whose deadline has passed. The others go on: one queue without a leader
    /// never answers, and must not hold up the rest.
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
