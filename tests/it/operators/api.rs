//! The admin API: refusals, and who may do what.

use std::process::Command;

use serde_json::Value;

use crate::{
    receivers::verifiers::{repository, verifiers},
    support::{
        api::{Answered, Api},
        daemon::{QUICK, Setup, subscriber},
        queue::Queue,
        receiver::{Receiver, Request, status},
        run, tests_that_need,
    },
};

tests_that_need!(tools: whatever_a_client_sends_the_answer_is_one_that_the_document_describes);

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
            ("/api/v1/subscribers/a/pause", "[\"why\"]", 400, "field", ""),
            ("/api/v1/subscribers/a/retry", "null", 400, "field", ""),
            ("/api/v1/subscribers/a/retry", "{\"ids\":null}", 400, "field", "ids"),
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
        let large = "x".repeat(5000);
        problem(&api.post("/api/v1/subscribers/a/pause", &large).await, 413, "blank");
        let large = "x".repeat(13 * 1024 * 1024);
        problem(&api.post("/api/v1/events", &large).await, 413, "blank");
        setup.write("hooktrail.toml", "nonsense");
        problem(&api.get("/api/v1/reload").await, 422, "configuration");
        problem(&api.post("/api/v1/reload", "{}").await, 422, "configuration");
    });
}

/// Tokens of three roles, and [admin] token.
const TOKENS: &str = "token = \"quite-secret\"\n\
    [[admin.tokens]]\nname = \"eye\"\ntoken = \"eye-secret\"\nrole = \"read\"\n\
    [[admin.tokens]]\nname = \"app\"\ntoken = \"app-secret\"\nrole = \"intake\"\n\
    [[admin.tokens]]\nname = \"ops\"\ntoken = \"ops-secret\"\nrole = \"admin\"\n";

#[test]
fn each_role_may_do_what_it_is_for_and_nothing_else() {
    run(async {
        let api = Api::new();
        let setup = setup(&api, TOKENS);
        let daemon = setup.start().await;
        let reads = [
            "/api/v1/daemon",
            "/api/v1/subscribers",
            "/api/v1/subscribers/a",
            "/api/v1/subscribers/a/dead",
            "/api/v1/subscribers/a/retry",
            "/api/v1/reload",
        ];
        let event = ("/api/v1/events", "{\"event\":\"x.y\"}");
        let changes = ["pause", "resume", "retry", "test"]
            .map(|what| format!("/api/v1/subscribers/a/{what}"))
            .into_iter()
            .chain(["/api/v1/reload".to_owned()]);
        let mut requests: Vec<(&str, String, &str, &str)> =
            changes.map(|path| ("POST", path, "{}", "admin")).collect();
        requests.extend(reads.map(|path| ("GET", path.to_owned(), "", "read")));
        requests.push(("POST", event.0.to_owned(), event.1, "intake"));
        for (method, path, body, needed) in requests {
            for (token, name, role) in [
                ("quite-secret", "token", "admin"),
                ("ops-secret", "ops", "admin"),
                ("eye-secret", "eye", "read"),
                ("app-secret", "app", "intake"),
            ] {
                let given = format!("Bearer {token}");
                let answer =
                    api.send(method, &path, &[JSON, ("authorization", &given)], body).await;
                if role == "admin" || role == needed {
                    assert!((200..300).contains(&answer.status), "{name} {path}: {answer:?}");
                } else {
                    let detail = problem(&answer, 403, "role")["detail"].to_string();
                    for part in [
                        format!("the token `{name}` has the role `{role}`"),
                        format!("one of role `{needed}`"),
                    ] {
                        assert!(detail.contains(&part), "{detail}");
                    }
                }
            }
            for given in ["", "Bearer quite", "Bearer quite-secret-", "Basic quite-secret"] {
                let headers = [JSON, ("authorization", given)];
                problem(&api.send(method, &path, &headers, body).await, 401, "token");
            }
        }
        assert!(!daemon.log().contains("without a token the API"), "{}", daemon.log());
    });
}

#[test]
fn what_a_token_of_role_read_sees_has_no_path_header_or_password_of_an_endpoint() {
    run(async {
        let api = Api::new();
        let more = "auth = { bearer = \"hunter2-bearer\" }\nheaders = { X-Key = \"hunter2-key\" }\n\
            http = { allow_http = true, allow_private_addresses = true }\nretry = { max_attempts = 1 }";
        let subscriber = subscriber("a", "http://127.0.0.1:9/hunter2-path?k=hunter2-query", more);
        let setup = Setup::new(&Queue::embedded(), &(api.section() + TOKENS + &subscriber));
        let _daemon = setup.start().await;
        let admin = [JSON, ("authorization", "Bearer quite-secret")];
        api.send("POST", "/api/v1/events", &admin, "{\"event\":\"x.y\"}").await;
        let read = [("authorization", "Bearer eye-secret")];
        let mut dead = Value::Null;
        crate::support::eventually("a dead letter", async || {
            dead = api.send("GET", "/api/v1/subscribers/a/dead", &read, "").await.json();
            dead["dead"] == 1
        })
        .await;
        // A changed URL: what a reload would do is shown without it.
        let text = std::fs::read_to_string(setup.config()).expect("text");
        setup.write("hooktrail.toml", text.replace("hunter2-path", "hunter2-other"));
        for path in [
            "subscribers",
            "subscribers/a",
            "subscribers/a/dead",
            "subscribers/a/retry",
            "reload",
            "daemon",
        ] {
            let answer = api.send("GET", &format!("/api/v1/{path}"), &read, "").await;
            assert!(answer.status == 200 && !answer.text.contains("hunter2"), "{answer:?}");
        }
    });
}

#[test]
fn a_daemon_without_a_token_logs_once_what_is_off_and_how_to_get_one() {
    run(async {
        let api = Api::new();
        let setup = setup(&api, "");
        let daemon = setup.start().await;
        let log = daemon.log();
        let lines: Vec<&str> =
            log.lines().filter(|line| line.contains("without a token the API")).collect();
        assert!(
            lines.len() == 1
                && lines[0].contains("INFO")
                && lines[0].contains("hooktrail init")
                && lines[0].contains("[admin] token"),
            "{log}"
        );
    });
}

/// Sends requests that docs/admin.yaml allows, and others, to a daemon. The error says which answers
/// the document does not describe. The requests are the same in each run.
fn examine(api: &Api, token: Option<&str>) -> Result<(), String> {
    let folder = tempfile::tempdir().expect("a directory");
    let mut command = Command::new(verifiers().join("python/bin/schemathesis"));
    let config = repository().join("tests/verifiers/schemathesis.toml");
    let mut config = std::fs::read_to_string(config).expect("text");
    // As the scheme of the document, so that it also leaves it out.
    config.extend(token.map(|token| format!("\n[auth.openapi.token]\nbearer = \"{token}\"\n")));
    let file = folder.path().join("schemathesis.toml");
    std::fs::write(&file, config).expect("writes");
    command
        .arg("--config-file")
        .arg(file)
        .arg("run")
        .arg(repository().join("docs/admin.yaml"))
        .args(["--url", &format!("http://127.0.0.1:{}", api.port)])
        .args(["--phases", "examples,coverage,fuzzing"])
        .args(["--seed", "1", "--max-examples", "40", "--continue-on-failure", "--no-color"])
        .args(["--request-timeout", "60", "--suppress-health-check", "all"])
        // It stores examples there.
        .current_dir(folder.path());
    if token.is_none() {
        // A daemon without tokens answers 403 where one is needed: none would be valid.
        command.args(["--exclude-checks", "missing_required_header"]);
    }
    let output = command.output().expect("it runs");
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |name: &str| -> Option<u32> {
        let rest = printed.split(name).nth(1)?.trim_start();
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    assert!(
        number("Tested:") >= Some(15) && number("Test cases:") >= Some(500),
        "it tested next to nothing: {printed}"
    );
    if output.status.success() { Ok(()) } else { Err(printed) }
}

fn whatever_a_client_sends_the_answer_is_one_that_the_document_describes() {
    run(async {
        // It refuses events and fails, so that there are dead letters and retries to list.
        let receiver = Receiver::start(|request: &Request, _| {
            status(if request.body.len().is_multiple_of(2) { 422 } else { 503 })
        })
        .await;
        for token in [None, Some("quite-secret")] {
            let api = Api::new();
            let tokens = if token.is_some() { TOKENS } else { "" };
            let siem = subscriber("siem", &receiver.url, "retry = { max_attempts = 2 }");
            let setup = Setup::new(&Queue::embedded(), &(api.section() + tokens + QUICK + &siem));
            let mut daemon = setup.start().await;
            let examined = tokio::task::block_in_place(|| examine(&api, token));
            assert!(daemon.is_running(), "{}", daemon.log());
            if let Err(printed) = examined {
                panic!("with the token {token:?}: {printed}");
            }
        }
    });
}
