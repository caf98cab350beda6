use tokio::sync::watch;

use super::*;
use crate::{
    admin::{control::Waits, history_health::Health},
    config::{Token, testing},
    queue::fake::Fake,
    store::{KeptSubscribers, fake::FakeStore},
    supervisor::{fleet::Phase, reload::Reloader},
    telemetry::{log, metrics::Metrics, status::Board},
};

/// A daemon that manages subscribers, and whose fleet takes every change.
struct World {
    control: Arc<Control<Fake, FakeStore>>,
    queue: Fake,
    store: FakeStore,
    caller: Caller,
    _phase: watch::Sender<Phase>,
}

fn world(waits: Waits) -> World {
    world_of(waits, "")
}

fn world_of(waits: Waits, tables: &str) -> World {
    let config = testing::embedded(&format!("[admin]\ntoken = \"t\"\nmanage = true\n{tables}"));
    let (store, kept) = (FakeStore::default(), KeptSubscribers::default());
    let token: Token = config.admin.all_tokens().remove(0);
    let (queue, board) = (Fake::default(), Board::new(Metrics::new(clock::now())));
    let (reloader, mut changes) =
        Reloader::new(config, kept, board.clone(), queue.removals().clone(), log::Level::default());
    tokio::spawn(async move {
        while let Some(change) = changes.recv().await {
            change.done.send(Ok(BTreeSet::new())).ok();
        }
    });
    let phase = watch::Sender::new(Phase::Running);
    let health = Health::new(&store, board.clone());
    let follows = phase.subscribe();
    let mut control = Control::new(queue.clone(), store.clone(), reloader, board, follows, health);
    control.waits = waits;
    queue.removals().judge(&BTreeSet::new(), &BTreeSet::new());
    World { control: Arc::new(control), queue, store, caller: Caller::of(&token), _phase: phase }
}

/// Long enough for any machine.
const PATIENCE: Duration = Duration::from_secs(60);
const AT_ONCE: Duration = Duration::from_millis(50);

impl World {
    async fn add(&self, name: &str) -> Result<SubscriberChange, Refusal> {
        self.control.add(&self.caller, document(name)).await
    }

    fn names(&self) -> Vec<String> {
        self.store.memory().kept.all.iter().map(|kept| kept.name().to_string()).collect()
    }
}

fn document(name: &str) -> Document {
    keys(json!({ "name": name, "url": "https://example.com/" }))
}

fn keys(value: Value) -> Document {
    match value {
        Value::Object(keys) => keys.into(),
        other => unreachable!("{other}"),
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn a_new_subscriber_that_waits_for_the_queue_holds_up_no_other_change_and_its_own_name_alone()
{
    let world = world(Waits { add: PATIENCE * 10, ..Waits::default() });
    world.queue.be_silent(true);
    let (control, caller) = (world.control.clone(), world.caller.clone());
    let adding = tokio::spawn(async move { control.add(&caller, document("siem")).await });
    until("the queue is asked", || world.queue.asked() > 0).await;
    let editing = timeout(PATIENCE, world.control.reloader.edit()).await;
    drop(editing.expect("the others wait for the queue too"));
    let twice = world.add("siem").await.expect_err("it is being made");
    assert_eq!((twice.status, twice.kind), (StatusCode::CONFLICT, ProblemKind::Exists));
    assert_eq!((world.names(), world.queue.take_claims()), (vec![], vec![]));
    world.queue.be_silent(false);
    let added = adding.await.expect("ends").expect("it is made");
    assert!(added.bound);
    // That this store has some was recorded before it has one.
    assert_eq!(world.names(), ["siem"]);
    assert_eq!(world.queue.take_claims(), ["fake"]);
    let taken = world.add("siem").await.expect_err("it is there");
    assert_eq!(taken.kind, ProblemKind::Exists);
}

#[tokio::test]
async fn a_queue_that_does_not_answer_in_time_is_a_refusal_that_changes_nothing() {
    let world = world(Waits { add: AT_ONCE, ..Waits::default() });
    world.queue.be_silent(true);
    let refused = timeout(PATIENCE, world.add("siem")).await.expect("in time");
    let refused = refused.expect_err("the queue is silent");
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.why.contains("nothing is changed: the queue does not answer"));
    assert_eq!((world.names(), world.queue.take_claims()), (vec![], vec![]));
}

#[tokio::test]
async fn queues_that_cannot_be_deleted_now_hold_up_other_changes_for_a_time() {
    let world = world(Waits { held: AT_ONCE, dropping: AT_ONCE, ..Waits::default() });
    world.add("siem").await.expect("it is made");
    world.queue.be_silent(true);
    let removed = world.control.remove(&world.caller, "siem", Expected::Any, Backlog::Drop).await;
    assert_eq!(removed.expect("it is removed").backlog, "dropping");
    let editing = timeout(PATIENCE, world.control.reloader.edit()).await;
    drop(editing.expect("the others wait until the queue is there"));
    assert_eq!(world.queue.pruned(), [""; 0]);
    world.queue.be_silent(false);
    until("they are deleted", || !world.queue.pruned().is_empty()).await;
    assert_eq!(world.queue.pruned(), ["siem"]);
}

#[tokio::test]
async fn a_changed_host_gets_no_stored_headers_by_a_change_or_a_test() {
    let world = world(Waits::default());
    let made = keys(json!({
        "name": "siem", "url": "https://a.example/", "headers": { "authorization": "hunter2" },
    }));
    let (control, caller) = (&world.control, &world.caller);
    control.add(caller, made).await.expect("it is made");
    let stored = || world.control.reloader.managed().get("siem").and_then(|e| e.document.clone());
    let before = stored();
    let elsewhere = || keys(json!({ "url": "https://b.example/" }));
    let replaced = keys(json!({
        "url": "https://b.example/", "headers": { "authorization": "[redacted]" },
    }));
    let refusals = [
        control.patch(caller, "siem", Expected::Any, elsewhere()).await.err(),
        control.replace(caller, "siem", Expected::Any, replaced).await.err(),
        control.test_draft(Draft::Change("siem".to_owned(), elsewhere())).await.err(),
    ];
    for refusal in refusals {
        let refusal = refusal.expect("it is refused");
        let Refusal { status, fields, .. } = &refusal;
        assert_eq!((*status, fields[0].field.as_str()), (StatusCode::BAD_REQUEST, "url"));
        assert!(refusal.why.contains("`headers.authorization`") && refusal.why.contains("give it"));
        assert!(!refusal.why.contains("hunter2"), "{}", refusal.why);
    }
    assert_eq!(stored(), before);
    // Given again, and with its signing secret, which no request carries.
    let again = json!({ "url": "https://b.example/", "headers": { "authorization": "hunter3" } });
    control.patch(caller, "siem", Expected::Any, keys(again)).await.expect("it is changed");
    let secrets = |document: Option<Document>| document.and_then(|d| d.get("secrets").cloned());
    assert!(secrets(before.clone()).is_some() && secrets(stored()) == secrets(before));
    let out = json!({ "url": "https://c.example/", "headers": null });
    control.patch(caller, "siem", Expected::Any, keys(out)).await.expect("it is changed");
}

#[tokio::test]
async fn a_removal_that_an_earlier_process_has_begun_is_finished_and_its_name_is_free_only_then() {
    let world = world(Waits { held: AT_ONCE, ..Waits::default() });
    world.store.memory().dropping = ["siem".into(), "two".into()].into();
    let is_done = || world.store.memory().dropping.is_empty();
    world.queue.be_silent(true);
    tokio::spawn(world.control.clone().finish_removals());
    until("they are about to be deleted", || world.queue.asked() > 0).await;
    let refused = world.add("siem").await.expect_err("its queues are there");
    assert_eq!((refused.status, refused.kind), (StatusCode::CONFLICT, ProblemKind::Backlog));
    assert!(refused.why.contains("are being deleted"), "{}", refused.why);
    world.queue.be_silent(false);
    until("they are deleted", is_done).await;
    let pruned: BTreeSet<_> = world.queue.pruned().into_iter().collect();
    assert_eq!(pruned, ["siem".into(), "two".into()].into());
    world.add("siem").await.expect("the name is free");
    // One that may be another store's by now is left alone.
    let other: SubscriberName = "other".into();
    world.store.memory().dropping = [other.clone()].into();
    for sharing in [Sharing::Elsewhere, Sharing::Unknown] {
        world.queue.removals().share(sharing);
        assert_eq!(world.control.try_drop(&other, true).await, None, "{sharing:?}");
    }
    assert_eq!(world.queue.pruned().len(), 2);
    // It is read again when the store says so: the fate of a deletion was unknown.
    world.queue.removals().share(Sharing::Alone);
    world.store.memory().to_read.send_modify(|n| *n += 1);
    until("it is deleted", is_done).await;
    assert!(world.queue.pruned().contains(&other));
}

#[tokio::test]
async fn queues_of_a_removed_subscriber_that_a_file_or_the_store_has_again_are_not_deleted() {
    let world = world_of(Waits::default(), &testing::table("of-file", ""));
    world.add("siem").await.expect("it is made");
    world.store.memory().dropping = ["siem".into(), "of-file".into()].into();
    // The store may have it by a backup: then it is for an operator to remove it again.
    assert_eq!(world.control.try_drop(&"siem".into(), true).await, None);
    assert_eq!(world.control.try_drop(&"of-file".into(), true).await, Some(false));
    assert_eq!(world.store.memory().dropping, ["siem".into()].into());
    assert_eq!(world.queue.pruned(), [""; 0]);
}
