//! Dead letters over the admin API and in the console, on both queues: counted first, then replayed
//! or purged.

use serde_json::{Value, json};

use super::{
    console::{Browser, field, key, links},
    history::TOKEN,
};
use crate::support::{
    api::{Answered, Api},
    daemon::{Daemon, Setup, subscriber},
    eventually,
    queue::{Queue, on_both_queues},
    receiver::{Receiver, event, status},
    run,
};

on_both_queues!(
    what_was_counted_is_replayed_or_purged_once_and_nothing_that_died_since,
    a_letter_that_went_meanwhile_is_said_and_the_others_are_purged,
    the_console_counts_first_and_a_form_that_is_sent_twice_does_it_once,
    a_letters_page_has_its_story_and_an_act_on_one_that_is_gone_does_nothing,
);

const READER: &str = "the-token-that-reads";

/// A batch has one event and one attempt.
const ONCE: &str = "
[batch]
max_events = 1
max_wait = \"0s\"
[http]
allow_http = true
allow_private_addresses = true
[retry]
max_attempts = 1
[circuit_breaker]
failures = 0
";

/// A daemon whose receiver refuses everything for now.
struct Stage {
    api: Api,
    queue: Queue,
    receiver: Receiver,
    _daemon: Daemon,
    setup: Setup,
}

impl Stage {
    /// With so many dead letters, numbered from 0.
    async fn with(queue: Queue, letters: u64) -> Self {
        let api = Api::new();
        let receiver = Receiver::start(|_, _| status(500).body("the path of a URL")).await;
        let tokens = format!(
            "token = \"{TOKEN}\"\n[[admin.tokens]]\nname = \"looker\"\ntoken = \"{READER}\"\nrole = \"read\"\n"
        );
        let text = api.section() + &tokens + ONCE + &subscriber("a", &receiver.url, "");
        let setup = Setup::new(&queue, &text);
        let daemon = setup.start().await;
        let stage = Self { api, queue, receiver, setup, _daemon: daemon };
        stage.kill_more(0..letters).await;
        stage
    }

    async fn kill_more(&self, numbers: std::ops::Range<u64>) {
        let before = self.queue.dead("a").await;
        let count = numbers.end - numbers.start;
        self.queue.publish("activity_log.user.updated", numbers.map(event)).await;
        self.queue.wait_dead("a", before + count as u32).await;
    }

    async fn send(
        &self,
        token: &str,
        method: &str,
        path: &str,
        more: &[(&str, &str)],
        body: &str,
    ) -> Answered {
        let bearer = format!("Bearer {token}");
        let mut headers =
            vec![("content-type", "application/json"), ("authorization", bearer.as_str())];
        headers.extend(more);
        self.api.send(method, &format!("/api/v1/subscribers/a/dead{path}"), &headers, body).await
    }

    async fn get(&self, path: &str) -> Value {
        let answer = self.send(TOKEN, "GET", path, &[], "").await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    }

    async fn post(&self, path: &str, body: &Value) -> Value {
        let answer = self.send(TOKEN, "POST", path, &[], &body.to_string()).await;
        assert_eq!(answer.status, 200, "{body}: {answer:?}");
        answer.json()
    }

    /// The dead letters that are left, by the numbers of their events.
    fn left(&self) -> Vec<u64> {
        let number = |line: &str| -> Option<u64> {
            let letter: Value = serde_json::from_str(line).ok()?;
            let body: Value = serde_json::from_str(letter["body"].as_str()?).ok()?;
            body["events"][0]["n"].as_u64()
        };
        self.setup.ok(&["dead", "export", "a"]).lines().filter_map(number).collect()
    }

    /// The recorded operations, the first one first.
    async fn recorded(&self) -> Vec<String> {
        let bearer = format!("Bearer {TOKEN}");
        let list =
            self.api.send("GET", "/api/v1/operations", &[("authorization", &bearer)], "").await;
        let list = list.json();
        let all = list["operations"].as_array().expect("operations").iter().rev();
        let text = |o: &Value, field: &str| o[field].as_str().unwrap_or_default().to_owned();
        all.map(|o| ["what", "subject", "by", "details"].map(|f| text(o, f)).join(" ")).collect()
    }
}

async fn what_was_counted_is_replayed_or_purged_once_and_nothing_that_died_since(queue: Queue) {
    let stage = Stage::with(queue, 3).await;
    // Who may only read, may not; and a request needs a token.
    for path in ["/replay", "/purge"] {
        let refused = stage.send(READER, "POST", path, &[], "{}").await;
        assert!(refused.status == 403 && refused.text.contains("/problems/role"), "{refused:?}");
        let path = format!("/api/v1/subscribers/a/dead{path}");
        assert_eq!(stage.api.post(&path, "{}").await.status, 401);
    }
    for (body, field) in [
        (json!({ "reason": "odd" }), "reason"),
        (json!({ "status": "5x" }), "status"),
        (json!({ "type": "" }), "type"),
        (json!({ "since": "yesterday" }), "since"),
        (json!({ "ids": [] }), "ids"),
        (json!({ "keys": ["x"] }), "keys"),
        (json!({ "most": 0 }), "most"),
        (json!({ "all": true }), "all"),
    ] {
        let refused = stage.send(TOKEN, "POST", "/purge", &[], &body.to_string()).await;
        assert_eq!((refused.status, &refused.json()["field"]), (400, &json!(field)), "{refused:?}");
    }

    let counted = stage.post("/replay", &json!({ "status": "5xx", "dry_run": true })).await;
    let expected = json!({
        "subscriber": "a", "dry_run": true, "letters": 3, "skipped": 0, "dead": 3, "complete": true,
        "as_of": counted["as_of"], "not_found": [],
    });
    assert_eq!(counted, expected);
    stage.kill_more(3..5).await;
    stage.receiver.take_requests();
    stage.receiver.now(|_, _| status(200));
    let wanted = json!({ "status": "5xx", "most": 3, "as_of": counted["as_of"] });
    let named = [("idempotency-key", "once")];
    let first = stage.send(TOKEN, "POST", "/replay", &named, &wanted.to_string()).await;
    assert_eq!((first.status, &first.json()["letters"]), (200, &json!(3)), "{first:?}");
    let again = stage.send(TOKEN, "POST", "/replay", &named, &wanted.to_string()).await;
    assert_eq!((again.header("idempotent-replayed"), &again.text), ("true", &first.text));
    let other = stage.send(TOKEN, "POST", "/purge", &named, &wanted.to_string()).await;
    assert!(other.status == 422 && other.text.contains("idempotency-key"), "{other:?}");
    let sent = stage.receiver.wait_requests(3).await;
    assert!(sent.iter().all(|r| r.header("x-hooktrail-replay") == "true"));
    assert_eq!(stage.receiver.accepted(), [0, 1, 2]);
    // Without a key too, as after a restart: what was counted is gone.
    assert_eq!(stage.post("/replay", &wanted).await["letters"], 0);
    assert_eq!(stage.queue.dead("a").await, 2);

    let counted = stage.post("/purge", &json!({ "dry_run": true })).await;
    assert_eq!((&counted["letters"], &counted["dead"]), (&json!(2), &json!(2)));
    stage.receiver.now(|_, _| status(500));
    stage.kill_more(5..6).await;
    let wanted = json!({ "most": 2, "as_of": counted["as_of"] });
    assert_eq!(stage.post("/purge", &wanted).await["letters"], 2);
    assert_eq!(stage.left(), [5]);
    // Only what was done is recorded.
    let expected =
        ["replay_dead a token 3 letters with status 5xx", "purge_dead a token 2 letters"];
    eventually("it is recorded", async || stage.recorded().await == expected).await;
}

async fn a_letter_that_went_meanwhile_is_said_and_the_others_are_purged(queue: Queue) {
    let stage = Stage::with(queue, 3).await;
    let list = stage.get("?status=500&limit=2").await;
    assert_eq!((&list["dead"], &list["complete"]), (&json!(3), &json!(false)), "{list}");
    assert_eq!(list["letters"].as_array().map(Vec::len), Some(2));
    assert_eq!(stage.get("?reason=refused").await["letters"], json!([]));
    let letters = stage.get("").await["letters"].clone();
    let keys: Vec<&str> = (0..3).map(|n| letters[n]["key"].as_str().expect("a key")).collect();
    let ids: Vec<&str> = (0..3).map(|n| letters[n]["id"].as_str().expect("an id")).collect();

    let counted = stage.post("/purge", &json!({ "dry_run": true })).await;
    stage.setup.ok(&["dead", "purge", "a", ids[0], "--yes"]);
    let gone = stage.send(TOKEN, "GET", &format!("/{}", keys[0]), &[], "").await;
    assert_eq!(gone.status, 404, "{gone:?}");
    let named = json!({ "keys": [keys[0], keys[2]], "ids": ["msg_none"] });
    let done = stage.post("/purge", &named).await;
    assert_eq!((&done["letters"], &done["not_found"]), (&json!(1), &json!(["msg_none", keys[0]])));
    // One that died later does not take the place of one that went.
    stage.kill_more(3..5).await;
    let wanted = json!({ "most": counted["letters"], "as_of": counted["as_of"] });
    assert_eq!(stage.post("/purge", &wanted).await["letters"], 1);
    assert_eq!(stage.left(), [3, 4]);
}

async fn the_console_counts_first_and_a_form_that_is_sent_twice_does_it_once(queue: Queue) {
    let stage = Stage::with(queue, 3).await;
    let browser = Browser::signed_in(&stage.api, TOKEN).await;
    let looker = Browser::signed_in(&stage.api, READER).await;
    let list = "/console/dead-letters/a?status=5xx";
    let page = browser.page(list).await;
    let replay = "/console/dead-letters/a/replay?status=5xx";
    let purge = "/console/dead-letters/a/purge?status=5xx";
    assert!(links(&page).contains(replay) && links(&page).contains(purge), "{page}");
    assert!(browser.page("/console/dead-letters/a?reason=refused").await.contains("None fits"));
    let wrong = browser.get("/console/dead-letters/a?status=odd").await;
    assert!(wrong.status == 400 && wrong.text.contains("value=\"odd\""), "{}", wrong.text);
    assert!(wrong.text.contains("aria-invalid=\"true\""), "{}", wrong.text);

    // Who may only read sees the list, no action, and is refused.
    let seen = looker.page(list).await;
    assert!(!seen.contains("/a/replay") && !seen.contains("the path of a URL"), "{seen}");
    assert_eq!(looker.get(replay).await.status, 403);
    let own = key(&seen);
    let refused = looker.post(replay, &[("form_key", &own), ("request", "r")], &[]).await;
    assert_eq!(refused.status, 403);

    let counted = browser.page(replay).await;
    assert!(counted.contains("<strong>3 dead letters</strong>"), "{counted}");
    assert!(counted.contains("hooktrail dead replay a --status 5xx"), "{counted}");
    let hidden = ["form_key", "request", "status", "as_of", "most"];
    let values = hidden.map(|name| (name, field(&counted, name)));
    let form: Vec<(&str, &str)> = values.iter().map(|(n, v)| (*n, v.as_str())).collect();
    stage.kill_more(3..4).await;
    stage.receiver.take_requests();
    stage.receiver.now(|_, _| status(200));
    let path = "/console/dead-letters/a/replay";
    let without: Vec<_> = form.iter().copied().filter(|(n, _)| *n != "request").collect();
    assert_eq!(browser.post(path, &without, &[]).await.status, 400, "it has no key");
    for _ in 0..2 {
        let done = browser.post(path, &form, &[]).await;
        assert_eq!(done.status, 303, "{}", done.text);
        let to = done.header("location").to_owned();
        assert!(to.starts_with("/console/dead-letters/a?"), "{to}");
        let next = browser.page(&to).await;
        assert!(next.contains("3 letters were replayed"), "{next}");
    }
    stage.receiver.wait_requests(3).await;
    assert_eq!(stage.receiver.accepted(), [0, 1, 2]);
    assert_eq!(stage.left(), [3]);

    let counted = browser.page("/console/dead-letters/a/purge").await;
    assert!(counted.contains("<strong>1 dead letter</strong>"), "{counted}");
    assert!(counted.contains("for good"), "{counted}");
    let hidden = ["form_key", "request", "as_of", "most"];
    let values = hidden.map(|name| (name, field(&counted, name)));
    let form: Vec<(&str, &str)> = values.iter().map(|(n, v)| (*n, v.as_str())).collect();
    let done = browser.post("/console/dead-letters/a/purge", &form, &[]).await;
    assert_eq!(done.status, 303, "{}", done.text);
    assert_eq!(stage.queue.dead("a").await, 0);
    assert!(browser.page("/console/dead-letters/a").await.contains("There is none."));
    let expected = ["replay_dead a token 3 letters with status 5xx", "purge_dead a token 1 letter"];
    eventually("it is recorded", async || stage.recorded().await == expected).await;
}

async fn a_letters_page_has_its_story_and_an_act_on_one_that_is_gone_does_nothing(queue: Queue) {
    let stage = Stage::with(queue, 2).await;
    let browser = Browser::signed_in(&stage.api, TOKEN).await;
    let looker = Browser::signed_in(&stage.api, READER).await;
    let letters = stage.get("").await["letters"].clone();
    let (first, id) = (letters[0]["key"].as_str().expect("a key"), letters[0]["id"].as_str());
    let path = format!("/console/dead-letters/a/{first}");
    assert!(links(&browser.page("/console/dead-letters/a").await).contains(&path));
    let page = browser.page(&path).await;
    for part in
        ["Attempt 1: answered 500", "the path of a URL", "the 0th of his name", id.expect("an id")]
    {
        assert!(page.contains(part), "{part}: {page}");
    }
    let seen = looker.page(&path).await;
    assert!(!seen.contains("the path of a URL") && !seen.contains("/purge"), "{seen}");

    let purge = format!("/console/dead-letters/a/purge?key={first}");
    assert!(links(&page).contains(&purge), "{page}");
    let asked = browser.page(&purge).await;
    assert!(asked.contains("<strong>1 dead letter</strong>"), "{asked}");
    let hidden = ["form_key", "request", "key", "as_of", "most"];
    let values = hidden.map(|name| (name, field(&asked, name)));
    let form: Vec<(&str, &str)> = values.iter().map(|(n, v)| (*n, v.as_str())).collect();
    stage.setup.ok(&["dead", "purge", "a", id.expect("an id"), "--yes"]);
    let gone = browser.post("/console/dead-letters/a/purge", &form, &[]).await;
    assert!(gone.status == 409 && gone.text.contains("not there any more"), "{}", gone.text);
    for path in [path.as_str(), "/console/dead-letters/a/zz", "/console/dead-letters/nobody/replay"]
    {
        let seen = browser.get(path).await;
        assert!(matches!(seen.status, 400 | 404), "{path}: {}", seen.text);
    }
    let seen = browser.get(&purge).await;
    assert!(seen.status == 404 && seen.text.contains("replayed or purged"), "{}", seen.text);
    let none = browser.page("/console/dead-letters/a/purge?reason=refused").await;
    assert!(
        none.contains("Nothing to purge") && !none.contains("name=\"most\" value=\"1"),
        "{none}"
    );
    assert!(!none.contains("Delete for good"), "{none}");
    assert_eq!(stage.queue.dead("a").await, 1);
    assert!(stage.recorded().await.is_empty());
}

#[test]
fn without_a_token_letters_are_listed_and_nothing_changes_them() {
    run(async {
        let api = Api::new();
        let text = api.section() + ONCE + &subscriber("a", "http://127.0.0.1:9/", "");
        let setup = Setup::new(&Queue::embedded(), &text);
        let _daemon = setup.start().await;
        assert_eq!(api.get("/api/v1/subscribers/a/dead").await.status, 200);
        for path in ["replay", "purge"] {
            let refused = api.post(&format!("/api/v1/subscribers/a/dead/{path}"), "{}").await;
            assert!(
                refused.status == 403 && refused.text.contains("/problems/token"),
                "{refused:?}"
            );
        }
    });
}
