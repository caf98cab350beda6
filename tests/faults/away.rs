//! The store is away while events come as fast as the machine takes them: deliveries and intake go
//! on, the daemon's memory stays bounded, and history says afterwards what it lacks.

use std::time::{Duration, Instant};

use hooktrail::{
    queue::{MAX_GROUP, NewEvent, Queue as _},
    store::Gap,
};
use lapin::{options::QueueDeclareOptions, types::FieldTable};

use crate::{
    oracle::Tally,
    remembered::reach,
    setting,
    soak::Sample,
    support::{
        api::Api,
        daemon::{Daemon, Setup, subscriber},
        eventually, peak_mib,
        queue::{Queue, on_both_queues},
        receiver::Receiver,
    },
    world::TYPE,
};

on_both_queues!(while_the_store_is_away_deliveries_go_on_memory_is_bounded_and_the_gap_is_told);

/// Many deliveries, each of a few events: what waits for the store are deliveries.
const SETTINGS: &str = "
[batch]
max_events = 3
max_wait = \"10ms\"
[http]
concurrency = 8
allow_http = true
allow_private_addresses = true
[log]
level = \"debug\"
";

/// Bytes of an event of the short form: so many that a daemon that kept them all would be seen.
const BYTES: u64 = 4000;

/// Mebibytes that a daemon may take more than before its first event: 16 of changes of deliveries
/// that wait for the store, 8 of a group of events on their way into it, and 12 of what the lane has
/// taken, of requests in flight, and of what the allocator keeps. All events have more than that.
const ROOM: f64 = 36.0;

/// Events that are ahead of their deliveries at most: the receiver's test does not keep them all.
const AHEAD: u64 = 20_000;

/// Nothing moves any more.
const STANDS: Duration = Duration::from_secs(120);

struct Load<'q> {
    queue: &'q Queue,
    receiver: &'q Receiver,
    tally: Tally,
    bytes: usize,
    published: u64,
    moved: (u64, Instant),
}

impl Load<'_> {
    fn tally(&mut self) {
        for request in self.receiver.take_requests().iter().filter(|r| r.status < 300) {
            self.tally.take(request);
        }
        if self.tally.accepted > self.moved.0 {
            self.moved = (self.tally.accepted, Instant::now());
        }
        let (accepted, published) = (self.tally.accepted, self.published);
        assert!(
            accepted >= published || self.moved.1.elapsed() < STANDS,
            "deliveries stand still: {accepted} of {published} events"
        );
    }

    fn group(&self, upto: u64) -> Vec<String> {
        let upto = upto.min(self.published + MAX_GROUP as u64);
        // No words: they would take the time of the test to be indexed afterwards.
        let body = |n| {
            let text = format!("{{\"event\":\"{TYPE}\",\"n\":{n},\"pad\":\"");
            let pad = self.bytes.saturating_sub(text.len() + 2);
            text + &"-".repeat(pad) + "\"}"
        };
        (self.published..upto).map(body).collect()
    }

    /// Publishes up to this event, as fast as it is taken.
    async fn publish(&mut self, upto: u64) {
        let embedded = match self.queue {
            Queue::Embedded(embedded) => Some(embedded.open()),
            Queue::Amqp(_) => None,
        };
        while self.published < upto {
            let group = self.group(upto);
            self.published += group.len() as u64;
            match &embedded {
                Some(queue) => {
                    let event = |body: String| NewEvent {
                        event_type: TYPE.to_owned(),
                        message_id: None,
                        body: body.into(),
                        traceparent: None,
                        tenant: None,
                    };
                    let events = group.into_iter().map(event).collect();
                    queue.publish(events).await.unwrap_or_else(|e| panic!("{e}"));
                }
                None => self.queue.publish(TYPE, group).await,
            }
            self.tally();
            while self.published > self.tally.accepted + AHEAD {
                tokio::time::sleep(Duration::from_millis(5)).await;
                self.tally();
            }
        }
    }

    async fn arrives(&mut self) {
        while self.tally.accepted < self.published {
            tokio::time::sleep(Duration::from_millis(10)).await;
            self.tally();
        }
    }
}

/// What shows where events on their way into history are.
async fn of_history(queue: &Queue, setup: &Setup, daemon: &Daemon) -> String {
    let mut all = String::new();
    if let Queue::Amqp(broker) = queue {
        let (_connection, channel) = broker.channel().await;
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let name = format!("{}.history", broker.prefix);
        // Those that it has and that are not ready are unacked.
        let found = channel.queue_declare(name.as_str().into(), passive, FieldTable::default());
        all += &match tokio::time::timeout(Duration::from_secs(10), found).await {
            Ok(Ok(q)) => {
                format!("{} messages ready, {} consumers\n", q.message_count(), q.consumer_count())
            }
            Ok(Err(e)) => format!("the queue of history: {e}\n"),
            Err(_) => "the queue of history does not answer\n".to_owned(),
        };
    }
    let status = setup.run(&["status", "--json"]);
    all += &String::from_utf8_lossy(&status.stdout);
    // A thread of the store that waits for a lock, or writes.
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid()));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
        all += &format!("thread {}: {}\n", read("comm").trim(), read("wchan").trim());
    }
    // At the level `debug` the log has each batch as well.
    let about = |line: &&str| line.contains("histor") || !line.contains("DEBUG");
    let log = daemon.log();
    all += &log.lines().filter(about).collect::<Vec<_>>().join("\n");
    all
}

async fn while_the_store_is_away_deliveries_go_on_memory_is_bounded_and_the_gap_is_told(
    queue: Queue,
) {
    let events = setting("HOOKTRAIL_AWAY_EVENTS", 10_000);
    let bytes = setting("HOOKTRAIL_AWAY_BYTES", BYTES);
    let (receiver, api) = (Receiver::accepting().await, Api::new());
    let data = tempfile::tempdir().expect("a directory");
    let (section, is_log) = match &queue {
        Queue::Embedded(embedded) => (
            format!("url = \"embedded\"\ndata_dir = \"{}\"\n", embedded.data_dir().display()),
            true,
        ),
        Queue::Amqp(broker) => (
            format!(
                "url = \"{}\"\nexchange = \"{}\"\nprefix = \"{}\"\ndata_dir = \"{}\"\n",
                broker.url,
                broker.exchange,
                broker.prefix,
                data.path().display()
            ),
            false,
        ),
    };
    let data_dir = match &queue {
        Queue::Embedded(embedded) => embedded.data_dir(),
        Queue::Amqp(_) => data.path().to_owned(),
    };
    let text = format!("[queue]\n{section}{}{SETTINGS}", api.section());
    let setup = Setup::with_text(&(text + &subscriber("a", &receiver.url, "")));
    let remembers = "every event goes into history";
    let daemon = setup.start().await;
    if !is_log {
        daemon.wait_log(remembers).await;
    }
    // History begins, so that there is something to lack.
    let moved = (0, Instant::now());
    let mut load = Load {
        queue: &queue,
        receiver: &receiver,
        tally: Tally::default(),
        bytes: usize::try_from(bytes).expect("small"),
        published: 0,
        moved,
    };
    load.publish(100).await;
    load.arrives().await;
    assert!(daemon.stop().await.success());

    let (path, aside) = (data_dir.join("history.db"), data_dir.join("aside"));
    std::fs::rename(&path, &aside).expect("renames");
    std::fs::create_dir(&path).expect("is in its place");
    let daemon = setup.start().await;
    daemon.wait_log("history is away").await;
    let idle = Sample::of(daemon.pid(), 0, 0).memory_mib;
    let begun = Instant::now();
    load.publish(100 + events).await;
    load.arrives().await;
    let (took, peak) = (begun.elapsed().as_secs_f64(), peak_mib(daemon.pid()));
    let what = "hooktrail_history_dropped_total{what=\"deliveries\"}";
    let dropped = api.metric(what).await.expect("exposed");
    println!(
        "{events} events of {bytes} bytes with the store away: {:.0} a second for {took:.1} s, {dropped} changes of deliveries dropped; the daemon had {idle:.1} MiB before and {peak:.1} MiB at most",
        events as f64 / took
    );
    assert!(dropped > 0.0, "more than may wait for the store");
    assert!(peak <= idle + ROOM, "{peak} MiB, of {idle} before");

    std::fs::remove_dir(&path).expect("removes");
    std::fs::rename(&aside, &path).expect("renames");
    let (mut has, mut changed) = (0, Instant::now());
    while has < 100 + events {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let found = reach(&data_dir, is_log).await;
        let unread = found.as_ref().err().map(ToString::to_string);
        let found = found.map_or(0, |reach| reach.events);
        if found > has {
            (has, changed) = (found, Instant::now());
        }
        assert!(
            changed.elapsed() < STANDS,
            "history stands still at {has} events (it cannot be read: {unread:?}):\n{}",
            of_history(&queue, &setup, &daemon).await
        );
    }
    println!(
        "history has all {has} events {:.1} s after it was back",
        begun.elapsed().as_secs_f64() - took
    );
    let mut gaps: Vec<Gap> = Vec::new();
    eventually("the gap is recorded", async || {
        gaps = reach(&data_dir, is_log).await.map(|reach| reach.gaps).unwrap_or_default();
        !gaps.is_empty()
    })
    .await;
    assert!(daemon.stop().await.success());
    let gaps = reach(&data_dir, is_log).await.unwrap_or_else(|e| panic!("{e}")).gaps;
    assert!(gaps.iter().all(|gap| gap.what == "deliveries"), "no event is missing: {gaps:?}");
    let missing: Option<u64> = gaps.iter().map(|gap| gap.missing).sum();
    assert!(missing.is_some_and(|n| n as f64 >= dropped), "{missing:?} of {dropped}: {gaps:?}");
}
