//! What hooktrail remembers is sent again: replays of a time, and single batches.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::Value;

use super::history::{admin, asked, remembering, wait_for_events};
use crate::support::{
    api::Api,
    daemon::{QUICK, Setup, subscriber},
    eventually,
    queue::{Queue, on_both_queues},
    receiver::{Receiver, Request, event, status},
};

on_both_queues!(
    a_replay_sends_the_events_of_its_time_again_also_over_a_kill,
    a_resent_batch_has_the_same_id_and_the_same_bytes,
    a_cancelled_replay_goes_on_where_it_was_and_operations_are_listed,
);

const TYPE: &str = "activity_log.user.updated";

/// Small batches, one after the other.
const SMALL: &str = "batch.max_events = 3\nhttp.concurrency = 1";

fn is_replay(request: &Request) -> bool {
    request.header("x-hooktrail-replay") == "true"
}

/// The numbers of the events in these requests, by the id of the batch.
fn by_id(requests: &[Request]) -> BTreeMap<String, Vec<u64>> {
    let mut all = BTreeMap::new();
    for request in requests.iter().filter(|r| is_replay(r)) {
        let numbers = request.numbers();
        let before = all.insert(request.id().to_owned(), numbers.clone());
        assert!(before.is_none_or(|before| before == numbers), "one id, one body");
    }
    all
}

fn now() -> String {
    humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string()
}

async fn wait_for_state(setup: &Setup, id: &str, state: &str) -> Value {
    let mut found = Value::Null;
    eventually(&format!("replay {id} is {state}"), async || {
        let list = asked(setup, &["replay", "list", "--json"]);
        let all = list["replays"].as_array().cloned().unwrap_or_default();
        found = all.into_iter().find(|r| r["id"] == id).unwrap_or_default();
        found["state"] == state
    })
    .await;
    found
}

async fn a_replay_sends_the_events_of_its_time_again_also_over_a_kill(queue: Queue) {
    let api = Api::new();
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, SMALL) + &admin(&api)),
    );
    let daemon = remembering(&queue, &setup).await;
    for n in 0..6 {
        queue.publish_as(&format!("old-{n}"), TYPE, event(n).as_bytes()).await;
    }
    wait_for_events(&setup, 6).await;
    let since = now();
    for n in 6..66 {
        queue.publish_as(&format!("new-{n}"), TYPE, event(n).as_bytes()).await;
    }
    receiver.wait_all(66).await;
    wait_for_events(&setup, 66).await;
    let dry = asked(&setup, &["replay", "a", "--since", &since, "--dry-run", "--json"]);
    assert_eq!((&dry["events"], &dry["complete"]), (&60.into(), &true.into()), "{dry}");
    assert!(receiver.take_requests().iter().all(|r| !is_replay(r)));

    receiver.now(|_, _| status(200).after(Duration::from_millis(100)));
    let made = asked(&setup, &["replay", "a", "--since", &since, "--yes", "--json"]);
    let id = made["id"].as_str().expect("an id").to_owned();
    receiver.wait_requests(5).await;
    daemon.kill();
    let _daemon = setup.start().await;
    let done = wait_for_state(&setup, &id, "done").await;
    assert_eq!((&done["enqueued"], &done["missing"]), (&60.into(), &0.into()), "{done}");
    let expected: Vec<u64> = (6..66).collect();
    eventually("all have come again", async || {
        let sent: BTreeSet<u64> = by_id(&receiver.requests()).into_values().flatten().collect();
        sent.len() == expected.len()
    })
    .await;
    let batches = by_id(&receiver.requests());
    let mut sent: Vec<u64> = batches.values().flatten().copied().collect();
    sent.sort_unstable();
    assert_eq!(sent, expected, "each in one batch, and nothing else");
    assert_eq!(batches.len(), 20);
}

async fn a_resent_batch_has_the_same_id_and_the_same_bytes(queue: Queue) {
    let api = Api::new();
    let receiver = Receiver::accepting().await;
    let lines = "format = \"jsonl\"\nevent_ids = true";
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, lines) + &admin(&api)),
    );
    let _daemon = remembering(&queue, &setup).await;
    for n in 0..4 {
        let body = event(n).replace("{\"event\"", "{ \n\"event\"");
        queue.publish_as(&format!("id-{n}"), TYPE, body.as_bytes()).await;
    }
    receiver.wait_all(4).await;
    wait_for_events(&setup, 4).await;
    let first = receiver.take_requests().remove(0);
    eventually("the delivery is known", async || {
        let found = asked(&setup, &["deliveries", "a", "--json", "--state", "delivered"]);
        let all = found["deliveries"].as_array().cloned().unwrap_or_default();
        all.iter().any(|d| d["id"] == first.id())
    })
    .await;
    let said = setup.ok(&["resend", first.id()]);
    assert!(said.contains("A receiver that remembers ids ignores it."), "{said}");
    let again = receiver.wait_requests(1).await.remove(0);
    assert_eq!((again.id(), &again.body), (first.id(), &first.body));
    assert!(!is_replay(&first) && is_replay(&again));
    let output = setup.run(&["resend", "msg_unknown"]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.code() == Some(1) && text.contains("no delivery"), "{text}");
}

async fn a_cancelled_replay_goes_on_where_it_was_and_operations_are_listed(queue: Queue) {
    let api = Api::new();
    let receiver = Receiver::accepting().await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("a", &receiver.url, SMALL) + &admin(&api)),
    );
    let _daemon = remembering(&queue, &setup).await;
    for n in 0..60 {
        queue.publish_as(&format!("id-{n}"), TYPE, event(n).as_bytes()).await;
    }
    receiver.wait_all(60).await;
    wait_for_events(&setup, 60).await;
    receiver.take_requests();
    setup.ok(&["pause", "a"]);
    let made = asked(&setup, &["replay", "a", "--since", "1h", "--rate", "600", "--yes", "--json"]);
    let id = made["id"].as_str().expect("an id").to_owned();
    setup.ok(&["replay", "cancel", &id]);
    let output = setup.run(&["replay", "cancel", &id]);
    assert_eq!(output.status.code(), Some(1), "it is cancelled");
    setup.ok(&["resume", "a"]);
    assert_eq!(wait_for_state(&setup, &id, "cancelled").await["enqueued"], 0);
    let said = setup.ok(&["replay", "continue", &id]);
    assert!(said.contains("running"), "{said}");
    let done = wait_for_state(&setup, &id, "done").await;
    assert_eq!(done["enqueued"], 60);
    eventually("all have come again", async || {
        by_id(&receiver.requests()).into_values().flatten().count() == 60
    })
    .await;

    let token = format!("Bearer {}", super::history::TOKEN);
    let get = async |path: &str| api.send("GET", path, &[("authorization", &token)], "").await;
    let mut whats = Vec::new();
    eventually("the operations are recorded", async || {
        let found = get("/api/v1/operations").await.json();
        let all = found["operations"].as_array().cloned().unwrap_or_default();
        assert!(all.iter().all(|o| o["by"] == "token"), "{found}");
        whats = all.iter().map(|o| o["what"].as_str().unwrap_or_default().to_owned()).collect();
        whats.len() == 5
    })
    .await;
    whats.sort_unstable();
    assert_eq!(whats, ["cancel_replay", "continue_replay", "pause", "replay", "resume"]);
    assert_eq!(api.get("/api/v1/operations").await.status, 401);
    for (arguments, part) in [
        (&["replay", "a"][..], "--since is required"),
        (&["replay", "a", "--since", "1h"], "use --yes"),
        (&["replay", "a", "--since", "1h", "--rate", "0"], "--rate"),
    ] {
        let output = setup.run(arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && text.contains(part), "{arguments:?}: {text}");
    }
}
