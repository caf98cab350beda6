//! The admin API: refusals, and who may do what.

use serde_json::Value;

use crate::support::{
    api::{Answered, Api},
    daemon::{Setup, subscriber},
    queue::Queue,
    run,
};

const JSON: (&str, &str) = ("content-type", "application/json");

/// An embedded queue and the subscriber `a`, whose receiver does not exist; `admin` is more of
/// `[admin]`.
fn setup(api: &Api, admin: &str) -> Setup {
    let http = "http = { allow_http = true, allow_private_addresses = true }";
    let text = api.section() + admin + &subscriber("a", "http://127.0.0.1:9/", http);
    Setup::new(&Queue::embedded(), &text)
}

/// The problem of an answer that must be one, with this status and the end of its type.
#[track_caller]
fn problem(answer: &Answered, status: u16, kind: &str) -> Value {
    assert!(
        answer.status == status && answer.content_type == "application/problem+json",
        "{status}: {answer:?}"
    );
    let problem = answer.json();
    let uri = problem["type"].as_str().expect("a type");
    assert!(uri.ends_with(kind) && problem["status"] == status, "{status} {kind}: {problem}");
    assert!(
        ["title", "detail"].iter().all(|m| problem[m].as_str().is_some_and(|t| !t.is_empty())),
        "{problem}"
    );
    problem
}

#[test]
fn each_refusal_is_a_problem_of_rfc_9457_that_names_the_field_at_fault() {
    run(async {
        let api = Api::new();
        let setup = setup(&api, "");
        let _daemon = setup.start().await;
        for (path, status, kind, field) in [
            ("/nothing", 404, "blank", ""),
            ("/api/v1/nothing", 404, "blank", ""),
            ("/api/v1/subscribers/nobody", 404, "subscriber", ""),
            ("/api/v1/subscribers/%FF", 400, "field", "name"),
            ("/api/v1/subscribers?page=1", 400, "field", "page"),
            ("/api/v1/subscribers/a?x", 400, "field", "x"),
            ("/api/v1/reload?x=1", 400, "field", "x"),
            ("/api/v1/subscribers/a/dead?limit=many", 400, "field", "limit"),
            ("/api/v1/subscribers/a/dead?limit=101", 400, "field", "limit"),
            ("/api/v1/subscribers/a/dead?cursor=garbage", 400, "field", "cursor"),
            ("/api/v1/subscribers/a/retry?limit=-1", 400, "field", "limit"),
            ("/api/v1/subscribers/a/retry?limit=1&limit=1", 400, "field", "limit"),
        ] {
            let problem = problem(&api.get(path).await, status, kind);
            assert_eq!(problem["field"].as_str().unwrap_or_default(), field, "{path}: {problem}");
            assert_eq!(problem["errors"][0]["field"], problem["field"], "{problem}");
        }
        for (path, body, status, kind, field) in [
            ("/api/v1/subscribers/a/pause", "[", 400, "field", ""),
            ("/api/v1/subscribers/a/pause", "{\"why\":7}", 400, "field", "why"),
            ("/api/v1/subscribers/a/pause", "{\"why\":\"x\",\"who\":1}", 400, "field", "who"),
            ("/api/v1/subscribers/a/retry", "{\"ids\":7}", 400, "field", "ids"),
            (
                "/api/v1/subscribers/a/retry",
                "{\"ids\":[],\"try_only\":true}",
                400,
                "field",
                "try_only",
            ),
            ("/api/v1/subscribers/nobody/pause", "{}", 404, "subscriber", ""),
            ("/api/v1/events", "{\"events\":7}", 400, "field", "events"),
            ("/api/v1/events", "{\"event\":7}", 400, "events", ""),
            ("/api/v1/events", "7", 400, "blank", ""),
            ("/api/v1/daemon", "{}", 405, "blank", ""),
            ("/healthz", "{}", 405, "blank", ""),
        ] {
            let problem = problem(&api.post(path, body).await, status, kind);
            assert_eq!(problem["field"].as_str().unwrap_or_default(), field, "{path}: {problem}");
        }
        let events = api.post("/api/v1/events", r#"{"events":[{"event":"a"},7]}"#).await.json();
        assert!(events["invalid"] == 1 && events["events"][0]["index"] == 1, "{events}");
        for path in ["/api/v1/events", "/api/v1/reload"] {
            let text = [("content-type", "text/plain")];
            problem(&api.send("POST", path, &text, "{}").await, 415, "blank");
            let elsewhere = [JSON, ("origin", "http://evil.example")];
            problem(&api.send("POST", path, &elsewhere, "{}").await, 403, "origin");
        }
        let large = "x".repeat(13 * 1024 * 1024);
        problem(&api.post("/api/v1/events", &large).await, 413, "blank");
        setup.write("hooktrail.toml", "nonsense");
        problem(&api.get("/api/v1/reload").await, 422, "configuration");
        problem(&api.post("/api/v1/reload", "{}").await, 422, "configuration");
    });
}
