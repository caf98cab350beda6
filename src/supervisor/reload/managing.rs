//! Changes of the subscribers that are made over the API. They go the way of a reload: one at a time,
//! to the same fleet.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    sync::{MutexGuard, watch},
    time::{Instant, timeout},
};

use super::{Because, Reloader, Unchanged, log_managed};
use crate::{
    clock,
    config::{
        Config, Subscriber,
        managed::{self, Document, Wrong},
    },
    crypto::secret::Secret,
    delivery::SubscriberName,
    policy::retry::Backoff,
    queue::{Queue, Sharing},
    store::{Deleted, NewOperation, Put, Store, StoreError, StoredSubscriber},
    supervisor::managed::{Entry, Managed},
};

const BECAUSE: Because = Because::Operator("the API");

/// The shortest and the longest time between two tries to put a set into use that was refused.
const FIRST_TRY: Duration = Duration::from_millis(200);
const LAST_TRY: Duration = Duration::from_secs(60);

/// The time between two tries to read the id of the store, or to record that it has subscribers.
const OWNER_AGAIN: Duration = Duration::from_secs(10);

/// Timeout of reading the id of the store: a disk that hangs holds nothing else up.
const ID_TIMEOUT: Duration = Duration::from_secs(5);

/// What it means that it is not known whose subscribers count on the queue.
pub const UNKNOWN: &str = "it is not known which store has the history of [queue] prefix, or subscribers made over the API, and whether that \
     is this daemon's: right after a start, or while its `store.db` is away; this daemon unbinds nobody, and changes none; try again in a moment";

/// What it means that another store's subscribers count on the queue.
pub const ELSEWHERE: &str = "another store has the history of [queue] prefix, or subscribers made over the API for it: this daemon unbinds \
     nobody, and changes none; give each daemon a prefix of its own, or have this store count: hooktrail store adopt";

/// The stores that count on a queue which several daemons may share, as it records them; the outer
/// `None` while that is not known.
#[derive(Debug)]
pub struct Owners {
    /// That of history.
    pub history: watch::Receiver<Option<Option<String>>>,
    /// That of subscribers made over the API.
    pub subscribers: watch::Receiver<Option<Option<String>>>,
    /// This daemon may change subscribers: it leaves them to the store of history where none has any
    /// yet.
    pub manages: bool,
    /// This daemon has a store, which may be the one that counts.
    pub has_store: bool,
}

impl Owners {
    /// The store whose subscribers count.
    fn borrow_and_update(&mut self) -> Option<Option<String>> {
        let (history, subscribers) = (
            self.history.borrow_and_update().clone(),
            self.subscribers.borrow_and_update().clone(),
        );
        match subscribers {
            Some(None) if self.manages => history,
            known => known,
        }
    }

    /// False when the queue is dropped.
    async fn changed(&mut self) -> bool {
        tokio::select! {
            changed = self.history.changed() => changed.is_ok(),
            changed = self.subscribers.changed() => changed.is_ok(),
        }
    }

    /// No other store has history, which comes first where no store has subscribers yet.
    fn may_claim(&self, own: &str) -> bool {
        !matches!(&*self.history.borrow(), Some(Some(history)) if history != own)
    }

    /// No store has subscribers, by the record.
    fn lack_subscribers(&self) -> bool {
        *self.subscribers.borrow() == Some(None)
    }
}

/// The right to change the set: nobody else changes it meanwhile.
#[derive(Debug)]
pub struct Editing<'r> {
    reloader: &'r Reloader,
    _one: MutexGuard<'r, ()>,
}

/// A subscriber that was stored.
#[derive(Debug)]
pub struct Stored {
    pub subscriber: StoredSubscriber,
    /// Its queue gets its events from now on.
    pub is_bound: bool,
    /// Why the daemon does not work with it yet.
    pub problem: Option<String>,
}

/// Why nothing was changed, as far as is known.
#[derive(Debug)]
pub enum NotStored {
    /// The subscriber has this version, or there is none.
    Differs(Option<u64>),
    Store(StoreError),
}

impl Reloader {
    /// The subscribers that were made over the API.
    pub fn managed(&self) -> Arc<Managed> {
        self.0.managed.borrow().clone()
    }

    /// The configuration of the files alone.
    pub fn of_files(&self) -> Arc<Config> {
        self.0.of_files.borrow().clone()
    }

    pub async fn edit(&self) -> Editing<'_> {
        Editing { reloader: self, _one: self.0.reloading.lock().await }
    }

    /// Goes on with the subscribers that the store has now, and with those that it has lost. Returns
    /// when they are in use, or cannot be.
    pub async fn read_store(&self, store: &impl Store) {
        let editing = self.edit().await;
        let kept = store.subscribers().await;
        let (files, before) = (self.of_files(), self.managed());
        let managed = before.read_again(kept, &files, clock::now());
        if managed.is_as(&before) {
            return;
        }
        log_managed(&managed, &files, &before);
        // It is logged.
        editing.go_on(managed, Because::Files("the store has other subscribers")).await.ok();
    }

    /// Has the queue unbind nobody while another store's subscribers count, or that is not known: that
    /// store may have some of which this one knows nothing. Claims the queue as long as this store
    /// has some. Ends when the queue is dropped.
    pub async fn follow_owner(&self, mut owners: Owners, queue: &impl Queue, store: &impl Store) {
        let (mut is_told, mut is_unclaimed) = (false, false);
        let mut managed = self.0.managed.subscribe();
        loop {
            let found = owners.borrow_and_update();
            let has_some = !managed.borrow_and_update().names().is_empty();
            let sharing = match &found {
                None => Sharing::Unknown,
                Some(None) => Sharing::Alone,
                Some(Some(_)) if !owners.has_store => Sharing::Elsewhere,
                Some(Some(owner)) => match store_id(store).await {
                    Ok(own) if own == *owner => Sharing::Alone,
                    Ok(_) => Sharing::Elsewhere,
                    // Its own store is away.
                    Err(_) => Sharing::Unknown,
                },
            };
            let is_elsewhere = sharing == Sharing::Elsewhere;
            match (std::mem::replace(&mut is_told, is_elsewhere), is_elsewhere) {
                (false, true) => tracing::warn!("{ELSEWHERE}"),
                (true, false) if sharing == Sharing::Alone => {
                    tracing::info!("this daemon's subscribers count again on [queue] prefix");
                }
                // It is not over while nothing is known.
                (true, false) => is_told = true,
                _ => {}
            }
            self.0.removals.share(sharing);
            let is_own_away = sharing == Sharing::Unknown && found.is_some();
            let claims = has_some && sharing == Sharing::Alone && owners.lack_subscribers();
            let was_unclaimed = is_unclaimed;
            is_unclaimed = claims && !claimed(queue, store, &owners, was_unclaimed).await;
            tokio::select! {
                is_open = owners.changed() => if !is_open { return },
                // The sender is this reloader's.
                Ok(()) = managed.changed() => {}
                () = tokio::time::sleep(OWNER_AGAIN), if is_own_away || is_unclaimed => {}
            }
        }
    }

    /// Puts the set into use that was refused before.
    async fn go_on_again(&self) {
        let editing = self.edit().await;
        if *self.0.is_behind.borrow() {
            let managed = self.managed().checked_again(&self.of_files(), clock::now());
            let because = Because::Files("a change over the API was refused before");
            editing.go_on(managed, because).await.ok();
        }
    }

    /// Keeps the set true: reads the store when it says so, drops secrets that have been replaced when
    /// their time is over, and puts a set into use that was refused before.
    pub async fn follow_store(&self, store: &impl Store) {
        let mut to_read = store.subscribers_to_read();
        let (mut managed, mut behind) = (self.0.managed.subscribe(), self.0.is_behind.subscribe());
        let mut backoff = Backoff::new(FIRST_TRY, LAST_TRY);
        let mut again = None;
        loop {
            again = match (*behind.borrow_and_update(), again) {
                (false, _) => {
                    backoff.reset();
                    None
                }
                (true, None) => Some(Instant::from_std(clock::instant()) + backoff.grow()),
                (true, again) => again,
            };
            let next = managed.borrow_and_update().next_retirement(clock::now());
            tokio::select! {
                Ok(()) = to_read.changed() => self.read_store(store).await,
                () = at(next) => {
                    let editing = self.edit().await;
                    let managed = self.managed().checked_again(&self.of_files(), clock::now());
                    let because = Because::Files("the overlap of a rotated secret is over");
                    editing.go_on(managed, because).await.ok();
                }
                () = sleep_until(again) => {
                    again = None;
                    self.go_on_again().await;
                }
                // The senders are this reloader's.
                Ok(()) = managed.changed() => {}
                Ok(()) = behind.changed() => {}
            }
        }
    }
}

/// The id of the store, in time.
///
/// # Errors
/// The store is away, or does not answer.
pub async fn store_id(store: &impl Store) -> Result<String, StoreError> {
    timeout(ID_TIMEOUT, store.id()).await.unwrap_or_else(|_| {
        let why = format!("`store.db` does not answer within {} s", ID_TIMEOUT.as_secs());
        Err(StoreError::new(why))
    })
}

/// Claims the queue for the subscribers of this store; returns whether that is recorded.
async fn claimed(queue: &impl Queue, store: &impl Store, owners: &Owners, is_told: bool) -> bool {
    // A store that is away is reported, and its id is asked for again.
    let Ok(id) = store_id(store).await else { return false };
    // Those that are left from when this daemon managed some are not put before those of the store
    // of history.
    if !owners.may_claim(&id) {
        return true;
    }
    match queue.claim_subscribers(&id).await {
        Ok(()) => true,
        // Another one was faster, and counts.
        Err(e) if e.is_of_another_store() => true,
        Err(error) => {
            let what = "it is not recorded that this store has subscribers made over the API";
            match is_told {
                false => {
                    tracing::warn!(%error, "{what}, so that another daemon may unbind them; trying again");
                }
                true => tracing::debug!(%error, "{what}"),
            }
            false
        }
    }
}

async fn sleep_until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Waits for a time of the clock.
async fn at(time: Option<SystemTime>) {
    let Some(time) = time else { return std::future::pending().await };
    let left = time.duration_since(clock::now()).unwrap_or_default();
    // A little later: the clock and the timer need not agree to the millisecond.
    tokio::time::sleep(left + Duration::from_millis(10)).await;
}

impl Editing<'_> {
    pub fn managed(&self) -> Arc<Managed> {
        self.reloader.managed()
    }

    /// The subscriber in use, of a file or made over the API.
    pub fn in_use(&self, name: &str) -> Option<Arc<Subscriber>> {
        self.reloader.config().subscribers.iter().find(|s| s.name == name).cloned()
    }

    pub fn of_file(&self, name: &str) -> Option<Arc<Subscriber>> {
        self.reloader.of_files().subscribers.iter().find(|s| s.name == name).cloned()
    }

    pub fn entry(&self, name: &str) -> Option<Entry> {
        self.managed().get(name).cloned()
    }

    /// The number of all subscribers, of those that cannot run too.
    pub fn count(&self) -> usize {
        let mut names = self.reloader.of_files().names();
        names.extend(self.managed().names());
        names.len()
    }

    /// # Errors
    /// All that is wrong with the document.
    pub fn check(&self, document: &Document) -> Result<Subscriber, Vec<Wrong>> {
        managed::check(&self.reloader.of_files(), &[document], clock::now()).remove(0)
    }

    /// Stores a subscriber, and puts it into use. `expected`: the version that it must have.
    ///
    /// # Errors
    /// It is not stored, or that is unknown.
    pub async fn put(
        &self,
        store: &impl Store,
        name: &SubscriberName,
        document: Secret,
        expected: Option<u64>,
        operation: NewOperation,
    ) -> Result<Stored, NotStored> {
        let put = async |expected, operation: NewOperation| {
            let put = store.put_subscriber(name, document.clone(), expected, operation).await;
            match put.map_err(NotStored::Store)? {
                Put::Stored(stored) => Ok(stored),
                Put::Differs(version) => Err(NotStored::Differs(version)),
            }
        };
        let stored = match put(expected, operation.clone()).await {
            // The store has lost it; the daemon has not.
            Err(NotStored::Differs(None)) if expected.is_some() && !self.is_maybe_deleted(name) => {
                put(None, operation).await?
            }
            stored => stored?,
        };
        let files = self.reloader.of_files();
        let managed = self.managed().with(stored.clone(), &files, clock::now());
        let not_bound = self.go_on(managed, BECAUSE).await;
        let is_bound = not_bound.as_ref().is_ok_and(|not_bound| !not_bound.contains(name));
        let problem = not_bound.err().map(|why| why.to_string());
        Ok(Stored { subscriber: stored, is_bound, problem })
    }

    /// Deletes a subscriber of this version, and takes it out of use. `drops`: its queues are to be
    /// deleted afterwards. Returns whether the daemon has done that.
    ///
    /// # Errors
    /// It is not deleted, or that is unknown.
    pub async fn delete(
        &self,
        store: &impl Store,
        name: &SubscriberName,
        expected: u64,
        drops: bool,
        operation: NewOperation,
    ) -> Result<Result<(), Unchanged>, NotStored> {
        match store.delete_subscriber(name, expected, drops, operation).await {
            // A store that lacks it has lost it, or made an earlier deletion of unknown fate.
            Ok(Deleted::Yes | Deleted::Differs(None)) => {}
            Ok(Deleted::Differs(version)) => return Err(NotStored::Differs(version)),
            Err(e) => {
                if e.is_unknown() {
                    let managed = self.managed().maybe_without(name);
                    self.reloader.0.managed.send_replace(Arc::new(managed));
                }
                return Err(NotStored::Store(e));
            }
        }
        if self.of_file(name.as_str()).is_none() {
            self.reloader.0.removals.release(name);
        }
        Ok(self.go_on(self.managed().without(name), BECAUSE).await.map(drop))
    }

    fn is_maybe_deleted(&self, name: &SubscriberName) -> bool {
        self.entry(name.as_str()).is_some_and(|entry| entry.is_maybe_deleted())
    }

    /// Puts another set into use. It is the one that counts from now on, also if the queue refuses it:
    /// [`Reloader::follow_store`] tries that again. Returns the subscribers that are not bound yet.
    async fn go_on(
        &self,
        managed: Managed,
        because: Because,
    ) -> Result<BTreeSet<SubscriberName>, Unchanged> {
        let inner = &self.reloader.0;
        let files = Config::clone(&self.reloader.of_files());
        inner.managed.send_replace(Arc::new(managed.clone()));
        let done = self.reloader.put_into_use(files, managed, false).await;
        match &done {
            Ok(super::Reloaded { changes, not_bound }) => {
                let count = self.reloader.config().subscribers.len();
                inner.board.metrics().configured(count, clock::now());
                self.reloader.log_changes(changes, not_bound, because.text());
            }
            Err(Unchanged::Stopping) => {}
            Err(why) => {
                let (because, error) = (because.text(), why.to_string());
                if self.reloader.is_behind(true) {
                    tracing::error!(
                        because,
                        error,
                        "a change of subscribers is not in use; trying again"
                    );
                } else {
                    tracing::debug!(because, error, "a change of subscribers is still not in use");
                }
            }
        }
        done.map(|reloaded| reloaded.not_bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::testing,
        queue::{QueueError, Removals, fake::Fake},
        store::{KeptSubscribers, fake::FakeStore},
        telemetry::{log, metrics::Metrics, status::Board},
    };

    /// A reloader whose fleet takes every change.
    fn reloader(removals: &Removals) -> Reloader {
        reloader_of(removals, 0)
    }

    /// A reloader whose fleet refuses so many changes first.
    fn reloader_of(removals: &Removals, mut refusals: usize) -> Reloader {
        let (reloader, mut changes) = Reloader::new(
            testing::embedded(""),
            KeptSubscribers::default(),
            Board::new(Metrics::new(clock::now())),
            removals.clone(),
            log::Level::default(),
        );
        tokio::spawn(async move {
            while let Some(change) = changes.recv().await {
                let refused = refusals > 0;
                refusals = refusals.saturating_sub(1);
                let done = match refused {
                    true => Err(QueueError::new("refused by the test")),
                    false => Ok(BTreeSet::new()),
                };
                change.done.send(done).ok();
            }
        });
        reloader
    }

    fn operation(what: &'static str) -> NewOperation {
        let (by, subject, details) = ("t".to_owned(), "siem".to_owned(), String::new());
        NewOperation { at: clock::now(), by, what, subject, details }
    }

    fn names(text: &str) -> BTreeSet<SubscriberName> {
        text.split_whitespace().map(SubscriberName::from).collect()
    }

    #[tokio::test]
    async fn a_change_over_the_api_removes_nobody_else_and_a_store_that_lost_one_neither() {
        let (removals, store) = (Removals::default(), FakeStore::default());
        let reloader = reloader(&removals);
        removals.judge(&names("a b c d e"), &names(""));
        assert_eq!(removals.held().expect("held").missing.len(), 5);
        let name = SubscriberName::from("siem");
        let document = || Secret::new(r#"{"url":"https://example.com/","signatures":[]}"#);
        let editing = reloader.edit().await;
        let stored = editing.put(&store, &name, document(), None, operation("add")).await;
        let version = stored.expect("it is stored").subscriber.version;
        drop(editing);
        assert!(removals.held().is_some() && !removals.may_unbind("a"));
        assert!(!removals.may_unbind("siem") && reloader.config().names().contains("siem"));
        // The store loses it. It goes on, and can still be changed and deleted.
        store.memory().kept.all.clear();
        reloader.read_store(&store).await;
        assert!(reloader.config().names().contains("siem"));
        assert_eq!(reloader.managed().problems().len(), 1);
        let editing = reloader.edit().await;
        let put = editing.put(&store, &name, document(), Some(version), operation("change")).await;
        let version = put.expect("it is stored").subscriber.version;
        store.memory().kept.all.clear();
        let deleted = editing.delete(&store, &name, version, false, operation("delete")).await;
        assert!(deleted.expect("it is deleted").is_ok());
        assert!(!reloader.config().names().contains("siem"));
        assert!(removals.may_unbind("siem") && !removals.may_unbind("a"));
    }

    #[tokio::test]
    async fn a_change_that_the_fleet_refuses_counts_and_is_tried_until_it_is_taken() {
        let (removals, store) = (Removals::default(), FakeStore::default());
        let reloader = reloader_of(&removals, 2);
        let (following, of) = (reloader.clone(), store.clone());
        let follow = tokio::spawn(async move { following.follow_store(&of).await });
        let name = SubscriberName::from("siem");
        let document = Secret::new(r#"{"url":"https://example.com/","signatures":[]}"#);
        let editing = reloader.edit().await;
        let stored = editing.put(&store, &name, document, None, operation("add")).await;
        let stored = stored.expect("it is stored");
        assert!(!stored.is_bound && stored.problem.is_some_and(|why| why.contains("by the test")));
        assert!(!reloader.config().names().contains("siem"));
        drop(editing);
        let mut current = reloader.0.current.subscribe();
        let used = current.wait_for(|config| config.names().contains("siem"));
        timeout(Duration::from_secs(60), used).await.expect("in time").expect("open");
        assert!(!*reloader.0.is_behind.borrow());
        follow.abort();
    }

    #[tokio::test]
    async fn what_was_deleted_perhaps_is_not_made_again_by_a_change() {
        let (removals, store) = (Removals::default(), FakeStore::default());
        let reloader = reloader(&removals);
        let name = SubscriberName::from("siem");
        let document = || Secret::new(r#"{"url":"https://example.com/","signatures":[]}"#);
        let editing = reloader.edit().await;
        let stored = editing.put(&store, &name, document(), None, operation("add")).await;
        let version = stored.expect("it is stored").subscriber.version;
        // It was not known whether it was deleted, and it was.
        let managed = editing.managed().maybe_without(&name);
        assert!(!managed.is_as(&editing.managed()));
        reloader.0.managed.send_replace(Arc::new(managed));
        store.memory().kept.all.clear();
        let put = editing.put(&store, &name, document(), Some(version), operation("change")).await;
        assert!(matches!(put, Err(NotStored::Differs(None))), "{put:?}");
    }

    /// Waits until this is so.
    async fn in_time(is_so: impl AsyncFn() -> bool) {
        let wait = async {
            while !is_so().await {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(60), wait).await.expect("in time");
    }

    #[tokio::test]
    async fn a_store_with_subscribers_claims_the_queue_also_when_its_record_was_lost() {
        let (removals, store, queue) = (Removals::default(), FakeStore::default(), Fake::default());
        let reloader = reloader(&removals);
        let history = watch::Sender::new(Some(None));
        let subscribers = watch::Sender::new(Some(None));
        let owners = Owners {
            history: history.subscribe(),
            subscribers: subscribers.subscribe(),
            manages: false,
            has_store: true,
        };
        removals.share(Sharing::Unknown);
        let (following, to, of) = (reloader.clone(), queue.clone(), store.clone());
        let follow = tokio::spawn(async move { following.follow_owner(owners, &to, &of).await });
        let shared = async |expected| in_time(async || removals.sharing() == expected).await;
        let claims = async || {
            let all = std::cell::RefCell::new(Vec::new());
            in_time(async || {
                all.borrow_mut().extend(queue.take_claims());
                !all.borrow().is_empty()
            })
            .await;
            all.into_inner()
        };
        shared(Sharing::Alone).await;
        assert_eq!(queue.take_claims(), [""; 0], "it has none");
        let editing = reloader.edit().await;
        let document = Secret::new(r#"{"url":"https://example.com/","signatures":[]}"#);
        let put = editing.put(&store, &"siem".into(), document, None, operation("add")).await;
        put.expect("it is stored");
        assert_eq!(claims().await[0], "fake");
        subscribers.send_replace(Some(Some("other".to_owned())));
        shared(Sharing::Elsewhere).await;
        queue.take_claims();
        // The record was deleted. It does not put itself before the store of history.
        history.send_replace(Some(Some("other".to_owned())));
        subscribers.send_replace(Some(None));
        shared(Sharing::Alone).await;
        subscribers.send_replace(Some(Some("other".to_owned())));
        shared(Sharing::Elsewhere).await;
        assert_eq!(queue.take_claims(), [""; 0]);
        history.send_replace(Some(None));
        subscribers.send_replace(Some(None));
        assert_eq!(claims().await, ["fake"]);
        drop((history, subscribers));
        follow.await.expect("ends");
    }

    #[tokio::test]
    async fn nobody_is_unbound_before_it_is_known_that_no_other_stores_subscribers_count() {
        let (removals, store, queue) = (Removals::default(), FakeStore::default(), Fake::default());
        let [history, subscribers] = [const { None }; 2].map(watch::Sender::new);
        let follow = |manages, has_store| {
            let (history, subscribers) = (history.subscribe(), subscribers.subscribe());
            let owners = Owners { history, subscribers, manages, has_store };
            let (following, queue, of) = (reloader(&removals), queue.clone(), store.clone());
            tokio::spawn(async move { following.follow_owner(owners, &queue, &of).await })
        };
        let shared = async |expected| in_time(async || removals.sharing() == expected).await;
        let send = |to: &watch::Sender<_>, store: Option<&str>| {
            to.send_replace(Some(store.map(str::to_owned)));
        };
        let following = follow(true, true);
        shared(Sharing::Unknown).await;
        send(&subscribers, None);
        for (of, sharing) in [
            (None, Sharing::Alone),
            (Some("other"), Sharing::Elsewhere),
            (Some("fake"), Sharing::Alone),
        ] {
            send(&history, of);
            shared(sharing).await;
        }
        // Those that were made count, whoever has history.
        send(&subscribers, Some("other"));
        shared(Sharing::Elsewhere).await;
        send(&history, Some("other"));
        send(&subscribers, Some("fake"));
        shared(Sharing::Alone).await;
        // With its own store away it cannot know.
        store.memory().away = Some(StoreError::away("away"));
        send(&subscribers, Some("fake"));
        shared(Sharing::Unknown).await;
        store.memory().away = None;
        send(&subscribers, Some("fake"));
        shared(Sharing::Alone).await;
        following.abort();
        // One that makes none leaves those of others alone, and is not held up by history.
        send(&subscribers, None);
        let following = follow(false, true);
        shared(Sharing::Alone).await;
        send(&subscribers, Some("other"));
        shared(Sharing::Elsewhere).await;
        following.abort();
        // One that has no store need not know its id.
        store.memory().away = Some(StoreError::away("off"));
        send(&subscribers, None);
        let following = follow(false, false);
        shared(Sharing::Alone).await;
        send(&subscribers, Some("other"));
        shared(Sharing::Elsewhere).await;
        drop((history, subscribers));
        following.await.expect("ends");
    }
}
