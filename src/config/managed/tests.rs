use std::time::{Duration, UNIX_EPOCH};

use serde_json::json;

use super::*;
use crate::{
    config::{Origin, testing},
    crypto::secret::Secret,
};

const NOW: SystemTime = UNIX_EPOCH;

fn document(value: Json) -> Document {
    Document::parse(&Secret::new(value.to_string())).expect("an object")
}

fn checked_in(groups: &str, keys: Json) -> Checked {
    let mut all = json!({ "name": "a", "url": "https://example.com/", "signatures": [] });
    all.as_object_mut().expect("an object").append(&mut keys.as_object().expect("keys").clone());
    let config = testing::embedded(groups);
    check(&config, &[&document(all)], NOW).remove(0)
}

fn wrong_in(groups: &str, keys: Json) -> Vec<(String, String)> {
    let wrong = checked_in(groups, keys.clone()).expect_err(&keys.to_string());
    wrong.into_iter().map(|w| (w.field, w.detail)).collect()
}

#[test]
fn a_document_is_checked_as_a_file_is_and_each_mistake_names_its_field() {
    for (keys, field, part) in [
        (json!({ "name": "A" }), "name", "queues"),
        (json!({ "url": 7 }), "url", "must be a string"),
        (json!({ "urll": "x" }), "urll", "did you mean `url`"),
        (json!({ "events": [] }), "events", "is empty"),
        (json!({ "events": ["a", "x".repeat(300)] }), "events[1]", "bytes"),
        (json!({ "headers": { "Host": "x" } }), "headers.Host", "sets itself"),
        (json!({ "headers": { "X-A": null } }), "headers.X-A", "is null"),
        (json!({ "batch": { "max_events": 0 } }), "batch.max_events", "from 1"),
        (json!({ "batch": { "max_events": 1.5 } }), "batch.max_events", "whole number"),
        (json!({ "batch": { "max_events": u64::MAX } }), "batch.max_events", "whole number"),
        (json!({ "retry": { "max_interval": "1s" } }), "retry.max_interval", "shorter"),
        (json!({ "circuit_breaker": [] }), "circuit_breaker", "must be a table"),
        (json!({ "http": { "timeout": "1h" } }), "http.timeout", "at most"),
        (json!({ "signatures": ["standard-webhooks"] }), "secrets", "required"),
        (json!({ "start_paused": "yes" }), "start_paused", "true or false"),
        (json!({ "description": "x".repeat(1001) }), "description", "1000"),
        (json!({ "preset": "other" }), "preset", "mailtrap"),
        (json!({ "description": [[[[[["deep"]]]]]] }), "description[0][0][0][0][0]", "levels"),
        (json!({ "headers": { "X\u{7f}\"]\n": "x" } }), "headers.X\u{7f}\"]\n", "header name"),
    ] {
        let wrong = wrong_in("", keys.clone());
        assert!(
            wrong.iter().any(|(f, detail)| f == field && detail.contains(part)),
            "{keys}: {wrong:?}"
        );
    }
    let both = wrong_in("", json!({ "url": "x", "format": "xml" }));
    assert_eq!(both.iter().map(|(f, _)| f.as_str()).collect::<Vec<_>>(), ["url", "format"]);
}

#[test]
fn the_groups_of_the_file_may_have_variables() {
    let groups = "[http]\ntimeout = \"${TIMEOUT}\"\n[admin.api_subscribers]\nproxy = \"http://${PROXY}:3128\"\n";
    let env = |name: &str| match name {
        "TIMEOUT" => Some("7s".to_owned()),
        "PROXY" => Some("proxy.example".to_owned()),
        _ => None,
    };
    let text = format!("[queue]\nurl = \"embedded\"\n{groups}");
    let config = crate::config::from_text(&text, &env, &[]).expect("it is valid");
    let keys = json!({ "name": "a", "url": "https://example.com/", "signatures": [] });
    let checked = check_with(&config, &[&document(keys)], NOW, &env).remove(0);
    let http = checked.expect("a subscriber").http;
    assert_eq!(http.timeout, Duration::from_secs(7));
    assert!(http.proxy.is_some());
}

#[test]
fn a_document_reads_no_variable_and_no_file_and_has_no_key_that_does() {
    for (keys, field) in [
        (json!({ "url": "https://example.com/${HOME}" }), "url"),
        (json!({ "headers": { "X": "$${HOME}" } }), "headers.X"),
        (json!({ "auth": { "bearer": "file:/etc/hostname" } }), "auth.bearer"),
        (
            json!({ "auth": { "basic": { "username": "u", "password": "file:x" } } }),
            "auth.basic.password",
        ),
        (json!({ "secrets": ["file:/etc/hostname"] }), "secrets[0]"),
        (json!({ "signing_key": "file:/etc/hostname" }), "signing_key"),
        (
            json!({ "redact": ["/a"], "redact_with": { "hmac": "file:/etc/hostname" } }),
            "redact_with",
        ),
        (json!({ "redact": ["/a"], "redact_with": { "hmac": "k" } }), "redact_with"),
        (json!({ "tls": { "ca_file": "/etc/hostname" } }), "tls"),
        (json!({ "paused": true }), "paused"),
        (json!({ "event_ids": true }), "event_ids"),
        (json!({ "http": { "success": "200" } }), "http.success"),
        (json!({ "retiring_secrets": 1 }), ""),
    ] {
        let found = checked_in("", keys.clone());
        if field.is_empty() {
            assert!(found.is_ok(), "a client's own is taken out before: {found:?}");
            continue;
        }
        let wrong = found.expect_err(field);
        assert!(wrong.len() == 1 && wrong[0].field == field, "{keys}: {wrong:?}");
        // It is not read first, and its text found wrong then.
        let is_file = keys.to_string().contains(":\"file:") || field == "secrets[0]";
        let of_file = wrong[0].detail.starts_with("no file is read");
        assert_eq!(is_file && field != "redact_with", of_file, "{keys}: {wrong:?}");
    }
}

#[test]
fn where_requests_may_go_comes_from_the_table_for_it_alone() {
    let widest = "[http]\nallow_http = true\nallow_private_addresses = true\n\
                  allow_addresses = [\"10.0.0.0/8\"]\nproxy = \"http://proxy.example:1\"\n";
    for url in ["http://example.com/", "https://10.0.0.1/", "https://127.0.0.1/"] {
        let wrong = wrong_in(widest, json!({ "url": url }));
        assert!(wrong[0].0 == "url" && wrong[0].1.contains("[admin.api_subscribers]"), "{wrong:?}");
    }
    for key in REACH {
        let wrong = wrong_in(widest, json!({ "http": { key: true } }));
        assert!(wrong[0].1.contains("[admin.api_subscribers]"), "{wrong:?}");
    }
    let found = checked_in(widest, json!({})).expect("valid");
    assert_eq!((found.http.proxy, found.http.allow_http), (None, false));
    let reach = "[admin.api_subscribers]\nallow_http = true\nallow_addresses = [\"10.0.0.0/8\"]\n";
    let found = checked_in(reach, json!({ "url": "http://10.1.1.1/" })).expect("allowed");
    assert!(found.http.allow_http && !found.http.addresses.allow_private);
    assert_eq!(found.origin, Origin::Api);
    let proxy = "[admin.api_subscribers]\nproxy = \"http://proxy.example:1\"\n";
    assert!(checked_in(proxy, json!({})).expect("valid").http.proxy.is_some());
}

#[test]
fn the_groups_of_the_file_are_the_defaults_and_the_documents_own_keys_win() {
    let groups = "[http]\ntimeout = \"9s\"\nconcurrency = 3\nsuccess = \"200\"\n\
                  [batch]\nmax_events = 7\n[retry]\nmax_attempts = 5\n[circuit_breaker]\nfailures = 9\n";
    let found = checked_in(groups, json!({ "http": { "timeout": "4s" }, "batch": {} }));
    let found = found.expect("valid");
    assert_eq!(found.http.timeout, Duration::from_secs(4));
    assert_eq!((found.http.concurrency, found.http.success.name()), (3, "2xx"));
    assert_eq!((found.batch.max_events, found.circuit_breaker.failures), (7, 9));
    assert_eq!(found.retry.options().max_attempts, 5);
}

#[test]
fn what_is_shown_has_no_secret_and_can_be_written_back() {
    let whole = document(json!({
        "name": "a", "url": "https://u:hunter2@example.com/hunter2hunter2hunter2?k=hunter2",
        "secrets": ["hunter2"], "headers": { "X-Key": "hunter2" },
        "auth": { "basic": { "username": "me", "password": "hunter2" } },
        "retiring_secrets": [{ "secret": "hunter2", "until": "2026-01-01T00:00:00Z" }],
        "batch": { "max_events": 3 },
    }));
    let shown = whole.redacted();
    assert!(!shown.to_string().contains("hunter2"), "{shown}");
    assert_eq!(shown["url"], "https://example.com/[redacted]");
    assert_eq!(shown["auth"]["basic"]["username"], "me");
    assert_eq!(format!("{whole:?}"), REDACTED);
    let mut back = document(shown.clone()).restored(&whole);
    back.set("retiring_secrets", whole.get("retiring_secrets").expect("there").clone());
    assert_eq!(back, whole);
    // Whatever else stands for a secret is none.
    for (pointer, value) in [("url", "https://other.example/[redacted]"), ("name", "[redacted]")] {
        let mut other = shown.clone();
        other[pointer] = value.into();
        let wrong = check(&testing::embedded(""), &[&document(other).restored(&whole)], NOW);
        let wrong = wrong[0].as_ref().expect_err(value);
        assert!(wrong[0].field == pointer && wrong[0].detail.contains("not shown"), "{wrong:?}");
    }
    for url in ["https://example.com/?k=v", "https://example.com/hook#x", "https://example.com"] {
        let one = document(json!({ "url": url }));
        let shown = one.redacted();
        assert!(!shown.to_string().contains("k=v"), "{shown}");
        assert_eq!(document(shown).restored(&one), one);
    }
}

#[test]
fn a_patch_merges_as_rfc_7396_has_it() {
    // Its appendix A, as far as both are objects.
    for (target, patch, result) in [
        (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
        (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
        (json!({"a":"b"}), json!({"a":null}), json!({})),
        (json!({"a":"b","b":"c"}), json!({"a":null}), json!({"b":"c"})),
        (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
        (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
        (json!({"a":{"b":"c"}}), json!({"a":{"b":"d","c":null}}), json!({"a":{"b":"d"}})),
        (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
        (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
        (json!({}), json!({"a":{"bb":{"ccc":null}}}), json!({"a":{"bb":{}}})),
    ] {
        assert_eq!(document(target).merged(&document(patch)), document(result));
    }
}

#[test]
fn a_retired_secret_signs_until_its_time() {
    let keys = json!({
        "name": "a", "url": "https://example.com/", "signatures": ["mailtrap"], "secrets": ["new"],
        "retiring_secrets": [
            { "secret": "old", "until": "1970-01-01T00:01:00Z" },
            { "secret": "older", "until": "1970-01-01T00:00:30Z" },
        ],
    });
    for (seconds, expected) in [(0, 3), (30, 2), (59, 2), (60, 1)] {
        let now = NOW + Duration::from_secs(seconds);
        let found = check(&testing::embedded(""), &[&document(keys.clone())], now).remove(0);
        assert_eq!(found.expect("valid").secrets.len(), expected, "after {seconds} s");
    }
}

#[test]
fn what_is_exported_is_the_same_subscriber_in_a_file() {
    let keys = json!({
        "name": "a-1", "description": "For the SIEM\nteam", "url": "https://example.com/x?k=v",
        "secrets": ["s1", "s2"], "signatures": ["mailtrap", { "header": "X-Sig", "prefix": "p=" }],
        "headers": { "X-Key": "h" }, "auth": { "bearer": "t" }, "events": ["a.*"],
        "batch": { "max_events": 3, "max_wait": "2s" }, "retry": { "multiplier": 2.5 },
        "http": { "timeout": "4s" }, "format": "jsonl", "start_paused": true,
    });
    let made = document(keys);
    let text = as_file("a-1", &made);
    assert_eq!(as_file("a-1", &document(made.redacted())), text, "what is shown is enough");
    assert!(text.starts_with("# For the SIEM\n# team\n[[subscriber]]\nname = \"a-1\"\n"), "{text}");
    let env = |name: &str| {
        let value = match name {
            "A_1_SECRET" => "s1",
            "A_1_SECRET_2" => "s2",
            "A_1_URL" => "https://example.com/x?k=v",
            "A_1_HEADER_X_KEY" => "h",
            "A_1_TOKEN" => "t",
            _ => return None,
        };
        Some(value.to_owned())
    };
    let file = format!("[queue]\nurl = \"embedded\"\n{text}");
    let file = super::super::from_text(&file, &env, &[]).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let made = check(&testing::embedded(""), &[&made], NOW).remove(0).expect("valid");
    let differs = crate::config::changes::Differences::between(&made, &file.subscribers[0]);
    assert!(differs.is_empty(), "{:?}", differs.paths());
    let shown = settings(&made);
    assert_eq!((&shown["name"], &shown["batch"]["max_events"]), (&json!("a-1"), &json!(3)));
    assert!(!shown.to_string().contains("s1"));
}

#[test]
fn headers_and_authentication_go_to_no_other_origin_than_the_one_that_they_were_given_for() {
    let before = document(json!({
        "url": "https://a.example/hook",
        "headers": { "authorization": "Key hunter2", "x-team": "7" },
        "auth": { "basic": { "username": "u", "password": "hunter2" } },
        "secrets": ["hunter2"],
    }));
    let all = &["headers.authorization", "headers.x-team", "auth.basic.password"][..];
    let redacted = before.redacted();
    for (patch, expected) in [
        (json!({ "url": "https://a.example:443/other?key=1" }), &[][..]),
        (json!({ "url": "https://A.example/" }), &[]),
        (json!({ "description": "x" }), &[]),
        (json!({ "url": "https://b.example/hook" }), all),
        (json!({ "url": "http://a.example/hook" }), all),
        (json!({ "url": "https://a.example:8443/hook" }), all),
        (
            json!({ "url": "https://b.example/", "headers": redacted["headers"], "auth": redacted["auth"] }),
            all,
        ),
        (json!({ "url": "https://b.example/", "headers": null, "auth": null }), &[]),
        (
            json!({ "url": "https://b.example/", "auth": { "basic": null, "bearer": "new" },
                "headers": { "authorization": "new", "x-more": "1" } }),
            &["headers.x-team"],
        ),
        // The value is given, which may be the same.
        (
            json!({ "url": "https://b.example/", "auth": { "basic": { "password": "hunter2" } },
                "headers": { "authorization": "Key hunter2", "x-team": "7" } }),
            &[],
        ),
    ] {
        let given = document(patch.clone());
        let after = before.merged(&given).restored(&before);
        let carried = after.carried_elsewhere(&given, &before);
        assert_eq!(carried.map_or(Vec::new(), |carried| carried.keys), expected, "{patch}");
    }
}

#[test]
fn the_secret_of_a_token_endpoint_goes_to_no_other_one_and_no_token_to_another_receiver() {
    let before = document(json!({
        "url": "https://a.example/hook",
        "headers": { "x-team": "7" },
        "auth": { "oauth2": { "token_url": "https://login.example/TOKENTOKENTOKEN99/token?a=b", "client_id": "c",
            "client_secret": "hunter2", "scope": "s" } },
    }));
    let shown = before.redacted();
    assert!(!shown.to_string().contains("hunter2"), "{shown}");
    assert_eq!(
        shown["auth"]["oauth2"],
        json!({ "token_url": "https://login.example/[redacted]/token", "client_id": "c",
            "client_secret": "[redacted]", "scope": "s" })
    );
    let oauth2 = |patch: serde_json::Value| json!({ "auth": { "oauth2": patch } });
    let secret = "auth.oauth2.client_secret";
    for (patch, by, keys) in [
        (
            oauth2(json!({ "token_url": "https://login.example/other" })),
            "auth.oauth2.token_url",
            &[secret][..],
        ),
        (oauth2(json!({ "token_url": shown["auth"]["oauth2"]["token_url"] })), "", &[]),
        (oauth2(json!({ "scope": "other" })), "", &[]),
        (
            oauth2(json!({ "token_url": "https://evil.example/" })),
            "auth.oauth2.token_url",
            &[secret],
        ),
        (
            oauth2(
                json!({ "token_url": "https://evil.example/", "client_secret": shown["auth"]["oauth2"]["client_secret"] }),
            ),
            "auth.oauth2.token_url",
            &[secret],
        ),
        (oauth2(json!({ "token_url": "https://evil.example/", "client_secret": "new" })), "", &[]),
        (json!({ "url": "https://b.example/" }), "url", &["headers.x-team", secret]),
        (json!({ "url": "https://b.example/", "headers": null, "auth": null }), "", &[]),
    ] {
        let given = document(patch.clone());
        let after = before.merged(&given).restored(&before);
        let carried = after.carried_elsewhere(&given, &before);
        let carried = carried.map_or(("", Vec::new()), |carried| (carried.by, carried.keys));
        assert_eq!(carried, (by, keys.iter().map(ToString::to_string).collect()), "{patch}");
    }
}
