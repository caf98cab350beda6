//! Changes of the subscribers that are made over the API. They go the way of a reload: one at a time,
//! to the same fleet.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::{MutexGuard, watch};

use super::{Because, Reloader, Unchanged, log_changes, log_managed};
use crate::{
    clock,
    config::{
        Config, Subscriber,
        managed::{self, Document, Wrong},
    },
    crypto::secret::Secret,
    delivery::SubscriberName,
    store::{Deleted, NewOperation, Put, Store, StoreError, StoredSubscriber},
    supervisor::managed::{Entry, Managed},
};

const BECAUSE: Because = Because::Operator("the API");

/// The time between two tries to read the id of the store.
const OWNER_AGAIN: Duration = Duration::from_secs(10);

/// What it means that another store has the history of the queue.
pub const ELSEWHERE: &str = "another store has the history of [queue] prefix, and may have subscribers made over the API: this daemon \
     unbinds nobody, and changes none; give each daemon a prefix of its own, or move history to this store: hooktrail store adopt";

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

    /// Has the queue unbind nobody while another store has its history, or that is not known: that
    /// store may have subscribers of which this one knows nothing. Ends when the queue is dropped.
    pub async fn follow_owner(
        &self,
        mut owner: watch::Receiver<Option<Option<String>>>,
        store: &impl Store,
    ) {
        let mut is_told = false;
        loop {
            let found = owner.borrow_and_update().clone();
            let own = match &found {
                // Its own store may be away.
                Some(Some(_)) => store.id().await.ok(),
                _ => None,
            };
            let is_shared = match &found {
                None => true,
                Some(None) => false,
                owner => own.as_ref() != owner.as_ref().and_then(Option::as_ref),
            };
            let is_elsewhere = is_shared && own.is_some();
            if is_elsewhere && !std::mem::replace(&mut is_told, is_elsewhere) {
                tracing::warn!("{ELSEWHERE}");
            }
            self.0.removals.share(is_shared);
            tokio::select! {
                changed = owner.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(OWNER_AGAIN), if is_shared && own.is_none() && found.is_some() => {}
            }
        }
    }

    /// Keeps the set true: reads the store when it says so, and drops secrets that have been
    /// replaced when their time is over.
    pub async fn follow_store(&self, store: &impl Store) {
        let mut to_read = store.subscribers_to_read();
        let mut managed = self.0.managed.subscribe();
        loop {
            let next = managed.borrow_and_update().next_retirement(clock::now());
            tokio::select! {
                Ok(()) = to_read.changed() => self.read_store(store).await,
                () = at(next) => {
                    let editing = self.edit().await;
                    let managed = self.managed().checked_again(&self.of_files(), clock::now());
                    let because = Because::Files("the overlap of a rotated secret is over");
                    editing.go_on(managed, because).await.ok();
                }
                // The sender is this reloader's.
                Ok(()) = managed.changed() => {}
            }
        }
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
            Err(NotStored::Differs(None)) if expected.is_some() => put(None, operation).await?,
            stored => stored?,
        };
        let files = self.reloader.of_files();
        let managed = self.managed().with(stored.clone(), &files, clock::now());
        let not_bound = self.go_on(managed, BECAUSE).await;
        let is_bound = not_bound.as_ref().is_ok_and(|not_bound| !not_bound.contains(name));
        let problem = not_bound.err().map(|why| why.to_string());
        Ok(Stored { subscriber: stored, is_bound, problem })
    }

    /// Deletes a subscriber of this version, and takes it out of use. Returns whether the daemon has
    /// done that.
    ///
    /// # Errors
    /// It is not deleted, or that is unknown.
    pub async fn delete(
        &self,
        store: &impl Store,
        name: &SubscriberName,
        expected: u64,
        operation: NewOperation,
    ) -> Result<Result<(), Unchanged>, NotStored> {
        match store.delete_subscriber(name, expected, operation).await {
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

    /// Puts another set into use. It is the one that counts from now on, also if the queue refuses it:
    /// the next change tries that again. Returns the subscribers that are not bound yet.
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
                inner.metrics.configured(count, clock::now());
                log_changes(changes, not_bound, because.text());
            }
            Err(Unchanged::Stopping) => {}
            Err(why) => {
                let (because, error) = (because.text(), why.to_string());
                tracing::error!(because, error, "a change of subscribers is not in use");
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
        queue::Removals,
        store::{KeptSubscribers, fake::FakeStore},
        telemetry::{log, metrics::Metrics},
    };

    /// A reloader whose fleet takes every change.
    fn reloader(removals: &Removals) -> Reloader {
        let (reloader, mut changes) = Reloader::new(
            testing::embedded(""),
            KeptSubscribers::default(),
            Metrics::new(clock::now()),
            removals.clone(),
            log::Level::default(),
        );
        tokio::spawn(async move {
            while let Some(change) = changes.recv().await {
                change.done.send(Ok(BTreeSet::new())).ok();
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
        let deleted = editing.delete(&store, &name, version, operation("delete")).await;
        assert!(deleted.expect("it is deleted").is_ok());
        assert!(!reloader.config().names().contains("siem"));
        assert!(removals.may_unbind("siem") && !removals.may_unbind("a"));
    }

    #[tokio::test]
    async fn nobody_is_unbound_before_it_is_known_that_no_other_store_has_the_history() {
        let (removals, store) = (Removals::default(), FakeStore::default());
        let reloader = reloader(&removals);
        let owner = watch::Sender::new(None);
        let (following, of, receiver) = (reloader.clone(), store.clone(), owner.subscribe());
        let follow = tokio::spawn(async move { following.follow_owner(receiver, &of).await });
        let shared = async |expected: bool| {
            while removals.is_shared() != expected {
                tokio::task::yield_now().await;
            }
        };
        shared(true).await;
        for (of, is_shared) in [(None, false), (Some("other"), true), (Some("fake"), false)] {
            owner.send_replace(Some(of.map(str::to_owned)));
            shared(is_shared).await;
        }
        // With its own store away it cannot know.
        store.memory().away = Some(StoreError::away("away"));
        owner.send_replace(Some(Some("fake".to_owned())));
        shared(true).await;
        store.memory().away = None;
        owner.send_replace(Some(Some("fake".to_owned())));
        shared(false).await;
        drop(owner);
        follow.await.expect("ends");
    }
}
