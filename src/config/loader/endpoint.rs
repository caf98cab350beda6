//! A subscriber's name, the URL of its requests, and their authentication.

use std::collections::HashMap;

use http::{HeaderName, HeaderValue};
use url::Url;

use super::{
    policies,
    signing::{self, RESERVED_HEADERS},
};
use crate::{
    config::{
        document::{Layers, Section, Value},
        keys::{self, Key},
        reader::Reader,
        subscriber::{Auth, ClientCredentials},
    },
    crypto::{
        secret::{Secret, SecretUrl},
        signature::Scheme,
        tls::{self, BadIdentity, Identity, TlsPolicy},
    },
    delivery::SubscriberName,
};

pub(super) fn name(
    reader: &Reader<'_>,
    section: &Section<'_>,
    names: &mut HashMap<SubscriberName, String>,
) -> Option<SubscriberName> {
    let Some(value) = section.get("name") else {
        reader.report_missing(
            section,
            "name",
            &format!("is required: {}; it names the subscriber's queues", SubscriberName::RULE),
        );
        return None;
    };
    let name = SubscriberName::configured(&reader.string(&value)?)
        .map_err(|why| reader.report(&value, format!("{why}; it names the subscriber's queues")))
        .ok()?;
    let here = format!("{}: {}", section.source.path.display(), value.key);
    if let Some(first) = names.insert(name.clone(), here) {
        reader.report(&value, format!("`{name}` is already the name of {first}; names are unique"));
        return None;
    }
    Some(name)
}

/// Reads only those keys of the group `http` that the URL depends on: other mistakes there do not
/// hide one here.
pub(super) fn url(
    reader: &Reader<'_>,
    section: &Section<'_>,
    http: &Layers<'_>,
) -> Option<SecretUrl> {
    let Some(value) = section.get("url") else {
        reader.report_missing(
            section,
            "url",
            "is required: where the batches go, such as \"https://siem.example.com/hooks\"",
        );
        return None;
    };
    target(reader, &value, http, "events")
}

/// A URL that requests go to, with `what`.
fn target(
    reader: &Reader<'_>,
    value: &Value<'_>,
    http: &Layers<'_>,
    what: &str,
) -> Option<SecretUrl> {
    // No message quotes the URL: userinfo, path and query may be secrets.
    let url = match reader.string(value)?.parse::<Url>() {
        Ok(url) => url,
        Err(url::ParseError::RelativeUrlWithoutBase) => {
            reader.report(value, "is not a URL: it has no scheme; write https:// before the host");
            return None;
        }
        Err(e) => {
            reader.report(value, format!("is not a URL: {e}"));
            return None;
        }
    };
    let scheme_ok = match url.scheme() {
        "https" => true,
        // If `allow_http` itself is wrong, only that is reported.
        "http" => reader.flag(http.get("allow_http")).is_none_or(|allowed| {
            if !allowed {
                let remedy = if value.source.is_request {
                    "or set `allow_http = true` in [admin.api_subscribers] of the daemon's configuration"
                } else {
                    "or set `http.allow_http = true` for this subscriber"
                };
                reader.report(value, format!("plain http sends {what} unencrypted; use https, {remedy}"));
            }
            allowed
        }),
        other => {
            reader.report(value, format!("scheme `{other}` is not supported; use https"));
            false
        }
    };
    let blocked = policies::addresses(reader, http).and_then(|a| a.check_literal(&url).err());
    if let Some(what) = blocked {
        let remedy = if value.source.is_request {
            "if it is meant, name it in `allow_addresses` of [admin.api_subscribers] in the daemon's configuration"
        } else {
            "if it is meant, name it in `http.allow_addresses`, or set `http.allow_private_addresses = true`"
        };
        reader.report(value, format!("its address is not a public one ({what}); {remedy}"));
    }
    (scheme_ok && blocked.is_none()).then(|| SecretUrl::new(url))
}

pub(super) fn headers(reader: &Reader<'_>, value: &Value<'_>) -> Option<Vec<(HeaderName, Secret)>> {
    let entries = reader.entries(value)?;
    let mut headers: Vec<(HeaderName, Secret)> = Vec::new();
    for (name, value) in &entries {
        let Some(text) = reader.string(value) else { continue };
        let wrong = match HeaderName::from_bytes(name.as_bytes()) {
            Err(_) => "is not a valid header name; write one such as \"X-Tenant\"",
            Ok(name) if RESERVED_HEADERS.contains(&name.as_str()) => {
                "is a header that hooktrail sets itself; remove it"
            }
            Ok(name) if headers.iter().any(|(n, _)| *n == name) => {
                "is there twice; case makes no difference in a header's name"
            }
            Ok(_) if HeaderValue::from_str(&text).is_err() || !text.is_ascii() => {
                "has a value that a header cannot carry; use visible ASCII characters and spaces"
            }
            Ok(name) => {
                headers.push((name, Secret::new(text)));
                continue;
            }
        };
        reader.report(value, wrong);
    }
    (headers.len() == entries.len()).then_some(headers)
}

pub(super) fn auth(reader: &Reader<'_>, value: &Value<'_>, http: &Layers<'_>) -> Option<Auth> {
    let section = reader.section(value, keys::AUTH)?;
    match (section.get("basic"), section.get("bearer"), section.get("oauth2")) {
        (Some(basic), None, None) => {
            let basic = reader.section(&basic, keys::BASIC)?;
            let required = |key| {
                let found = basic.get(key);
                if found.is_none() {
                    reader.report_missing(
                        &basic,
                        key,
                        "is required together with the other one of `username` and `password`",
                    );
                }
                found
            };
            let (username, password) = (required("username"), required("password"));
            let username = username.and_then(|v| {
                let text = reader.string(&v)?;
                let ok = !text.contains(':') && !text.contains(char::is_control);
                if !ok {
                    reader.report(&v, "must have no `:` and no control characters (RFC 7617)");
                }
                ok.then_some(text)
            });
            let password = password.and_then(|v| signing::secret(reader, &v));
            Some(Auth::Basic { username: username?, password: password? })
        }
        (None, Some(bearer), None) => {
            let token = signing::secret(reader, &bearer)?;
            let ok = token.expose().bytes().all(|b| b.is_ascii_graphic());
            if !ok {
                reader.report(&bearer, "must be visible ASCII characters without spaces, which is what a header can carry");
            }
            ok.then_some(Auth::Bearer(token))
        }
        (None, None, Some(oauth2)) => client_credentials(reader, &oauth2, http).map(Auth::OAuth2),
        _ => {
            reader.report(value, "must be one of { basic = { username = \"…\", password = \"…\" } }, { bearer = \"…\" } and { oauth2 = { token_url = \"…\", client_id = \"…\", client_secret = \"…\" } }");
            None
        }
    }
}

fn client_credentials(
    reader: &Reader<'_>,
    value: &Value<'_>,
    http: &Layers<'_>,
) -> Option<ClientCredentials> {
    let section = reader.section(value, keys::OAUTH2)?;
    let required = |key, what| {
        let found = section.get(key);
        if found.is_none() {
            reader.report_missing(&section, key, &format!("is required: {what}"));
        }
        found
    };
    let token_url = required("token_url", "where tokens are fetched").and_then(|v| {
        let url = target(reader, &v, http, "the client's secret")?;
        let has_user = !url.expose().username().is_empty() || url.expose().password().is_some();
        if has_user {
            reader.report(
                &v,
                "must have no user and no password; they are `client_id` and `client_secret`",
            );
        }
        (!has_user).then_some(url)
    });
    // RFC 6749, appendices A.1, A.2 and A.4.
    let text = |v: Value<'_>| {
        let text = reader.string(&v)?;
        let ok = !text.trim().is_empty() && text.bytes().all(|b| matches!(b, b' '..=b'~'));
        if !ok {
            reader.report(&v, "must be visible ASCII characters and spaces");
        }
        ok.then_some(text)
    };
    let client_id =
        required("client_id", "the name of hooktrail at the token's server").and_then(text);
    let client_secret =
        required("client_secret", "its secret there").and_then(|v| signing::secret(reader, &v));
    let optional = |key| section.get(key).map_or(Some(None), |v| text(v).map(Some));
    let (scope, audience) = (optional("scope"), optional("audience"));
    Some(ClientCredentials {
        token_url: token_url?,
        client_id: client_id?,
        client_secret: client_secret?,
        scope: scope?,
        audience: audience?,
    })
}

pub(super) fn tls(reader: &Reader<'_>, value: &Value<'_>) -> Option<TlsPolicy> {
    let section = reader.section(value, keys::TLS)?;
    let read = |v: &Value<'_>| {
        let path = v.source.relative(&reader.string(v)?);
        reader
            .read(&path)
            .map_err(|e| reader.report(v, format!("{} cannot be read: {e}", path.display())))
            .ok()
    };
    let roots = match section.get("ca_file") {
        None => Some(None),
        Some(v) => read(&v)
            .and_then(|pem| tls::roots(&pem).map(Some).map_err(|why| reader.report(&v, why)).ok()),
    };
    let identity = match (section.get("client_cert_file"), section.get("client_key_file")) {
        (None, None) => Some(None),
        (Some(v), None) | (None, Some(v)) => {
            reader
                .report(&v, "needs the other one of `client_cert_file` and `client_key_file`, too");
            None
        }
        (Some(cert), Some(key)) => read(&cert).zip(read(&key)).and_then(|(chain, secret)| {
            match Identity::try_new(&chain, &secret) {
                Ok(identity) => Some(Some(identity)),
                Err(BadIdentity::Certificate(why)) => {
                    reader.report(&cert, why);
                    None
                }
                Err(BadIdentity::Key(why)) => {
                    reader.report(&key, why);
                    None
                }
            }
        }),
    };
    let file = |key: &'static str| {
        Some((key, section.get(key).and_then(|v| Some(v.source.relative(&reader.string(&v)?)))?))
    };
    let files = keys::TLS.iter().map(Key::name).filter_map(file).collect();
    Some(TlsPolicy { roots: roots?, identity: identity?, files })
}

/// Checks that no two sources set the same header: the later would silently replace the first.
pub(super) fn agree_on_headers(
    reader: &Reader<'_>,
    section: &Section<'_>,
    url: Option<&SecretUrl>,
    headers: Option<&[(HeaderName, Secret)]>,
    schemes: Option<&[Scheme]>,
) {
    let in_url = url.is_some_and(|url| {
        !url.expose().username().is_empty() || url.expose().password().is_some()
    });
    let own =
        headers.is_some_and(|all| all.iter().any(|(name, _)| *name == http::header::AUTHORIZATION));
    match (section.get("auth"), section.get("headers")) {
        (Some(auth), _) if in_url => reader.report(
            &auth,
            "cannot be combined with a user or password in `url`; remove one of the two",
        ),
        (Some(auth), _) if own => reader.report(
            &auth,
            "cannot be combined with `Authorization` in `headers`; remove one of the two",
        ),
        (None, Some(headers)) if own && in_url => {
            reader.report(&headers, "cannot have `Authorization` together with a user or password in `url`; remove one of the two");
        }
        _ => {}
    }
    let signed = |name: &HeaderName| {
        schemes
            .is_some_and(|all| all.iter().any(|s| s.header().eq_ignore_ascii_case(name.as_str())))
    };
    if let (Some((name, _)), Some(value)) =
        (headers.and_then(|all| all.iter().find(|(name, _)| signed(name))), section.get("headers"))
    {
        reader.report(
            &value,
            format!(
                "`{name}` is the header of a signature; choose another name for one of the two"
            ),
        );
    }
}
