//! Promises of SECURITY.md that no other file of these tests covers; and that the names in it and
//! in docs/guarantees.md are true.

use std::{
    collections::BTreeSet,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustls::ServerConfig;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsAcceptor;
use url::Url;

use crate::{
    documents::packaging::{anchors, file},
    support::{
        broker::Broker,
        daemon::{QUICK, Setup, subscriber},
        queue::{Embedded, Section as _},
        receiver::{Receiver, event},
        run, tests_that_need,
        tls::Authority,
    },
};

tests_that_need!(
    broker:
    a_broker_over_tls_gets_nothing_before_its_certificate_is_trusted,
    a_self_signed_certificate_of_a_broker_is_accepted_if_it_is_trusted_itself_and_its_name_is_good,
);

/// A broker that is reached over TLS: what comes is passed on to the one of the tests. Its URL, and
/// how many handshakes were made to their end.
async fn over_tls(config: ServerConfig, broker: &Broker) -> (String, Arc<AtomicUsize>) {
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let plain = Url::parse(&broker.url).expect("a URL");
    let to = (plain.host_str().expect("a host").to_owned(), plain.port().unwrap_or(5672));
    let mut url = plain;
    url.set_scheme("amqps").expect("a scheme");
    url.set_host(Some("127.0.0.1")).expect("a host");
    url.set_port(Some(socket.local_addr().expect("an address").port())).expect("a port");
    let made = Arc::new(AtomicUsize::new(0));
    let counted = made.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = socket.accept().await {
            let (acceptor, made, to) = (acceptor.clone(), made.clone(), to.clone());
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                made.fetch_add(1, Ordering::Relaxed);
                let mut broker = TcpStream::connect(to).await.expect("the broker");
                copy_bidirectional(&mut stream, &mut broker).await.ok();
            });
        }
    });
    (url.into(), counted)
}

fn a_broker_over_tls_gets_nothing_before_its_certificate_is_trusted() {
    run(async {
        let (broker, authority) = (Broker::shared(), Authority::new());
        let receiver = Receiver::accepting().await;
        let text = broker.section(&["a"]) + QUICK + &subscriber("a", &receiver.url, "");
        for (certified, trusted, refused) in [
            ("127.0.0.1", Authority::new().pem, Some("invalid peer certificate")),
            ("broker.example", authority.pem.clone(), Some("not valid for name")),
            ("127.0.0.1", authority.pem.clone(), None),
        ] {
            let (url, made) =
                over_tls(authority.server(&authority.sign(certified), false), &broker).await;
            let setup = Setup::with_text(&text.replace(&broker.url, &url));
            setup.write("trusted.pem", trusted);
            let shell = "SSL_CERT_FILE=trusted.pem exec \"$0\" \"$@\"";
            if let Some(why) = refused {
                let inspection = setup.run_as(shell, &["check", "--connect"]);
                let reported = String::from_utf8_lossy(&inspection.stdout).into_owned()
                    + &String::from_utf8_lossy(&inspection.stderr);
                assert!(
                    inspection.status.code() == Some(1) && reported.contains(why),
                    "{reported}"
                );
                assert_eq!(made.load(Ordering::Relaxed), 0, "{reported}");
                continue;
            }
            let daemon = setup.spawn_as(shell);
            daemon.wait_log("running").await;
            broker.publish("a.b", (0..10).map(event)).await;
            receiver.wait_all(10).await;
            assert!(made.load(Ordering::Relaxed) > 1, "connections to consume and to publish");
            assert!(daemon.stop().await.success());
        }
    });
}

/// A certificate as `openssl req -x509` makes it: an authority (CA:TRUE), and the server's own.
fn a_self_signed_certificate_of_a_broker_is_accepted_if_it_is_trusted_itself_and_its_name_is_good()
{
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let text = broker.section(&["a"]) + QUICK + &subscriber("a", &receiver.url, "");
        let good = || Authority::of_itself("127.0.0.1", |_| {});
        for (what, (authority, own), trusted, is_accepted) in [
            ("another is trusted", good(), Some(good().0.pem), false),
            ("of another name", Authority::of_itself("broker.example", |_| {}), None, false),
            ("trusted", good(), None, true),
        ] {
            let (url, made) = over_tls(authority.server(&own, false), &broker).await;
            let setup = Setup::with_text(&text.replace(&broker.url, &url));
            setup.write("trusted.pem", trusted.as_ref().unwrap_or(&authority.pem));
            let shell = "SSL_CERT_FILE=trusted.pem exec \"$0\" \"$@\"";
            if !is_accepted {
                let inspection = setup.run_as(shell, &["check", "--connect"]);
                let reported = String::from_utf8_lossy(&inspection.stdout).into_owned()
                    + &String::from_utf8_lossy(&inspection.stderr);
                assert!(
                    inspection.status.code() == Some(1) && reported.contains("certificate"),
                    "{what}: {reported}"
                );
                assert_eq!(made.load(Ordering::Relaxed), 0, "{what}: {reported}");
                continue;
            }
            let daemon = setup.spawn_as(shell);
            daemon.wait_log("running").await;
            broker.publish("a.b", (0..10).map(event)).await;
            receiver.wait_all(10).await;
            assert!(daemon.stop().await.success());
        }
    });
}

#[test]
fn the_embedded_queue_is_its_owners_alone_whatever_the_umask() {
    run(async {
        for before in [None, Some(0o755)] {
            let queue = Embedded::new();
            if let Some(mode) = before {
                std::fs::create_dir(queue.data_dir()).expect("makes it");
                std::fs::set_permissions(queue.data_dir(), std::fs::Permissions::from_mode(mode))
                    .expect("changes");
            }
            let setup = Setup::new(
                &queue,
                &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")),
            );
            let daemon = setup.spawn_as("umask 0; exec \"$0\" \"$@\"");
            daemon.wait_log("running").await;
            let mode = |path: &Path| {
                std::fs::metadata(path).expect("is there").permissions().mode() & 0o777
            };
            assert_eq!(mode(&queue.data_dir()), before.unwrap_or(0o700));
            for suffix in ["", "-wal", "-shm"] {
                let path = format!("{}{suffix}", queue.file().display());
                assert_eq!(mode(Path::new(&path)), 0o600, "{path}");
            }
            assert!(daemon.stop().await.success());
        }
    });
}

fn table(path: &str) -> toml::Table {
    file(path).parse().unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The quick part of scripts/audit, which needs no tool.
#[test]
fn dependencies_come_from_crates_io_by_their_checksums_and_none_of_them_is_banned() {
    let rules = table("deny.toml");
    let entries = |group: &str, key: &str| rules[group][key].as_array().expect("a list").clone();
    let banned: BTreeSet<String> = entries("bans", "deny")
        .iter()
        .map(|b| b["crate"].as_str().expect("a name").to_owned())
        .collect();
    assert!(banned.contains("openssl-sys") && banned.contains("aws-lc-sys"), "{banned:?}");
    for (lock, own) in [("Cargo.lock", "hooktrail"), ("tests/verifiers/rust/Cargo.lock", "verify")]
    {
        let packages = table(lock)["package"].as_array().expect("packages").clone();
        for package in &packages {
            let text =
                |key: &str| package.get(key).and_then(toml::Value::as_str).unwrap_or_default();
            let name = text("name");
            if name == own {
                continue;
            }
            assert_eq!(
                text("source"),
                "registry+https://github.com/rust-lang/crates.io-index",
                "{lock}: {name}"
            );
            assert_eq!(text("checksum").len(), 64, "{lock}: {name}");
            assert!(!banned.contains(name), "{lock}: {name} is banned by deny.toml");
        }
        assert!(packages.len() > 50, "{lock}: {}", packages.len());
    }
    for exception in entries("advisories", "ignore")
        .iter()
        .chain(&entries("bans", "skip"))
        .chain(&entries("bans", "deny"))
    {
        assert!(
            exception.get("reason").and_then(toml::Value::as_str).is_some_and(|r| r.len() > 10),
            "{exception:?} without its reason"
        );
    }
}

#[test]
fn no_target_of_this_package_may_hold_unsafe_code() {
    let manifest = table("Cargo.toml");
    assert_eq!(manifest["lints"]["rust"]["unsafe_code"].as_str(), Some("forbid"));
    for root in ["src/lib.rs", "src/main.rs"] {
        assert!(file(root).contains("\n#![forbid(unsafe_code)]\n"), "{root}");
    }
}

/// The files below `tests/` that have this name, or are in a folder of this name, by their paths.
fn tests_in(name: &str) -> Vec<String> {
    let mut folders = vec!["tests".to_owned()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(&folder))
            .expect("a folder")
        {
            let entry = entry.expect("an entry");
            let path = format!("{folder}/{}", entry.file_name().to_string_lossy());
            if entry.file_type().expect("its type").is_dir() {
                folders.push(path);
            } else if entry
                .file_name()
                .to_string_lossy()
                .strip_suffix(".rs")
                .is_some_and(|file| file == name || folder.ends_with(&format!("/{name}")))
            {
                found.push(path);
            }
        }
    }
    found
}

/// Files by their paths, tests by theirs: `a::b` is `b` in a file a.rs or a folder a/ below tests/,
/// `a::tests::b` in src/a.rs or src/a/tests.rs.
fn assert_names_are_true(page: &str, least_files: usize, least_tests: usize) {
    let model = file(page);
    let (mut files, mut tests) = (0, 0);
    for span in model.split('`').skip(1).step_by(2) {
        let is_name = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        let parts: Vec<&str> = span.split("::").collect();
        if parts.len() > 1 && parts.iter().all(|p| is_name(p) && p.len() > 1) {
            let (name, paths) = match &parts[..] {
                [path @ .., "tests", name] => {
                    let module = format!("src/{}", path.join("/"));
                    (name, vec![format!("{module}.rs"), format!("{module}/tests.rs")])
                }
                [path, name] => (name, tests_in(path)),
                _ => panic!("`{span}` is not the path of a test"),
            };
            let there = |path: &&String| Path::new(env!("CARGO_MANIFEST_DIR")).join(path).exists();
            let text: String = paths.iter().filter(there).map(|path| file(path)).collect();
            // A function, or an entry of one of the macros that make tests.
            let begins = [format!("fn {name}("), format!("    {name}: ")];
            assert!(
                begins.iter().any(|b| text.contains(b)),
                "{page}: {paths:?} have no test {name}"
            );
            tests += 1;
        } else if ["src/", "docs/", "scripts/", "packaging/", "tests/", "config/", ".ci/"]
            .iter()
            .any(|d| span.starts_with(d))
        {
            // A command with its arguments, and a place for a name.
            let path = span.split(' ').next().expect("a word");
            assert!(
                path.contains("/a.rs") || Path::new(env!("CARGO_MANIFEST_DIR")).join(path).exists(),
                "{page}: {path} is not there"
            );
            files += 1;
        }
    }
    assert!(files >= least_files && tests >= least_tests, "{page}: {files} files, {tests} tests");
}

#[test]
fn what_the_guarantees_name_is_there() {
    assert_names_are_true("docs/guarantees.md", 2, 25);
}

#[test]
fn what_the_threat_model_names_is_there() {
    assert_names_are_true("SECURITY.md", 11, 41);
    let model = file("SECURITY.md");
    for link in model
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|l| !l.starts_with("https://"))
    {
        match link.split_once('#') {
            Some(("", anchor)) => {
                assert!(anchors(&model).contains(anchor), "#{anchor} is no heading")
            }
            Some((path, anchor)) => {
                assert!(anchors(&file(path)).contains(anchor), "{link} leads nowhere")
            }
            None => drop(file(link)),
        }
    }
}
