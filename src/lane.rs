//! The worker of one subscriber: take, batch, splice, sign, send, settle.
//!
//! A lane works in sessions. A session opens the queue, and ends when the lane drains, the circuit
//! opens, a `Retry-After` holds the endpoint, the subscriber is paused, the queue fails, a request
//! could not be sent, or a setting changes that the session was opened with. Before it ends, it
//! waits for its requests in flight and settles what it can. What it has not settled is in the
//! queue and is delivered again.
//!
//! Every other change of the configuration is used from the next attempt on, in the same session.

mod in_flight;
mod session;
mod signals;
mod sorting;
mod state;

use std::time::Duration;

use tokio::{
    sync::watch,
    time::{sleep, sleep_until},
};

pub use self::state::LaneConfig;
use self::{
    session::{End, Session},
    signals::{changed, drained, paused_or_resumed},
    state::State,
};
use crate::{
    clock,
    policy::{circuit_breaker::Permit, retry::Backoff},
    queue::Queue,
    telemetry::{lane_event::LaneEvent, status::LaneReporter},
};

/// The shortest and the longest wait between two sessions while the queue fails.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// The lane of a subscriber.
#[derive(Debug)]
pub struct Lane<Q>(State<Q>);

/// What follows a session.
enum Next {
    Ended,
    Session,
    /// A session after the backoff; `writable`: when the queue can be written to.
    Recovery {
        writable: bool,
    },
}

impl<Q: Queue> Lane<Q> {
    pub fn new(configured: watch::Receiver<LaneConfig>, queue: Q, reporter: LaneReporter) -> Self {
        Self(State::new(configured, queue, reporter))
    }

    /// Works until `drain` becomes true and what is in flight is settled.
    pub async fn run(mut self, mut drain: watch::Receiver<bool>) {
        let mut backoff = Backoff::new(FIRST_BACKOFF, MAX_BACKOFF);
        loop {
            tokio::select! {
                () = self.0.unpaused() => {}
                () = drained(&mut drain) => return,
            }
            let permit = self.0.breaker.permit(clock::instant());
            self.0.report_circuit();
            if let Permit::Wait(until) = permit {
                tokio::select! {
                    () = self.waited(until) => continue,
                    () = drained(&mut drain) => return,
                }
            }
            let writable = match self.session(&mut backoff, &mut drain).await {
                Next::Ended => return,
                Next::Session => continue,
                Next::Recovery { writable } => writable,
            };
            let recovered = async {
                sleep(backoff.grow()).await;
                if writable {
                    self.0.queue.writable().await;
                }
            };
            tokio::select! {
                () = recovered => {}
                () = drained(&mut drain) => return,
            }
        }
    }

    /// Waits while nothing may be sent: until the time is over, or something happens that may change
    /// it.
    async fn waited(&mut self, until: std::time::Instant) {
        let lane = &mut self.0;
        let name = lane.subscriber.name.clone();
        tokio::select! {
            () = sleep_until(until.into()) => {}
            () = changed(&mut lane.configured) => {}
            () = paused_or_resumed(lane.pause_states.clone(), &name, lane.resumed) => {}
            () = changed(&mut lane.retry_requests) => {
                lane.report(&LaneEvent::RetryRequested);
                lane.breaker.try_now();
            }
        }
    }

    async fn session(&mut self, backoff: &mut Backoff, drain: &mut watch::Receiver<bool>) -> Next {
        let lane = &mut self.0;
        let opened = tokio::select! {
            opened = lane.queue.open(&lane.subscriber, lane.window()) => opened,
            () = drained(drain) => return Next::Ended,
        };
        let end = match opened {
            Ok((source, settler)) => {
                let mut session = Session::new(lane, settler);
                let end = session.run(source, drain).await;
                if session.settled {
                    backoff.reset();
                }
                lane.report(&LaneEvent::SessionEnded);
                end
            }
            Err(e) => End::Lost(e),
        };
        match end {
            End::Drained => {
                lane.queue_works();
                Next::Ended
            }
            End::Circuit | End::Paused | End::Configured | End::Overtaking => {
                lane.queue_works();
                Next::Session
            }
            End::Lost(e) => {
                lane.queue_failed(&e.to_string());
                Next::Recovery { writable: e.is_unwritable() }
            }
            End::Unsettled(why) => {
                lane.queue_failed(&why);
                // Attempts whose failure cannot be stored would only be repeated.
                Next::Recovery { writable: true }
            }
            End::Unsent => Next::Recovery { writable: false },
        }
    }
}
