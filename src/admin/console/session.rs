//! Sign-in: a token becomes a cookie, which is valid while the token is.
//!
//! Nothing is kept of a session. Its keys are derived from the token that signed in, so a token that
//! is changed or taken away ends its sessions, and the role is the one that the token has now.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, header};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use hkdf::Hkdf;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::{
    admin::guard::{Caller, Tokens},
    clock,
    config::{Role, Token},
};

/// The longest time of a session.
const LASTS: Duration = Duration::from_secs(12 * 60 * 60);

/// The use of a derived key (RFC 5869, section 3.2).
const SESSION: &[u8] = b"hooktrail console: session, 1";
const FORM: &[u8] = b"hooktrail console: form, 1";
const NAME: &[u8] = b"hooktrail console: name of the cookie, 1";

/// A session of a signed-in browser.
#[derive(Debug, Clone)]
pub(super) struct Session {
    pub(super) caller: Caller,
    /// The field of each form that changes something: no other site knows it.
    pub(super) form_key: String,
    token: Token,
    reach: Reach,
}

/// Where a browser sends a cookie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// To the pages, over any connection.
    Any,
    /// The browser came over TLS, and sends the cookie over nothing else.
    Tls,
    /// The same, and no other host can have set it: draft-ietf-httpbis-rfc6265bis, section 4.1.3.2.
    OneHost,
}

impl Reach {
    /// What begins a cookie's name.
    fn prefix(self) -> &'static str {
        if self == Self::OneHost { "__Host-" } else { "" }
    }

    /// The attributes of a cookie. One with the prefix has this path.
    fn attributes(self) -> &'static str {
        match self {
            Self::Any => "Path=/console",
            Self::Tls => "Path=/console; Secure",
            Self::OneHost => "Path=/; Secure",
        }
    }
}

/// Begins a session for a token. Returns it with the header that sets the cookie.
pub(super) fn begin(token: &Token, reach: Reach) -> (Session, HeaderValue) {
    let until = clock::unix_seconds(clock::now() + LASTS);
    let content = content(until, &clock::session_id());
    let seal = BASE64.encode(tag(token, SESSION, content.as_bytes()));
    let value = format!("{content}.{seal}");
    (Session::new(token, &value, reach), cookie(token, &value, LASTS, reach))
}

impl Session {
    /// The session of a cookie's value.
    fn new(token: &Token, value: &str, reach: Reach) -> Self {
        let form_key = BASE64.encode(tag(token, FORM, value.as_bytes()));
        Self { caller: Caller::of(token), form_key, token: token.clone(), reach }
    }
}

/// The header that ends a session in the browser.
pub(super) fn end(session: &Session) -> HeaderValue {
    cookie(&session.token, "", Duration::ZERO, session.reach)
}

/// The session of a request; `None` if there is none, it is over, or its token is not valid now.
pub(super) fn of(headers: &HeaderMap, tokens: &Tokens) -> Option<Session> {
    let given: Vec<(&str, &str)> = cookies(headers).collect();
    let reach = tokens.public_url().map_or(Reach::Any, |_| Reach::OneHost);
    tokens.iter().filter(|token| token.role.may(Role::Read)).find_map(|token| {
        let name = name(token, reach);
        // One of a longer path, which another program at this host has set, comes before it.
        let mut own = given.iter().filter(|(given, _)| *given == name).map(|(_, value)| *value);
        let value = own.find(|value| is_valid(token, value))?;
        Some(Session::new(token, value, reach))
    })
}

fn is_valid(token: &Token, value: &str) -> bool {
    let Some((content, seal)) = value.rsplit_once('.') else { return false };
    let until = content.split('.').next().and_then(|until| until.parse::<u64>().ok());
    let Ok(seal) = BASE64.decode(seal) else { return false };
    let is_sealed = mac(token, SESSION, content.as_bytes()).verify_slice(&seal).is_ok();
    is_sealed && until.is_some_and(|until| until > clock::unix_seconds(clock::now()))
}

fn content(until: u64, nonce: &str) -> String {
    format!("{until}.{nonce}")
}

/// The name of a token's cookie. The ports of a host share their cookies, so that each daemon there
/// needs a name of its own.
fn name(token: &Token, reach: Reach) -> String {
    let digits =
        tag(token, NAME, b"").iter().take(6).map(|b| format!("{b:02x}")).collect::<String>();
    format!("{}hooktrail_{digits}", reach.prefix())
}

fn cookie(token: &Token, value: &str, lasts: Duration, reach: Reach) -> HeaderValue {
    let text = format!(
        "{}={value}; {}; Max-Age={}; HttpOnly; SameSite=Strict",
        name(token, reach),
        reach.attributes(),
        lasts.as_secs()
    );
    HeaderValue::from_str(&text).expect("letters, digits and signs of ASCII")
}

/// The cookies of a request. Those of others may have any bytes.
fn cookies(headers: &HeaderMap) -> impl Iterator<Item = (&str, &str)> {
    let lines = headers.get_all(header::COOKIE).iter();
    let pairs = lines.flat_map(|line| line.as_bytes().split(|b| *b == b';'));
    pairs.filter_map(|pair| std::str::from_utf8(pair).ok()?.trim().split_once('='))
}

/// The code of a text under a key of the token's.
fn mac(token: &Token, usage: &[u8], text: &[u8]) -> Hmac<Sha256> {
    let mut key = [0; 32];
    Hkdf::<Sha256>::new(None, token.secret.expose().as_bytes())
        .expand(usage, &mut key)
        .expect("32 bytes are no more than HKDF gives");
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).expect("any length is a key");
    mac.update(text);
    mac
}

fn tag(token: &Token, usage: &[u8], text: &[u8]) -> [u8; 32] {
    mac(token, usage, text).finalize().into_bytes().into()
}

/// The session of an administrator.
#[cfg(test)]
pub(super) fn of_admin() -> Session {
    let secret = crate::crypto::secret::Secret::new("0123456789abcdef");
    let token = Token { name: "admin".into(), secret, role: Role::Admin };
    begin(&token, Reach::Any).0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::PublicUrl, crypto::secret::Secret};

    fn token(name: &str, secret: &str, role: Role) -> Token {
        Token { name: name.into(), secret: Secret::new(secret), role }
    }

    fn request(cookie: &HeaderValue) -> HeaderMap {
        let text = cookie.to_str().expect("text");
        let (pair, _) = text.split_once(';').expect("attributes");
        let pair = [b"a=\xff; ", pair.as_bytes()].concat();
        let pair = HeaderValue::from_bytes(&pair).expect("a header");
        HeaderMap::from_iter([(header::COOKIE, pair)])
    }

    #[test]
    fn a_session_is_its_tokens_and_ends_with_it() {
        let ann = token("ann.b", "one", Role::Admin);
        let tokens = Tokens::new(vec![token("ci", "two", Role::Intake), ann.clone()]);
        let cookie = begin(&ann, Reach::Any).1;
        let text = cookie.to_str().expect("text");
        for attribute in ["; HttpOnly", "; SameSite=Strict", "; Path=/console", "; Max-Age=43200"] {
            assert!(text.contains(attribute), "{text}");
        }
        let session = of(&request(&cookie), &tokens).expect("a session");
        assert_eq!(session.caller.token.as_deref(), Some("ann.b"));
        assert!(session.caller.sees_endpoints());
        assert!(!text.contains("Secure"), "{text}");
        assert!(
            begin(&ann, Reach::Tls).1.to_str().expect("text").contains("; Path=/console; Secure")
        );
        let again = of(&request(&begin(&ann, Reach::Tls).1), &tokens).expect("a session");
        assert_ne!(session.form_key, again.form_key, "each session has its own");

        // Behind a proxy no other host can have set it, and no cookie of another kind counts.
        let public = PublicUrl::try_new("https://hooks.example").expect("valid");
        let behind = tokens.clone().used_at(Some(public));
        let one_host = begin(&ann, Reach::OneHost).1;
        let text = one_host.to_str().expect("text");
        assert!(text.starts_with("__Host-hooktrail_") && !text.contains("/console"), "{text}");
        for part in ["; Path=/;", "; Secure", "; HttpOnly", "; SameSite=Strict"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(of(&request(&cookie), &behind).is_none());
        let session = of(&request(&one_host), &behind).expect("a session");
        assert!(end(&session).to_str().expect("text").starts_with("__Host-hooktrail_"));

        // The role is the token's of now.
        let read = Tokens::new(vec![token("ann.b", "one", Role::Read)]);
        assert!(of(&request(&cookie), &read).is_some_and(|s| !s.caller.sees_endpoints()));
        for without in [
            vec![token("ann.b", "other", Role::Admin)],
            vec![token("ann.b", "one", Role::Intake)],
            vec![],
        ] {
            assert!(of(&request(&cookie), &Tokens::new(without)).is_none());
        }
    }

    #[test]
    fn a_cookie_that_was_changed_or_is_over_is_none() {
        let ann = token("ann", "one", Role::Admin);
        let tokens = Tokens::new(vec![ann.clone()]);
        let over = content(clock::unix_seconds(clock::now()) - 1, "x");
        let sealed = |content: &str| {
            format!("{content}.{}", BASE64.encode(tag(&ann, SESSION, content.as_bytes())))
        };
        let to_come = content(clock::unix_seconds(clock::now()) + 60, "x");
        let good = sealed(&to_come);
        let header = |value: &str| {
            // Another program's cookie of the same name comes first.
            let value = format!("{0}=x; {0}={value}", name(&ann, Reach::Any));
            let value = HeaderValue::from_str(&value).expect("a header");
            HeaderMap::from_iter([(header::COOKIE, value)])
        };
        assert!(of(&header(&good), &tokens).is_some());
        let later = good.replacen(&to_come, &content(u64::MAX, "x"), 1);
        for wrong in [sealed(&over), later, to_come, String::new(), ".".into(), "a.b.c.d".into()] {
            assert!(of(&header(&wrong), &tokens).is_none(), "{wrong}");
        }
        assert!(of(&HeaderMap::new(), &tokens).is_none());
        let session = of(&header(&good), &tokens).expect("a session");
        assert!(of(&request(&end(&session)), &tokens).is_none());
    }
}
