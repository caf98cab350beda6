//! Where a subscriber does not fit the model of its receiver.

use http::header::AUTHORIZATION;

use super::{
    model::{Model, Refusal},
    subscriber::{Auth, Compression, Subscriber},
};
use crate::{
    crypto::{secret::Secret, signature::Scheme},
    policy::answer::Success,
    wording::{size, span},
};

/// A finding about a subscriber and its receiver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misfit {
    /// What it is, and what the receiver does.
    pub found: String,
    /// With the address of the receiver's documentation.
    pub remedy: String,
}

/// The model that a subscriber is held against: that of its preset, or that its URL is of.
pub fn model_of(subscriber: &Subscriber) -> Option<&'static Model> {
    subscriber.preset.or_else(|| Model::of_url(subscriber.url.expose()))
}

/// All that does not fit.
pub fn misfits(subscriber: &Subscriber) -> Vec<Misfit> {
    let Some(model) = model_of(subscriber) else { return Vec::new() };
    let mut found = Vec::new();
    let title = model.title;
    if let Some(other) = Model::of_url(subscriber.url.expose())
        && subscriber.preset.is_none_or(|preset| preset.name != other.name)
    {
        let preset = match subscriber.preset {
            Some(preset) => format!("the preset is \"{}\"", preset.name),
            None => "it has no preset".to_owned(),
        };
        found.push(Misfit {
            found: format!("its URL is that of {}, and {preset}", other.title),
            remedy: format!("set preset = \"{}\"; see {}", other.name, other.documentation),
        });
    }
    let mut add = |what: String, remedy: String| {
        let remedy = format!("{remedy}; see {}", model.documentation);
        found.push(Misfit { found: what, remedy });
    };
    let format = subscriber.format;
    let own = subscriber.content_type.as_ref().and_then(|v| v.to_str().ok());
    let content_type = own.unwrap_or_else(|| format.content_type());
    if !model.formats.contains(&format) {
        let usual = model.formats.first().map_or("json", |format| format.name());
        add(
            format!("{title} does not read the format \"{}\" as events", format.name()),
            format!("set format = \"{usual}\""),
        );
    } else if !model.takes_type(content_type) {
        let types = model.content_types.join(" or ");
        let (status, _) = (model.refusal)(Refusal::ContentType);
        add(
            format!(
                "{title} answers {status} to the content type {content_type}: it takes {types}"
            ),
            format!("set content_type = \"{}\"", model.content_types.first().unwrap_or(&"")),
        );
    }
    let (status, _) = model.success;
    if subscriber.http.success == Success::Only200 && status != 200 {
        add(
            format!(
                "{title} answers {status} to what it has taken, and only 200 counts as a success"
            ),
            "set http.success = \"2xx\"".to_owned(),
        );
    }
    let gzip = subscriber.http.compression == Compression::Gzip;
    let is_custom = |scheme: &Scheme| matches!(scheme, Scheme::Custom { .. });
    if gzip && !model.gzip {
        add(
            format!("{title} is not known to take compressed requests"),
            "set http.compression = \"none\"".to_owned(),
        );
    } else if gzip && model.verifies_compressed && subscriber.signer.schemes().iter().any(is_custom)
    {
        add(
            format!(
                "{title} verifies the compressed bytes, and hooktrail signs a body before it is compressed"
            ),
            "set http.compression = \"none\", or signatures = [] and a secret header".to_owned(),
        );
    }
    let batch = &subscriber.batch;
    if let Some(most) = model.max_events.filter(|most| batch.max_events > *most) {
        add(
            format!(
                "batch.max_events = {} is more than {title} takes: {most} events",
                batch.max_events
            ),
            format!("set batch.max_events = {most}"),
        );
    }
    if let Some(most) = model.max_bytes.filter(|most| batch.max_bytes > *most) {
        add(
            format!(
                "batch.max_bytes = {} is more than {title} takes: {most} bytes",
                size(batch.max_bytes)
            ),
            format!("set batch.max_bytes to at most {most} bytes"),
        );
    }
    if let Some(age) = model.max_age {
        let longest = subscriber.retry.options().max_elapsed_time;
        if longest.is_zero() || longest >= age {
            let for_how_long = match longest.is_zero() {
                true => "without an end".to_owned(),
                false => format!("for {}", span(longest)),
            };
            add(
                format!(
                    "it retries {for_how_long}, and {title} drops events that are older than {}",
                    span(age)
                ),
                format!("set retry.max_elapsed_time to less than {}", span(age)),
            );
        }
    }
    // Keys in the URL are another way, and nobody's business here.
    let has_query = subscriber.url.expose().query().is_some();
    let has = |name: &str| subscriber.headers.iter().any(|(header, _)| header.as_str() == name);
    let missing: Vec<&str> = model.headers.iter().copied().filter(|name| !has(name)).collect();
    if !missing.is_empty() && !has_query {
        let each = |name: &&str| format!("\"{name}\" = \"${{KEY}}\"");
        let keys: Vec<String> = missing.iter().map(each).collect();
        add(
            format!("{title} refuses requests without {}", missing.join(" and ")),
            format!("set headers = {{ {} }}", keys.join(", ")),
        );
    }
    if let [usual, ..] = model.authorization
        && !model.authorization.iter().any(|scheme| authorizes(subscriber, scheme))
        && !has_query
    {
        let remedy = match *usual {
            "Bearer" => "set auth = { oauth2 = { token_url = \"https://…\", client_id = \"…\", client_secret = \"${SECRET}\", scope = \"…\" } }, or { bearer = \"${TOKEN}\" }".to_owned(),
            scheme => format!("set headers = {{ \"Authorization\" = \"{scheme} ${{TOKEN}}\" }}"),
        };
        add(format!("{title} refuses requests without `Authorization: {usual} …`"), remedy);
    }
    found
}

/// Whether requests have an `authorization` of this scheme.
fn authorizes(subscriber: &Subscriber, scheme: &str) -> bool {
    let begins = |value: &Secret| {
        let parts = value.expose().split_once(' ');
        parts.is_some_and(|(s, token)| s.eq_ignore_ascii_case(scheme) && !token.trim().is_empty())
    };
    let url = subscriber.url.expose();
    match (scheme, &subscriber.auth) {
        ("Bearer", Some(Auth::Bearer(_) | Auth::OAuth2(_)))
        | ("Basic", Some(Auth::Basic { .. })) => true,
        ("Basic", _) if url.password().is_some() => true,
        _ => subscriber.headers.iter().any(|(name, value)| *name == AUTHORIZATION && begins(value)),
    }
}
