//! The introduction of this daemon to commands, which compare the configuration's path, and send
//! the token only to a daemon that has shown to know it.

use std::{path::Path, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, HeaderName, StatusCode},
    response::{IntoResponse as _, Response},
    routing::get,
};

use super::{
    answer::{Refusal, header_text, json_answer, wrong_method},
    guard::{carries, from_elsewhere},
    view,
};
use crate::crypto::{
    handshake::{self, Side},
    secret::Secret,
};

struct Introduction {
    token: Option<Arc<Secret>>,
    port: u16,
    /// The configuration's path, absolute, links not followed: it stays the same where a link swaps
    /// the content of a folder.
    config: String,
}

/// The route, which does not need the token: a command asks here before it sends the token.
pub(super) fn routes(token: Option<Arc<Secret>>, port: u16, config: &Path) -> Router {
    let config =
        std::path::absolute(config).unwrap_or_else(|_| config.to_owned()).display().to_string();
    Router::new()
        .route("/v1/daemon", get(introduce))
        .method_not_allowed_fallback(wrong_method)
        .with_state(Arc::new(Introduction { token, port, config }))
}

async fn introduce(State(me): State<Arc<Introduction>>, headers: HeaderMap) -> Response {
    if let Some(why) = from_elsewhere(&headers, me.token.is_some()) {
        return Refusal::from_elsewhere(why).into_response();
    }
    let mut answer = view::Introduction {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        config: me.config.clone(),
        pid: std::process::id(),
        proof: None,
    };
    if let Some(token) = &me.token {
        let given = |name| header_text(&headers, HeaderName::from_static(name));
        let challenge = given(handshake::CHALLENGE);
        let proven =
            handshake::is_proven(token, Side::Command, challenge, me.port, given(handshake::PROOF));
        if !proven && !carries(&headers, token) {
            return Refusal::unauthorized().into_response();
        }
        if proven {
            answer.proof = Some(handshake::proof(token, Side::Daemon, challenge, me.port));
        }
    }
    json_answer(StatusCode::OK, &answer)
}
