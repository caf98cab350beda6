//! The changes themselves, for the API and for the console.

use std::{
    collections::BTreeSet,
    sync::{Arc, PoisonError},
    time::Duration,
};

use axum::http::StatusCode;
use serde_json::{Value, json};
use tokio::time::timeout;
use url::Url;

use crate::{
    admin::{
        answer::Refusal,
        control::{Control, Names, OPERATOR, queue_fails, to_its_end},
        guard::Caller,
        versions::Expected,
        view::{
            FieldError, Origin, ProblemKind, RotateSecret, SubscriberChange, SubscriberRemoval,
            Tested, Time,
        },
    },
    clock,
    config::{
        self, Subscriber,
        managed::{Document, RETIRING, Wrong},
    },
    crypto::{secret::SecretUrl, signature::new_secret},
    delivery::{Pause, PauseState, SubscriberName},
    endpoint::test_event::{self, Example},
    policy::retry::Backoff,
    queue::{Queue, QueueError, Sharing},
    store::{NewOperation, Store, StoreError},
    supervisor::{
        managed::Entry,
        reload::{ELSEWHERE, Editing, NotStored, Stored, UNKNOWN, Unchanged, store_id},
    },
    wording::{agreed, counted},
};

/// What becomes of the events, retries and dead letters of a subscriber that is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::admin) enum Backlog {
    Keep,
    Drop,
    /// The request does not say it.
    Unsaid,
}

/// A subscriber that is not stored.
pub(in crate::admin) enum Draft {
    New(Document),
    /// A merge patch of the one of this name.
    Change(String, Document),
}

/// A change of a subscriber.
struct Edit {
    /// The operation that is recorded.
    what: &'static str,
    expected: Option<Expected>,
    /// The client's own words.
    given: Document,
}

/// The keys that decide what a request looks like.
const OF_REQUESTS: [&str; 14] = [
    "preset",
    "format",
    "content_type",
    "source",
    "sourcetype",
    "index",
    "redact",
    "redact_with",
    "event_ids",
    "signatures",
    "signing_key",
    "secrets",
    "headers",
    "auth",
];

/// The signing secret of an example for which none was typed. Nobody's requests are signed with it.
pub(in crate::admin) const PLACEHOLDER: &str = "whsec_aG9va3RyYWlsOiBhIHBsYWNlaG9sZGVyIHNlY3JldC4=";

/// A request that a test would make, and with which secret it is signed.
pub(in crate::admin) struct Sample {
    pub(in crate::admin) request: Example,
    pub(in crate::admin) signed: Signed,
    /// A secret before it signs too for a while, and its signatures are not in the example.
    pub(in crate::admin) overlaps: bool,
}

/// The secret that an example is signed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::admin) enum Signed {
    /// It is not signed.
    Not,
    /// With the secret of the draft.
    Given,
    /// With the [`PLACEHOLDER`].
    Placeholder,
}

/// The time for which a replaced secret signs on, and the longest.
const OVERLAP: Duration = Duration::from_secs(24 * 3600);
const MAX_OVERLAP: Duration = Duration::from_secs(30 * 24 * 3600);

/// The most secrets that sign at once: each is a signature in a header.
const MAX_SECRETS: usize = 4;

/// The shortest and the longest time between two tries.
const DROP_AGAIN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));

impl<Q: Queue, S: Store> Control<Q, S> {
    /// Makes a subscriber.
    pub(in crate::admin) async fn add(
        self: &Arc<Self>,
        caller: &Caller,
        document: Document,
    ) -> Result<SubscriberChange, Refusal> {
        self.may_manage()?;
        let (this, by) = (self.clone(), by(caller));
        to_its_end(&self.to_their_end, async move { this.add_now(by, document).await }).await
    }

    async fn add_now(&self, by: String, document: Document) -> Result<SubscriberChange, Refusal> {
        let mut document = clean(&document)?;
        let name = named(&document)?;
        let _making = self.making(&name)?;
        let secret = needs_secret(&document).then(new_secret);
        if let Some(secret) = &secret {
            document.set("secrets", json!([secret]));
        }
        // Other changes do not wait for the queue's answers to this one.
        let checked = self.may_be_added(&self.reloader.edit().await, &name, &document)?;
        let asked = async {
            self.is_not_dropping(&name).await?;
            self.has_no_backlog(checked).await?;
            self.claim().await
        };
        in_time(self.waits.add, asked).await?;
        let editing = self.reloader.edit().await;
        self.may_be_added(&editing, &name, &document)?;
        let paused = document.take("start_paused") == Some(Value::Bool(true));
        in_time(self.waits.held, self.begin(&name, paused, &by)).await?;
        let operation = operation("add_subscriber", &name, by, details(&document, None));
        let put = editing.put(&self.store, &name, document.text(), None, operation).await;
        let stored = put.map_err(|why| {
            let mut refusal = not_stored(why);
            if refusal.kind == ProblemKind::UnknownOutcome && secret.is_some() {
                refusal.why += "; if it is there, rotate its secret: the one made now is not told";
            }
            refusal
        })?;
        let active_since = stored.is_bound.then(|| Time(clock::now()));
        let secret = secret.map(Into::into);
        Ok(SubscriberChange { active_since, secret, ..change(stored) })
    }

    /// Takes the name of a subscriber that is being made: of two requests at once one makes it.
    fn making(&self, name: &SubscriberName) -> Result<Taken<'_>, Refusal> {
        Taken::of(&self.making, name).ok_or_else(|| {
            let why = "another request makes a subscriber of this name now; see what becomes of it";
            Refusal::of_kind(StatusCode::CONFLICT, ProblemKind::Exists, why)
        })
    }

    /// Checks a new subscriber against those that there are.
    fn may_be_added(
        &self,
        editing: &Editing<'_>,
        name: &SubscriberName,
        document: &Document,
    ) -> Result<Subscriber, Refusal> {
        is_free(editing, name)?;
        let checked = editing.check(document).map_err(not_valid)?;
        let most = self.reloader.config().max_subscribers();
        if editing.count() >= most {
            let why =
                format!("there are {most} subscribers, which is the most: [admin] max_subscribers");
            return Err(Refusal::of_kind(StatusCode::CONFLICT, ProblemKind::Limit, why));
        }
        self.has_no_request(name)?;
        Ok(checked)
    }

    /// Replaces what is configured; a secret that is left out stays.
    pub(in crate::admin) async fn replace(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        expected: Expected,
        document: Document,
    ) -> Result<SubscriberChange, Refusal> {
        let given = document.clone();
        let replaced = move |before: &Entry| {
            let mut document = clean(&document)?;
            if let Some(before) = &before.document {
                document = document.restored(before);
                if let (None, Some(secrets)) = (document.get("secrets"), before.get("secrets")) {
                    document.set("secrets", secrets.clone());
                }
                document = with_retiring(document, before);
            }
            Ok(document)
        };
        let change = Edit { what: "change_subscriber", expected: Some(expected), given };
        self.edited(caller, name, change, replaced).await
    }

    /// Applies a merge patch (RFC 7396).
    pub(in crate::admin) async fn patch(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        expected: Expected,
        patch: Document,
    ) -> Result<SubscriberChange, Refusal> {
        let change =
            Edit { what: "change_subscriber", expected: Some(expected), given: patch.clone() };
        let patched = move |before: &Entry| patched(&patch, before);
        self.edited(caller, name, change, patched).await
    }

    /// Makes a new signing secret. Those before it sign too for the overlap.
    pub(in crate::admin) async fn rotate_secret(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        wanted: RotateSecret,
    ) -> Result<SubscriberChange, Refusal> {
        let overlap = match wanted.overlap.as_deref().map(humantime::parse_duration) {
            None => OVERLAP,
            Some(Ok(overlap)) if overlap <= MAX_OVERLAP => overlap,
            Some(_) => {
                let why = "must be a duration such as \"24h\", and at most \"30days\"";
                return Err(Refusal::field("overlap", why));
            }
        };
        let (now, secret) = (clock::now(), new_secret());
        let until = now + overlap;
        let new = secret.clone();
        let rotated = move |before: &Entry| {
            let before = before.document.as_ref().ok_or_else(|| cannot_be_read(before))?;
            rotated(before, &new, now, until)
        };
        let change = Edit { what: "rotate_secret", expected: None, given: Document::default() };
        let change = self.edited(caller, name, change, rotated).await?;
        let overlap_until = (!overlap.is_zero()).then_some(Time(until));
        Ok(SubscriberChange { secret: Some(secret.into()), overlap_until, ..change })
    }

    /// Sends a test event to a subscriber as it would be; nothing is stored.
    pub(in crate::admin) async fn test_draft(&self, draft: Draft) -> Result<Tested, Refusal> {
        self.may_manage()?;
        let subscriber = {
            let editing = self.reloader.edit().await;
            match draft {
                Draft::New(document) => {
                    let mut document = clean(&document)?;
                    named(&document)?;
                    if needs_secret(&document) {
                        document.set("secrets", json!([new_secret()]));
                    }
                    editing.check(&document).map_err(not_valid)?
                }
                Draft::Change(name, patch) => {
                    let entry = entry(&editing, &name)?;
                    let document = patched(&patch, &entry)?;
                    let checked = editing.check(&document).map_err(not_valid)?;
                    takes_nothing_along(&document, &patch, &entry)?;
                    checked
                }
            }
        };
        self.send_test_event(&subscriber).await
    }

    /// The request that a test of a draft would make, as far as the draft is valid. Its name does not
    /// matter, nor does its URL but for its userinfo, and a secret that is stored signs nothing.
    pub(in crate::admin) fn sample(&self, draft: Draft) -> Result<Sample, Refusal> {
        self.may_manage()?;
        let (mut document, given) = match draft {
            Draft::New(document) => {
                let given = document.get("secrets").cloned();
                (clean(&document)?, given)
            }
            Draft::Change(name, patch) => {
                let managed = self.reloader.managed();
                let entry = managed.get(&name).ok_or_else(no_subscriber)?;
                (patched(&patch, entry)?, patch.get("secrets").cloned())
            }
        };
        let overlaps = document.retiring().iter().any(|retiring| retiring.until > clock::now());
        let url = sample_url(document.get("url").and_then(Value::as_str).unwrap_or_default());
        for key in document.keys().iter().filter(|key| !OF_REQUESTS.contains(&key.as_str())) {
            document.take(key);
        }
        document.take("secrets");
        document.set("name", "example".into());
        document.set("url", url.as_str().into());
        let signed = match (needs_secret(&document), given) {
            (false, _) => Signed::Not,
            (true, Some(given)) => {
                document.set("secrets", given);
                Signed::Given
            }
            (true, None) => {
                document.set("secrets", json!([PLACEHOLDER]));
                Signed::Placeholder
            }
        };
        let checked =
            config::managed::check(&self.reloader.of_files(), &[&document], clock::now()).remove(0);
        let subscriber = checked.map_err(not_valid)?;
        let request = test_event::example(&subscriber)
            .map_err(|why| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, why))?;
        Ok(Sample { request, signed, overlaps: overlaps && signed == Signed::Placeholder })
    }

    /// Removes a subscriber.
    pub(in crate::admin) async fn remove(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        expected: Expected,
        backlog: Backlog,
    ) -> Result<SubscriberRemoval, Refusal> {
        self.may_manage()?;
        if backlog == Backlog::Unsaid {
            let why =
                "is required: `keep`, or `drop` to delete its events, retries and dead letters too";
            return Err(Refusal::field("backlog", why));
        }
        let (this, by, name) = (self.clone(), by(caller), name.to_owned());
        let work = async move { this.remove_now(by, &name, &expected, backlog).await };
        to_its_end(&self.to_their_end, work).await
    }

    async fn remove_now(
        self: &Arc<Self>,
        by: String,
        name: &str,
        expected: &Expected,
        backlog: Backlog,
    ) -> Result<SubscriberRemoval, Refusal> {
        let editing = self.reloader.edit().await;
        let entry = entry(&editing, name)?;
        let version = is_expected(&entry, Some(expected))?;
        let is_dropped = backlog == Backlog::Drop;
        if is_dropped && let Some(of_file) = editing.of_file(name) {
            let why = format!(
                "its queues are those of the subscriber in {}, which wins over it; use `backlog=keep`",
                place(&of_file.origin)
            );
            return Err(Refusal::of_kind(StatusCode::CONFLICT, ProblemKind::Exists, why));
        }
        let name = entry.kept.name().clone();
        let details = format!("backlog {}", if is_dropped { "dropped" } else { "kept" });
        let operation = operation("delete_subscriber", &name, by, details);
        let deleted = editing.delete(&self.store, &name, version, is_dropped, operation).await;
        deleted.map_err(not_stored)?.ok(); // It is logged, and the next change does it.
        drop(editing);
        let backlog = match is_dropped {
            false => "kept",
            true if self.dropped(&name).await => "dropped",
            true => "dropping",
        };
        Ok(SubscriberRemoval { subscriber: name.to_string(), backlog: backlog.to_owned() })
    }

    /// Deletes the queues of a removed subscriber, in a task that goes on without its caller. Returns
    /// whether it has done that in time.
    async fn dropped(self: &Arc<Self>, name: &SubscriberName) -> bool {
        let (this, name) = (self.clone(), name.clone());
        let dropping = tokio::spawn(async move { this.drop_queues(&name, false).await });
        timeout(self.waits.dropping, dropping).await.is_ok_and(|done| done.unwrap_or(false))
    }

    /// Goes on with the removals that an earlier process has begun, or whose fate was unknown.
    pub(in crate::admin) async fn finish_removals(self: Arc<Self>) {
        let mut to_read = self.store.subscribers_to_read();
        let mut backoff = Backoff::new(DROP_AGAIN.0, DROP_AGAIN.1);
        loop {
            to_read.mark_unchanged();
            let found = self.store.dropping().await;
            let is_read = found.is_ok();
            for name in found.unwrap_or_default() {
                let this = self.clone();
                tokio::spawn(async move { this.drop_queues(&name, true).await });
            }
            if is_read {
                backoff.reset();
            }
            tokio::select! {
                changed = to_read.changed() => if changed.is_err() { return },
                // A store that is away is reported.
                () = tokio::time::sleep(backoff.grow()), if !is_read => {}
                () = self.drains() => return,
            }
        }
    }

    /// Deletes the queues of a removed subscriber as soon as that can be done, unless another task
    /// does. Returns whether they are deleted: if not, another subscriber has them, or the daemon
    /// ends, and the next one goes on. `resumes`: nobody asks for it now.
    async fn drop_queues(&self, name: &SubscriberName, resumes: bool) -> bool {
        let Some(_one) = Taken::of(&self.dropping, name) else { return false };
        let mut backoff = Backoff::new(DROP_AGAIN.0, DROP_AGAIN.1);
        let trying = async {
            loop {
                match self.try_drop(name, resumes).await {
                    Some(done) => return done,
                    None => tokio::time::sleep(backoff.grow()).await,
                }
            }
        };
        tokio::select! {
            done = trying => done,
            () = self.drains() => false,
        }
    }

    /// Deletes the queues of a removed subscriber if that can be done now; false if they are those of
    /// another one.
    async fn try_drop(&self, name: &SubscriberName, resumes: bool) -> Option<bool> {
        let later = |error: &dyn std::fmt::Display| {
            tracing::debug!(subscriber = name.as_str(), %error, "its queues are not deleted yet");
        };
        // Nobody makes one of this name between the look and the deletion.
        let editing = self.reloader.edit().await;
        let is_of_file = editing.of_file(name).is_some();
        if !is_of_file {
            // Its deletion had no known end, or a backup of the store has it again.
            if editing.entry(name).is_some() {
                return None;
            }
            // It is in use until the fleet takes the change; and a request in flight that fails
            // afterwards would store its batch again.
            if editing.in_use(name).is_some() || self.has_lane(name) {
                return None;
            }
            if resumes && !self.is_removed(name) {
                return None;
            }
            let pruned = timeout(self.waits.held, self.queue.prune(name, true)).await;
            pruned
                .unwrap_or_else(|_| Err(QueueError::new("the queue does not answer")))
                .map_err(|e| later(&e))
                .ok()?;
        }
        self.store.dropped(name).await.map_err(|e| later(&e)).ok()?;
        Some(!is_of_file)
    }

    /// Whether a subscriber that an earlier process has deleted is nobody's by now: not before it is
    /// known whose subscribers count, and who is bound.
    fn is_removed(&self, name: &SubscriberName) -> bool {
        let removals = self.queue.removals();
        removals.may_unbind(name) || {
            // Other removals may wait for an operator; this one was an operator's word.
            removals.release(name);
            removals.may_unbind(name)
        }
    }

    async fn edited(
        self: &Arc<Self>,
        caller: &Caller,
        name: &str,
        Edit { what, expected, given }: Edit,
        new: impl FnOnce(&Entry) -> Result<Document, Refusal> + Send + 'static,
    ) -> Result<SubscriberChange, Refusal> {
        self.may_manage()?;
        let (this, by, name) = (self.clone(), by(caller), name.to_owned());
        let work = async move {
            let editing = this.reloader.edit().await;
            let entry = entry(&editing, &name)?;
            if let Some(of_file) = editing.of_file(&name) {
                return Err(in_a_file(&of_file.origin));
            }
            let version = is_expected(&entry, expected.as_ref())?;
            let document = new(&entry)?;
            let document = unchanged_name(document, &entry)?;
            has_its_tenant(&document, &entry)?;
            editing.check(&document).map_err(not_valid)?;
            takes_nothing_along(&document, &given, &entry)?;
            let name = entry.kept.name().clone();
            let operation = operation(what, &name, by, details(&document, entry.document.as_ref()));
            let put = editing.put(&this.store, &name, document.text(), Some(version), operation);
            Ok(change(put.await.map_err(not_stored)?))
        };
        to_its_end(&self.to_their_end, work).await
    }

    /// Has the queue record that this store has subscribers: before it has one.
    async fn claim(&self) -> Result<(), Refusal> {
        let refusal = |why: String| Refusal::unavailable(format!("nothing is changed: {why}"));
        let id = store_id(&self.store).await.map_err(|e| refusal(e.to_string()))?;
        self.queue.claim_subscribers(&id).await.map_err(|e| refusal(e.to_string()))
    }

    /// Whether subscribers can be changed here now.
    pub(in crate::admin) fn may_manage(&self) -> Result<(), Refusal> {
        if self.reloader.config().admin.manage {
            // Before anything is stored: a change would wait for the fleet, and so would the rest.
            let why = match (self.is_running(), self.queue.removals().sharing()) {
                (false, _) => Unchanged::Stopping.to_string(),
                (true, Sharing::Elsewhere) => ELSEWHERE.to_owned(),
                (true, Sharing::Unknown) => UNKNOWN.to_owned(),
                (true, Sharing::Alone) => return Ok(()),
            };
            return Err(Refusal::unavailable(why));
        }
        let why = "subscribers are not managed here: set `manage = true` in [admin] of the daemon's configuration, and restart the daemon";
        Err(Refusal::of_kind(StatusCode::FORBIDDEN, ProblemKind::Management, why))
    }

    /// Whoever gets events of another subscriber of the same name would not expect them.
    async fn has_no_backlog(&self, new: Subscriber) -> Result<(), Refusal> {
        let name = &new.name.clone();
        // Asked for by its name: one that was removed just now is not recorded as removed yet.
        let depths = self.queue.depths(&[Arc::new(new)]).await.map_err(|e| queue_fails(&e))?;
        match depths.subscribers.get(name).filter(|depth| !depth.is_empty()) {
            None => Ok(()),
            Some(depth) => {
                let why = format!(
                    "the queues of an earlier subscriber `{name}` hold {}, {} and {}; delete them with `hooktrail prune {name} --with-events`, or choose another name",
                    counted(depth.events, "event(s)"),
                    counted(depth.batches(), "batch(es) to retry"),
                    counted(depth.dead, "dead letter(s)")
                );
                Err(in_use(why))
            }
        }
    }

    /// What the queues of an earlier subscriber hold is deleted, and with it what this one would get.
    async fn is_not_dropping(&self, name: &SubscriberName) -> Result<(), Refusal> {
        let refusal = |why: StoreError| Refusal::unavailable(format!("nothing is changed: {why}"));
        if !self.store.dropping().await.map_err(refusal)?.contains(name) {
            return Ok(());
        }
        Err(in_use(format!(
            "the queues of an earlier subscriber `{name}` are being deleted; try again when they are, or choose another name"
        )))
    }

    /// What is in flight to an earlier subscriber, and fails, would be retried for this one.
    fn has_no_request(&self, name: &SubscriberName) -> Result<(), Refusal> {
        if !self.has_lane(name) {
            return Ok(());
        }
        Err(in_use(format!(
            "requests to an earlier subscriber `{name}` are in flight, and what fails would go to this one; try again when they have ended, or choose another name"
        )))
    }

    /// Records whether a new subscriber is paused. A pause of an earlier one of its name is not its.
    async fn begin(&self, name: &SubscriberName, paused: bool, by: &str) -> Result<(), Refusal> {
        let now = clock::now();
        let was_paused =
            self.queue.pause_states().borrow().as_ref().is_some_and(|all| {
                all.get(name.as_str()).is_some_and(|state| state.pause().is_some())
            });
        let state = match (paused, was_paused) {
            (true, _) => {
                let why = format!("made paused by `{by}`");
                PauseState::Paused(Pause { why, since: now, by: OPERATOR.to_owned() })
            }
            (false, true) => PauseState::Resumed { at: now },
            (false, false) => return Ok(()),
        };
        self.queue.record(name, state).await.map_err(|e| queue_fails(&e))
    }
}

/// A name that is taken until this is dropped.
struct Taken<'c> {
    name: SubscriberName,
    all: &'c Names,
}

impl<'c> Taken<'c> {
    /// `None` if it is taken.
    fn of(all: &'c Names, name: &SubscriberName) -> Option<Self> {
        let is_free = all.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        is_free.then(|| Self { name: name.clone(), all })
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

/// Waits for the queue no longer than that.
async fn in_time<T>(
    limit: Duration,
    asked: impl Future<Output = Result<T, Refusal>>,
) -> Result<T, Refusal> {
    timeout(limit, asked).await.unwrap_or_else(|_| {
        Err(Refusal::unavailable(format!(
            "nothing is changed: the queue does not answer within {} s; try again when it does",
            limit.as_secs()
        )))
    })
}

fn in_use(why: String) -> Refusal {
    Refusal::of_kind(StatusCode::CONFLICT, ProblemKind::Backlog, why)
}

fn by(caller: &Caller) -> String {
    caller.token.as_deref().unwrap_or_default().to_owned()
}

/// A document of a client, without nulls.
fn clean(document: &Document) -> Result<Document, Refusal> {
    let document = Document::default().merged(document);
    match document.get(RETIRING) {
        Some(_) => Err(Refusal::field(RETIRING, "unknown key")),
        None => Ok(document),
    }
}

fn named(document: &Document) -> Result<SubscriberName, Refusal> {
    let Some(name) = document.name() else {
        let why =
            format!("is required: {}; it names the subscriber's queues", SubscriberName::RULE);
        return Err(Refusal::field("name", why));
    };
    SubscriberName::configured(name).map_err(|why| Refusal::field("name", why))
}

/// The URL of an example: its userinfo is the draft's, since requests are authenticated with it.
fn sample_url(of: &str) -> Url {
    let mut url = Url::parse("https://example.com/").expect("it is a URL");
    if let Ok(given) = of.trim().parse::<Url>()
        && given.has_host()
    {
        url.set_username(given.username()).ok();
        url.set_password(given.password()).ok();
    }
    url
}

/// Whether its requests are to be signed, and it brings no secret.
fn needs_secret(document: &Document) -> bool {
    let is_empty = |key| document.get(key).map(|value| value.as_array().is_some_and(Vec::is_empty));
    is_empty("secrets").unwrap_or(true) && !is_empty("signatures").unwrap_or(false)
}

fn is_free(editing: &Editing<'_>, name: &SubscriberName) -> Result<(), Refusal> {
    if let Some(of_file) = editing.of_file(name) {
        return Err(in_a_file(&of_file.origin));
    }
    if editing.entry(name).is_some() {
        let why = "there is a subscriber of this name; change that one, or choose another name";
        return Err(Refusal::of_kind(StatusCode::CONFLICT, ProblemKind::Exists, why));
    }
    Ok(())
}

fn in_a_file(origin: &config::Origin) -> Refusal {
    let why =
        format!("the subscriber of this name is configured in {}; change it there", place(origin));
    Refusal::of_kind(StatusCode::CONFLICT, ProblemKind::Exists, why)
}

fn place(origin: &config::Origin) -> String {
    Origin::of_file(origin).map_or_else(|| "the store".to_owned(), |origin| origin.to_string())
}

fn entry(editing: &Editing<'_>, name: &str) -> Result<Entry, Refusal> {
    editing.entry(name).ok_or_else(|| match editing.of_file(name) {
        Some(of_file) => in_a_file(&of_file.origin),
        None => no_subscriber(),
    })
}

fn no_subscriber() -> Refusal {
    let (status, kind) = (StatusCode::NOT_FOUND, ProblemKind::Subscriber);
    Refusal::of_kind(status, kind, "no subscriber of that name is configured")
}

/// The version of a subscriber, if it is one that the request takes.
fn is_expected(entry: &Entry, expected: Option<&Expected>) -> Result<u64, Refusal> {
    let version = entry.kept.version();
    match expected.is_none_or(|expected| expected.includes(version)) {
        true => Ok(version),
        false => Err(other_version(Some(version))),
    }
}

fn other_version(version: Option<u64>) -> Refusal {
    let is = version.map_or_else(|| "it is gone".to_owned(), |v| format!("it is \"{v}\""));
    let why = format!("the subscriber has another version by now, {is}; get it, and decide again");
    Refusal::of_kind(StatusCode::PRECONDITION_FAILED, ProblemKind::Version, why)
}

fn cannot_be_read(entry: &Entry) -> Refusal {
    let why = entry.checked.as_ref().err().cloned().unwrap_or_default();
    let why = format!("it cannot be read: {why}; PUT replaces it whole");
    Refusal::new(StatusCode::CONFLICT, why)
}

/// The document with the secrets that sign on, if they still belong to it.
fn with_retiring(mut document: Document, before: &Document) -> Document {
    document.take(RETIRING);
    if let Some(retiring) = before.get(RETIRING)
        && document.get("secrets") == before.get("secrets")
    {
        document.set(RETIRING, retiring.clone());
    }
    document
}

/// The document under the name that it has.
fn unchanged_name(mut document: Document, entry: &Entry) -> Result<Document, Refusal> {
    let name = entry.kept.name().as_str();
    if document.get("name").is_some_and(|given| given != name) {
        let why = "cannot be changed: queues have it; make another subscriber";
        return Err(Refusal::field("name", why));
    }
    if document.get("start_paused").is_some() {
        let why = "is for a new subscriber; use `pause` and `resume`";
        return Err(Refusal::field("start_paused", why));
    }
    document.set("name", name.into());
    Ok(document)
}

/// What is stored for one host goes to no other because the URL was changed: whoever changes it need
/// not know it. A signing secret stays, since no request carries it.
fn takes_nothing_along(
    document: &Document,
    given: &Document,
    before: &Entry,
) -> Result<(), Refusal> {
    let Some(before) = &before.document else { return Ok(()) };
    let Some(carried) = document.carried_elsewhere(given, before) else { return Ok(()) };
    let what: Vec<String> = carried.keys.iter().map(|key| format!("`{key}`")).collect();
    let change = match carried.by {
        "url" => "has another scheme, host or port",
        _ => "is another address",
    };
    let why = format!(
        "{change} than before, which would get what is stored for that one: {}; give {} again in the same change, or take {} out, over the API or with `hooktrail subscribers set --from`",
        what.join(", "),
        agreed(&what.len(), "(it|them)"),
        agreed(&what.len(), "(it|them)"),
    );
    Err(Refusal::field(carried.by, why))
}

fn patched(patch: &Document, entry: &Entry) -> Result<Document, Refusal> {
    clean(patch)?;
    let before = entry.document.as_ref().ok_or_else(|| cannot_be_read(entry))?;
    Ok(with_retiring(before.merged(patch).restored(before), before))
}

fn rotated(
    before: &Document,
    new: &str,
    now: std::time::SystemTime,
    until: std::time::SystemTime,
) -> Result<Document, Refusal> {
    let old = before.get("secrets").and_then(Value::as_array).cloned().unwrap_or_default();
    if old.is_empty() {
        let why = "it signs nothing: set `signatures`, or leave it out, and give `secrets`";
        return Err(Refusal::new(StatusCode::CONFLICT, why.to_owned()));
    }
    let old =
        old.into_iter().map(|secret| json!({ "secret": secret, "until": clock::rfc3339(until) }));
    let earlier = before.retiring().into_iter().filter(|retiring| retiring.until > now);
    let earlier = earlier.map(|retiring| {
        let until = clock::rfc3339(retiring.until);
        json!({ "secret": retiring.secret.expose(), "until": until })
    });
    let retiring: Vec<Value> = old.filter(|_| until > now).chain(earlier).collect();
    if retiring.len() >= MAX_SECRETS {
        let why = format!(
            "{MAX_SECRETS} secrets would sign at once; wait until the overlap of one is over"
        );
        return Err(Refusal::new(StatusCode::CONFLICT, why));
    }
    let mut document = before.clone();
    document.set("secrets", json!([new]));
    document.set(RETIRING, retiring.into());
    Ok(document)
}

fn operation(
    what: &'static str,
    name: &SubscriberName,
    by: String,
    details: String,
) -> NewOperation {
    NewOperation { at: clock::now(), by, what, subject: name.to_string(), details }
}

/// The keys that differ; of a URL its origin too.
fn details(document: &Document, before: Option<&Document>) -> String {
    let (old, new) = (before.map(Document::keys).unwrap_or_default(), document.keys());
    let differs = |key: &&String| before.and_then(|before| before.get(key)) != document.get(key);
    let shown = |key: &String| {
        let url = document.get("url").filter(|_| key == "url");
        let url = url.and_then(|url| url.as_str()?.parse().ok()).map(SecretUrl::new);
        url.map_or_else(|| key.clone(), |url| format!("url {url}"))
    };
    let all: BTreeSet<String> = old.into_iter().chain(new).collect();
    let is_own = |key: &&String| key.as_str() != RETIRING && key.as_str() != "name";
    all.iter().filter(is_own).filter(differs).map(shown).collect::<Vec<_>>().join(", ")
}

fn change(Stored { subscriber, is_bound, problem }: Stored) -> SubscriberChange {
    SubscriberChange {
        subscriber: subscriber.name.to_string(),
        version: subscriber.version.to_string(),
        bound: is_bound,
        active_since: None,
        secret: None,
        overlap_until: None,
        why: problem,
    }
}

/// A name keeps its tenant: what waits for it is of that.
fn has_its_tenant(document: &Document, entry: &Entry) -> Result<(), Refusal> {
    let Some(before) = &entry.document else { return Ok(()) };
    if document.get("tenant") == before.get("tenant") {
        return Ok(());
    }
    let why = "cannot be changed: what waits for the subscriber is of the tenant that it has; make another subscriber";
    Err(Refusal::field("tenant", why))
}

fn not_valid(wrong: Vec<Wrong>) -> Refusal {
    let error = |Wrong { field, detail }: Wrong| FieldError { field, detail };
    Refusal::fields(wrong.into_iter().map(error).collect())
}

fn not_stored(why: NotStored) -> Refusal {
    match why {
        NotStored::Differs(version) => other_version(version),
        NotStored::Store(e) if e.is_unknown() => {
            let why =
                format!("{e}; it is not known whether it was done: get the subscriber, and look");
            let kind = ProblemKind::UnknownOutcome;
            Refusal { kind, ..Refusal::unavailable(why) }
        }
        NotStored::Store(e) => Refusal::unavailable(format!("nothing was changed: {e}")),
    }
}

#[cfg(test)]
mod tests;
