use std::time::{Duration, SystemTime};

use super::{
    keys::{Key, Shape},
    *,
};
use crate::{
    crypto::signature::Scheme,
    event::{Pattern, Tenant},
    policy::{answer::Success, retry::Exhausted},
};

fn dir_with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("creates");
        std::fs::write(path, text).expect("writes");
    }
    dir
}

fn env(name: &str) -> Option<String> {
    match name {
        "SECRET" => Some("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned()),
        "PASSWORD" => Some("tell-nobody".to_owned()),
        "BAD_SECRET" => Some("tell-nobody".to_owned()),
        _ => None,
    }
}

fn load_text(text: &str) -> Result<Config, Vec<String>> {
    let dir = dir_with(&[("h.toml", text)]);
    load_with(&dir.path().join("h.toml"), &env).map_err(|e| {
        let prefix = format!("{}/", dir.path().display());
        e.problems.iter().map(|p| p.to_string().replace(&prefix, "")).collect()
    })
}

const QUEUE: &str = "[queue]\nurl = \"amqp://127.0.0.1\"\n";
const SUBSCRIBER: &str =
    "[[subscriber]]\nname = \"a\"\nurl = \"https://example.com/\"\nsecrets = [\"${SECRET}\"]\n";

/// The problems of a configuration with one good subscriber and `extra` before it.
fn problems(extra: &str) -> Vec<String> {
    load_text(&format!("{extra}\n{SUBSCRIBER}")).expect_err("must be refused")
}

#[test]
fn the_shipped_configuration_holds_every_key_and_the_defaults() {
    rustls::crypto::ring::default_provider().install_default().ok();
    fn names(keys: &[Key]) -> Vec<&'static str> {
        keys.iter().flat_map(|key| std::iter::once(key.name()).chain(within(&key.shape))).collect()
    }
    fn within(shape: &Shape) -> Vec<&'static str> {
        match shape {
            Shape::Table(keys) => names(keys),
            Shape::List(shape) | Shape::Map(shape) => within(shape),
            Shape::Either(shapes) => shapes.iter().flat_map(within).collect(),
            _ => Vec::new(),
        }
    }
    for key in names(keys::ROOT) {
        let found = DEFAULT.lines().any(|l| {
            let l = l.trim_start_matches("# ");
            [
                format!("{key} = "),
                format!("[{key}]"),
                format!("[[{key}]]"),
                format!("[[admin.{key}]]"),
                format!("[admin.{key}]"),
            ]
            .iter()
            .any(|start| l.starts_with(start))
                || l.contains(&format!("{{ {key} = "))
                || l.contains(&format!(", {key} = "))
                || (["batch", "http", "circuit_breaker"].contains(&key)
                    && l.contains("so for batch, http and circuit_breaker"))
        });
        assert!(found, "config/hooktrail.toml does not show `{key}`");
    }
    let shipped = load_text(DEFAULT).expect("the shipped configuration is valid");
    let bare = load_text(QUEUE).expect("valid");
    assert!(shipped.subscribers.is_empty());
    assert_eq!(
        (
            shipped.shutdown_timeout,
            shipped.log,
            (shipped.store, shipped.history),
            shipped.admin.listen,
            &shipped.admin.token,
            &shipped.queue.backend,
            shipped.queue.embedded.retention
        ),
        (
            bare.shutdown_timeout,
            bare.log,
            (bare.store, bare.history),
            bare.admin.listen,
            &bare.admin.token,
            &Backend::Embedded,
            bare.queue.embedded.retention
        )
    );

    // With its example subscriber uncommented and a subscriber that relies on the groups as
    // shipped.
    let example: String = DEFAULT
        .lines()
        .skip_while(|l| *l != "# [[subscriber]]")
        .map(|l| l.trim_start_matches("# ").to_owned() + "\n")
        .collect();
    // Its subscriber has a tenant, for which the queue has to know where that is.
    let with_tenants = DEFAULT.replacen("# tenant = {", "tenant = {", 1);
    let with_example = with_tenants + &example.replace("SIEM_SECRET", "SECRET") + SUBSCRIBER;
    let (cert, key) = certificate();
    let dir = dir_with(&[
        ("h.toml", &with_example),
        ("ca.pem", &cert),
        ("c.pem", &cert),
        ("k.pem", &key),
    ]);
    let a = load_with(&dir.path().join("h.toml"), &env)
        .unwrap_or_else(|e| panic!("the example is valid: {e}"))
        .subscribers[1]
        .clone();
    let b = load_text(&format!("{QUEUE}{SUBSCRIBER}")).expect("valid").subscribers[0].clone();
    assert_eq!(
        (&a.batch, &a.http, &a.retry, &a.circuit_breaker),
        (&b.batch, &b.http, &b.retry, &b.circuit_breaker)
    );
}

#[test]
fn a_begin_is_a_time_ago_or_a_point_in_time_which_may_be_yet_to_come() {
    let start = |value: &str| {
        let text = format!("{QUEUE}{SUBSCRIBER}start_from = \"{value}\"\n");
        load_text(&text).map(|config| config.subscribers[0].start_from.expect("has one"))
    };
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_735_830_138);
    let days = |n: u64| Duration::from_secs(n * 86_400);
    for (value, at, shown) in [
        ("-7d", now - days(7), "-7d"),
        ("-1d 12h", now - days(1) - days(1) / 2, "-36h"),
        ("-0s", now, "-0s"),
        ("-1000y", SystemTime::UNIX_EPOCH, "-365250d"),
        ("2025-01-02T15:02:18Z", now, "2025-01-02T15:02:18.000Z"),
        (
            "2025-01-02T17:02:18.5+02:00",
            now + Duration::from_millis(500),
            "2025-01-02T15:02:18.500Z",
        ),
        ("2125-01-02T15:02:18Z", now + days(36_524), "2125-01-02T15:02:18.000Z"),
    ] {
        let found = start(value).unwrap_or_else(|e| panic!("{value}: {e:?}"));
        assert_eq!((found.at(now), found.to_string().as_str()), (at, shown), "{value}");
        assert_eq!(start(shown).expect("what is shown can be read").at(now), at);
    }
    for value in
        ["7d", "-", "", "yesterday", "2025-01-02", "2025-01-02T15:02:18", "1969-12-31T23:59:59Z"]
    {
        let why = start(value).expect_err(value).join("\n");
        assert!(why.starts_with("h.toml:7:14: subscriber[a].start_from: "), "{why}");
        assert!(why.contains("is not a begin; write a time before"), "{why}");
    }
}

#[test]
fn a_begin_needs_history_with_bytes_and_the_mistake_says_what_to_set() {
    let start = "start_from = \"-7d\"\n";
    let embedded = "[queue]\nurl = \"embedded\"\n";
    for (queue, tables, part) in [
        (QUEUE, "[store]\nurl = \"none\"\n", "[store] url is \"none\"; set that to \"sqlite\""),
        (QUEUE, "[history]\nretention = \"0s\"\n", "[history] retention is \"0s\"; set that"),
        (embedded, "retention = \"0s\"\n", "[queue] retention is \"0s\"; set that"),
        (QUEUE, "[history]\nbodies = false\n", "[history] bodies is false; set that to true"),
    ] {
        let text = format!("{queue}{tables}{SUBSCRIBER}{start}");
        let why = load_text(&text).expect_err("refused");
        let line = text.lines().count();
        let place = format!("h.toml:{line}:14: subscriber[a].start_from: needs the ");
        assert!(why.len() == 1 && why[0].starts_with(&place), "{why:?}");
        assert!(why[0].contains(part) && why[0].ends_with("leave `start_from` out"), "{why:?}");
        load_text(&format!("{queue}{tables}{SUBSCRIBER}")).expect("without it all is well");
    }
    // The embedded queue's own retention is not that of a broker.
    let text = format!("{QUEUE}retention = \"0s\"\n{SUBSCRIBER}{start}");
    load_text(&text).expect("valid");
}

#[test]
fn a_subscriber_overrides_the_defaults_key_by_key() {
    let text = format!(
        "{QUEUE}[http]\nsuccess = \"200\"\nconcurrency = 3\n[retry]\nmax_attempts = 4\ninitial_interval = \"1m\"\n{SUBSCRIBER}http.concurrency = 7\nretry = {{ max_attempts = 9 }}\n"
    );
    let s = &load_text(&text).expect("valid").subscribers[0];
    assert_eq!((s.http.concurrency, s.http.success), (7, Success::Only200));
    let retry = s.retry.options();
    assert_eq!((retry.max_attempts, retry.initial_interval), (9, Duration::from_secs(60)));
}

#[test]
fn every_mistake_is_reported_at_once_with_its_place() {
    let found = load_text(
        r#"shutdown_timeout = 5
[queue]
url = ""
exchnge = "x"
[batch]
max_events = 0
max_bytes = "1XB"
[retry]
max_interval = "1s"
[[subscriber]]
name = "Bad Name"
url = "http://example.com/"
secrets = ["${NOT_SET}"]
[[subscriber]]
name = "b"
url = "https://[::1]/"
signatures = ["md5"]
events = ["user*"]
"#,
    )
    .expect_err("invalid");
    let expected = [
        ("h.toml:1:20: shutdown_timeout: ", "in quotes"),
        ("h.toml:4:1: queue.exchnge: ", "did you mean `exchange`?"),
        ("h.toml:3:7: queue.url: ", "is empty"),
        ("h.toml:6:14: batch.max_events: ", "from 1 to 65535"),
        ("h.toml:7:13: batch.max_bytes: ", "`1XB` is not a size"),
        ("h.toml:9:16: retry.max_interval: ", "shorter than initial_interval"),
        ("h.toml:11:8: subscriber[0].name: ", "a-z, 0-9"),
        ("h.toml:12:7: subscriber[0].url: ", "allow_http"),
        ("h.toml:13:12: subscriber[0].secrets[0]: ", "NOT_SET is not set"),
        ("h.toml:16:7: subscriber[b].url: ", "loopback"),
        ("h.toml:18:11: subscriber[b].events[0]: ", "mixes a wildcard"),
        (
            "h.toml:17:15: subscriber[b].signatures[0]: ",
            "\"standard-webhooks\", \"standard-webhooks-ed25519\" or \"mailtrap\"",
        ),
        ("h.toml:14:1: subscriber[b].secrets: ", "is required"),
    ];
    assert_found(&found, &expected);
}

#[test]
fn a_mistake_that_is_often_made_is_answered_with_what_is_meant() {
    let subscriber = |lines: &str| format!("{QUEUE}[[subscriber]]\nname = \"siem\"\n{lines}\n");
    let url = "url = \"https://example.com/\"";
    for (text, place, parts) in [
        (
            subscriber(&format!("{url}\nsecrets = []")),
            ":6:11: subscriber[siem].secrets: ",
            &["empty", "hooktrail secret"][..],
        ),
        (
            subscriber(&format!("{url}\nsecrets = \"x\"")),
            ":6:11: subscriber[siem].secrets: ",
            &["array", "[\"${SECRET}\"]"],
        ),
        (
            subscriber(&format!("{url}\nsecrets = [\"$SIEM\"]")),
            ":6:12: subscriber[siem].secrets[0]: ",
            &["\"${SIEM}\""],
        ),
        (subscriber("url = \"127.0.0.1:9000\""), ":5:7: subscriber[siem].url: ", &["https://"]),
        (
            subscriber(&format!("{url}\nsignatures = [\"hmac\"]")),
            ":6:15: subscriber[siem].signatures[0]: ",
            &["mailtrap", "header = "],
        ),
        (
            "[queue]\nurl = \"embeded\"\n".to_owned(),
            ":2:7: queue.url: ",
            &["did you mean \"embedded\"?"],
        ),
    ] {
        let found = load_text(&text).expect_err("must be refused").join("\n");
        let line =
            found.lines().find(|l| l.contains(place)).unwrap_or_else(|| panic!("{place}: {found}"));
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
    }
}

#[test]
fn a_key_of_a_feature_that_is_not_there_is_unknown() {
    for (text, key) in [
        (format!("{QUEUE}stream = \"s\"\n"), "queue.stream"),
        (format!("{QUEUE}[http]\nversion = 3\n"), "http.version"),
    ] {
        let found = problems(&text);
        assert!(found.len() == 1 && found[0].contains(&format!("{key}: unknown key")), "{found:?}");
    }
    let found = load_text(&format!("{QUEUE}{SUBSCRIBER}tls_ca = true\n")).expect_err("unknown");
    assert!(found[0].contains("h.toml:7:1: subscriber[a].tls_ca: unknown key"), "{found:?}");
}

#[test]
fn the_preset_wins_over_the_defaults_and_the_subscribers_own_keys_over_it() {
    let defaults = "[batch]\nmax_events = 7\nmax_bytes = \"5KiB\"\n[http]\nsuccess = \"2xx\"\nconcurrency = 3\n[retry]\nmax_attempts = 2\n";
    let plain = format!("{QUEUE}{defaults}{SUBSCRIBER}preset = \"mailtrap\"\n");
    let s = load_text(&plain).expect("valid").subscribers[0].clone();
    assert_eq!(
        (s.batch.max_events, s.batch.max_wait, s.batch.max_bytes),
        (500, Duration::from_secs(30), 5 * 1024)
    );
    assert_eq!(
        (s.http.success, s.http.timeout, s.http.concurrency),
        (Success::Only200, Duration::from_secs(30), 3)
    );
    let r = s.retry.options();
    assert_eq!(
        (r.max_attempts, r.initial_interval, r.multiplier, r.randomization_factor),
        (41, Duration::from_secs(300), 1.0, 0.0)
    );
    assert_eq!((r.max_elapsed_time, r.on_exhausted), (Duration::ZERO, Exhausted::Pause));
    assert_eq!(s.circuit_breaker.failures, 0);
    assert_eq!(s.signer.schemes(), [Scheme::Mailtrap]);

    let own = "signatures = [\"standard-webhooks\"]\nretry = { max_attempts = 3 }\nhttp.success = \"2xx\"\nbatch.max_wait = \"0s\"\n";
    let s = load_text(&(plain + own)).expect("valid").subscribers[0].clone();
    assert_eq!(
        (s.batch.max_events, s.batch.max_wait, s.http.success),
        (500, Duration::ZERO, Success::Any2xx)
    );
    assert_eq!(
        (s.retry.options().max_attempts, s.retry.options().initial_interval),
        (3, Duration::from_secs(300))
    );
    assert_eq!(s.signer.schemes(), [Scheme::StandardWebhooks]);

    let found =
        load_text(&format!("{QUEUE}{SUBSCRIBER}preset = \"other\"\n")).expect_err("unknown");
    assert!(
        found.len() == 1
            && found[0].contains("h.toml:7:10: subscriber[a].preset: must be \"mailtrap\""),
        "{found:?}"
    );
}

/// A key and a certificate of it, as PEM.
fn certificate() -> (String, String) {
    let key = rcgen::KeyPair::generate().expect("a key");
    let certificate = rcgen::CertificateParams::new(vec!["a.example".to_owned()])
        .expect("names")
        .self_signed(&key)
        .expect("signs");
    (certificate.pem(), key.serialize_pem())
}

/// Made with `openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=client`
/// and `openssl x509 -req -signkey` with no extension, which is of version 1.
const VERSION_1: (&str, &str) = (
    "-----BEGIN CERTIFICATE-----\n\
     MIIBHTCBxQIUBJ0yVRxxGxkPtiMpq74BM0+o83EwCgYIKoZIzj0EAwIwETEPMA0G\n\
     A1UEAwwGY2xpZW50MCAXDTI2MTEyNjA5MDAyMVoYDzIxMjYxMTAyMDkwMDIxWjAR\n\
     MQ8wDQYDVQQDDAZjbGllbnQwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAATMG/8V\n\
     eosYNHkmJrsF1qT+ziOcHtkCd/pQXBU0viikyAZBcaDuPwXOC+awNQvIVduY9T7n\n\
     7WgWBwbgVIsqw+10MAoGCCqGSM49BAMCA0cAMEQCIEspT8730QvPBS8niAOi35af\n\
     lmhf5Y+Bj645EwE4ItonAiA1NMWSr9W/dlTM9HSBM7u/RSSj3z7UDewWEQfuKLKh\n\
     tg==\n\
     -----END CERTIFICATE-----\n\
     ",
    "-----BEGIN PRIVATE KEY-----\n\
     MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgw/xoKonWERxmQ1tf\n\
     cykapXvPXC+a0jfGk7mGw1gl0yGhRANCAATMG/8VeosYNHkmJrsF1qT+ziOcHtkC\n\
     d/pQXBU0viikyAZBcaDuPwXOC+awNQvIVduY9T7n7WgWBwbgVIsqw+10\n\
     -----END PRIVATE KEY-----\n\
     ",
);

#[test]
fn a_client_certificate_of_version_1_is_named_as_that_and_as_the_client_s() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let text = format!(
        "{QUEUE}{SUBSCRIBER}tls = {{ client_cert_file = \"c.pem\", client_key_file = \"k.pem\" }}\n"
    );
    let dir =
        dir_with(&[("h.toml", text.as_str()), ("c.pem", VERSION_1.0), ("k.pem", VERSION_1.1)]);
    let found = load_with(&dir.path().join("h.toml"), &env).expect_err("version 1").to_string();
    for part in [
        "subscriber[a].tls.client_cert_file: ",
        "client certificate",
        "version 1",
        "version 3",
        "openssl x509",
    ] {
        assert!(found.contains(part), "{found}");
    }
    assert!(!found.contains("peer"), "{found}");
}

#[test]
fn endpoints_are_checked_and_show_no_secret() {
    rustls::crypto::ring::default_provider().install_default().ok();
    let (cert, key) = certificate();
    let (_, other) = certificate();
    let file = |name: &str| {
        format!(
            "{QUEUE}[http]\nproxy = \"http://u:hunter2@proxy.internal:3128\"\n{SUBSCRIBER}{name}"
        )
    };
    let load = |more: &str| {
        let text = file(more);
        let dir = dir_with(&[
            ("h.toml", &text),
            ("c.pem", &cert),
            ("k.pem", &key),
            ("other.pem", &other),
            ("token", "hunter2\n"),
        ]);
        load_with(&dir.path().join("h.toml"), &env).map_err(|e| e.to_string())
    };
    for good in [
        "headers = { X-A = \"hunter2\", Authorization = \"Splunk hunter2\" }",
        "auth = { basic = { username = \"u\", password = \"hunter2\" } }",
        "auth = { bearer = \"file:token\" }",
        "tls = { ca_file = \"c.pem\", client_cert_file = \"c.pem\", client_key_file = \"k.pem\" }",
        "http.proxy = \"\"",
    ] {
        let config = load(good).unwrap_or_else(|e| panic!("{good}: {e}"));
        let shown = format!("{config:?}");
        assert!(!shown.contains("hunter2") && !shown.contains("PRIVATE"), "{shown}");
        assert_eq!(config.subscribers[0].http.proxy.is_none(), good.contains("proxy"));
    }
    for (bad, part) in [
        ("headers = { \"a b\" = \"x\" }", "subscriber[a].headers.a b: is not a valid header name"),
        ("headers = { X-A = \"x\\ny\" }", "a value that a header cannot carry"),
        ("headers = { X-A = \"x\", x-a = \"y\" }", "is there twice"),
        (
            "headers = { Content-Type = \"x\" }",
            "subscriber[a].headers.Content-Type: is a header that hooktrail sets itself",
        ),
        ("headers = { Webhook-Id = \"x\" }", "sets itself"),
        ("headers = { X-A = 1 }", "must be a string"),
        ("headers = [\"X-A\"]", "must be a table"),
        (
            "headers = { X-S = \"x\" }\nsignatures = [\"standard-webhooks\", { header = \"x-s\" }]",
            "is the header of a signature",
        ),
        (
            "headers = { authorization = \"x\" }\nauth = { bearer = \"y\" }",
            "cannot be combined with `Authorization`",
        ),
        ("auth = {}", "must be one of"),
        (
            "auth = { basic = { username = \"u\", password = \"p\" }, bearer = \"y\" }",
            "must be one of",
        ),
        (
            "auth = { basic = { username = \"u\" } }",
            "subscriber[a].auth.basic.password: is required",
        ),
        ("auth = { basic = { username = \"a:b\", password = \"p\" } }", "no `:`"),
        ("auth = { bearer = \"hunter2 x\" }", "visible ASCII"),
        ("auth = { bearer = \"file:nowhere\" }", "cannot be read"),
        ("tls = { ca_file = \"nowhere.pem\" }", "nowhere.pem cannot be read"),
        ("tls = { ca_file = \"k.pem\" }", "holds no certificate"),
        ("tls = { client_cert_file = \"c.pem\" }", "needs the other"),
        (
            "tls = { client_cert_file = \"c.pem\", client_key_file = \"c.pem\" }",
            "subscriber[a].tls.client_key_file: holds no private key",
        ),
        (
            "tls = { client_cert_file = \"c.pem\", client_key_file = \"other.pem\" }",
            "is not the key of the certificate",
        ),
        ("http.proxy = \"socks5://hunter2\"", "is not the URL of a proxy"),
    ] {
        let found = load(bad).expect_err(bad);
        assert!(
            found.contains(part) && found.contains("1 problem in") && !found.contains("hunter2"),
            "{bad}: {found}"
        );
    }
    let in_url =
        file("auth = { bearer = \"x\" }\n").replace("https://example.com", "https://u@example.com");
    assert!(
        load_text(&in_url)
            .expect_err("two")
            .concat()
            .contains("cannot be combined with a user or password in `url`")
    );
}

#[test]
fn a_url_with_an_address_that_is_not_public_is_refused_however_it_is_spelled() {
    let load = |url: &str| {
        load_text(&format!("{QUEUE}{}", SUBSCRIBER.replace("https://example.com/", url)))
    };
    // Addresses that are not public, and spellings that are none.
    for url in [
        "https://127.0.0.1/",
        "https://127.0.0.1./",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7F.0.0.1/",
        "https://0177.0.0.1/",
        "https://0000177.0.0.01/",
        "https://127.0.0.1:8443/",
        "https://user:password@127.0.0.1/",
        "https://1.1.1.1@127.0.0.1/",
        "https://example.com@10.0.0.1/",
        "https://example.com:pass@[::1]/",
        "https:\\\\127.0.0.1\\hook",
        "https:/127.0.0.1/",
        "https:127.0.0.1/",
        "https:///127.0.0.1/",
        "  https://127.0.0.1/  ",
        "https://127.0\t.0.1/",
        "https://%31%32%37.0.0.1/",
        "https://１２７.0.0.1/",
        "https://127。0。0。1/",
        "https://①②⑦.0.0.1/",
        "https://0/",
        "https://0.0.0.0/",
        "https://10.0.0.1/",
        "https://10.255.255.254/",
        "https://012.0.0.1/",
        "https://172.16.0.1/",
        "https://172.31.255.255/",
        "https://192.168.1.1/",
        "https://192.168.257/",
        "https://3232235777/",
        "https://100.64.0.1/",
        "https://100.100.100.200/",
        "https://169.254.169.254/latest/meta-data/",
        "https://169.254.170.2/",
        "https://2852039166/",
        "https://0xa9.0xfe.0xa9.0xfe/",
        "https://0251.0376.0251.0376/",
        "https://168.63.129.16/",
        "https://192.0.0.192/",
        "https://192.0.2.7/",
        "https://198.18.0.1/",
        "https://198.51.100.1/",
        "https://203.0.113.1/",
        "https://224.0.0.1/",
        "https://255.255.255.255/",
        "https://[::]/",
        "https://[::1]/",
        "https://[0:0:0:0:0:0:0:1]/",
        "https://[0000:0000:0000:0000:0000:0000:0000:0001]:443/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:7f00:1]/",
        "https://[::FFFF:169.254.169.254]/",
        "https://[::127.0.0.1]/",
        "https://[::ffff:0:127.0.0.1]/",
        "https://[64:ff9b::10.0.0.1]/",
        "https://[64:ff9b::a9fe:a9fe]/",
        "https://[64:ff9b:1::1]/",
        "https://[2002:7f00:1::]/",
        "https://[2002:a9fe:a9fe::1]/",
        "https://[2001:0:7f00:1::]/",
        "https://[2001:db8::1]/",
        "https://[fc00::1]/",
        "https://[fd00:ec2::254]/",
        "https://[fd20:ce::254]/",
        "https://[fe80::1]/",
        "https://[fe80::a9fe:a9fe]/",
        "https://[fec0::1]/",
        "https://[ff02::1]/",
        "https://[fe80::1%25eth0]/",
        "https://[fe80::1%eth0]/",
        "https://[::1%25lo]/",
        "https://[::1/",
        "https://256.1.1.1/",
        "https://1.1.1.1.1/",
        "https://0x7f.0.0.0x1ff/",
        "https://exa mple.com/",
        "https:///",
    ] {
        let found = load(&url.replace('\\', "\\\\")).expect_err(url).concat();
        assert!(
            found.contains("subscriber[a].url: ")
                && (found.contains("not a public one") || found.contains("is not a URL")),
            "{url}: {found}"
        );
    }
    for url in [
        "https://1.1.1.1/",
        "https://16843009/",
        "https://[2606:4700::1111]/",
        "https://[64:ff9b::1.1.1.1]/",
        // Names: their addresses are checked when a connection is opened.
        "https://localhost/",
        "https://127.0.0.1.nip.io/",
        "https://metadata.google.internal/",
        "https://127.0.0.1.example/",
    ] {
        assert!(load(url).is_ok(), "{url}");
    }
}

#[test]
fn the_queue_is_required_and_never_guessed() {
    for (text, part) in [
        ("", "queue.url: is required"),
        ("[queue]\n", "h.toml:1:1: queue.url: is required"),
        ("[queue]\nurl = \"\"\n", "h.toml:2:7: queue.url: is empty"),
        ("[queue]\nurl = \"Embedded\"\n", "neither \"embedded\" nor an amqp"),
        ("[queue]\nurl = \"embedded\"\ndata_dir = \"\"\n", "queue.data_dir: is empty"),
        ("[queue]\nurl = \"http://x\"\n", "nor an amqp:// or amqps:// URL"),
        (
            "[queue]\nurl = \"amqp://x\"\nexchange = \"a\"\nsource_queue = \"b\"\n",
            "queue.source_queue: cannot be combined with",
        ),
        ("[queue]\nurl = \"amqp://x\"\nprefix = \"a b\"\n", "queue.prefix: must be"),
        (
            "[queue]\nurl = \"amqp://x\"\nintake = \"amqp://x\"\n",
            "h.toml:3:10: queue.intake: is for url = \"embedded\"",
        ),
        (
            "[queue]\nurl = \"embedded\"\nintake = \"http://u:hunter2@x\"\n",
            "h.toml:3:10: queue.intake: is not an amqp:// or amqps:// URL with a host; give",
        ),
        ("[queue]\nurl = \"embedded\"\nintake = \"\"\n", "queue.intake: is not an amqp"),
        (
            "[queue]\nurl = \"embedded\"\nbind = [\"a\"]\n",
            "h.toml:3:8: queue.bind: is for `intake`",
        ),
        ("[queue]\nurl = \"amqp://x\"\nbind = [\"a\"]\n", "queue.bind: is for `intake`"),
        (
            "[queue]\nurl = \"embedded\"\nintake = \"amqp://x\"\nsource_queue = \"a\"\nbind = [\"a\"]\n",
            "h.toml:5:8: queue.bind: cannot be combined with `source_queue`",
        ),
        (
            "[queue]\nurl = \"embedded\"\nintake = \"amqp://x\"\nbind = []\n",
            "queue.bind: is empty, so nothing would come in",
        ),
        (
            "[queue]\nurl = \"embedded\"\nintake = \"amqp://x\"\nbind = [\"a*\"]\n",
            "queue.bind[0]: `a*` mixes",
        ),
        (
            "[queue]\nurl = \"amqp://x\"\ntenant = { pointer = \"/a\" }\n",
            "h.toml:3:10: queue.tenant: is for url = \"embedded\": RabbitMQ's queues know no tenant",
        ),
        (
            "[queue]\nurl = \"embedded\"\ntenant = { pointer = \"a\" }\n",
            "h.toml:3:22: queue.tenant.pointer: must begin with `/`",
        ),
        (
            "[queue]\nurl = \"embedded\"\ntenant = { pointer = \"/a~\" }\n",
            "queue.tenant.pointer: has a `~` that is neither",
        ),
        (
            "[queue]\nurl = \"embedded\"\ntenant = { header = \"\" }\n",
            "queue.tenant.header: must have 1 to 255 bytes",
        ),
        (
            "[queue]\nurl = \"embedded\"\ntenant = { header = \"a\", pointer = \"/a\" }\n",
            "queue.tenant: must be either { header",
        ),
        ("[queue]\nurl = \"embedded\"\ntenant = {}\n", "queue.tenant: must be either { header"),
        ("[queue]\nurl = \"embedded\"\ntenant = \"/a\"\n", "queue.tenant: must be a table"),
        (
            "[queue]\nurl = \"embedded\"\ntenants = \"required\"\n",
            "h.toml:3:11: queue.tenants: is for `tenant`",
        ),
        (
            "[queue]\nurl = \"embedded\"\ntenant = { header = \"a\" }\ntenants = \"yes\"\n",
            "queue.tenants: must be \"optional\" or \"required\"",
        ),
        (
            "[queue]\nurl = \"amqp://x\"\nmanagement_url = \"u:hunter2@x:15672\"\n",
            "queue.management_url: is not the URL",
        ),
        (
            "[queue]\nurl = \"amqp://x\"\nmanagement_url = \"http://x/?a\"\n",
            "queue.management_url: is not the URL",
        ),
    ] {
        let found = problems(text);
        assert!(found.len() == 1 && found[0].contains(part), "{text}: {found:?}");
    }
}

#[test]
fn a_tenant_of_a_subscriber_needs_a_place_of_tenants_and_can_be_required() {
    let of = |queue: &str, lines: &str| {
        load_text(&format!("[queue]\nurl = \"embedded\"\n{queue}{}", testing::table("a", lines)))
    };
    let place = "tenant = { pointer = \"/account_id\" }\n";
    let required = "tenant = { pointer = \"/account_id\" }\ntenants = \"required\"\n";
    let found = of(required, "tenant = \"acct 1\"").expect("valid");
    let tenant = found.subscribers[0].tenant.as_ref().map(Tenant::as_str);
    assert_eq!(tenant, Some("acct 1"));
    assert_eq!(of(place, "").expect("valid").subscribers[0].tenant, None);
    let long = format!("tenant = \"{}\"", "x".repeat(256));
    for (queue, lines, part) in [
        ("", "tenant = \"a\"", "subscriber[a].tenant: needs [queue] tenant"),
        (required, "", "subscriber[a].tenant: is required by [queue] tenants = \"required\""),
        (place, "tenant = \"\"", "subscriber[a].tenant: must have 1 to 255 bytes"),
        (place, &long, "subscriber[a].tenant: must have 1 to 255 bytes"),
        (place, "tenant = 7", "subscriber[a].tenant: must be a string"),
    ] {
        let wrong = of(queue, lines).expect_err("is wrong");
        assert!(wrong.len() == 1 && wrong[0].contains(part), "{queue}{lines}: {wrong:?}");
    }
}

#[test]
fn a_broker_before_the_embedded_queue_takes_the_keys_of_rabbitmq_and_its_url_is_not_shown() {
    let of = |keys: &str| {
        let text =
            format!("[queue]\nurl = \"embedded\"\nintake = \"amqp://u:hunter2@b/v\"\n{keys}");
        load_text(&text).unwrap_or_else(|e| panic!("{keys}: {e:?}"))
    };
    let all = of("exchange = \"e\"\nprefix = \"p\"\nbind = [\"a.#\", \"b\"]\n");
    assert_eq!(all.queue.backend, Backend::Embedded);
    let intake = all.queue.intake.as_deref().expect("an intake");
    assert_eq!(intake.amqp.intake, Intake::Exchange("e".to_owned()));
    assert_eq!((&*intake.amqp.prefix, intake.amqp.url.expose().host_str()), ("p", Some("b")));
    let bind: Vec<&str> = intake.bind.iter().map(Pattern::as_str).collect();
    assert_eq!(bind, ["a.#", "b"]);
    assert!(!format!("{all:?}").contains("hunter2"));
    let bare = of("");
    let intake = bare.queue.intake.as_deref().expect("an intake");
    assert_eq!(
        (&intake.bind[..], &intake.amqp.intake),
        (&[Pattern::all()][..], &Intake::Exchange("audit".to_owned()))
    );
    let relayed = of("source_queue = \"q\"\n");
    let intake = relayed.queue.intake.as_deref().expect("an intake");
    assert_eq!(
        (&intake.bind[..], &intake.amqp.intake),
        (&[][..], &Intake::SourceQueue("q".to_owned()))
    );
    assert_eq!(
        load_text("[queue]\nurl = \"embedded\"\nexchange = \"e\"\n").expect("valid").queue.intake,
        None
    );
}

#[test]
fn a_listener_that_other_machines_reach_needs_a_token() {
    let with = |admin: &str| load_text(&format!("{QUEUE}[admin]\n{admin}\n")).map(|c| c.admin);
    let default = load_text(QUEUE).expect("valid").admin;
    assert_eq!((default.listen.to_string(), &default.token), ("127.0.0.1:8787".to_owned(), &None));
    assert_eq!(with("").expect("valid"), default);
    for listen in ["127.0.0.1:0", "127.9.9.9:1", "[::1]:8787", "[::ffff:127.0.0.1]:1"] {
        assert_eq!(
            with(&format!("listen = \"{listen}\"")).expect("valid").listen.to_string(),
            listen
        );
    }
    let open = with("listen = \"0.0.0.0:8787\"\ntoken = \"${SECRET}\"").expect("valid");
    assert!(open.token.is_some() && !format!("{open:?}").contains("MfKQ"));
    for (admin, part) in [
        (
            "listen = \"0.0.0.0:8787\"",
            "h.toml:4:10: admin.listen: 0.0.0.0:8787 is not a loopback address",
        ),
        ("listen = \"[::]:8787\"", "set `token`"),
        ("listen = \"\"", "h.toml:4:10: admin.listen: `` is not an address"),
        ("listen = \"localhost:8787\"", "write an IP address and a port"),
        ("listen = 8787", "must be a string"),
        ("token = \"\"", "h.toml:4:9: admin.token: must be one or more visible"),
        ("token = \"hunter 2\"", "without spaces"),
        ("tokn = \"x\"", "did you mean `token`?"),
        ("public_url = \"http://h.example\"", "admin.public_url: must be https:// with a host"),
        ("public_url = \"https://h.example/console\"", "must be https:// with a host"),
        ("public_url = \"https://hunter:2@h.example\"", "must be https:// with a host"),
        ("public_url = \"h.example\"", "must be https:// with a host"),
    ] {
        let found = with(admin).expect_err("refused");
        assert!(
            found.len() == 1 && found[0].contains(part) && !found[0].contains("hunter"),
            "{admin}: {found:?}"
        );
    }
}

#[test]
fn tokens_have_unique_names_and_values_and_a_role() {
    let with = |admin: &str| load_text(&format!("{QUEUE}[admin]\n{admin}\n")).map(|c| c.admin);
    let token = |name: &str, token: &str, role: &str| {
        format!("[[admin.tokens]]\nname = \"{name}\"\ntoken = \"{token}\"\nrole = \"{role}\"\n")
    };
    let some = token("ci", "hunter-ci", "intake") + &token("me", "${SECRET}", "admin");
    // A token of any role keeps other machines from publishing.
    let open = with(&format!("listen = \"0.0.0.0:1\"\n{some}")).expect("valid");
    let all: Vec<_> = open.all_tokens().iter().map(|t| (t.name.to_string(), t.role)).collect();
    assert_eq!(all, [("ci".to_owned(), Role::Intake), ("me".to_owned(), Role::Admin)]);
    assert_eq!(open.command_token(), Some(&open.tokens[1].secret), "the first of role admin");
    let own = with(&format!("token = \"hunter\"\n{some}")).expect("valid");
    assert_eq!((&*own.all_tokens()[0].name, own.all_tokens().len()), ("token", 3));
    assert_eq!(own.command_token(), own.token.as_ref());
    assert!(with(&token("ci", "x", "read")).expect("valid").command_token().is_none());
    let shown = load_text(&format!("{QUEUE}[admin]\n{some}")).expect("valid");
    let toml = global_as_toml(&shown);
    assert!(
        toml.contains(r#"{ name = "ci", token = "[redacted]", role = "intake" }"#)
            && !format!("{toml}{shown:?}").contains("hunter"),
        "{toml}"
    );
    let many: String = (0..101).map(|n| token(&format!("t{n}"), &n.to_string(), "read")).collect();
    for (admin, part) in [
        (
            token("ci", "hunter", "root"),
            "tokens[0].role: must be \"admin\" or \"read\" or \"intake\"",
        ),
        (token("C I", "hunter", "read"), "tokens[0].name: must be 1 to 64"),
        (token("token", "hunter", "read"), "is the name of the key `token`"),
        (token("ci", "", "read"), "tokens[0].token: must be one or more visible"),
        (token("a", "hunter", "read") + &token("a", "x", "read"), "tokens[1].name: `a` is already"),
        (token("a", "hunter", "read") + &token("b", "hunter", "read"), "the same as the token `a`"),
        (format!("token = \"hunter\"\n{}", token("a", "hunter", "read")), "the token `token`"),
        (
            "[[admin.tokens]]\nname = \"a\"\nrole = \"read\"".to_owned(),
            "tokens[0].token: is required",
        ),
        (
            "[[admin.tokens]]\ntoken = \"hunter\"\nrole = \"read\"".to_owned(),
            "tokens[0].name: is required",
        ),
        (
            "[[admin.tokens]]\nname = \"a\"\ntoken = \"hunter\"".to_owned(),
            "tokens[0].role: is required",
        ),
        ("tokens = \"hunter\"".to_owned(), "tokens: must be an array"),
        (many, "at most 100 tokens"),
    ] {
        let found = with(&admin).expect_err("refused");
        assert!(
            found.len() == 1 && found[0].contains(part) && !found[0].contains("hunter"),
            "{admin}: {found:?}"
        );
    }
}

#[test]
fn no_message_ever_quotes_a_secret() {
    let found = load_text(&format!(
        "[queue]\nurl = \"amqp//user:hunter2@x\"\n[[subscriber]]\nname = \"a\"\nurl = \"ftp://u:hunter2@example.com/hunter2\"\nsecrets = [\"${{BAD_SECRET}}\"]\n{}",
        "[[subscriber]]\nname = \"b\"\nurl = \"https://10.0.0.1/hunter2\"\nsecrets = [\"hunter2\"]\n"
    ))
    .expect_err("invalid");
    assert_eq!(found.len(), 5, "{found:#?}");
    assert!(
        !found.iter().any(|p| p.contains("hunter2") || p.contains("tell-nobody")),
        "{found:#?}"
    );
    let good = load_text(&format!("{QUEUE}{SUBSCRIBER}")).expect("valid");
    assert!(!format!("{good:?}").contains("MfKQ"));
}

#[test]
fn a_secret_of_the_environment_that_stands_where_it_does_not_belong_is_named_and_not_shown() {
    let secret = "${BAD_SECRET}";
    for (n, text) in [
        format!("{QUEUE}{SUBSCRIBER}events = [\"{secret}.x*\"]\n"),
        format!("{QUEUE}[log]\nlevel = \"{secret}\"\n{SUBSCRIBER}"),
        format!("{QUEUE}[retry]\ninitial_interval = \"{secret}\"\non_exhausted = \"{secret}\"\n{SUBSCRIBER}"),
        format!("{QUEUE}[batch]\nmax_bytes = \"{secret}\"\n{SUBSCRIBER}"),
        format!("{QUEUE}[http]\nallow_addresses = [\"{secret}\"]\nproxy = \"{secret}\"\nsuccess = \"{secret}\"\n{SUBSCRIBER}"),
        format!("{QUEUE}[admin]\nlisten = \"{secret}\"\n{SUBSCRIBER}"),
        format!("{QUEUE}{SUBSCRIBER}format = \"{secret}\"\nsignatures = [\"{secret}\"]\npreset = \"{secret}\"\n"),
        format!("{QUEUE}[[subscriber]]\nname = \"{secret}!\"\nurl = \"{secret}\"\nsignatures = []\n"),
    ]
    .iter()
    .enumerate()
    {
        let found = load_text(text).expect_err("refused");
        assert!(!found.iter().any(|p| p.contains("tell-nobody")), "{n}: {found:#?}");
    }
}

#[test]
fn secrets_come_from_files_relative_to_the_file_that_names_them() {
    let subscriber = |name: &str, file: &str| {
        format!(
            "[[subscriber]]\nname = \"{name}\"\nurl = \"https://example.com/\"\nsecrets = [\"file:{file}\"]\nsignatures = [\"mailtrap\"]\n"
        )
    };
    let main =
        format!("include = [\"subs/*.toml\", \"none/*.toml\"]\n{QUEUE}{}", subscriber("a", "s1"));
    let dir = dir_with(&[
        ("h.toml", &main),
        ("subs/b.toml", &subscriber("b", "s2")),
        ("s1", "one\n"),
        ("subs/s2", "two\n\n"),
    ]);
    let config = load_with(&dir.path().join("h.toml"), &env).expect("valid");
    let secrets: Vec<&str> = config.subscribers.iter().map(|s| s.secrets[0].expose()).collect();
    assert_eq!(secrets, ["one", "two\n"], "one trailing newline is dropped, no more");

    std::fs::write(
        dir.path().join("subs/c.toml"),
        subscriber("a", "nope") + "[queue]\nurl = \"x\"\n",
    )
    .expect("writes");
    let found = load_with(&dir.path().join("h.toml"), &env).expect_err("invalid").to_string();
    for part in [
        "c.toml:2:8: subscriber[a].name: `a` is already the name of",
        "c.toml:4:12: subscriber[a].secrets[0]: secret file",
        "c.toml:6:2: queue: unknown key; the only key here is `subscriber`",
        "3 problems",
    ] {
        assert!(found.contains(part), "{part} is not in {found}");
    }
}

#[test]
fn a_file_that_is_not_there_or_not_toml_says_so() {
    let e = load_with(Path::new("/nonexistent/h.toml"), &env).expect_err("no file").to_string();
    assert!(e.contains("/nonexistent/h.toml: cannot be read") && e.contains("--config"), "{e}");
    let found = problems("a = = 1\nb = \"\n");
    assert!(
        found.iter().any(|p| p.starts_with("h.toml:1:") && p.contains("not valid TOML")),
        "{found:?}"
    );
    let found = problems("include = [\"gone.toml\"]\n[queue]\nurl = \"amqp://x\"\n");
    assert!(found[0].starts_with("gone.toml: cannot be read"), "{found:?}");
    // Root, who runs tests in a container, may read everything.
    assert!(remedy_of(std::io::ErrorKind::PermissionDenied).contains("sudo -u hooktrail"));
}

#[test]
fn addresses_named_as_exceptions_may_stand_in_a_url() {
    let with = |http: &str| {
        load_text(&format!(
            "{QUEUE}[[subscriber]]\nname = \"a\"\nurl = \"http://127.0.0.1:9/\"\nsignatures = []\nhttp = {{ {http} }}\n"
        ))
    };
    assert!(with("allow_http = true, allow_private_addresses = true").is_ok());
    assert!(with("allow_http = true, allow_addresses = [\"127.0.0.0/8\"]").is_ok());
    assert!(with("allow_http = true, allow_addresses = [\"127.0.0.1\"]").is_ok());
    for (http, part) in [
        ("allow_http = true", "loopback"),
        ("allow_http = true, allow_addresses = [\"10.0.0.0/8\"]", "loopback"),
        ("allow_http = true, allow_addresses = [\"ten\"]", "`ten` is not a network"),
    ] {
        let found = with(http).expect_err("refused");
        assert!(found[0].contains(part), "{found:?}");
    }
}

/// Asserts that exactly these are found: the beginning of each and a part of its text.
#[track_caller]
fn assert_found(found: &[String], expected: &[(&str, &str)]) {
    for (place, part) in expected {
        assert!(
            found.iter().any(|p| p.starts_with(place) && p.contains(part)),
            "{place}…{part} is not in {found:#?}"
        );
    }
    assert_eq!(found.len(), expected.len(), "{found:#?}");
}

#[test]
fn a_mistake_hides_no_other() {
    let found = load_text(
        r#"[queue]
url = "amqp://x"
[http]
timeout = "0s"
[retry]
initial_interval = "0s"
multiplier = 0.5
randomization_factor = 2
max_attempts = -1
on_exhausted = "stop"
[circuit_breaker]
failures = -1
open_for = "2h"
max_open_for = "1h"
[[subscriber]]
name = "a"
url = "http://10.0.0.1/"
secrets = ["x", "${NOT_SET}", "whsec_"]
[[subscriber]]
name = "b"
url = "http://10.0.0.1/"
http = { allow_http = 1, allow_addresses = ["ten"] }
retry = { initial_interval = "1m", max_interval = "1s", multiplier = "x" }
signatures = [{ header = "a b", prefix = "\u0001", encoding = "rot13" }, "md5"]
[[subscriber]]
name = "c"
url = "https://10.0.0.1/"
http = { allow_private_addresses = "yes" }
secrets = "x"
signatures = ["md5"]
"#,
    )
    .expect_err("invalid");
    assert_found(
        &found,
        &[
            ("h.toml:4:11: http.timeout: ", "longer than 0"),
            ("h.toml:6:20: retry.initial_interval: ", "longer than 0"),
            ("h.toml:7:14: retry.multiplier: ", "from 1 to 1000"),
            ("h.toml:8:24: retry.randomization_factor: ", "from 0 to 1"),
            ("h.toml:9:16: retry.max_attempts: ", "whole number"),
            ("h.toml:10:16: retry.on_exhausted: ", "\"dead_letter\""),
            ("h.toml:12:12: circuit_breaker.failures: ", "whole number"),
            ("h.toml:14:16: circuit_breaker.max_open_for: ", "open_for"),
            ("h.toml:17:7: subscriber[a].url: ", "allow_http"),
            ("h.toml:17:7: subscriber[a].url: ", "private"),
            ("h.toml:18:12: subscriber[a].secrets[0]: ", "does not begin with `whsec_`"),
            ("h.toml:18:17: subscriber[a].secrets[1]: ", "NOT_SET"),
            ("h.toml:18:31: subscriber[a].secrets[2]: ", "24 to 64 bytes"),
            // Whether its address and plain http are allowed cannot be known here.
            ("h.toml:22:23: subscriber[b].http.allow_http: ", "true or false"),
            ("h.toml:22:45: subscriber[b].http.allow_addresses[0]: ", "not a network"),
            ("h.toml:23:51: subscriber[b].retry.max_interval: ", "shorter than initial_interval"),
            ("h.toml:23:70: subscriber[b].retry.multiplier: ", "must be a number"),
            ("h.toml:24:26: subscriber[b].signatures[0].header: ", "not a valid header name"),
            ("h.toml:24:42: subscriber[b].signatures[0].prefix: ", "cannot carry"),
            ("h.toml:24:63: subscriber[b].signatures[0].encoding: ", "\"hex\" or \"base64\""),
            ("h.toml:24:74: subscriber[b].signatures[1]: ", "must be \"standard-webhooks\""),
            ("h.toml:19:1: subscriber[b].secrets: ", "is required"),
            ("h.toml:28:36: subscriber[c].http.allow_private_addresses: ", "true or false"),
            ("h.toml:29:11: subscriber[c].secrets: ", "must be an array"),
            ("h.toml:30:15: subscriber[c].signatures[0]: ", "must be \"standard-webhooks\""),
        ],
    );
}

#[test]
fn the_url_is_checked_next_to_a_mistake_in_the_same_http_group() {
    let with = |http: &str| {
        load_text(&format!(
            "{QUEUE}[[subscriber]]\nname = \"a\"\nurl = \"http://10.0.0.1/\"\nsignatures = []\nhttp = {{ concurrency = 0, {http} }}\n"
        ))
        .expect_err("concurrency is wrong")
    };
    let concurrency = ("h.toml:7:24: subscriber[a].http.concurrency: ", "from 1 to 100");
    let plain = ("h.toml:5:7: subscriber[a].url: ", "allow_http = true");
    let private = ("h.toml:5:7: subscriber[a].url: ", "allow_private_addresses = true");
    assert_found(&with("allow_http = false"), &[concurrency, plain, private]);
    assert_found(&with("allow_http = true"), &[concurrency, private]);
    assert_found(&with("allow_private_addresses = true"), &[concurrency, plain]);
}

#[test]
fn no_two_signatures_share_a_header() {
    let with = |signatures: &str| {
        load_text(&format!("{QUEUE}{SUBSCRIBER}signatures = [{signatures}]\n")).map(drop).map_err(
            |mut found| {
                assert_eq!(found.len(), 1, "{found:#?}");
                found.remove(0)
            },
        )
    };
    assert_eq!(
        with(r#""standard-webhooks", "mailtrap", { header = "X-A" }, { header = "X-B" }"#),
        Ok(())
    );
    for (signatures, place) in [
        (
            r#"{ header = "X-Sig" }, { header = "x-sig", encoding = "base64" }"#,
            "h.toml:7:48: subscriber[a].signatures[1].header: ",
        ),
        (
            r#""mailtrap", { header = "X-A" }, "mailtrap""#,
            "h.toml:7:47: subscriber[a].signatures[2]: ",
        ),
        (
            r#""standard-webhooks", "standard-webhooks""#,
            "h.toml:7:36: subscriber[a].signatures[1]: ",
        ),
    ] {
        let found = with(signatures).expect_err("refused");
        assert!(
            found.starts_with(place)
                && found.contains("already that of subscriber[a].signatures[0]"),
            "{place} is not {found}"
        );
    }
    for reserved in ["Webhook-Signature", "mailtrap-signature", "X-Hooktrail-Attempt", "HOST"] {
        let found = with(&format!("{{ header = \"{reserved}\" }}")).expect_err("refused");
        assert!(found.contains("sets itself; choose another"), "{found}");
    }
}

#[test]
fn a_custom_signature_header_is_checked() {
    let with = |signature: &str| {
        load_text(&format!(
            "{QUEUE}[[subscriber]]\nname = \"a\"\nurl = \"https://example.com/\"\nsecrets = [\"x\"]\nsignatures = [{signature}]\n"
        ))
    };
    assert!(
        with(r#"{ header = "X-Hub-Signature-256", prefix = "sha256=", encoding = "hex" }"#).is_ok()
    );
    for (signature, part) in [
        (r#"{ prefix = "x" }"#, "signatures[0].header: is required"),
        (r#"{ header = "a b" }"#, "not a valid header name"),
        (r#"{ header = "Content-Type" }"#, "sets itself"),
        (r#"{ header = "X", prefix = "a\nb" }"#, "cannot carry"),
        (r#"{ header = "X", encoding = "rot13" }"#, "\"hex\" or \"base64\""),
    ] {
        let found = with(signature).expect_err("refused");
        assert!(found.len() == 1 && found[0].contains(part), "{found:?}");
    }
}

#[test]
fn where_tokens_come_from_is_checked_as_where_requests_go() {
    let with = |oauth2: &str, http: &str| {
        let text = format!(
            "{QUEUE}[[subscriber]]\nname = \"a\"\nurl = \"https://example.com/\"\nsignatures = []\n{http}\nauth = {{ oauth2 = {{ {oauth2} }} }}\n"
        );
        load_text(&text).map(|config| config.subscribers[0].longest_attempt().as_secs())
    };
    let rest = "client_id = \"c\", client_secret = \"s\"";
    let good = format!("token_url = \"https://login.example/token\", {rest}");
    let times = "http = { timeout = \"20s\" }";
    assert_eq!(with(&good, times).expect("valid"), 2 * (20 + 20 + 20 + 2), "twice with a token");
    for (oauth2, part) in [
        (format!("token_url = \"http://login.example/\", {rest}"), "plain http"),
        (format!("token_url = \"https://10.0.0.1/\", {rest}"), "not a public one"),
        (
            format!("token_url = \"https://u:hunter2@login.example/\", {rest}"),
            "no user and no password",
        ),
        (format!("token_url = \"login.example\", {rest}"), "has no scheme"),
        (rest.to_owned(), "where tokens are fetched"),
        ("token_url = \"https://a.example/\", client_id = \"c\"".to_owned(), "its secret there"),
        (format!("{good}, scope = \"a\\nb\""), "visible ASCII"),
        (good.replace("\"c\"", "\"\""), "visible ASCII"),
        (format!("{good}, realm = \"x\""), "realm"),
    ] {
        let found = with(&oauth2, "").expect_err("refused");
        assert!(found.len() == 1 && found[0].contains(part), "{oauth2}: {found:?}");
        assert!(found[0].contains("oauth2") && !found[0].contains("hunter2"), "{found:?}");
    }
    let both = format!("{good} }}, bearer = \"t\", basic = {{ username = \"u\", password = \"p\"");
    assert!(with(&both, "").expect_err("refused")[0].contains("must be one of"));
}

#[test]
fn strict_order_sets_what_it_needs_and_contradicts_no_key_of_its_subscriber() {
    const EMBEDDED: &str = "[queue]\nurl = \"embedded\"\n";
    let with = |queue: &str, lines: &str| {
        load_text(&format!(
            "{queue}[http]\nconcurrency = 8\n[[subscriber]]\nname = \"a\"\nurl = \"https://example.com/\"\nsignatures = []\norder = \"strict\"\n{lines}\n"
        ))
    };
    let config = with(EMBEDDED, "").expect("valid");
    let subscriber = &config.subscribers[0];
    assert!(subscriber.in_order && subscriber.http.concurrency == 1);
    assert_eq!(subscriber.retry.on_exhausted(), Exhausted::Pause);
    for (queue, lines, part) in [
        (QUEUE, "", "[queue.intake]"),
        (EMBEDDED, "http = { concurrency = 2 }", "must be 1"),
        (EMBEDDED, "retry = { on_exhausted = \"dead_letter\" }", "must be \"pause\""),
        (EMBEDDED, "start_from = \"-7d\"", "beside new events"),
    ] {
        let found = with(queue, lines).expect_err("refused");
        assert!(found.len() == 1 && found[0].contains(part), "{found:?}");
    }
    let found = load_text(&format!(
        "{QUEUE}[[subscriber]]\nname = \"a\"\nurl = \"https://example.com/\"\nsignatures = []\norder = \"none\"\n"
    ));
    assert!(found.expect_err("refused")[0].contains("must be \"strict\""));
}

#[test]
fn a_preset_brings_every_key_that_its_own_values_need() {
    let text = format!(
        "{QUEUE}[retry]\ninitial_interval = \"1s\"\nmax_interval = \"1m\"\n[[subscriber]]\nname = \"a\"\nurl = \"https://example.com/\"\n\
         secrets = [\"x\"]\npreset = \"mailtrap\"\n"
    );
    let config = load_text(&text).unwrap_or_else(|e| panic!("{e:?}"));
    assert_eq!(config.subscribers[0].retry.options().max_interval, Duration::from_secs(300));
}

#[test]
fn an_attempt_over_http_2_may_wait_for_a_place_as_long_as_for_its_answer() {
    let longest = |url: &str, http: &str| {
        let text = format!(
            "{QUEUE}[[subscriber]]\nname = \"a\"\nurl = \"{url}\"\nsignatures = []\nhttp = {{ allow_http = true, {http} }}\n"
        );
        load_text(&text).unwrap_or_else(|e| panic!("{e:?}")).subscribers[0]
            .longest_attempt()
            .as_secs()
    };
    let times = "timeout = \"20s\", connect_timeout = \"3s\"";
    assert_eq!(longest("https://example.com/", times), 20 + 20 + 2);
    assert_eq!(longest("http://example.com/", times), 3 + 20 + 2, "HTTP/1.1: for a connection");
    assert_eq!(
        longest("http://example.com/", "timeout = \"2s\", connect_timeout = \"5s\""),
        2 + 2 + 2,
        "never longer than that"
    );
    assert_eq!(
        longest("http://example.com/", &format!("{times}, proxy = \"https://127.0.0.1:1\"")),
        20 + 20 + 2,
        "agreed on with the proxy"
    );
}

#[test]
fn two_times_that_do_not_agree_are_reported_where_the_subscriber_says_its_own_with_where_the_other_is_from()
 {
    let found = load_text(
        r#"[queue]
url = "amqp://x"
[retry]
max_interval = "1m"
initial_interval = "1s"
[circuit_breaker]
open_for = "2m"
[[subscriber]]
name = "a"
url = "https://example.com/"
signatures = []
retry.initial_interval = "5m"
[[subscriber]]
name = "b"
url = "https://example.com/"
signatures = []
retry = { initial_interval = "5m", max_interval = "4m" }
circuit_breaker.max_open_for = "1m"
[[subscriber]]
name = "c"
url = "https://example.com/"
signatures = []
circuit_breaker.open_for = "50m"
[[subscriber]]
name = "d"
url = "https://example.com/"
secrets = ["x"]
preset = "mailtrap"
retry.max_interval = "2m"
"#,
    )
    .expect_err("invalid");
    assert_found(
        &found,
        &[
            (
                "h.toml:12:26: subscriber[a].retry.initial_interval: ",
                "longer than max_interval, which is 1m at h.toml:4:16; change",
            ),
            (
                "h.toml:17:51: subscriber[b].retry.max_interval: ",
                "shorter than initial_interval, which is 5m at h.toml:17:30; change",
            ),
            (
                "h.toml:18:32: subscriber[b].circuit_breaker.max_open_for: ",
                "shorter than open_for, which is 2m at h.toml:7:12; change",
            ),
            (
                "h.toml:23:28: subscriber[c].circuit_breaker.open_for: ",
                "longer than max_open_for, which is 10m by default; change",
            ),
            (
                "h.toml:29:22: subscriber[d].retry.max_interval: ",
                "shorter than initial_interval, which is 5m by the preset; change",
            ),
        ],
    );
}

#[test]
fn subscribers_have_metrics_of_their_own_up_to_a_thousand_unless_it_is_said() {
    let with = |n: usize, metrics: &str| {
        let tables: String = (0..n).map(|n| testing::table(&format!("s{n}"), "")).collect();
        testing::embedded(&format!("{metrics}\n{tables}")).metrics_per_subscriber()
    };
    assert!(with(1000, "") && !with(1001, ""));
    assert!(with(1001, "[metrics]\nper_subscriber = true"));
    assert!(!with(1, "[metrics]\nper_subscriber = false"));
}

#[test]
fn a_key_that_goes_with_some_formats_is_refused_with_any_other() {
    let found = |lines: &str| {
        let one = SUBSCRIBER.to_owned() + lines;
        load_text(&format!("{QUEUE}{one}"))
    };
    for sound in [
        "format = \"jsonl\"\ncontent_type = \"application/x-ndjson\"",
        "format = \"json_array\"\ncontent_type = \"application/json; charset=utf-8\"",
        "format = \"splunk_hec\"\nsource = \"any text\"\nsourcetype = \"_json\"\nindex = \"main\"",
        "format = \"splunk_hec\"",
        "format = \"cloudevents_batch\"\nsource = \"https://example.com/audit\"",
        "format = \"cloudevents_batch\"\nsource = \"urn:audit\"",
        "format = \"slack\"",
    ] {
        found(sound).unwrap_or_else(|problems| panic!("{sound}: {problems:?}"));
    }
    for (wrong, problem) in [
        (
            "content_type = \"text/plain\"",
            "7:16: subscriber[a].content_type: goes with format = \"jsonl\" or \"json_array\" alone, and the format is \"json\"; remove it, or choose another format",
        ),
        (
            "format = \"jsonl\"\ncontent_type = \"text/plain\\nx-a: b\"",
            "8:16: subscriber[a].content_type: is not a media type; write one such as \"application/x-ndjson\" or \"application/json; charset=utf-8\"",
        ),
        (
            "format = \"cloudevents_batch\"",
            "3:1: subscriber[a].source: is required with format = \"cloudevents_batch\": a URI of what the events come from, such as \"/audit\" or \"https://example.com/audit\"",
        ),
        (
            "format = \"cloudevents_batch\"\nsource = \"our audit\"",
            "8:10: subscriber[a].source: is not a URI reference, which the `source` of a CloudEvent is; write one such as \"/audit\" or \"https://example.com/audit\"",
        ),
        (
            "format = \"cloudevents_batch\"\nsource = \"/a\"\nindex = \"main\"",
            "9:9: subscriber[a].index: goes with format = \"splunk_hec\" alone, and the format is \"cloudevents_batch\"; remove it, or choose another format",
        ),
        (
            "format = \"splunk_hec\"\nsource = \"\"",
            "8:10: subscriber[a].source: must have 1 to 255 bytes, and no control characters among them",
        ),
        (
            "format = \"splunk_hec\"\nindex = \"a\\tb\"",
            "8:9: subscriber[a].index: must have 1 to 255 bytes, and no control characters among them",
        ),
        ("format = \"splunk\"", "7:10: subscriber[a].format: "),
    ] {
        let problems = found(wrong).expect_err(wrong);
        assert!(
            problems.len() == 1 && problems[0].starts_with(&format!("h.toml:{problem}")),
            "{problems:?}"
        );
    }
}

#[test]
fn a_signing_key_is_checked_and_signs_beside_the_secrets_or_alone() {
    use crate::crypto::signature::{Scheme, new_signing_key};
    let key = new_signing_key();
    let alone = |lines: &str| {
        load_text(&format!(
            "{QUEUE}[[subscriber]]\nname = \"a\"\nurl = \"https://example.com/\"\n{lines}"
        ))
    };
    let schemes = |lines: &str| {
        let config = alone(lines).unwrap_or_else(|e| panic!("{lines}: {e:?}"));
        config.subscribers[0].signer.schemes().to_vec()
    };
    let line = format!("signing_key = \"{key}\"\n");
    assert_eq!(schemes(&line), [Scheme::Ed25519]);
    let secret = "secrets = [\"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\"]\n";
    let both = [Scheme::StandardWebhooks, Scheme::Ed25519];
    assert_eq!(schemes(&format!("{line}{secret}")), both);
    let named = "signatures = [\"standard-webhooks\", \"standard-webhooks-ed25519\"]\n";
    assert_eq!(schemes(&format!("{line}{secret}{named}")), both);
    let other = if &key[30..31] == "A" { "B" } else { "A" };
    let flipped = format!("{}{other}{}", &key[..30], &key[31..]);
    for (wrong, problem) in [
        (
            format!("{line}{secret}signatures = [\"standard-webhooks\"]"),
            "signing_key: signs nothing",
        ),
        (format!("{secret}{named}"), "needs `signing_key`"),
        (format!("{line}{named}"), "secrets: is required for signing"),
        (
            "signing_key = \"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\"".to_owned(),
            "does not begin with `whsk_`",
        ),
        ("signing_key = \"whpk_MfKQ\"".to_owned(), "is the public key, which signs nothing"),
        ("signing_key = \"whsk_MfKQ\"".to_owned(), "does not hold the 32 or 64 bytes"),
        ("signing_key = \"whsk_*\"".to_owned(), "is not base64"),
        (format!("signing_key = \"{flipped}\""), "its public half belongs to another seed"),
    ] {
        let problems = alone(&wrong).expect_err(&wrong);
        assert!(problems.iter().any(|p| p.contains(problem)), "{problem}: {problems:?}");
        assert!(problems.iter().all(|p| !p.contains(&key[5..])), "{problems:?}");
    }
}

#[test]
fn values_are_named_by_their_places_and_what_cannot_be_meant_is_refused() {
    let found = |lines: &str| load_text(&format!("{QUEUE}{SUBSCRIBER}{lines}"));
    for sound in [
        "match = { \"/actor/type\" = [\"user\"], \"/id\" = [42, -7, +5, 0x10, 1_000], \"/t\" = [true, \"null\"] }",
        "redact = [\"/actor/email\", \"/changes/*/from\"]",
        "redact = [\"/a\"]\nredact_with = \"\"",
        "redact = [\"/a\"]\nredact_with = { hmac = \"k\" }",
        "redact = []",
    ] {
        found(sound).unwrap_or_else(|problems| panic!("{sound}: {problems:?}"));
    }
    let numbers = found("match = { \"/id\" = [+5, -7, 0x10, 1_000] }").expect("numbers");
    let values = &numbers.subscribers[0].conditions.all()[0].values;
    assert_eq!(*values, ["5", "-7", "16", "1000"], "as events spell them");
    for (wrong, problem) in [
        ("match = { \"/a\" = \"x\" }", "must be an array"),
        ("match = { \"/a\" = [] }", "is empty, so no event would match"),
        ("match = { \"a\" = [\"x\"] }", "`a` is no place in an event: it must begin with `/`"),
        ("match = { \"/a~2\" = [\"x\"] }", "has a `~`"),
        ("match = { \"/a\" = [1.5] }", "write any other number as the text that events have"),
        ("redact = [\"/event\"]", "`/event` would redact the field `event`"),
        ("redact = [\"/*\"]", "`/*` would redact the field `event`"),
        ("redact = [\"\"]", "must begin with `/`"),
        ("redact = \"/a\"", "must be an array"),
        ("redact_with = \"x\"", "does nothing without `redact`"),
        ("redact = []\nredact_with = \"x\"", "does nothing without `redact`"),
        ("redact = [\"/a\"]\nredact_with = { hmac = \"\" }", "the secret is empty"),
        ("redact = [\"/a\"]\nredact_with = {}", "hmac: is required in this form"),
    ] {
        let problems = found(wrong).expect_err(wrong);
        assert!(problems.len() == 1 && problems[0].contains(problem), "{wrong}: {problems:?}");
        assert!(problems[0].starts_with("h.toml:"), "{problems:?}");
    }
}

#[test]
fn a_format_of_single_events_has_batches_of_one_and_no_other_number() {
    let of = |lines: &str| testing::subscriber("a", lines).batch.max_events;
    assert_eq!((of("format = \"single\""), of("format = \"json_array\"")), (1, 500));
    assert_eq!(of("format = \"single\"\nbatch = { max_events = 1 }"), 1);
    let with = |own: &str| {
        let one = SUBSCRIBER.to_owned() + "format = \"single\"\n" + own;
        load_text(&format!("{QUEUE}[batch]\nmax_events = 100\n{one}"))
    };
    assert_eq!(with("").expect("that of all gives way").subscribers[0].batch.max_events, 1);
    let problems = with("batch = { max_events = 500 }").expect_err("it cannot");
    assert_eq!(
        problems,
        [
            "h.toml:10:24: subscriber[a].batch.max_events: must be at most 1 with format = \"single\"; leave it out, or choose another format"
        ]
    );
}
