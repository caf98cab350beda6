//! The subscribers that were made over the API, checked under the configuration in use.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

use crate::{
    config::{
        Config, Subscriber,
        managed::{self, Document, Wrong},
    },
    delivery::SubscriberName,
    queue::Removals,
    store::{KeptSubscriber, KeptSubscribers, StoredSubscriber},
};

/// All of them. One that cannot run is not removed: it gets events, and they wait.
#[derive(Debug, Clone, Default)]
pub struct Managed {
    entries: BTreeMap<SubscriberName, Entry>,
    /// There may be more of them, which cannot be read.
    pub(super) may_lack: bool,
    /// What is wrong with the store's subscribers.
    pub(super) problems: Vec<String>,
}

/// One that was made over the API.
#[derive(Debug, Clone)]
pub struct Entry {
    pub kept: KeptSubscriber,
    /// `None` if it cannot be read.
    pub document: Option<Document>,
    /// What to run; or the reason why it cannot run, with the remedy.
    pub checked: Result<Arc<Subscriber>, String>,
    /// A deletion had no known end: a store that lacks it has deleted it.
    maybe_deleted: bool,
}

impl Entry {
    /// Whether its deletion had no known end.
    pub(super) fn is_maybe_deleted(&self) -> bool {
        self.maybe_deleted
    }

    /// As it is stored; `None` if it cannot be read.
    pub fn stored(&self) -> Option<&StoredSubscriber> {
        match &self.kept {
            KeptSubscriber::Open(stored) => Some(stored),
            KeptSubscriber::Locked { .. } => None,
        }
    }
}

impl Managed {
    /// Checks those that the store has.
    pub(super) fn new(kept: KeptSubscribers, files: &Config, now: SystemTime) -> Self {
        let KeptSubscribers { all, may_lack, problems } = kept;
        let entries = all.into_iter().map(|kept| (kept.name().clone(), unchecked(kept)));
        let mut this = Self { entries: entries.collect(), may_lack, problems };
        this.check(files, now, None);
        this
    }

    /// Those that the store has now. What it lacks without a deletion, and what it cannot open any
    /// more, goes on as it was.
    pub(super) fn read_again(
        &self,
        kept: KeptSubscribers,
        files: &Config,
        now: SystemTime,
    ) -> Self {
        let mut read = Self::new(kept, files, now);
        let (mut lost, mut locked) = (Vec::new(), Vec::new());
        for (name, before) in &self.entries {
            let found = read.entries.get(name);
            match found {
                None if before.maybe_deleted && !read.may_lack => continue,
                None => lost.push(name.as_str()),
                Some(found) => {
                    let is_later = found.kept.version() > before.kept.version();
                    if is_later || before.stored().is_none() || found.stored() == before.stored() {
                        continue;
                    }
                    if found.stored().is_some() && found.kept.version() == before.kept.version() {
                        continue;
                    }
                    locked.push(name.as_str());
                }
            }
            read.entries.insert(name.clone(), before.clone());
        }
        let go_on = "they go on as this daemon knows them until it ends: set them again over the API before that";
        let problem = |names: &[&str], what: &str| {
            (!names.is_empty()).then(|| format!("the store {what}: {}; {go_on}", names.join(", ")))
        };
        let lost = problem(&lost, "lacks subscribers that were not deleted over the API");
        let locked = problem(&locked, "cannot open subscribers, or has older ones");
        read.problems.extend([lost, locked].into_iter().flatten());
        read.check(files, now, None);
        read
    }

    /// Whether the store said the same.
    pub(super) fn is_as(&self, before: &Self) -> bool {
        // A deletion of unknown end is proven or refuted by what was read: it must not outlive that.
        let entry = |e: &Entry| (e.kept.clone(), e.maybe_deleted);
        let all = |this: &Self| this.entries.values().map(entry).collect::<Vec<_>>();
        (self.may_lack, &self.problems, all(self))
            == (before.may_lack, &before.problems, all(before))
    }

    /// All of them under another configuration, or at another time.
    pub(super) fn checked_again(&self, files: &Config, now: SystemTime) -> Self {
        let mut this = self.clone();
        this.check(files, now, None);
        this
    }

    /// With one that was stored.
    pub(super) fn with(&self, stored: StoredSubscriber, files: &Config, now: SystemTime) -> Self {
        let mut this = self.clone();
        let name = stored.name.clone();
        this.entries.insert(name.clone(), unchecked(KeptSubscriber::Open(stored)));
        this.check(files, now, Some(&name));
        this
    }

    pub(super) fn without(&self, name: &SubscriberName) -> Self {
        let mut this = self.clone();
        this.entries.remove(name);
        this
    }

    /// With one whose deletion had no known end.
    pub(super) fn maybe_without(&self, name: &SubscriberName) -> Self {
        let mut this = self.clone();
        if let Some(entry) = this.entries.get_mut(name) {
            entry.maybe_deleted = true;
        }
        this
    }

    fn check(&mut self, files: &Config, now: SystemTime, only: Option<&SubscriberName>) {
        let chosen = |name: &SubscriberName| only.is_none_or(|only| only == name);
        let entries = || self.entries.iter().filter(|(name, _)| chosen(name));
        let documents: Vec<&Document> =
            entries().filter_map(|(_, entry)| entry.document.as_ref()).collect();
        let mut checked = managed::check(files, &documents, now).into_iter();
        for entry in self.entries.iter_mut().filter(|(name, _)| chosen(name)).map(|(_, e)| e) {
            if entry.document.is_none() {
                continue;
            }
            entry.checked = match checked.next() {
                Some(Ok(subscriber)) => Ok(Arc::new(subscriber)),
                Some(Err(wrong)) => Err(unusable(&wrong)),
                None => continue,
            };
        }
    }

    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&SubscriberName, &Entry)> {
        self.entries.iter()
    }

    /// What is wrong with the store's subscribers, a sentence each.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    pub(super) fn names(&self) -> BTreeSet<SubscriberName> {
        self.entries.keys().cloned().collect()
    }

    /// Adds those that run to the subscribers of files, which win.
    pub(super) fn compose(&self, files: &Config) -> Config {
        let of_files = files.names();
        let running = self.entries.iter().filter(|(name, _)| !of_files.contains(*name));
        let running = running.filter_map(|(_, entry)| entry.checked.as_ref().ok().cloned());
        let subscribers = files.subscribers.iter().cloned().chain(running).collect();
        Config { subscribers, ..files.clone() }
    }

    /// Has the queue go on binding all of them, whether they run or not.
    pub(super) fn protect(&self, removals: &Removals) {
        removals.protect(self.names(), self.may_lack);
    }

    /// The next time at which a secret signs no more.
    pub(super) fn next_retirement(&self, now: SystemTime) -> Option<SystemTime> {
        let documents = self.entries.values().filter_map(|entry| entry.document.as_ref());
        let times = documents.flat_map(Document::retiring).map(|retiring| retiring.until);
        times.filter(|until| *until > now).min()
    }
}

fn unchecked(kept: KeptSubscriber) -> Entry {
    match &kept {
        KeptSubscriber::Open(stored) => {
            let mut document = Document::parse(&stored.document);
            if let Some(document) = &mut document {
                document.set("name", stored.name.as_str().into());
            }
            let why = "its document in the store is no JSON object; change it, or delete it";
            Entry { document, checked: Err(why.to_owned()), kept, maybe_deleted: false }
        }
        KeptSubscriber::Locked { why, .. } => {
            Entry { document: None, checked: Err(why.clone()), kept, maybe_deleted: false }
        }
    }
}

fn unusable(wrong: &[Wrong]) -> String {
    let each = wrong.iter().map(|Wrong { field, detail }| format!("`{field}` {detail}"));
    format!(
        "it is not valid any more under this configuration: {}; its events wait until it is changed, \
         or the configuration is",
        each.collect::<Vec<_>>().join("; ")
    )
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::{config::testing, crypto::secret::Secret, store::Stamp};

    fn open(name: &str, version: u64) -> KeptSubscriber {
        let stamp = Stamp { at: UNIX_EPOCH, by: "t".to_owned() };
        KeptSubscriber::Open(StoredSubscriber {
            name: name.into(),
            version,
            document: Secret::new(r#"{"url":"https://example.com/","signatures":[]}"#),
            created: stamp.clone(),
            changed: stamp,
        })
    }

    fn locked(name: &str, version: u64) -> KeptSubscriber {
        KeptSubscriber::Locked { name: name.into(), version, why: "no key".to_owned() }
    }

    fn kept(all: &[KeptSubscriber]) -> KeptSubscribers {
        KeptSubscribers { all: all.to_vec(), ..KeptSubscribers::default() }
    }

    /// Each with its version; one that does not run has none.
    fn running(managed: &Managed) -> Vec<(String, Option<u64>)> {
        let version = |entry: &Entry| entry.checked.is_ok().then(|| entry.kept.version());
        managed.iter().map(|(name, entry)| (name.to_string(), version(entry))).collect()
    }

    #[test]
    fn a_store_that_lost_or_locked_subscribers_removes_none_of_a_running_daemon() {
        let files = testing::embedded("");
        let first = [open("changed", 2), open("locked", 1), open("lost", 1), open("older", 5)];
        let before = Managed::new(kept(&first), &files, UNIX_EPOCH);
        let second = [open("changed", 3), locked("locked", 1), locked("new", 1), open("older", 4)];
        let after = before.read_again(kept(&second), &files, UNIX_EPOCH);
        let version = |name: &str, version| (name.to_owned(), version);
        assert_eq!(
            running(&after),
            [
                version("changed", Some(3)),
                version("locked", Some(1)),
                version("lost", Some(1)),
                version("new", None),
                version("older", Some(5)),
            ]
        );
        let problems = after.problems().join("\n");
        assert!(
            problems.contains(": lost;") && problems.contains(": locked, older;"),
            "{problems}"
        );
        assert!(!after.is_as(&before));
        let again = after.read_again(kept(&second), &files, UNIX_EPOCH);
        assert!(again.is_as(&after));
        // Later than what is known: it counts, also locked.
        let locked = after.read_again(kept(&[locked("changed", 4)]), &files, UNIX_EPOCH);
        assert!(running(&locked).contains(&version("changed", None)));
    }

    #[test]
    fn a_deletion_of_unknown_fate_counts_once_the_store_lacks_the_subscriber() {
        let files = testing::embedded("");
        let before = Managed::new(kept(&[open("a", 1)]), &files, UNIX_EPOCH);
        let maybe = before.maybe_without(&"a".into());
        let undone = maybe.read_again(kept(&[open("a", 1)]), &files, UNIX_EPOCH);
        assert!(undone.get("a").is_some());
        let unread = KeptSubscribers { may_lack: true, ..KeptSubscribers::default() };
        assert!(maybe.read_again(unread, &files, UNIX_EPOCH).get("a").is_some());
        assert!(maybe.read_again(kept(&[]), &files, UNIX_EPOCH).get("a").is_none());
        assert!(before.read_again(kept(&[]), &files, UNIX_EPOCH).get("a").is_some());
    }
}
