//! The example of a request next to the form of a webhook.

use serde_json::json;

use super::{
    console::{Browser, field, key},
    history::TOKEN,
    webhook_form::{TYPED, labelled, managing, send, verify},
};
use crate::support::{api::Api, daemon::Setup, queue::Queue, receiver::Receiver, run};

const PLACEHOLDER: &str = "whsec_aG9va3RyYWlsOiBhIHBsYWNlaG9sZGVyIHNlY3JldC4=";

#[test]
fn an_example_of_a_change_shows_what_is_stored_without_its_secrets() {
    run(async {
        let (receiver, api) = (Receiver::accepting().await, Api::new());
        let setup = Setup::new(&Queue::embedded(), &managing(&api));
        let _daemon = setup.start().await;
        let browser = Browser::signed_in(&api, TOKEN).await;
        let own = key(&browser.page("/console/new-webhook").await);
        // The store is open once something is made.
        let form = [("form_key", own.as_str()), ("name", "first"), ("url", &receiver.url)];
        assert_eq!(send(&browser, "/console/new-webhook", &form).await.status, 200);
        let bearer = format!("Bearer {TOKEN}");
        let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
        let made = json!({
            "name": "siem", "url": receiver.url, "secrets": [TYPED], "auth": { "bearer": "hunter2" },
            "headers": { "X-Key": "hunter3" }, "description": "one",
        });
        let made = api.send("POST", "/api/v1/subscribers", &headers, &made.to_string()).await;
        assert_eq!(made.status, 201, "{made:?}");

        let edit = browser.page("/console/webhooks/siem/edit").await;
        let version = field(&edit, "version");
        let change = [
            ("form_key", own.as_str()),
            ("version", version.as_str()),
            ("url", "https://typed.example/in"),
            ("format", "jsonl"),
            ("signature", "standard-webhooks"),
        ];
        let path = "/console/webhooks/siem/edit/preview";
        let preview = browser.post(path, &change, &[]).await;
        assert_eq!(preview.status, 200, "{}", preview.text);
        for (page, format) in [(&edit, "application/json"), (&preview.text, "application/jsonl")] {
            for secret in [TYPED, "hunter2", "hunter3"] {
                assert!(!page.contains(secret), "{secret}: {page}");
            }
            let (headers, body) =
                (labelled(page, "Headers of the example"), labelled(page, "Body of the example"));
            for line in [
                "authorization: [redacted]",
                "x-key: [redacted]",
                &format!("content-type: {format}"),
            ] {
                assert!(headers.lines().any(|has| has == line), "{line}: {headers}");
            }
            // What is stored signs nothing that a page shows.
            verify(PLACEHOLDER, &headers, &body);
            assert!(!page.contains("overlap of its secrets"), "{page}");
        }
        let typed =
            [&change[..], &[("secret", "whsec_b3RoZXIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")]];
        let seen = browser.post(path, &typed.concat(), &[]).await;
        assert!(seen.text.contains("Signed with the secret in the form."), "{}", seen.text);

        // A URL's userinfo authenticates too, and not together with `auth`.
        let with =
            |url: &'static str| change.map(|(n, v)| if n == "url" { (n, url) } else { (n, v) });
        let seen = browser.post(path, &with("https://me:hunter4@typed.example/"), &[]).await;
        assert!(seen.text.contains("cannot be combined with a user or password"), "{}", seen.text);
        let path = "/console/webhooks/first/edit/preview";
        let seen = browser.post(path, &with("https://me:hunter4@typed.example/"), &[]).await;
        let headers = labelled(&seen.text, "Headers of the example");
        assert!(headers.contains("authorization: [redacted]\n"), "{headers}");
        assert!(!seen.text.contains("hunter4"), "{}", seen.text);
        let seen = browser.post(path, &with("https://typed.example/"), &[]).await;
        assert!(!labelled(&seen.text, "Headers of the example").contains("authorization"));

        // While two secrets sign, the page says so; not with one that replaces both.
        let rotate = [("form_key", own.as_str()), ("overlap", "1h")];
        let seen = browser.post("/console/webhooks/siem/secret", &rotate, &[]).await;
        assert_eq!(seen.status, 200, "{}", seen.text);
        let page = browser.page("/console/webhooks/siem/edit").await;
        assert!(page.contains("overlap of its secrets") && !page.contains(TYPED), "{page}");
        let path = "/console/webhooks/siem/edit/preview";
        let seen = browser.post(path, &typed.concat(), &[]).await;
        assert!(!seen.text.contains("overlap of its secrets"), "{}", seen.text);
    });
}
