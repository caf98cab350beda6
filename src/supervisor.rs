//! Wires lanes to a queue, restarts those that panic, drains them at the end.

use std::{collections::BTreeSet, future::Future, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    task::{JoinError, JoinSet},
};

use crate::{
    config::Subscriber,
    lane::Lane,
    queue::{Queue, QueueError},
    retry::Waits,
    tls::SystemRoots,
    webhook::Webhook,
};

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The queue is being made ready.
    Starting,
    Running,
    /// Nothing new is begun.
    Draining,
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// Everything in flight was settled.
    Drained,
    /// These subscribers still had requests in flight at the deadline; they are delivered again.
    Deadline(BTreeSet<String>),
}

/// Runs a lane for each subscriber until `shutdown` completes, then drains them for at most `shutdown_timeout`.
///
/// `beside` is whatever else uses the queue, told by `phase` what to do: the queue stays open until it completes.
///
/// # Errors
/// The queue is of no use and will not change by itself, or https cannot be spoken.
pub async fn run<Q: Queue>(
    queue: Q,
    subscribers: &[Arc<Subscriber>],
    shutdown: impl Future<Output = ()>,
    shutdown_timeout: Duration,
    phase: &watch::Sender<Phase>,
    beside: impl Future<Output = ()>,
) -> Result<Ended, QueueError> {
    let tls = SystemRoots::load().map_err(QueueError::needs_operator)?;
    let mut lanes = Vec::new();
    for s in subscribers {
        let webhook = Webhook::try_new(s, &tls).map_err(|e| QueueError::needs_operator(format!("subscriber `{}`: {e}", s.name)))?;
        lanes.push((s.clone(), webhook));
    }
    let mut shutdown = std::pin::pin!(shutdown);
    tokio::select! {
        ready = queue.prepare(subscribers) => ready?,
        () = &mut shutdown => return Ok(Ended::Drained),
    }
    let (drain, draining) = watch::channel(false);
    let mut keepers = JoinSet::new();
    for (subscriber, webhook) in lanes {
        keepers.spawn(keep(subscriber, webhook, queue.clone(), draining.clone()));
    }
    phase.send_replace(Phase::Running);
    tracing::info!(subscribers = subscribers.len(), "running");
    let mut chores = JoinSet::new();
    let doing = (queue.clone(), subscribers.to_vec());
    chores.spawn(async move { doing.0.chores(&doing.1).await });

    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(ended) = chores.join_next() => {
                if let Err(e) = ended {
                    tracing::error!(error = %e, "a chore beside the lanes panicked and is not done any more until a restart");
                }
            }
        }
    }
    tracing::info!(timeout_s = shutdown_timeout.as_secs_f64(), "stopping: nothing new is taken, requests in flight finish");
    phase.send_replace(Phase::Draining);
    chores.shutdown().await;
    drain.send_replace(true);
    let mut busy: BTreeSet<String> = subscribers.iter().map(|s| s.name.clone()).collect();
    let lanes = async {
        while let Some(ended) = keepers.join_next().await {
            busy.remove(&ended.unwrap_or_else(resume));
        }
    };
    let in_time = tokio::time::timeout(shutdown_timeout, async { tokio::join!(lanes, beside) }).await.is_ok();
    if !in_time {
        keepers.shutdown().await;
    }
    queue.close().await;
    if in_time {
        tracing::info!("stopped");
        return Ok(Ended::Drained);
    }
    tracing::warn!(subscribers = ?busy, "stopped at the deadline with requests in flight; their events are delivered again, producers without an answer must send again");
    Ok(Ended::Deadline(busy))
}

/// A keeper holds no code that panics; if it does, so does the process.
fn resume(e: JoinError) -> String {
    std::panic::resume_unwind(e.into_panic())
}

/// Runs a lane, and runs it again after a panic. Returns the subscriber's name.
async fn keep<Q: Queue>(subscriber: Arc<Subscriber>, webhook: Webhook, queue: Q, mut drain: watch::Receiver<bool>) -> String {
    let mut waits = Waits::new(Duration::from_secs(1), Duration::from_secs(60));
    loop {
        let lane = Lane::new(subscriber.clone(), queue.clone(), webhook.clone());
        // A set of one: when the keeper is stopped at the deadline, so is the lane.
        let mut task = JoinSet::new();
        task.spawn(lane.run(drain.clone()));
        match task.join_next().await {
            Some(Err(e)) => {
                let wait = waits.grow();
                tracing::error!(subscriber = subscriber.name, error = %e, again_in_s = wait.as_secs_f64(), "the lane panicked; what it held comes again");
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    _ = drain.wait_for(|d| *d) => return subscriber.name.clone(),
                }
            }
            Some(Ok(())) | None => return subscriber.name.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::{self, Config},
        queue::{SettleError, fake::Fake},
    };
    use axum::{Router, http::StatusCode, routing::post};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::oneshot;

    /// A receiver that answers the n-th request with `status(n)`, and how many came.
    async fn receiver(status: fn(usize) -> u16) -> (String, Arc<AtomicUsize>) {
        rustls::crypto::ring::default_provider().install_default().ok();
        let count = Arc::new(AtomicUsize::new(0));
        let counter = count.clone();
        let answer = move || {
            let n = counter.fetch_add(1, Ordering::SeqCst);
            async move { StatusCode::from_u16(status(n)).expect("a status") }
        };
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/", socket.local_addr().expect("an address"));
        tokio::spawn(async move { axum::serve(socket, Router::new().route("/", post(answer))).await.expect("serves") });
        (url, count)
    }

    fn config(names: &[&str], url: &str) -> Config {
        let dir = tempfile::tempdir().expect("a directory");
        let subscriber = |n: &&str| {
            format!(
                "[[subscriber]]\nname = \"{n}\"\nurl = \"{url}\"\nsignatures = []\nbatch.max_wait = \"0s\"\nhttp = {{ allow_http = true, allow_private_addresses = true }}\n"
            )
        };
        let text = format!("[queue]\nurl = \"amqp://unused\"\n{}", names.iter().map(subscriber).collect::<String>());
        let path = dir.path().join("h.toml");
        std::fs::write(&path, text).expect("writes");
        config::load(&path).unwrap_or_else(|e| panic!("{e}"))
    }

    async fn until(what: &str, condition: impl Fn() -> bool) {
        let waiting = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    async fn while_running<F: Future<Output = ()>>(queue: Fake, config: Config, test: F) {
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(async move {
            let shutdown = async { drop(stopped.await) };
            let (phase, _) = watch::channel(Phase::Starting);
            run(queue, &config.subscribers, shutdown, Duration::from_secs(10), &phase, std::future::ready(())).await
        });
        test.await;
        drop(stop);
        assert_eq!(running.await.expect("does not panic").expect("runs"), Ended::Drained);
    }

    #[tokio::test]
    async fn a_lane_that_panics_is_restarted_and_the_others_notice_nothing() {
        let (url, requests) = receiver(|_| 200).await;
        let queue = Fake::default();
        queue.panic_once("bad");
        queue.put("bad", &[r#"{"event":"a"}"#]);
        while_running(queue.clone(), config(&["bad", "good"], &url), async {
            queue.put("good", &[r#"{"event":"a"}"#]);
            until("the good lane delivers", || requests.load(Ordering::SeqCst) >= 1).await;
            until("the other one comes back and delivers too", || queue.is_empty()).await;
            assert_eq!(requests.load(Ordering::SeqCst), 2);
            assert_eq!(queue.opened(), 3, "two lanes, one of them opened again");
        })
        .await;
    }

    #[tokio::test]
    async fn a_failure_that_is_not_written_down_is_attempted_again_and_written_once() {
        let (url, requests) = receiver(|n| if n < 2 { 500 } else { 200 }).await;
        let queue = Fake::default();
        queue.answer_next(SettleError::Unconfirmed("no confirm".to_owned()));
        while_running(queue.clone(), config(&["a"], &url), async {
            queue.put("a", &[r#"{"event":"a"}"#]);
            until("the second failure is written down", || queue.retries().len() == 1).await;
            assert_eq!(requests.load(Ordering::SeqCst), 2);
            assert_eq!(queue.opened(), 2, "the queue was opened again before the event came again");
            assert!(queue.is_empty());
            let (envelope, delay) = queue.retries().remove(0);
            assert_eq!((envelope.attempts, &envelope.body[..]), (1, &br#"{"events":[{"event":"a"}]}"#[..]));
            assert!(delay >= Duration::from_secs(4), "{delay:?}");
        })
        .await;
    }

    #[tokio::test]
    async fn a_queue_that_opens_and_fails_again_and_again_is_told_once_when_it_fails_and_once_when_it_works() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let writer = std::sync::Mutex::new(file.reopen().expect("opens"));
        let _logging = tracing::subscriber::set_default(tracing_subscriber::fmt().with_ansi(false).with_writer(writer).finish());
        let told = |what: &str| std::fs::read_to_string(file.path()).expect("the log").matches(what).count();
        let (lost, again) = ("the lane lost its queue", "the lane has its queue again");
        let (url, requests) = receiver(|_| 200).await;
        let queue = Fake::default();
        while_running(queue.clone(), config(&["a"], &url), async {
            for round in 1..3 {
                let opened = queue.opened();
                for _ in 0..3 {
                    queue.answer_next(SettleError::Unconfirmed("no confirm".to_owned()));
                }
                queue.put("a", &[r#"{"event":"a"}"#]);
                until("it is delivered", || queue.is_empty() && told(again) == round).await;
                assert_eq!((told(lost), queue.opened() - opened), (round, if round == 1 { 4 } else { 3 }));
            }
            assert_eq!(requests.load(Ordering::SeqCst), 8);
        })
        .await;
        assert_eq!((told(lost), told(again)), (2, 2));
    }

    #[tokio::test]
    async fn a_batch_whose_source_is_gone_is_forgotten() {
        let (url, requests) = receiver(|_| 500).await;
        let queue = Fake::default();
        queue.answer_next(SettleError::Gone);
        while_running(queue.clone(), config(&["a"], &url), async {
            queue.put("a", &[r#"{"event":"a"}"#]);
            until("it was attempted", || requests.load(Ordering::SeqCst) == 1).await;
            queue.put("a", &[r#"{"event":"b"}"#]);
            until("the lane goes on", || requests.load(Ordering::SeqCst) == 2).await;
            until("the other one is written down", || queue.retries().len() == 1).await;
            assert_eq!(&queue.retries()[0].0.body[..], br#"{"events":[{"event":"b"}]}"#, "of the first there is no envelope");
            assert!(!queue.is_empty(), "it is still in the queue");
        })
        .await;
    }
}
