//! Signs request bodies, and verifies them as a receiver does.
//!
//! `standard-webhooks` follows the Standard Webhooks specification
//! (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>),
//! symmetric signatures `v1` and asymmetric ones `v1a` (Ed25519, RFC 8032); `mailtrap` and the custom
//! headers are a plain HMAC-SHA256 (RFC 2104) of the body.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hmac::{Hmac, KeyInit as _, Mac as _};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use sha2::Sha256;

use crate::crypto::secret::Secret;

/// The length of the key in a `whsec_` secret, 24 to 64 bytes by the specification.
pub const KEY_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// Bytes of an HMAC-SHA256.
const MAC_BYTES: usize = 32;

/// The seconds by which a timestamp may differ from the receiver's clock, as Standard Webhooks
/// advises.
pub const TOLERANCE_SECONDS: u64 = 5 * 60;

/// The encoding of a MAC in a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// Lowercase digits.
    Hex,
    /// RFC 4648, section 4, with padding.
    Base64,
}

/// One way of signing a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scheme {
    StandardWebhooks,
    /// `v1a` of Standard Webhooks, in the same header.
    Ed25519,
    Mailtrap,
    Custom {
        header: String,
        prefix: String,
        encoding: Encoding,
    },
}

impl Scheme {
    /// The header that carries the signature.
    pub fn header(&self) -> &str {
        match self {
            Self::StandardWebhooks | Self::Ed25519 => "webhook-signature",
            Self::Mailtrap => "mailtrap-signature",
            Self::Custom { header, .. } => header,
        }
    }
}

/// The keys and schemes of one subscriber.
#[derive(Clone)]
pub struct Signer {
    schemes: Vec<Scheme>,
    /// One keyed HMAC for each secret, the current one first; empty unless `standard-webhooks` is
    /// used.
    standard: Vec<Hmac<Sha256>>,
    /// The HMAC keyed with the bytes of the current secret as written; `None` if there is no
    /// secret.
    plain: Option<Hmac<Sha256>>,
    /// Of `v1a`.
    asymmetric: Option<SigningKey>,
}

/// A key of `v1a`, as `whsk_…` has it.
#[derive(Clone)]
pub struct SigningKey(Arc<Ed25519KeyPair>);

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SigningKey")
    }
}

/// Bytes of the seed of an Ed25519 key, and of its public key.
const KEY_HALF: usize = 32;

impl SigningKey {
    /// Reads `whsk_` and the base64 of the seed, or of the seed and the public key.
    ///
    /// # Errors
    /// Says what is wrong without quoting the key.
    pub fn parse(text: &Secret) -> Result<Self, &'static str> {
        let text = text.expose();
        if text.starts_with("whpk_") {
            return Err(
                "is the public key, which signs nothing; the other one begins with `whsk_`",
            );
        }
        let encoded = text.strip_prefix("whsk_").ok_or("does not begin with `whsk_`")?;
        let bytes = BASE64.decode(encoded).map_err(|_| "is not base64 after `whsk_`")?;
        let pair = match bytes.split_at_checked(KEY_HALF) {
            Some((seed, [])) => Ed25519KeyPair::from_seed_unchecked(seed),
            Some((seed, public)) if public.len() == KEY_HALF => {
                Ed25519KeyPair::from_seed_and_public_key(seed, public)
            }
            _ => return Err("does not hold the 32 or 64 bytes of an Ed25519 key"),
        };
        pair.map(|pair| Self(Arc::new(pair)))
            .map_err(|_| "is no Ed25519 key: its public half belongs to another seed")
    }

    /// The public key, for receivers: `whpk_` and the base64 of its bytes.
    pub fn public(&self) -> String {
        format!("whpk_{}", BASE64.encode(self.0.public_key().as_ref()))
    }

    fn sign(&self, id: &str, timestamp: u64, body: &[u8]) -> String {
        let signature = self.0.sign(&signed(id, timestamp, body));
        format!("v1a,{}", BASE64.encode(signature.as_ref()))
    }
}

/// Makes a key of `v1a`: `whsk_` and the base64 of its seed and its public key.
pub fn new_signing_key() -> String {
    let seed = rand::random::<[u8; KEY_HALF]>();
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed).expect("32 bytes are a seed");
    format!("whsk_{}", BASE64.encode([&seed, pair.public_key().as_ref()].concat()))
}

/// What Standard Webhooks signs.
fn signed(id: &str, timestamp: u64, body: &[u8]) -> Vec<u8> {
    [format!("{id}.{timestamp}.").as_bytes(), body].concat()
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").field("schemes", &self.schemes).finish_non_exhaustive()
    }
}

/// Makes a signing secret: `whsec_` and the base64 of 32 random bytes.
pub fn new_secret() -> String {
    format!("whsec_{}", BASE64.encode(rand::random::<[u8; 32]>()))
}

/// The bytes of a `whsec_…` secret.
///
/// # Errors
/// Says what is wrong without quoting the secret.
pub fn standard_key(secret: &Secret) -> Result<Vec<u8>, &'static str> {
    let encoded = secret.expose().strip_prefix("whsec_").ok_or("does not begin with `whsec_`")?;
    let key = BASE64.decode(encoded).map_err(|_| "is not base64 after `whsec_`")?;
    if KEY_BYTES.contains(&key.len()) { Ok(key) } else { Err("does not hold 24 to 64 bytes") }
}

fn keyed(key: &[u8]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes a key of any length")
}

impl Signer {
    /// # Errors
    /// Names the secret by its index, and what is wrong with it.
    pub fn try_new(
        schemes: Vec<Scheme>,
        secrets: &[Secret],
    ) -> Result<Self, (usize, &'static str)> {
        let standard = if schemes.contains(&Scheme::StandardWebhooks) {
            let keys =
                secrets.iter().enumerate().map(|(n, s)| standard_key(s).map_err(|why| (n, why)));
            keys.map(|key| key.map(|k| keyed(&k))).collect::<Result<_, _>>()?
        } else {
            Vec::new()
        };
        let plain = secrets.first().map(|s| keyed(s.expose().as_bytes()));
        Ok(Self { schemes, standard, plain, asymmetric: None })
    }

    /// The key of `v1a`.
    #[must_use]
    pub fn with_key(self, key: Option<SigningKey>) -> Self {
        Self { asymmetric: key, ..self }
    }

    pub fn schemes(&self) -> &[Scheme] {
        &self.schemes
    }

    /// The headers that go with `body`, sent at `timestamp` (Unix seconds) under `id`.
    pub fn headers(&self, id: &str, timestamp: u64, body: &[u8]) -> Vec<(String, String)> {
        let mut headers = Vec::with_capacity(4);
        // Both kinds are in one header: who knows one of them finds it.
        let mut signatures: Vec<String> = Vec::new();
        for scheme in &self.schemes {
            match scheme {
                Scheme::StandardWebhooks => signatures.extend(self.standard.iter().map(|key| {
                    let mac = standard_mac(key.clone(), id, timestamp, body);
                    format!("v1,{}", BASE64.encode(mac))
                })),
                Scheme::Ed25519 => {
                    signatures
                        .extend(self.asymmetric.iter().map(|key| key.sign(id, timestamp, body)));
                }
                Scheme::Mailtrap => {
                    headers.extend(
                        self.plain_mac(body).map(|mac| (scheme.header().to_owned(), hex(&mac))),
                    );
                }
                Scheme::Custom { header, prefix, encoding } => {
                    headers.extend(self.plain_mac(body).map(|mac| {
                        let mac = match encoding {
                            Encoding::Hex => hex(&mac),
                            Encoding::Base64 => BASE64.encode(mac),
                        };
                        (header.clone(), format!("{prefix}{mac}"))
                    }));
                }
            }
        }
        if !signatures.is_empty() {
            headers.push(("webhook-id".to_owned(), id.to_owned()));
            headers.push(("webhook-timestamp".to_owned(), timestamp.to_string()));
            headers.push((Scheme::StandardWebhooks.header().to_owned(), signatures.join(" ")));
        }
        headers
    }

    fn plain_mac(&self, body: &[u8]) -> Option<[u8; 32]> {
        let mut mac = self.plain.clone()?;
        mac.update(body);
        Some(mac.finalize().into_bytes().into())
    }
}

fn standard_mac(mut mac: Hmac<Sha256>, id: &str, timestamp: u64, body: &[u8]) -> [u8; 32] {
    mac.update(id.as_bytes());
    mac.update(b".");
    mac.update(timestamp.to_string().as_bytes());
    mac.update(b".");
    mac.update(body);
    mac.finalize().into_bytes().into()
}

/// Names bytes without showing them.
#[derive(Clone)]
pub struct TokenKey {
    key: Secret,
    /// The hash begins with the key each time.
    keyed: Hmac<Sha256>,
}

impl TokenKey {
    pub fn new(key: Secret) -> Self {
        Self { keyed: keyed(key.expose().as_bytes()), key }
    }

    /// The first 32 hexadecimal digits of their HMAC-SHA256.
    pub fn token(&self, bytes: &[u8]) -> String {
        let mut mac = self.keyed.clone();
        mac.update(bytes);
        let digest = mac.finalize().into_bytes();
        hex(&digest[..16])
    }
}

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenKey")
    }
}

impl PartialEq for TokenKey {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Eq for TokenKey {}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The reason why a request is not verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unverified {
    MissingHeader(&'static str),
    BadTimestamp,
    OldTimestamp,
    FutureTimestamp,
    /// The verifier's secret is not valid for this scheme.
    BadSecret(&'static str),
    /// The header contains nothing that could be a signature.
    BadSignature(&'static str),
    NoMatch,
}

impl std::fmt::Display for Unverified {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::MissingHeader(name) => write!(f, "no header `{name}`"),
            Self::BadTimestamp => f.write_str("`webhook-timestamp` is not a number of seconds"),
            Self::OldTimestamp => {
                write!(f, "`webhook-timestamp` is older than {TOLERANCE_SECONDS} s")
            }
            Self::FutureTimestamp => {
                write!(f, "`webhook-timestamp` is more than {TOLERANCE_SECONDS} s ahead")
            }
            Self::BadSecret(why) => {
                write!(f, "the receiver's own secret {why}, so it is none for standard-webhooks")
            }
            Self::BadSignature(form) => write!(f, "the signature has not the form `{form}`"),
            Self::NoMatch => {
                f.write_str("the signature does not match: another secret, or a changed body")
            }
        }
    }
}

/// Verifies a request as a receiver does that knows `secret`. `header` finds a header by its
/// lowercase name; `now` is in Unix seconds.
///
/// Takes the scheme from the headers: `webhook-signature` first, else `mailtrap-signature`.
///
/// # Errors
/// Says why the request is not verified.
pub fn verify<'a>(
    secret: &Secret,
    header: impl Fn(&str) -> Option<&'a str>,
    body: &[u8],
    now: u64,
) -> Result<&'static str, Unverified> {
    if let Some(signatures) = header("webhook-signature") {
        let id = header("webhook-id").ok_or(Unverified::MissingHeader("webhook-id"))?;
        let timestamp =
            header("webhook-timestamp").ok_or(Unverified::MissingHeader("webhook-timestamp"))?;
        let timestamp: u64 = timestamp.parse().map_err(|_| Unverified::BadTimestamp)?;
        if timestamp.saturating_add(TOLERANCE_SECONDS) < now {
            return Err(Unverified::OldTimestamp);
        }
        if timestamp > now.saturating_add(TOLERANCE_SECONDS) {
            return Err(Unverified::FutureTimestamp);
        }
        if let Some(encoded) = secret.expose().strip_prefix("whpk_") {
            let key = BASE64.decode(encoded).ok().filter(|key| key.len() == KEY_HALF);
            let key =
                key.ok_or(Unverified::BadSecret("does not hold the 32 bytes of a public key"))?;
            let public = UnparsedPublicKey::new(&ED25519, key);
            let text = signed(id, timestamp, body);
            let mut given = signatures
                .split(' ')
                .filter_map(|s| BASE64.decode(s.strip_prefix("v1a,")?).ok())
                .peekable();
            if given.peek().is_none() {
                return Err(Unverified::BadSignature("v1a,<base64 of 64 bytes>"));
            }
            return match given.any(|signature| public.verify(&text, &signature).is_ok()) {
                true => Ok("standard-webhooks-ed25519"),
                false => Err(Unverified::NoMatch),
            };
        }
        let key = standard_key(secret).map_err(Unverified::BadSecret)?;
        let given = signatures
            .split(' ')
            .filter_map(|s| s.strip_prefix("v1,"))
            .filter_map(|s| BASE64.decode(s).ok());
        let given: Vec<_> = given.filter(|mac| mac.len() == MAC_BYTES).collect();
        if given.is_empty() {
            return Err(Unverified::BadSignature("v1,<base64 of 32 bytes>"));
        }
        let expected = standard_mac(keyed(&key), id, timestamp, body);
        return if given.iter().fold(false, |ok, g| ok | same(&expected, g)) {
            Ok("standard-webhooks")
        } else {
            Err(Unverified::NoMatch)
        };
    }
    let given =
        header("mailtrap-signature").ok_or(Unverified::MissingHeader("webhook-signature"))?;
    if given.len() != 2 * MAC_BYTES
        || !given.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    {
        return Err(Unverified::BadSignature("64 lowercase hexadecimal digits"));
    }
    let mut mac = keyed(secret.expose().as_bytes());
    mac.update(body);
    let expected = hex(&mac.finalize().into_bytes());
    if same(expected.as_bytes(), given.as_bytes()) {
        Ok("mailtrap")
    } else {
        Err(Unverified::NoMatch)
    }
}

/// Compares in a time that depends on the lengths alone, so that it does not reveal how much of a
/// guess is right.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0_u8, |diff, (x, y)| diff | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification's reference libraries.
    const SPEC_SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const SPEC_ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const SPEC_TIMESTAMP: u64 = 1_614_265_330;
    const SPEC_BODY: &[u8] = br#"{"test": 2432232314}"#;
    const SPEC_SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    fn signer(schemes: &[Scheme], secrets: &[&str]) -> Signer {
        let secrets: Vec<Secret> = secrets.iter().map(|s| Secret::new(*s)).collect();
        Signer::try_new(schemes.to_vec(), &secrets).expect("valid secrets")
    }

    fn check(
        headers: &[(String, String)],
        secret: &str,
        body: &[u8],
        now: u64,
    ) -> Result<&'static str, Unverified> {
        verify(
            &Secret::new(secret),
            |name| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str()),
            body,
            now,
        )
    }

    #[test]
    fn standard_webhooks_signs_as_the_reference_libraries_do() {
        let headers = signer(&[Scheme::StandardWebhooks], &[SPEC_SECRET]).headers(
            SPEC_ID,
            SPEC_TIMESTAMP,
            SPEC_BODY,
        );
        assert_eq!(
            headers,
            [
                ("webhook-id".to_owned(), SPEC_ID.to_owned()),
                ("webhook-timestamp".to_owned(), SPEC_TIMESTAMP.to_string()),
                ("webhook-signature".to_owned(), SPEC_SIGNATURE.to_owned()),
            ]
        );
    }

    #[test]
    fn plain_schemes_are_an_hmac_with_the_secret_as_it_is_written() {
        // RFC 4231, test case 2.
        let expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        let body = b"what do ya want for nothing?";
        let custom = Scheme::Custom {
            header: "X-Hub-Signature-256".into(),
            prefix: "sha256=".into(),
            encoding: Encoding::Hex,
        };
        let base64 = Scheme::Custom {
            header: "X-Sig".into(),
            prefix: String::new(),
            encoding: Encoding::Base64,
        };
        let headers =
            signer(&[Scheme::Mailtrap, custom, base64], &["Jefe"]).headers("msg_1", 1, body);
        assert_eq!(headers[0], ("mailtrap-signature".to_owned(), expected.to_owned()));
        assert_eq!(headers[1], ("X-Hub-Signature-256".to_owned(), format!("sha256={expected}")));
        assert_eq!(
            headers[2],
            ("X-Sig".to_owned(), "W9zBRr9gdU5qBCQmCJV1x1oAPwidJzmDnexYuWTsOEM=".to_owned())
        );
        assert_eq!(check(&headers, "Jefe", body, 1), Ok("mailtrap"));
        assert_eq!(check(&headers, "jefe", body, 1), Err(Unverified::NoMatch));
    }

    #[test]
    fn a_receiver_that_knows_either_of_two_secrets_verifies() {
        let other = format!("whsec_{}", BASE64.encode([7; 32]));
        let headers = signer(&[Scheme::StandardWebhooks], &[SPEC_SECRET, &other]).headers(
            SPEC_ID,
            SPEC_TIMESTAMP,
            SPEC_BODY,
        );
        for secret in [SPEC_SECRET, &other] {
            assert_eq!(check(&headers, secret, SPEC_BODY, SPEC_TIMESTAMP), Ok("standard-webhooks"));
        }
        let third = format!("whsec_{}", BASE64.encode([8; 32]));
        assert_eq!(check(&headers, &third, SPEC_BODY, SPEC_TIMESTAMP), Err(Unverified::NoMatch));
        assert_eq!(
            check(&headers, SPEC_SECRET, b"changed", SPEC_TIMESTAMP),
            Err(Unverified::NoMatch)
        );
    }

    #[test]
    fn an_old_or_missing_timestamp_is_reported_as_that() {
        let headers = signer(&[Scheme::StandardWebhooks], &[SPEC_SECRET]).headers(
            SPEC_ID,
            SPEC_TIMESTAMP,
            SPEC_BODY,
        );
        let at = |now| check(&headers, SPEC_SECRET, SPEC_BODY, now);
        assert_eq!(at(SPEC_TIMESTAMP + TOLERANCE_SECONDS), Ok("standard-webhooks"));
        assert_eq!(at(SPEC_TIMESTAMP + TOLERANCE_SECONDS + 1), Err(Unverified::OldTimestamp));
        assert_eq!(at(SPEC_TIMESTAMP - TOLERANCE_SECONDS - 1), Err(Unverified::FutureTimestamp));
        assert_eq!(
            check(&headers[2..], SPEC_SECRET, SPEC_BODY, 0),
            Err(Unverified::MissingHeader("webhook-id"))
        );
        assert_eq!(
            check(&[], SPEC_SECRET, SPEC_BODY, 0),
            Err(Unverified::MissingHeader("webhook-signature"))
        );
    }

    #[test]
    fn no_signature_and_no_secret_are_other_errors_than_a_wrong_signature() {
        let mut headers = signer(&[Scheme::StandardWebhooks], &[SPEC_SECRET]).headers(
            SPEC_ID,
            SPEC_TIMESTAMP,
            SPEC_BODY,
        );
        let bad_secret =
            check(&headers, "Jefe", SPEC_BODY, SPEC_TIMESTAMP).expect_err("no secret for it");
        assert!(bad_secret.to_string().contains("does not begin with `whsec_`"), "{bad_secret}");
        for signature in ["", "v1,", "v1,AAAA", "v2,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="] {
            headers[2].1 = signature.to_owned();
            let found = check(&headers, SPEC_SECRET, SPEC_BODY, SPEC_TIMESTAMP);
            assert!(matches!(found, Err(Unverified::BadSignature(_))), "{signature}: {found:?}");
        }
        let short = [("mailtrap-signature".to_owned(), "abc".to_owned())];
        assert!(matches!(check(&short, "Jefe", b"", 1), Err(Unverified::BadSignature(_))));
    }

    #[test]
    fn a_standard_secret_holds_24_to_64_bytes_of_base64() {
        for (secret, ok) in [
            (format!("whsec_{}", BASE64.encode([1; 24])), true),
            (format!("whsec_{}", BASE64.encode([1; 64])), true),
            (format!("whsec_{}", BASE64.encode([1; 23])), false),
            (format!("whsec_{}", BASE64.encode([1; 65])), false),
            (BASE64.encode([1; 32]), false),
            ("whsec_***".to_owned(), false),
        ] {
            assert_eq!(standard_key(&Secret::new(&*secret)).is_ok(), ok, "{secret}");
        }
    }
}
