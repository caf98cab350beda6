//! `order = "strict"`: no event arrives before an older one has.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::support::{
    daemon::{QUICK, SLOW, Setup, subscriber},
    eventually,
    queue::Queue,
    receiver::{Receiver, Request, event, status},
    run,
};

const TYPE: &str = "activity_log.user.updated";

/// The numbers of the requests, one after the other.
fn sent(receiver: &Receiver) -> Vec<Vec<u64>> {
    receiver.requests().iter().map(Request::numbers).collect()
}

fn setup(queue: &Queue, text: &str, receiver: &Receiver, more: &str) -> Setup {
    // Others have several requests at once.
    let text = text.replace("[http]", "[http]\nconcurrency = 8");
    let own = format!("order = \"strict\"\n{more}");
    Setup::new(queue, &(text + &subscriber("a", &receiver.url, &own)))
}

#[test]
fn a_batch_that_fails_holds_what_follows_it_over_kill_9_until_it_is_accepted() {
    run(async {
        let queue = Queue::embedded();
        let failures = Arc::new(AtomicUsize::new(0));
        let count = failures.clone();
        let receiver = Receiver::start(move |r, _| match r.numbers()[..] {
            [2] if count.fetch_add(1, Ordering::SeqCst) < 3 => status(503),
            _ => status(200).after(Duration::from_millis(5)),
        })
        .await;
        let setup = setup(&queue, QUICK, &receiver, "batch = { max_events = 1 }");
        let daemon = setup.start().await;
        queue.publish(TYPE, (0..5).map(event)).await;
        // With that it is stored how far it is.
        eventually("the batch waits", async || setup.ok(&["retry", "list", "a"]).contains(" 503 "))
            .await;
        queue.publish(TYPE, (5..8).map(event)).await;
        daemon.kill();
        let _daemon = setup.start().await;
        queue.publish(TYPE, (8..12).map(event)).await;
        receiver.wait_all(12).await;
        let expected: Vec<Vec<u64>> =
            [0, 1, 2, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11].map(|n| vec![n]).into();
        assert_eq!(sent(&receiver), expected);
        let ids: Vec<_> = receiver.requests()[2..6].iter().map(|r| r.id().to_owned()).collect();
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    });
}

#[test]
fn the_parts_of_a_batch_go_in_order_although_the_first_of_them_fails() {
    run(async {
        let queue = Queue::embedded();
        let failures = Arc::new(AtomicUsize::new(0));
        let count = failures.clone();
        let receiver = Receiver::start(move |r, _| match r.numbers()[..] {
            [_, _, _, ..] => status(413),
            // The first part and one in the middle.
            [0 | 4, ..] if count.fetch_add(1, Ordering::SeqCst).is_multiple_of(2) => status(503),
            _ => status(200),
        })
        .await;
        let setup = setup(&queue, QUICK, &receiver, "batch = { max_events = 8 }");
        let _daemon = setup.start().await;
        queue.publish(TYPE, (0..16).map(event)).await;
        receiver.wait_all(16).await;
        assert_eq!(receiver.accepted(), (0..16).collect::<Vec<u64>>(), "{:?}", sent(&receiver));
        assert!(failures.load(Ordering::SeqCst) >= 4, "{:?}", sent(&receiver));
    });
}

#[test]
fn an_event_that_is_refused_pauses_and_is_not_passed_by() {
    run(async {
        let queue = Queue::embedded();
        let receiver = Receiver::start(|r, _| match r.numbers().contains(&5) {
            true => status(422),
            false => status(200),
        })
        .await;
        let api = crate::support::api::Api::new();
        let text = QUICK.to_owned() + &api.section();
        let setup = setup(&queue, &text, &receiver, "batch = { max_events = 4 }");
        let daemon = setup.start().await;
        queue.publish(TYPE, (0..12).map(event)).await;
        daemon.wait_log("paused: its events wait").await;
        assert!(
            daemon.log().contains("the receiver refuses an event with 422"),
            "{}",
            daemon.log()
        );
        assert_eq!(receiver.accepted(), [0, 1, 2, 3, 4]);
        assert_eq!(setup.dead("a").len(), 0);
        // It is refused again, and the parts behind it wait on.
        setup.ok(&["resume", "a"]);
        eventually("paused again", async || {
            daemon.log().matches("paused: its events wait").count() == 2
        })
        .await;
        // It fails in another way.
        receiver.now(|r, _| match r.numbers().contains(&5) {
            true => status(503),
            false => status(200),
        });
        let before = receiver.count();
        setup.ok(&["resume", "a"]);
        receiver.wait_requests(before + 2).await;
        assert_eq!(receiver.accepted(), [0, 1, 2, 3, 4]);
        receiver.now(|_, _| status(200));
        receiver.wait_all(12).await;
        assert_eq!(receiver.accepted(), (0..12).collect::<Vec<u64>>());
    });
}

#[test]
fn the_last_attempt_pauses_and_what_is_no_event_or_too_large_is_passed_by() {
    run(async {
        let queue = Queue::embedded();
        let receiver = Receiver::start(|r, _| match r.numbers()[..] {
            [2] => status(413),
            [4] => status(500),
            _ => status(200),
        })
        .await;
        let api = crate::support::api::Api::new();
        let text = SLOW.to_owned() + &api.section();
        let setup = setup(&queue, &text, &receiver, "retry = { max_attempts = 1 }");
        let daemon = setup.start().await;
        let mut events: Vec<String> = (0..6).map(event).collect();
        events.insert(1, "[1]".to_owned());
        queue.publish(TYPE, events).await;
        daemon.wait_log("paused: its events wait").await;
        assert_eq!(receiver.accepted(), [0, 1, 3]);
        let reasons: Vec<String> = setup
            .dead("a")
            .iter()
            .map(|letter| letter["reason"].as_str().expect("a reason").to_owned())
            .collect();
        assert_eq!(reasons, ["invalid_event", "too_large"]);
        // What is sent again goes beside, and pauses nobody.
        receiver.now(|r, _| match r.header("x-hooktrail-replay") {
            "" => status(200),
            _ => status(422),
        });
        setup.ok(&["dead", "replay", "a", "--reason", "too_large"]);
        setup.ok(&["resume", "a"]);
        eventually("the others arrive", async || receiver.accepted() == [0, 1, 3, 4, 5]).await;
        eventually("the replay is dead again", async || setup.dead("a").len() == 2).await;
        queue.publish(TYPE, [event(6)]).await;
        eventually("and stops nobody", async || receiver.accepted().contains(&6)).await;
    });
}
