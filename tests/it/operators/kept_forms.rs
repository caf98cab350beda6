//! Forms of the console that were sent after their session was over.

use super::{
    console::{Browser, assert_inert, field, key},
    history::TOKEN,
    webhook_form::{hidden, line, managing, send, signed_in_with},
};
use crate::support::{
    api::Api,
    daemon::{Setup, subscriber},
    eventually,
    queue::Queue,
    receiver::{Receiver, event, status},
    run,
};

const SAID: &str = "You were signed out meanwhile, and nothing was sent.";

/// Sends a form without a session, and signs in. Returns the browser, and the page that it is led
/// to.
async fn kept(api: &Api, path: &str, form: &[(&str, &str)]) -> (Browser, String) {
    let seen = Browser::new(api).post(path, form, &[]).await;
    assert!(seen.status == 401 && seen.text.contains("You were signed out"), "{}", seen.text);
    let (browser, seen) = signed_in_with(api, &hidden(&seen.text)).await;
    let to = seen.header("location").to_owned();
    assert!(to.starts_with(&format!("{path}?draft=")), "{to}");
    (browser, to)
}

#[test]
fn each_form_of_a_webhook_is_here_again_until_it_is_sent() {
    run(async {
        let (receiver, api) = (Receiver::accepting().await, Api::new());
        let setup = Setup::new(&Queue::embedded(), &managing(&api));
        let _daemon = setup.start().await;
        let form = [("name", "siem"), ("url", receiver.url.as_str()), ("format", "json")];

        // A new one. Its address says nothing of it once it is made.
        let (browser, to) = kept(&api, "/console/new-webhook", &form).await;
        let page = browser.page(&to).await;
        assert!(page.contains(SAID) && page.contains("value=\"siem\""), "{page}");
        let (own, draft) = (key(&page), field(&page, "draft"));
        let with = |more: &[(&'static str, &'static str)]| {
            let all = form.into_iter().chain(more.iter().copied());
            all.map(|(n, v)| (n.to_owned(), v.to_owned()))
                .chain([("form_key".to_owned(), own.clone()), ("draft".to_owned(), draft.clone())])
                .collect::<Vec<_>>()
        };
        // What was not taken is still not sent, and its address goes on to say so.
        let wrong = with(&[("secret", "short")]);
        let wrong: Vec<_> = wrong.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        let seen = browser.post("/console/new-webhook", &wrong, &[]).await;
        assert!(seen.status == 400 && field(&seen.text, "draft") == draft, "{}", seen.text);
        assert!(browser.page(&to).await.contains(SAID));
        let right = with(&[]);
        let right: Vec<_> = right.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        assert_eq!(send(&browser, "/console/new-webhook", &right).await.status, 200);
        let page = browser.page(&to).await;
        assert!(!page.contains(SAID) && !page.contains("value=\"siem\""), "{page}");

        // A change.
        let edit = browser.page("/console/webhooks/siem/edit").await;
        let version = field(&edit, "version");
        let change = [form[1], form[2], ("version", version.as_str()), ("description", "typed")];
        let path = "/console/webhooks/siem/edit";
        let (browser, to) = kept(&api, path, &change).await;
        let page = browser.page(&to).await;
        assert!(page.contains(SAID) && line(&page, "description") == "typed", "{page}");
        let (own, draft) = (key(&page), field(&page, "draft"));
        let mut again = change.to_vec();
        again.extend([("form_key", own.as_str()), ("draft", draft.as_str())]);
        assert_eq!(send(&browser, path, &again).await.status, 303);
        let page = browser.page(&to).await;
        assert!(!page.contains(SAID) && field(&page, "version") != version, "{page}");

        // A new secret: its overlap is the typed one.
        let path = "/console/webhooks/siem/secret";
        let (browser, to) = kept(&api, path, &[("overlap", "0s")]).await;
        let page = browser.page(&to).await;
        assert!(page.contains(SAID) && line(&page, "overlap") == "0s", "{page}");
        let (own, draft) = (key(&page), field(&page, "draft"));
        let rotate = [("form_key", own.as_str()), ("draft", draft.as_str()), ("overlap", "0s")];
        let seen = browser.post(path, &rotate, &[]).await;
        assert!(seen.status == 200 && !seen.text.contains("signs too, until"), "{}", seen.text);
        let page = browser.page(&to).await;
        assert!(!page.contains(SAID) && line(&page, "overlap") == "24h", "{page}");

        // A removal: of the version that its page shows now, with the choice that was made.
        let path = "/console/webhooks/siem/remove";
        let old = [("version", version.as_str()), ("backlog", "drop")];
        let (browser, to) = kept(&api, path, &old).await;
        let page = browser.page(&to).await;
        assert!(page.contains(SAID), "{page}");
        assert!(page.contains("value=\"drop\" checked") && !page.contains("\"keep\" checked"));
        let (own, now) = (key(&page), field(&page, "version"));
        assert_ne!(now, version);
        let edited = kept(&api, "/console/webhooks/siem/edit", &change).await;
        let remove = [("form_key", own.as_str()), ("version", now.as_str()), ("backlog", "drop")];
        assert_eq!(browser.post(path, &remove, &[]).await.status, 303);

        // A change of one that is gone by now loses no text, and another webhook's is none.
        let (browser, to) = edited;
        let seen = browser.get(&to).await;
        assert!(seen.status == 404 && seen.text.contains("was removed meanwhile"), "{}", seen.text);
        assert!(line(&seen.text, "description") == "typed" && seen.text.contains(SAID));
        assert_inert(&seen.text, &to);
    });
}

#[test]
fn a_reason_is_filled_in_by_its_user_alone_and_a_form_that_is_too_long_is_not_kept_unsaid() {
    run(async {
        let (receiver, api) = (Receiver::accepting().await, Api::new());
        let config = managing(&api) + &subscriber("old", &receiver.url, "");
        let setup = Setup::new(&Queue::embedded(), &config);
        let _daemon = setup.start().await;
        let pause = "/console/webhooks/old/pause";
        let browser = Browser::signed_in(&api, TOKEN).await;
        let page = browser.page(&format!("{pause}?why=call+0900")).await;
        assert!(!page.contains("0900") && !page.contains(SAID), "{page}");

        let (browser, to) = kept(&api, pause, &[("why", "a look")]).await;
        let page = browser.page(&to).await;
        assert!(page.contains(SAID) && page.contains("value=\"a look\""), "{page}");
        let (own, draft) = (key(&page), field(&page, "draft"));
        let form = [("form_key", own.as_str()), ("draft", draft.as_str()), ("why", "a look")];
        assert_eq!(browser.post(pause, &form, &[]).await.status, 303);
        let page = browser.page(&to).await;
        assert!(!page.contains(SAID) && !page.contains("value=\"a look\""), "{page}");

        let long = "x".repeat(16 * 1024);
        let seen = Browser::new(&api).post(pause, &[("why", &long)], &[]).await;
        let is_said = seen.text.contains("nothing was done") && seen.text.contains("16 KiB");
        assert!(seen.status == 401 && is_said && !seen.text.contains("xxxx"), "{}", seen.text);
        assert!(hidden(&seen.text).contains(&("to".to_owned(), pause.to_owned())));
    });
}

#[test]
fn what_a_kept_form_was_to_send_or_delete_is_counted_again_and_its_address_is_no_mistake_later() {
    run(async {
        let (receiver, api, queue) = (Receiver::accepting().await, Api::new(), Queue::embedded());
        let broken = Receiver::start(|_, _| status(500)).await;
        let config = managing(&api)
            + &subscriber("old", &receiver.url, "")
            + &subscriber("dead", &broken.url, "retry = { max_attempts = 1 }");
        let setup = Setup::new(&queue, &config);
        let _daemon = setup.start().await;
        queue.publish("user.created", [event(0)]).await;
        receiver.wait_all(1).await;
        queue.wait_dead("dead", 1).await;

        let typed = [("since", "2020-01-01"), ("events", "user.*"), ("request", "an-old-key")];
        for (path, form, kept_field, counted) in [
            (
                "/console/webhooks/old/replay",
                &typed[..],
                // As it was counted.
                ("since", "2020-01-01T00:00:00.000Z"),
                ">1 event</strong>",
            ),
            (
                "/console/dead-letters/dead/purge",
                &[("reason", "exhausted"), ("most", "7")],
                ("reason", "exhausted"),
                ">1 dead letter</strong>",
            ),
        ] {
            let (browser, to) = kept(&api, path, form).await;
            eventually("it is counted", async || browser.get(&to).await.text.contains(counted))
                .await;
            let page = browser.page(&to).await;
            assert!(page.contains(SAID), "{page}");
            assert!(!page.contains("an-old-key") && !page.contains("value=\"7\""), "{page}");
            let all = hidden(page.rsplit("<form").next().expect("its form"));
            let is_kept =
                |(name, value): &(String, String)| (name.as_str(), value.as_str()) == kept_field;
            assert!(all.iter().any(is_kept), "{all:?}");
            let sent: Vec<_> = all.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
            for _ in 0..2 {
                let seen = browser.post(path, &sent, &[]).await;
                assert_eq!(seen.status, 303, "{path}: {}", seen.text);
            }
            // Its address knows no more of it, and is that of an empty form.
            let page = browser.page(&to).await;
            assert!(!page.contains(SAID) && !page.contains("an address"), "{page}");
        }
        let bearer = format!("Bearer {TOKEN}");
        let headers = [("authorization", bearer.as_str())];
        let replays = api.send("GET", "/api/v1/replays", &headers, "").await.json();
        assert_eq!(replays["replays"].as_array().map(Vec::len), Some(1), "{replays}");
        queue.wait_dead("dead", 0).await;
    });
}
