//! The page where a token is given, and what slows wrong ones down.

use std::{
    borrow::Cow,
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::Response,
};
use maud::html;
use tokio::sync::Semaphore;
use url::Url;

use super::{
    form::Form,
    notices::DRAFT,
    page::{logo, outside},
};
use crate::clock;

/// The wait after the first wrong token of an address. Each further one doubles it.
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(8);

/// The time after which an address begins anew.
const FORGOTTEN: Duration = Duration::from_secs(600);

/// The most addresses that are remembered, and the most answers that wait.
const ADDRESSES: usize = 1024;
const WAITING: usize = 16;

/// Slows wrong tokens down, each address by itself. A valid token never waits. It is the length of a
/// token that keeps it from being found: this only keeps people and simple programs from trying.
#[derive(Debug)]
pub(super) struct Doorman {
    wrong: Mutex<HashMap<IpAddr, (u32, Instant)>>,
    waiting: Semaphore,
}

impl Default for Doorman {
    fn default() -> Self {
        Self { wrong: Mutex::default(), waiting: Semaphore::new(WAITING) }
    }
}

impl Doorman {
    /// Waits after a wrong token; false if too many wait already.
    pub(super) async fn wait(&self, address: IpAddr) -> bool {
        let wait = self.next_wait(address, clock::instant());
        let Ok(_place) = self.waiting.try_acquire() else { return false };
        tokio::time::sleep(wait).await;
        true
    }

    fn next_wait(&self, address: IpAddr, now: Instant) -> Duration {
        let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        if wrong.len() >= ADDRESSES {
            wrong.retain(|_, (_, at)| now.saturating_duration_since(*at) < FORGOTTEN);
        }
        if wrong.len() >= ADDRESSES && !wrong.contains_key(&address) {
            return LONGEST_WAIT;
        }
        let (before, at) = wrong.entry(address).or_insert((0, now));
        if now.saturating_duration_since(*at) >= FORGOTTEN {
            *before = 0;
        }
        let wait = FIRST_WAIT.saturating_mul(1 << (*before).min(16)).min(LONGEST_WAIT);
        (*before, *at) = (before.saturating_add(1), now);
        wait
    }
}

/// Where a browser wanted to go, and the form that it had filled in there.
pub(super) struct Onward {
    pub(super) to: String,
    pub(super) typed: Form,
}

/// What begins the name of a field of the page that keeps one of another form.
const TYPED: &str = "typed.";

/// The most fields of a form that is kept: none of our own has more.
const MAX_FIELDS: usize = 32;

/// The fields that are not kept: the secret, whose page would then hold it, and what is valid in its
/// own page alone: its keys, what was counted there, and the id of an earlier draft.
const NOT_KEPT: [&str; 6] = ["secret", "form_key", "request", "as_of", "most", DRAFT];

impl Onward {
    pub(super) fn page(to: &str) -> Self {
        Self { to: to.to_owned(), typed: Form::default() }
    }

    /// A form that was sent to a path, without its secrets. Each such path has a page too.
    pub(super) fn form(path: &str, form: Form) -> Self {
        let mut typed = NOT_KEPT.into_iter().fold(form, Form::without);
        let changed = match without_userinfo(typed.get("url")) {
            Cow::Owned(url) => Some(url),
            Cow::Borrowed(_) => None,
        };
        if let Some(url) = changed {
            typed = typed.with("url", url);
        }
        if typed.fields().count() > MAX_FIELDS {
            typed = Form::default();
        }
        Self { to: path.to_owned(), typed }
    }

    /// What the sign-in's own form carries on.
    pub(super) fn carried(sign_in: &Form) -> Self {
        Self { to: sign_in.get("to").to_owned(), typed: sign_in.below(TYPED) }
    }
}

/// A URL as it was typed, but for its userinfo: its password may be a secret, and so may its name.
pub(super) fn without_userinfo(typed: &str) -> Cow<'_, str> {
    match typed.trim().parse::<Url>() {
        Ok(mut url) if url.has_host() => {
            if url.username().is_empty() && url.password().is_none() {
                return typed.into();
            }
            // It has a host, or it would have no userinfo.
            url.set_password(None).ok();
            url.set_username("").ok();
            url.to_string().into()
        }
        // No URL of a host, and what stands before the last sign may be userinfo: a scheme was
        // forgotten or has a mistake, or something behind it has.
        _ => match typed.rsplit_once('@') {
            Some((before, rest)) => {
                let scheme = before.split_once("://").map_or("", |(scheme, _)| scheme).trim();
                let is_scheme = scheme.bytes().all(|b| b.is_ascii_alphanumeric());
                match is_scheme && !scheme.is_empty() {
                    true => format!("{scheme}://{rest}").into(),
                    false => rest.to_owned().into(),
                }
            }
            None => typed.into(),
        },
    }
}

/// The page's word on the last try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    Nothing,
    /// A form was sent, and its session was over.
    SignedOut,
    /// The same, and the form was too long to be kept, or did not arrive whole.
    NotKept,
    Wrong,
    /// The token is one that may only publish.
    MayNotLook,
    TooMany,
    Elsewhere,
    /// A link on another site led here: the browser sends no cookie with the first request.
    FromALink,
}

/// The page; it carries on what the browser wanted.
pub(super) fn page(said: Said, onward: &Onward) -> Response {
    let Onward { to, typed } = onward;
    let (status, why) = match said {
        Said::Nothing | Said::SignedOut | Said::NotKept | Said::FromALink => {
            (StatusCode::UNAUTHORIZED, None)
        }
        Said::Wrong => {
            (StatusCode::UNAUTHORIZED, Some("This is no token of this daemon's configuration."))
        }
        Said::MayNotLook => (
            StatusCode::FORBIDDEN,
            Some("This token has the role `intake`: it may publish events, and nothing else."),
        ),
        Said::TooMany => (
            StatusCode::TOO_MANY_REQUESTS,
            Some("Too many wrong tokens are being tried. Try again in a few seconds."),
        ),
        Said::Elsewhere => {
            (StatusCode::FORBIDDEN, Some("This came from a page of another site. Sign in here."))
        }
    };
    let mut answer = outside(
        status,
        "Sign in",
        html! {
            section.card.pad.sign-in {
                div.head { span.brand { (logo()) "hooktrail" } }
                h1 { "Sign in" }
                @if said == Said::FromALink && !to.is_empty() {
                    p { "A link on another site led here. If this browser is signed in: " a href=(to) { "open the page" } "." }
                }
                @if matches!(said, Said::SignedOut | Said::NotKept) {
                    div.note.warn role="status" {
                        p { strong { "You were signed out, and nothing was done." } " A browser stays signed in for 12 hours, and no longer than its token is valid." }
                        @if typed.fields().next().is_some() { p { "After the sign-in the form is here again as you filled it in, but for a signing secret, and the name and password in a URL." } }
                        @if said == Said::NotKept { p { "What you typed could not be kept: it has more than 16 KiB, or did not arrive whole. Go back in the browser, which may still have it, and copy it before you sign in." } }
                    }
                }
                form method="post" action="/console/sign-in" {
                    input type="hidden" name="to" value=(to);
                    @for (name, value) in typed.fields() { input type="hidden" name=(format!("{TYPED}{name}")) value=(value); }
                    // Password managers ask for a name to keep it under.
                    input.hidden type="text" name="username" value="hooktrail" autocomplete="username" tabindex="-1" aria-hidden="true" readonly;
                    div.field {
                        label for="token" { "Token" }
                        input id="token" name="token" type="password" autocomplete="current-password" required autofocus
                            aria-invalid=[why.map(|_| "true")] aria-describedby=(if why.is_some() { "wrong hint" } else { "hint" });
                        @if let Some(why) = why { span.wrong id="wrong" { (why) } }
                        span.sub id="hint" { code { "[admin] token" } " of the configuration, or one of " code { "[[admin.tokens]]" } " with the role " code { "admin" } " or " code { "read" } "." }
                    }
                    button.first { "Sign in" }
                }
            }
        },
    );
    if status == StatusCode::UNAUTHORIZED {
        // RFC 9110, section 11.6.1: each such answer has it. No browser asks for it by itself.
        let scheme = HeaderValue::from_static("Bearer");
        answer.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
    }
    answer
}

/// The page of a daemon without a token.
pub(super) fn needs_a_token() -> Response {
    outside(
        StatusCode::FORBIDDEN,
        "The console needs a token",
        html! {
            section.card.pad.sign-in {
                div.head { span.brand { (logo()) "hooktrail" } }
                h1 { "The console needs a token" }
                p { "Events and deliveries are shown only with a token, on this machine too, and this daemon's configuration has none." }
                p { "Add one, and start the daemon again:" }
                pre role="group" tabindex="0" aria-label="Lines of the configuration" { "[admin]\ntoken = \"${HOOKTRAIL_ADMIN_TOKEN}\"" }
                p.muted.small { code { "hooktrail init" } " writes a configuration with a new token; " code { "openssl rand -hex 32" } " makes one." }
            }
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wrong_token_of_an_address_waits_longer_and_others_do_not() {
        let doorman = Doorman::default();
        let now = clock::instant();
        let (one, other) = (IpAddr::from([127, 0, 0, 1]), IpAddr::from([127, 0, 0, 2]));
        let waits: Vec<u128> = (0..8).map(|_| doorman.next_wait(one, now).as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 8000, 8000]);
        assert_eq!(doorman.next_wait(other, now), FIRST_WAIT);
        assert_eq!(doorman.next_wait(one, now + FORGOTTEN), FIRST_WAIT);
        for n in 0..2 * ADDRESSES as u32 {
            doorman.next_wait(IpAddr::from(n.to_be_bytes()), now + FORGOTTEN);
        }
        let known = doorman.wrong.lock().expect("no panic").len();
        assert!(known <= ADDRESSES, "{known}");
    }

    #[test]
    fn a_url_is_kept_without_its_userinfo_whatever_is_wrong_with_it() {
        for (typed, kept) in [
            ("https://me:hunter2@host/x?y#z", "https://host/x?y#z"),
            ("https://hunter2@host/", "https://host/"),
            ("https://:hunter2@host:8443/", "https://host:8443/"),
            (" https:me:hunter2@host", "https://host/"),
            ("ws://me:hunter2@host/", "ws://host/"),
            // No scheme, and one without a host.
            ("me:hunter2@host/x", "host/x"),
            ("hunter2@host", "host"),
            ("//me:hunter2@host", "host"),
            ("me:hunt@er2@host", "host"),
            ("http//me:hunter2@host/", "host/"),
            // No host, or a port that is none.
            ("https://me:hunter2@", "https://"),
            ("https://me:hunter2@ho st/", "https://ho st/"),
            ("https://me:hunt/er2@host/", "https://host/"),
            ("https://me:hunter2@host:port/", "https://host:port/"),
            ("me:hunter2://x@host", "host"),
        ] {
            assert_eq!(without_userinfo(typed), kept, "{typed}");
        }
        for whole in [
            "",
            "host/x",
            "https://host/@me?to=a@b",
            "https://host/x?[redacted]",
            "http://[::1]:8080/",
            " https://host ",
        ] {
            assert!(matches!(without_userinfo(whole), Cow::Borrowed(same) if same == whole));
        }
    }

    #[tokio::test]
    async fn no_more_than_some_answers_wait_at_a_time() {
        let doorman = Doorman::default();
        let tries = (0..WAITING as u8 + 4).map(|n| doorman.wait(IpAddr::from([127, 0, 0, n])));
        let waited = futures_util::future::join_all(tries).await;
        assert_eq!(waited.iter().filter(|waited| **waited).count(), WAITING);
        assert!(doorman.wait(IpAddr::from([127, 0, 0, 1])).await, "there is room again");
    }
}
