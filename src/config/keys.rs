//! Every key of the configuration, one row each.
//!
//! Any other key is refused as unknown. From these rows come the differences between two
//! configurations and what each affects, the listing of `check`, and the JSON Schema of
//! `schema config`.

mod key;
mod show;

pub use self::key::{Affects, Key, Reloaded, Shape};
pub(super) use self::key::{Field, Place};
use self::{
    key::{
        Affects::{Bindings, Connections, Decisions, Requests, Session},
        Reloaded::{AfterRestart, Refused, Used},
        global, read, subscriber,
    },
    show::{REDACTED, duration, list, plain, quoted, redacted, scheme, table, url, word},
};
use super::{
    limits::{
        MAX_ATTEMPTS, MAX_CONCURRENCY, MAX_FAILURES, MAX_OPEN_FOR, MAX_SHUTDOWN_TIMEOUT,
        MAX_SUBSCRIBERS, MAX_TIMEOUT, MAX_WAIT,
    },
    model::Model,
    settings::{AmqpConfig, Backend, Config, Intake, IntakeConfig, Reach, StoreConfig, Token},
    subscriber::{Auth, Subscriber},
};
use crate::{
    crypto::secret::SecretUrl,
    event::{TenantPlace, condition::Condition, payload::Format, redaction::With},
    policy::{batching::BatchPolicy, rate::RateOf, retry::MAX_DELAY},
    wording::size,
};

macro_rules! differs {
    ($($path:tt)+) => { |a, b| a.$($path)+ != b.$($path)+ };
}

/// The keys of the file that `--config` names.
pub static ROOT: &[Key] = &[
    read(
        "include",
        "More files with [[subscriber]] tables and nothing else. `*` matches no name that begins with a dot.",
        Shape::List(&Shape::Text),
    ),
    global(
        "shutdown_timeout",
        "The longest time that requests in flight get after SIGTERM or SIGINT.",
        Shape::Duration(Some(MAX_SHUTDOWN_TIMEOUT)),
        Used,
        differs!(shutdown_timeout),
        |c| duration(c.shutdown_timeout),
    ),
    read(
        "queue",
        "The queue of the events; required, but not in a file that `include` names.",
        Shape::Table(QUEUE),
    ),
    read("store", "What hooktrail remembers, besides the queue.", Shape::Table(STORE)),
    read(
        "history",
        "The events and deliveries that are kept to be searched and sent again.",
        Shape::Table(HISTORY),
    ),
    read(
        "admin",
        "The HTTP listener for events, health, metrics and the API.",
        Shape::Table(ADMIN),
    ),
    read("metrics", "What is counted for whom.", Shape::Table(METRICS)),
    read("log", "The format and the level of the log.", Shape::Table(LOG)),
    read("batch", "The size of a batch: the defaults of each subscriber.", Shape::Table(BATCH)),
    read("http", "How requests are sent: the defaults of each subscriber.", Shape::Table(HTTP)),
    read(
        "retry",
        "When failed batches are retried: the defaults of each subscriber.",
        Shape::Table(RETRY),
    ),
    read(
        "circuit_breaker",
        "When requests to a failing endpoint stop: the defaults of each subscriber.",
        Shape::Table(BREAKER),
    ),
    SUBSCRIBERS,
];

/// The keys of a file that `include` names.
pub(super) static INCLUDED: &[Key] = &[SUBSCRIBERS];

const SUBSCRIBERS: Key = read("subscriber", "The subscribers.", Shape::List(&ONE_SUBSCRIBER));

static ONE_SUBSCRIBER: Shape = Shape::Table(SUBSCRIBER);

pub(super) static QUEUE: &[Key] = &[
    global(
        "queue.url",
        "\"embedded\", or the URL of a RabbitMQ: amqp://user:password@host:5672/%2f or amqps://…",
        Shape::Text,
        Refused,
        |a, b| match (&a.queue.backend, &b.queue.backend) {
            (Backend::Embedded, Backend::Embedded) => false,
            (Backend::Amqp(a), Backend::Amqp(b)) => a.url != b.url,
            _ => true,
        },
        |c| match &c.queue.backend {
            Backend::Embedded => word("embedded"),
            Backend::Amqp(amqp) => url(&amqp.url),
        },
    )
    .required(),
    global(
        "queue.data_dir",
        "The directory of the embedded queue's files.",
        Shape::Text,
        Refused,
        |a, b| both_embedded(a, b) && a.queue.embedded.data_dir != b.queue.embedded.data_dir,
        |c| word(&c.queue.embedded.data_dir.display().to_string()),
    ),
    global(
        "queue.retention",
        "How long the embedded queue keeps events that are settled for every subscriber.",
        Shape::Duration(None),
        Refused,
        |a, b| both_embedded(a, b) && a.queue.embedded.retention != b.queue.embedded.retention,
        |c| {
            if matches!(c.queue.backend, Backend::Embedded) {
                duration(c.queue.embedded.retention)
            } else {
                None
            }
        },
    ),
    global(
        "queue.exchange",
        "The topic exchange that producers publish to, routing key = event type; declared as durable if absent.",
        Shape::Text,
        Refused,
        |a, b| intakes(a, b).is_some_and(|(a, b)| a != b && matches!(b, Intake::Exchange(_))),
        |c| match intake(c)? {
            Intake::Exchange(name) => word(name),
            Intake::SourceQueue(_) => None,
        },
    ),
    global(
        "queue.source_queue",
        "An existing queue that events are taken from, instead of `exchange`.",
        Shape::Text,
        Refused,
        |a, b| intakes(a, b).is_some_and(|(a, b)| a != b && matches!(b, Intake::SourceQueue(_))),
        |c| match intake(c)? {
            Intake::Exchange(_) => None,
            Intake::SourceQueue(name) => word(name),
        },
    ),
    global(
        "queue.prefix",
        "The prefix of every queue and exchange that hooktrail declares.",
        Shape::Text,
        Refused,
        |a, b| amqp(a).zip(amqp(b)).is_some_and(|(a, b)| a.prefix != b.prefix),
        |c| word(&amqp(c)?.prefix),
    ),
    global(
        "queue.intake",
        "With url = \"embedded\": the URL of a RabbitMQ, amqp://… or amqps://…, that events come through into the embedded queue.",
        Shape::Text,
        Refused,
        |a, b| {
            both_embedded(a, b)
                && through(a).map(|i| &i.amqp.url) != through(b).map(|i| &i.amqp.url)
        },
        |c| url(&through(c)?.amqp.url),
    ),
    global(
        "queue.bind",
        "With `intake` and `exchange`: the patterns of the events that come in, as AMQP topic patterns; left out: all.",
        Shape::List(&Shape::Text),
        Refused,
        |a, b| through(a).zip(through(b)).is_some_and(|(a, b)| a.bind != b.bind),
        |c| match &through(c)?.bind[..] {
            [] => None,
            bind => list(bind.iter().map(|p| quoted(p.as_str()))),
        },
    ),
    global(
        "queue.tenant",
        "With url = \"embedded\": where the tenant of an event is, for subscribers that get the events of one tenant alone.",
        Shape::Table(TENANT),
        Refused,
        |a, b| a.queue.embedded.tenant != b.queue.embedded.tenant,
        |c| {
            let (key, value) = match c.queue.embedded.tenant.as_ref()? {
                TenantPlace::Header(name) => ("header", name.as_str()),
                TenantPlace::Pointer(pointer) => ("pointer", pointer.as_str()),
            };
            Some(format!("{{ {key} = {} }}", quoted(value)))
        },
    ),
    global(
        "queue.tenants",
        "With `tenant`: \"required\" makes a subscriber without a tenant, who would get the events of all, an error.",
        Shape::Word(&["optional", "required"]),
        Used,
        differs!(queue.embedded.tenants_required),
        |c| {
            let word_of = |required| if required { "required" } else { "optional" };
            c.queue.embedded.tenant.as_ref()?;
            word(word_of(c.queue.embedded.tenants_required))
        },
    ),
    global(
        "queue.management_url",
        "The URL of RabbitMQ's management plugin, from which `check --connect` reads what AMQP does not show.",
        Shape::Text,
        AfterRestart,
        |a, b| management_url(a) != management_url(b),
        |c| url(management_url(c)?),
    ),
];

pub(super) static STORE: &[Key] = &[
    global(
        "store.url",
        "\"sqlite\": the files store.db and history.db in queue.data_dir; or \"none\": nothing is remembered.",
        Shape::Word(&["sqlite", "none"]),
        AfterRestart,
        differs!(store),
        |c| {
            word(match c.store {
                StoreConfig::Sqlite => "sqlite",
                StoreConfig::None => "none",
            })
        },
    ),
    global(
        "store.keys",
        "The keys that seal subscribers made over the API: the first seals, all open; \"file:PATH\" reads a file. Without it store.key in queue.data_dir is made.",
        Shape::List(&Shape::Text),
        AfterRestart,
        differs!(store_keys),
        |c| match c.store_keys.is_empty() {
            true => None,
            false => list(c.store_keys.iter().map(|_| quoted(REDACTED))),
        },
    ),
];

pub(super) static HISTORY: &[Key] = &[
    global(
        "history.retention",
        "How long events and deliveries are kept; with \"0s\" none are.",
        Shape::Duration(None),
        AfterRestart,
        differs!(history.retention),
        |c| duration(c.history.retention),
    ),
    global(
        "history.max_bytes",
        "The most bytes of history.db: the oldest events and deliveries give way.",
        Shape::Size,
        AfterRestart,
        differs!(history.max_bytes),
        |c| plain(format_args!("\"{}\"", size(c.history.max_bytes as usize))),
    ),
    global(
        "history.bodies",
        "Whether events are kept with all their bytes; false: their fields alone, and nothing can be sent again from history.",
        Shape::Flag,
        AfterRestart,
        differs!(history.bodies),
        |c| plain(c.history.bodies),
    ),
];

pub(super) static ADMIN: &[Key] = &[
    global(
        "admin.listen",
        "An IP address and a port; port 0 means any free port.",
        Shape::Text,
        AfterRestart,
        differs!(admin.listen),
        |c| word(&c.admin.listen.to_string()),
    ),
    global(
        "admin.public_url",
        "Where browsers find the console behind a proxy with TLS: https, host and port.",
        Shape::Text,
        AfterRestart,
        differs!(admin.public_url),
        |c| word(&c.admin.public_url.as_ref()?.origin()),
    ),
    global(
        "admin.token",
        "The bearer token of /api; required if `listen` is not a loopback address.",
        Shape::Text,
        AfterRestart,
        differs!(admin.token),
        |c| c.admin.token.as_ref().and_then(|_| redacted()),
    ),
    global(
        "admin.tokens",
        "More bearer tokens of /api, each with a name and a role.",
        Shape::List(&ONE_TOKEN),
        AfterRestart,
        differs!(admin.tokens),
        |c| {
            let entry = |t: &Token| {
                let (name, role) = (quoted(&t.name), quoted(t.role.name()));
                let token = quoted(REDACTED);
                table([format!("name = {name}, token = {token}, role = {role}")].into_iter())
            };
            let any = !c.admin.tokens.is_empty();
            any.then(|| list(c.admin.tokens.iter().map(entry))).flatten()
        },
    ),
    global(
        "admin.manage",
        "Whether subscribers can be made, changed and removed over the API; needs a token and a store.",
        Shape::Flag,
        AfterRestart,
        differs!(admin.manage),
        |c| plain(c.admin.manage),
    ),
    global(
        "admin.max_subscribers",
        "The most subscribers, those of files included, up to which the API makes another; 50 on RabbitMQ, 10000 on the embedded queue.",
        Shape::Whole(1, MAX_SUBSCRIBERS),
        Used,
        differs!(admin.max_subscribers),
        |c| plain(c.max_subscribers()),
    ),
    global(
        "admin.api_subscribers",
        "The endpoints that subscribers made over the API may have; those of [http] are not theirs.",
        Shape::Table(REACH),
        Used,
        differs!(admin.api_subscribers),
        |c| {
            let Reach { allow_http, allow_addresses, proxy } = &c.admin.api_subscribers;
            let allowed = list(allow_addresses.iter().map(|net| quoted(&net.to_string())));
            let proxy =
                proxy.as_ref().map(|proxy| format!("proxy = {}", quoted(&proxy.to_string())));
            let first = [
                format!("allow_http = {allow_http}"),
                format!("allow_addresses = {}", allowed.unwrap_or_default()),
            ];
            Some(table(first.into_iter().chain(proxy)))
        },
    ),
];

pub(super) static REACH: &[Key] = &[
    read("api_subscribers.allow_http", "Whether plain http:// URLs are allowed.", Shape::Flag),
    read(
        "api_subscribers.allow_addresses",
        "Networks that are allowed although they are not public, such as \"10.1.0.0/16\".",
        Shape::List(&Shape::Text),
    ),
    read(
        "api_subscribers.proxy",
        "The URL of a proxy, which then resolves names and decides about their addresses.",
        Shape::Text,
    ),
];

static ONE_TOKEN: Shape = Shape::Table(TOKEN);

pub(super) static TOKEN: &[Key] = &[
    read("tokens.name", "A unique name; operations are recorded with it.", Shape::Text).required(),
    read("tokens.token", "The token itself, unique too.", Shape::Text).required(),
    read(
        "tokens.role",
        "\"admin\" may do all, \"read\" only what changes nothing, \"intake\" only publish events.",
        Shape::Word(&["admin", "read", "intake"]),
    )
    .required(),
];

pub(super) static METRICS: &[Key] = &[global(
    "metrics.per_subscriber",
    "Whether each subscriber has series of its own, a hundred; false: all are counted together, as `subscriber=\"*\"`. Without it true up to 1000 subscribers at the start.",
    Shape::Flag,
    AfterRestart,
    differs!(metrics.per_subscriber),
    |c| plain(c.metrics.per_subscriber?),
)];

pub(super) static LOG: &[Key] = &[
    global(
        "log.format",
        "Text, or one JSON object a line.",
        Shape::Word(&["text", "json"]),
        AfterRestart,
        differs!(log.json),
        |c| word(if c.log.json { "json" } else { "text" }),
    ),
    global(
        "log.level",
        "The least severe level that is logged.",
        Shape::Word(&["error", "warn", "info", "debug", "trace"]),
        Used,
        differs!(log.level),
        |c| word(&c.log.level.to_string().to_lowercase()),
    ),
];

pub(super) static BATCH: &[Key] = &[
    subscriber(
        "batch.max_events",
        "The most events in a request.",
        Shape::Whole(1, BatchPolicy::MAX_EVENTS),
        &[Session],
        differs!(batch.max_events),
        |s| plain(s.batch.max_events),
    ),
    subscriber(
        "batch.max_bytes",
        "The most bytes in a request's body.",
        Shape::Size,
        &[Session],
        differs!(batch.max_bytes),
        |s| plain(format_args!("\"{}\"", size(s.batch.max_bytes))),
    ),
    subscriber(
        "batch.max_wait",
        "The longest time that an event waits for others; with \"0s\" it is sent as soon as a request slot is free.",
        Shape::Duration(Some(MAX_WAIT)),
        &[Session],
        differs!(batch.max_wait),
        |s| duration(s.batch.max_wait),
    ),
];

pub(super) static HTTP: &[Key] = &[
    subscriber(
        "http.timeout",
        "The longest time from the start of a request to its answer.",
        Shape::Duration(Some(MAX_TIMEOUT)),
        &[Connections],
        differs!(http.timeout),
        |s| duration(s.http.timeout),
    ),
    subscriber(
        "http.connect_timeout",
        "The longest time to open a connection.",
        Shape::Duration(Some(MAX_TIMEOUT)),
        &[Connections],
        differs!(http.connect_timeout),
        |s| duration(s.http.connect_timeout),
    ),
    subscriber(
        "http.concurrency",
        "The most requests in flight to the subscriber; 1 keeps first attempts in order.",
        Shape::Whole(1, MAX_CONCURRENCY),
        &[Connections, Session],
        differs!(http.concurrency),
        |s| plain(s.http.concurrency),
    ),
    subscriber(
        "http.success",
        "The statuses that mean success.",
        Shape::Word(&["2xx", "200"]),
        &[Requests],
        differs!(http.success),
        |s| word(s.http.success.name()),
    ),
    subscriber(
        "http.compression",
        "How request bodies are compressed, after they are signed; a receiver that answers 415 gets them plain until the next reload.",
        Shape::Word(&["none", "gzip"]),
        &[Requests],
        differs!(http.compression),
        |s| word(s.http.compression.name()),
    ),
    subscriber(
        "http.rate",
        "The most requests in a second or a minute, such as \"50/s\" or \"30/m\", or the most events: { events = \"10000/s\" }. Each daemon counts alone.",
        Shape::Either(&[Shape::Text, Shape::Table(RATE)]),
        &[Session],
        differs!(http.rate),
        |s| {
            let rate = s.http.rate?;
            match rate.of {
                RateOf::Requests => word(&rate.to_string()),
                RateOf::Events => Some(format!("{{ events = {} }}", quoted(&rate.to_string()))),
            }
        },
    ),
    subscriber(
        "http.allow_http",
        "Whether plain http:// URLs are allowed.",
        Shape::Flag,
        &[Decisions],
        differs!(http.allow_http),
        |s| plain(s.http.allow_http),
    ),
    subscriber(
        "http.allow_private_addresses",
        "Whether addresses that are not public are allowed: loopback, link-local, RFC 1918 and others.",
        Shape::Flag,
        &[Connections],
        differs!(http.addresses.allow_private),
        |s| plain(s.http.addresses.allow_private),
    ),
    subscriber(
        "http.allow_addresses",
        "Networks that are allowed although they are not public, such as \"10.1.0.0/16\".",
        Shape::List(&Shape::Text),
        &[Connections],
        differs!(http.addresses.allow),
        |s| list(s.http.addresses.allow.iter().map(|network| quoted(&network.to_string()))),
    ),
    subscriber(
        "http.proxy",
        "The URL of a proxy, which then resolves names and decides about their addresses; \"\" overrides the top level's with none.",
        Shape::Text,
        &[Requests, Connections],
        differs!(http.proxy),
        |s| url(s.http.proxy.as_ref()?),
    ),
];

pub(super) static RETRY: &[Key] = &[
    subscriber(
        "retry.initial_interval",
        "The delay after the first failed attempt.",
        Shape::Duration(Some(MAX_DELAY)),
        &[Decisions],
        differs!(retry.options().initial_interval),
        |s| duration(s.retry.options().initial_interval),
    ),
    subscriber(
        "retry.multiplier",
        "The factor from one delay to the next.",
        Shape::Number(1.0, 1000.0),
        &[Decisions],
        differs!(retry.options().multiplier),
        |s| plain(format_args!("{:?}", s.retry.options().multiplier)),
    ),
    subscriber(
        "retry.randomization_factor",
        "The random spread of a delay, as a share of it: 0.2 is ±20 %.",
        Shape::Number(0.0, 1.0),
        &[Decisions],
        differs!(retry.options().randomization_factor),
        |s| plain(format_args!("{:?}", s.retry.options().randomization_factor)),
    ),
    subscriber(
        "retry.max_interval",
        "The longest delay, before the random spread.",
        Shape::Duration(Some(MAX_DELAY)),
        &[Decisions],
        differs!(retry.options().max_interval),
        |s| duration(s.retry.options().max_interval),
    ),
    subscriber(
        "retry.max_attempts",
        "The most attempts, including the first one; 0: no limit.",
        Shape::Whole(0, MAX_ATTEMPTS),
        &[Decisions],
        differs!(retry.options().max_attempts),
        |s| plain(s.retry.options().max_attempts),
    ),
    subscriber(
        "retry.max_elapsed_time",
        "The longest time from the first attempt to a retry; \"0s\": no limit.",
        Shape::Duration(None),
        &[Decisions],
        differs!(retry.options().max_elapsed_time),
        |s| duration(s.retry.options().max_elapsed_time),
    ),
    subscriber(
        "retry.on_exhausted",
        "What happens after the last attempt: the batch becomes a dead letter, or stays and pauses the subscriber.",
        Shape::Word(&["dead_letter", "pause"]),
        &[Decisions],
        differs!(retry.options().on_exhausted),
        |s| word(s.retry.options().on_exhausted.name()),
    ),
];

pub(super) static BREAKER: &[Key] = &[
    subscriber(
        "circuit_breaker.failures",
        "The number of consecutive failed attempts that open the circuit; 0: never.",
        Shape::Whole(0, MAX_FAILURES),
        &[Decisions],
        differs!(circuit_breaker.failures),
        |s| plain(s.circuit_breaker.failures),
    ),
    subscriber(
        "circuit_breaker.open_for",
        "The time that the circuit is open before the first probe; doubled when a probe fails that was a first attempt, not a retry.",
        Shape::Duration(Some(MAX_OPEN_FOR)),
        &[Decisions],
        differs!(circuit_breaker.open_for),
        |s| duration(s.circuit_breaker.open_for),
    ),
    subscriber(
        "circuit_breaker.max_open_for",
        "The longest time between two probes, and the longest hold by a Retry-After.",
        Shape::Duration(Some(MAX_OPEN_FOR)),
        &[Decisions],
        differs!(circuit_breaker.max_open_for),
        |s| duration(s.circuit_breaker.max_open_for),
    ),
];

static PRESETS: &[&str] = &Model::NAMES;

static FORMATS: &[&str] = &Format::NAMES;

/// The keys of one `[[subscriber]]`.
pub static SUBSCRIBER: &[Key] = &[
    subscriber(
        "name",
        "1 to 64 of a-z, 0-9 and `-`, with a letter or digit first and last; unique; names the subscriber's queues.",
        Shape::Text,
        &[],
        // A subscriber with another name is another one.
        |_, _| false,
        |s| word(&s.name),
    )
    .required(),
    subscriber("url", "The URL of the requests.", Shape::Text, &[Requests], differs!(url), |s| {
        url(&s.url)
    })
    .required(),
    subscriber(
        "events",
        "AMQP topic patterns on the event type: `*` is one word, `#` any number of words. Left out: all events.",
        Shape::List(&Shape::Text),
        &[Bindings],
        differs!(events),
        |s| list(s.events.iter().map(|pattern| quoted(pattern.as_str()))),
    ),
    subscriber(
        "tenant",
        "The tenant whose events it gets, and no others; left out: the events of all. A name keeps its tenant: another is another subscriber.",
        Shape::Text,
        &[Bindings],
        differs!(tenant),
        |s| word(s.tenant.as_ref()?.as_str()),
    ),
    subscriber(
        "format",
        "The request body: json is {\"events\":[…]}, jsonl one event a line, json_array […], single one event a request; splunk_hec, cloudevents_batch and slack are those of their receivers.",
        Shape::Word(FORMATS),
        &[Requests, Session],
        differs!(format),
        |s| word(s.format.name()),
    ),
    subscriber(
        "content_type",
        "The content type of requests, with the formats jsonl and json_array alone; left out: the format's own.",
        Shape::Text,
        &[Requests],
        differs!(content_type),
        |s| word(s.content_type.as_ref()?.to_str().ok()?),
    ),
    subscriber(
        "source",
        "What events come from: `source` of splunk_hec; that of cloudevents_batch is a URI reference and required.",
        Shape::Text,
        &[Requests, Session],
        differs!(metadata.source),
        |s| word(s.metadata.source.as_ref()?),
    ),
    subscriber(
        "sourcetype",
        "`sourcetype` of splunk_hec.",
        Shape::Text,
        &[Requests, Session],
        differs!(metadata.sourcetype),
        |s| word(s.metadata.sourcetype.as_ref()?),
    ),
    subscriber(
        "index",
        "`index` of splunk_hec.",
        Shape::Text,
        &[Requests, Session],
        differs!(metadata.index),
        |s| word(s.metadata.index.as_ref()?),
    ),
    subscriber(
        "secrets",
        "The secrets that sign requests, the current one first; \"file:PATH\" reads a file.",
        Shape::List(&Shape::Text),
        &[Requests],
        differs!(secrets),
        |s| list(s.secrets.iter().map(|_| quoted(REDACTED))),
    ),
    subscriber(
        "signatures",
        "The signatures of a request; [] for none.",
        Shape::List(&Shape::Either(&[
            Shape::Word(&["standard-webhooks", "standard-webhooks-ed25519", "mailtrap"]),
            Shape::Table(SIGNATURE),
        ])),
        &[Requests],
        differs!(signer.schemes()),
        |s| list(s.signer.schemes().iter().map(scheme)),
    ),
    subscriber(
        "signing_key",
        "The key of standard-webhooks-ed25519, whsk_…, which receivers verify with its public half; \"file:PATH\" reads a file. Signs beside the secrets.",
        Shape::Text,
        &[Requests],
        differs!(signing_key),
        |s| s.signing_key.as_ref().map(|_| quoted(REDACTED)),
    ),
    subscriber(
        "headers",
        "Headers of each request; their values are treated as secrets.",
        Shape::Map(&Shape::Text),
        &[Requests],
        differs!(headers),
        |s| {
            let header = |(name, _): &(http::HeaderName, _)| {
                format!("{} = {}", quoted(name.as_str()), quoted(REDACTED))
            };
            (!s.headers.is_empty()).then(|| table(s.headers.iter().map(header)))
        },
    ),
    subscriber(
        "auth",
        "The authentication of requests.",
        Shape::Table(AUTH),
        &[Requests],
        differs!(auth),
        |s| {
            Some(match s.auth.as_ref()? {
                Auth::Basic { username, .. } => {
                    format!(
                        "{{ basic = {{ username = {}, password = {} }} }}",
                        quoted(username),
                        quoted(REDACTED)
                    )
                }
                Auth::Bearer(_) => format!("{{ bearer = {} }}", quoted(REDACTED)),
                Auth::OAuth2(grant) => {
                    let optional = |name: &str, value: &Option<String>| {
                        value.as_ref().map(|value| format!("{name} = {}", quoted(value)))
                    };
                    let keys = [
                        Some(format!("token_url = {}", quoted(&grant.token_url.to_string()))),
                        Some(format!("client_id = {}", quoted(&grant.client_id))),
                        Some(format!("client_secret = {}", quoted(REDACTED))),
                        optional("scope", &grant.scope),
                        optional("audience", &grant.audience),
                    ];
                    format!("{{ oauth2 = {} }}", table(keys.into_iter().flatten()))
                }
            })
        },
    ),
    subscriber(
        "tls",
        "Trusted authorities, and the client certificate.",
        Shape::Table(TLS),
        &[Requests, Connections],
        |a, b| !a.tls.is_same(&b.tls),
        |s| {
            let file = |(key, path): &(&str, std::path::PathBuf)| {
                format!("{key} = {}", quoted(&path.display().to_string()))
            };
            (!s.tls.files.is_empty()).then(|| table(s.tls.files.iter().map(file)))
        },
    ),
    subscriber(
        "order",
        "strict: no event arrives before an older one has; with the embedded queue and with an intake. A batch that fails holds what follows it.",
        Shape::Word(&["strict"]),
        &[Session],
        differs!(in_order),
        |s| s.in_order.then(|| quoted("strict")),
    ),
    subscriber(
        "match",
        "Values that events must have, by JSON Pointer (RFC 6901), such as { \"/actor/type\" = [\"user\"] }: a text, a number or true and false are compared by their text; all must hold.",
        Shape::Map(&Shape::List(&Shape::Either(&[Shape::Text, Shape::Flag, Shape::Whole(i64::MIN, i64::MAX)]))),
        &[Requests, Session],
        differs!(conditions),
        |s| {
            let values = |c: &Condition| list(c.values.iter().map(|v| quoted(v)));
            let entry = |c: &Condition| {
                Some(format!("{} = {}", quoted(c.place.as_str()), values(c)?))
            };
            let all = s.conditions.all();
            (!all.is_empty()).then(|| table(all.iter().filter_map(entry)))
        },
    ),
    subscriber(
        "redact",
        "Values that it does not see, by JSON Pointer, such as \"/actor/email\"; `*` is any name or index of one level.",
        Shape::List(&Shape::Text),
        &[Requests, Session],
        differs!(redaction.places()),
        |s| {
            let places = s.redaction.places();
            (!places.is_empty()).then(|| list(places.iter().map(|p| quoted(p.as_str())))).flatten()
        },
    ),
    subscriber(
        "redact_with",
        "What stands for them: a text, \"[FILTERED]\" if it is left out; or { hmac = \"${KEY}\" }: a token of 32 hexadecimal digits, the same for the same value.",
        Shape::Either(&[Shape::Text, Shape::Table(REDACT_WITH)]),
        &[Requests, Session],
        differs!(redaction.with()),
        |s| match s.redaction.with() {
            _ if s.redaction.is_none() => None,
            With::Text(text) => Some(quoted(text)),
            With::Hmac(_) => Some(format!("{{ hmac = {} }}", quoted(REDACTED))),
        },
    ),
    subscriber(
        "event_ids",
        "Whether events without \"event_id\" get one, the producer's message id.",
        Shape::Flag,
        &[Requests, Session],
        differs!(event_ids),
        |s| plain(s.event_ids),
    ),
    subscriber(
        "paused",
        "Whether the subscriber is paused: nothing is sent, and events wait in the queue.",
        Shape::Flag,
        &[Session],
        differs!(paused),
        |s| plain(s.paused),
    ),
    subscriber(
        "start_from",
        "From when on a new subscriber also gets what history has: \"-7d\", or a time such as \"2026-01-31T12:00:00Z\".",
        Shape::Text,
        &[Decisions],
        differs!(start_from),
        |s| word(&s.start_from?.to_string()),
    ),
    subscriber(
        "preset",
        "The receiver: what it implies is set, and the subscriber's own keys win over that.",
        Shape::Word(PRESETS),
        &[Decisions],
        differs!(preset.map(|model| model.name)),
        |s| word(s.preset?.name),
    ),
    read("batch", "Overrides [batch], key by key.", Shape::Table(BATCH)),
    read("http", "Overrides [http], key by key.", Shape::Table(HTTP)),
    read("retry", "Overrides [retry], key by key.", Shape::Table(RETRY)),
    read("circuit_breaker", "Overrides [circuit_breaker], key by key.", Shape::Table(BREAKER)),
];

/// The keys of a subscriber that is made over the API.
pub(super) static MANAGED: &[Key] = &[
    read(
        "name",
        "1 to 64 of a-z, 0-9 and `-`, with a letter or digit first and last; unique; names the subscriber's queues.",
        Shape::Text,
    )
    .required(),
    read("description", "A text for people.", Shape::Text),
    read("url", "The URL of the requests.", Shape::Text).required(),
    read("events", "Patterns, as of [[subscriber]].", Shape::List(&Shape::Text)),
    read("tenant", "The tenant whose events it gets; it cannot be changed.", Shape::Text),
    read(
        "format",
        "The request body, as of [[subscriber]].",
        Shape::Word(FORMATS),
    ),
    read("content_type", "The content type of requests, as of [[subscriber]].", Shape::Text),
    read("source", "What events come from, as of [[subscriber]].", Shape::Text),
    read("sourcetype", "`sourcetype` of splunk_hec.", Shape::Text),
    read("index", "`index` of splunk_hec.", Shape::Text),
    read("secrets", "The secrets themselves, the current one first.", Shape::List(&Shape::Text)),
    read("signatures", "The signatures of a request; [] for none.", Shape::List(&Shape::Text)),
    read("signing_key", "The key of standard-webhooks-ed25519 itself, whsk_….", Shape::Text),
    read("headers", "Headers of each request.", Shape::Map(&Shape::Text)),
    read("auth", "The authentication of requests.", Shape::Table(AUTH)),
    read("preset", "The receiver, as of [[subscriber]].", Shape::Word(PRESETS)),
    read(
        "order",
        "strict: no event arrives before an older one has, as of [[subscriber]].",
        Shape::Word(&["strict"]),
    ),
    read(
        "match",
        "Values that events must have, as of [[subscriber]].",
        Shape::Map(&Shape::List(&Shape::Either(&[Shape::Text, Shape::Flag, Shape::Whole(i64::MIN, i64::MAX)]))),
    ),
    read("redact", "Values that it does not see, as of [[subscriber]].", Shape::List(&Shape::Text)),
    read("redact_with", "The text that stands for them.", Shape::Text),
    read("start_paused", "Whether it is paused when it is made.", Shape::Flag),
    read("batch", "Overrides [batch], key by key.", Shape::Table(BATCH)),
    read("http", "Overrides [http], key by key.", Shape::Table(MANAGED_HTTP)),
    read("retry", "Overrides [retry], key by key.", Shape::Table(RETRY)),
    read("circuit_breaker", "Overrides [circuit_breaker], key by key.", Shape::Table(BREAKER)),
];

/// The keys of the group `http` that a subscriber made over the API may have, and inherits.
pub(super) static MANAGED_HTTP: &[Key] = &[
    read(
        "http.timeout",
        "The longest time from the start of a request to its answer.",
        Shape::Text,
    ),
    read("http.connect_timeout", "The longest time to open a connection.", Shape::Text),
    read("http.concurrency", "The most requests in flight.", Shape::Whole(1, MAX_CONCURRENCY)),
    read(
        "http.compression",
        "How request bodies are compressed, after they are signed.",
        Shape::Word(&["none", "gzip"]),
    ),
    read(
        "http.rate",
        "The most requests, or events, in a second or a minute.",
        Shape::Either(&[Shape::Text, Shape::Table(RATE)]),
    ),
];

pub(super) static REDACT_WITH: &[Key] = &[read(
    "redact_with.hmac",
    "The secret of the tokens; \"file:PATH\" reads a file.",
    Shape::Text,
)
.required()];

pub(super) static RATE: &[Key] =
    &[read("http.rate.events", "The most events, such as \"10000/s\".", Shape::Text).required()];

pub(super) static AUTH: &[Key] = &[
    read("auth.basic", "HTTP basic authentication (RFC 7617).", Shape::Table(BASIC)),
    read("auth.bearer", "A bearer token (RFC 6750); \"file:PATH\" reads a file.", Shape::Text),
    read(
        "auth.oauth2",
        "Bearer tokens by the client credentials grant (RFC 6749, section 4.4).",
        Shape::Table(OAUTH2),
    ),
];

pub(super) static OAUTH2: &[Key] = &[
    read("auth.oauth2.token_url", "Where tokens are fetched.", Shape::Text).required(),
    read("auth.oauth2.client_id", "The name of the client there.", Shape::Text).required(),
    read("auth.oauth2.client_secret", "Its secret there; \"file:PATH\" reads a file.", Shape::Text)
        .required(),
    read(
        "auth.oauth2.scope",
        "What the tokens are to be good for, as the server says.",
        Shape::Text,
    ),
    read("auth.oauth2.audience", "Whom they are for, where the server wants that.", Shape::Text),
];

pub(super) static BASIC: &[Key] = &[
    read("auth.basic.username", "The user, without `:`.", Shape::Text).required(),
    read("auth.basic.password", "The password; \"file:PATH\" reads a file.", Shape::Text)
        .required(),
];

pub(super) static TENANT: &[Key] = &[
    read(
        "queue.tenant.header",
        "The header of an AMQP message that has the tenant; over HTTP it is always x-hooktrail-tenant.",
        Shape::Text,
    ),
    read(
        "queue.tenant.pointer",
        "The place in the event, as a JSON Pointer (RFC 6901) such as \"/account_id\": a text or an integer.",
        Shape::Text,
    ),
];

pub(super) static TLS: &[Key] = &[
    read("tls.ca_file", "The only trusted authorities, as PEM.", Shape::Text),
    read("tls.client_cert_file", "The client's certificate and its chain, as PEM.", Shape::Text),
    read("tls.client_key_file", "The client's private key, as PEM.", Shape::Text),
];

pub(super) static SIGNATURE: &[Key] = &[
    read("signatures.header", "The header that carries the signature.", Shape::Text).required(),
    read("signatures.prefix", "The text before the signature, such as \"sha256=\".", Shape::Text),
    read(
        "signatures.encoding",
        "The encoding of the HMAC-SHA256.",
        Shape::Word(&["hex", "base64"]),
    ),
];

fn amqp(config: &Config) -> Option<&AmqpConfig> {
    match &config.queue.backend {
        Backend::Embedded => through(config).map(|intake| &intake.amqp),
        Backend::Amqp(amqp) => Some(amqp),
    }
}

/// The RabbitMQ that events come through into the embedded queue.
fn through(config: &Config) -> Option<&IntakeConfig> {
    config.queue.intake.as_deref()
}

fn both_embedded(a: &Config, b: &Config) -> bool {
    [a, b].iter().all(|config| matches!(config.queue.backend, Backend::Embedded))
}

fn intake(config: &Config) -> Option<&Intake> {
    amqp(config).map(|amqp| &amqp.intake)
}

fn intakes<'a>(a: &'a Config, b: &'a Config) -> Option<(&'a Intake, &'a Intake)> {
    intake(a).zip(intake(b))
}

fn management_url(config: &Config) -> Option<&SecretUrl> {
    amqp(config)?.management_url.as_deref()
}

/// The keys of a subscriber and its groups, in the order in which they are shown.
pub(super) fn fields()
-> impl Iterator<Item = (&'static str, &'static Field<Subscriber, &'static [Affects]>)> {
    let of = |key: &'static Key| match &key.place {
        Place::Subscriber(field) => Some((key.path, field)),
        Place::Read | Place::Config(_) => None,
    };
    SUBSCRIBER.iter().flat_map(move |key| match (&key.place, &key.shape) {
        (Place::Read, Shape::Table(group)) => group.iter().filter_map(of).collect::<Vec<_>>(),
        _ => of(key).into_iter().collect(),
    })
}

/// The full names of a subscriber's keys that have a value of their own.
#[cfg(test)]
pub(super) fn paths() -> impl Iterator<Item = &'static str> {
    fields().map(|(path, _)| path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::HttpPolicy,
        event::entry::Metadata,
        policy::{address::AddressPolicy, circuit_breaker::BreakerPolicy, retry::RetryOptions},
    };

    fn affecting(what: Affects) -> Vec<&'static str> {
        fields().filter(|(_, field)| field.affects.contains(&what)).map(|(path, _)| path).collect()
    }

    #[test]
    fn each_key_affects_what_is_made_of_it() {
        let requests = [
            "url",
            "format",
            "content_type",
            "source",
            "sourcetype",
            "index",
            "secrets",
            "signatures",
            "signing_key",
            "headers",
            "auth",
            "tls",
            "match",
            "redact",
            "redact_with",
            "event_ids",
            "http.success",
            "http.compression",
            "http.proxy",
        ];
        assert_eq!(affecting(Requests), requests);
        let connections = [
            "tls",
            "http.timeout",
            "http.connect_timeout",
            "http.concurrency",
            "http.allow_private_addresses",
            "http.allow_addresses",
            "http.proxy",
        ];
        assert_eq!(affecting(Connections), connections);
        let session = [
            "format",
            "source",
            "sourcetype",
            "index",
            "order",
            "match",
            "redact",
            "redact_with",
            "event_ids",
            "paused",
            "batch.max_events",
            "batch.max_bytes",
            "batch.max_wait",
            "http.concurrency",
            "http.rate",
        ];
        assert_eq!(affecting(Session), session);
        assert_eq!(affecting(Bindings), ["events", "tenant"]);
        assert!(fields().all(|(path, field)| path == "name" || !field.affects.is_empty()));
    }

    /// The compiler asks for each new field here; name it when it has its row.
    #[test]
    fn each_field_of_a_subscriber_has_a_row() {
        let Subscriber {
            name: _,
            // No key: where the keys are.
            origin: _,
            url: _,
            events: _,
            tenant: _,
            preset: _,
            format: _,
            content_type: _,
            metadata: Metadata { source: _, sourcetype: _, index: _ },
            secrets: _,
            signing_key: _,
            signer: _,
            headers: _,
            auth: _,
            tls: _,
            batch: BatchPolicy { max_events: _, max_bytes: _, max_wait: _ },
            http:
                HttpPolicy {
                    timeout: _,
                    connect_timeout: _,
                    concurrency: _,
                    success: _,
                    compression: _,
                    rate: _,
                    allow_http: _,
                    addresses: AddressPolicy { allow_private: _, allow: _ },
                    proxy: _,
                },
            retry,
            circuit_breaker: BreakerPolicy { failures: _, open_for: _, max_open_for: _ },
            conditions: _,
            redaction: _,
            event_ids: _,
            paused: _,
            start_from: _,
            in_order: _,
        } = &crate::config::testing::subscriber("a", "");
        let RetryOptions {
            initial_interval: _,
            multiplier: _,
            randomization_factor: _,
            max_interval: _,
            max_attempts: _,
            max_elapsed_time: _,
            on_exhausted: _,
        } = retry.options();
        // 23 of its own, 3, 10, 7 and 3 of its groups.
        assert_eq!(paths().count(), 23 + 3 + 10 + 7 + 3);
    }
}
