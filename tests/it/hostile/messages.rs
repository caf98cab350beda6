//! Messages that no producer should send, and that AMQP lets it send: they are delivered like any
//! other, and no connection, no process and no other subscriber notices.

use crate::support::{
    broker::Broker,
    daemon::{Daemon, QUICK, Setup, subscriber},
    raw_amqp::{Raw, deep_table, long, short},
    receiver::{Receiver, event, status},
    run, tests_that_need,
};

/// Makes a header frame of 128 KiB and its own 8 bytes: 12 and 2 before the table, 4 of its length,
/// 6 of the name, 5 of the value.
const LARGEST: usize = 128 * 1024 - 12 - 2 - 4 - 6 - 5;

tests_that_need!(
    broker:
    properties_that_are_not_utf_8_or_nest_too_deep_disturb_no_subscriber,
    the_relay_the_orphans_and_the_dead_letters_take_them_too,
);

/// Properties that lapin could not read: each with what makes it so.
fn poisons() -> [Vec<u8>; 6] {
    let headers = |table: Vec<u8>| [vec![0x20, 0], long(&table)].concat();
    [
        [&[0x00, 0x80][..], &short(b"\xff\xfeid")].concat(), // message id
        [&[0x80, 0x00][..], &short(b"application/\xe2\x82")].concat(), // content type
        headers([short(b"na\xffme"), b"V".to_vec()].concat()),
        headers([short(b"deep"), deep_table(9_000)].concat()),
        headers([short(b"short"), b"s\x00\x07".to_vec()].concat()), // RabbitMQ's 16-bit integer: a short string in the standard
        headers([short(b"large"), b"S".to_vec(), long(&vec![b'x'; LARGEST])].concat()), // a frame that RabbitMQ takes, and lapin does not
    ]
}

fn quiet(daemon: &Daemon) {
    let log = daemon.log();
    assert!(!log.contains("lost"), "a connection or a lane was lost:\n{log}");
}

fn properties_that_are_not_utf_8_or_nest_too_deep_disturb_no_subscriber() {
    run(async {
        let broker = Broker::shared();
        let (one, two) = (Receiver::accepting().await, Receiver::accepting().await);
        let setup = Setup::new(
            &broker,
            &(QUICK.to_owned()
                + &subscriber("one", &one.url, "")
                + &subscriber("two", &two.url, "")),
        );
        let daemon = setup.start().await;
        let mut raw = Raw::connect(&broker.url);
        for (n, properties) in poisons().iter().enumerate() {
            raw.publish(broker.exchange.as_bytes(), b"a.b", properties, event(n as u64).as_bytes());
        }
        raw.publish(broker.exchange.as_bytes(), b"a.\xff", &[0, 0], event(6).as_bytes());
        broker.publish("a.b", [event(7)]).await;
        for receiver in [&one, &two] {
            receiver.wait_all(8).await;
        }
        quiet(&daemon);
    });
}

fn the_relay_the_orphans_and_the_dead_letters_take_them_too() {
    run(async {
        let broker = Broker::shared();
        let receiver = Receiver::start(|_, _| status(200)).await;
        let text = QUICK.to_owned() + &subscriber("one", &receiver.url, "");
        let setup = Setup::new(&broker, &text);
        assert!(setup.start().await.stop().await.success()); // declares the queues
        let source = format!("{}.sub.one.dead", broker.prefix); // any queue will do as a source
        let queue = |rest: &str| format!("{}.{rest}", broker.prefix).into_bytes();
        let mut raw = Raw::connect(&broker.url);
        for (n, properties) in poisons().iter().enumerate() {
            raw.publish(b"", &queue("sub.one.dead"), properties, event(n as u64).as_bytes());
            raw.publish(b"", &queue("orphans"), properties, b"an orphan");
            raw.publish(b"", &queue("sub.one.retry"), properties, b"no envelope");
        }
        let listed = setup.ok(&["dead", "list", "one", "--json"]);
        assert_eq!(listed.lines().count(), 6, "{listed}");
        broker.wait_depth("sub.one.dead", 6).await;

        let relaying = format!(
            "[queue]\nurl = \"{}\"\nsource_queue = \"{source}\"\nprefix = \"{}\"\n{text}",
            broker.url, broker.prefix
        );
        let relaying = Setup::with_text(&relaying);
        let daemon = relaying.start().await;
        receiver.wait_all(6).await;
        // The messages of the retry queue became dead letters, which are relayed as invalid events:
        // to the orphans.
        broker.wait_depth("orphans", 12).await;
        quiet(&daemon);
    });
}
