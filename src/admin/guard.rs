//! Lets through requests that carry a token whose role allows them, and that no web page has sent.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderName, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use super::{
    answer::{Refusal, discard, header_text},
    view::ProblemKind,
};
use crate::config::{PublicUrl, Role, Token};

/// The tokens of the configuration with which the daemon started, and where browsers use them.
#[derive(Debug, Clone)]
pub(super) struct Tokens {
    all: Arc<[(Token, [u8; 32])]>,
    /// The address before the proxy; `None` if there is none, or it is not known.
    public_url: Option<Arc<PublicUrl>>,
}

impl Tokens {
    pub(super) fn new(tokens: Vec<Token>) -> Self {
        let digested = |token: Token| {
            let digest = digest(token.secret.expose());
            (token, digest)
        };
        Self { all: tokens.into_iter().map(digested).collect(), public_url: None }
    }

    /// The same, used by browsers at this address alone.
    pub(super) fn used_at(self, public_url: Option<PublicUrl>) -> Self {
        Self { public_url: public_url.map(Arc::new), ..self }
    }

    pub(super) fn public_url(&self) -> Option<&PublicUrl> {
        self.public_url.as_deref()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Token> {
        self.all.iter().map(|(token, _)| token)
    }

    /// The token that a request carries.
    pub(super) fn carried(&self, headers: &HeaderMap) -> Option<&Token> {
        let given = header_text(headers, header::AUTHORIZATION).split_once(' ');
        let given = given
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map_or("", |(_, given)| given.trim());
        self.known(given)
    }

    /// The token with this text. It is compared with all of them, and digests with digests, so that
    /// the time says nothing about a token or its length.
    pub(super) fn known(&self, given: &str) -> Option<&Token> {
        let given = digest(given);
        let mut found = None;
        for (token, digest) in self.all.iter() {
            if bool::from(given.ct_eq(digest)) {
                found = Some(token);
            }
        }
        found
    }
}

fn digest(text: &str) -> [u8; 32] {
    Sha256::digest(text).into()
}

/// The client of a request that was let through, for its handler.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    /// The name of the token that the request carries; `None` where no token is configured.
    pub(super) token: Option<Arc<str>>,
    role: Role,
}

impl Caller {
    /// The client that has shown to know a token.
    pub(super) fn of(token: &Token) -> Self {
        Self { token: Some(token.name.clone()), role: token.role }
    }

    /// Whether it may change something.
    pub(super) fn may_change(&self) -> bool {
        self.role == Role::Admin
    }

    /// Whether an answer may have the whole URL of an endpoint, its headers and its authentication
    /// (without secrets). For others it has scheme and host alone.
    pub(super) fn sees_endpoints(&self) -> bool {
        self.role == Role::Admin
    }
}

/// The role that a request needs. Any request that is not known to be less needs `admin`.
fn needed(method: &Method, path: &str) -> Role {
    match *method {
        Method::GET | Method::HEAD => Role::Read,
        Method::POST if path == "/v1/events" => Role::Intake,
        _ => Role::Admin,
    }
}

fn too_small(token: &Token, needed: Role) -> Refusal {
    let why = format!(
        "the token `{}` has the role `{}`, and this request needs one of role `{}`{}",
        token.name,
        token.role.name(),
        needed.name(),
        if needed == Role::Admin { "" } else { " or `admin`" }
    );
    Refusal::of_kind(StatusCode::FORBIDDEN, ProblemKind::Role, why)
}

/// The reason to refuse a request as one that a web page made a browser send.
pub(super) fn from_elsewhere(headers: &HeaderMap, tokens: &Tokens) -> Option<&'static str> {
    let text = |name| header_text(headers, name);
    if !matches!(text(HeaderName::from_static("sec-fetch-site")), "" | "none" | "same-origin") {
        return Some("it comes from a page of another site");
    }
    let host = text(header::HOST);
    let origin = text(header::ORIGIN);
    let is_own = match tokens.public_url() {
        Some(public) => origin.eq_ignore_ascii_case(&public.origin()),
        None => origin.split_once("://").is_some_and(|(_, o)| o.eq_ignore_ascii_case(host)),
    };
    if !origin.is_empty() && !is_own {
        return Some("it comes from a page of another origin");
    }
    // The owner of any name can make it lead to this machine, and a page of that name is then of
    // this origin.
    if tokens.is_empty() && !is_of_this_machine(host) {
        return Some("without [admin] token only an IP address or `localhost` is answered to");
    }
    None
}

/// Whether a header `host` has an IP address or `localhost`, which no other party can make lead
/// here.
pub(super) fn is_of_this_machine(host: &str) -> bool {
    let without_port = host
        .rsplit_once(':')
        .filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()))
        .map_or(host, |(name, _)| name);
    let name = without_port.trim_start_matches('[').trim_end_matches(']');
    host.is_empty() || name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok()
}

/// Lets through requests with a token whose role allows them, if there are tokens, that no web page
/// has sent. Handlers find the [`Caller`] among the extensions.
pub(super) async fn authorized(
    State(tokens): State<Tokens>,
    mut request: Request,
    next: Next,
) -> Response {
    match caller(&tokens, request.headers(), needed(request.method(), request.uri().path())) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(refusal) => refused(refusal, request).await,
    }
}

/// The client of a request that needs a role.
pub(super) fn caller(
    tokens: &Tokens,
    headers: &HeaderMap,
    needed: Role,
) -> Result<Caller, Refusal> {
    if let Some(why) = from_elsewhere(headers, tokens) {
        return Err(Refusal::from_elsewhere(why));
    }
    if tokens.is_empty() {
        return Ok(Caller { token: None, role: Role::Admin });
    }
    match tokens.carried(headers) {
        None => Err(Refusal::unauthorized()),
        Some(token) if token.role.may(needed) => {
            Ok(Caller { token: Some(token.name.clone()), role: token.role })
        }
        Some(token) => Err(too_small(token, needed)),
    }
}

/// Lets through requests with a token, behind [`authorized`]: for routes that are not open on
/// loopback without one.
pub(super) async fn with_token(request: Request, next: Next) -> Response {
    let caller = request.extensions().get::<Caller>();
    if caller.is_some_and(|caller| caller.token.is_some()) {
        return next.run(request).await;
    }
    let why = "this needs a token, and the daemon's configuration has none: set [admin] token and restart the daemon; \
               `hooktrail init` writes a configuration with one";
    refused(Refusal::of_kind(StatusCode::FORBIDDEN, ProblemKind::Token, why), request).await
}

async fn refused(refusal: Refusal, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    discard(&parts.headers, body).await;
    refusal.into_response()
}

#[cfg(test)]
mod tests {
    use axum::{Extension, Router, body::Body, middleware, routing::any};
    use hyper_util::service::TowerToHyperService;

    use super::*;
    use crate::crypto::secret::Secret;

    fn tokens() -> Tokens {
        let token = |(name, role): (&str, Role)| Token {
            name: name.into(),
            secret: Secret::new(format!("secret-{name}")),
            role,
        };
        let all = [("token", Role::Admin), ("eye", Role::Read), ("app", Role::Intake)];
        Tokens::new(all.map(token).to_vec())
    }

    /// The status and the text of an answer; the handler answers with the token's name.
    async fn answered(app: &Router, method: &str, path: &str, token: &str) -> (u16, String) {
        use hyper::service::Service as _;
        let mut request = Request::builder().method(method).uri(path);
        if !token.is_empty() {
            request = request.header("authorization", token);
        }
        let request = request.body(Body::empty()).expect("a request");
        let answer = TowerToHyperService::new(app.clone()).call(request).await.expect("an answer");
        let status = answer.status().as_u16();
        let text = axum::body::to_bytes(answer.into_body(), 1 << 20).await.expect("a body");
        (status, String::from_utf8(text.to_vec()).expect("text"))
    }

    fn app(tokens: Tokens) -> Router {
        let name = async |Extension(caller): Extension<Caller>| {
            let name = caller.token.as_deref().unwrap_or("nobody");
            if caller.sees_endpoints() {
                format!("{name}, sees endpoints")
            } else {
                name.to_owned()
            }
        };
        let guarded =
            Router::new().route("/v1/operations", any(name)).layer(middleware::from_fn(with_token));
        Router::new()
            .route("/v1/events", any(name))
            .route("/v1/reload", any(name))
            .merge(guarded)
            .layer(middleware::from_fn_with_state(tokens, authorized))
    }

    #[tokio::test]
    async fn a_token_may_do_what_its_role_allows_and_its_name_is_known_to_handlers() {
        let app = app(tokens());
        let paths = ["/v1/events", "/v1/reload", "/v1/operations"];
        for path in paths {
            for method in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "ODD"] {
                let reads = matches!(method, "GET" | "HEAD");
                let publishes = (method, path) == ("POST", "/v1/events");
                for (name, may) in [("token", true), ("eye", reads), ("app", publishes)] {
                    let given = format!("Bearer secret-{name}");
                    let (status, text) = answered(&app, method, path, &given).await;
                    assert_eq!(status, if may { 200 } else { 403 }, "{method} {path} {name}");
                    match (may, method) {
                        (_, "HEAD") => {}
                        (true, _) if name == "token" => assert_eq!(text, "token, sees endpoints"),
                        (true, _) => assert_eq!(text, name),
                        (false, _) => assert!(
                            text.contains(&format!("the token `{name}` has the role"))
                                && text.contains("needs one of role `")
                                && text.contains("/problems/role"),
                            "{text}"
                        ),
                    }
                }
                for given in ["", "Bearer", "Bearer ", "Bearer secret", "Basic secret-token"] {
                    assert_eq!(answered(&app, method, path, given).await.0, 401, "{given}");
                }
            }
        }
    }

    #[tokio::test]
    async fn without_a_configured_token_only_routes_that_need_none_are_open() {
        let app = app(Tokens::new(Vec::new()));
        for path in ["/v1/events", "/v1/reload"] {
            let nobody = (200, "nobody, sees endpoints".to_owned());
            assert_eq!(answered(&app, "POST", path, "").await, nobody);
        }
        for given in ["", "Bearer ", "Bearer secret-token"] {
            let (status, text) = answered(&app, "GET", "/v1/operations", given).await;
            assert!(
                status == 403
                    && ["/problems/token", "hooktrail init", "[admin] token"]
                        .iter()
                        .all(|part| text.contains(part)),
                "{status} {text}"
            );
        }
    }

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |(name, value): &(&'static str, &'static str)| {
            (HeaderName::from_static(name), header::HeaderValue::from_static(value))
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn what_a_web_page_sends_is_told_from_what_a_program_sends() {
        for (pairs, token, ok) in [
            (&[("host", "127.0.0.1:8787")][..], false, true),
            (&[("host", "localhost:8787")], false, true),
            (&[("host", "[::1]:8787")], false, true),
            (&[("host", "[::1]")], false, true),
            (&[], false, true),
            (&[("host", "rebound.example:8787")], false, false),
            (&[("host", "hooktrail.internal:8787")], true, true),
            (&[("host", "127.0.0.1:8787"), ("origin", "http://127.0.0.1:8787")], false, true),
            (&[("host", "127.0.0.1:8787"), ("origin", "http://evil.example")], false, false),
            (&[("host", "127.0.0.1:8787"), ("origin", "null")], true, false),
            (&[("host", "127.0.0.1:8787"), ("sec-fetch-site", "cross-site")], false, false),
            (&[("host", "127.0.0.1:8787"), ("sec-fetch-site", "same-site")], true, false),
            (&[("host", "127.0.0.1:8787"), ("sec-fetch-site", "same-origin")], false, true),
            (&[("host", "127.0.0.1:8787"), ("sec-fetch-site", "none")], false, true),
        ] {
            let tokens = if token { tokens() } else { Tokens::new(Vec::new()) };
            assert_eq!(from_elsewhere(&headers(pairs), &tokens).is_none(), ok, "{pairs:?}");
        }
        let public = PublicUrl::try_new("https://Hooks.example:8443/").expect("valid");
        assert_eq!(
            (public.origin().as_str(), public.host()),
            ("https://hooks.example:8443", "hooks.example:8443")
        );
        let tokens = tokens().used_at(Some(public));
        for (pairs, ok) in [
            (&[("host", "127.0.0.1:8787")][..], true),
            (&[("host", "127.0.0.1:8787"), ("origin", "https://hooks.example:8443")], true),
            (&[("host", "127.0.0.1:8787"), ("origin", "http://127.0.0.1:8787")], false),
            (&[("host", "hooks.example:8443"), ("origin", "http://hooks.example:8443")], false),
            (&[("host", "hooks.example"), ("origin", "https://hooks.example")], false),
            (&[("host", "evil.example"), ("origin", "https://evil.example")], false),
        ] {
            assert_eq!(from_elsewhere(&headers(pairs), &tokens).is_none(), ok, "{pairs:?}");
        }
    }
}
