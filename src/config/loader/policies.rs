//! The groups that subscribers share: `batch`, `http`, `retry`, `circuit_breaker`.

use std::time::Duration;

use url::Url;

use crate::{
    config::{
        document::{Layer, Layers, Value},
        keys,
        limits::{
            MAX_ATTEMPTS, MAX_CONCURRENCY, MAX_FAILURES, MAX_OPEN_FOR, MAX_TIMEOUT, MAX_WAIT,
        },
        reader::Reader,
        settings::Reach,
        subscriber::{Compression, HttpPolicy},
    },
    crypto::secret::SecretUrl,
    event::payload::Format,
    policy::{
        address::AddressPolicy,
        answer::Success,
        batching::BatchPolicy,
        circuit_breaker::BreakerPolicy,
        rate::{Rate, RateOf},
        retry::{Exhausted, MAX_DELAY, RetryOptions, RetryPolicy},
    },
    wording::span,
};

pub(super) fn batch(reader: &Reader<'_>, group: &Layers<'_>) -> Option<BatchPolicy> {
    let max_events = reader.integer_or(group.get("max_events"), 500, 1..=BatchPolicy::MAX_EVENTS);
    let max_bytes = match group.get("max_bytes") {
        None => Some(1024 * 1024),
        Some(v) => reader.size(&v, BatchPolicy::MIN_BYTES..=BatchPolicy::MAX_BYTES),
    };
    let max_wait = reader.duration_or(group.get("max_wait"), 1, Some(MAX_WAIT));
    Some(BatchPolicy {
        max_events: usize::try_from(max_events?).ok()?,
        max_bytes: usize::try_from(max_bytes?).ok()?,
        max_wait: max_wait?,
    })
}

/// A batch has no more events than a body of the format.
pub(super) fn fitting(
    reader: &Reader<'_>,
    batch: BatchPolicy,
    (format, by): (Format, &str),
    group: &Layers<'_>,
) -> Option<BatchPolicy> {
    let Some(most) = format.most_events().filter(|most| *most < batch.max_events) else {
        return Some(batch);
    };
    if group.layer("max_events") == Layer::Own
        && let Some(v) = group.get("max_events")
    {
        reader.report(&v, format!("must be at most {most} with format = \"{}\"{by}; leave it out, or choose another format", format.name()));
        return None;
    }
    Some(BatchPolicy { max_events: most, ..batch })
}

pub(super) fn http(reader: &Reader<'_>, group: &Layers<'_>) -> Option<HttpPolicy> {
    let timeout = reader.positive_duration_or(group.get("timeout"), 30, MAX_TIMEOUT);
    let connect_timeout = reader.positive_duration_or(group.get("connect_timeout"), 5, MAX_TIMEOUT);
    let concurrency = reader.integer_or(group.get("concurrency"), 1, 1..=MAX_CONCURRENCY);
    let success =
        reader.one_of(group.get("success"), &[("2xx", Success::Any2xx), ("200", Success::Only200)]);
    let compression = reader.one_of(
        group.get("compression"),
        &[Compression::None, Compression::Gzip].map(|one| (one.name(), one)),
    );
    let rate = group.get("rate").map_or(Some(None), |v| rate(reader, &v));
    let allow_http = reader.flag(group.get("allow_http"));
    let addresses = addresses(reader, group);
    let proxy = proxy(reader, group);
    Some(HttpPolicy {
        timeout: timeout?,
        connect_timeout: connect_timeout?,
        concurrency: usize::try_from(concurrency?).ok()?,
        success: success?,
        compression: compression?,
        rate: rate?,
        allow_http: allow_http?,
        addresses: addresses?,
        proxy: proxy?,
    })
}

/// The key `http.rate`; an empty text overrides the top level's with none.
fn rate(reader: &Reader<'_>, value: &Value<'_>) -> Option<Option<Rate>> {
    if value.value.as_integer().is_some() || value.value.as_float().is_some() {
        reader.report(
            value,
            "must be a text such as \"50/s\" or \"30/m\", or { events = \"10000/s\" }",
        );
        return None;
    }
    let (value, of) = if Reader::is_string(value) {
        (value.clone(), RateOf::Requests)
    } else {
        let table = reader.section(value, keys::RATE)?;
        let Some(events) = table.get("events") else {
            reader.report_missing(
                &table,
                "events",
                "is required in this form: the most events in a second, such as \"10000/s\"",
            );
            return None;
        };
        (events, RateOf::Events)
    };
    let text = reader.string(&value)?;
    if text.is_empty() {
        return Some(None);
    }
    let rate = Rate::parse(&text, of);
    if rate.is_none() {
        reader.report(&value, "is not a rate; write an amount from 1 to 1000000 in a second or a minute, such as \"50/s\" or \"30/m\", or \"\" for none");
    }
    rate.map(Some)
}

/// The table `[admin.api_subscribers]`.
pub(super) fn reach(reader: &Reader<'_>, value: &Value<'_>) -> Option<Reach> {
    let group = Layers { own: Some(reader.section(value, keys::REACH)?), preset: None, base: None };
    let allow_http = reader.flag(group.get("allow_http"));
    let (addresses, proxy) = (addresses(reader, &group), proxy(reader, &group));
    Some(Reach { allow_http: allow_http?, allow_addresses: addresses?.allow, proxy: proxy? })
}

/// The proxy; an empty text overrides the top level's with none.
fn proxy(reader: &Reader<'_>, http: &Layers<'_>) -> Option<Option<SecretUrl>> {
    let Some(value) = http.get("proxy") else { return Some(None) };
    let text = reader.string(&value)?;
    if text.is_empty() {
        return Some(None);
    }
    // Not quoted: the URL may contain a password.
    let url = text
        .parse::<Url>()
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https") && url.host().is_some());
    if url.is_none() {
        reader.report(&value, "is not the URL of a proxy; write one such as \"http://proxy.internal:3128\", or \"\" for none");
    }
    url.map(|url| Some(SecretUrl::new(url)))
}

pub(super) fn addresses(reader: &Reader<'_>, http: &Layers<'_>) -> Option<AddressPolicy> {
    let allow_private = reader.flag(http.get("allow_private_addresses"));
    let network = |item: &Value<'_>| {
        let text = reader.string(item)?;
        let net = text
            .parse()
            .ok()
            .or_else(|| text.parse::<std::net::IpAddr>().ok().map(ipnet::IpNet::from));
        if net.is_none() {
            reader.report(
                item,
                format!(
                    "`{text}` is not a network; write one such as \"10.1.0.0/16\" or \"fd00::/8\""
                ),
            );
        }
        net
    };
    let items = match http.get("allow_addresses") {
        None => Vec::new(),
        Some(v) => reader.array(&v)?,
    };
    let allow: Vec<_> = items.iter().filter_map(network).collect();
    let all = allow.len() == items.len();
    Some(AddressPolicy { allow_private: allow_private?, allow: all.then_some(allow)? })
}

pub(super) fn retry(reader: &Reader<'_>, group: &Layers<'_>) -> Option<RetryPolicy> {
    let d = RetryOptions::default();
    let float = |key, default| group.get(key).map_or(Some(default), |v| reader.float(&v));
    let initial_interval = reader.duration_or(
        group.get("initial_interval"),
        d.initial_interval.as_secs(),
        Some(MAX_DELAY),
    );
    let max_interval =
        reader.duration_or(group.get("max_interval"), d.max_interval.as_secs(), Some(MAX_DELAY));
    let multiplier = float("multiplier", d.multiplier);
    let randomization_factor = float("randomization_factor", d.randomization_factor);
    let max_attempts =
        reader.integer_or(group.get("max_attempts"), i64::from(d.max_attempts), 0..=MAX_ATTEMPTS);
    let max_elapsed_time =
        reader.duration_or(group.get("max_elapsed_time"), d.max_elapsed_time.as_secs(), None);
    let on_exhausted = reader.one_of(
        group.get("on_exhausted"),
        &[("dead_letter", Exhausted::DeadLetter), ("pause", Exhausted::Pause)],
    );
    // An unreadable value is reported already, and replaced by one that fits every other.
    let options = RetryOptions {
        initial_interval: initial_interval.unwrap_or(Duration::from_nanos(1)),
        multiplier: multiplier.unwrap_or(d.multiplier),
        randomization_factor: randomization_factor.unwrap_or(d.randomization_factor),
        max_interval: max_interval.unwrap_or(MAX_DELAY),
        max_attempts: max_attempts.and_then(|n| u32::try_from(n).ok()).unwrap_or(d.max_attempts),
        max_elapsed_time: max_elapsed_time.unwrap_or(d.max_elapsed_time),
        on_exhausted: on_exhausted.unwrap_or(d.on_exhausted),
    };
    let ends =
        [("initial_interval", options.initial_interval), ("max_interval", options.max_interval)];
    let checked = RetryPolicy::try_new(options);
    for (key, why) in checked.as_ref().err().into_iter().flatten() {
        match group.get(key).filter(|_| *key != "max_interval") {
            Some(value) => reader.report(&value, *why),
            // It is at most 72 h, as checked above: so it is shorter than the other.
            None => report_pair(reader, group, ends),
        }
    }
    let intervals = initial_interval.and(max_interval).and(multiplier).and(randomization_factor);
    intervals.and(max_attempts).and(max_elapsed_time).and(on_exhausted).and(checked.ok())
}

pub(super) fn breaker(reader: &Reader<'_>, group: &Layers<'_>) -> Option<BreakerPolicy> {
    let failures = reader.integer_or(group.get("failures"), 5, 0..=MAX_FAILURES);
    let open_for = reader.positive_duration_or(group.get("open_for"), 30, MAX_OPEN_FOR);
    let max_open_for = reader.positive_duration_or(group.get("max_open_for"), 600, MAX_OPEN_FOR);
    if open_for.zip(max_open_for).is_some_and(|(first, longest)| first > longest) {
        let [first, longest] = [open_for, max_open_for].map(Option::unwrap_or_default);
        report_pair(reader, group, [("open_for", first), ("max_open_for", longest)]);
        return None;
    }
    Some(BreakerPolicy {
        failures: u32::try_from(failures?).ok()?,
        open_for: open_for?,
        max_open_for: max_open_for?,
    })
}

/// Reports that the first of two durations is longer than the second. The report stands at the key
/// that is nearer to the subscriber, and names the other key with its origin.
fn report_pair(reader: &Reader<'_>, group: &Layers<'_>, [shorter, longer]: [(&str, Duration); 2]) {
    let is_own = group.layer(shorter.0) < group.layer(longer.0);
    let (at, (other, time)) = if is_own { (shorter.0, longer) } else { (longer.0, shorter) };
    let Some(value) = group.get(at) else { unreachable!("the defaults agree with each other") };
    let from = match (group.layer(other), group.get(other)) {
        (Layer::Preset, _) => "by the preset".to_owned(),
        (Layer::Own | Layer::Base, Some(other)) => format!("at {}", other.place()),
        (Layer::Default, _) | (_, None) => "by default".to_owned(),
    };
    let what = if is_own { "longer" } else { "shorter" };
    let why = format!(
        "must not be {what} than {other}, which is {} {from}; change this one, or set {other} here too",
        span(time)
    );
    reader.report(&value, why);
}
