//! Endpoints of every kind: authentication, certificates, a proxy, HTTP/2.

use axum::http::Version;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use crate::support::{
    daemon::{Daemon, QUICK, Setup, subscriber},
    eventually,
    queue::Queue,
    receiver::{Receiver, event},
    run,
    tls::{Authority, TlsReceiver},
};

const TYPE: &str = "a.b";

/// The secrets of this test, which are shown nowhere.
fn assert_silent(setup: &Setup, daemon: &Daemon) {
    let arguments = std::fs::read_to_string(format!("/proc/{}/cmdline", daemon.pid()))
        .expect("the daemon runs");
    for text in [daemon.log(), setup.ok(&["check"]), arguments] {
        assert!(
            !text.contains("hunter2") && !text.contains("aHVudGVyMg") && !text.contains("PRIVATE"),
            "{text}"
        );
    }
}

#[test]
fn authentication_and_headers_of_its_own_arrive_and_are_shown_nowhere() {
    run(async {
        let queue = Queue::embedded();
        let receivers =
            [Receiver::accepting().await, Receiver::accepting().await, Receiver::accepting().await];
        let own = [
            "auth = { basic = { username = \"jane\", password = \"hunter2\" } }",
            "auth = { bearer = \"file:token\" }",
            "headers = { Authorization = \"Splunk hunter2\", X-Tenant = \"acme\" }",
        ];
        let mut text = QUICK.to_owned();
        for (n, (receiver, own)) in receivers.iter().zip(own).enumerate() {
            text += &subscriber(&format!("s{n}"), &receiver.url, own);
        }
        let setup = Setup::new(&queue, &text);
        setup.write("token", "hunter2-token\n");
        let daemon = setup.start().await;
        queue.publish(TYPE, [event(0)]).await;
        let expected = ["Basic amFuZTpodW50ZXIy", "Bearer hunter2-token", "Splunk hunter2"];
        for (receiver, expected) in receivers.iter().zip(expected) {
            let request = receiver.wait_requests(1).await.remove(0);
            assert_eq!(request.header("authorization"), expected);
            assert!(request.verified());
        }
        assert_eq!(receivers[2].requests()[0].header("x-tenant"), "acme");
        assert_silent(&setup, &daemon);
    });
}

/// A daemon with these subscribers, each a name, a port and what its `tls` is; with certificates
/// next to its configuration.
async fn over_tls(
    queue: &Queue,
    authority: &Authority,
    subscribers: &[(&str, u16, &str)],
) -> (Setup, Daemon) {
    let of = |(name, port, tls): &(&str, u16, &str)| {
        subscriber(name, &format!("https://127.0.0.1:{port}/hook"), tls)
    };
    let setup =
        Setup::new(queue, &(QUICK.to_owned() + &subscribers.iter().map(of).collect::<String>()));
    setup.write("ca.pem", &authority.pem);
    let client = authority.sign("client.example");
    setup.write("c.pem", &client.pem);
    setup.write("k.pem", &client.key);
    let daemon = setup.start().await;
    (setup, daemon)
}

const CA: &str = "tls = { ca_file = \"ca.pem\" }";
const MUTUAL: &str =
    "tls = { ca_file = \"ca.pem\", client_cert_file = \"c.pem\", client_key_file = \"k.pem\" }";

#[test]
fn http_2_is_spoken_where_it_is_offered_over_a_private_authority() {
    run(async {
        let (queue, authority) = (Queue::embedded(), Authority::new());
        let certificate = authority.sign("127.0.0.1");
        let two =
            TlsReceiver::start(authority.server(&certificate, false), &["h2", "http/1.1"]).await;
        let one = TlsReceiver::start(authority.server(&certificate, false), &["http/1.1"]).await;
        let none = TlsReceiver::start(authority.server(&certificate, false), &[]).await;
        let stranger = TlsReceiver::start(authority.server(&certificate, false), &["h2"]).await;
        let subscribers = [
            ("two", two.port, CA),
            ("one", one.port, CA),
            ("none", none.port, CA),
            ("stranger", stranger.port, ""),
        ];
        let (setup, daemon) = over_tls(&queue, &authority, &subscribers).await;
        queue.publish(TYPE, (0..10).map(event)).await;
        for (receiver, version) in
            [(&two, Version::HTTP_2), (&one, Version::HTTP_11), (&none, Version::HTTP_11)]
        {
            let request = receiver.wait_requests(1).await.remove(0);
            assert_eq!((request.version, request.path.as_str()), (version, "/hook"));
            assert!(request.headers.contains_key("webhook-signature"));
        }
        daemon.wait_log("subscriber=\"stranger\"").await;
        let line = daemon
            .log()
            .lines()
            .find(|l| l.contains("attempt subscriber=\"stranger\""))
            .expect("an attempt")
            .to_owned();
        assert!(line.contains("failure=\"tls\"") && line.contains("UnknownIssuer"), "{line}");
        assert_eq!(stranger.requests().len(), 0);
        assert!(setup.ok(&["check"]).contains("ca.pem"));
    });
}

#[test]
fn a_client_certificate_is_presented_and_without_it_the_receiver_refuses() {
    run(async {
        let (queue, authority) = (Queue::embedded(), Authority::new());
        let asks = TlsReceiver::start(
            authority.server(&authority.sign("127.0.0.1"), true),
            &["h2", "http/1.1"],
        )
        .await;
        let (setup, daemon) = over_tls(
            &queue,
            &authority,
            &[("with", asks.port, MUTUAL), ("without", asks.port, CA)],
        )
        .await;
        queue.publish(TYPE, [event(0)]).await;
        asks.wait_requests(1).await;
        let attempt = |name: &str| {
            daemon
                .log()
                .lines()
                .find(|l| l.contains(&format!("attempt subscriber=\"{name}\"")))
                .map(str::to_owned)
        };
        eventually("both were attempted", async || {
            attempt("with").is_some() && attempt("without").is_some()
        })
        .await;
        assert!(attempt("with").expect("seen").contains("outcome=\"delivered\""));
        let refused = attempt("without").expect("seen");
        // In TLS 1.3 the receiver says so after the handshake, when the request may already be on
        // its way.
        assert!(
            refused.contains("outcome=\"retry\"")
                && (refused.contains("CertificateRequired")
                    || refused.contains("failure=\"reset\"")),
            "{refused}"
        );
        assert_eq!(asks.requests().len(), 1);
        assert_silent(&setup, &daemon);
    });
}

/// A proxy that reports the head of each request and passes the rest on to `to`.
async fn proxy(to: u16) -> (u16, mpsc::UnboundedReceiver<String>) {
    let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = socket.local_addr().expect("an address").port();
    let (send, reported) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((stream, _)) = socket.accept().await {
            let send = send.clone();
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    stream.read_line(&mut head).await?;
                }
                let mut target = TcpStream::connect(("127.0.0.1", to)).await?;
                if head.starts_with("CONNECT ") {
                    stream.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").await?;
                } else {
                    target.write_all(head.as_bytes()).await?;
                }
                send.send(head).ok();
                copy_bidirectional(&mut stream, &mut target).await
            });
        }
    });
    (port, reported)
}

#[test]
fn a_proxy_is_used_with_its_password_and_decides_about_names_but_not_about_literal_addresses() {
    run(async {
        let (queue, authority) = (Queue::embedded(), Authority::new());
        let plain = Receiver::accepting().await;
        let secure = TlsReceiver::start(
            authority.server(&authority.sign("inside.example"), false),
            &["http/1.1"],
        )
        .await;
        let plain_port = plain
            .url
            .split(':')
            .nth(2)
            .and_then(|rest| rest.split('/').next())
            .expect("a port")
            .parse()
            .expect("a number");
        let (first, mut for_plain) = proxy(plain_port).await;
        let (second, mut for_secure) = proxy(secure.port).await;
        // The proxy stands at an address that is not public, and the names are known to no resolver
        // else.
        let through = |port: u16| {
            format!(
                "http = {{ allow_private_addresses = false, proxy = \"http://jane:hunter2@127.0.0.1:{port}\" }}"
            )
        };
        let text = QUICK.to_owned()
            + &subscriber("plain", "http://outside.invalid/hook", &through(first))
            + &subscriber("secure", "https://inside.example/hook", &(through(second) + "\n" + CA));
        let setup = Setup::new(&queue, &text);
        setup.write("ca.pem", &authority.pem);
        let daemon = setup.start().await;
        queue.publish(TYPE, [event(0)]).await;
        plain.wait_all(1).await;
        assert_eq!(secure.wait_requests(1).await[0].path, "/hook");
        for (reported, line) in [
            (&mut for_plain, "POST http://outside.invalid/hook HTTP/1.1\r\n"),
            (&mut for_secure, "CONNECT inside.example:443 HTTP/1.1\r\n"),
        ] {
            let head = reported.recv().await.expect("a request").to_lowercase();
            assert!(
                head.starts_with(&line.to_lowercase())
                    && head.contains("proxy-authorization: basic amfuztpodw50zxiy"),
                "{head}"
            );
        }
        assert_silent(&setup, &daemon);

        let literal = Setup::new(
            &queue,
            &(QUICK.to_owned() + &subscriber("a", "http://10.0.0.1/", &through(first))),
        );
        let refused = literal.run(&["check"]);
        assert_eq!(refused.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&refused.stderr).contains("not a public one (private)"));
    });
}

#[test]
fn a_proxy_that_opens_no_tunnel_is_named_with_what_to_check_and_its_text_is_not_logged() {
    run(async {
        for (answer, parts) in [
            (&b"HTTP/1.1 407 secret-text\r\nproxy-authenticate: Basic\r\ncontent-length: 0\r\n\r\n"[..], &["407", "http.proxy"][..]),
            (b"HTTP/1.1 503 secret-text\r\ncontent-length: 0\r\n\r\n", &["the proxy refused the tunnel", "CONNECT"]),
            (b"", &["the proxy closed the connection"]),
        ] {
            let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let port = socket.local_addr().expect("an address").port();
            tokio::spawn(async move {
                while let Ok((stream, _)) = socket.accept().await {
                    let mut stream = BufReader::new(stream);
                    let mut head = String::new();
                    while !head.ends_with("\r\n\r\n") && stream.read_line(&mut head).await.is_ok_and(|n| n > 0) {}
                    stream.write_all(answer).await.ok();
                    stream.shutdown().await.ok();
                }
            });
            let queue = Queue::embedded();
            let own = format!("http = {{ proxy = \"http://jane:hunter2@127.0.0.1:{port}\" }}");
            let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("a", "https://inside.example/hook", &own)));
            let daemon = setup.start().await;
            queue.publish(TYPE, [event(0)]).await;
            daemon.wait_log("failure=\"connect\"").await;
            let log = daemon.log();
            assert!(parts.iter().all(|part| log.contains(part)), "{parts:?}: {log}");
            assert!(!log.contains("secret-text"), "{log}");
            assert_silent(&setup, &daemon);
        }
    });
}
