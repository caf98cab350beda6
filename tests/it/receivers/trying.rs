//! `test` and `listen`, which need no queue and no daemon.

use std::{
    process::{Child, Command, Stdio},
    thread::JoinHandle,
};

use hooktrail::crypto::{
    secret::Secret,
    signature::{Scheme, Signer},
};
use serde_json::{Value, json};

use crate::support::{
    broker::kill,
    daemon::{QUICK, SECRET, Setup, subscriber},
    eventually, free_port,
    queue::Queue,
    receiver::{Answer, Receiver, status},
    run,
    tls::{Authority, TlsReceiver},
};

type MakeAnswer = fn() -> Answer;

/// A configuration with a broker that is not needed.
fn setup(rest: &str) -> Setup {
    Setup::with_text(&format!("[queue]\nurl = \"amqp://127.0.0.1:{}\"\n{QUICK}{rest}", free_port()))
}

fn as_json(setup: &Setup, code: i32) -> Value {
    let output = setup.run(&["test", "a", "--json"]);
    assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("a JSON object")
}

#[test]
fn a_test_event_is_signed_sent_and_shown_without_secrets() {
    run(async {
        let receiver = Receiver::start(|_, _| status(202).body("thank\u{1b}[2J you")).await;
        let more =
            "auth = { bearer = \"hunter2\" }\nheaders = { X-Key = \"hunter2\" }\nevent_ids = true";
        let url = receiver.url.replace("http://", "http://jane:hunter2@")
            + "/4fd6f2a1b0c94e3c8d77?key=hunter2";
        let more = more.replace("auth = { bearer = \"hunter2\" }\n", "");
        let setup_with_all = setup(&subscriber("a", &url, &more));
        let shown = setup_with_all.ok(&["test", "a"]);
        assert!(shown.contains(&format!("POST {}/[redacted]\n", receiver.url)), "{shown}");
        assert!(
            !shown.contains("hunter2")
                && !shown.contains("4fd6f2a1b0c94e3c8d77")
                && !shown.contains("jane"),
            "{shown}"
        );
        receiver.wait_requests(1).await;

        let more =
            "auth = { bearer = \"hunter2\" }\nheaders = { X-Key = \"hunter2\" }\nevent_ids = true";
        let setup = setup(&subscriber("a", &receiver.url, more));
        let shown = setup.ok(&["test", "a"]);
        let request = receiver.wait_requests(2).await.remove(1);
        assert!(request.verified() && request.attempt() == 1, "{request:?}");
        assert_eq!(
            (request.header("authorization"), request.header("x-key")),
            ("Bearer hunter2", "hunter2")
        );
        let event = request.events().remove(0);
        assert_eq!(
            (&event["event"], &event["actor"]["name"]),
            (&json!("hooktrail.test"), &json!("hooktrail"))
        );
        assert!(event["event_id"].as_str().is_some_and(|id| id.starts_with("evt_")), "{event}");
        for part in [
            &receiver.url,
            request.id(),
            request.header("webhook-signature"),
            "authorization: [redacted]",
            "x-key: [redacted]",
            &String::from_utf8_lossy(&request.body),
            "answer:  202  thank [2J you",
            "outcome: delivered",
            "user-agent: hooktrail/",
        ] {
            assert!(shown.contains(part), "{part:?} is not in {shown}");
        }
        assert!(!shown.contains("hunter2") && !shown.contains('\u{1b}'), "{shown}");
    });
}

#[test]
fn the_outcome_is_what_the_daemon_would_make_of_the_answer() {
    run(async {
        let receiver = Receiver::accepting().await;
        let plain = setup(&subscriber("a", &receiver.url, ""));
        let last = setup(&subscriber("a", &receiver.url, "retry = { max_attempts = 1 }"));
        let pausing = setup(&subscriber(
            "a",
            &receiver.url,
            "retry = { max_attempts = 1, on_exhausted = \"pause\" }",
        ));
        let only_200 = setup(&subscriber("a", &receiver.url, "http.success = \"200\""));
        let cases: [(&Setup, MakeAnswer, &str, &str); 11] = [
            (&plain, || status(200), "delivered", "delivered"),
            (
                &only_200,
                || status(204),
                "retry",
                "the same batch again after about 1s, at most 16 attempts in all",
            ),
            (
                &plain,
                || status(302).header("location", "http://127.0.0.1/"),
                "retry",
                "again after about 1s",
            ),
            (&plain, || status(503), "retry", "again after about 1s"),
            (
                &plain,
                || status(429).header("retry-after", "90"),
                "retry",
                "again after about 1m 30s, at most 16 attempts in all; Retry-After: nothing else would be sent to it for 1m 30s",
            ),
            (&plain, || status(410), "paused", "until `hooktrail resume`"),
            (&plain, || status(413), "too_large", "reason `too_large`"),
            (&plain, || status(400), "refused", "reason `refused`"),
            (&plain, || status(422).body("no"), "refused", "again after about 1s"),
            (&last, || status(500), "dead_letter", "reason `exhausted`"),
            (&pausing, || status(500), "paused", "on_exhausted is \"pause\""),
        ];
        for (setup, answer, outcome, part) in cases {
            receiver.now(move |_, _| answer());
            let found = as_json(setup, i32::from(outcome != "delivered"));
            assert_eq!(
                (&found["outcome"], &found["status"]),
                (&json!(outcome), &json!(answer().status)),
                "{found}"
            );
            assert!(found["verdict"].as_str().expect("a text").contains(part), "{part}: {found}");
        }
        let count = receiver.count();
        assert_eq!(count, cases.len(), "one request each");
    });
}

#[test]
fn what_keeps_a_test_event_from_arriving_is_told() {
    run(async {
        let authority = Authority::new();
        let stranger =
            TlsReceiver::start(authority.server(&authority.sign("127.0.0.1"), false), &["h2"])
                .await;
        let receiver = Receiver::accepting().await;
        let named = receiver.url.replace("127.0.0.1", "localhost");
        for (url, more, failure, error) in [
            (format!("https://127.0.0.1:{}/", stranger.port), "", "tls", "UnknownIssuer"),
            (format!("http://127.0.0.1:{}/", free_port()), "", "connect", "refused"),
            ("http://nobody.invalid/".to_owned(), "", "dns", ""),
            (named, "http = { allow_private_addresses = false }", "address_blocked", "loopback"),
        ] {
            let found = as_json(&setup(&subscriber("a", &url, more)), 1);
            assert_eq!(
                (&found["failure"], &found["outcome"], &found["status"]),
                (&json!(failure), &json!("retry"), &Value::Null),
                "{found}"
            );
            assert!(found["error"].as_str().expect("a text").contains(error), "{found}");
        }
        assert_eq!(receiver.count(), 0);
        let unknown = setup("").run(&["test", "nobody"]);
        assert_eq!(unknown.status.code(), Some(2));
    });
}

/// `listen` as a process.
pub(super) struct Listen(Child, pub(super) String, Option<JoinHandle<String>>);

impl Listen {
    pub(super) async fn start(arguments: &[&str]) -> Self {
        let port = free_port();
        let url = format!("127.0.0.1:{port}");
        let mut child = Command::new(env!("CARGO_BIN_EXE_hooktrail"))
            .args(["listen", "--json", "--addr", &url])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("hooktrail runs");
        // It waits for who reads what it prints.
        let output = child.stdout.take().expect("piped");
        let printed = std::thread::spawn(|| std::io::read_to_string(output).expect("text"));
        let listen = Self(child, format!("http://{url}/"), Some(printed));
        eventually("it listens", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        listen
    }

    /// Ends it; what it printed.
    pub(super) fn lines(mut self) -> Vec<Value> {
        kill("-TERM", self.0.id());
        self.0.wait().expect("ends");
        let printed = self.2.take().expect("read once");
        let output = printed.join().expect("no panic");
        output.lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect()
    }
}

impl Drop for Listen {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn listen_says_why_a_request_is_not_verified() {
    run(async {
        let listen = Listen::start(&["--secret", SECRET]).await;
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .expect("after 1970")
            .as_secs();
        let body = r#"{"events":[{"event":"a"}]}"#;
        let other = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
        let client = reqwest::Client::new();
        for (secret, at, sent, change) in [
            (SECRET, now, body, ""),
            (other, now, body, ""),
            (SECRET, now, r#"{"events":[{"event":"b"}]}"#, ""),
            (SECRET, now - 3600, body, ""),
            (SECRET, now + 3600, body, ""),
            (SECRET, now, body, "webhook-signature"),
            (SECRET, now, body, "webhook-timestamp"),
        ] {
            let signer = Signer::try_new(vec![Scheme::StandardWebhooks], &[Secret::new(secret)])
                .expect("a signer");
            let mut request =
                client.post(&listen.1).header("content-type", "application/json").body(sent);
            for (name, value) in signer.headers("msg_1", at, body.as_bytes()) {
                request = request
                    .header(&name, if name == change { "nonsense".to_owned() } else { value });
            }
            let answer = request.send().await.expect("an answer").status().as_u16();
            let right = secret == SECRET && at == now && sent == body && change.is_empty();
            assert_eq!(answer, if right { 200 } else { 401 });
        }
        let reported: Vec<String> = listen
            .lines()
            .iter()
            .map(|l| l["unverified_because"].as_str().unwrap_or("verified").to_owned())
            .collect();
        let parts = [
            "verified",
            "another secret, or a changed body",
            "another secret, or a changed body",
            "older than 300 s",
            "more than 300 s ahead",
            "not the form `v1,",
            "not a number of seconds",
        ];
        assert_eq!(reported.len(), parts.len());
        for (reported, part) in reported.iter().zip(parts) {
            assert!(reported.contains(part), "{part}: {reported}");
        }
    });
}

#[test]
fn listen_answers_as_its_options_say() {
    run(async {
        for (arguments, statuses) in [
            (&["--status", "418"][..], &[418_u64, 418, 418][..]),
            (&["--fail-first", "2"], &[503, 503, 200]),
            (&["--fail-rate", "1"], &[503, 503, 503]),
            (&["--fail-rate", "0", "--delay", "0.3"], &[200, 200, 200]),
            (&["--refuse", "hooktrail.*", "--retry-after", "90", "--header", "x-a=b"], &[422, 422]),
            (&["--refuse", "other.*"], &[200]),
        ] {
            let listen = Listen::start(arguments).await;
            let setup = setup(&subscriber("a", &listen.1, ""));
            for status in statuses {
                let found = as_json(&setup, i32::from(*status != 200));
                assert_eq!(found["status"], *status, "{arguments:?}");
                assert!(
                    !arguments.contains(&"--delay")
                        || found["duration_ms"].as_u64().is_some_and(|ms| ms >= 300),
                    "{found}"
                );
            }
            let printed = listen.lines();
            assert_eq!(
                printed.iter().map(|l| l["status"].as_u64().expect("a status")).collect::<Vec<_>>(),
                statuses
            );
        }
    });
}

#[test]
fn listen_adds_what_its_options_say_and_sums_up_when_it_is_quiet() {
    run(async {
        let arguments = [
            "--quiet",
            "--status",
            "503",
            "--retry-after",
            "2500ms",
            "--header",
            "x-a=b",
            "--header",
            "x-a=c",
        ];
        let listen = Listen::start(&arguments).await;
        let client = reqwest::Client::new();
        for _ in 0..2 {
            let request = client
                .post(&listen.1)
                .header("content-type", "application/json")
                .header("webhook-id", "msg_1");
            let answer = request
                .body(r#"{"events":[{"event":"a"},{"event":"b"}]}"#)
                .send()
                .await
                .expect("an answer");
            let headers = answer.headers();
            assert_eq!(
                (answer.status().as_u16(), &headers["retry-after"]),
                (503, &"3".parse().expect("a value"))
            );
            assert_eq!(headers.get_all("x-a").iter().collect::<Vec<_>>(), ["b", "c"]);
        }
        assert_eq!(
            listen.lines(),
            [json!({ "requests": 2, "repeats": 1, "events": 4, "statuses": { "503": 2 } })]
        );
    });
}

#[test]
fn what_listen_refuses_is_halved_until_it_is_alone() {
    run(async {
        let listen = Listen::start(&["--refuse", "user.deleted"]).await;
        let queue = Queue::embedded();
        let setup = Setup::new(
            &queue,
            &(QUICK.to_owned() + &subscriber("a", &listen.1, "batch = { max_events = 4 }")),
        );
        let daemon = setup.start().await;
        // A refusal is about the events only if the receiver accepts others.
        queue.publish("user.created", [r#"{"event":"user.created","n":0}"#]).await;
        daemon.wait_log("outcome=\"delivered\"").await;
        let events: Vec<String> = (1..5)
            .map(|n| {
                format!(
                    "{{\"event\":\"{}\",\"n\":{n}}}",
                    if n == 3 { "user.deleted" } else { "user.created" }
                )
            })
            .collect();
        queue.publish("user.any", events).await;
        queue.wait_dead("a", 1).await;
        eventually("the last half arrives", async || {
            daemon.log().matches("outcome=\"delivered\"").count() == 3
        })
        .await;
        let dead: Vec<Value> = setup
            .ok(&["dead", "export", "a"])
            .lines()
            .map(|l| serde_json::from_str(l).expect("JSON"))
            .collect();
        assert_eq!(
            (&dead[0]["reason"], &dead[0]["events"]),
            (&json!("refused"), &json!(1)),
            "{dead:?}"
        );
        assert!(dead[0]["body"].as_str().is_some_and(|body| body.contains("\"n\":3")), "{dead:?}");
        drop(daemon);
        let lines = listen.lines();
        let refused: Vec<&Value> = lines.iter().filter(|l| l["status"] == 422).collect();
        assert!(refused.iter().all(|l| l["refused"] == json!(["user.deleted"])), "{lines:?}");
        let sizes: Vec<usize> =
            refused.iter().map(|l| l["events"].as_array().map_or(0, Vec::len)).collect();
        assert!(
            sizes.is_sorted_by(|a, b| a > b) && sizes.last() == Some(&1) && sizes.len() > 1,
            "{sizes:?}"
        );
        assert!(
            refused.last().expect("one")["batch_id"].as_str().is_some_and(|id| id.contains("_1")),
            "{refused:?}"
        );
    });
}
