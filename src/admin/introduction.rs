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
    guard::{Tokens, caller, from_elsewhere},
    view,
};
use crate::{
    config::Role,
    crypto::handshake::{self, Side},
};

struct Introduction {
    tokens: Tokens,
    port: u16,
    /// The configuration's path, absolute, links not followed: it stays the same where a link swaps
    /// the content of a folder.
    config: String,
}

/// The route, which does not need the token: a command asks here before it sends the token.
pub(super) fn routes(tokens: Tokens, port: u16, config: &Path) -> Router {
    let config =
        std::path::absolute(config).unwrap_or_else(|_| config.to_owned()).display().to_string();
    Router::new()
        .route("/v1/daemon", get(introduce))
        .method_not_allowed_fallback(wrong_method)
        .with_state(Arc::new(Introduction { tokens, port, config }))
}

async fn introduce(State(me): State<Arc<Introduction>>, headers: HeaderMap) -> Response {
    match me.introduced(&headers) {
        Ok(answer) => json_answer(StatusCode::OK, &answer),
        Err(refusal) => refusal.into_response(),
    }
}

impl Introduction {
    fn introduced(&self, headers: &HeaderMap) -> Result<view::Introduction, Refusal> {
        if let Some(why) = from_elsewhere(headers, &self.tokens) {
            return Err(Refusal::from_elsewhere(why));
        }
        let proof = self.proof(headers);
        if proof.is_none() {
            caller(&self.tokens, headers, Role::Read)?;
        }
        Ok(view::Introduction {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            config: self.config.clone(),
            pid: std::process::id(),
            proof,
        })
    }

    /// The daemon's proof for a command that has proven to know a token with which it may ask.
    fn proof(&self, headers: &HeaderMap) -> Option<String> {
        let given = |name| header_text(headers, HeaderName::from_static(name));
        let (challenge, proof) = (given(handshake::CHALLENGE), given(handshake::PROOF));
        let (port, may_ask) = (self.port, self.tokens.iter().filter(|t| t.role.may(Role::Read)));
        let mut proven = may_ask
            .map(|token| &token.secret)
            .filter(|secret| handshake::is_proven(secret, Side::Command, challenge, port, proof));
        let secret = proven.next()?;
        Some(handshake::proof(secret, Side::Daemon, challenge, port))
    }
}
