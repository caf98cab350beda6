//! Channels on shared connections, a bounded number on each.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicUsize, Ordering},
};

use futures_util::future::join_all;
use lapin::{Channel, Connection};
use tokio::sync::{Mutex, watch};

use super::{
    broker_error::answer,
    connection::{Claim, Connected, Dialer, Role, close},
    wire::{Inboxes, Wire},
};
use crate::{
    queue::QueueError,
    telemetry::{metrics::OpenConnection, outage::ReportedOutage, troubles::Troubles},
};

/// Channels on one connection. Its frame loop visits every channel for each frame: more of them
/// slow down all.
pub(super) const CHANNELS_PER_CONNECTION: usize = 100;

/// A channel, and its share in the connection that it is on.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) channel: Channel,
    seat: Seat,
}

impl Lease {
    /// The consumers of its connection that do without lapin.
    pub(super) fn inboxes(&self) -> &Inboxes {
        &self.seat.0.wire.inboxes
    }
}

/// A connection that is shared by channels. It ends with the last of them, unless it is the newest.
#[derive(Debug)]
struct Slot {
    connection: Connection,
    wire: Wire,
    open: AtomicUsize,
    /// Channels opened since the start. No channel number is used twice: lapin keeps the error with
    /// which the broker closed a channel under its number, and would answer the requests of the
    /// next channel with it.
    opened: AtomicUsize,
    numbers: usize,
    _counted: OpenConnection,
}

impl Slot {
    fn new(Connected { connection, wire, counted }: Connected) -> Arc<Self> {
        let numbers = match connection.configuration().channel_max() {
            0 => usize::from(u16::MAX),
            max => max.into(),
        };
        Arc::new(Self {
            connection,
            wire,
            open: AtomicUsize::new(0),
            opened: AtomicUsize::new(0),
            numbers,
            _counted: counted,
        })
    }

    /// A seat for one more channel, if one is free. Called by one task at a time.
    fn seat(self: &Arc<Self>) -> Option<Seat> {
        let free = self.open.load(Ordering::Relaxed) < CHANNELS_PER_CONNECTION
            && self.opened.load(Ordering::Relaxed) < self.numbers;
        free.then(|| {
            self.open.fetch_add(1, Ordering::Relaxed);
            self.opened.fetch_add(1, Ordering::Relaxed);
            Seat(self.clone())
        })
    }
}

#[derive(Debug)]
struct Seat(Arc<Slot>);

impl Seat {
    async fn open(self) -> Result<Lease, QueueError> {
        match answer(self.0.connection.create_channel()).await {
            Ok(channel) => Ok(Lease { channel, seat: self }),
            Err(why) => Err(QueueError::new(format!("the broker opens no channel: {why}"))),
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Connections for one purpose, made when they are needed: channels are leased from them.
#[derive(Debug)]
pub(super) struct Pool {
    dialer: Dialer,
    role: Role,
    state: Mutex<PoolState>,
    /// For those that are not shared. No channel on a shared one waits for them.
    own: Mutex<Connecting>,
}

#[derive(Debug)]
struct PoolState {
    slots: Vec<Weak<Slot>>,
    /// Stays open without a channel: the next one is needed soon.
    newest: Option<Arc<Slot>>,
    connecting: Connecting,
}

/// Makes connections that lanes need.
#[derive(Debug)]
struct Connecting {
    outage: ReportedOutage,
    claim: Claim,
}

impl Connecting {
    /// Waits for the broker indefinitely.
    async fn connected(&mut self) -> (Quarantine, Seat) {
        let trying = Trying(self);
        let Connecting { outage, claim } = &mut *trying.0;
        loop {
            let connected = claim.connect().await.map(|c| Quarantine(Slot::new(c)));
            match connected.and_then(|q| q.seat().map(|seat| (q, seat))) {
                Ok(connected) => {
                    outage.recovered();
                    return connected;
                }
                Err(e) => outage.failed(&e).await,
            }
        }
    }
}

/// A task waits for a connection. When none waits any more, a missing connection is no outage, and
/// history need not go without.
struct Trying<'c>(&'c mut Connecting);

impl Drop for Trying<'_> {
    fn drop(&mut self) {
        self.0.outage.end();
        self.0.claim.end();
    }
}

impl Pool {
    pub(super) fn new(dialer: Dialer, role: Role, troubles: &watch::Sender<Troubles>) -> Self {
        let shared = Connecting { outage: role.outage(troubles), claim: dialer.claim(role) };
        let own = Connecting { outage: role.own_outage(troubles), claim: dialer.claim_apart(role) };
        let state = PoolState { slots: Vec::new(), newest: None, connecting: shared };
        Self { state: Mutex::new(state), own: Mutex::new(own), dialer, role }
    }

    /// Leases a channel on a shared connection. Waits for the broker indefinitely.
    pub(super) async fn lease(&self) -> Result<Lease, QueueError> {
        self.seat().await.open().await
    }

    async fn seat(&self) -> Seat {
        // The lock is held while connecting: a task that arrives meanwhile needs that connection
        // too.
        let mut state = self.state.lock().await;
        state.slots.retain(|s| s.upgrade().is_some_and(|s| s.connection.status().connected()));
        let free = state.slots.iter().filter_map(Weak::upgrade).find_map(|s| s.seat());
        if let Some(seat) = free {
            return seat;
        }
        let (Quarantine(slot), seat) = state.connecting.connected().await;
        state.slots.push(Arc::downgrade(&slot));
        state.newest = Some(slot);
        seat
    }

    /// Opens a connection that is not shared, for a lane whose queue may end it. Waits for the broker
    /// indefinitely.
    pub(super) async fn own(&self) -> Quarantine {
        self.own.lock().await.connected().await.0
    }

    /// Opens a connection that is not shared, for a queue that may end it.
    pub(super) async fn quarantine(&self) -> Result<Quarantine, QueueError> {
        Ok(Quarantine(Slot::new(self.dialer.connect(self.role).await?)))
    }

    /// Opens a connection that is not shared, for history, which gives way to all others.
    pub(super) async fn for_history(&self) -> Result<Quarantine, QueueError> {
        Ok(Quarantine(Slot::new(self.dialer.connect_for_history(self.role).await?)))
    }

    /// Closes the connections that are still in use.
    pub(super) async fn close(&self) {
        // The task that holds the lock is connecting, so nothing has to be closed.
        let Ok(mut state) = self.state.try_lock() else { return };
        let slots: Vec<_> = state.slots.drain(..).filter_map(|s| s.upgrade()).collect();
        join_all(slots.iter().map(|s| close(&s.connection))).await;
    }
}

/// A connection that is not shared.
#[derive(Debug)]
pub(super) struct Quarantine(Arc<Slot>);

/// The same connection for another task, which does not keep it open.
#[derive(Debug)]
pub(super) struct Borrowed(Weak<Slot>);

impl Borrowed {
    /// The connection, while its task has it.
    pub(super) fn get(&self) -> Option<Quarantine> {
        self.0.upgrade().map(Quarantine)
    }
}

impl Quarantine {
    pub(super) async fn lease(&self) -> Result<Lease, QueueError> {
        self.seat()?.open().await
    }

    pub(super) async fn close(self) {
        close(&self.0.connection).await;
    }

    pub(super) fn borrowed(&self) -> Borrowed {
        Borrowed(Arc::downgrade(&self.0))
    }

    fn seat(&self) -> Result<Seat, QueueError> {
        self.0.seat().ok_or_else(|| {
            QueueError::new(
                "the broker allows no channel on a new connection; raise its channel_max",
            )
        })
    }
}
