//! Subscribers that get the events of one tenant and no others.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::{
    api::{Answered, Api},
    daemon::{QUICK, Setup, subscriber},
    eventually,
    queue::{Embedded, Section as _},
    receiver::{Receiver, event, status},
    run,
};

const TOKEN: &str = "Bearer quite-secret";

/// The embedded queue with this place of tenants, and a daemon that manages subscribers.
fn setup(queue: &Embedded, api: &Api, place: &str, tables: &str) -> Setup {
    let admin = "token = \"quite-secret\"\nmanage = true\n\
                 [admin.api_subscribers]\nallow_http = true\nallow_addresses = [\"127.0.0.0/8\"]\n";
    let text =
        format!("{}tenant = {place}\n{}{admin}{QUICK}{tables}", queue.section(&[]), api.section());
    Setup::with_text(&text)
}

async fn send(api: &Api, method: &str, path: &str, more: &[(&str, &str)], body: &str) -> Answered {
    let mut headers = vec![("authorization", TOKEN), ("content-type", "application/json")];
    headers.extend(more);
    let mut answered = None;
    // After a start the store is opened while the daemon delivers already.
    eventually("the store is open", async || {
        let answer = api.send(method, path, &headers, body).await;
        let is_open = answer.status != 503;
        answered = Some(answer);
        is_open
    })
    .await;
    answered.expect("an answer")
}

async fn get(api: &Api, path: &str) -> Value {
    let answer = send(api, "GET", path, &[], "").await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

/// Publishes event `n` over HTTP, with this header.
async fn publish(api: &Api, n: u64, tenant: Option<&str>) -> Value {
    let more: Vec<_> = tenant.map(|tenant| ("x-hooktrail-tenant", tenant)).into_iter().collect();
    let answer = send(api, "POST", "/api/v1/events", &more, &event(n)).await;
    assert_eq!(answer.status, 202, "{answer:?}");
    answer.json()
}

/// Waits until each receiver has accepted these events, and asserts that it has no other.
async fn got(receivers: &BTreeMap<&str, Receiver>, expected: &[(&str, &[u64])]) {
    for (name, expected) in expected {
        let all = || {
            let mut all = receivers[name].accepted();
            all.sort_unstable();
            all
        };
        eventually("its events", async || all().len() >= expected.len()).await;
        assert_eq!(all(), *expected, "{name}");
    }
}

async fn receivers<const N: usize>(names: [&'static str; N]) -> BTreeMap<&'static str, Receiver> {
    let mut all = BTreeMap::new();
    for name in names {
        all.insert(name, Receiver::accepting().await);
    }
    all
}

fn table(receivers: &BTreeMap<&str, Receiver>, name: &str, tenant: &str) -> String {
    let tenant = if tenant.is_empty() { String::new() } else { format!("tenant = \"{tenant}\"") };
    subscriber(name, &receivers[name].url, &tenant)
}

#[test]
fn over_http_a_header_says_whose_events_are_and_nobody_else_gets_them() {
    run(async {
        let (queue, api) = (Embedded::new(), Api::new());
        let to = receivers(["a", "b", "all", "made"]).await;
        let tables = table(&to, "a", "A") + &table(&to, "b", "B") + &table(&to, "all", "");
        let setup = setup(&queue, &api, "{ header = \"tenant\" }", &tables);
        let _daemon = setup.start().await;
        publish(&api, 0, Some("A")).await;
        publish(&api, 1, Some("B")).await;
        publish(&api, 2, Some("a")).await;
        publish(&api, 3, None).await;
        got(&to, &[("a", &[0]), ("b", &[1]), ("all", &[0, 1, 2, 3])]).await;
        let twice = [("x-hooktrail-tenant", "A"), ("x-hooktrail-tenant", "B")];
        let long = "x".repeat(256);
        for wrong in [&twice[..], &[("x-hooktrail-tenant", "")], &[("x-hooktrail-tenant", &long)]] {
            let answer = send(&api, "POST", "/api/v1/events", wrong, &event(9)).await;
            let detail = answer.json()["detail"].as_str().unwrap_or_default().to_owned();
            assert!(answer.status == 400 && detail.contains("x-hooktrail-tenant"), "{answer:?}");
        }
        // Made over the API, it gets what comes from then on.
        let made = json!({ "name": "made", "url": to["made"].url, "tenant": "B" }).to_string();
        let answer = send(&api, "POST", "/api/v1/subscribers", &[], &made).await;
        assert_eq!(answer.status, 201, "{answer:?}");
        let version = answer.header("etag").to_owned();
        publish(&api, 4, Some("B")).await;
        publish(&api, 5, Some("A")).await;
        got(&to, &[("made", &[4]), ("b", &[1, 4]), ("a", &[0, 5])]).await;
        for another in [json!({ "tenant": "A" }), json!({ "tenant": null })] {
            let if_match = [("if-match", &*version)];
            let path = "/api/v1/subscribers/made";
            let answer = send(&api, "PATCH", path, &if_match, &another.to_string()).await;
            assert_eq!(answer.json()["field"], "tenant", "{another}: {answer:?}");
        }
        let names = |list: &Value| -> Vec<String> {
            let all = list["subscribers"].as_array().cloned().unwrap_or_default();
            all.iter().map(|s| s["subscriber"].as_str().expect("a name").to_owned()).collect()
        };
        let of_b = get(&api, "/api/v1/subscribers?tenant=B").await;
        assert_eq!(names(&of_b), ["b", "made"]);
        assert!(of_b["subscribers"].as_array().expect("a list").iter().all(|s| s["tenant"] == "B"));
        let first = get(&api, "/api/v1/subscribers?limit=3").await;
        assert_eq!(
            (names(&first), &first["next"]),
            (vec!["a".into(), "all".into(), "b".into()], &json!("b"))
        );
        let rest = get(&api, "/api/v1/subscribers?limit=3&after=b").await;
        assert_eq!((names(&rest), &rest["next"]), (vec!["made".into()], &Value::Null));
        assert_eq!(names(&get(&api, "/api/v1/subscribers?state=paused").await), [""; 0]);
        for wrong in ["state=odd", "tenant=", "limit=0"] {
            let path = format!("/api/v1/subscribers?{wrong}");
            let answer = api.send("GET", &path, &[("authorization", TOKEN)], "");
            assert_eq!(answer.await.status, 400, "{wrong}");
        }
        // History knows it too.
        let events = |list: &Value| list["events"].as_array().cloned().unwrap_or_default();
        eventually("history has all", async || {
            events(&get(&api, "/api/v1/events").await).len() == 6
        })
        .await;
        let of_a = events(&get(&api, "/api/v1/events?tenant=A").await);
        assert!(of_a.len() == 2 && of_a.iter().all(|e| e["tenant"] == "A"), "{of_a:?}");
        let of_none = events(&get(&api, "/api/v1/events").await);
        assert_eq!(of_none.iter().filter(|e| e["tenant"].is_null()).count(), 1);
        let path = format!("/api/v1/events/{}", of_a[0]["number"]);
        let state = async |name: &str| {
            let went = get(&api, &path).await["where"].as_array().cloned().unwrap_or_default();
            let one = went.iter().find(|one| one["subscriber"] == name).expect("is listed");
            (one["state"].clone(), one["tenant"].clone())
        };
        eventually("its delivery is recorded", async || state("a").await.0 == "delivered").await;
        assert_eq!(state("a").await.1, Value::Null);
        assert_eq!(state("b").await, (json!("not_matched"), json!("B")));
        let listed = setup.ok(&["history", "--tenant", "B", "--csv"]);
        assert_eq!(
            listed.lines().skip(1).filter(|line| line.ends_with(",B")).count(),
            2,
            "{listed}"
        );
        assert_eq!(listed.lines().count(), 3, "{listed}");
        let replay = json!({ "since": "2020-01-01T00:00:00Z" }).to_string();
        let answer = send(&api, "POST", "/api/v1/subscribers/made/replay", &[], &replay).await;
        assert!(answer.status < 300, "{answer:?}");
        eventually("what it has missed", async || to["made"].accepted().len() >= 3).await;
        let mut replayed = to["made"].accepted();
        replayed.sort_unstable();
        assert_eq!(replayed, [1, 4, 4], "a replay has its tenant's alone");
    });
}

#[test]
fn the_tenant_of_an_event_is_read_from_it_and_what_is_published_from_files_has_one() {
    run(async {
        let (queue, api) = (Embedded::new(), Api::new());
        let to = receivers(["a", "all"]).await;
        let tables = table(&to, "a", "42") + &table(&to, "all", "");
        let place = "{ pointer = \"/account/id\" }";
        let of_event = setup(&queue, &api, place, &tables);
        let mut daemon = of_event.start().await;
        let with = |n: u64, json: &str| {
            event(n).replacen('{', &format!("{{\"account\":{{\"id\":{json}}},"), 1)
        };
        let lines =
            [with(0, "42"), with(1, "\"42\""), with(2, "\"042\""), with(3, "42.0"), event(4)];
        let file = of_event.write("events.jsonl", lines.join("\n"));
        let file = file.to_str().expect("a path");
        of_event.ok(&["publish", file]);
        let answer = send(&api, "POST", "/api/v1/events", &[], &with(5, "{\"x\":42}")).await;
        assert_eq!(answer.status, 202, "{answer:?}");
        got(&to, &[("a", &[0, 1]), ("all", &[0, 1, 2, 3, 4, 5])]).await;
        let beside = [("x-hooktrail-tenant", "42")];
        let answer = send(&api, "POST", "/api/v1/events", &beside, &event(9)).await;
        assert!(answer.status == 400 && answer.text.contains("/account/id"), "{answer:?}");
        let refused = of_event.run(&["publish", "--tenant", "42", file]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            refused.status.code() == Some(2) && said.contains("each event's own `/account/id`"),
            "{said}"
        );
        assert!(daemon.is_running());
        daemon.stop().await;
        // The same queue with a header: what is stored keeps the tenant that it has.
        let of_header = setup(&queue, &api, "{ header = \"t\" }", &tables);
        let _daemon = of_header.start().await;
        let more = of_header.write("more.jsonl", [event(6), with(7, "\"42\"")].join("\n"));
        of_header.ok(&["publish", "--tenant", "42", more.to_str().expect("a path")]);
        let rest = of_header.write("rest.jsonl", with(8, "\"42\""));
        of_header.ok(&["publish", rest.to_str().expect("a path")]);
        got(&to, &[("a", &[0, 1, 6, 7]), ("all", &[0, 1, 2, 3, 4, 5, 6, 7, 8])]).await;
    });
}

#[test]
fn a_name_with_another_tenant_gets_nothing_until_it_has_its_own_again() {
    run(async {
        let (queue, api) = (Embedded::new(), Api::new());
        let mut to = receivers(["all"]).await;
        to.insert("a", Receiver::start(|_, _| status(503)).await);
        let place = "{ header = \"tenant\" }";
        let of = |tenant: &str| table(&to, "a", tenant) + &table(&to, "all", "");
        let first = setup(&queue, &api, place, &of("A"));
        let daemon = first.start().await;
        publish(&api, 0, Some("A")).await;
        eventually("an attempt", async || !to["a"].requests().is_empty()).await;
        // A reload that changes it changes nothing.
        let text = std::fs::read_to_string(first.config()).expect("reads");
        first.write("hooktrail.toml", text.replace("tenant = \"A\"", "tenant = \"B\""));
        let reload = first.run(&["reload"]);
        let said = String::from_utf8_lossy(&reload.stderr).into_owned()
            + &String::from_utf8_lossy(&reload.stdout);
        assert!(!reload.status.success() && said.contains("a name keeps its tenant"), "{said}");
        daemon.stop().await;
        let tried = to["a"].requests().len();
        // A start with it goes on for all others.
        let other = setup(&queue, &api, place, &of("B"));
        let daemon = other.start().await;
        daemon.wait_log("configured with the tenant `B`").await;
        publish(&api, 1, Some("B")).await;
        got(&to, &[("all", &[0, 1])]).await;
        let answer = get(&api, "/api/v1/subscribers?state=queue_fails").await;
        assert_eq!(answer["subscribers"][0]["subscriber"], "a", "{answer}");
        assert_eq!(to["a"].requests().len(), tried, "nothing of A goes on, nor of B");
        daemon.stop().await;
        let again = setup(&queue, &api, place, &of("A"));
        let _daemon = again.start().await;
        eventually("its retry", async || to["a"].requests().len() > tried).await;
        assert_eq!(to["a"].requests()[tried].numbers(), [0]);
    });
}

/// The number of tenants; docs/guarantees.md has the figures of 10,000.
fn many() -> u64 {
    std::env::var("HOOKTRAIL_TENANTS").map_or(1000, |n| n.parse().expect("a number"))
}

#[test]
fn each_of_many_tenants_gets_exactly_its_ten_events() {
    run(async {
        let (queue, api, many) = (Embedded::new(), Api::new(), many());
        let sink = Receiver::accepting().await;
        let place = "{ pointer = \"/resource/type\" }";
        let table = |n: u64| {
            let more = format!("tenant = \"t{n}\"\nheaders = {{ X-Of = \"t{n}\" }}");
            subscriber(&format!("t{n}"), &sink.url, &more)
        };
        let setup = setup(&queue, &api, place, &(0..many).map(table).collect::<String>());
        let _daemon = setup.start().await;
        // Event n is of tenant n modulo their number.
        let of_tenant = |n: u64| {
            let tenant = format!("\"type\":\"t{}\",\"name\":\"John", n % many);
            event(n).replacen("\"type\":\"user\",\"name\":\"John", &tenant, 1)
        };
        let all: Vec<String> = (0..many * 10).map(of_tenant).collect();
        for some in all.chunks(5000) {
            let body = format!("{{\"events\":[{}]}}", some.join(","));
            let answer = send(&api, "POST", "/api/v1/events", &[], &body).await;
            let expected = format!("{{\"accepted\":{},\"unmatched\":0}}", some.len());
            assert_eq!((answer.status, answer.text.trim()), (202, &*expected));
        }
        sink.wait_all(many * 10).await;
        let mut each: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for request in sink.requests() {
            each.entry(request.header("x-of").to_owned()).or_default().extend(request.numbers());
        }
        assert_eq!(each.len() as u64, many);
        for n in 0..many {
            let expected: Vec<u64> = (0..10).map(|k| n + k * many).collect();
            assert_eq!(each[&format!("t{n}")], expected, "of tenant {n}");
        }
    });
}
