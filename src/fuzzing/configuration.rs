//! The configuration.

use std::time::{Duration, SystemTime};

use crate::{
    config,
    event::Pattern,
    policy::{
        batching::BatchPolicy,
        retry::{MAX_DELAY, Next, RetryPolicy},
    },
};

/// The environment: a secret, and texts that are none.
fn environment(name: &str) -> Option<String> {
    match name {
        "SECRET" => Some("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned()),
        "PASSWORD" => Some(PASSWORD.to_owned()),
        "EMPTY" => Some(String::new()),
        _ => None,
    }
}

const PASSWORD: &str = "Tell/Nobody+This";

/// The files next to the configuration.
const FILES: &[(&str, &str)] = &[
    ("secret", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n"),
    (
        "more.toml",
        "[[subscriber]]\nname = \"more\"\nurl = \"https://example.com/\"\nsecrets = [\"file:secret\"]\n",
    ),
    ("ca.pem", "no certificate"),
];

/// Keys whose values may be secrets.
const SECRET_KEYS: &[&str] = &[
    "url",
    "token",
    "secrets",
    "signing_key",
    "hmac",
    "password",
    "bearer",
    "headers",
    "proxy",
    "management_url",
];

/// Every mistake in a configuration is reported with its place, and no message quotes a secret;
/// accepted values keep within the limits.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match config::from_text(text, &environment, FILES) {
        Ok(found) => within_limits(&found),
        Err(why) => {
            assert!(!why.problems.is_empty());
            let lines: Vec<&str> = text.split('\n').collect();
            for problem in &why.problems {
                assert!(!problem.message.is_empty() && !problem.to_string().is_empty());
                if let (Some((line, column)), true) =
                    (problem.place, problem.file.ends_with("hooktrail.toml"))
                {
                    assert!(
                        line >= 1 && column >= 1 && column <= lines[line - 1].chars().count() + 1,
                        "{problem}"
                    );
                }
                let is_secret = SECRET_KEYS
                    .iter()
                    .any(|key| problem.key.split(['.', '[']).any(|part| part == *key));
                assert!(
                    !is_secret || text.contains(PASSWORD) || !problem.message.contains(PASSWORD),
                    "{problem}"
                );
            }
        }
    }
}

fn within_limits(config: &config::Config) {
    let nothing = config.changes_to(config).expect("the same queue");
    assert!(nothing.changes.is_empty() && nothing.needs_restart.is_empty());
    let has_token = !config.admin.all_tokens().is_empty();
    assert!(has_token || config.admin.listen.ip().to_canonical().is_loopback());
    let minutes = |n: u64| Duration::from_secs(60 * n);
    let mut names = std::collections::HashSet::new();
    for s in config.subscribers.iter() {
        assert!(names.insert(&s.name));
        assert!(
            s.url.expose().scheme() == "https"
                || s.url.expose().scheme() == "http" && s.http.allow_http
        );
        assert!(s.http.addresses.check_literal(s.url.expose()).is_ok());
        assert!(
            !s.events.is_empty()
                && s.events.iter().all(|p| Pattern::try_new(p.as_str()).as_ref() == Ok(p))
        );
        assert!((1..=65_535).contains(&s.batch.max_events) && s.batch.max_wait <= minutes(2));
        let bytes = u64::try_from(s.batch.max_bytes).expect("fits");
        assert!((BatchPolicy::MIN_BYTES..=BatchPolicy::MAX_BYTES).contains(&bytes));
        assert!(
            !s.http.timeout.is_zero()
                && s.http.timeout <= minutes(5)
                && !s.http.connect_timeout.is_zero()
        );
        assert!((1..=100).contains(&s.http.concurrency));
        assert!(
            s.circuit_breaker.open_for <= s.circuit_breaker.max_open_for
                && s.circuit_breaker.max_open_for <= minutes(24 * 60)
        );
        assert!(
            s.headers.iter().all(|(_, value)| http::HeaderValue::from_str(value.expose()).is_ok())
        );
        assert!(
            s.auth
                .as_ref()
                .and_then(config::Auth::header)
                .is_none_or(|value| http::HeaderValue::from_str(value.expose()).is_ok())
        );
        let signed = s.signer.headers("msg_1", 1, b"{}");
        let has_key = !s.secrets.is_empty() || s.signing_key.is_some();
        assert!(s.signer.schemes().is_empty() || has_key && !signed.is_empty());
        assert!(signed.iter().all(|(n, v)| http::HeaderName::try_from(n).is_ok()
            && http::HeaderValue::from_str(v).is_ok()));
        assert!(RetryPolicy::try_new(s.retry.options()).is_ok());
        for (attempt, random) in [(1, 0.0), (2, 1.0), (1000, 0.5)] {
            assert!(s.retry.interval(attempt) <= MAX_DELAY);
            match s.retry.next(
                attempt,
                SystemTime::UNIX_EPOCH,
                SystemTime::UNIX_EPOCH,
                None,
                random,
            ) {
                Next::After(delay) => assert!(delay <= s.retry.options().max_interval),
                Next::Exhausted => {}
            }
        }
    }
}
