//! Secrets and signatures.

use crate::{
    config::{
        document::{Section, Value},
        keys,
        reader::Reader,
    },
    crypto::{
        secret::Secret,
        signature::{Encoding, Scheme, Signer, SigningKey, standard_key},
    },
};

/// The headers of a request that only hooktrail sets.
pub(super) const RESERVED_HEADERS: &[&str] = &[
    "content-type",
    "content-length",
    "content-encoding",
    "transfer-encoding",
    "host",
    "connection",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "user-agent",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "webhook-id",
    "webhook-timestamp",
    "webhook-signature",
    "mailtrap-signature",
    "x-hooktrail-attempt",
    "x-hooktrail-replay",
    "traceparent",
];

/// What signs requests.
pub(super) struct Signing {
    pub(super) secrets: Vec<Secret>,
    pub(super) signing_key: Option<Secret>,
    pub(super) signer: Signer,
}

pub(super) fn signing<'d>(
    reader: &Reader<'_>,
    section: &Section<'d>,
    signatures: Option<Value<'d>>,
) -> Option<Signing> {
    let key = match section.get("signing_key") {
        None => None,
        Some(v) => Some(signing_key(reader, &v)?),
    };
    let value = section.get("secrets");
    let schemes = match &signatures {
        // With a key alone there is no secret to sign with.
        None if key.is_some() && value.is_none() => Some(vec![Scheme::Ed25519]),
        None if key.is_some() => Some(vec![Scheme::StandardWebhooks, Scheme::Ed25519]),
        None => Some(vec![Scheme::StandardWebhooks]),
        Some(v) => schemes(reader, v),
    };
    let is_used = schemes.as_ref().is_none_or(|all| all.contains(&Scheme::Ed25519));
    match (section.get("signing_key"), signatures) {
        (Some(v), _) if !is_used => {
            reader.report(&v, "signs nothing: `signatures` does not have \"standard-webhooks-ed25519\"; add that, or remove this");
            return None;
        }
        (None, Some(v)) if schemes.as_ref().is_some_and(|all| all.contains(&Scheme::Ed25519)) => {
            reader.report(&v, "has \"standard-webhooks-ed25519\", which needs `signing_key`; make one with `hooktrail secret --ed25519`");
            return None;
        }
        _ => {}
    }
    let items = match &value {
        None => Vec::new(),
        Some(v) if Reader::is_string(v) => {
            reader.report(v, "must be an array, also of one: secrets = [\"${SECRET}\"]");
            return None;
        }
        Some(v) => reader.array(v)?,
    };
    let needs_secret = |s: &Vec<Scheme>| s.iter().any(|scheme| *scheme != Scheme::Ed25519);
    if items.is_empty() && schemes.as_ref().is_none_or(needs_secret) {
        let why = "is required for signing: one or two secrets, the current one first (make one with `hooktrail secret`); or sign nothing with `signatures = []`";
        match &value {
            Some(v) => reader.report(v, format!("is empty; {why}")),
            None => reader.report_missing(section, "secrets", why),
        }
        return None;
    }
    let standard = schemes.as_ref().is_some_and(|s| s.contains(&Scheme::StandardWebhooks));
    let sound = |item: &Value<'_>| {
        let secret = secret(reader, item)?;
        if let (true, Err(why)) = (standard, standard_key(&secret)) {
            let remedy = "standard-webhooks needs `whsec_` and the base64 of 24 to 64 bytes: make one with `hooktrail secret`";
            reader.report(item, format!("{why}; {remedy}"));
            return None;
        }
        Some(secret)
    };
    let secrets: Vec<Secret> = items.iter().filter_map(sound).collect();
    if secrets.len() < items.len() {
        return None;
    }
    let (signing_key, pair) = key.unzip();
    let signer = Signer::try_new(schemes?, &secrets).ok()?.with_key(pair);
    Some(Signing { secrets, signing_key, signer })
}

/// The key `signing_key`.
fn signing_key(reader: &Reader<'_>, value: &Value<'_>) -> Option<(Secret, SigningKey)> {
    let text = secret(reader, value)?;
    let key = SigningKey::parse(&text);
    if let Err(why) = &key {
        reader.report(value, format!("{why}; make one with `hooktrail secret --ed25519`"));
    }
    Some((text, key.ok()?))
}

pub(super) fn secret(reader: &Reader<'_>, item: &Value<'_>) -> Option<Secret> {
    let text = reader.string(item)?;
    let secret = match text.strip_prefix("file:") {
        // A variable's name instead of a secret: a shell would have replaced it.
        None if is_variable(&text) => {
            let name = text.trim_start_matches('$');
            reader.report(
                item,
                format!("is the text `{text}`; for the environment variable write \"${{{name}}}\""),
            );
            return None;
        }
        None => text,
        Some(file) => {
            let path = item.source.relative(file);
            match reader.read_to_string(&path) {
                Ok(content) => content
                    .strip_suffix('\n')
                    .map(|c| c.strip_suffix('\r').unwrap_or(c))
                    .unwrap_or(&content)
                    .to_owned(),
                Err(e) => {
                    reader.report(
                        item,
                        format!("secret file {} cannot be read: {e}", path.display()),
                    );
                    return None;
                }
            }
        }
    };
    if secret.is_empty() {
        reader.report(item, "the secret is empty; make one with `hooktrail secret`");
        return None;
    }
    Some(Secret::new(secret))
}

fn schemes(reader: &Reader<'_>, value: &Value<'_>) -> Option<Vec<Scheme>> {
    let items = reader.array(value)?;
    let mut schemes: Vec<(Scheme, String)> = Vec::new();
    let mut all = true;
    for item in &items {
        let Some((scheme, place)) = scheme(reader, item) else {
            all = false;
            continue;
        };
        // The later of two headers with one name would silently replace the first.
        // Both kinds of Standard Webhooks share theirs.
        let share = |s: &Scheme| {
            let kinds = [Scheme::StandardWebhooks, Scheme::Ed25519];
            *s != scheme && kinds.contains(s) && kinds.contains(&scheme)
        };
        let same = |s: &Scheme| s.header().eq_ignore_ascii_case(scheme.header()) && !share(s);
        if let Some((_, first)) = schemes.iter().find(|(s, _)| same(s)) {
            reader
                .report(&place, format!("its header is already that of {first}; remove one of the two, or choose another header"));
            all = false;
            continue;
        }
        schemes.push((scheme, item.key.clone()));
    }
    all.then(|| schemes.into_iter().map(|(scheme, _)| scheme).collect())
}

/// A scheme, and the place that names its header.
fn scheme<'d>(reader: &Reader<'_>, item: &Value<'d>) -> Option<(Scheme, Value<'d>)> {
    if Reader::is_string(item) {
        let known = match reader.string(item)?.as_str() {
            "standard-webhooks" => Scheme::StandardWebhooks,
            "standard-webhooks-ed25519" => Scheme::Ed25519,
            "mailtrap" => Scheme::Mailtrap,
            _ => {
                let forms = "must be \"standard-webhooks\", \"standard-webhooks-ed25519\" or \"mailtrap\", or a header of your own such as \
                             { header = \"X-Signature\", prefix = \"sha256=\", encoding = \"hex\" }";
                reader.report(item, forms);
                return None;
            }
        };
        return Some((known, item.clone()));
    }
    let table = reader.section(item, keys::SIGNATURE)?;
    let header = table.get("header");
    if header.is_none() {
        reader.report_missing(
            &table,
            "header",
            "is required: the name of the header that carries the signature",
        );
    }
    let name = header.as_ref().and_then(|v| {
        let name = reader.string(v)?;
        let wrong = match http::HeaderName::from_bytes(name.as_bytes()) {
            Err(_) => "is not a valid header name; write one such as \"X-Signature\"",
            Ok(parsed)
                if parsed == http::header::AUTHORIZATION
                    || RESERVED_HEADERS.contains(&parsed.as_str()) =>
            {
                "is a header that hooktrail sets itself; choose another"
            }
            Ok(_) => return Some(name),
        };
        reader.report(v, wrong);
        None
    });
    let prefix = table.get("prefix").map_or(Some(String::new()), |v| {
        let prefix = reader.string(&v)?;
        let ok = http::HeaderValue::from_str(&prefix).is_ok();
        if !ok {
            reader.report(
                &v,
                "has characters that a header cannot carry; use visible ASCII, such as \"sha256=\"",
            );
        }
        ok.then_some(prefix)
    });
    let encoding = reader
        .one_of(table.get("encoding"), &[("hex", Encoding::Hex), ("base64", Encoding::Base64)]);
    Some((Scheme::Custom { header: name?, prefix: prefix?, encoding: encoding? }, header?))
}

/// Whether a text is a variable in a shell's syntax, `$NAME`.
fn is_variable(text: &str) -> bool {
    let name = text.strip_prefix('$').unwrap_or_default();
    !name.is_empty()
        && name.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
}
