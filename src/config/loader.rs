//! Turns the sections of a configuration into checked values. A function returns `None` only after
//! it has reported why.

mod daemon;
mod endpoint;
mod files;
mod format;
mod order;
mod origins;
mod policies;
mod queue;
mod signing;
mod start_from;
mod tenant;
mod tokens;
mod values;

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use toml::{Spanned, de::DeTable};

pub(super) use self::{
    daemon::{admin, log},
    order::no_order,
    origins::origins,
    tenant::Tenants,
};
use super::{
    document::{Layer, Layers, Section, Source, Value},
    keys::{self, Key},
    limits::MAX_SHUTDOWN_TIMEOUT,
    model::Model,
    reader::Reader,
    settings::{Backend, Config, Groups, HistoryConfig, StoreConfig},
    subscriber::{Origin, Subscriber},
};
use crate::{
    crypto::{secret::Secret, tls::TlsPolicy},
    delivery::SubscriberName,
    event::Pattern,
};

/// The top-level groups that apply to every subscriber.
pub(super) struct Defaults<'d> {
    pub(super) batch: Option<Section<'d>>,
    pub(super) http: Option<Section<'d>>,
    /// The keys that a subscriber may have in a group `http` of its own.
    pub(super) own_http: &'static [Key],
    pub(super) retry: Option<Section<'d>>,
    pub(super) circuit_breaker: Option<Section<'d>>,
    /// What each preset sets.
    pub(super) presets: Vec<(&'static Model, Section<'d>)>,
    /// Why nothing of history can be sent to new subscribers, with the remedy.
    pub(super) no_replay: Option<&'static str>,
    /// Why no subscriber can have its events in strict order, with the remedy.
    pub(super) no_order: Option<&'static str>,
    pub(super) tenants: Tenants,
}

/// The sources of the presets.
pub(super) fn presets() -> Vec<(&'static Model, Source)> {
    let source = |model: &'static Model| {
        let path = PathBuf::from(format!("preset \"{}\"", model.name));
        (model, Source::file(path, model.preset.to_owned()))
    };
    Model::ALL.into_iter().map(source).collect()
}

/// What each preset sets, of its parsed source.
pub(super) fn sections<'d>(
    reader: &Reader<'_>,
    presets: &'d [(&'static Model, Source)],
    documents: &'d [Spanned<DeTable<'d>>],
) -> Vec<(&'static Model, Section<'d>)> {
    let both = presets.iter().zip(documents);
    let section = |((model, source), document): (&'d (&'static Model, Source), _)| {
        (*model, reader.root(source, document, keys::SUBSCRIBER))
    };
    both.map(section).collect()
}

pub(super) fn config(reader: &Reader<'_>, source: &Source) -> Option<Config> {
    let document = reader.parse(source);
    let root = reader.root(source, &document, keys::ROOT);
    let shutdown_timeout =
        reader.duration_or(root.get("shutdown_timeout"), 35, Some(MAX_SHUTDOWN_TIMEOUT));
    let queue = queue::queue(reader, &root);
    let store = daemon::store(reader, &root);
    let history = daemon::history(reader, &root);
    let admin = daemon::admin(reader, &root);
    let metrics = daemon::metrics(reader, &root);
    let log = daemon::log(reader, &root);
    let group = |key, keys| root.get(key).and_then(|v| reader.section(&v, keys));
    let presets = presets();
    let documents: Vec<_> = presets.iter().map(|(_, source)| reader.parse(source)).collect();
    let defaults = Defaults {
        presets: sections(reader, &presets, &documents),
        batch: group("batch", keys::BATCH),
        http: group("http", keys::HTTP),
        own_http: keys::HTTP,
        retry: group("retry", keys::RETRY),
        circuit_breaker: group("circuit_breaker", keys::BREAKER),
        no_replay: start_from::forbidden(
            queue.as_ref(),
            store.as_ref().map(|(url, _)| *url),
            history,
        ),
        no_order: order::no_order(queue.as_ref()),
        tenants: Tenants::of(queue.as_ref()),
    };
    // A wrong default is reported even if no subscriber uses it.
    let alone = |base: &Option<_>| Layers { own: None, preset: None, base: base.clone() };
    policies::batch(reader, &alone(&defaults.batch));
    policies::http(reader, &alone(&defaults.http));
    policies::retry(reader, &alone(&defaults.retry));
    policies::breaker(reader, &alone(&defaults.circuit_breaker));

    let mut names = HashMap::new();
    let mut subscribers = subscribers_in(reader, &root, &defaults, &mut names);
    for file in files::included(reader, &root) {
        let text = match reader.read_to_string(&file) {
            Ok(text) => text,
            Err(e) => {
                reader.report_file(
                    &file,
                    format!(
                        "cannot be read: {e}; it is named by `include` in {}",
                        source.path.display()
                    ),
                );
                continue;
            }
        };
        let included = Source::file(file, text);
        let document = reader.parse(&included);
        let root = reader.root(&included, &document, keys::INCLUDED);
        subscribers.extend(subscribers_in(reader, &root, &defaults, &mut names));
    }
    let (store, store_keys) = store?;
    let mut config = Config {
        path: source.path.clone(),
        files: Vec::new(),
        folders: Vec::new(),
        shutdown_timeout: shutdown_timeout?,
        queue: queue?,
        store,
        store_keys,
        history: history?,
        admin: admin?,
        log: log?,
        metrics: metrics?,
        subscribers: subscribers.into(),
        groups: Groups { path: source.path.clone(), text: Secret::new(&source.text) },
    };
    daemon::agree_on_management(reader, &root, &config)?;
    let retention = config.history_retention();
    config.queue.embedded.history = (config.keeps_history() && !retention.is_zero())
        .then_some(HistoryConfig { retention, ..config.history });
    let keeps_history = config.keeps_history();
    if let Backend::Amqp(amqp) = &mut config.queue.backend {
        amqp.keeps_history = keeps_history;
        amqp.has_store = config.store != StoreConfig::None;
        amqp.manages = config.admin.manage;
    }
    Some(config)
}

/// The subscribers' names, each with the file that has its table.
pub(super) fn all_names(reader: &Reader<'_>, source: &Source) -> Vec<(SubscriberName, PathBuf)> {
    let document = reader.parse(source);
    let root = reader.root(source, &document, keys::ROOT);
    let (mut found, mut known) = (Vec::new(), HashMap::new());
    let mut names_in = |root: &Section<'_>| {
        let tables =
            root.get("subscriber").and_then(|value| reader.array(&value)).unwrap_or_default();
        let sections = tables
            .iter()
            .filter_map(|table| reader.section(&reader.named(table), keys::SUBSCRIBER));
        let names = sections.filter_map(|section| endpoint::name(reader, &section, &mut known));
        found.extend(names.map(|name| (name, root.source.path.clone())));
    };
    names_in(&root);
    for path in files::included(reader, &root) {
        if let Ok(text) = reader.read_to_string(&path) {
            let included = Source::file(path, text);
            let document = reader.parse(&included);
            names_in(&reader.root(&included, &document, keys::INCLUDED));
        }
    }
    found
}

fn subscribers_in<'d>(
    reader: &Reader<'_>,
    root: &Section<'d>,
    defaults: &Defaults<'d>,
    names: &mut HashMap<SubscriberName, String>,
) -> Vec<Arc<Subscriber>> {
    let Some(value) = root.get("subscriber") else { return Vec::new() };
    let tables = reader.array(&value).unwrap_or_default();
    tables
        .iter()
        .filter_map(|table| subscriber(reader, table, defaults, names).map(Arc::new))
        .collect()
}

fn subscriber<'d>(
    reader: &Reader<'_>,
    table: &Value<'d>,
    defaults: &Defaults<'d>,
    names: &mut HashMap<SubscriberName, String>,
) -> Option<Subscriber> {
    let section = reader.section(&reader.named(table), keys::SUBSCRIBER)?;
    of_section(reader, &section, defaults, names)
}

/// The subscriber of a table, whose keys are known to be valid here.
pub(super) fn of_section<'d>(
    reader: &Reader<'_>,
    section: &Section<'d>,
    defaults: &Defaults<'d>,
    names: &mut HashMap<SubscriberName, String>,
) -> Option<Subscriber> {
    let name = endpoint::name(reader, section, names);
    let preset = section.get("preset").and_then(|v| {
        let known: Vec<_> = defaults.presets.iter().map(|one| (one.0.name, one)).collect();
        reader.one_of(Some(v), &known)
    });
    let (model, preset) = (preset.map(|(model, _)| *model), preset.map(|(_, keys)| keys));
    let layer = |s: &Section<'d>, key, keys| s.get(key).and_then(|v| reader.section(&v, keys));
    let group = |key, keys, base: &Option<Section<'d>>| Layers {
        own: layer(section, key, keys),
        preset: preset.and_then(|s| layer(s, key, keys)),
        base: base.clone(),
    };
    let batch_group = group("batch", keys::BATCH, &defaults.batch);
    let batch = policies::batch(reader, &batch_group);
    let http_group = Layers {
        own: layer(section, "http", defaults.own_http),
        preset: preset.and_then(|s| layer(s, "http", keys::HTTP)),
        base: defaults.http.clone(),
    };
    let http = policies::http(reader, &http_group);
    let retry_group = group("retry", keys::RETRY, &defaults.retry);
    let retry = policies::retry(reader, &retry_group);
    let circuit_breaker = policies::breaker(
        reader,
        &group("circuit_breaker", keys::BREAKER, &defaults.circuit_breaker),
    );
    let url = endpoint::url(reader, section, &http_group);
    let events = match section.get("events") {
        None => Some(vec![Pattern::all()]),
        Some(v) => reader.patterns(
            &v,
            "is empty, so no event would match; leave `events` out for all events, or name some",
        ),
    };
    let tenant = tenant::tenant(reader, section, defaults.tenants);
    let own = Layers { own: Some(section.clone()), preset: preset.cloned(), base: None };
    let bodies = format::bodies(reader, section, &own);
    let by = if own.layer("format") == Layer::Preset { ", which the preset sets" } else { "" };
    let batch = batch.zip(bodies.as_ref()).and_then(|(batch, bodies)| {
        policies::fitting(reader, batch, (bodies.format, by), &batch_group)
    });
    let headers =
        section.get("headers").map_or(Some(Vec::new()), |v| endpoint::headers(reader, &v));
    let auth = section
        .get("auth")
        .map_or(Some(None), |v| endpoint::auth(reader, &v, &http_group).map(Some));
    let tls = section.get("tls").map_or(Some(TlsPolicy::default()), |v| endpoint::tls(reader, &v));
    let order = order::Order { reader, forbidden: defaults.no_order };
    let in_order = order.read(section);
    let (http, retry) = match in_order {
        Some(true) => {
            let start_from = section.get("start_from");
            (order.http(http, &http_group, start_from.as_ref()), order.retry(retry, &retry_group))
        }
        _ => (http, retry),
    };
    let conditions = values::conditions(reader, section);
    let redaction = values::redaction(reader, section);
    let event_ids = reader.flag(section.get("event_ids"));
    let paused = reader.flag(section.get("paused"));
    let start_from = start_from::start_from(reader, section, defaults.no_replay);
    let signatures = section.get("signatures").or_else(|| preset.and_then(|p| p.get("signatures")));
    let signing = signing::signing(reader, section, signatures);
    endpoint::agree_on_headers(
        reader,
        section,
        url.as_ref(),
        headers.as_deref(),
        signing.as_ref().map(|signing| signing.signer.schemes()),
    );
    let signing::Signing { secrets, signing_key, signer } = signing?;
    let format::Bodies { format, content_type, metadata } = bodies?;
    let (line, _) = section.source.position(section.span.start);
    let file = Origin::File { path: section.source.path.clone(), line };
    Some(Subscriber {
        name: name?,
        origin: if section.source.is_request { Origin::Api } else { file },
        url: url?,
        events: events?,
        tenant: tenant?,
        preset: model,
        format,
        content_type,
        metadata,
        secrets,
        signing_key,
        signer,
        headers: headers?,
        auth: auth?,
        tls: tls?,
        batch: batch?,
        http: http?,
        retry: retry?,
        circuit_breaker: circuit_breaker?,
        in_order: in_order?,
        conditions: conditions?,
        redaction: redaction?,
        event_ids: event_ids?,
        paused: paused?,
        start_from: start_from?,
    })
}
