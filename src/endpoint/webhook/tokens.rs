//! Access tokens by the client credentials grant (RFC 6749, section 4.4).

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use reqwest::{
    Response, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue},
};
use serde::Deserialize;
use tokio::{
    sync::{self, OwnedMutexGuard},
    time::{error::Elapsed, sleep_until, timeout_at},
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

/// The time after a failed fetch without another: it doubles from the first to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// How long a token is used that does not say how long it is valid, and at most.
const UNTOLD: Duration = Duration::from_secs(3600);
const LONGEST: Duration = Duration::from_secs(24 * 3600);

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
    /// One request at a time.
    fetching: Arc<sync::Mutex<Turn>>,
}

#[derive(Debug, Default)]
struct Known {
    token: Option<Token>,
    /// The number of tokens so far.
    fetched: u64,
    /// The last fetch, if it failed.
    failed: Option<Failed>,
    /// When a token was last fetched because the one before was refused.
    forced_at: Option<Instant>,
}

#[derive(Debug, Clone)]
struct Failed {
    at: Instant,
    why: NoToken,
    /// In a row.
    times: u32,
}

/// What the fetches know of each other.
#[derive(Debug, Default)]
struct Turn {
    /// How the client authenticated when it last got a token.
    authentication: Option<Authentication>,
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
            fetching: Arc::default(),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token for the next request. One that is still valid is used while the next is fetched,
    /// and when that fails.
    pub(super) async fn current(
        self: &Arc<Self>,
        connections: &Arc<Connections>,
    ) -> Result<Token, NoToken> {
        let asked = clock::instant();
        let deadline = asked + self.timeout;
        let (valid, paused_until) = {
            let known = self.known();
            let token = known.token.as_ref().filter(|token| token.is_valid(asked));
            (token.cloned(), known.failed.as_ref().map(|failed| self.paused_until(failed)))
        };
        if let Some(valid) = valid {
            if !valid.is_fresh(asked)
                && paused_until.is_none_or(|until| until <= asked)
                && let Ok(turn) = self.fetching.clone().try_lock_owned()
            {
                let (tokens, connections) = (self.clone(), connections.clone());
                tokio::spawn(async move { tokens.fetch(&connections, turn, deadline).await.ok() });
            }
            return Ok(valid);
        }
        let turn = self.turn(deadline).await?;
        let meanwhile = {
            let known = self.known();
            known.token.clone().filter(|token| token.fetched_at >= asked)
        };
        match meanwhile {
            Some(token) => Ok(token),
            None => self.next(connections, turn, asked, deadline).await,
        }
    }

    /// A token instead of one that the receiver refused; `None` if there is none, or the receiver
    /// refused another one a short time ago.
    pub(super) async fn instead_of(
        &self,
        refused: &Token,
        connections: &Connections,
    ) -> Option<Token> {
        let asked = clock::instant();
        let deadline = asked + self.timeout;
        let turn = self.turn(deadline).await.ok()?;
        {
            let mut known = self.known();
            let other = known.token.as_ref().filter(|token| token.number != refused.number);
            if let Some(token) = other.filter(|token| token.is_valid(asked)) {
                return Some(token.clone());
            }
            if known.forced_at.is_some_and(|at| asked.saturating_duration_since(at) < FORCED) {
                return None;
            }
            // It is not used any more, whatever comes.
            known.token = None;
        }
        let token = self.next(connections, turn, asked, deadline).await.ok()?;
        self.known().forced_at = Some(clock::instant());
        Some(token)
    }

    async fn turn(&self, deadline: Instant) -> Result<OwnedMutexGuard<Turn>, NoToken> {
        self.in_time(timeout_at(deadline.into(), self.fetching.clone().lock_owned()).await)
    }

    /// Until when nothing is fetched after a failure: an endpoint that is down, or refuses the
    /// client, is not asked for each batch.
    fn paused_until(&self, failed: &Failed) -> Instant {
        let pause = FIRST_PAUSE * 2_u32.saturating_pow(failed.times.min(16) - 1);
        failed.at + pause.min(MAX_PAUSE).min(self.timeout / 2)
    }

    /// Fetches a token, when the pause after a failure is over. A failure since `asked` is for all
    /// that waited for it.
    async fn next(
        &self,
        connections: &Connections,
        turn: OwnedMutexGuard<Turn>,
        asked: Instant,
        deadline: Instant,
    ) -> Result<Token, NoToken> {
        let failed = self.known().failed.clone();
        if let Some(failed) = failed {
            if failed.at >= asked {
                return Err(failed.why);
            }
            sleep_until(self.paused_until(&failed).min(deadline).into()).await;
        }
        self.fetch(connections, turn, deadline).await
    }

    async fn fetch(
        &self,
        connections: &Connections,
        mut turn: OwnedMutexGuard<Turn>,
        deadline: Instant,
    ) -> Result<Token, NoToken> {
        let granted =
            timeout_at(deadline.into(), self.granted(connections, &mut turn.authentication)).await;
        let granted = self.in_time(granted).and_then(|granted| granted);
        let mut known = self.known();
        let at = clock::instant();
        match granted {
            Ok((value, lifetime)) => {
                known.fetched += 1;
                let token = Token { value, number: known.fetched, fetched_at: at, lifetime };
                (known.token, known.failed) = (Some(token.clone()), None);
                Ok(token)
            }
            Err(why) => {
                let times = known.failed.as_ref().map_or(0, |failed| failed.times) + 1;
                known.failed = Some(Failed { at, why: why.clone(), times });
                Err(why)
            }
        }
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
        let first = known.take().unwrap_or(Authentication::Basic);
        let result = self.ask(connections, first).await;
        let (used, result) = match result {
            Err(Unanswered::Said(said)) if said.may_be_about_authentication() => {
                let other = first.other();
                match self.ask(connections, other).await {
                    // It is the other way that is not known there.
                    Err(Unanswered::Said(again)) if again.may_be_about_authentication() => {
                        (first, Err(Unanswered::Said(said)))
                    }
                    result => (other, result),
                }
            }
            result => (first, result),
        };
        match result {
            Ok(granted) => {
                *known = Some(used);
                Ok(granted)
            }
            Err(Unanswered::Said(said)) => Err(said.no_token(self)),
            Err(Unanswered::No(why)) => Err(why),
        }
    }

    /// The request's `authorization` and its body.
    fn request(&self, authentication: Authentication) -> (Option<String>, String) {
        let ClientCredentials { client_id, client_secret, scope, audience, .. } = &self.grant;
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("grant_type", "client_credentials");
        for (key, value) in [("scope", scope), ("audience", audience)] {
            if let Some(value) = value {
                form.append_pair(key, value);
            }
        }
        match authentication {
            Authentication::Basic => {
                let encoded = |text: &str| {
                    form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>()
                };
                let (id, secret) = (encoded(client_id), encoded(client_secret.expose()));
                let basic = format!("Basic {}", BASE64.encode(format!("{id}:{secret}")));
                (Some(basic), form.finish())
            }
            Authentication::Body => {
                form.append_pair("client_id", client_id);
                form.append_pair("client_secret", client_secret.expose());
                (None, form.finish())
            }
        }
    }

    async fn ask(
        &self,
        connections: &Connections,
        authentication: Authentication,
    ) -> Result<(HeaderValue, Duration), Unanswered> {
        let url = self.grant.token_url.expose();
        let internal = |why: String| {
            Unanswered::No(NoToken::Away(self.about(&Failure::Internal(why).to_string())))
        };
        let client = connections.single().map_err(internal)?;
        let (authorization, form) = self.request(authentication);
        let mut request = client
            .post(url.clone())
            .header(ACCEPT, "application/json")
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded");
        if let Some(basic) = authorization {
            let mut basic = HeaderValue::try_from(basic).map_err(|e| internal(e.to_string()))?;
            basic.set_sensitive(true);
            request = request.header(AUTHORIZATION, basic);
        }
        let only_v4 = connections.only_v4(url);
        let sent = request.body(form).send().await;
        let answer = sent.map_err(|e| {
            Unanswered::No(match errors::classify(e, &Progress::default(), only_v4) {
                NotAnswered::Unsent(what) => NoToken::Lacking(what),
                NotAnswered::Failed(failure @ Failure::AddressBlocked(_)) => {
                    NoToken::Refused(self.about(&failure.to_string()))
                }
                NotAnswered::Failed(failure) => NoToken::Away(self.about(&failure.to_string())),
            })
        })?;
        self.read(answer).await
    }

    /// The token in an answer. No error repeats what the endpoint wrote.
    async fn read(&self, mut answer: Response) -> Result<(HeaderValue, Duration), Unanswered> {
        let refused = |why: &str| Unanswered::No(NoToken::Refused(self.about(why)));
        let status = answer.status();
        let mut text = Vec::new();
        loop {
            match answer.chunk().await {
                Ok(None) => break,
                Ok(Some(chunk)) if text.len() + chunk.len() > MAX_ANSWER => {
                    return Err(refused("its answer has more than 64 KiB"));
                }
                Ok(Some(chunk)) => text.extend_from_slice(&chunk),
                Err(_) => {
                    let why = self.about("its answer has no end");
                    return Err(Unanswered::No(NoToken::Away(why)));
                }
            }
        }
        if !status.is_success() {
            let said = serde_json::from_slice::<Refusal>(&text).ok();
            let known = |error: &&&str| said.as_ref().is_some_and(|said| said.error == **error);
            let error = ERRORS.iter().find(known).copied();
            return Err(Unanswered::Said(Said { status, error }));
        }
        let granted: Granted = serde_json::from_slice(&text)
            .map_err(|_| refused("its answer is none of RFC 6749, section 5.1"))?;
        if !granted.token_type.is_none_or(|kind| kind.eq_ignore_ascii_case("bearer")) {
            return Err(refused("its tokens are of another type than Bearer"));
        }
        let is_token =
            |text: &String| !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic());
        let token = Some(granted.access_token).filter(is_token);
        let value = token.and_then(|token| HeaderValue::try_from(format!("Bearer {token}")).ok());
        let mut value =
            value.ok_or_else(|| refused("its token is none that a header can carry"))?;
        value.set_sensitive(true);
        let lifetime = match granted.expires_in {
            None => UNTOLD,
            Some(ExpiresIn::Number(seconds)) => lifetime(seconds),
            Some(ExpiresIn::Text(text)) => text.trim().parse().map_or(UNTOLD, lifetime),
        };
        Ok((value, lifetime))
    }
}

/// Why one request brought no token.
enum Unanswered {
    Said(Said),
    No(NoToken),
}

/// An answer that is no success.
#[derive(Clone, Copy)]
struct Said {
    status: StatusCode,
    /// One of [`ERRORS`].
    error: Option<&'static str>,
}

impl Said {
    fn may_be_about_authentication(self) -> bool {
        self.status == StatusCode::UNAUTHORIZED
            || (self.status == StatusCode::BAD_REQUEST
                && matches!(self.error, None | Some("invalid_client" | "invalid_request")))
    }

    fn no_token(self, tokens: &Tokens) -> NoToken {
        let error = self.error.map(|error| format!(", {error}")).unwrap_or_default();
        let why = tokens.about(&format!("it answered {}{error}", self.status.as_u16()));
        let later = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS];
        let is_final = self.status.is_redirection()
            || (self.status.is_client_error() && !later.contains(&self.status));
        if is_final { NoToken::Refused(why) } else { NoToken::Away(why) }
    }
}

impl Authentication {
    const fn other(self) -> Self {
        match self {
            Self::Basic => Self::Body,
            Self::Body => Self::Basic,
        }
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
                Some(ExpiresIn::Text(text)) => {
                    text.parse().map_or(u64::MAX, |s| lifetime(s).as_secs())
                }
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
    async fn a_token_that_is_still_valid_is_used_at_once_while_the_next_is_fetched_in_vain() {
        rustls::crypto::ring::default_provider().install_default().ok();
        // It takes connections and never answers.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let subscriber = testing::subscriber(
            "a",
            &format!(
                "url = \"https://example.com/\"\nhttp = {{ allow_http = true, allow_private_addresses = true }}\n\
                 auth = {{ oauth2 = {{ token_url = \"http://{}/\", client_id = \"c\", client_secret = \"s\" }} }}",
                silent.local_addr().expect("an address")
            ),
        );
        let roots = SystemRoots::load().expect("roots");
        let connections = Arc::new(
            Connections::try_new(&subscriber, &roots, Lookup::of_system()).expect("builds"),
        );
        let tokens = Arc::new(Tokens::of(&subscriber).expect("fetches tokens"));
        let now = clock::instant();
        let old = |age| Token {
            value: HeaderValue::from_static("Bearer t"),
            number: 1,
            fetched_at: now.checked_sub(Duration::from_secs(age)).expect("after the boot"),
            lifetime: Duration::from_secs(100_000),
        };
        let is_fetching = || tokens.fetching.try_lock().is_err();
        tokens.known().token = Some(old(50_000));
        assert!(tokens.current(&connections).await.is_ok() && !is_fetching(), "fresh");
        tokens.known().token = Some(old(90_000));
        assert!(tokens.current(&connections).await.is_ok() && is_fetching(), "not awaited");
        assert!(tokens.current(&connections).await.is_ok(), "one fetches, the others go on");
    }

    #[test]
    fn the_pause_after_failures_doubles_and_ends() {
        let subscriber = testing::subscriber(
            "a",
            "url = \"https://example.com/\"\nauth = { oauth2 = { token_url = \"https://example.org/\", client_id = \"c\", client_secret = \"s\" } }",
        );
        let mut tokens = Tokens::of(&subscriber).expect("fetches tokens");
        let at = clock::instant();
        let pause = |tokens: &Tokens, times| {
            let why = NoToken::Away(String::new());
            tokens.paused_until(&Failed { at, why, times }).duration_since(at).as_secs()
        };
        tokens.timeout = Duration::from_secs(300);
        assert_eq!([1, 2, 3, 5, 6, 1000].map(|n| pause(&tokens, n)), [1, 2, 4, 16, 30, 30]);
        tokens.timeout = Duration::from_secs(30);
        assert_eq!(pause(&tokens, 1000), 15, "so that an attempt is left to make");
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
