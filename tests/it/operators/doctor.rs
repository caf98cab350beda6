//! `check --connect`: its findings, their risks, and the commands that fix them.

use std::process::Command;

use lapin::{
    BasicProperties,
    options::{QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable, ShortString},
};
use serde_json::Value;

use crate::support::{
    broker::{Broker, Node},
    daemon::{QUICK, SECRET, Setup, subscriber},
    eventually, free_port,
    queue::{Embedded, Section},
    receiver::{Receiver, event, status},
    run, tests_that_need,
    tls::{Authority, TlsReceiver},
};

tests_that_need!(
    broker:
    nothing_harmful_is_found_in_a_sound_topology_and_what_was_not_seen_is_said,
    policies_that_lose_events_are_named_with_the_command_that_takes_them_away_and_reported_by_the_daemon,
    a_queue_that_was_declared_by_hand_is_named_with_both_values,
    missing_queues_and_bindings_are_found_and_repair_fixes_them_and_surplus_bindings_are_reported,
    a_user_without_permissions_learns_which_are_missing_and_the_command_that_grants_them,
    a_node_that_is_lost_is_reported_and_what_the_broker_cannot_hand_over_meanwhile,
    an_alarm_that_blocks_publishing_is_harmful_until_it_ends,
    queues_of_subscribers_that_are_not_configured_any_more_are_reported_with_what_they_hold,
    an_api_that_does_not_answer_is_reported_and_what_amqp_shows_is_shown,
    each_reason_why_there_is_no_connection_is_reported_with_its_own_remedy,
    limits_that_keep_a_daemon_from_starting_are_reported_before_it_is_started,
    a_look_for_one_subscriber_judges_what_all_share_by_all_of_them,
    all_shared_queues_gone_is_harmful_although_none_of_them_is_there,
);

/// The result of an inspection.
struct Inspection {
    code: Option<i32>,
    findings: Vec<Value>,
}

impl Inspection {
    fn at(setup: &Setup) -> Self {
        Self::of(setup, &[])
    }

    /// Inspects for these subscribers, or for all.
    fn of(setup: &Setup, subscribers: &[&str]) -> Self {
        let output = setup.run(&[&["check", "--connect", "--json"], subscribers].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!text.contains(SECRET) && !text.contains("guest:"), "{text}");
        let findings = text
            .lines()
            .map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{l}: {e}")))
            .collect();
        Self { code: output.status.code(), findings }
    }

    /// The finding of this severity that says this of that, `""` being anything.
    fn find(&self, severity: &str, about: &str, found: &str) -> Option<&Value> {
        let names = |f: &Value| {
            f["about"].as_array().is_some_and(|all| {
                all.iter().any(|a| a.as_str().is_some_and(|a| a.contains(about)))
            })
        };
        self.findings.iter().find(|f| {
            f["severity"] == severity
                && names(f)
                && f["found"].as_str().is_some_and(|f| f.contains(found))
        })
    }

    fn expect(&self, severity: &str, about: &str, found: &str) -> &Value {
        self.find(severity, about, found).unwrap_or_else(|| {
            panic!("no {severity} of `{about}`: `{found}`, but {:#?}", self.findings)
        })
    }

    /// The finding about streams. From RabbitMQ 3.12 on every broker has them, and there is none.
    fn expect_of_streams(&self, severity: &str, found: &str) {
        const ABOUT: &str = "at-least-once dead-lettering";
        if ["3.10.", "3.11."]
            .iter()
            .any(|v| self.find("ok", "broker", &format!("RabbitMQ {v}")).is_some())
        {
            self.expect(severity, ABOUT, found);
        } else {
            let said = self.findings.iter().filter(|f| f["about"].to_string().contains(ABOUT));
            assert_eq!(said.collect::<Vec<_>>(), Vec::<&Value>::new());
        }
    }

    fn none(&self, severity: &str) {
        assert!(self.find(severity, "", "").is_none(), "{:#?}", self.findings);
    }
}

fn text(finding: &Value, key: &str) -> String {
    finding[key].as_str().unwrap_or_else(|| panic!("no {key}: {finding}")).to_owned()
}

/// With the management API of the test's node.
fn managed(broker: &Broker, rest: &str) -> Setup {
    Setup::new(broker, &format!("management_url = \"{}\"\n{rest}", broker.node().management_url()))
}

/// Runs a remedy's first command on the test's node, split into words as a shell does.
fn obey(broker: &Broker, remedy: &str) {
    let command = remedy
        .split(';')
        .next()
        .expect("a command")
        .strip_prefix("rabbitmqctl ")
        .expect("one of rabbitmqctl");
    let split = Command::new("sh")
        .args(["-c", &format!("printf '%s\\n' {command}")])
        .output()
        .expect("a shell");
    let words = String::from_utf8(split.stdout).expect("text");
    broker.node().ctl(&words.lines().collect::<Vec<_>>());
}

fn queue(broker: &Broker, rest: &str) -> ShortString {
    format!("{}.{rest}", broker.prefix).as_str().into()
}

fn nothing_harmful_is_found_in_a_sound_topology_and_what_was_not_seen_is_said() {
    run(async {
        let broker = Broker::managed().await;
        let receiver = Receiver::accepting().await;
        let setup = managed(
            &broker,
            &(QUICK.to_owned() + &subscriber("a", &receiver.url, "events = [\"a.*\", \"b.#\"]")),
        );
        let before = Inspection::at(&setup);
        assert_eq!(before.code, Some(0));
        before.expect("note", "sub.a.retry", "not there yet; `run` declares it");
        assert_eq!(broker.depth("sub.a").await, None, "an inspection declares nothing");

        let daemon = setup.start().await;
        broker.publish("a.b", [event(0)]).await;
        receiver.wait_all(1).await;
        eventually("the record is there", async || broker.depth("state").await.is_some()).await;
        eventually("history is there", async || broker.depth("history").await.is_some()).await;
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(0), "{:#?}", inspection.findings);
        inspection.none("harmful");
        inspection.none("warning");
        for (about, found) in [
            ("broker", "RabbitMQ "),
            ("broker", "takes messages"),
            ("user `guest`", "may do what hooktrail does"),
            ("sub.a", "0 messages, 1 consumer"),
            ("queues", "24 have the arguments"),
            ("policies", "checked on 25 queues"),
            ("bindings", "those of 1 subscriber are as configured"),
            ("endpoint of `a`", "takes connections, without TLS"),
        ] {
            inspection.expect("ok", about, found);
        }
        inspection.expect_of_streams("ok", "its feature flag is on");
        let timeout = inspection.expect(
            "note",
            "consumer_timeout",
            "hooktrail has a message unacked for at most 2m 28s 100ms with full batches",
        );
        assert_eq!(timeout["about"][1], "subscriber `a`");
        assert!(text(timeout, "remedy").contains("rabbitmqctl eval"));
        let reported = setup.ok(&["check", "--connect"]);
        assert!(
            reported.contains("# ok: broker: RabbitMQ ")
                && reported.contains("# Nothing harmful was found."),
            "{reported}"
        );
        assert_eq!(receiver.requests().len(), 1, "an inspection sends no request");
        assert!(!daemon.log().contains("an inspection of the queue found"), "{}", daemon.log());
        assert!(daemon.stop().await.success());
    });
}

fn policies_that_lose_events_are_named_with_the_command_that_takes_them_away_and_reported_by_the_daemon()
 {
    run(async {
        let broker = Broker::managed().await;
        let setup =
            managed(&broker, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
        let node = broker.node();
        let (limits, ttl) =
            (format!("limits of {}", broker.prefix), format!("ttl-{}", broker.prefix));
        let pattern = format!("^{}\\.sub\\.", broker.prefix);
        let policy = r#"{"max-length":10,"overflow":"drop-head","delivery-limit":5}"#;
        node.ctl(&["set_policy", "--apply-to", "queues", &limits, &pattern, policy]);
        node.ctl(&[
            "set_operator_policy",
            "--apply-to",
            "queues",
            &ttl,
            &format!("{pattern}a.dead$"),
            r#"{"expires":86400000}"#,
        ]);
        let daemon = setup.start().await;
        daemon.wait_log("sets max-length = 10").await;
        let log = daemon.log();
        let line = log.lines().find(|l| l.contains("sets max-length = 10")).expect("just seen");
        assert!(
            line.contains("WARN")
                && line.contains("clear_policy")
                && line.contains("severity=\"harmful\""),
            "{line}"
        );

        let mut inspection = Inspection::at(&setup);
        eventually("the broker's statistics are there", async || {
            inspection = Inspection::at(&setup);
            inspection.find("harmful", "sub.a.dead", "sets expires").is_some()
                && inspection.find("harmful", "sub.a", "sets max-length").is_some()
        })
        .await;
        assert_eq!(inspection.code, Some(1));
        let full = inspection.expect("harmful", "sub.a`", "sets max-length = 10");
        assert!(
            text(full, "found").contains(&limits) && text(full, "risk").contains("refuses events"),
            "{full}"
        );
        inspection.expect("harmful", "sub.a.retry`", "sets max-length = 10");
        inspection.expect("harmful", "sub.a`", "sets delivery-limit = 5");
        let dead = inspection.expect("harmful", "sub.a.dead`", "sets delivery-limit = 5");
        assert!(
            text(dead, "risk").contains("a dead letter that was read more often is dropped"),
            "{dead}"
        );
        let both = text(inspection.expect("harmful", "sub.a.dead`", "sets expires"), "remedy");
        assert!(both.contains("clear_operator_policy"), "{both}");

        let alone = setup.run(&["check", "--connect"]);
        let reported = String::from_utf8_lossy(&alone.stderr).into_owned();
        assert!(
            reported.contains("sets max-length = 10\n  risk: ")
                && reported.contains("\n  remedy: rabbitmqctl clear_policy"),
            "{reported}"
        );
        obey(&broker, &text(full, "remedy"));
        node.ctl(&["clear_operator_policy", &ttl]);
        eventually("they are gone", async || Inspection::at(&setup).code == Some(0)).await;
        drop(daemon);
    });
}

fn a_queue_that_was_declared_by_hand_is_named_with_both_values() {
    run(async {
        let broker = Broker::shared();
        let setup =
            Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
        let (connection, channel) = broker.channel().await;
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel
            .queue_declare(queue(&broker, "sub.a"), durable, FieldTable::default())
            .await
            .expect("declares");
        // Declared correctly, but for its dead-lettering.
        let mut quorum = FieldTable::default();
        quorum.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        quorum.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(1_000_000_000));
        channel
            .queue_declare(queue(&broker, "sub.a.retry"), durable, quorum)
            .await
            .expect("declares");
        connection.close(200, "done".into()).await.expect("closes");
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(1));
        let classic = inspection.expect("harmful", "sub.a`", "where hooktrail needs");
        assert!(
            text(classic, "risk").contains("lose events")
                && text(classic, "remedy").contains("delete_queue"),
            "{classic}"
        );
        inspection.expect("harmful", "sub.a.retry`", "where hooktrail needs");
    });
}

fn missing_queues_and_bindings_are_found_and_repair_fixes_them_and_surplus_bindings_are_reported() {
    run(async {
        let broker = Broker::managed().await;
        let setup = managed(
            &broker,
            &(QUICK.to_owned()
                + &subscriber("a", "http://127.0.0.1:9/", "events = [\"a.*\", \"b.#\"]")),
        );
        let daemon = setup.start().await;
        eventually("the record is there", async || broker.depth("state").await.is_some()).await;
        assert!(daemon.stop().await.success());
        let (connection, channel) = broker.channel().await;
        let exchange: ShortString = broker.exchange.as_str().into();
        channel
            .queue_unbind(
                queue(&broker, "sub.a"),
                exchange.clone(),
                "b.#".into(),
                FieldTable::default(),
            )
            .await
            .expect("unbinds");
        channel
            .queue_bind(
                queue(&broker, "sub.a"),
                exchange,
                "surplus.*".into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
            .expect("binds");
        channel
            .queue_delete(queue(&broker, "sub.a.dead"), QueueDeleteOptions::default())
            .await
            .expect("deletes");
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(1));
        let unbound = inspection.expect("harmful", "sub.a`", "is not bound to exchange");
        assert!(
            text(unbound, "found").contains("`b.#`")
                && text(unbound, "remedy") == "hooktrail repair a",
            "{unbound}"
        );
        inspection.expect("warning", "sub.a`", "with `surplus.*` too, which is not configured");
        inspection.expect("harmful", "sub.a.dead`", "is missing");
        setup.ok(&["repair", "a"]);
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(0), "{:#?}", inspection.findings);

        // Without the queue itself all that is published passes the subscriber by.
        channel
            .queue_delete(queue(&broker, "sub.a"), QueueDeleteOptions::default())
            .await
            .expect("deletes");
        connection.close(200, "done".into()).await.expect("closes");
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(1));
        assert!(
            text(inspection.expect("harmful", "sub.a`", "is missing"), "risk").contains("miss `a`")
        );
    });
}

fn a_user_without_permissions_learns_which_are_missing_and_the_command_that_grants_them() {
    run(async {
        let broker = Broker::managed().await;
        let (node, user) = (broker.node(), format!("u-{}", broker.prefix));
        node.ctl(&["add_user", &user, "hunter2"]);
        node.ctl(&["set_permissions", &user, "^$", "^$", "^$"]);
        let url = broker.url.replace("guest:guest", &format!("{user}:hunter2"));
        let section = broker.section(&["a"]).replace(&broker.url, &url);
        let management = format!("management_url = \"{}\"\n", node.management_url());
        let setup = Setup::with_text(
            &(section + &management + QUICK + &subscriber("a", "http://127.0.0.1:9/", "")),
        );
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(1));
        let forbidden = inspection.expect(
            "harmful",
            &user,
            "may not configure its queues, read its queues, write to its queues, write to exchange",
        );
        inspection.expect("harmful", &user, "write to exchange `amq.default`");
        // The API is there, but not for this user: what it would have shown is named, and AMQP's
        // part is not held up.
        inspection.expect("warning", "policies", "Not management user");
        inspection.expect("ok", "broker", "RabbitMQ ");
        obey(&broker, &text(forbidden, "remedy"));
        node.ctl(&["set_user_tags", &user, "management"]);
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(0), "{:#?}", inspection.findings);
        inspection.expect("ok", &user, "may do what hooktrail does");
        inspection.expect_of_streams("note", "not inspected");
        // These permissions suffice for the daemon.
        let daemon = setup.start().await;
        broker.wait_depth("sub.a", 0).await;
        eventually("all is there", async || {
            broker.depth("state").await.is_some() && broker.depth("delay.18").await.is_some()
        })
        .await;
        look_is_sound(&setup).await;
        assert!(daemon.stop().await.success());
    });
}

async fn look_is_sound(setup: &Setup) {
    eventually("an inspection finds nothing harmful", async || {
        Inspection::at(setup).code == Some(0)
    })
    .await;
}

fn a_node_that_is_lost_is_reported_and_what_the_broker_cannot_hand_over_meanwhile() {
    run(async {
        let mut nodes = Node::managed_cluster(3).await.into_iter();
        let broker = Broker::on(nodes.next().expect("a node"));
        let receiver = Receiver::start(|_, _| status(200)).await;
        let setup = managed(&broker, &(QUICK.to_owned() + &subscriber("a", &receiver.url, "")));
        let daemon = setup.start().await;
        daemon.kill();
        // The broker is to hand over what was delayed, and the queue that it is for refuses it.
        let full = [r"\.retry$", r#"{"max-length":0}"#, "--apply-to", "queues"];
        broker.node().ctl(&[&["set_policy", "full"], &full[..]].concat());
        let key = format!("{}1.a", "0.".repeat(18));
        for _ in 0..2 {
            broker
                .put(
                    &format!("{}.delay.00", broker.prefix),
                    &key,
                    b"{}",
                    BasicProperties::default(),
                )
                .await;
            broker.wait_depth("sub.a.retry", 1).await; // it is full with the first
        }
        let reported = async |about: &str, found: &str| {
            eventually(found, async || {
                Inspection::at(&setup).find("warning", about, found).is_some()
            })
            .await;
        };
        let other = nodes.next().expect("a node");
        other.kill().await;
        reported("sub.a`", "has 2 of 3 replicas, without").await;
        reported("delay.00`", "1 due batch").await;
        other.start().await;
        eventually("no more is said of it", async || {
            let inspection = Inspection::at(&setup);
            inspection.find("warning", "", "replicas").is_none()
                && inspection.find("warning", "", "due batch").is_none()
        })
        .await;
    });
}

fn an_alarm_that_blocks_publishing_is_harmful_until_it_ends() {
    run(async {
        let broker = Broker::private_and_managed().await;
        let setup =
            managed(&broker, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
        // Without the API it is seen all the same.
        let by_amqp =
            Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
        broker.node().ctl(&["set_vm_memory_high_watermark", "0"]);
        let mut inspection = Inspection::at(&setup);
        eventually("the alarm is raised", async || {
            inspection = Inspection::at(&setup);
            inspection.code == Some(1)
        })
        .await;
        inspection.expect("harmful", "broker", "blocks publishing");
        inspection.expect("harmful", "broker", "too little memory on node");
        let inspection = Inspection::at(&by_amqp);
        assert_eq!(inspection.code, Some(1));
        inspection.expect("harmful", "broker", "blocks publishing");
        inspection.expect("note", "policies, bindings", "[queue] management_url is not set");
        broker.node().ctl(&["set_vm_memory_high_watermark", "absolute", "2GB"]);
        look_is_sound(&setup).await;
    });
}

fn queues_of_subscribers_that_are_not_configured_any_more_are_reported_with_what_they_hold() {
    run(async {
        let broker = Broker::managed().await;
        let away = "circuit_breaker = { failures = 1, open_for = \"1h\", max_open_for = \"1h\" }";
        let both = subscriber("a", "http://127.0.0.1:9/", away)
            + &subscriber("gone", "http://127.0.0.1:9/", away);
        let before = managed(&broker, &(QUICK.to_owned() + &both));
        let daemon = before.start().await;
        broker.publish("a.b", [event(0)]).await;
        daemon.wait_log("circuit open").await;
        broker.publish("a.b", [event(1), event(2)]).await;
        broker.wait_depth("sub.gone", 2).await;
        assert!(daemon.stop().await.success());
        let fewer =
            managed(&broker, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
        let mut inspection = Inspection::at(&fewer);
        eventually("the broker has counted them", async || {
            inspection = Inspection::at(&fewer);
            inspection.find("warning", "subscriber `gone`", "hold 2 events").is_some()
        })
        .await;
        assert!(
            text(inspection.expect("warning", "subscriber `gone`", ""), "remedy")
                .contains("hooktrail prune")
        );
        assert_eq!(inspection.code, Some(0), "they are not lost: {:#?}", inspection.findings);
        // Without the API the daemons' record has them.
        let by_amqp = Inspection::at(&Setup::new(
            &broker,
            &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")),
        ));
        by_amqp.expect("warning", "subscriber `gone`", "hold 2 events");
    });
}

fn an_api_that_does_not_answer_is_reported_and_what_amqp_shows_is_shown() {
    run(async {
        let broker = Broker::shared();
        let rest = format!("{QUICK}{}", subscriber("a", "http://127.0.0.1:9/", ""));
        let at = |url: &str| Setup::new(&broker, &format!("management_url = \"{url}\"\n{rest}"));
        let refusing = format!("http://u:hunter2@127.0.0.1:{}", free_port());
        let stranger = Receiver::accepting().await;
        for url in [refusing, stranger.url.clone()] {
            let inspection = Inspection::at(&at(&url));
            let unseen = inspection.expect(
                "warning",
                "policies, bindings",
                "management_url http://127.0.0.1:",
            );
            assert!(!unseen.to_string().contains("hunter2"), "{unseen}");
            assert_eq!(inspection.code, Some(0), "{:#?}", inspection.findings);
            inspection.expect("ok", "broker", "RabbitMQ ");
            inspection.expect("note", "sub.a", "not there yet");
        }
    });
}

#[test]
fn a_broker_that_cannot_be_reached_is_harmful_and_the_endpoints_are_inspected_all_the_same() {
    run(async {
        let receiver = Receiver::accepting().await;
        let text =
            format!("[queue]\nurl = \"amqp://guest:hunter2@127.0.0.1:{}\"\n{QUICK}", free_port());
        let setup = Setup::with_text(&(text + &subscriber("a", &receiver.url, "")));
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(1));
        let away = inspection.expect("harmful", "queue", "cannot connect to the broker");
        assert!(!away.to_string().contains("hunter2"), "{away}");
        inspection.expect("ok", "endpoint of `a`", "takes connections");
    });
}

/// A receiver that presents a certificate that is good from a day on and until another.
async fn valid(authority: &Authority, from: (i32, u8, u8), until: (i32, u8, u8)) -> TlsReceiver {
    let certificate = authority.sign_with("127.0.0.1", |params| {
        params.not_before = rcgen::date_time_ymd(from.0, from.1, from.2);
        params.not_after = rcgen::date_time_ymd(until.0, until.1, until.2);
    });
    TlsReceiver::start(authority.server(&certificate, false), &["http/1.1"]).await
}

#[test]
fn what_is_wrong_with_an_endpoint_is_found_without_a_request() {
    run(async {
        let queue = Embedded::new();
        let authority = Authority::new();
        let good = valid(&authority, (2020, 1, 1), (4000, 1, 1)).await;
        let expired = valid(&authority, (2020, 1, 1), (2021, 2, 3)).await;
        let other = authority.sign("other.example");
        let other = TlsReceiver::start(authority.server(&other, false), &["http/1.1"]).await;
        let plain = Receiver::accepting().await;
        let ours = "tls = { ca_file = \"ca.pem\" }";
        let https = |port: u16| format!("https://127.0.0.1:{port}/hook");
        let refusing = free_port();
        let rest = [
            subscriber("good", &https(good.port), ours),
            subscriber("expired", &https(expired.port), ours),
            subscriber("untrusted", &https(good.port), ""),
            subscriber("other-name", &https(other.port), ours),
            subscriber("no-tls", &plain.url.replace("http://", "https://"), ours),
            subscriber(
                "blocked",
                &format!("https://localhost:{}/", good.port),
                "http = { allow_private_addresses = false }",
            ),
            subscriber("unknown", "https://nobody.invalid/hook", ""),
            subscriber("away", &https(refusing), ours),
        ];
        let setup = Setup::new(&queue, &(QUICK.to_owned() + &rest.concat()));
        setup.write("ca.pem", &authority.pem);
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(1));
        inspection.expect(
            "ok",
            "endpoint of `good`",
            "its certificate is good for more than 30 days",
        );
        inspection.expect(
            "harmful",
            "endpoint of `expired`",
            "has expired, at 2021-02-03T00:00:00Z",
        );
        let untrusted = inspection.expect("harmful", "endpoint of `untrusted`", "is not trusted");
        assert!(text(untrusted, "remedy").contains("tls.ca_file"), "{untrusted}");
        inspection.expect("harmful", "endpoint of `other-name`", "is for another name");
        inspection.expect("harmful", "endpoint of `no-tls`", "the TLS handshake failed");
        let blocked = inspection.expect(
            "harmful",
            "endpoint of `blocked`",
            "which is not a public address (loopback)",
        );
        assert!(text(blocked, "remedy").contains("http.allow_addresses"), "{blocked}");
        inspection.expect(
            "warning",
            "endpoint of `unknown`",
            "the name `nobody.invalid` is not resolved",
        );
        inspection.expect("warning", "endpoint of `away`", "takes no connection");
        assert!(good.requests().is_empty() && plain.requests().is_empty(), "no request was sent");
    });
}

#[test]
fn a_certificate_that_expires_soon_is_a_warning() {
    run(async {
        let authority = Authority::new();
        // A day that is 10 days off, whatever today is.
        let in_days = |days: u64| {
            let at =
                std::time::SystemTime::now() + std::time::Duration::from_secs(days * 24 * 3600);
            let text = hooktrail::clock::rfc3339_seconds(at);
            let part =
                |range: std::ops::Range<usize>| text[range].parse::<i32>().expect("a number");
            (
                part(0..4),
                u8::try_from(part(5..7)).expect("a month"),
                u8::try_from(part(8..10)).expect("a day"),
            )
        };
        let soon = valid(&authority, (2020, 1, 1), in_days(11)).await;
        let setup = Setup::new(
            &Embedded::new(),
            &(QUICK.to_owned()
                + &subscriber(
                    "a",
                    &format!("https://127.0.0.1:{}/", soon.port),
                    "tls = { ca_file = \"ca.pem\" }",
                )),
        );
        setup.write("ca.pem", &authority.pem);
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(0), "{:#?}", inspection.findings);
        inspection.expect("warning", "endpoint of `a`", "expires in 10 days");
    });
}

#[test]
fn the_embedded_queue_is_inspected_alongside_its_daemon_and_damage_is_harmful() {
    run(async {
        let queue = Embedded::new();
        let setup = Setup::new(
            &queue,
            &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "paused = true")),
        );
        let before = Inspection::at(&setup);
        assert_eq!(before.code, Some(0));
        before.expect("note", "data_dir", "`run` makes it");
        assert!(!queue.data_dir().exists(), "an inspection creates nothing");

        let daemon = setup.start().await;
        let large = format!(r#"{{"event":"a.b","pad":"{}"}}"#, "x".repeat(3000));
        queue.publish("a.b", None, (0..200).map(|_| large.clone().into())).await;
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(0), "{:#?}", inspection.findings);
        inspection.none("harmful");
        inspection.expect("ok", "a: events to deliver", "200");
        inspection.expect(
            "ok",
            "data_dir",
            &format!("a daemon works with it: process {}", daemon.pid()),
        );
        inspection.expect("ok", "data_dir", "others cannot read it");
        inspection.expect("ok", "database", "its pages are sound");
        assert!(daemon.stop().await.success());
        Inspection::at(&setup).expect("ok", "data_dir", "no daemon is seen");

        open_to_all(&queue);
        let inspection = Inspection::at(&setup);
        assert!(
            text(
                inspection.expect("warning", "data_dir", "everybody on this machine can read"),
                "remedy"
            )
            .starts_with("chmod 700")
        );
        // A failing disk damages the pages in the middle, once they are in the file.
        let db = rusqlite::Connection::open(queue.file()).expect("opens");
        db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).expect("writes them there");
        db.close().expect("closes");
        let mut bytes = std::fs::read(queue.file()).expect("the database");
        let middle = bytes.len() / 2;
        bytes[middle..middle + 8192].fill(0xff);
        std::fs::write(queue.file(), bytes).expect("writes");
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(1), "{:#?}", inspection.findings);
        assert!(
            text(inspection.expect("harmful", "database", "its pages are damaged"), "remedy")
                .contains("Disaster recovery")
        );
    });
}

fn open_to_all(queue: &Embedded) {
    use std::os::unix::fs::PermissionsExt as _;
    for (path, mode) in [(queue.data_dir(), 0o755), (queue.file(), 0o644)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("changes");
    }
}

fn each_reason_why_there_is_no_connection_is_reported_with_its_own_remedy() {
    run(async {
        let broker = Broker::private().await;
        let http = Receiver::accepting().await;
        broker.node().ctl(&["add_user", "stranger", "hunter2"]);
        let port = broker.node().port();
        let own = |user: &str, vhost: &str| format!("amqp://{user}@127.0.0.1:{port}/{vhost}");
        for (url, found, remedy) in [
            (
                format!("amqp://guest:guest@127.0.0.1:{}/%2f", free_port()),
                "Connection refused",
                "rabbitmqctl status",
            ),
            (http.url.replace("http://", "amqp://guest:guest@"), "speaks no AMQP", "5672"),
            (format!("amqps://guest:guest@127.0.0.1:{port}/%2f"), "speaks no TLS", "5671"),
            (
                "amqp://guest:guest@nobody.invalid/%2f".to_owned(),
                "lookup address",
                "getent hosts nobody.invalid",
            ),
            (own("guest:guest", "nope"), "there is no vhost `nope`", "rabbitmqctl add_vhost nope"),
            (
                own("guest:wrong", "%2f"),
                "refused user name or password",
                "rabbitmqctl authenticate_user guest",
            ),
            (
                own("stranger:hunter2", "%2f"),
                "does not let this user into vhost `/`: NOT_ALLOWED",
                "list_permissions",
            ),
        ] {
            let section = format!("[queue]\nurl = \"{url}\"\n{QUICK}");
            let inspection =
                Inspection::at(&Setup::with_text(&(section + &subscriber("a", &http.url, ""))));
            assert_eq!(inspection.code, Some(1), "{url}");
            let finding = inspection.expect("harmful", "queue", found);
            assert!(
                text(finding, "remedy").contains(remedy)
                    && !finding.to_string().contains("hunter2"),
                "{url}: {finding}"
            );
        }
    });
}

fn limits_that_keep_a_daemon_from_starting_are_reported_before_it_is_started() {
    run(async {
        let broker = Broker::private_and_managed().await;
        let rest = QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "");
        let (by_amqp, by_api) = (Setup::new(&broker, &rest), managed(&broker, &rest));
        Inspection::at(&by_api).expect("ok", "node ", "file descriptors");
        broker.node().ctl(&["set_vhost_limits", r#"{"max-queues":10}"#]);
        let by_api = Inspection::at(&by_api);
        assert_eq!(by_api.code, Some(1));
        // 3 of the subscriber, 19 levels, the orphans, the record, history.
        let few = by_api.expect(
            "harmful",
            "vhost `/`",
            "may have 10 queues and has 0; 25 more are needed",
        );
        assert!(text(few, "remedy").contains("list_vhost_limits"), "{few}");
        broker.node().ctl(&["set_vhost_limits", r#"{"max-queues":0}"#]);
        let inspection = Inspection::at(&by_amqp);
        assert_eq!(inspection.code, Some(1));
        inspection.expect("harmful", "vhost `/`", "queue limit");
        broker.node().ctl(&["set_vhost_limits", r#"{"max-connections":3}"#]);
        assert_eq!(Inspection::at(&by_amqp).code, Some(0), "as many as a daemon needs");
        broker.node().ctl(&["set_vhost_limits", r#"{"max-connections":2}"#]);
        let inspection = Inspection::at(&by_amqp);
        assert_eq!(inspection.code, Some(1));
        let few = inspection.expect(
            "harmful",
            "broker connection (consuming)",
            "connection limit (2) is reached",
        );
        assert!(text(few, "remedy").contains("list_vhost_limits"), "{few}");
    });
}

fn a_look_for_one_subscriber_judges_what_all_share_by_all_of_them() {
    run(async {
        let broker = Broker::private_and_managed().await;
        let node = broker.node();
        let both = subscriber("a", "http://127.0.0.1:9/", "paused = true")
            + &subscriber("b", "http://127.0.0.1:9/", "");
        let setup = managed(&broker, &(QUICK.to_owned() + &both));
        node.ctl(&["set_vhost_limits", r#"{"max-queues":25}"#]);
        let inspection = Inspection::of(&setup, &["a"]);
        assert_eq!(inspection.code, Some(1));
        inspection.expect(
            "harmful",
            "vhost `/`",
            "may have 25 queues and has 0; 28 more are needed",
        );
        inspection.expect("note", "sub.a.retry", "not there yet");
        assert!(inspection.find("note", "sub.b", "").is_none(), "{:#?}", inspection.findings);
        node.ctl(&["set_vhost_limits", "{}"]);

        let daemon = setup.start().await;
        eventually("the record is there", async || broker.depth("state").await.is_some()).await;
        // 3 of the daemon and 2 of the command, which opens those that a daemon needs only where
        // none runs.
        node.ctl(&["set_vhost_limits", r#"{"max-connections":5}"#]);
        let inspection = Inspection::of(&setup, &["a"]);
        assert_eq!(
            inspection.code,
            Some(0),
            "the one that consumes is seen: {:#?}",
            inspection.findings
        );
        assert!(inspection.find("ok", "sub.b", "").is_none(), "{:#?}", inspection.findings);
        node.ctl(&["set_vhost_limits", "{}"]);

        for (name, pattern) in [("full", r"\.sub\.b$"), ("full-dead", r"\.sub\.b\.dead$")] {
            node.ctl(&[
                "set_policy",
                "--apply-to",
                "queues",
                name,
                pattern,
                r#"{"max-length":10}"#,
            ]);
        }
        // Whatever is published passes all queues of the exchange.
        eventually("findings that harm all are reported", async || {
            Inspection::of(&setup, &["a"]).find("harmful", "sub.b`", "sets max-length").is_some()
        })
        .await;
        let of_b = "sub.b.dead`";
        eventually("every finding about b is reported", async || {
            Inspection::of(&setup, &["b"]).find("harmful", of_b, "sets max-length").is_some()
        })
        .await;
        let inspection = Inspection::of(&setup, &["a"]);
        assert_eq!(inspection.code, Some(1));
        assert!(inspection.find("harmful", of_b, "").is_none(), "{:#?}", inspection.findings);
        assert!(daemon.stop().await.success());
    });
}

fn all_shared_queues_gone_is_harmful_although_none_of_them_is_there() {
    run(async {
        let broker = Broker::shared();
        let setup =
            Setup::new(&broker, &(QUICK.to_owned() + &subscriber("a", "http://127.0.0.1:9/", "")));
        let daemon = setup.start().await;
        eventually("the record is there", async || broker.depth("state").await.is_some()).await;
        assert!(daemon.stop().await.success());
        // The effect of a policy with `expires` on all of hooktrail's queues.
        let (connection, channel) = broker.channel().await;
        let levels = (0..19).map(|n| format!("delay.{n:02}"));
        for name in levels.chain(["orphans".to_owned(), "sub.a.dead".to_owned()]) {
            channel
                .queue_delete(queue(&broker, &name), QueueDeleteOptions::default())
                .await
                .expect("deletes");
        }
        channel
            .exchange_delete(queue(&broker, "delay"), Default::default())
            .await
            .expect("deletes");
        connection.close(200, "done".into()).await.expect("closes");
        let inspection = Inspection::at(&setup);
        assert_eq!(inspection.code, Some(1));
        inspection.expect("harmful", "delay.07`", "is missing");
        inspection.expect("harmful", "sub.a.dead`", "is missing");
        inspection.expect("harmful", &format!("exchange `{}.delay`", broker.prefix), "is missing");
        // A part that was not inspected is not called sound.
        setup.ok(&["repair", "a"]);
        let reported = setup.ok(&["check", "--connect"]);
        assert!(
            reported.contains("Not inspected, so not known")
                && reported.contains("bindings")
                && !reported.contains("Nothing harmful was found.\n"),
            "{reported}"
        );
    });
}
