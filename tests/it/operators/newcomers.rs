//! New subscribers with `start_from`: they also get what history has from before they were bound.

use std::{collections::BTreeMap, time::Duration};

use serde_json::Value;

use super::history::{admin, asked, remembering, wait_for_events};
use crate::support::{
    api::Api,
    daemon::{Daemon, QUICK, Setup, subscriber},
    eventually,
    queue::{Queue, Section as _, on_both_queues},
    receiver::{Receiver, event, status},
    run,
};

on_both_queues!(
    a_subscriber_that_comes_by_reload_while_events_keep_coming_misses_none_from_its_begin_on,
    a_daemon_that_is_killed_at_any_moment_makes_one_replay_that_misses_nothing,
    an_upgraded_or_lost_store_and_a_subscriber_that_comes_again_replay_nothing,
);

const TYPE: &str = "activity_log.user.updated";

/// What was published before a test's events, and is older than the begin.
const OLD: u64 = 1_000_000;

fn text(queue: &Queue, api: &Api, subscribers: &[(&str, &Receiver, &str)]) -> String {
    let names: Vec<&str> = subscribers.iter().map(|(name, ..)| *name).collect();
    let tables = subscribers.iter().map(|(name, receiver, lines)| {
        subscriber(name, &receiver.url, &format!("batch.max_events = 20\n{lines}"))
    });
    queue.section(&names) + QUICK + &admin(api) + &tables.collect::<String>()
}

fn start_from(at: &str) -> String {
    format!("start_from = \"{at}\"")
}

fn now() -> String {
    humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string()
}

async fn put(queue: &Queue, numbers: impl IntoIterator<Item = u64>) {
    queue.publish(TYPE, numbers.into_iter().map(event)).await;
}

/// How often each event was accepted.
fn counts(receiver: &Receiver) -> BTreeMap<u64, usize> {
    let mut counts = BTreeMap::new();
    receiver.accepted().into_iter().for_each(|n| *counts.entry(n).or_default() += 1);
    counts
}

/// Waits until each of these has come, and checks that no other has; the number of repeats.
async fn wait_exactly(receiver: &Receiver, numbers: std::ops::Range<u64>) -> usize {
    eventually("all have come", async || {
        let counts = counts(receiver);
        numbers.clone().all(|n| counts.contains_key(&n))
    })
    .await;
    let counts = counts(receiver);
    let others: Vec<_> = counts.keys().filter(|n| !numbers.contains(n)).collect();
    assert!(others.is_empty(), "not from its begin on: {others:?}");
    counts.values().map(|n| n - 1).sum()
}

fn replays(setup: &Setup) -> Vec<Value> {
    let list = asked(setup, &["replay", "list", "--json"]);
    list["replays"].as_array().cloned().unwrap_or_default()
}

/// Waits until a subscriber's only replay is done.
async fn wait_done(setup: &Setup, name: &str) -> Value {
    let mut found = Vec::new();
    eventually("its replay is done", async || {
        found = replays(setup).into_iter().filter(|r| r["subscriber"] == name).collect();
        found.first().is_some_and(|r| r["state"] == "done")
    })
    .await;
    assert_eq!(found.len(), 1, "{found:?}");
    let replay = found.remove(0);
    assert_eq!((&replay["by"], &replay["start_from"]), (&"start_from".into(), &true.into()));
    assert_eq!(replay["missing"], 0, "{replay}");
    replay
}

async fn reload(api: &Api, setup: &Setup, text: &str) {
    let new = setup.write("new.toml", text);
    std::fs::rename(new, setup.config()).expect("renames");
    let token = format!("Bearer {}", super::history::TOKEN);
    let headers = [("authorization", token.as_str()), ("content-type", "application/json")];
    let answer = api.send("POST", "/api/v1/reload", &headers, "{}").await;
    // The daemon may have noticed the file before.
    assert_eq!(answer.status, 200, "{answer:?}");
}

/// Events of before the begin, and the begin.
async fn with_old_events(queue: &Queue, setup: &Setup) -> String {
    put(queue, OLD..OLD + 30).await;
    wait_for_events(setup, 30).await;
    // Times are in milliseconds on the embedded queue.
    tokio::time::sleep(Duration::from_millis(5)).await;
    now()
}

async fn a_subscriber_that_comes_by_reload_while_events_keep_coming_misses_none_from_its_begin_on(
    queue: Queue,
) {
    const EVENTS: u64 = 3000;
    let (api, first, new) = (Api::new(), Receiver::accepting().await, Receiver::accepting().await);
    let setup = Setup::with_text(&text(&queue, &api, &[("first", &first, "")]));
    let daemon = remembering(&queue, &setup).await;
    let begin = with_old_events(&queue, &setup).await;
    put(&queue, 0..500).await;
    let both = text(&queue, &api, &[("first", &first, ""), ("new", &new, &start_from(&begin))]);
    let publishing = async {
        for n in (500..EVENTS).step_by(10) {
            put(&queue, n..n + 10).await;
        }
    };
    tokio::join!(publishing, reload(&api, &setup, &both));
    let repeats = wait_exactly(&new, 0..EVENTS).await;
    let done = wait_done(&setup, "new").await;
    let sent = done["enqueued"].as_u64().expect("a number");
    assert!((500..=EVENTS).contains(&sent), "{done}");
    if let Queue::Embedded(_) = queue {
        assert_eq!(repeats, 0, "it ends where its own events begin: {done}");
    }
    assert!(!daemon.log().contains("`start_from` does nothing"), "{}", daemon.log());
    assert_eq!(replays(&setup).len(), 1);
}

async fn a_daemon_that_is_killed_at_any_moment_makes_one_replay_that_misses_nothing(queue: Queue) {
    let (api, first, new) = (Api::new(), Receiver::accepting().await, Receiver::accepting().await);
    let setup = Setup::with_text(&text(&queue, &api, &[("first", &first, "")]));
    let daemon = remembering(&queue, &setup).await;
    let begin = with_old_events(&queue, &setup).await;
    put(&queue, 0..200).await;
    wait_for_events_at_least(&setup, 230).await;
    daemon.kill();
    let both = text(&queue, &api, &[("first", &first, ""), ("new", &new, &start_from(&begin))]);
    std::fs::write(setup.config(), both).expect("writes");
    let mut published = 200;
    // Before it is bound, just after that, before and while its replay runs.
    for moment in ["starting", "running", "every event goes into history", "bound"] {
        let mut daemon = setup.spawn();
        eventually(moment, async || {
            daemon.log().contains(if moment == "bound" { "running" } else { moment })
                || matches!(queue, Queue::Embedded(_))
                    && moment.starts_with("every")
                    && daemon.log().contains("running")
        })
        .await;
        if moment == "bound" {
            new.now(|_, _| status(200).after(Duration::from_millis(200)));
            new.wait_requests(2).await;
        }
        if moment != "starting" {
            put(&queue, published..published + 50).await;
            published += 50;
        }
        daemon.end();
    }
    new.now(|_, _| status(200));
    let _daemon: Daemon = setup.start().await;
    wait_exactly(&new, 0..published).await;
    wait_done(&setup, "new").await;
}

async fn wait_for_events_at_least(setup: &Setup, number: usize) {
    eventually("history has them", async || {
        let found = asked(setup, &["history", "--json", "--limit", "500"]);
        found["events"].as_array().is_some_and(|events| events.len() >= number)
    })
    .await;
}

async fn an_upgraded_or_lost_store_and_a_subscriber_that_comes_again_replay_nothing(queue: Queue) {
    let (api, old, again) = (Api::new(), Receiver::accepting().await, Receiver::accepting().await);
    let week = start_from("-7d");
    let both = |lines: &str| text(&queue, &api, &[("old", &old, lines), ("again", &again, lines)]);
    let setup = Setup::with_text(&both(""));
    let daemon = remembering(&queue, &setup).await;
    put(&queue, 0..40).await;
    wait_for_events(&setup, 40).await;
    old.wait_all(40).await;
    again.wait_all(40).await;
    let store = data_dir(&setup, &queue).join("store.db");
    eventually("they are recorded", async || {
        let file = rusqlite::Connection::open(&store).expect("opens");
        file.query_row("SELECT count(*) FROM subscriber", [], |r| r.get(0)) == Ok(2)
    })
    .await;
    // As of a version that recorded no subscribers, and with a key that it did not know.
    daemon.stop().await;
    let file = rusqlite::Connection::open(&store).expect("opens");
    assert_eq!(file.execute("DELETE FROM subscriber", []), Ok(2));
    drop(file);
    std::fs::write(setup.config(), both(&week)).expect("writes");
    let daemon = remembering(&queue, &setup).await;
    daemon.wait_log("`start_from` does nothing").await;
    assert_eq!(daemon.log().matches("`start_from` does nothing").count(), 2, "{}", daemon.log());
    daemon.stop().await;
    if let Queue::Embedded(_) = queue {
        // On a broker another store would not have history.
        std::fs::remove_file(&store).expect("deletes");
    }
    let daemon = remembering(&queue, &setup).await;
    reload(&api, &setup, &text(&queue, &api, &[("old", &old, &week)])).await;
    put(&queue, 40..50).await;
    old.wait_all(50).await;
    reload(&api, &setup, &both(&week)).await;
    put(&queue, 50..60).await;
    eventually("it gets events again", async || (50..60).all(|n| counts(&again).contains_key(&n)))
        .await;
    // One that is new comes last: what the others were to get would have come before.
    let new = Receiver::accepting().await;
    let all =
        text(&queue, &api, &[("old", &old, &week), ("again", &again, &week), ("new", &new, &week)]);
    reload(&api, &setup, &all).await;
    wait_exactly(&new, 0..60).await;
    wait_done(&setup, "new").await;
    assert_eq!(replays(&setup).len(), 1, "{}", daemon.log());
    for (receiver, numbers) in [(&old, 0..60), (&again, 0..40)] {
        let counts = counts(receiver);
        assert!(numbers.clone().all(|n| counts.get(&n) == Some(&1)), "{counts:?}");
    }
}

fn data_dir(setup: &Setup, queue: &Queue) -> std::path::PathBuf {
    match queue {
        Queue::Amqp(_) => setup.config().with_file_name("data"),
        Queue::Embedded(embedded) => embedded.data_dir(),
    }
}

#[test]
fn check_says_that_a_begin_is_yet_to_come_and_a_daemon_starts_with_it() {
    run(async {
        let receiver = Receiver::accepting().await;
        let start = start_from("2999-01-01T00:00:00Z");
        let text = "[queue]\nurl = \"embedded\"\ndata_dir = \"data\"\n".to_owned()
            + QUICK
            + &subscriber("a", &receiver.url, &start);
        let setup = Setup::with_text(&text);
        let output = setup.run(&["check"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        let found = "warning: subscriber `a`: start_from, 2999-01-01T00:00:00.000Z, is yet to come";
        assert!(said.contains(found) && said.contains("remedy: write a time"), "{said}");
        let daemon = setup.start().await;
        daemon.stop().await;
        let with = text.replace("data_dir = \"data\"", "data_dir = \"data\"\nretention = \"0s\"");
        let line = with.lines().position(|l| l.starts_with("start_from")).expect("a line") + 1;
        std::fs::write(setup.config(), with).expect("writes");
        let output = setup.run(&["check"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let place = format!("hooktrail.toml:{line}:14: subscriber[a].start_from: needs the events");
        assert!(output.status.code() == Some(2) && said.contains(&place), "{said}");
    });
}
