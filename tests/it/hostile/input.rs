//! Whatever producers, other programs or a slip of the hand put into the queues.

use std::io::Write as _;

use lapin::{
    BasicProperties, Confirmation,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};

use crate::{
    delivery::intake::gzip,
    support::{
        broker::{Broker, headers, text},
        daemon::{QUICK, Setup, subscriber},
        eventually,
        queue::{Queue, on_both_queues},
        receiver::{Receiver, event},
        run, tests_that_need,
    },
};

on_both_queues!(
    what_is_not_an_event_is_a_dead_letter_with_its_reason_and_the_rest_of_its_batch_arrives_byte_for_byte,
    json_lines_get_each_event_on_one_line_with_the_same_values,
);

tests_that_need!(
    broker:
    a_compressed_message_is_inflated_and_one_that_cannot_be_is_a_dead_letter_as_it_came_with_its_encoding,
    a_message_in_the_retry_queue_that_is_not_an_envelope_is_a_dead_letter_and_the_lane_goes_on,
    an_orphan_that_its_queue_does_not_take_keeps_no_other_from_coming_back,
    an_envelope_whose_subscriber_is_gone_is_kept_and_delivered_when_it_is_there_again,
);

fn nested(depth: usize) -> Vec<u8> {
    format!(r#"{{"event":"deep","n":0,"x":{}{}}}"#, "[".repeat(depth - 1), "]".repeat(depth - 1))
        .into_bytes()
}

fn padded(bytes: usize) -> Vec<u8> {
    format!(r#"{{"event":"large","pad":"{}"}}"#, "x".repeat(bytes)).into_bytes()
}

/// Bodies that are no event, each with its reason and a part of the error.
fn bad() -> Vec<(Vec<u8>, &'static str, &'static str)> {
    vec![
        (b"not json".to_vec(), "invalid_event", "is not JSON"),
        (b"[1,2]".to_vec(), "invalid_event", "not an object"),
        (b"{\"description\":\"x\"}".to_vec(), "invalid_event", "the event has no field `event`"),
        (b"{\"event\":7}".to_vec(), "invalid_event", "not a string"),
        (b"{\"event\":\"a\",\"event\":null}".to_vec(), "invalid_event", "not a string"),
        (b"{\"event\":\"\xff\xfe\"}".to_vec(), "invalid_event", "not UTF-8"),
        (b"\xef\xbb\xbf{\"event\":\"a\"}".to_vec(), "invalid_event", "byte-order mark"),
        (b"{\"event\":\"a\",\"x\":NaN}".to_vec(), "invalid_event", "is not JSON"),
        (b"{\"event\":\"a\"}{\"event\":\"b\"}".to_vec(), "invalid_event", "is not JSON"),
        (br#"{"event":"a type must be text \ud800"}"#.to_vec(), "invalid_event", "is not JSON"),
        (Vec::new(), "invalid_event", "the event is empty"),
        (nested(129), "invalid_event", "deeper than 128"),
        (nested(100_000), "invalid_event", "deeper than 128"),
        (padded(10 << 20), "too_large", "batch.max_bytes"),
        (padded(1 << 20), "too_large", "batch.max_bytes"),
    ]
}

/// Odd, but events.
fn odd() -> Vec<Vec<u8>> {
    vec![
        br#"{"event":1,"event":"the last one counts"}"#.to_vec(),
        br#"{"n":18446744073709551615,"m":1e400,"event":"big","k":-0.0,"j":1.0}"#.to_vec(),
        b" {\r\n\t\"z\" : \"\\u0041\\/\",\n\"event\" : \"line breaks\\n\"\n}\n".to_vec(),
        nested(128),
        br#"{"event":"odd","s":"a lone surrogate \ud800"}"#.to_vec(),
        br#"{"event":""}"#.to_vec(),
        padded((1 << 20) - 100),
    ]
}

async fn what_is_not_an_event_is_a_dead_letter_with_its_reason_and_the_rest_of_its_batch_arrives_byte_for_byte(
    queue: Queue,
) {
    let json = Receiver::accepting().await;
    let setup = Setup::new(&queue, &(QUICK.to_owned() + &subscriber("json", &json.url, "")));
    let daemon = setup.start().await;
    let (bad, odd) = (bad(), odd());
    // Good, odd and bad ones in turns, so that they share batches.
    let mut all: Vec<Vec<u8>> = Vec::new();
    let mut good: Vec<Vec<u8>> = Vec::new();
    for (n, (body, ..)) in bad.iter().enumerate() {
        let plain = event(n as u64).into_bytes();
        all.extend([plain.clone(), body.clone()]);
        good.push(plain);
        all.extend(odd.get(n).cloned());
        good.extend(odd.get(n).cloned());
    }
    queue.publish("x.y", &all).await;
    let bodies = || -> Vec<Vec<u8>> { json.requests().iter().map(|r| r.body.to_vec()).collect() };
    let expected: usize = good.iter().map(Vec::len).sum();
    let frames = |bodies: &[Vec<u8>]| {
        bodies.iter().map(|b| b.len() - br#"{"events":[]}"#.len()).sum::<usize>()
    };
    // Commas aside, every byte of the good ones arrives, in order.
    eventually("the good ones arrive", async || {
        frames(&bodies()) + bodies().len() == expected + good.len()
    })
    .await;
    let arrived: Vec<Vec<u8>> =
        bodies().iter().map(|b| b[br#"{"events":["#.len()..b.len() - 2].to_vec()).collect();
    assert!(
        arrived.join(&b','.to_owned()) == good.join(&b','.to_owned()),
        "not the bytes that were published"
    );
    assert!(json.requests().iter().all(|r| r.verified()));

    queue.wait_dead("json", u32::try_from(bad.len()).expect("few")).await;
    // Groups of dead letters are stored side by side, so only the letters are fixed, not their
    // order.
    let letters = setup.dead("json");
    let reported = |l: &serde_json::Value| l["error"].as_str().expect("text").to_owned();
    for (body, reason, error) in &bad {
        let fits = |l: &serde_json::Value| {
            l["bytes"] == body.len() && l["reason"] == *reason && reported(l).contains(error)
        };
        assert!(
            letters.iter().any(fits),
            "no letter with {} bytes, {reason}, {error}: {letters:?}",
            body.len()
        );
    }
    assert!(letters.iter().all(|l| l["kind"] == "event"));
    let number = format!(
        "@{}",
        letters.iter().find(|l| l["bytes"] == b"not json".len()).expect("just found")["number"]
    );
    assert!(setup.ok(&["dead", "show", "json", &number]).contains("not json"));
    let mut found = queue.take_dead("json").await;
    let mut expected: Vec<Vec<u8>> = bad.into_iter().map(|(body, ..)| body).collect();
    found.sort_unstable();
    expected.sort_unstable();
    assert!(
        found == expected,
        "the dead letters are not the exact bytes that were published, each once"
    );
    queue.wait_backlog("json", 0).await;
    assert!(daemon.stop().await.success());
}

async fn json_lines_get_each_event_on_one_line_with_the_same_values(queue: Queue) {
    let lines = Receiver::accepting().await;
    let setup = Setup::new(
        &queue,
        &(QUICK.to_owned() + &subscriber("lines", &lines.url, "format = \"jsonl\"")),
    );
    let _daemon = setup.start().await;
    queue.publish("x.y", &odd()).await;
    let body = || -> Vec<u8> { lines.requests().iter().flat_map(|r| r.body.to_vec()).collect() };
    let count = |b: &[u8]| b.iter().filter(|c| **c == b'\n').count();
    eventually("all lines", async || count(&body()) == odd().len()).await;
    let text = String::from_utf8(body()).expect("UTF-8");
    for (line, event) in text.lines().zip(odd()) {
        let stripped: Vec<u8> = event.into_iter().filter(|b| !matches!(b, b'\n' | b'\r')).collect();
        assert!(line.as_bytes() == stripped, "{line}");
    }
}

fn of_type(content_type: &str, table: FieldTable) -> BasicProperties {
    BasicProperties::default().with_content_type(content_type.into()).with_headers(table)
}

/// A compressed message, and what becomes of it.
struct Encoded {
    body: Vec<u8>,
    properties: BasicProperties,
    becomes: Becomes,
}

enum Becomes {
    Event(String),
    /// A dead letter with this body, encoding and reason, and a part of its error.
    Dead(Vec<u8>, Option<&'static str>, &'static str, &'static str),
}

/// Compressed bodies as clients such as Spring and kombu send them. A relay inflates for all
/// subscribers; whether a body is too large for one of them is known only when it is plain.
fn encoded(relayed: bool) -> Vec<Encoded> {
    let deflate = |bytes: &[u8]| {
        let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(bytes).expect("writes");
        encoder.finish().expect("ends")
    };
    let is = |encoding: &str| {
        BasicProperties::default()
            .with_content_type("application/json".into())
            .with_content_encoding(encoding.into())
    };
    let kombu = |compression: &str| {
        let mut table = FieldTable::default();
        table.insert("compression".into(), text(compression));
        is("utf-8").with_headers(table)
    };
    let good = |n: u64, body: Vec<u8>, properties| Encoded {
        body,
        properties,
        becomes: Becomes::Event(event(n)),
    };
    let bad = |body: &[u8], properties, encoding, error| {
        let becomes = Becomes::Dead(body.to_vec(), Some(encoding), "invalid_event", error);
        Encoded { body: body.to_vec(), properties, becomes }
    };
    let large = padded(2 << 20);
    let too_large = if relayed {
        Becomes::Dead(large.clone(), None, "too_large", "batch.max_bytes")
    } else {
        Becomes::Dead(gzip(&large), Some("gzip"), "too_large", "inflated, it has more than")
    };
    let no_json = Becomes::Dead(b"not json".to_vec(), None, "invalid_event", "is not JSON");
    vec![
        good(0, gzip(event(0).as_bytes()), is("gzip")),
        good(1, deflate(event(1).as_bytes()), is("deflate")),
        good(2, gzip(event(2).as_bytes()), kombu("application/x-gzip")),
        good(3, deflate(event(3).as_bytes()), is("gzip:UTF-8")), // the bytes show which it is
        good(4, event(4).into_bytes(), is("utf-8")),
        good(5, event(5).into_bytes(), is("gzip")), // a client that only says so
        bad(b"\x0b\x02\x80{}\x03", is("br"), "br", "`br` is not one that can be undone"),
        bad(
            b"\x28\xb5\x2f\xfd",
            kombu("application/zstd"),
            "application/zstd",
            "`application/zstd` is not one",
        ),
        bad(b"no gzip", is("gzip"), "gzip", "not encoded as its content_encoding `gzip` says"),
        bad(
            &gzip(event(6).as_bytes())[..30],
            is("gzip"),
            "gzip",
            "not encoded as its content_encoding `gzip` says",
        ),
        Encoded { body: gzip(b"not json"), properties: is("gzip"), becomes: no_json },
        Encoded { body: gzip(&large), properties: is("gzip"), becomes: too_large },
    ]
}

/// The limit of a dead letter's header.
fn header(letter: &lapin::message::Delivery, name: &str) -> Option<String> {
    let headers = letter.properties.headers().as_ref()?;
    let found =
        headers.inner().iter().find(|(n, _)| n.as_str() == format!("x-hooktrail-{name}"))?;
    found.1.as_long_string().map(ToString::to_string)
}

fn a_compressed_message_is_inflated_and_one_that_cannot_be_is_a_dead_letter_as_it_came_with_its_encoding()
 {
    run(async {
        for relayed in [false, true] {
            let broker = Broker::shared();
            let receiver = Receiver::accepting().await;
            let settings =
                QUICK.to_owned() + &subscriber("a", &receiver.url, "batch.max_bytes = \"1MiB\"");
            broker.knows("a");
            let (connection, channel) = broker.channel().await;
            let source = format!("{}.source", broker.prefix);
            let (setup, exchange, key) = if relayed {
                let durable =
                    QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
                channel
                    .queue_declare(source.as_str().into(), durable, FieldTable::default())
                    .await
                    .expect("declares");
                let queue = format!(
                    "[queue]\nurl = \"{}\"\nsource_queue = \"{source}\"\nprefix = \"{}\"\n",
                    broker.url, broker.prefix
                );
                (Setup::with_text(&(queue + &settings)), "", source.as_str())
            } else {
                (Setup::new(&broker, &settings), broker.exchange.as_str(), "a.b")
            };
            let daemon = setup.start().await;
            for Encoded { body, properties, becomes } in encoded(relayed) {
                let before = receiver.count();
                broker.put(exchange, key, &body, properties.clone()).await;
                match becomes {
                    Becomes::Event(event) => {
                        eventually(&format!("{event} arrives"), async || receiver.count() > before)
                            .await;
                        let arrived = receiver.requests().pop().expect("just seen");
                        assert_eq!(
                            arrived.body,
                            format!("{{\"events\":[{event}]}}"),
                            "{properties:?}"
                        );
                    }
                    Becomes::Dead(body, encoding, reason, error) => {
                        // Messages that the relay cannot read belong to no subscriber.
                        let at = if relayed && reason == "invalid_event" {
                            "orphans"
                        } else {
                            "sub.a.dead"
                        };
                        broker.wait_depth(at, 1).await;
                        let letter = broker.take(at).await.expect("just seen");
                        let header = |name: &str| header(&letter, name);
                        assert_eq!(
                            (header("reason").as_deref(), header("content-encoding").as_deref()),
                            (Some(reason), encoding),
                            "{error}"
                        );
                        assert!(
                            header("error").is_some_and(|e| e.contains(error)),
                            "{error}: {:?}",
                            header("error")
                        );
                        assert!(letter.data == body, "{error}: not as it came");
                    }
                }
            }
            assert!(daemon.stop().await.success());
            channel
                .queue_delete(source.as_str().into(), QueueDeleteOptions::default())
                .await
                .expect("deletes");
            connection.close(200, "done".into()).await.expect("closes");
        }
    });
}

fn a_message_in_the_retry_queue_that_is_not_an_envelope_is_a_dead_letter_and_the_lane_goes_on() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let setup = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
        let _daemon = setup.start().await;
        let retry = format!("{}.sub.a.retry", broker.prefix);
        let number = |n: i64| AMQPValue::LongLongInt(n);
        let cases = [
            (&b"body"[..], "application/json", headers(&[]), "no header `x-hooktrail-batch-id`"),
            (
                b"body",
                "application/json",
                headers(&[("batch-id", number(7)), ("attempts", number(1))]),
                "`x-hooktrail-batch-id` is LongLongInt",
            ),
            (
                b"body",
                "application/json",
                headers(&[("batch-id", text("msg_1")), ("attempts", text("one"))]),
                "`x-hooktrail-attempts` is LongString",
            ),
            (
                b"body",
                "application/json",
                headers(&[("batch-id", text("msg_1")), ("attempts", number(-5))]),
                "out of range",
            ),
            (
                b"body",
                "text/html",
                headers(&[("batch-id", text("msg_1")), ("attempts", number(1))]),
                "content type `text/html`",
            ),
            (
                b"",
                "application/json",
                headers(&[("batch-id", text("msg_1")), ("attempts", number(1))]),
                "it is empty",
            ),
        ];
        for (body, content_type, table, _) in &cases {
            broker.put("", &retry, body, of_type(content_type, table.clone())).await;
        }
        broker.wait_depth("sub.a.dead", 6).await;
        let letters = setup.dead("a");
        for letter in &letters {
            assert_eq!(
                (&letter["kind"], &letter["reason"]),
                (&"batch".into(), &"invalid_event".into()),
                "{letter}"
            );
        }
        for (.., error) in &cases {
            let named = letters
                .iter()
                .filter(|l| l["error"].as_str().expect("text").contains(error))
                .count();
            assert_eq!(named, 1, "{error} in {letters:?}");
        }
        // A sound one of another client, with a smaller integer type, after them.
        let sound =
            headers(&[("batch-id", text("msg_sound")), ("attempts", AMQPValue::ShortInt(4))]);
        broker.put("", &retry, b"{\"events\":[]}", of_type("application/json", sound)).await;
        let request = receiver.wait_requests(1).await.remove(0);
        assert_eq!(
            (request.id(), request.attempt(), &request.body[..]),
            ("msg_sound", 5, &b"{\"events\":[]}"[..])
        );
        assert_eq!(receiver.count(), 1);
    });
}

fn an_orphan_that_its_queue_does_not_take_keeps_no_other_from_coming_back() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let one = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("one", &receiver.url, "")));
        let daemon = one.start().await;
        for (n, name) in [(1, "full"), (2, "well")] {
            let id = format!("msg_{name}");
            let table = headers(&[
                ("batch-id", text(&id)),
                ("attempts", AMQPValue::LongLongInt(3)),
                ("events", AMQPValue::LongLongInt(1)),
            ]);
            let (level, key) =
                (format!("{}.delay.00", broker.prefix), format!("{}1.{name}", "0.".repeat(18)));
            broker
                .put(
                    &level,
                    &key,
                    b"{\"events\":[{\"event\":\"x\"}]}",
                    of_type("application/json", table),
                )
                .await;
            broker.wait_depth("orphans", n).await;
        }
        assert!(daemon.stop().await.success());
        // A queue that takes no more.
        let (_connection, channel) = broker.channel().await;
        let retry = format!("{}.sub.full.retry", broker.prefix);
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), text("quorum"));
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
        arguments.insert("x-overflow".into(), text("reject-publish"));
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(retry.as_str().into(), durable, arguments).await.expect("declares");
        channel.confirm_select(ConfirmSelectOptions::default()).await.expect("confirms");
        eventually("the queue is full", async || {
            let options = BasicPublishOptions::default();
            let published = channel.basic_publish(
                "".into(),
                retry.as_str().into(),
                options,
                b"x",
                BasicProperties::default(),
            );
            matches!(
                published.await.expect("publishes").await.expect("answers"),
                Confirmation::Nack(_)
            )
        })
        .await;
        let all = ["one", "full", "well"].map(|name| subscriber(name, &receiver.url, "")).concat();
        let setup = Setup::new(&broker, &(QUICK.to_owned() + &all));
        let daemon = setup.start().await;
        let request = receiver.wait_requests(1).await.remove(0);
        assert_eq!((request.id(), request.attempt()), ("msg_well", 4));
        daemon.wait_log(&format!("queue `{retry}` did not take an orphan")).await;
        broker.wait_depth("orphans", 1).await;
    });
}

fn an_envelope_whose_subscriber_is_gone_is_kept_and_delivered_when_it_is_there_again() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::accepting().await;
        let one = Setup::new(&broker, &(QUICK.to_owned() + &subscriber("one", &receiver.url, "")));
        let daemon = one.start().await;
        let key = format!("{}1.gone", "0.".repeat(18));
        let table = headers(&[
            ("batch-id", text("msg_orphan")),
            ("attempts", AMQPValue::LongLongInt(3)),
            ("events", AMQPValue::LongLongInt(1)),
        ]);
        let level = format!("{}.delay.00", broker.prefix);
        broker
            .put(
                &level,
                &key,
                b"{\"events\":[{\"event\":\"x\"}]}",
                of_type("application/json", table),
            )
            .await;
        broker.wait_depth("orphans", 1).await;
        assert!(one.ok(&["check", "--connect"]).contains("orphans: 1 message"));
        assert!(daemon.stop().await.success());
        let both = Setup::new(
            &broker,
            &(QUICK.to_owned()
                + &subscriber("one", &receiver.url, "")
                + &subscriber("gone", &receiver.url, "")),
        );
        let daemon = both.start().await;
        let request = receiver.wait_requests(1).await.remove(0);
        assert_eq!(
            (request.id(), request.attempt(), &request.body[..]),
            ("msg_orphan", 4, &b"{\"events\":[{\"event\":\"x\"}]}"[..])
        );
        broker.wait_depth("orphans", 0).await;
        daemon.wait_log("moved orphans back").await;
    });
}
