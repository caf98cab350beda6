//! Answers of receivers, and signatures that they verify.

use std::time::{Duration, SystemTime};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};

use super::json::SEPARATOR;
use crate::{
    crypto::{
        secret::Secret,
        signature::{Encoding, KEY_BYTES, Scheme, Signer, TOLERANCE_SECONDS, standard_key, verify},
    },
    endpoint::webhook::parse_retry_after,
    policy::retry::{MAX_DELAY, Next, RetryPolicy},
};

/// Input: the time in four bytes, then the header's value. It is read as seconds or as a date, and
/// delays a batch by at most 72 h.
pub fn retry_after(bytes: &[u8]) {
    let Some((now, value)) = bytes.split_first_chunk() else { return };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(u32::from_be_bytes(*now).into());
    let Ok(value) = std::str::from_utf8(value) else { return };
    let text = value.trim();
    let expected = if !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()) {
        let digits = text.trim_start_matches('0');
        let seconds = if digits.len() > 18 {
            u64::MAX
        } else {
            digits.bytes().fold(0, |n, b| 10 * n + u64::from(b - b'0'))
        };
        Some(Duration::from_secs(seconds))
    } else {
        let date = text.parse::<httpdate::HttpDate>().ok().map(SystemTime::from);
        date.map(|date| date.duration_since(now).unwrap_or_default())
    };
    let found = parse_retry_after(value, now);
    assert_eq!(found, expected.map(|wait| wait.min(MAX_DELAY)));
    let policy = RetryPolicy::default();
    match policy.next(1, now, now, found, 0.5) {
        Next::After(delay) => assert_eq!(delay, found.unwrap_or_default().max(policy.interval(1))),
        Next::Exhausted => panic!("no limit is reached at once"),
    }
}

/// Input: a key, an id, a time, a body, then a forged header. Signed requests are verified, changed
/// ones are refused.
pub fn signature(bytes: &[u8]) {
    let mut parts = bytes.splitn(5, |b| *b == SEPARATOR);
    let mut part = || parts.next().unwrap_or_default();
    let (key, id, at, body, forged) = (part(), part(), part(), part(), part());
    let as_written = Secret::new(String::from_utf8_lossy(key));
    if let Ok(key) = standard_key(&as_written) {
        assert!(KEY_BYTES.contains(&key.len()) && as_written.expose().starts_with("whsec_"));
    }
    let mut key = key[..key.len().min(*KEY_BYTES.end())].to_vec();
    key.resize(key.len().max(*KEY_BYTES.start()), 7);
    let [current, previous, other] = [0, 1, 2].map(|n| {
        key[0] = key[0].wrapping_add(n);
        Secret::new(format!("whsec_{}", BASE64.encode(&key)))
    });
    let id = String::from_utf8_lossy(id);
    let at = at.iter().fold(0_u64, |n, b| (n << 8) | u64::from(*b));
    let custom = |header: &str, encoding| Scheme::Custom {
        header: header.to_owned(),
        prefix: "v=".to_owned(),
        encoding,
    };
    let schemes = vec![
        Scheme::StandardWebhooks,
        Scheme::Mailtrap,
        custom("x-hex", Encoding::Hex),
        custom("x-base64", Encoding::Base64),
    ];
    let signer =
        Signer::try_new(schemes, &[current.clone(), previous.clone()]).expect("sound secrets");
    let headers = signer.headers(&id, at, body);
    let value = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
    let mac = BASE64
        .decode(value("x-base64").and_then(|v| v.strip_prefix("v=")).expect("signed"))
        .expect("base64");
    let hex: String = mac.iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(
        (value("x-hex"), value("mailtrap-signature")),
        (Some(&*format!("v={hex}")), Some(&*hex))
    );

    for (secret, ok) in [(&current, true), (&previous, true), (&other, false)] {
        assert_eq!(verify(secret, value, body, at).is_ok(), ok);
    }
    let plain = |name: &str| value(name).filter(|_| name == "mailtrap-signature");
    for (secret, ok) in [(&current, true), (&previous, false)] {
        assert_eq!(verify(secret, plain, body, 0).is_ok(), ok);
    }
    for (now, ok) in [
        (at.saturating_sub(TOLERANCE_SECONDS), true),
        (at.saturating_add(TOLERANCE_SECONDS), true),
        (at.wrapping_add(TOLERANCE_SECONDS + 1), false),
        (at.wrapping_sub(TOLERANCE_SECONDS + 1), false),
    ] {
        assert_eq!(verify(&current, value, body, now).is_ok(), ok, "{at} at {now}");
    }
    changes_are_refused(&current, &headers, &id, at, body, forged);
}

/// A body with one bit changed, and each header with another value, is refused.
fn changes_are_refused(
    current: &Secret,
    headers: &[(String, String)],
    id: &str,
    at: u64,
    body: &[u8],
    forged: &[u8],
) {
    let value = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str());
    let plain = |name: &str| value(name).filter(|_| name == "mailtrap-signature");
    let mut changed = if body.is_empty() { vec![0] } else { body.to_vec() };
    let place = forged.len() % changed.len();
    changed[place] ^= if body.is_empty() { 0 } else { 1 << (forged.len() % 8) };
    assert!(
        verify(current, value, &changed, at).is_err()
            && verify(current, plain, &changed, at).is_err()
    );
    let differs = |name: &str, with: &str| {
        let with =
            |n: &str| if n == name { Some(with.to_owned()) } else { value(n).map(str::to_owned) };
        let all: Vec<(&str, Option<String>)> =
            ["webhook-id", "webhook-timestamp", "webhook-signature"].map(|n| (n, with(n))).into();
        let found = verify(
            current,
            |n| all.iter().find(|(name, _)| *name == n).and_then(|(_, v)| v.as_deref()),
            body,
            at,
        );
        assert!(found.is_err(), "{name}: {all:?}");
    };
    differs("webhook-id", &format!("{id}x"));
    differs("webhook-timestamp", &(at ^ 1).to_string());
    // A signature cannot be guessed: any other text is refused.
    let forged = String::from_utf8_lossy(forged);
    differs("webhook-signature", &forged);
    differs("webhook-timestamp", &format!("{forged}{}", at ^ 1));
    assert!(
        verify(current, |name| (name == "mailtrap-signature").then_some(&*forged), body, at)
            .is_err()
    );
}
