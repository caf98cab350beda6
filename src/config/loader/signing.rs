//! Secrets and signatures.

use crate::{
    config::{
        document::{Section, Value},
        keys,
        reader::Reader,
    },
    crypto::{
        secret::Secret,
        signature::{Encoding, Scheme, Signer, standard_key},
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
];

pub(super) fn signing<'d>(
    reader: &Reader<'_>,
    section: &Section<'d>,
    signatures: Option<Value<'d>>,
) -> Option<(Vec<Secret>, Signer)> {
    let schemes = match signatures {
        None => Some(vec![Scheme::StandardWebhooks]),
        Some(v) => schemes(reader, &v),
    };
    let value = section.get("secrets");
    let items = match &value {
        None => Vec::new(),
        Some(v) if Reader::is_string(v) => {
            reader.report(v, "must be an array, also of one: secrets = [\"${SECRET}\"]");
            return None;
        }
        Some(v) => reader.array(v)?,
    };
    if items.is_empty() && schemes.as_ref().is_none_or(|s| !s.is_empty()) {
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
    let signer = Signer::try_new(schemes?, &secrets).ok()?;
    Some((secrets, signer))
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
        if let Some((_, first)) =
            schemes.iter().find(|(s, _)| s.header().eq_ignore_ascii_case(scheme.header()))
        {
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
        let n = match reader.string(item)?.as_str() {
            "standard-webhooks" => 0,
            "mailtrap" => 1,
            _ => {
                let forms = "must be \"standard-webhooks\" or \"mailtrap\", or a header of your own such as \
                             { header = \"X-Signature\", prefix = \"sha256=\", encoding = \"hex\" }";
                reader.report(item, forms);
                return None;
            }
        };
        return Some((
            if n == 0 { Scheme::StandardWebhooks } else { Scheme::Mailtrap },
            item.clone(),
        ));
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
