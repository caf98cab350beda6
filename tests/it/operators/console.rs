//! The console, as a browser without scripts sees it.

use std::collections::BTreeSet;

use serde_json::json;
use tokio::net::TcpListener;

use super::history::TOKEN;
use crate::support::{
    api::Api,
    daemon::{Daemon, Setup, subscriber},
    eventually,
    queue::Embedded,
    receiver::{Answer, Receiver, status},
    run,
};

/// The configuration's tokens beside [`TOKEN`].
pub(super) const OTHERS: &str = "
[[admin.tokens]]
name = \"looker\"
token = \"the-token-that-reads\"
role = \"read\"
[[admin.tokens]]
name = \"producer\"
token = \"the-token-that-publishes\"
role = \"intake\"
";

/// Texts that must be shown, and do nothing.
pub(super) const HOSTILE: [&str; 15] = [
    "\" onmouseover=\"alert(1)",
    " .. ",
    "ad\u{200b}min",
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "' onmouseover='alert(1)",
    "<svg/onload=alert(1)>",
    "<style>*{display:none}</style>",
    "</textarea></title><base href=//evil.example>",
    "javascript:alert(1)",
    "{{7*7}}${7*7}<%= 7*7 %>",
    "=cmd|' /C calc'!A0",
    "evil\u{202e}gpj.exe",
    "\u{0}\u{1b}[2J",
    "&lt;b&gt; &amp;amp; &#x3c;",
];

/// A browser that keeps the cookie and follows nothing.
pub(super) struct Browser {
    port: u16,
    client: reqwest::Client,
    cookie: Option<String>,
}

pub(super) struct Seen {
    pub(super) status: u16,
    headers: reqwest::header::HeaderMap,
    pub(super) text: String,
}

impl Seen {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or_default()
    }
}

impl Browser {
    pub(super) fn new(api: &Api) -> Self {
        Self::at(api.port)
    }

    fn at(port: u16) -> Self {
        let client = reqwest::Client::builder().no_proxy();
        let client = client.redirect(reqwest::redirect::Policy::none()).build().expect("a client");
        Self { port, client, cookie: None }
    }

    pub(super) async fn signed_in(api: &Api, token: &str) -> Self {
        Self::signed_in_at(api.port, token).await
    }

    pub(super) async fn signed_in_at(port: u16, token: &str) -> Self {
        let mut browser = Self::at(port);
        let seen = browser.sign_in(token, "/console/events?text=a").await;
        assert_eq!((seen.status, seen.header("location")), (303, "/console/events?text=a"));
        browser.cookie = Some(seen.header("set-cookie").split(';').next().expect("one").to_owned());
        browser
    }

    /// Sends a form of the sign-in, and keeps the cookie.
    pub(super) async fn signs_in(mut self, form: &[(&str, &str)]) -> (Self, Seen) {
        let seen = self.post("/console/sign-in", form, &[]).await;
        self.cookie = Some(seen.header("set-cookie").split(';').next().expect("one").to_owned());
        (self, seen)
    }

    pub(super) async fn sign_in(&self, token: &str, to: &str) -> Seen {
        self.post("/console/sign-in", &[("token", token), ("to", to)], &[]).await
    }

    pub(super) async fn send(&self, mut request: reqwest::RequestBuilder) -> Seen {
        if let Some(cookie) = &self.cookie {
            request = request.header("cookie", cookie);
        }
        let answer = request.send().await.expect("an answer");
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        Seen { status, headers, text: answer.text().await.expect("a body") }
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub(super) async fn get(&self, path: &str) -> Seen {
        self.send(self.client.get(self.url(path))).await
    }

    pub(super) async fn post(
        &self,
        path: &str,
        form: &[(&str, &str)],
        headers: &[(&str, &str)],
    ) -> Seen {
        let body = url::form_urlencoded::Serializer::new(String::new()).extend_pairs(form).finish();
        let mut request = self.client.post(self.url(path)).body(body);
        request = request.header("content-type", "application/x-www-form-urlencoded");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        self.send(request).await
    }

    /// A page that must be there, and as every page is.
    pub(super) async fn page(&self, path: &str) -> String {
        let seen = self.get(path).await;
        assert_eq!(seen.status, 200, "{path}: {}", seen.text);
        assert_headers(&seen, path);
        assert_inert(&seen.text, path);
        seen.text
    }
}

pub(super) fn assert_headers(seen: &Seen, path: &str) {
    let policy = seen.header("content-security-policy");
    for part in
        ["default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"]
    {
        assert!(policy.contains(part), "{path}: {policy}");
    }
    assert!(!policy.contains("unsafe"), "{path}: {policy}");
    assert_eq!(seen.header("x-content-type-options"), "nosniff", "{path}");
    assert_eq!(seen.header("referrer-policy"), "same-origin", "{path}");
    assert_eq!(seen.header("cache-control"), "no-store", "{path}");
    assert_eq!(seen.header("cross-origin-opener-policy"), "same-origin", "{path}");
    assert_eq!(seen.header("cross-origin-resource-policy"), "same-origin", "{path}");
}

/// All that begins with `<`, as a browser would read it: nothing but our own elements.
pub(super) fn assert_inert(page: &str, path: &str) {
    // The fields of many lines that a page has, each opened and closed once.
    let own_area =
        |field: &&str| page.contains(&format!("<textarea id=\"{field}\" name=\"{field}\""));
    let areas = ["events", "conditions", "redact"].iter().filter(|field| own_area(field)).count();
    assert_eq!([page.matches("<textarea").count(), page.matches("</textarea").count()], [areas; 2]);
    for tag in page.split('<').skip(1) {
        let tag = tag.split('>').next().unwrap_or_default();
        let name: String =
            tag.trim_start_matches('/').chars().take_while(char::is_ascii_alphanumeric).collect();
        assert!(
            !matches!(name.as_str(), "img" | "style" | "base" | "iframe" | "object"),
            "{path}: <{tag}>"
        );
        if name == "script" && !tag.starts_with('/') {
            assert!(tag.contains("type=\"module\" src=\"/console/assets/"), "{path}: <{tag}>");
        }
        let attributes = tag.split('"').step_by(2);
        for attribute in attributes {
            let attribute = attribute.trim();
            let attribute = attribute.strip_prefix(name.as_str()).unwrap_or(attribute).trim();
            assert!(
                !attribute.starts_with("on") && !attribute.starts_with("style="),
                "{path}: <{tag}>"
            );
        }
        assert!(!tag.contains("href=\"javascript:"), "{path}: <{tag}>");
    }
    // A field keeps what was typed, and turns nothing outside of it.
    let outside =
        page.split(" value=\"").map(|part| part.split_once('"').map_or(part, |(_, rest)| rest));
    let shown: String = outside.collect();
    assert!(
        !shown.contains(['\u{202e}', '\u{200b}', '\u{0}', '\u{1b}']),
        "{path}: control characters are spelled out"
    );
}

/// The addresses that a page leads to.
pub(super) fn links(page: &str) -> BTreeSet<String> {
    let found = page.split("href=\"").skip(1).filter_map(|rest| rest.split('"').next());
    found
        .map(|link| link.replace("&amp;", "&"))
        .filter(|link| link.starts_with("/console/"))
        .collect()
}

pub(super) fn hostile(n: usize, text: &str) -> String {
    let event = json!({
        "event": "user.changed",
        "description": format!("{n} {text}"),
        "actor": { "id": text, "type": text, "name": text },
        "resource": { "id": text, "type": text, "name": text },
        "timestamp": text,
        "changes": { text: { "from": text, "to": [text] } },
    });
    event.to_string()
}

/// An event for each hostile text.
pub(super) fn hostile_ones() -> impl Iterator<Item = String> {
    HOSTILE.iter().enumerate().map(|(n, text)| hostile(n, text))
}

/// A daemon whose receiver answers with each hostile text.
pub(super) async fn stage(api: &Api, admin: &str) -> (Embedded, Receiver, Setup, Daemon) {
    let queue = Embedded::new();
    const ANSWER: &str = "<script>alert('answer')</script> the path of a URL";
    let receiver = Receiver::start(|_, _| Answer { body: ANSWER, ..status(500) }).await;
    let text = api.section() + admin + SETTINGS + &subscriber("siem", &receiver.url, "");
    let setup = Setup::new(&queue, &text);
    let daemon = setup.start().await;
    (queue, receiver, setup, daemon)
}

pub(super) const SETTINGS: &str = "
[http]
allow_http = true
allow_private_addresses = true
[retry]
max_attempts = 1
";

#[test]
fn every_page_is_there_for_who_has_signed_in_and_what_strangers_wrote_is_inert() {
    run(async {
        let api = Api::new();
        let admin = format!("token = \"{TOKEN}\"\n{OTHERS}");
        let (_queue, _receiver, _setup, _daemon) = stage(&api, &admin).await;
        api.publish(TOKEN, hostile_ones()).await;
        let browser = Browser::signed_in(&api, TOKEN).await;
        eventually("all are shown, and their batch is dead", async || {
            let events = browser.get("/console/events").await.text;
            let dead = browser.get("/console/deliveries?state=dead").await.text;
            (0..HOSTILE.len()).all(|n| events.contains(&format!(">{n} "))) && dead.contains("msg_")
        })
        .await;

        // Every link of every page leads to a page.
        let mut seen = BTreeSet::from(["/console/".to_owned()]);
        let mut next: Vec<String> = seen.iter().cloned().collect();
        while let Some(path) = next.pop() {
            if path.starts_with("/console/assets/") {
                let asset = browser.get(&path).await;
                assert_eq!(asset.status, 200, "{path}");
                assert!(asset.header("cache-control").contains("immutable"), "{path}");
                continue;
            }
            if path.starts_with("/console/events/export?") {
                continue; // a file, and no page
            }
            let page = browser.page(&path).await;
            next.extend(links(&page).into_iter().filter(|link| seen.insert(link.clone())));
        }
        for path in [
            "/console/",
            "/console/events",
            "/console/webhooks",
            "/console/webhooks/siem",
            "/console/webhooks/siem/pause",
            "/console/webhooks/siem/replay",
            "/console/deliveries",
            "/console/replays",
            "/console/dead-letters",
            "/console/health",
        ] {
            assert!(seen.contains(path), "{path} is not linked to: {seen:?}");
        }
        assert!(seen.iter().any(|path| path.starts_with("/console/resend?id=msg_")), "{seen:?}");
        let form_key = key(&browser.page("/console/health").await);
        let inspect = "/console/health/inspect";
        let inspected = browser.post(inspect, &[("form_key", &form_key)], &[]).await;
        assert_eq!((inspected.status, inspected.header("location")), (303, "/console/health"));
        assert!(browser.page("/console/health").await.contains("endpoint of `siem`"));
        let events =
            seen.iter().filter(|path| path.starts_with("/console/events/") && !path.contains('?'));
        let events = events.count();
        assert_eq!(events, HOSTILE.len(), "a page for each event: {seen:?}");
        assert!(seen.contains("/console/dead-letters/siem"), "{seen:?}");

        let first = browser.page("/console/events?text=3+script").await;
        let event = links(&first).into_iter().find(|l| l.starts_with("/console/events/"));
        let event = browser.page(&event.expect("a link to the event")).await;
        for shown in ["&lt;script&gt;alert(1)&lt;/script&gt;", "exhausted", "Changes", "siem"] {
            assert!(event.contains(shown), "{shown}: {event}");
        }

        // What was typed stays, and the mistake stands beside it.
        let wrong = browser.get("/console/events?since=last+week&type=a.%23&actor=%22%3E").await;
        assert_eq!(wrong.status, 400);
        assert_inert(&wrong.text, "a wrong filter");
        for part in [
            "value=\"last week\"",
            "aria-invalid=\"true\"",
            "value=\"a.#\"",
            "value=\"&quot;&gt;\"",
            "is no time: write one such as",
        ] {
            assert!(wrong.text.contains(part), "{part}: {}", wrong.text);
        }
        for (path, status) in [
            ("/console/nothing", 404),
            ("/console/events/999999", 404),
            ("/console/events/x", 400),
            ("/console/deliveries/%3Cscript%3E", 404),
            ("/console/dead-letters/%3Cscript%3E", 404),
            ("/console/deliveries?state=odd", 400),
            ("/console/events?cursor=garbage", 400),
            ("/console/events?page=2", 400),
            ("/console/deliveries/%FF", 400),
            ("/console/dead-letters/%FF", 400),
            ("/console/sign-out", 404),
            ("/console/webhooks/%3Cscript%3E", 404),
            ("/console/webhooks/nobody/pause", 404),
            ("/console/resend?id=.", 404),
            ("/console/delivery?id=.", 404),
            ("/console/replays/none/cancel", 404),
            ("/console/replays?cursor=garbage", 400),
        ] {
            let seen = browser.get(path).await;
            assert_eq!(seen.status, status, "{path}: {}", seen.text);
            assert_headers(&seen, path);
            assert_inert(&seen.text, path);
        }
    });
}

#[test]
fn who_has_no_session_sees_the_sign_in_alone_and_no_other_site_can_use_one() {
    run(async {
        let api = Api::new();
        let admin = format!("token = \"{TOKEN}\"\n{OTHERS}");
        let (_queue, _receiver, setup, daemon) = stage(&api, &admin).await;
        let bearer = [
            ("content-type", "application/json"),
            ("authorization", "Bearer the-token-that-publishes"),
        ];
        let answer = api.send("POST", "/api/v1/events", &bearer, &hostile(0, "secret")).await;
        assert_eq!(answer.status, 202, "{answer:?}");

        let stranger = Browser::new(&api);
        for path in ["/console/", "/console/events", "/console/events/1", "/console/nothing"] {
            let seen = stranger.get(path).await;
            assert_eq!((seen.status, seen.header("www-authenticate")), (401, "Bearer"), "{path}");
            assert_headers(&seen, path);
            assert!(
                seen.text.contains("name=\"token\"") && !seen.text.contains("secret"),
                "{path}"
            );
            assert!(seen.text.contains(&format!("name=\"to\" value=\"{path}\"")), "{}", seen.text);
        }
        for (token, status) in [("wrong", 401), ("", 401), ("the-token-that-publishes", 403)] {
            let seen = stranger.sign_in(token, "/console/\"><script>alert(1)</script>").await;
            assert_eq!((seen.status, seen.header("set-cookie")), (status, ""), "{token}");
            assert_inert(&seen.text, token);
            assert!(seen.text.contains("aria-invalid"), "{}", seen.text);
        }
        let form = [("token", TOKEN), ("to", "/console/")];
        let elsewhere =
            stranger.post("/console/sign-in", &form, &[("origin", "https://evil.example")]).await;
        assert_eq!((elsewhere.status, elsewhere.header("set-cookie")), (403, ""));
        // No other site is gone to afterwards.
        for to in
            ["//evil.example", "https://evil.example", "/console/\\evil", "/api/v1/reload", ""]
        {
            assert_eq!(stranger.sign_in(TOKEN, to).await.header("location"), "/console/", "{to}");
        }
        let cookie = stranger.sign_in(TOKEN, "").await.header("set-cookie").to_owned();
        assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");

        // The role is that of the token: a receiver's answers may tell the path of its URL.
        let (admin, looker) = (
            Browser::signed_in(&api, TOKEN).await,
            Browser::signed_in(&api, "the-token-that-reads").await,
        );
        let mut delivery = String::new();
        eventually("it has failed", async || {
            let dead = links(&admin.get("/console/deliveries?state=dead").await.text);
            delivery = dead
                .into_iter()
                .find(|l| l.starts_with("/console/deliveries/msg_"))
                .unwrap_or_default();
            !delivery.is_empty()
        })
        .await;
        assert!(admin.page(&delivery).await.contains("the path of a URL"));
        let seen = looker.page(&delivery).await;
        assert!(seen.contains("answered 500") && !seen.contains("the path of a URL"), "{seen}");
        let dead = "/console/dead-letters/siem";
        assert!(admin.page(dead).await.contains("the path of a URL"));
        let seen = looker.page(dead).await;
        assert!(seen.contains("status 500") && !seen.contains("the path of a URL"), "{seen}");
        let is_one = |link: &String| {
            let one = link.strip_prefix("/console/dead-letters/siem/").unwrap_or_default();
            !matches!(one.split('?').next(), Some("" | "replay" | "purge"))
        };
        let one = links(&seen).into_iter().find(is_one).expect("a link to one");
        assert!(admin.page(&one).await.contains("the path of a URL"));
        let seen = looker.page(&one).await;
        assert!(seen.contains("status 500") && !seen.contains("the path of a URL"), "{seen}");
        let reads = [("authorization", "Bearer the-token-that-reads")];
        let seen = api.send("GET", "/api/v1/subscribers/siem/dead", &reads, "").await;
        assert_eq!(seen.json()["letters"][0]["error"], "status 500");

        // Another site's page has no page fetched unseen; a link there leads to one.
        let fetched = |site: &str, mode: &str| {
            let request = admin.client.get(admin.url("/console/events"));
            admin.send(request.header("sec-fetch-site", site).header("sec-fetch-mode", mode))
        };
        assert_eq!(fetched("same-site", "no-cors").await.status, 403);
        assert_eq!(fetched("cross-site", "navigate").await.status, 200);
        assert_eq!(fetched("same-origin", "cors").await.status, 200);
        let request = stranger.client.get(stranger.url("/console/events"));
        let request =
            request.header("sec-fetch-site", "cross-site").header("sec-fetch-mode", "navigate");
        let seen = stranger.send(request).await;
        assert!(
            seen.status == 401 && seen.text.contains("href=\"/console/events\""),
            "{}",
            seen.text
        );

        // Only a form of the session's own page signs it out.
        let (own, others) =
            (key(&admin.page("/console/").await), key(&looker.page("/console/").await));
        for (form, headers) in [
            (vec![], vec![]),
            (vec![("form_key", others.as_str())], vec![]),
            (vec![("form_key", own.as_str())], vec![("origin", "https://evil.example")]),
            (vec![("form_key", own.as_str())], vec![("sec-fetch-site", "cross-site")]),
        ] {
            let seen = admin.post("/console/sign-out", &form, &headers).await;
            assert_eq!((seen.status, seen.header("set-cookie")), (403, ""), "{form:?} {headers:?}");
        }
        let seen = admin.post("/console/sign-out", &[("form_key", &own)], &[]).await;
        assert_eq!((seen.status, seen.header("location")), (303, "/console/sign-in"));
        assert!(seen.header("set-cookie").contains("=; Path=/console; Max-Age=0"));

        // A token that is changed ends its sessions.
        assert!(daemon.stop().await.success());
        let text = std::fs::read_to_string(setup.config()).expect("reads");
        setup.write("hooktrail.toml", text.replace(TOKEN, "another-token-of-the-tests"));
        let _daemon = setup.start().await;
        assert_eq!(admin.get("/console/").await.status, 401);
        assert_eq!(looker.get("/console/").await.status, 200, "its token is the same");
    });
}

/// The form key of a page.
pub(super) fn key(page: &str) -> String {
    field(page, "form_key")
}

/// The value of a hidden field.
pub(super) fn field(page: &str, name: &str) -> String {
    let named = format!("type=\"hidden\" name=\"{name}\" value=\"");
    let (_, rest) = page.split_once(&named).expect(name);
    rest.split('"').next().expect("a value").to_owned()
}

/// An action's path, its form, and a part of the next page.
type Action<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);

const ACTIONS: [Action<'static>; 5] = [
    ("/console/webhooks/siem/pause", &[("why", "<b>moving</b>")], "Paused."),
    ("/console/webhooks/siem/resume", &[], "Resumed."),
    ("/console/webhooks/siem/retry", &[], "due now"),
    ("/console/webhooks/siem/test", &[], "Test: answered 500"),
    ("/console/webhooks/siem/replay", &[("since", "2020-01-01"), ("request", "r1")], "has begun"),
];

#[test]
fn an_action_is_done_by_a_form_of_its_own_session_and_role_alone_and_is_recorded() {
    run(async {
        let api = Api::new();
        let admin = format!("token = \"{TOKEN}\"\n{OTHERS}");
        let (_queue, _receiver, _setup, _daemon) = stage(&api, &admin).await;
        let (browser, looker) = (
            Browser::signed_in(&api, TOKEN).await,
            Browser::signed_in(&api, "the-token-that-reads").await,
        );
        let (own, others) =
            (key(&browser.page("/console/").await), key(&looker.page("/console/").await));
        let bearer = format!("Bearer {TOKEN}");
        let headers = [("content-type", "application/json"), ("authorization", bearer.as_str())];
        let answer = api.send("POST", "/api/v1/events", &headers, &hostile(0, "one")).await;
        assert_eq!(answer.status, 202, "{answer:?}");
        let mut delivery = String::new();
        eventually("its batch is dead", async || {
            let dead = links(&browser.get("/console/deliveries?state=dead").await.text);
            delivery = dead.into_iter().find(|l| l.contains("/msg_")).unwrap_or_default();
            !delivery.is_empty()
        })
        .await;
        let id = delivery.rsplit('/').next().expect("an id").to_owned();
        let resend: Action<'_> = ("/console/resend", &[("id", id.as_str())], "It is sent again");
        let actions: Vec<Action<'_>> = ACTIONS.into_iter().chain([resend]).collect();

        // Who may not, sees no link to an action, and is refused.
        let seen = looker.page("/console/webhooks/siem").await;
        assert!(!seen.contains("Run Test") && !seen.contains("/siem/pause"), "{seen}");
        assert!(!looker.page(&delivery).await.contains("/console/resend"));
        for (path, form, _) in &actions {
            let with = |key: &'_ str| {
                form.iter()
                    .map(|(n, v)| (n.to_string(), v.to_string()))
                    .chain([("form_key".to_owned(), key.to_owned())])
                    .collect::<Vec<_>>()
            };
            for (from, key, headers) in [
                (&looker, others.as_str(), vec![]),
                (&browser, "", vec![]),
                (&browser, others.as_str(), vec![]),
                (&browser, own.as_str(), vec![("origin", "https://evil.example")]),
                (&browser, own.as_str(), vec![("sec-fetch-site", "cross-site")]),
            ] {
                let form = with(key);
                let form: Vec<_> = form.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
                let seen = from.post(path, &form, &headers).await;
                assert_eq!((seen.status, seen.header("location")), (403, ""), "{path} {headers:?}");
                assert_headers(&seen, path);
            }
            if !path.ends_with("/test") {
                let seen = looker.get(path).await;
                assert!(seen.status == 403 && !seen.text.contains("form was"), "{}", seen.text);
            }
        }
        let recorded = async || {
            let list = api.send("GET", "/api/v1/operations", &headers, "").await.json();
            let all = list["operations"].as_array().expect("operations").clone();
            all.iter()
                .rev()
                .map(|o| {
                    format!(
                        "{} {}",
                        o["what"].as_str().unwrap_or_default(),
                        o["by"].as_str().unwrap_or_default()
                    )
                })
                .collect::<Vec<_>>()
        };
        assert!(recorded().await.is_empty(), "nothing was done: {:?}", recorded().await);

        // Who may: the page that asks has the number, and the next page says what was done.
        let counted = browser.page("/console/webhooks/siem/replay?since=2020-01-01").await;
        assert!(counted.contains(">1 event<"), "{counted}");
        let until = field(&counted, "until");
        assert!(counted.contains(&format!(" on and before {until} will be sent")), "{counted}");
        for (n, (path, form, says)) in actions.iter().enumerate() {
            let form: Vec<_> = form.iter().copied().chain([("form_key", own.as_str())]).collect();
            let seen = browser.post(path, &form, &[]).await;
            assert_eq!(seen.status, 303, "{path}: {}", seen.text);
            let to = seen.header("location").to_owned();
            let next = browser.page(&to).await;
            assert!(next.contains(says) && !next.contains("<b>"), "{says}: {next}");
            // A notice is shown to its own session alone.
            assert!(!looker.page(&to).await.contains(says), "{says}");
            eventually("it is recorded", async || recorded().await.len() == n + 1).await;
        }
        let names = ["pause", "resume", "retry", "test", "replay", "resend"];
        assert_eq!(recorded().await, names.map(|name| format!("{name} token")));

        let wrong = [("since", "last week"), ("form_key", own.as_str())];
        let seen = browser.post("/console/webhooks/siem/replay", &wrong, &[]).await;
        assert!(seen.status == 400 && seen.text.contains("value=\"last week\""), "{}", seen.text);

        // A form that is sent again, as by a double click, begins nothing more.
        let page = browser.page("/console/webhooks/siem/replay?since=2020-01-01").await;
        let request = field(&page, "request");
        assert_ne!(request, field(&counted, "request"), "each page has a key of its own");
        let form = [
            ("since", "2020-01-01"),
            ("until", until.as_str()),
            ("request", request.as_str()),
            ("form_key", own.as_str()),
        ];
        for _ in 0..2 {
            let seen = browser.post("/console/webhooks/siem/replay", &form, &[]).await;
            assert_eq!(seen.status, 303, "{}", seen.text);
            assert!(browser.page(seen.header("location")).await.contains("has begun"));
        }
        let replays = api.send("GET", "/api/v1/replays", &headers, "").await.json();
        assert_eq!(replays["replays"].as_array().map(Vec::len), Some(2), "{replays}");
        let seen = browser.post("/console/webhooks/siem/replay", &[form[0], form[3]], &[]).await;
        assert_eq!(seen.status, 400, "without a key: {}", seen.text);

        let why = "x".repeat(5000);
        let long = [("why", why.as_str()), ("form_key", own.as_str())];
        let seen = browser.post("/console/webhooks/siem/pause", &long, &[]).await;
        assert!(seen.status == 400 && seen.text.contains("at most 4096 bytes"), "{}", seen.text);

        let gone = [("form_key", own.as_str())];
        let seen = browser.post("/console/webhooks/nobody/pause", &gone, &[]).await;
        assert_eq!(seen.status, 404, "{}", seen.text);
        let seen = browser.post("/console/replays/none/cancel", &gone, &[]).await;
        assert_eq!(seen.status, 404, "{}", seen.text);
    });
}

#[test]
fn a_webhooks_page_has_each_value_with_its_place_and_no_secret_and_the_path_for_an_admin_alone() {
    run(async {
        let api = Api::new();
        let admin = format!("token = \"{TOKEN}\"\n{OTHERS}");
        let queue = Embedded::new();
        let more = "headers = { \"X-Tenant\" = \"a-secret-tenant\" }\nhttp = { timeout = \"7s\" }";
        let text = api.section()
            + &admin
            + SETTINGS
            + &subscriber("siem", "http://127.0.0.1:9/hooks/in?key=a-secret-key", more);
        let setup = Setup::new(&queue, &text);
        let _daemon = setup.start().await;
        let written = std::fs::read_to_string(setup.config()).expect("reads");
        let line = |key: &str| 1 + written.lines().position(|l| l.starts_with(key)).expect(key);
        let admin = Browser::signed_in(&api, TOKEN).await.page("/console/webhooks/siem").await;
        let looker = Browser::signed_in(&api, "the-token-that-reads").await;
        let looker =
            looker.page("/console/webhooks/siem").await + &looker.page("/console/webhooks").await;
        for (key, place) in [
            ("url", "url = \"http"),
            ("http.timeout", "http = "),
            ("retry.max_attempts", "max_attempts"),
        ] {
            let (_, row) = admin.split_once(&format!("scope=\"row\">{key}</th>")).expect(key);
            let row = row.split("</tr>").next().expect("a row");
            assert!(row.contains(&format!("hooktrail.toml:{}<", line(place))), "{key}: {row}");
        }
        assert!(admin.contains("/hooks/in") && admin.contains("x-tenant"), "{admin}");
        assert!(!looker.contains("/hooks") && !looker.contains("x-tenant"), "{looker}");
        assert!(!admin.contains("a-secret") && !looker.contains("a-secret"));
        assert!(admin.contains("<svg class=\"chart\"") && admin.contains("<title>"), "{admin}");
    });
}

#[test]
fn a_webhooks_page_reads_the_retries_only_when_asked_and_waits_for_no_queue() {
    run(async {
        let api = Api::new();
        // It is connected to, and never answers.
        let silent = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = silent.local_addr().expect("an address").port();
        let text = format!("[queue]\nurl = \"amqp://127.0.0.1:{port}\"\n")
            + &api.section()
            + &format!("token = \"{TOKEN}\"\n")
            + SETTINGS
            + &subscriber("siem", "http://127.0.0.1:9/", "");
        let setup = Setup::with_text(&text);
        let daemon = setup.spawn();
        daemon.wait_log("admin listening").await;
        let browser = Browser::signed_in(&api, TOKEN).await;
        let page = browser.page("/console/webhooks/siem").await;
        let show = "/console/webhooks/siem?retries=show";
        assert!(links(&page).contains(show) && !page.contains("did not answer"), "{page}");
        assert!(browser.page(show).await.contains("the queue did not answer within 5 s"));
    });
}

#[test]
fn without_a_token_the_console_says_how_to_get_one() {
    run(async {
        let api = Api::new();
        let (_queue, _receiver, _setup, _daemon) = stage(&api, "").await;
        let browser = Browser::new(&api);
        for path in ["/console/", "/console/events", "/console/sign-in"] {
            let seen = browser.get(path).await;
            assert_eq!(seen.status, 403, "{path}");
            assert!(
                seen.text.contains("[admin]") && seen.text.contains("hooktrail init"),
                "{path}"
            );
        }
        assert_eq!(browser.sign_in("", "").await.status, 403);
        assert_eq!(browser.get("/console").await.header("location"), "/console/");
    });
}

#[test]
fn behind_a_proxy_with_tls_one_host_and_origin_are_taken_and_the_cookie_is_its_alone() {
    run(async {
        let api = Api::new();
        let admin =
            format!("public_url = \"https://Hooks.example:8443/\"\ntoken = \"{TOKEN}\"\n{OTHERS}");
        let (_queue, _receiver, _setup, _daemon) = stage(&api, &admin).await;
        let mut browser = Browser::new(&api);
        const HOST: (&str, &str) = ("host", "hooks.example:8443");
        const ORIGIN: (&str, &str) = ("origin", "https://hooks.example:8443");
        let direct = browser.get("/console/").await;
        assert_eq!(direct.status, 421, "{}", direct.text);
        assert!(links_to(&direct.text, "https://hooks.example:8443/console/"), "{}", direct.text);
        for path in ["/console", "/console/events", "/console/sign-in", "/console/assets/x"] {
            assert_eq!(browser.get(path).await.status, 421, "{path}");
        }
        let form = [("token", TOKEN), ("to", "/console/health")];
        for origin in ["http://hooks.example:8443", "https://evil.example", "null"] {
            let seen = browser.post("/console/sign-in", &form, &[HOST, ("origin", origin)]).await;
            assert_eq!((seen.status, seen.header("set-cookie")), (403, ""), "{origin}");
        }
        let seen = browser.post("/console/sign-in", &form, &[HOST, ORIGIN]).await;
        assert_eq!((seen.status, seen.header("location")), (303, "/console/health"));
        let cookie = seen.header("set-cookie");
        assert!(cookie.starts_with("__Host-hooktrail_"), "{cookie}");
        assert!(cookie.contains("; Path=/; Secure;") && !cookie.contains("Domain"), "{cookie}");
        browser.cookie = Some(cookie.split(';').next().expect("one").to_owned());
        let get = |host: &str| {
            browser.send(browser.client.get(browser.url("/console/health")).header("host", host))
        };
        let page = get("HOOKS.example:8443").await;
        assert_eq!(page.status, 200, "{}", page.text);
        for host in ["hooks.example", "hooks.example:443", "evil.example:8443"] {
            assert_eq!(get(host).await.status, 421, "{host}");
        }
        let form_key = key(&page.text);
        let inspect = "/console/health/inspect";
        let own = [("form_key", form_key.as_str())];
        let seen = browser.post(inspect, &own, &[HOST, ("origin", "https://a.example")]).await;
        assert_eq!(seen.status, 403);
        assert_eq!(browser.post(inspect, &own, &[HOST, ORIGIN]).await.status, 303);
        let seen = browser.post("/console/sign-out", &own, &[HOST, ORIGIN]).await;
        assert!(seen.header("set-cookie").starts_with("__Host-hooktrail_"));

        // Programs on this machine, which send no origin, go on as before.
        let bearer = format!("Bearer {TOKEN}");
        let headers = [("authorization", bearer.as_str())];
        assert_eq!(api.send("GET", "/api/v1/subscribers", &headers, "").await.status, 200);
    });
}

fn links_to(page: &str, url: &str) -> bool {
    page.contains(&format!("href=\"{url}\""))
}
