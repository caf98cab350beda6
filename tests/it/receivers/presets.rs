//! Presets, each sent to its own receiver as `listen --as` plays it; and what does not fit.

use hooktrail::config::model::Model;
use reqwest::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::trying::Listen;
use crate::documents::packaging::file;
use crate::support::{
    daemon::{QUICK, SECRET, Setup, subscriber},
    eventually,
    queue::Queue,
    receiver::event,
    run,
};

const PRESETS: [&str; 8] = [
    "mailtrap",
    "elastic",
    "datadog",
    "splunk-hec",
    "sentinel",
    "google-secops",
    "eventbridge",
    "slack",
];

const NEVER: &str = "[queue]\nurl = \"embedded\"\ndata_dir = \"queue\"\n";

/// What an operator says besides the preset.
fn keys_of(preset: &str, key: &str) -> String {
    match preset {
        "datadog" => format!("headers = {{ \"DD-API-KEY\" = \"{key}\" }}"),
        "splunk-hec" => format!("headers = {{ Authorization = \"Splunk {key}\" }}"),
        "sentinel" => format!("auth = {{ bearer = \"{key}\" }}"),
        "google-secops" => {
            format!("headers = {{ X-goog-api-key = \"{key}\", X-Webhook-Access-Key = \"{key}\" }}")
        }
        _ => String::new(),
    }
}

/// A test that is sent to the receiver of `--as`: the status that `hooktrail test` shows, and why it
/// was refused.
async fn tested(receiver: &str, lines: &str) -> (u64, Option<String>) {
    let listen = Listen::start(&["--as", receiver, "--secret", SECRET]).await;
    let text = format!("{NEVER}{QUICK}{}", subscriber("a", &listen.1, lines));
    let setup = Setup::with_text(&text);
    let output = setup.run(&["test", "a", "--json"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| {
        panic!("{lines}: {}", String::from_utf8_lossy(&output.stderr));
    });
    let last = listen.lines().pop().expect("a request");
    assert_eq!(last["status"], found["status"]);
    let why = last["refused_because"].as_str().map(str::to_owned);
    (found["status"].as_u64().expect("a status"), why)
}

#[test]
fn each_preset_delivers_to_its_receiver_and_to_no_other() {
    run(async {
        let queue = Queue::embedded();
        let (mut text, mut listening) = (QUICK.to_owned(), Vec::new());
        for preset in PRESETS {
            let listen = Listen::start(&["--as", preset, "--secret", SECRET]).await;
            let keys = keys_of(preset, SECRET);
            // Of a whole batch, as soon as it is there.
            let more = format!("preset = \"{preset}\"\nbatch = {{ max_wait = \"100ms\" }}\n{keys}");
            text += &subscriber(preset, &listen.1, &more);
            listening.push((preset, listen));
        }
        let setup = Setup::new(&queue, &text);
        let daemon = setup.start().await;
        queue.publish("a.b", (0..30).map(event)).await;
        for (preset, _) in &listening {
            eventually(&format!("{preset} has all"), async || {
                queue.backlog(preset).await == 0 && daemon.log().contains(preset)
            })
            .await;
        }
        assert!(daemon.stop().await.success());
        for (preset, listen) in listening {
            let lines = listen.lines();
            let events: usize =
                lines.iter().map(|l| l["events"].as_array().map_or(0, Vec::len)).sum();
            assert_eq!(events, 30, "{preset}");
            assert!(
                lines.iter().all(|l| l.get("refused_because").is_none()),
                "{preset}: {lines:?}"
            );
            assert!(setup.dead(preset).is_empty(), "{preset}");
        }

        for preset in PRESETS {
            for receiver in PRESETS.into_iter().filter(|receiver| *receiver != preset) {
                let lines = format!("preset = \"{preset}\"\n{}", keys_of(preset, SECRET));
                let (status, why) = tested(receiver, &lines).await;
                let expected = if receiver == "slack" { 400 } else { 401 };
                assert!(
                    status == expected && why.is_some(),
                    "{preset} to {receiver}: {status} {why:?}"
                );
            }
        }
    });
}

#[test]
fn the_operators_document_names_each_preset_and_the_documentation_of_its_receiver() {
    let document = file("docs/operations.md");
    let (_, section) = document.split_once("### Known receivers").expect("the section");
    for model in Model::ALL {
        let row = section.lines().find(|l| l.starts_with(&format!("| `{}` |", model.name)));
        let row = row.unwrap_or_else(|| panic!("{} has no row", model.name));
        assert!(model.name == "mailtrap" || row.contains(model.documentation), "{row}");
        assert!(row.contains(&format!("`{}`", model.formats[0].name())), "{row}");
    }
    assert_eq!(PRESETS, Model::ALL.map(|model| model.name));
}

#[test]
fn a_receiver_refuses_what_its_documentation_says() {
    run(async {
        const FORMAT: &str = "its JSON is of another format";
        const TYPE: &str = "its content type";
        const KEY: &str = "a key, token or signature is missing";
        const WRONG: &str = "a key, token or signature is wrong";
        for (receiver, key, lines, expected) in [
            ("elastic", SECRET, "format = \"jsonl\"", (415, TYPE)),
            (
                "elastic",
                SECRET,
                "format = \"jsonl\"\ncontent_type = \"application/json\"",
                (200, ""),
            ),
            ("elastic", SECRET, "content_type = \"application/json; charset=utf-8\"", (415, TYPE)),
            ("sentinel", SECRET, "content_type = \"application/json; charset=utf-8\"", (204, "")),
            // One object is one document to it.
            ("elastic", SECRET, "format = \"json\"", (200, "")),
            // It verifies the compressed bytes, and hooktrail signs before.
            ("elastic", SECRET, "http = { compression = \"gzip\" }", (401, WRONG)),
            ("elastic", SECRET, "signatures = [\"standard-webhooks\"]", (401, KEY)),
            ("datadog", SECRET, "format = \"jsonl\"", (400, TYPE)),
            ("datadog", SECRET, "format = \"json\"", (202, "")),
            ("datadog", SECRET, "http = { compression = \"none\" }", (202, "")),
            ("datadog", "other", "", (403, WRONG)),
            ("splunk-hec", "other", "", (403, WRONG)),
            ("splunk-hec", SECRET, "format = \"json\"", (400, FORMAT)),
            ("splunk-hec", SECRET, "http = { compression = \"gzip\" }", (200, "")),
            ("sentinel", SECRET, "format = \"single\"", (400, FORMAT)),
            ("sentinel", SECRET, "http = { compression = \"gzip\" }", (204, "")),
            ("sentinel", "other", "", (403, WRONG)),
            ("google-secops", SECRET, "format = \"json_array\"", (400, FORMAT)),
            ("google-secops", SECRET, "content_type = \"application/x-ndjson\"", (400, TYPE)),
            ("google-secops", "other", "", (403, WRONG)),
            ("eventbridge", SECRET, "format = \"json_array\"", (400, FORMAT)),
            ("eventbridge", SECRET, "signatures = [\"mailtrap\"]", (401, KEY)),
            ("slack", SECRET, "format = \"single\"", (400, FORMAT)),
            ("mailtrap", SECRET, "format = \"json_array\"", (400, FORMAT)),
        ] {
            let lines = format!("preset = \"{receiver}\"\n{}\n{lines}", keys_of(receiver, key));
            let (status, why) = tested(receiver, &lines).await;
            assert_eq!((status, why.as_deref().unwrap_or_default()), expected, "{lines}");
        }
    });
}

#[test]
fn caps_ages_and_refusals_are_those_of_the_receiver() {
    run(async {
        let client = reqwest::Client::new();
        let listen =
            Listen::start(&["--as", "datadog", "--secret", SECRET, "--fail-first", "1"]).await;
        let send = async |body: String| {
            let request = client.post(&listen.1).header(CONTENT_TYPE, "application/json");
            let request = request.header("dd-api-key", SECRET).body(body);
            let answer = request.send().await.expect("an answer");
            (answer.status().as_u16(), answer.text().await.expect("a text"))
        };
        let array = |n: usize| format!("[{}]", vec!["{\"event\":\"a\"}"; n].join(","));
        assert_eq!(send(array(1)).await.0, 503, "it can be told to fail");
        assert_eq!(send(array(1000)).await, (202, "{}".to_owned()));
        let (status, text) = send(array(1001)).await;
        assert!(status == 400 && text.contains("Bad Request"), "{text}");
        let long = format!("[{{\"event\":\"{}\"}}]", "a".repeat(5_000_000));
        assert_eq!(send(long).await.0, 413);
        for (body, status) in [("", 400), (" \n", 400), ("[", 400), ("7", 400), ("[7]", 400)] {
            assert_eq!(send(body.to_owned()).await.0, status, "{body:?}");
        }
        let now = std::time::SystemTime::now();
        let now = now.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
        let at = |age: u64| json!({ "event": "a", "timestamp": now - age });
        let ages = json!([at(0), at(17 * 3600), at(19 * 3600), at(90_000)]);
        assert_eq!(send(ages.to_string()).await.0, 202, "it says nothing of what it drops");
        let ages = json!([{ "event": "a", "timestamp": (now - 19 * 3600) * 1000 }]);
        assert_eq!(send(ages.to_string()).await.0, 202);
        let lines = listen.lines();
        let dropped: Vec<_> = lines.iter().rev().take(2).map(|l| l["dropped"].clone()).collect();
        assert_eq!(dropped, [1, 2], "in milliseconds, and in seconds");

        let listen = Listen::start(&["--as", "splunk-hec", "--secret", SECRET]).await;
        let send = async |basic: bool, body: &'static str| {
            let request = client.post(&listen.1).body(body);
            let request = match basic {
                true => request.basic_auth("x", Some(SECRET)),
                false => request.header("authorization", format!("Splunk {SECRET}")),
            };
            let answer = request.send().await.expect("an answer");
            (answer.status().as_u16(), answer.text().await.expect("a text"))
        };
        for (basic, body, status, text) in [
            (true, "{\"event\":{\"event\":\"a\"}}", 200, "Success"),
            // What serde_json cannot hold.
            (false, "{\"event\":{\"n\":1e400}}{\"event\":{\"s\":\"\\ud800\"}}", 200, "Success"),
            (false, "{\"event\":\"\"}", 400, "\"code\":13"),
            (false, "{\"event\":null}", 400, "\"code\":13"),
            (false, "{\"event\":1}{\"fields\":{}}", 400, "\"code\":12"),
            (false, "", 400, "\"code\":5"),
        ] {
            let (found, answer) = send(basic, body).await;
            assert!(found == status && answer.contains(text), "{body}: {found} {answer}");
        }
    });
}

#[test]
fn check_warns_of_what_does_not_fit_the_receiver() {
    const INTAKE: &str = "https://http-intake.logs.datadoghq.eu/api/v2/logs";
    let found = |url: &str, lines: &str| {
        let text = format!("{NEVER}{}", subscriber("a", url, lines));
        let setup = Setup::with_text(&text);
        let output = setup.run(&["check", "--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let lines = String::from_utf8(output.stdout).expect("UTF-8");
        let all = lines.lines().map(|l| serde_json::from_str::<Value>(l).expect("a JSON line"));
        let warnings = all.filter(|f| f["severity"] == "warning");
        warnings.map(|f| f["found"].as_str().expect("a text").to_owned()).collect::<Vec<_>>()
    };
    for preset in PRESETS {
        let lines = format!("preset = \"{preset}\"\n{}", keys_of(preset, SECRET));
        assert_eq!(found("https://example.com/", &lines), [""; 0], "{preset} fits itself");
    }
    let basic =
        "preset = \"splunk-hec\"\nauth = { basic = { username = \"x\", password = \"y\" } }";
    assert_eq!(found("https://example.com/", basic), [""; 0]);
    let key = keys_of("datadog", SECRET);
    // Valid, and delivers nothing.
    let all = found(INTAKE, "format = \"jsonl\"");
    for part in [
        "and it has no preset",
        "does not read the format \"jsonl\" as events",
        "it retries for 72h, and Datadog's logs intake drops events that are older than 18h",
        "refuses requests without dd-api-key",
    ] {
        assert!(all.iter().any(|text| text.contains(part)), "{part}: {all:?}");
    }
    for (url, lines, part) in [
        (INTAKE, "preset = \"elastic\"", "and the preset is \"elastic\""),
        (INTAKE, "preset = \"datadog\"", "without dd-api-key"),
        (
            INTAKE,
            &format!("preset = \"datadog\"\n{key}\nbatch.max_events = 2000"),
            "batch.max_events = 2000 is more than Datadog's logs intake takes: 1000 events",
        ),
        (
            INTAKE,
            &format!("preset = \"datadog\"\n{key}\nbatch.max_bytes = \"5MiB\""),
            "batch.max_bytes = 5MiB is more than",
        ),
        (
            INTAKE,
            &format!("preset = \"datadog\"\n{key}\nretry.max_elapsed_time = \"0s\""),
            "it retries without an end",
        ),
        (
            "https://example.com/",
            "preset = \"elastic\"\nhttp.compression = \"gzip\"",
            "verifies the compressed bytes",
        ),
        (
            "https://example.com/",
            "preset = \"eventbridge\"\nhttp.compression = \"gzip\"",
            "is not known to take compressed requests",
        ),
        (
            "https://example.com/",
            "preset = \"splunk-hec\"",
            "refuses requests without `Authorization: Splunk …`",
        ),
    ] {
        let all = found(url, lines);
        assert!(all.iter().any(|text| text.contains(part)), "{part}: {all:?}");
    }
}
