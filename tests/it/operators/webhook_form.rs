//! Webhooks that are made, changed and removed in the console.

use super::{
    console::{Browser, OTHERS, Seen, assert_inert, field, key},
    history::TOKEN,
};
use crate::support::{
    api::Api,
    daemon::{QUICK, Setup, subscriber},
    eventually,
    queue::Queue,
    receiver::{Receiver, event},
    run,
};

/// A daemon that manages webhooks, whose requests may go to this machine.
pub(super) fn managing(api: &Api) -> String {
    api.section()
        + &format!("token = \"{TOKEN}\"\nmanage = true\n")
        + "[admin.api_subscribers]\nallow_http = true\nallow_addresses = [\"127.0.0.0/8\"]\n"
        + OTHERS
        + QUICK
}

/// Sends a form, again while the store is not open yet.
pub(super) async fn send(browser: &Browser, path: &str, form: &[(&str, &str)]) -> Seen {
    let mut seen = None;
    eventually("the store is open", async || {
        let answer = browser.post(path, form, &[]).await;
        let is_open = answer.status != 503;
        seen = Some(answer);
        is_open
    })
    .await;
    seen.expect("an answer")
}

/// What a field of one line shows.
pub(super) fn line(page: &str, name: &str) -> String {
    let (_, rest) = page.split_once(&format!(" name=\"{name}\" value=\"")).expect(name);
    unescaped(rest.split('"').next().expect("its text"))
}

/// The text of the page's secret.
fn secret(page: &str) -> String {
    let (_, rest) = page.split_once("aria-label=\"Signing secret\">").expect("a secret");
    rest.split('<').next().expect("its text").to_owned()
}

#[test]
fn a_webhook_is_tried_made_changed_given_a_new_secret_and_removed() {
    run(async {
        let (receiver, other, api) =
            (Receiver::accepting().await, Receiver::accepting().await, Api::new());
        let queue = Queue::embedded();
        let setup = Setup::new(&queue, &managing(&api));
        let _daemon = setup.start().await;
        let browser = Browser::signed_in(&api, TOKEN).await;
        let page = browser.page("/console/webhooks").await;
        assert!(page.contains("href=\"/console/new-webhook\""), "{page}");
        let own = key(&browser.page("/console/new-webhook").await);

        // A test of what is not saved.
        let form = [
            ("form_key", own.as_str()),
            ("name", "siem"),
            ("url", receiver.url.as_str()),
            ("format", "jsonl"),
            ("events", "user.*\nlogin.#"),
            ("signature", "standard-webhooks"),
            ("description", "Ask <b>ops@example.com</b>"),
        ];
        let seen = browser.post("/console/new-webhook/test", &form, &[]).await;
        assert!(seen.status == 200 && seen.text.contains("Test: answered 200"), "{}", seen.text);
        assert!(seen.text.contains("application/jsonl") && seen.text.contains("hooktrail.test"));
        assert!(seen.text.contains("value=\"siem\""), "what was typed is kept: {}", seen.text);
        assert_inert(&seen.text, "the test");
        receiver.wait_requests(1).await;
        assert!(!browser.page("/console/webhooks").await.contains("/webhooks/siem"));

        // Saved: its secret is shown once.
        let seen = send(&browser, "/console/new-webhook", &form).await;
        assert_eq!(seen.status, 200, "{}", seen.text);
        let first = secret(&seen.text);
        assert!(first.starts_with("whsec_"), "{first}");
        let page = browser.page("/console/webhooks/siem").await;
        assert!(!page.contains(&first) && page.contains("/siem/edit"), "{page}");
        queue.publish("user.created", [event(1)]).await;
        receiver.wait_requests(2).await;

        // The form of a change shows what is there, and no secret.
        let edit = browser.page("/console/webhooks/siem/edit").await;
        assert!(
            edit.contains("value=\"jsonl\" selected")
                && edit.contains("user.*\nlogin.#</textarea>")
                && !edit.contains(&first),
            "{edit}"
        );
        // Sent as it was shown, it changes nothing.
        let (version, url) = (field(&edit, "version"), line(&edit, "url"));
        let description = line(&edit, "description");
        let shown = [
            ("form_key", own.as_str()),
            ("version", version.as_str()),
            ("url", url.as_str()),
            ("format", "jsonl"),
            ("events", "user.*\r\nlogin.#"),
            ("signature", "standard-webhooks"),
            ("description", description.as_str()),
        ];
        let seen = send(&browser, "/console/webhooks/siem/edit", &shown).await;
        assert_eq!(seen.status, 303, "{}", seen.text);
        let edit = browser.page("/console/webhooks/siem/edit").await;
        assert_eq!(line(&edit, "description"), "Ask <b>ops@example.com</b>");
        let version = field(&edit, "version");
        let change = [
            ("form_key", own.as_str()),
            ("version", version.as_str()),
            ("url", other.url.as_str()),
            ("format", "json"),
            ("events", "order.*"),
            ("signature", "standard-webhooks"),
            ("description", ""),
        ];
        let seen = send(&browser, "/console/webhooks/siem/edit", &change).await;
        assert_eq!(
            (seen.status, seen.header("location").is_empty()),
            (303, false),
            "{}",
            seen.text
        );
        assert!(browser.page(seen.header("location")).await.contains("Saved."));
        queue.publish("order.paid", [event(2)]).await;
        other.wait_requests(1).await;

        // Who opened the form before, overwrites nothing, and keeps what was typed.
        let late = change
            .map(|(name, value)| if name == "events" { (name, "late.*") } else { (name, value) });
        let seen = browser.post("/console/webhooks/siem/edit", &late, &[]).await;
        assert!(
            seen.status == 412
                && seen.text.contains("Somebody else")
                && seen.text.contains("late.*"),
            "{} {}",
            seen.status,
            seen.text
        );
        assert!(browser.page("/console/webhooks/siem/edit").await.contains("order.*</textarea>"));

        // A new secret.
        let rotate = [("form_key", own.as_str()), ("overlap", "1h")];
        let seen = browser.post("/console/webhooks/siem/secret", &rotate, &[]).await;
        assert!(seen.status == 200 && secret(&seen.text) != first, "{}", seen.text);

        // Its removal says what waits, and asks what becomes of it. What was decided of another version
        // is not done.
        let asked = browser.page("/console/webhooks/siem/remove").await;
        let old = [("form_key", own.as_str()), ("version", version.as_str()), ("backlog", "drop")];
        let seen = browser.post("/console/webhooks/siem/remove", &old, &[]).await;
        assert_eq!(seen.status, 412, "{}", seen.text);
        let version = field(&asked, "version");
        let unsaid = [("form_key", own.as_str()), ("version", version.as_str())];
        let seen = browser.post("/console/webhooks/siem/remove", &unsaid, &[]).await;
        assert_eq!(seen.status, 400, "{}", seen.text);
        let drop = [unsaid[0], unsaid[1], ("backlog", "drop")];
        let seen = browser.post("/console/webhooks/siem/remove", &drop, &[]).await;
        assert_eq!(seen.status, 303, "{}", seen.text);
        let page = browser.page(seen.header("location")).await;
        assert!(page.contains("siem is removed.") && !page.contains("/webhooks/siem\""), "{page}");
        assert_eq!(browser.get("/console/webhooks/siem").await.status, 404);
    });
}

#[test]
fn each_mistake_of_a_webhook_stands_beside_its_field_and_what_was_typed_is_kept() {
    run(async {
        let api = Api::new();
        let text = managing(&api) + &subscriber("of-file", "http://127.0.0.1:9/", "");
        let queue = Queue::embedded();
        let setup = Setup::new(&queue, &text);
        let _daemon = setup.start().await;
        let browser = Browser::signed_in(&api, TOKEN).await;
        let own = key(&browser.page("/console/new-webhook").await);
        let sound = [
            ("form_key", own.as_str()),
            ("name", "siem"),
            ("url", "http://127.0.0.1:9/in"),
            ("events", "user.*"),
        ];
        for (wrong, value) in [
            ("name", ""),
            ("name", "Not A Name"),
            ("url", ""),
            ("url", "ftp://example.com/"),
            ("url", "http://10.0.0.1/"),
            ("url", "https://\"><script>alert(1)</script>"),
            ("format", "xml"),
            ("events", &format!("user.*,{}", "x".repeat(256))),
            ("secret", "too-short"),
            ("description", &"x".repeat(1001)),
        ] {
            let mut form: Vec<_> = sound.into_iter().filter(|(name, _)| *name != wrong).collect();
            form.push((wrong, value));
            for path in ["/console/new-webhook", "/console/new-webhook/test"] {
                let seen = browser.post(path, &form, &[]).await;
                let what = format!("{path} {wrong}={value}: {}", seen.text);
                assert!(seen.status == 400, "{} {what}", seen.status);
                assert!(seen.text.contains(&format!("id=\"wrong-{wrong}\"")), "{what}");
                assert!(
                    wrong == "secret" || seen.text.contains("value=\"siem\"") || wrong == "name",
                    "{what}"
                );
                assert!(!seen.text.contains("too-short"), "a secret is never shown: {what}");
                assert_inert(&seen.text, wrong);
            }
        }
        // The userinfo of a URL is not shown, and the form says that it is gone.
        let form =
            [sound[0], sound[1], ("url", "https://me:a-password@127.0.0.1/"), ("format", "xml")];
        let seen = browser.post("/console/new-webhook", &form, &[]).await;
        assert!(
            seen.status == 400
                && seen.text.contains("value=\"https://127.0.0.1/\"")
                && seen.text.contains("type them again")
                && !seen.text.contains("a-password"),
            "{}",
            seen.text
        );
        // A name that is taken, and one that a file has.
        let taken = [sound[0], ("name", "of-file"), sound[2], sound[3]];
        let seen = send(&browser, "/console/new-webhook", &taken).await;
        assert!(seen.status == 409 && seen.text.contains("hooktrail.toml:"), "{}", seen.text);
        assert!(
            seen.text.contains("id=\"wrong-name\""),
            "it stands beside the name: {}",
            seen.text
        );
        let seen = browser.get("/console/webhooks/of-file/edit").await;
        assert!(seen.status == 409 && seen.text.contains("change it there"), "{}", seen.text);
        let page = browser.page("/console/webhooks/of-file").await;
        assert!(!page.contains("/of-file/edit"), "{page}");

        // Who may only look, and a form of nobody.
        let looker = Browser::signed_in(&api, "the-token-that-reads").await;
        assert!(!looker.page("/console/webhooks").await.contains("new-webhook"));
        assert_eq!(looker.get("/console/new-webhook").await.status, 403);
        let others = key(&looker.page("/console/").await);
        for (from, key) in [(&looker, others.as_str()), (&browser, others.as_str()), (&browser, "")]
        {
            for path in [
                "/console/new-webhook",
                "/console/new-webhook/test",
                "/console/webhooks/of-file/edit",
                "/console/webhooks/of-file/secret",
                "/console/webhooks/of-file/remove",
            ] {
                let form = [("form_key", key), sound[1], sound[2]];
                assert_eq!(from.post(path, &form, &[]).await.status, 403, "{path}");
            }
        }
        assert!(!browser.page("/console/webhooks").await.contains("/webhooks/siem"));
    });
}

/// The text of an element that is named by its label.
pub(super) fn labelled(page: &str, label: &str) -> String {
    let (_, rest) = page.split_once(&format!("aria-label=\"{label}\">")).expect(label);
    unescaped(rest.split('<').next().expect("its text"))
}

fn unescaped(html: &str) -> String {
    html.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
}

#[test]
fn a_form_shows_the_types_that_it_matches_and_an_example_and_sends_nothing() {
    run(async {
        let (receiver, api, queue) = (Receiver::accepting().await, Api::new(), Queue::embedded());
        let setup = Setup::new(&queue, &managing(&api));
        let _daemon = setup.start().await;
        queue.publish("user.created", (0..3).map(event)).await;
        queue.publish("order.paid", (3..5).map(event)).await;
        let browser = Browser::signed_in(&api, TOKEN).await;
        eventually("history has all", async || {
            browser.page("/console/new-webhook").await.contains("<strong>5 fit</strong>: 2 types")
        })
        .await;
        let page = browser.page("/console/new-webhook").await;
        let own = key(&page);
        // Its bytes, and a signature that the placeholder's owner can verify.
        let (headers, body) =
            (labelled(&page, "Headers of the example"), labelled(&page, "Body of the example"));
        assert!(body.starts_with("{\"events\":[{") && body.ends_with("}]}"), "{body}");
        let placeholder = "whsec_aG9va3RyYWlsOiBhIHBsYWNlaG9sZGVyIHNlY3JldC4=";
        assert!(page.contains(placeholder), "it says what it is signed with: {page}");
        verify(placeholder, &headers, &body);

        let form = [
            ("form_key", own.as_str()),
            ("name", "siem"),
            ("url", receiver.url.as_str()),
            ("format", "jsonl"),
            ("events", "user.*\nnever.#"),
            ("signature", "standard-webhooks"),
            ("secret", TYPED),
        ];
        let preview = "/console/new-webhook/preview";
        let seen = browser.post(preview, &form, &[]).await;
        assert_eq!(seen.status, 200, "{}", seen.text);
        assert_inert(&seen.text, preview);
        for part in [
            "<strong>3 fit</strong>: 1 type of 2",
            "type=user.created",
            "Types that do not match",
            "Signed with the secret in the form.",
            "user.*\nnever.#</textarea>",
        ] {
            assert!(seen.text.contains(part), "{part}: {}", seen.text);
        }
        assert!(!seen.text.contains(TYPED), "a secret is not shown again");
        let (headers, body) = (
            labelled(&seen.text, "Headers of the example"),
            labelled(&seen.text, "Body of the example"),
        );
        assert!(headers.contains("content-type: application/jsonl") && body.ends_with("}\n"));
        verify(TYPED, &headers, &body);

        let with = |field: &'static str, value: &'static str| {
            form.map(|(name, was)| if name == field { (name, value) } else { (name, was) })
        };
        for (form, part) in [
            (with("events", "user.*\na*"), "Pattern 2: `a*` mixes a wildcard"),
            (with("signature", "none"), "It is not signed."),
            (with("secret", "short"), "There is none while the form has a mistake: secrets"),
            // Whatever is wrong elsewhere.
            (with("url", "nowhere"), "Signed with the secret in the form."),
        ] {
            let seen = browser.post(preview, &form, &[]).await;
            assert!(seen.status == 200 && seen.text.contains(part), "{part}: {}", seen.text);
        }
        // A form that was loaded instead of sent.
        assert!(browser.page(preview).await.contains("New webhook"));
        assert_eq!(receiver.requests().len(), 0, "nothing was sent");

        // One that is removed while its form is open: what was typed stays.
        assert_eq!(send(&browser, "/console/new-webhook", &form).await.status, 303);
        let edit = browser.page("/console/webhooks/siem/edit").await;
        assert!(edit.contains("application/jsonl") && edit.contains(placeholder), "{edit}");
        let (version, own) = (field(&edit, "version"), key(&edit));
        let removal =
            [("form_key", own.as_str()), ("version", version.as_str()), ("backlog", "drop")];
        let seen = browser.post("/console/webhooks/siem/remove", &removal, &[]).await;
        assert_eq!(seen.status, 303, "{}", seen.text);
        let late = [
            ("form_key", own.as_str()),
            ("version", version.as_str()),
            ("url", "https://late.example/"),
            ("format", "json"),
        ];
        for path in ["edit", "edit/test", "edit/preview"] {
            let path = format!("/console/webhooks/siem/{path}");
            let seen = browser.post(&path, &late, &[]).await;
            assert!(seen.text.contains("value=\"https://late.example/\""), "{path}: {}", seen.text);
            let is_said = seen.text.contains("was removed meanwhile") && seen.status == 404;
            assert!(is_said || path.ends_with("preview"), "{path}: {}", seen.text);
        }
    });
}

/// A signing secret that was typed.
pub(super) const TYPED: &str = "whsec_bWluZQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// Verifies the example as a receiver would.
pub(super) fn verify(secret: &str, headers: &str, body: &str) {
    let header =
        |name: &str| headers.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let now: u64 = header("webhook-timestamp").expect("a time").parse().expect("a number");
    let secret = hooktrail::crypto::secret::Secret::new(secret);
    let verified = hooktrail::crypto::signature::verify(&secret, header, body.as_bytes(), now);
    assert!(verified.is_ok(), "{headers}\n{body}");
}

/// The hidden fields of a page's form, as a browser sends them.
pub(super) fn hidden(page: &str) -> Vec<(String, String)> {
    let fields = page.split("<input type=\"hidden\" name=\"").skip(1);
    let fields = fields.map(|rest| {
        let name = rest.split('"').next().expect("a name").to_owned();
        let value = rest.split(" value=\"").nth(1).and_then(|v| v.split('"').next());
        (name, unescaped(value.expect("a value")))
    });
    fields.collect()
}

/// Signs in with these fields of the page of the sign-in. Returns its answer too.
pub(super) async fn signed_in_with(api: &Api, typed: &[(String, String)]) -> (Browser, Seen) {
    let all = typed.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let all: Vec<_> = all.chain([("token", TOKEN)]).collect();
    Browser::new(api).signs_in(&all).await
}

#[test]
fn what_was_typed_outlives_the_session_without_its_secrets_and_is_sent_by_the_user_alone() {
    run(async {
        let (receiver, api) = (Receiver::accepting().await, Api::new());
        let config = managing(&api) + &subscriber("old", &receiver.url, "");
        let setup = Setup::new(&Queue::embedded(), &config);
        let _daemon = setup.start().await;
        let url = receiver.url.replace("http://", "http://me:hunter2@");
        let form = [
            ("form_key", "of-a-session-that-is-over"),
            ("name", "siem"),
            ("url", url.as_str()),
            ("format", "jsonl"),
            ("events", "user.*\r\n<b>"),
            ("signature", "standard-webhooks"),
            ("secret", TYPED),
            ("description", "the \"SOC\""),
        ];
        let out = Browser::new(&api);
        // A form that another site has filled in is not the user's.
        let elsewhere = [("origin", "https://evil.example")];
        let seen = out.post("/console/new-webhook", &form, &elsewhere).await;
        assert!(seen.status == 401 && !seen.text.contains("SOC"), "{}", seen.text);

        for path in ["/console/new-webhook", "/console/new-webhook/test"] {
            let seen = out.post(path, &form, &[]).await;
            assert!(
                seen.status == 401 && seen.text.contains("You were signed out"),
                "{}",
                seen.text
            );
            assert_inert(&seen.text, path);
            for secret in [TYPED, "hunter2", "of-a-session"] {
                assert!(!seen.text.contains(secret), "{secret}: {}", seen.text);
            }
            // A wrong token loses nothing.
            let typed = hidden(&seen.text);
            let all = typed.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            let wrong: Vec<_> = all.chain([("token", "wrong")]).collect();
            let wrong = out.post("/console/sign-in", &wrong, &[]).await;
            assert_eq!(hidden(&wrong.text), typed, "{}", wrong.text);

            let (browser, seen) = signed_in_with(&api, &typed).await;
            let to = seen.header("location");
            assert!(seen.status == 303 && to.starts_with(&format!("{path}?draft=")), "{to}");
            let page = browser.page(to).await;
            for part in [
                "You were signed out meanwhile, and nothing was sent.",
                "value=\"siem\"",
                "value=\"jsonl\" selected",
                "&lt;b&gt;</textarea>",
                "value=\"the &quot;SOC&quot;\"",
            ] {
                assert!(page.contains(part), "{part}: {page}");
            }
            // It is of that session alone.
            let other = Browser::signed_in(&api, TOKEN).await;
            assert!(!other.page(to).await.contains("SOC"));
            assert_eq!(browser.get("/console/webhooks/siem").await.status, 404, "nothing was done");
            assert_eq!(receiver.requests().len(), 0, "nothing was sent");
        }

        // An action leads back to its page.
        let pause = "/console/webhooks/old/pause";
        let seen = out.post(pause, &[("form_key", "x"), ("why", "a look")], &[]).await;
        let (browser, seen) = signed_in_with(&api, &hidden(&seen.text)).await;
        let page = browser.page(seen.header("location")).await;
        assert!(page.contains("Pause old") && page.contains("value=\"a look\""), "{page}");
        assert!(!browser.page("/console/webhooks/old").await.contains("a look"));
        // So does a form without anything typed.
        let seen = out.post("/console/health/inspect", &[("form_key", "x")], &[]).await;
        assert!(hidden(&seen.text).contains(&("to".into(), "/console/health/inspect".into())));
    });
}

#[test]
fn a_url_of_another_host_is_refused_beside_its_field_while_headers_are_stored() {
    run(async {
        let (receiver, other, api) =
            (Receiver::accepting().await, Receiver::accepting().await, Api::new());
        let setup = Setup::new(&Queue::embedded(), &managing(&api));
        let _daemon = setup.start().await;
        let browser = Browser::signed_in(&api, TOKEN).await;
        let bearer = format!("Bearer {TOKEN}");
        let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
        let made = serde_json::json!({
            "name": "siem", "url": receiver.url, "headers": { "x-key": "hunter2" },
        });
        eventually("it is made", async || {
            let path = "/api/v1/subscribers";
            api.send("POST", path, &headers, &made.to_string()).await.status == 201
        })
        .await;
        let path = "/console/webhooks/siem/edit";
        let page = browser.page(path).await;
        let (own, version) = (key(&page), field(&page, "version"));
        let form = [
            ("form_key", own.as_str()),
            ("version", version.as_str()),
            ("url", other.url.as_str()),
            ("format", "json"),
            ("signature", "standard-webhooks"),
        ];
        for path in [path.to_owned(), format!("{path}/test")] {
            let seen = browser.post(&path, &form, &[]).await;
            assert_eq!(seen.status, 400, "{path}: {}", seen.text);
            let (_, beside) = seen.text.split_once("id=\"wrong-url\"").expect("beside the field");
            let beside = beside.split("</").next().unwrap_or_default();
            assert!(beside.contains("`headers.x-key`"), "{beside}");
            assert!(beside.contains("hooktrail subscribers set --from"), "{beside}");
            assert_eq!(line(&seen.text, "url"), other.url);
            assert!(!seen.text.contains("hunter2"));
        }
        assert!(other.requests().is_empty(), "a test would have sent it");
        // The same host with another path is no other.
        let path_alone = format!("{}hooks", receiver.url);
        let form = form.map(|(n, v)| if n == "url" { (n, path_alone.as_str()) } else { (n, v) });
        assert_eq!(browser.post(path, &form, &[]).await.status, 303);
    });
}
