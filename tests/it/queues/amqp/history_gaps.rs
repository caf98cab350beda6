//! Events that history lacks: a gap has their time, whichever daemon finds them missing.

use std::time::{Duration, SystemTime};

use hooktrail::{
    clock,
    queue::{HistorySource as _, HistoryStart, Published},
    store::Gap,
};
use lapin::{
    BasicProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions},
};

use super::{
    history::{Running, body, started, take},
    upkeep::{declare_exchange, delete_exchange, exchange_is_there},
};
use crate::support::{PATIENCE, broker::Broker, eventually, run};

/// Writes into the state stream that history lacks events of a time, as another daemon does.
async fn record_lack(broker: &Broker, since: SystemTime, found: SystemTime) {
    let (since, found) = (clock::rfc3339(since), clock::rfc3339(found));
    let record = format!(r#"{{"history_lacks":"a test","since":"{since}","at":"{found}"}}"#);
    let (connection, channel) = broker.channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
    let stream = format!("{}.state", broker.prefix);
    let published = channel
        .basic_publish(
            "".into(),
            stream.as_str().into(),
            BasicPublishOptions::default(),
            record.as_bytes(),
            BasicProperties::default(),
        )
        .await
        .expect("publishes");
    assert!(published.await.expect("is confirmed").is_ack());
    connection.close(200, "done".into()).await.expect("closes");
}

#[test]
fn a_gap_has_the_time_that_its_record_says_although_later_events_are_stored_and_waits_for_no_event()
{
    run(async {
        let broker = Broker::shared();
        let daemon = started(&broker, "").await;
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        broker.publish("a.b", [body(0)]).await;
        let stored = take(&mut history, 1).await.remove(0).at;
        let ago = |seconds| stored - Duration::from_secs(seconds);
        record_lack(&broker, ago(100), ago(50)).await;
        let mut rows = Vec::new();
        let taking = history.take(&mut rows, 10);
        tokio::time::timeout(PATIENCE, taking)
            .await
            .expect("no event is needed")
            .unwrap_or_else(|e| panic!("{e}"));
        let gaps = history.gaps();
        let [gap] = &gaps[..] else { panic!("{gaps:?} {rows:?}") };
        assert!(rows.is_empty() && gap.why == "a test" && gap.until >= stored, "{rows:?} {gap:?}");
        let from = gap.from.duration_since(ago(100));
        let from = from.unwrap_or_else(|e| e.duration());
        assert!(from < Duration::from_millis(2), "{gap:?} begins {from:?} from what is recorded");
        history.close().await;
        daemon.close().await;
    });
}

#[test]
fn a_gap_that_the_daemon_with_history_finds_itself_outlives_its_process() {
    run(async {
        let broker = Broker::shared();
        let daemon = started(&broker, "").await;
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        broker.publish("a.b", [body(0)]).await;
        take(&mut history, 1).await;
        delete_exchange(&broker).await;
        declare_exchange(&broker).await;
        eventually("it has bound its subscriber", async || {
            daemon.publish("wanted.one", &body(1)).await == Published::Stored
        })
        .await;
        let witness = format!("{}.witness", broker.prefix);
        eventually("it has checked all", async || exchange_is_there(&broker, &witness).await).await;
        // Nobody has asked for the gap: the process might as well be killed.
        drop(history);
        daemon.close().await;

        let daemon = started(&broker, "").await;
        let ago = Some(Duration::from_secs(60));
        let history = daemon.history_after("store-1", ago).await;
        let mut history = history.unwrap_or_else(|e| panic!("{e}"));
        let gaps = history.gaps();
        assert!(gaps.iter().any(|gap| gap.why.contains("not bound")), "{gaps:?}");
        history.close().await;
        daemon.close().await;
    });
}

#[test]
fn history_that_began_again_lacks_what_came_before_its_queue_was_bound_again() {
    run(async {
        let broker = Broker::shared();
        let daemon = started(&broker, "").await;
        let history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        history.close().await;
        daemon.close().await;
        delete_exchange(&broker).await;
        declare_exchange(&broker).await;
        // Its file was damaged, say: no event is in it, and a gap says until when.
        let began = clock::now();
        let daemon = started(&broker, "").await;
        // It is not bound yet: that waits until it is old enough.
        let running = clock::now();
        let (store, known_until) = (Some("store-1".to_owned()), Some(began));
        let start = HistoryStart { store, last: None, known_until };
        let mut history = daemon.history_of(start).await.unwrap_or_else(|e| panic!("{e}"));
        let mut gaps = Vec::new();
        eventually("it says so", async || {
            gaps.extend(history.gaps());
            !gaps.is_empty()
        })
        .await;
        let covers = |gap: &Gap| gap.from <= began && gap.until >= running;
        assert!(gaps.iter().any(covers), "{began:?} to {running:?}: {gaps:?}");
        history.close().await;
        daemon.close().await;
    });
}

/// The exchange is redeclared, and a daemon that keeps no history is the first to restore bindings.
/// Returns a time at which none was restored yet.
async fn restore_by_another(broker: &Broker, other: &Running) -> SystemTime {
    delete_exchange(broker).await;
    let missing = clock::now();
    declare_exchange(broker).await;
    // It finds no queue, so that the bindings are checked.
    eventually("the other has bound its subscriber", async || {
        other.publish("wanted.one", &body(0)).await == Published::Stored
    })
    .await;
    // That can be a check which had seen the witness before the exchange was deleted: only the next
    // one records what history lacks, and then declares the witness again.
    let witness = format!("{}.witness", broker.prefix);
    eventually("the other has checked all", async || exchange_is_there(broker, &witness).await)
        .await;
    missing
}

#[test]
fn a_binding_that_another_daemon_finds_missing_is_restored_and_history_has_a_gap() {
    run(async {
        let broker = Broker::shared();
        let daemon = started(&broker, "").await;
        let mut history = daemon.history("store-1").await.unwrap_or_else(|e| panic!("{e}"));
        let other = started(&broker, "[history]\nretention = \"0s\"\n").await;
        broker.publish("a.b", [body(0)]).await;
        take(&mut history, 1).await;
        let missing = restore_by_another(&broker, &other).await;
        let mut gaps = Vec::new();
        eventually("the gap is reported", async || {
            gaps.extend(history.gaps());
            !gaps.is_empty()
        })
        .await;
        let [gap] = &gaps[..] else { panic!("{gaps:?}") };
        // The other may have seen the witness until the exchange was deleted, and the queue of history
        // may be bound before the subscriber's.
        assert!(gap.from <= missing && gap.until >= missing, "{gap:?}");
        assert!(gap.why.contains("not bound"), "{gap:?}");
        broker.publish("nobody.wants", [body(1)]).await;
        let rows = take(&mut history, 1).await;
        assert!(rows.iter().any(|row| row.body == body(1)), "{rows:?}");
        history.close().await;
        daemon.close().await;

        // Once more, and no daemon with history runs: the next one reports it, until it is stored.
        restore_by_another(&broker, &other).await;
        for (lacks, is_stored) in [(true, false), (true, true), (false, false)] {
            let daemon = started(&broker, "").await;
            let ago = Some(Duration::from_secs(60));
            let history = daemon.history_after("store-1", ago).await;
            let mut history = history.unwrap_or_else(|e| panic!("{e}"));
            let is_lacking = |gaps: &[Gap]| gaps.iter().any(|gap| gap.why.contains("not bound"));
            broker.publish("a.b", [body(2)]).await;
            let mut rows = Vec::new();
            history.take(&mut rows, 1000).await.unwrap_or_else(|e| panic!("{e}"));
            let gaps = history.gaps();
            assert_eq!(is_lacking(&gaps), lacks, "{gaps:?}");
            if is_stored {
                history.stored().await.unwrap_or_else(|e| panic!("{e}"));
            }
            history.close().await;
            daemon.close().await;
        }
        other.close().await;
    });
}
