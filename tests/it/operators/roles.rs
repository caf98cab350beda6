//! What the pages lead to, for who may act and for who may only look; and what is recorded of an
//! action.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{
    console::{Browser, HOSTILE, assert_inert, key, links},
    history::TOKEN,
    webhook_form::{managing, send},
};
use crate::support::{
    api::Api,
    daemon::{Setup, subscriber},
    eventually,
    queue::Queue,
    receiver::{Receiver, Request, event, status},
    run,
};

/// The last words of the addresses of actions.
const ACTIONS: [&str; 11] = [
    "pause", "resume", "retry", "replay", "purge", "resend", "cancel", "continue", "edit",
    "remove", "new",
];

/// Where the forms of a page are sent that change something.
fn posts(page: &str) -> BTreeSet<String> {
    let forms = page.split("<form ").skip(1).filter_map(|form| form.split('>').next());
    let posts = forms.filter(|form| form.contains("method=\"post\""));
    posts
        .filter_map(|form| form.split("action=\"").nth(1)?.split('"').next().map(str::to_owned))
        .collect()
}

/// Every page that the pages lead to, by its address.
async fn crawled(browser: &Browser) -> Vec<(String, String)> {
    let mut seen = BTreeSet::from(["/console/".to_owned()]);
    let mut next: Vec<String> = seen.iter().cloned().collect();
    let mut pages = Vec::new();
    while let Some(path) = next.pop() {
        if path.starts_with("/console/assets/") || path.starts_with("/console/events/export?") {
            continue;
        }
        let page = browser.page(&path).await;
        next.extend(links(&page).into_iter().filter(|link| seen.insert(link.clone())));
        pages.push((path, page));
    }
    pages
}

#[test]
fn who_may_only_look_is_led_to_no_action_and_strangers_words_are_inert_on_the_pages_of_actions() {
    run(async {
        let (receiver, api, queue) = (Receiver::accepting().await, Api::new(), Queue::embedded());
        let broken = Receiver::start(|_, _| status(500)).await;
        let config = managing(&api)
            + &subscriber("siem", &receiver.url, "")
            + &subscriber("dead", &broken.url, "retry = { max_attempts = 1 }");
        let setup = Setup::new(&queue, &config);
        let _daemon = setup.start().await;
        // A type is a stranger's text too, and so is a name without an id.
        let event = |text: &str| {
            let (actor, resource) = (json!({ "name": text }), json!({ "type": text }));
            json!({ "event": text, "actor": actor, "resource": resource }).to_string()
        };
        api.publish(TOKEN, HOSTILE.map(event)).await;
        let admin = Browser::signed_in(&api, TOKEN).await;
        eventually("history has all, and some are dead", async || {
            let types = admin.get("/console/new-webhook").await.text;
            let dead = admin.get("/console/dead-letters/dead").await.text;
            types.contains("<strong>15 fit</strong>") && dead.contains("Purge all")
        })
        .await;
        // The queue has a letter before history has its delivery, to which the letter's page leads.
        let bearer = format!("Bearer {TOKEN}");
        let headers = [("authorization", bearer.as_str())];
        eventually("all are dead, and history has what became of them", async || {
            let dead = api.send("GET", "/api/v1/subscribers/dead", &headers, "").await.json();
            // Each event is in one request: the counts of the queue can be as old as its last poll.
            let requests = broken.requests();
            let sent: usize = requests.iter().map(|r| r.events().len()).sum();
            let mut pages = BTreeSet::new();
            for letter in links(&admin.get("/console/dead-letters/dead").await.text) {
                let of_letter = links(&admin.get(&letter).await.text).into_iter();
                pages.extend(of_letter.filter(|l| l.starts_with("/console/deliveries/")));
            }
            let page = |r: &Request| format!("/console/deliveries/{}", r.id());
            let mut there = dead["in_hand"] == 0 && sent == HOSTILE.len();
            there &= requests.iter().map(page).all(|page| pages.contains(&page));
            for page in &pages {
                there &= admin.get(page).await.status == 200;
            }
            there
        })
        .await;
        let looker = Browser::signed_in(&api, "the-token-that-reads").await;
        let own = key(&admin.page("/console/").await);
        // A webhook of the console's own, a replay that was cancelled, and a pause with a stranger's reason.
        let made = [("form_key", own.as_str()), ("name", "own"), ("url", receiver.url.as_str())];
        assert_eq!(send(&admin, "/console/new-webhook", &made).await.status, 200);
        let replay = [
            ("form_key", own.as_str()),
            ("since", "2020-01-01"),
            ("rate", "1"),
            ("request", "a-key-of-a-page"),
        ];
        let begun = send(&admin, "/console/webhooks/siem/replay", &replay).await;
        assert_eq!(begun.status, 303, "{}", begun.text);
        let cancel = links(&admin.page("/console/replays").await);
        let cancel = cancel.into_iter().find(|link| link.ends_with("/cancel")).expect("it runs");
        let form = [("form_key", own.as_str())];
        assert_eq!(admin.post(&cancel, &form, &[]).await.status, 303);
        let why = HOSTILE.join(" ").replace('\0', "");
        let pause = [("form_key", own.as_str()), ("why", why.as_str())];
        assert_eq!(admin.post("/console/webhooks/siem/pause", &pause, &[]).await.status, 303);

        let all = crawled(&admin).await;
        let led: BTreeSet<&str> =
            all.iter().flat_map(|(path, _)| path.split('?').next()?.rsplit('/').next()).collect();
        for action in ACTIONS.iter().filter(|action| **action != "cancel") {
            assert!(led.contains(action), "{action}: {led:?}");
        }
        // What is no pattern is said beside its field.
        for text in HOSTILE {
            let filter = [("type", format!("{text}#"))];
            let mut query = url::form_urlencoded::Serializer::new(String::new());
            let path = format!("/console/events?{}", query.extend_pairs(filter).finish());
            let seen = admin.get(&path).await;
            assert!([200, 400].contains(&seen.status), "{path}: {}", seen.text);
            assert_inert(&seen.text, &path);
        }
        let forms: BTreeSet<String> = all.iter().flat_map(|(_, page)| posts(page)).collect();
        assert!(forms.len() > 10, "{forms:?}");
        // It is paused, so its page leads to the other one.
        let asked = admin.page("/console/webhooks/siem/pause").await;
        assert!(asked.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "{asked}");

        for (path, page) in crawled(&looker).await {
            for link in links(&page) {
                let last = link.split('?').next().and_then(|path| path.rsplit('/').next());
                let last = last.unwrap_or_default();
                let is_action = ACTIONS.contains(&last) || matches!(last, "secret" | "new-webhook");
                assert!(!is_action, "{path} leads to {link}");
            }
            for to in posts(&page) {
                let is_own = ["/console/sign-out", "/console/health/inspect"].contains(&&*to);
                assert!(is_own, "{path} has a form for {to}");
            }
        }
    });
}

#[test]
fn the_record_has_each_action_with_what_it_was_done_to_and_numbers_lead_to_what_they_count() {
    run(async {
        let (receiver, api, queue) = (Receiver::accepting().await, Api::new(), Queue::embedded());
        let broken = Receiver::start(|_, _| status(500)).await;
        let hour = "retry = { initial_interval = \"1h\", max_interval = \"1h\" }";
        let once = "retry = { max_attempts = 1 }";
        let config = managing(&api)
            + &subscriber("good", &receiver.url, "")
            + &subscriber("late", &broken.url, hour)
            + &subscriber("dead", &broken.url, once);
        let setup = Setup::new(&queue, &config);
        let _daemon = setup.start().await;
        queue.publish("user.created", [event(0)]).await;
        queue.wait_dead("dead", 1).await;
        let browser = Browser::signed_in(&api, TOKEN).await;
        let (retrying, dead) =
            ("/console/deliveries?subscriber=late&state=retrying", "/console/dead-letters/dead");
        for (path, to) in [
            ("/console/", retrying),
            ("/console/webhooks/late", retrying),
            ("/console/", dead),
            ("/console/webhooks/dead", dead),
        ] {
            eventually(&format!("{path} leads to {to}"), async || {
                links(&browser.get(path).await.text).contains(to)
            })
            .await;
            let page = browser.page(path).await;
            let (_, shown) = page.split_once(&to.replace('&', "&amp;")).expect("it is there");
            let shown = shown.split('<').next().and_then(|text| text.split('>').nth(1));
            let shown = shown.and_then(|text| text.split(' ').next()).unwrap_or_default();
            assert_eq!(shown, "1", "{path}");
        }
        assert!(links(&browser.page("/console/dead-letters").await).contains(dead));
        eventually("one is listed", async || {
            links(&browser.get(retrying).await.text)
                .iter()
                .filter(|link| link.contains("/msg_"))
                .count()
                == 1
        })
        .await;

        let own = key(&browser.page("/console/").await);
        let form = |more: &[(&'static str, String)]| {
            let own = [("form_key", own.clone())];
            own.into_iter().chain(more.iter().cloned()).collect::<Vec<_>>()
        };
        let draft = [("name", "new".to_owned()), ("url", format!("{}?key=hunter2", receiver.url))];
        let since = [("since", "2020-01-01".to_owned()), ("request", "a-key".to_owned())];
        for (path, more, expected) in [
            ("/console/webhooks/good/pause", form(&[("why", "a look".into())]), 303),
            ("/console/webhooks/good/resume", form(&[]), 303),
            ("/console/new-webhook/test", form(&draft), 200),
            ("/console/webhooks/good/replay", form(&since), 303),
        ] {
            let form: Vec<_> = more.iter().map(|(n, v)| (*n, v.as_str())).collect();
            let seen = send(&browser, path, &form).await;
            assert_eq!(seen.status, expected, "{path}: {}", seen.text);
        }
        let bearer = format!("Bearer {TOKEN}");
        let headers = [("authorization", bearer.as_str())];
        let mut all: Vec<Value> = Vec::new();
        eventually("all four are recorded", async || {
            let list = api.send("GET", "/api/v1/operations", &headers, "").await.json();
            all = list["operations"].as_array().cloned().unwrap_or_default();
            all.len() == 4
        })
        .await;
        let of = |what: &str| {
            let one = all.iter().find(|o| o["what"] == what).unwrap_or_else(|| panic!("{all:?}"));
            assert_eq!(one["by"], "token", "{one}");
            (one["subject"].clone(), one["details"].as_str().unwrap_or_default().to_owned())
        };
        let origin = receiver.url.trim_end_matches('/');
        assert_eq!(of("pause").0, "good");
        assert_eq!(of("resume").0, "good");
        let (subject, details) = of("test");
        assert_eq!(subject, "new");
        assert!(details.starts_with("not saved, to http://127.0.0.1:"), "{details}");
        assert!(origin.starts_with(details.trim_start_matches("not saved, to ")), "{details}");
        let (subject, details) = of("replay");
        assert!(subject == "good" && details.ends_with(" since 2020-01-01T00:00:00Z"), "{details}");
    });
}
