//! Models of receivers, one table each: what a preset sets, what `check` warns of, and how `listen
//! --as` answers. Each is made from the receiver's documentation, which the table names.

use std::time::Duration;

use url::{Host, Url};

use crate::event::payload::Format;

/// A receiver as its documentation describes it.
#[derive(Debug)]
pub struct Model {
    /// The name of the preset.
    pub name: &'static str,
    /// Its name for people.
    pub title: &'static str,
    pub documentation: &'static str,
    /// When that was read.
    pub read: &'static str,
    /// The keys of a subscriber that the preset sets. It brings every key that its own values need.
    pub preset: &'static str,
    /// The formats that it reads as events, the usual one first.
    pub formats: &'static [Format],
    /// The content types that it takes; none: any.
    pub content_types: &'static [&'static str],
    /// A content type with parameters is another one to it.
    pub exact_content_type: bool,
    pub gzip: bool,
    /// It verifies the bytes as they came, compressed ones too; hooktrail signs before.
    pub verifies_compressed: bool,
    pub max_events: Option<usize>,
    /// Of a body that is not compressed.
    pub max_bytes: Option<usize>,
    /// It drops events whose field `timestamp` is older, and says nothing of it.
    pub max_age: Option<Duration>,
    /// Headers with keys that each request must have.
    pub headers: &'static [&'static str],
    /// The schemes of `authorization`, one of which each request must have, the usual one first; none:
    /// it need not have any. The password of `Basic` is the token.
    pub authorization: &'static [&'static str],
    /// The header of a signature, and the text before its hexadecimal HMAC-SHA256.
    pub signature: Option<(&'static str, &'static str)>,
    /// The answer to a request that it takes.
    pub success: (u16, &'static str),
    /// The answer to one that it does not.
    pub refusal: fn(Refusal) -> (u16, &'static str),
    /// Whether a URL is one of this receiver and of no other.
    pub is_its: fn(&Url) -> bool,
    /// What an operator has to know besides.
    pub note: Option<&'static str>,
}

/// Why a receiver does not take a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A key, a token or a signature is not there.
    NoCredentials,
    /// It is there, in another form.
    BadCredentials,
    /// It is there, and wrong.
    WrongCredentials,
    ContentType,
    Coding,
    Empty,
    NotJson,
    /// JSON, but not of a format that it takes.
    Shape,
    /// An event of the right format that is null or an empty text.
    Blank,
    TooManyEvents,
    TooLarge,
}

impl Refusal {
    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoCredentials => "a key, token or signature is missing",
            Self::BadCredentials => "its authorization has another form",
            Self::WrongCredentials => "a key, token or signature is wrong",
            Self::ContentType => "its content type",
            Self::Coding => "its content encoding",
            Self::Empty => "it is empty",
            Self::NotJson => "it is not JSON",
            Self::Shape => "its JSON is of another format",
            Self::Blank => "an event in it is blank",
            Self::TooManyEvents => "it has too many events",
            Self::TooLarge => "it is too large",
        }
    }
}

/// The date of the documentation that the models were made from.
const READ: &str = "2026-11-28";

const HOUR: Duration = Duration::from_secs(3600);

impl Model {
    pub const ALL: [&Self; 8] = [
        &MAILTRAP,
        &ELASTIC,
        &DATADOG,
        &SPLUNK_HEC,
        &SENTINEL,
        &GOOGLE_SECOPS,
        &EVENTBRIDGE,
        &SLACK,
    ];

    /// The names of all.
    pub const NAMES: [&'static str; Self::ALL.len()] = {
        let (mut names, mut n) = ([""; Self::ALL.len()], 0);
        while n < names.len() {
            names[n] = Self::ALL[n].name;
            n += 1;
        }
        names
    };

    /// Whether it takes this content type.
    pub fn takes_type(&self, content_type: &str) -> bool {
        let kind = content_type.split(';').next().unwrap_or_default().trim();
        self.content_types.is_empty()
            || self.content_types.contains(&content_type)
            || !self.exact_content_type
                && self.content_types.iter().any(|known| known.eq_ignore_ascii_case(kind))
    }

    pub fn named(name: &str) -> Option<&'static Self> {
        Self::ALL.into_iter().find(|model| model.name == name)
    }

    /// The receiver that a URL is of, if it is a known one.
    pub fn of_url(url: &Url) -> Option<&'static Self> {
        Self::ALL.into_iter().find(|model| (model.is_its)(url))
    }
}

fn host_is(url: &Url, fits: impl Fn(&str) -> bool) -> bool {
    matches!(url.host(), Some(Host::Domain(host)) if fits(&host.to_ascii_lowercase()))
}

const NOBODYS: fn(&Url) -> bool = |_| false;

const MAILTRAP: Model = Model {
    name: "mailtrap",
    title: "a receiver of Mailtrap's webhooks",
    documentation: "https://docs.mailtrap.io/email-api-smtp/advanced/webhooks",
    read: READ,
    preset: r#"
        signatures = ["mailtrap"]
        batch = { max_events = 500, max_wait = "30s" }
        http = { success = "200", timeout = "30s" }
        circuit_breaker = { failures = 0 }
        [retry]
        max_attempts = 41
        initial_interval = "5m"
        multiplier = 1
        randomization_factor = 0
        max_interval = "5m"
        max_elapsed_time = "0s"
        on_exhausted = "pause"
    "#,
    formats: &[Format::Json, Format::JsonLines],
    content_types: &["application/json", "application/jsonl"],
    exact_content_type: false,
    gzip: false,
    verifies_compressed: false,
    max_events: Some(500),
    max_bytes: None,
    max_age: None,
    headers: &[],
    authorization: &[],
    signature: Some(("mailtrap-signature", "")),
    success: (200, ""),
    refusal: |why| match why {
        Refusal::NoCredentials | Refusal::BadCredentials | Refusal::WrongCredentials => (401, ""),
        Refusal::ContentType | Refusal::Coding => (415, ""),
        Refusal::TooManyEvents | Refusal::TooLarge => (413, ""),
        Refusal::Empty | Refusal::NotJson | Refusal::Shape | Refusal::Blank => (400, ""),
    },
    is_its: NOBODYS,
    note: None,
};

const ELASTIC: Model = Model {
    name: "elastic",
    title: "Filebeat's HTTP endpoint",
    documentation: "https://www.elastic.co/docs/reference/beats/filebeat/filebeat-input-http_endpoint",
    read: READ,
    preset: r#"
        format = "json_array"
        signatures = [{ header = "X-Hub-Signature-256", prefix = "sha256=" }]
        http = { success = "2xx", compression = "none" }
    "#,
    // Its decoder also reads objects one after the other.
    formats: &[Format::JsonArray, Format::Single, Format::JsonLines],
    content_types: &["application/json"],
    exact_content_type: true,
    gzip: true,
    verifies_compressed: true,
    max_events: None,
    max_bytes: None,
    max_age: None,
    headers: &[],
    authorization: &[],
    signature: Some(("x-hub-signature-256", "sha256=")),
    success: (200, r#"{"message": "success"}"#),
    refusal: |why| match why {
        Refusal::NoCredentials | Refusal::BadCredentials => {
            (401, r#"{"message":"missing HMAC header"}"#)
        }
        Refusal::WrongCredentials => (401, r#"{"message":"invalid HMAC signature"}"#),
        Refusal::ContentType => {
            (415, r#"{"message":"wrong Content-Type header, expecting application/json"}"#)
        }
        Refusal::Coding => (415, r#"{"message":"unsupported Content-Encoding"}"#),
        Refusal::Empty => (406, r#"{"message":"body cannot be empty"}"#),
        Refusal::NotJson => (400, r#"{"message":"malformed JSON object"}"#),
        Refusal::Shape | Refusal::Blank => (400, r#"{"message":"only JSON objects are accepted"}"#),
        Refusal::TooManyEvents | Refusal::TooLarge => (413, r#"{"message":"body too large"}"#),
    },
    is_its: NOBODYS,
    note: None,
};

const DATADOG: Model = Model {
    name: "datadog",
    title: "Datadog's logs intake",
    documentation: "https://docs.datadoghq.com/api/latest/logs/#send-logs",
    read: READ,
    preset: r#"
        format = "json_array"
        signatures = []
        batch = { max_events = 1000, max_bytes = "4MiB" }
        http = { success = "2xx", compression = "gzip" }
        [retry]
        max_attempts = 24
        initial_interval = "5s"
        multiplier = 3
        max_interval = "1h"
        max_elapsed_time = "17h"
    "#,
    formats: &[Format::JsonArray, Format::Single],
    content_types: &["application/json"],
    exact_content_type: false,
    gzip: true,
    verifies_compressed: false,
    max_events: Some(1000),
    max_bytes: Some(5_000_000),
    max_age: Some(Duration::from_secs(18 * HOUR.as_secs())),
    headers: &["dd-api-key"],
    authorization: &[],
    signature: None,
    success: (202, "{}"),
    refusal: |why| match why {
        Refusal::NoCredentials | Refusal::BadCredentials => (
            401,
            r#"{"errors":[{"status":"401","title":"Unauthorized","detail":"API key is missing"}]}"#,
        ),
        Refusal::WrongCredentials => (
            403,
            r#"{"errors":[{"status":"403","title":"Forbidden","detail":"API key is invalid"}]}"#,
        ),
        Refusal::TooLarge => {
            (413, r#"{"errors":[{"status":"413","title":"Request Entity Too Large"}]}"#)
        }
        Refusal::ContentType
        | Refusal::Coding
        | Refusal::Empty
        | Refusal::NotJson
        | Refusal::Shape
        | Refusal::Blank
        | Refusal::TooManyEvents => (400, r#"{"errors":[{"status":"400","title":"Bad Request"}]}"#),
    },
    is_its: |url| host_is(url, |host| host.starts_with("http-intake.logs.")),
    note: Some(
        "it answers 202 before it has looked at the events, and drops those whose timestamp is older than 18 h; as timestamps its documentation names ISO 8601 and Unix milliseconds",
    ),
};

const SPLUNK_HEC: Model = Model {
    name: "splunk-hec",
    title: "Splunk's HTTP Event Collector",
    documentation: "https://help.splunk.com/en/splunk-enterprise/get-data-in/collect-http-event-data/troubleshoot-http-event-collector",
    read: READ,
    preset: r#"
        format = "splunk_hec"
        signatures = []
        http = { success = "2xx" }
    "#,
    formats: &[Format::SplunkHec],
    content_types: &[],
    exact_content_type: false,
    gzip: true,
    verifies_compressed: false,
    max_events: None,
    // `max_content_length` of its configuration, as it is shipped.
    max_bytes: Some(838_860_800),
    max_age: None,
    headers: &[],
    authorization: &["Splunk", "Basic"],
    signature: None,
    success: (200, r#"{"text":"Success","code":0}"#),
    refusal: |why| match why {
        Refusal::NoCredentials => (401, r#"{"text":"Token is required","code":2}"#),
        Refusal::BadCredentials => (401, r#"{"text":"Invalid authorization","code":3}"#),
        Refusal::WrongCredentials => (403, r#"{"text":"Invalid token","code":4}"#),
        Refusal::Empty => (400, r#"{"text":"No data","code":5}"#),
        Refusal::Coding | Refusal::ContentType | Refusal::NotJson => {
            (400, r#"{"text":"Invalid data format","code":6,"invalid-event-number":0}"#)
        }
        Refusal::Shape => {
            (400, r#"{"text":"Event field is required","code":12,"invalid-event-number":0}"#)
        }
        Refusal::Blank => {
            (400, r#"{"text":"Event field cannot be blank","code":13,"invalid-event-number":0}"#)
        }
        Refusal::TooManyEvents | Refusal::TooLarge => {
            (413, r#"{"text":"Content-Length exceeds the limit","code":27}"#)
        }
    },
    is_its: |url| {
        let is_its_host =
            |host: &str| host.ends_with(".splunkcloud.com") && host.starts_with("http-inputs");
        host_is(url, is_its_host) || url.path().starts_with("/services/collector")
    },
    note: Some(
        "its 200 means that it has taken the events, not that they are indexed: acknowledgements of its indexers are not asked for, and are to be off for the token",
    ),
};

const SENTINEL: Model = Model {
    name: "sentinel",
    title: "the Logs Ingestion API of Microsoft Sentinel",
    documentation: "https://learn.microsoft.com/en-us/azure/azure-monitor/logs/logs-ingestion-api-overview",
    read: READ,
    preset: r#"
        format = "json_array"
        signatures = []
        batch = { max_bytes = "1MiB" }
        http = { success = "2xx" }
    "#,
    // It answers 204 to an object too, and keeps nothing of it.
    formats: &[Format::JsonArray],
    content_types: &["application/json"],
    exact_content_type: false,
    gzip: true,
    verifies_compressed: false,
    max_events: None,
    max_bytes: Some(1024 * 1024),
    max_age: None,
    headers: &[],
    authorization: &["Bearer"],
    signature: None,
    success: (204, ""),
    refusal: |why| match why {
        Refusal::NoCredentials | Refusal::BadCredentials => (
            401,
            r#"{"error":{"code":"AuthenticationFailed","message":"Authentication is required"}}"#,
        ),
        Refusal::WrongCredentials => (
            403,
            r#"{"error":{"code":"OperationFailed","message":"The authentication token does not have access"}}"#,
        ),
        Refusal::ContentType | Refusal::Coding => (
            415,
            r#"{"error":{"code":"UnsupportedMediaType","message":"The content is not supported"}}"#,
        ),
        Refusal::TooManyEvents | Refusal::TooLarge => (
            413,
            r#"{"error":{"code":"ContentLengthLimitExceeded","message":"Maximum allowed content length: 1048576 bytes (1 MB)"}}"#,
        ),
        Refusal::Empty | Refusal::NotJson | Refusal::Shape | Refusal::Blank => (
            400,
            r#"{"error":{"code":"InvalidPayload","message":"The payload is not an array of JSON objects"}}"#,
        ),
    },
    is_its: |url| host_is(url, |host| host.ends_with(".ingest.monitor.azure.com")),
    note: Some(
        "the tokens of Microsoft Entra end after about an hour: what is in `auth` has to be renewed by then, and hooktrail reloaded",
    ),
};

const GOOGLE_SECOPS: Model = Model {
    name: "google-secops",
    title: "a webhook feed of Google SecOps",
    documentation: "https://docs.cloud.google.com/chronicle/docs/ingestion/setup-siem-webhook",
    read: READ,
    preset: r#"
        format = "jsonl"
        content_type = "application/json"
        signatures = []
        batch = { max_bytes = "3MiB" }
        http = { success = "2xx", compression = "none" }
    "#,
    formats: &[Format::JsonLines, Format::Single],
    content_types: &["application/json"],
    exact_content_type: false,
    gzip: false,
    verifies_compressed: false,
    max_events: None,
    max_bytes: Some(4_000_000),
    max_age: None,
    headers: &["x-goog-api-key", "x-webhook-access-key"],
    authorization: &[],
    signature: None,
    success: (200, "{}"),
    refusal: |why| match why {
        Refusal::NoCredentials | Refusal::BadCredentials => {
            (401, r#"{"error":{"code":401,"status":"UNAUTHENTICATED"}}"#)
        }
        Refusal::WrongCredentials => {
            (403, r#"{"error":{"code":403,"status":"PERMISSION_DENIED"}}"#)
        }
        Refusal::TooManyEvents | Refusal::TooLarge => {
            (413, r#"{"error":{"code":413,"status":"INVALID_ARGUMENT"}}"#)
        }
        Refusal::ContentType
        | Refusal::Coding
        | Refusal::Empty
        | Refusal::NotJson
        | Refusal::Shape
        | Refusal::Blank => (400, r#"{"error":{"code":400,"status":"INVALID_ARGUMENT"}}"#),
    },
    is_its: |url| {
        host_is(url, |host| host.ends_with("chronicle.googleapis.com"))
            && url.path().contains("importPushLogs")
    },
    note: None,
};

const EVENTBRIDGE: Model = Model {
    name: "eventbridge",
    title: "a function URL in front of Amazon EventBridge",
    documentation: "https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-putevents.html",
    read: READ,
    preset: r#"
        format = "single"
        signatures = ["standard-webhooks"]
        batch = { max_events = 1, max_bytes = "240KiB", max_wait = "0s" }
        http = { success = "2xx", compression = "none", concurrency = 8 }
    "#,
    formats: &[Format::Single],
    content_types: &["application/json"],
    exact_content_type: false,
    gzip: false,
    verifies_compressed: false,
    max_events: Some(1),
    max_bytes: Some(256 * 1024),
    max_age: None,
    headers: &[],
    authorization: &[],
    signature: Some(("webhook-signature", "")),
    success: (200, ""),
    refusal: |why| match why {
        Refusal::NoCredentials | Refusal::BadCredentials | Refusal::WrongCredentials => {
            (401, r#"{"message":"Unauthorized"}"#)
        }
        Refusal::TooManyEvents | Refusal::TooLarge => {
            (413, r#"{"message":"Request Entity Too Large"}"#)
        }
        Refusal::ContentType | Refusal::Coding => (415, r#"{"message":"Unsupported Media Type"}"#),
        Refusal::Empty | Refusal::NotJson | Refusal::Shape | Refusal::Blank => {
            (400, r#"{"message":"Bad Request"}"#)
        }
    },
    is_its: NOBODYS,
    note: None,
};

const SLACK: Model = Model {
    name: "slack",
    title: "an incoming webhook of Slack",
    documentation: "https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks",
    read: READ,
    preset: r#"
        format = "slack"
        signatures = []
        batch = { max_events = 20, max_bytes = "32KiB", max_wait = "5s" }
        http = { success = "2xx", compression = "none", rate = "1/s" }
    "#,
    formats: &[Format::Slack],
    content_types: &["application/json"],
    exact_content_type: false,
    gzip: false,
    verifies_compressed: false,
    max_events: None,
    max_bytes: Some(40_000),
    max_age: None,
    headers: &[],
    authorization: &[],
    signature: None,
    success: (200, "ok"),
    refusal: |why| match why {
        Refusal::NoCredentials | Refusal::BadCredentials | Refusal::WrongCredentials => {
            (403, "invalid_token")
        }
        Refusal::Shape => (400, "no_text"),
        Refusal::ContentType
        | Refusal::Coding
        | Refusal::Empty
        | Refusal::NotJson
        | Refusal::Blank
        | Refusal::TooManyEvents
        | Refusal::TooLarge => (400, "invalid_payload"),
    },
    is_its: |url| host_is(url, |host| host == "hooks.slack.com"),
    note: None,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_known_by_its_host_or_its_path() {
        for (url, name) in [
            ("https://http-intake.logs.datadoghq.eu/api/v2/logs", "datadog"),
            ("https://HTTP-intake.logs.us5.datadoghq.com/api/v2/logs", "datadog"),
            ("https://splunk.example.com:8088/services/collector/event", "splunk-hec"),
            ("https://http-inputs-acme.splunkcloud.com/", "splunk-hec"),
            ("https://a.westeurope-1.ingest.monitor.azure.com/dataCollectionRules/x", "sentinel"),
            ("https://us-chronicle.googleapis.com/v1/a/feeds/1:importPushLogs", "google-secops"),
            ("https://hooks.slack.com/services/T/B/x", "slack"),
        ] {
            let found = Model::of_url(&url.parse().expect("a URL"));
            assert_eq!(found.map(|model| model.name), Some(name), "{url}");
            assert!(
                Model::named(name).is_some_and(|model| model.documentation.starts_with("https://"))
            );
        }
        for url in ["https://example.com/", "http://127.0.0.1/", "https://slack.com/"] {
            assert!(Model::of_url(&url.parse().expect("a URL")).is_none(), "{url}");
        }
    }
}
