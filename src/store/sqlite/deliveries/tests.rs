//! Deliveries and the patterns of subscribers.

use super::*;
use crate::event::Pattern;

#[tokio::test]
async fn a_delivery_is_what_its_changes_made_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let end = AttemptEnd {
        status: Some(503),
        failure: Some(crate::delivery::FailureKind::Status),
        excerpt: "busy \"now\"\0".to_owned(),
    };
    let ended = Change::Ended { attempt: 1, took: Duration::from_millis(12), end };
    let due = time(millis(now())) + HOUR;
    let changes = [
        started("msg_1"),
        change("msg_1", ended),
        change("msg_1", Change::Retrying { due }),
        change("msg_2", Change::Dead { reason: Reason::InvalidEvent, contents: Some(contents()) }),
        change("msg_3", Change::Delivered),
        started("msg_4"),
    ];
    let (first, second) = changes.split_at(1);
    store.record(first.to_vec()).await.expect("records");
    store.record(second.to_vec()).await.expect("records");
    let one = store.delivery("msg_1").await.expect("reads").expect("is there");
    let mut expected = Delivery::begin(one.row, &changes[0]).expect("begins");
    expected.apply(&changes[1]);
    expected.apply(&changes[2]);
    let whole = |at: SystemTime| time(millis(at));
    expected.begun_at = whole(expected.begun_at);
    expected.changed_at = whole(expected.changed_at);
    expected.attempts[0].at = whole(expected.attempts[0].at);
    assert_eq!(one, expected);
    assert_eq!(store.delivery("msg_3").await.expect("reads"), None, "its begin is not known");
    let listed = async |state: Option<&str>| {
        let filter = DeliveryFilter { state: state.map(str::to_owned), ..Default::default() };
        let page = store.deliveries(&filter, None, 10, LONG).await.expect("lists");
        page.rows.iter().map(|d| d.id.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(listed(None).await, ["msg_4", "msg_2", "msg_1"]);
    assert_eq!(listed(Some("dead")).await, ["msg_2"]);
    assert_eq!(listed(Some("in_flight")).await, ["msg_4"]);
    assert_eq!(listed(Some("delivered")).await, [""; 0]);
    assert_eq!(listed(Some("no such state")).await, [""; 0]);
    let (since, until) = (now() - HOUR, now() + HOUR);
    let siem = ["siem".into()];
    let found = store.deliveries_with(&siem, Print::of(b"b"), since, until, LONG).await;
    assert_eq!(found.expect("finds")[0].deliveries.len(), 3);
    let found = store.deliveries_with(&siem, Print::of(b"c"), since, until, LONG).await;
    assert_eq!(found.expect("finds"), [WithEvent::default()]);
    store.close(true).await;
    let store = start(config(dir.path())).await;
    let state = store.delivery("msg_4").await.expect("reads").map(|d| d.state);
    assert_eq!(state, Some(DeliveryState::Interrupted), "its daemon has ended");
}

#[tokio::test]
async fn deliveries_are_listed_in_pages_and_removed_when_they_are_old() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let old = now() - HISTORY.retention - HOUR;
    let begin = |n: u32| DeliveryChange {
        at: if n < 1500 { old } else { now() },
        ..started(&format!("msg_{n}"))
    };
    let delivered = |n: u32| DeliveryChange {
        change: Change::Delivered,
        // One that is old has changed today.
        at: if n == 7 { now() } else { begin(n).at },
        ..begin(n)
    };
    store
        .record((0..3000).flat_map(|n| [begin(n), delivered(n)]).collect())
        .await
        .expect("records");
    let filter = DeliveryFilter { subscriber: Some("siem".to_owned()), ..Default::default() };
    let first = store.deliveries(&filter, None, 2, LONG).await.expect("lists");
    assert_eq!(first.rows.iter().map(|d| d.row).collect::<Vec<_>>(), [3000, 2999]);
    let second = store.deliveries(&filter, first.next, 500, LONG).await.expect("lists");
    assert_eq!((second.rows.len(), second.rows[0].row), (500, 2998));
    let late = store.deliveries(&filter, Some(1510), 500, LONG).await.expect("lists");
    assert_eq!((late.rows.len(), late.next), (9, None), "older ones are not shown");
    let cut = store.deliveries(&filter, None, 500, Duration::ZERO).await.expect("lists");
    assert!(cut.next == Some(3000) && cut.searched_back_to.is_some());
    let mut trims = 0;
    while store.trim(now()).await.expect("trims") {
        trims += 1;
    }
    assert_eq!(trims, 2, "some at once");
    assert!(store.delivery("msg_7").await.expect("reads").is_some());
    assert!(store.delivery("msg_8").await.expect("reads").is_none());
    // Those after the last mark go with the next one.
    assert!(store.delivery("msg_1022").await.expect("reads").is_none());
}

#[tokio::test]
async fn deliveries_are_listed_by_the_state_that_is_known() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let at = |id: &str, before: Duration, what: Change| DeliveryChange {
        at: now() - before,
        ..change(id, what)
    };
    let begun = |id: &str, before| DeliveryChange { at: now() - before, ..started(id) };
    let due = |before| Change::Retrying { due: now() - before };
    let (long, short) = (HOUR, Duration::from_secs(5));
    let changes = vec![
        begun("msg_overdue", long),
        at("msg_overdue", long, due(long)),
        begun("msg_retrying", short),
        at("msg_retrying", short, due(short)),
        begun("msg_endless", long),
        begun("msg_in_flight", short),
        begun("msg_delivered", long),
        at("msg_delivered", long, Change::Delivered),
    ];
    store.record(changes).await.expect("records");
    let ids = async |state: &str| {
        let filter = DeliveryFilter { state: Some(state.to_owned()), ..Default::default() };
        let found = store.deliveries(&filter, None, 10, LONG).await.expect("lists").rows;
        found.iter().map(|d| d.id.as_str().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids("retrying").await, ["msg_retrying"]);
    assert_eq!(ids("in_flight").await, ["msg_in_flight"]);
    assert_eq!(ids("unknown").await, ["msg_endless", "msg_overdue"]);
    assert_eq!(ids("delivered").await, ["msg_delivered"]);
}

#[tokio::test]
async fn patterns_are_kept_with_the_times_in_which_they_held() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    let name = |name| SubscriberName::try_new(name).expect("a name");
    let patterns = |all: &[&str]| {
        let patterns = all.iter().map(|p| Pattern::try_new(p).expect("a pattern"));
        Interest { patterns: patterns.collect(), tenant: None }
    };
    let at = |hours: u32| time(millis(now() - HOUR * (10 - hours)));
    let times = [at(1), at(2), at(3)];
    let all = [
        vec![(name("a"), patterns(&["#"])), (name("b"), patterns(&["x.*", "y"]))],
        vec![(name("a"), patterns(&["#"])), (name("b"), patterns(&["y"]))],
        vec![(name("b"), patterns(&["y"]))],
    ];
    for (wanted, at) in all.into_iter().zip(times) {
        store.subscribed(wanted.clone(), at).await.expect("records");
        store.subscribed(wanted, at + HOUR / 2).await.expect("nothing changes");
    }
    let found = store.subscriptions().await.expect("reads");
    let found: Vec<_> = found
        .iter()
        .map(|s| (&*s.subscriber, s.interest.patterns.len(), s.from, s.until))
        .collect();
    assert_eq!(
        found,
        [
            ("a", 1, times[0], Some(times[2])),
            ("b", 2, times[0], Some(times[1])),
            ("b", 1, times[1], None)
        ]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_deliveries_of_an_event_are_those_that_a_scan_finds(
        begun in proptest::collection::vec(
            (0..4_usize, 0..100_u64, proptest::option::weighted(0.8, proptest::collection::vec(0..5_u8, 0..3))),
            0..40,
        ),
        asked in Just((0..5_usize).collect::<Vec<_>>()).prop_shuffle(),
        (since, until) in (0..100_u64, 0..100_u64),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let dir = tempfile::tempdir().expect("a directory");
            let store = start(config(dir.path())).await;
            let name = |n: usize| SubscriberName::from(["a", "b", "c", "d", "none"][n]);
            let base = time(millis(now() - HOUR));
            let at = |millis| base + Duration::from_millis(millis);
            let changes = begun.iter().enumerate().map(|(n, (subscriber, begun, prints))| {
                let prints = prints.as_ref().map(|all| all.iter().map(|p| Print::of(&[*p])).collect());
                let contents = Contents { prints, ..contents() };
                let change = Change::Started { attempt: 1, contents, by: "host:1".to_owned() };
                let id = BatchId::from(&*format!("msg_{n}"));
                DeliveryChange { id, subscriber: name(*subscriber), at: at(*begun), change }
            });
            store.record(changes.collect()).await.expect("records");
            let names: Vec<_> = asked.iter().copied().map(name).collect();
            let print = Print::of(&[1]);
            let found = store.deliveries_with(&names, print, at(since), at(until), LONG).await;
            let mut expected = vec![WithEvent::default(); names.len()];
            let all = store.deliveries(&DeliveryFilter::default(), None, 500, LONG).await;
            for delivery in all.expect("lists").rows.into_iter().rev() {
                let place = names.iter().position(|name| *name == delivery.subscriber);
                let of = &mut expected[place.expect("was asked for")];
                if delivery.begun_at < at(since) || delivery.begun_at >= at(until) {
                    continue;
                }
                match &delivery.contents.prints {
                    Some(prints) if prints.contains(&print) => of.deliveries.push(delivery),
                    Some(_) => {}
                    None => of.without_prints += 1,
                }
            }
            assert_eq!(found.expect("finds"), expected);
            store.close(true).await;
        });
    }
}

#[tokio::test]
async fn a_search_without_time_answers_for_one_subscriber_as_far_as_it_came() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = start(config(dir.path())).await;
    store.record(vec![started("msg_1"), started("msg_2")]).await.expect("records");
    let (since, until) = (now() - HOUR, now() + HOUR);
    let names = ["siem".into(), "other".into()];
    let search = async |names: &[SubscriberName]| {
        let found = store.deliveries_with(names, Print::of(b"b"), since, until, Duration::ZERO);
        found.await.expect("finds")
    };
    let found = search(&names).await;
    assert_eq!(found.len(), 1, "the other is asked for in a call of its own");
    assert_eq!(found[0].deliveries.len(), 1);
    assert!(found[0].searched_until.is_some());
    assert_eq!(search(&names[1..]).await, [WithEvent::default()]);
}
