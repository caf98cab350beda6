//! Access tokens by the client credentials grant (RFC 6749, section 4.4).

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{
    Client, Response, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue},
};
use serde::Deserialize;
use tokio::{
    sync,
    time::{error::Elapsed, timeout_at},
};
use url::form_urlencoded;

use super::{
    body::Progress,
    connections::Connections,
    errors::{self, NotAnswered},
};
use crate::{
    clock,
    config::{Auth, ClientCredentials, Subscriber},
    delivery::Failure,
    wording::span,
};

/// Bytes of an answer that are read.
const MAX_ANSWER: usize = 64 * 1024;

/// The time between two tokens that are fetched because the receiver refused the one before: who
/// refuses every token must not make the token endpoint busy.
const FORCED: Duration = Duration::from_secs(60);

/// The time after a failed fetch in which a token that is still valid is used without another.
const BREATH: Duration = Duration::from_secs(10);

/// How long a token is used that does not say how long it is valid, and at most.
const UNTOLD: Duration = Duration::from_secs(3600);
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// What `application/x-www-form-urlencoded` leaves as it is, without the space.
const FORM: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'*');

/// The errors of RFC 6749, section 5.2. Another text of the endpoint is not repeated.
const ERRORS: [&str; 6] = [
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "invalid_scope",
];

/// A subscriber's tokens: the one that is used, and the way to the next.
#[derive(Debug)]
pub(super) struct Tokens {
    grant: ClientCredentials,
    /// The longest time that an attempt waits for a token, whoever fetches it.
    timeout: Duration,
    /// The endpoint's address is a literal one that requests may not go to.
    blocked: Option<&'static str>,
    known: Mutex<Known>,
    /// One request at a time; how the client authenticated when it last got a token.
    fetching: sync::Mutex<Option<Authentication>>,
}

#[derive(Debug, Default)]
struct Known {
    token: Option<Token>,
    /// The number of tokens so far.
    fetched: u64,
    /// The last fetch, if it failed.
    failed: Option<(Instant, NoToken)>,
    /// When a token was last fetched because the one before was refused.
    forced_at: Option<Instant>,
}

/// How the client shows who it is (RFC 6749, section 2.3.1). Every server has to take the first; the
/// documentation of some knows the second alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Authentication {
    Basic,
    Body,
}

#[derive(Debug, Clone)]
pub(super) struct Token {
    value: HeaderValue,
    /// Which one it is.
    number: u64,
    fetched_at: Instant,
    lifetime: Duration,
}

/// Why there is no token.
#[derive(Debug, Clone)]
pub(super) enum NoToken {
    /// This process lacks something.
    Lacking(String),
    /// It may be there later.
    Away(String),
    /// As the configuration is, there will be none.
    Refused(String),
}

impl From<NoToken> for NotAnswered {
    fn from(why: NoToken) -> Self {
        match why {
            NoToken::Lacking(why) => Self::Unsent(why),
            NoToken::Away(why) | NoToken::Refused(why) => Self::Failed(Failure::Auth(why)),
        }
    }
}

impl Token {
    /// The headers with this token.
    pub(super) fn on(&self, mut headers: HeaderMap) -> HeaderMap {
        headers.insert(AUTHORIZATION, self.value.clone());
        headers
    }

    pub(super) const fn lifetime(&self) -> Duration {
        self.lifetime
    }

    /// The next one is fetched after four fifths of its life, so that none expires on its way.
    fn is_fresh(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.fetched_at) < self.lifetime.mul_f64(0.8)
    }

    fn is_valid(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.fetched_at) < self.lifetime
    }
}

impl Tokens {
    /// `None` for a subscriber that authenticates in another way.
    pub(super) fn of(subscriber: &Subscriber) -> Option<Self> {
        let Some(Auth::OAuth2(grant)) = &subscriber.auth else { return None };
        Some(Self {
            grant: grant.clone(),
            timeout: subscriber.http.timeout,
            blocked: subscriber.http.addresses.check_literal(grant.token_url.expose()).err(),
            known: Mutex::default(),
            fetching: sync::Mutex::default(),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token for the next request. One that is still valid is used while the next is fetched,
    /// and when that fails.
    pub(super) async fn current(&self, connections: &Connections) -> Result<Token, NoToken> {
        let asked = clock::instant();
        let deadline = asked + self.timeout;
        let valid = {
            let known = self.known();
            let token = known.token.as_ref().filter(|token| token.is_valid(asked));
            let failed = known.failed.as_ref();
            let has_just_failed =
                failed.is_some_and(|(at, _)| asked.saturating_duration_since(*at) < BREATH);
            match token {
                Some(token) if token.is_fresh(asked) || has_just_failed => return Ok(token.clone()),
                token => token.cloned(),
            }
        };
        let turn = match &valid {
            Some(valid) => match self.fetching.try_lock() {
                Ok(turn) => turn,
                Err(_) => return Ok(valid.clone()),
            },
            None => self.in_time(timeout_at(deadline.into(), self.fetching.lock()).await)?,
        };
        // What was fetched meanwhile is for all that waited.
        let meanwhile = {
            let known = self.known();
            let token = known.token.as_ref().filter(|token| token.fetched_at >= asked);
            let failed = known.failed.as_ref().filter(|(at, _)| *at >= asked);
            token.cloned().map(Ok).or_else(|| failed.map(|(_, why)| Err(why.clone())))
        };
        let next = match meanwhile {
            Some(result) => result,
            None => self.fetch(connections, turn, deadline).await,
        };
        next.or_else(|why| valid.filter(|token| token.is_valid(clock::instant())).ok_or(why))
    }

    /// A token instead of one that the receiver refused; `None` if it refused another one a short
    /// time ago.
    pub(super) async fn instead_of(
        &self,
        refused: &Token,
        connections: &Connections,
    ) -> Option<Result<Token, NoToken>> {
        let deadline = clock::instant() + self.timeout;
        let turn = timeout_at(deadline.into(), self.fetching.lock()).await;
        let turn = match self.in_time(turn) {
            Ok(turn) => turn,
            Err(why) => return Some(Err(why)),
        };
        {
            let mut known = self.known();
            if let Some(token) = known.token.as_ref().filter(|t| t.number != refused.number) {
                return Some(Ok(token.clone()));
            }
            let now = clock::instant();
            if known.forced_at.is_some_and(|at| now.saturating_duration_since(at) < FORCED) {
                return None;
            }
            known.forced_at = Some(now);
        }
        Some(self.fetch(connections, turn, deadline).await)
    }

    /// Fetches the next token.
    async fn fetch(
        &self,
        connections: &Connections,
        mut turn: sync::MutexGuard<'_, Option<Authentication>>,
        deadline: Instant,
    ) -> Result<Token, NoToken> {
        let granted = timeout_at(deadline.into(), self.granted(connections, &mut turn)).await;
        let granted = self.in_time(granted).and_then(|granted| granted);
        let mut known = self.known();
        known.failed = granted.as_ref().err().map(|why| (clock::instant(), why.clone()));
        let (value, lifetime) = granted?;
        known.fetched += 1;
        let token =
            Token { value, number: known.fetched, fetched_at: clock::instant(), lifetime };
        known.token = Some(token.clone());
        Ok(token)
    }

    fn in_time<T>(&self, result: Result<T, Elapsed>) -> Result<T, NoToken> {
        result.map_err(|_| {
            let why = format!("none within {}, which is http.timeout", span(self.timeout));
            NoToken::Away(self.about(&why))
        })
    }

    /// A reason, with the endpoint that it is about.
    fn about(&self, why: &str) -> String {
        format!("no token from {}: {why}", self.grant.token_url)
    }

    /// Asks the endpoint; returns the value of `authorization`, and how long it is valid.
    async fn granted(
        &self,
        connections: &Connections,
        known: &mut Option<Authentication>,
    ) -> Result<(HeaderValue, Duration), NoToken> {
        if let Some(what) = self.blocked {
            let why = format!("its address is not a public one ({what}); {}", super::EXCEPTIONS);
            return Err(NoToken::Refused(self.about(&why)));
        }
        let client = connections
            .single()
            .map_err(|why| NoToken::Away(self.about(&Failure::Internal(why).to_string())))?;
        let first = known.unwrap_or(Authentication::Basic);
        let answer = self.ask(&client, first).await?;
        let is_refusal =
            matches!(answer.status(), StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED);
        let (used, answer) = if is_refusal && known.is_none() {
            (Authentication::Body, self.ask(&client, Authentication::Body).await?)
        } else {
            (first, answer)
        };
        let granted = self.read(answer).await?;
        *known = Some(used);
        Ok(granted)
    }

    async fn ask(
        &self,
        client: &Client,
        authentication: Authentication,
    ) -> Result<Response, NoToken> {
        let ClientCredentials { token_url, client_id, client_secret, scope, audience } =
            &self.grant;
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("grant_type", "client_credentials");
        for (key, value) in [("scope", scope), ("audience", audience)] {
            if let Some(value) = value {
                form.append_pair(key, value);
            }
        }
        let mut request = client
            .post(token_url.expose().clone())
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        match authentication {
            Authentication::Basic => {
                let [id, secret] = [client_id.as_str(), client_secret.expose()]
                    .map(|text| utf8_percent_encode(text, FORM).to_string().replace("%20", "+"));
                request = request.basic_auth(id, Some(secret));
            }
            Authentication::Body => {
                form.append_pair("client_id", client_id);
                form.append_pair("client_secret", client_secret.expose());
            }
        }
        let sent = request.body(form.finish()).send().await;
        sent.map_err(|e| match errors::classify(e, &Progress::default(), false) {
            NotAnswered::Unsent(what) => NoToken::Lacking(what),
            NotAnswered::Failed(failure @ Failure::AddressBlocked(_)) => {
                NoToken::Refused(self.about(&failure.to_string()))
            }
            NotAnswered::Failed(failure) => NoToken::Away(self.about(&failure.to_string())),
        })
    }

    /// The token in an answer. No error repeats what the endpoint wrote.
    async fn read(&self, mut answer: Response) -> Result<(HeaderValue, Duration), NoToken> {
        let status = answer.status();
        let mut text = Vec::new();
        while let Ok(Some(chunk)) = answer.chunk().await {
            if text.len() + chunk.len() > MAX_ANSWER {
                let why = format!("its answer has more than {} KiB", MAX_ANSWER / 1024);
                return Err(NoToken::Refused(self.about(&why)));
            }
            text.extend_from_slice(&chunk);
        }
        if !status.is_success() {
            let said = serde_json::from_slice::<Refusal>(&text).ok();
            let known = |error: &&&str| said.as_ref().is_some_and(|said| said.error == **error);
            let error = ERRORS.iter().find(known).map(|error| format!(", {error}"));
            let why = self.about(&format!("it answered {}{}", status.as_u16(), error.unwrap_or_default()));
            let is_final = status.is_redirection()
                || (status.is_client_error()
                    && ![StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS]
                        .contains(&status));
            return Err(if is_final { NoToken::Refused(why) } else { NoToken::Away(why) });
        }
        let refused = |why: &str| NoToken::Refused(self.about(why));
        let granted: Granted = serde_json::from_slice(&text)
            .map_err(|_| refused("its answer is none of RFC 6749, section 5.1"))?;
        if !granted.token_type.is_none_or(|kind| kind.eq_ignore_ascii_case("bearer")) {
            return Err(refused("its tokens are of another type than Bearer"));
        }
        let is_token = |text: &String| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        let token = Some(granted.access_token).filter(is_token);
        let value = token.and_then(|token| HeaderValue::try_from(format!("Bearer {token}")).ok());
        let mut value = value.ok_or_else(|| refused("its token is none that a header can carry"))?;
        value.set_sensitive(true);
        let lifetime = match granted.expires_in {
            None => UNTOLD,
            Some(ExpiresIn::Number(seconds)) => lifetime(seconds),
            Some(ExpiresIn::Text(text)) => text.trim().parse().map_or(UNTOLD, lifetime),
        };
        Ok((value, lifetime))
    }
}

/// A successful answer (RFC 6749, section 5.1).
#[derive(Deserialize)]
struct Granted {
    access_token: String,
    token_type: Option<String>,
    expires_in: Option<ExpiresIn>,
}

/// Some write the number as a text.
#[derive(Deserialize)]
#[serde(untagged)]
enum ExpiresIn {
    Number(f64),
    Text(String),
}

/// Another answer (RFC 6749, section 5.2).
#[derive(Deserialize)]
struct Refusal {
    error: String,
}

fn lifetime(seconds: f64) -> Duration {
    // What is no number becomes 0.
    Duration::from_secs_f64(seconds.max(0.0).min(LONGEST.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::testing, crypto::tls::SystemRoots, endpoint::webhook::Lookup};

    #[test]
    fn what_an_answer_says_of_its_time_is_kept_within_a_day() {
        let of = |text: &str| {
            let granted = format!(r#"{{"access_token":"t","expires_in":{text}}}"#);
            let granted: Granted = serde_json::from_str(&granted).expect("an answer");
            match granted.expires_in {
                Some(ExpiresIn::Number(seconds)) => lifetime(seconds).as_secs(),
                Some(ExpiresIn::Text(text)) => text.parse().map_or(u64::MAX, |s| lifetime(s).as_secs()),
                None => u64::MAX,
            }
        };
        for (text, seconds) in [
            ("3599", 3599),
            ("\"3599\"", 3599),
            ("0", 0),
            ("-5", 0),
            ("0.5", 0),
            ("1e300", 86_400),
            ("\"NaN\"", 0),
            ("\"inf\"", 86_400),
        ] {
            assert_eq!(of(text), seconds, "{text}");
        }
    }

    #[tokio::test]
    async fn a_token_that_is_still_valid_is_used_when_there_is_no_other() {
        rustls::crypto::ring::default_provider().install_default().ok();
        let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr();
        let subscriber = testing::subscriber(
            "a",
            &format!(
                "url = \"https://example.com/\"\nhttp = {{ allow_http = true, allow_private_addresses = true }}\n\
                 auth = {{ oauth2 = {{ token_url = \"http://{}/\", client_id = \"c\", client_secret = \"s\" }} }}",
                closed.expect("an address")
            ),
        );
        let roots = SystemRoots::load().expect("roots");
        let connections =
            Connections::try_new(&subscriber, &roots, Lookup::of_system()).expect("builds");
        let tokens = Tokens::of(&subscriber).expect("fetches tokens");
        let now = clock::instant();
        let old = |age| Token {
            value: HeaderValue::from_static("Bearer t"),
            number: 1,
            fetched_at: now.checked_sub(Duration::from_secs(age)).expect("after the boot"),
            lifetime: Duration::from_secs(100),
        };
        let failed_at = || tokens.known().failed.as_ref().map(|(at, _)| *at);
        tokens.known().token = Some(old(50));
        assert!(tokens.current(&connections).await.is_ok() && failed_at().is_none(), "fresh");
        tokens.known().token = Some(old(90));
        let turn = tokens.fetching.lock().await;
        assert!(tokens.current(&connections).await.is_ok(), "another one fetches");
        drop(turn);
        assert!(tokens.current(&connections).await.is_ok() && failed_at().is_some(), "in vain");
        let first = failed_at();
        assert!(tokens.current(&connections).await.is_ok() && failed_at() == first, "not at once");
        tokens.known().token = Some(old(100));
        assert!(tokens.current(&connections).await.is_err() && failed_at() > first, "expired");
    }

    #[test]
    fn the_next_token_is_fetched_after_four_fifths_of_a_life() {
        let now = clock::instant();
        let token = |lifetime| Token {
            value: HeaderValue::from_static("Bearer t"),
            number: 1,
            fetched_at: now,
            lifetime: Duration::from_secs(lifetime),
        };
        let fresh = |lifetime, after| token(lifetime).is_fresh(now + Duration::from_secs(after));
        assert!(fresh(100, 79) && !fresh(100, 80) && !fresh(0, 0));
        let valid = |lifetime, after| token(lifetime).is_valid(now + Duration::from_secs(after));
        assert!(valid(100, 99) && !valid(100, 100) && !valid(0, 0));
    }
}
