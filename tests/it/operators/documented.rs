//! Requests that bring each documented answer about managing subscribers and their dead letters.

use serde_json::json;

use crate::support::{
    api::{Answered, Api},
    daemon::{QUICK, Setup, subscriber},
    eventually,
    queue::Queue,
    receiver::{Receiver, event, status},
};

const TOKEN: (&str, &str) = ("authorization", "Bearer t");
const JSON: (&str, &str) = ("content-type", "application/json");
const EVIL: (&str, &str) = ("origin", "http://evil.example");

/// Asks a daemon of its own for all of it.
pub(super) async fn ask_to_manage(api: &Api) {
    let queue = Queue::embedded();
    let failing = Receiver::start(|_, _| status(500)).await;
    let text = QUICK.to_owned()
        + &api.section()
        + "token = \"t\"\nmanage = true\n"
        + &subscriber("a", &failing.url, "retry = { max_attempts = 1 }");
    let setup = Setup::new(&queue, &text);
    let _daemon = setup.start().await;
    queue.publish("a.b", [event(0)]).await;
    let dead = async || api.send("GET", "/api/v1/subscribers/a/dead", &[TOKEN], "").await.json();
    eventually("a dead letter", async || dead().await["dead"] == 1).await;
    let key = dead().await["letters"][0]["key"].as_str().expect("a key").to_owned();
    one_letter(api, &format!("/api/v1/subscribers/a/dead/{key}")).await;
    for (act, valid) in [("replay", r#"{"reason":"refused"}"#), ("purge", "{}")] {
        let path = format!("/api/v1/subscribers/a/dead/{act}");
        refusals(api, &path, Some("/api/v1/subscribers/nobody/dead")).await;
        let keyed = async |body: &str| {
            api.send("POST", &path, &[TOKEN, JSON, ("idempotency-key", act)], body).await
        };
        expect(&keyed(valid).await, 200, &path);
        expect(&keyed(r#"{"reason":"expired"}"#).await, 422, &path);
    }
    let post = async |path: &str, body: &str| api.send("POST", path, &[TOKEN, JSON], body).await;
    let all = "/api/v1/subscribers";
    refusals(api, all, None).await;
    let made = json!({ "name": "made", "url": "https://made.example/" }).to_string();
    // The store is opened while the daemon delivers already.
    eventually("the store is open", async || post(all, &made).await.status == 201).await;
    expect(&post(all, &made).await, 409, all);
    let unsigned = json!({ "name": "unsigned", "url": "https://a.example/", "signatures": [] });
    expect(&post(all, &unsigned.to_string()).await, 201, all);
    let rotate = "/api/v1/subscribers/made/rotate-secret";
    refusals(api, rotate, Some("/api/v1/subscribers/nobody/rotate-secret")).await;
    expect(&post(rotate, "{}").await, 200, rotate);
    expect(&post("/api/v1/subscribers/unsigned/rotate-secret", "{}").await, 409, rotate);
}

#[track_caller]
fn expect(answer: &Answered, status: u16, path: &str) {
    assert_eq!(answer.status, status, "{path}: {answer:?}");
}

async fn one_letter(api: &Api, path: &str) {
    let none = "/api/v1/subscribers/a/dead/00000000000000000000000000000000";
    let unknown = format!("{path}?limit=1");
    for (path, headers, status) in [
        (path, &[TOKEN][..], 200),
        (path, &[], 401),
        (path, &[TOKEN, ("sec-fetch-site", "cross-site")], 403),
        (none, &[TOKEN], 404),
        (unknown.as_str(), &[TOKEN], 400),
    ] {
        expect(&api.send("GET", path, headers, "").await, status, path);
    }
}

/// What each request that changes something is refused for; `nobody` is its path without a subscriber.
async fn refusals(api: &Api, path: &str, nobody: Option<&str>) {
    let long = "x".repeat(2 << 20);
    for (headers, body, status) in [
        (&[JSON][..], "{}", 401),
        (&[TOKEN, JSON, EVIL], "{}", 403),
        (&[TOKEN, ("content-type", "text/plain")], "{}", 415),
        (&[TOKEN, JSON], "[", 400),
        (&[TOKEN, JSON], &long, 413),
    ] {
        expect(&api.send("POST", path, headers, body).await, status, path);
    }
    if let Some(nobody) = nobody {
        let end = path.rsplit('/').next().expect("an end");
        let nobody =
            if nobody.ends_with(end) { nobody.to_owned() } else { format!("{nobody}/{end}") };
        expect(&api.send("POST", &nobody, &[TOKEN, JSON], "{}").await, 404, &nobody);
    }
}
