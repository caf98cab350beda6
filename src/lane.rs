//! The worker of one subscriber: take, batch, splice, sign, send, settle.
//!
//! A lane works in sessions. A session opens the queue, and ends when the lane drains, the circuit
//! opens, the queue is lost, or what it was opened with is configured anew; before it ends it waits
//! for its requests in flight and settles what it can. What it has not settled is in the queue and
//! comes again.
//!
//! Everything else that is configured anew is used from the next attempt on, in the same session.

mod in_flight;
mod session;
mod state;
mod trouble;
mod waits;

use std::time::Duration;

use tokio::{sync::watch, time::sleep_until};

pub use self::state::Served;
use self::{
    session::{End, Session},
    state::State,
    waits::{changed, drained, spoken},
};
use crate::{
    clock,
    policy::{circuit_breaker::Permit, retry::Waits},
    queue::Queue,
    telemetry::{resources, status::LaneStatus},
};

/// Between two sessions when the queue fails.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// The lane of a subscriber.
#[derive(Debug)]
pub struct Lane<Q>(State<Q>);

impl<Q: Queue> Lane<Q> {
    pub fn new(configured: watch::Receiver<Served>, queue: Q, status: LaneStatus) -> Self {
        Self(State::new(configured, queue, status))
    }

    /// Works until `drain` becomes true and what is in flight is settled.
    pub async fn run(self, mut drain: watch::Receiver<bool>) {
        let mut lane = self.0;
        let mut waits = Waits::new(FIRST_WAIT, LONGEST_WAIT);
        loop {
            tokio::select! {
                () = lane.allowed() => {}
                () = drained(&mut drain) => return,
            }
            let permit = lane.breaker.permit(clock::instant());
            lane.tell_circuit();
            if let Permit::Wait(until) = permit {
                let spoken = spoken(lane.standings.clone(), lane.subscriber.clone(), lane.resumed);
                tokio::select! {
                    () = sleep_until(until.into()) => continue,
                    () = changed(&mut lane.configured) => continue,
                    () = spoken => continue,
                    () = changed(&mut lane.tries) => {
                        tracing::info!(subscriber = lane.subscriber.name.as_str(), "an operator wants a retry now: one batch is tried");
                        lane.breaker.try_now();
                        continue;
                    }
                    () = drained(&mut drain) => return,
                }
            }
            let opened = tokio::select! {
                opened = lane.queue.open(&lane.subscriber, lane.window()) => opened,
                () = drained(&mut drain) => return,
            };
            let end = match opened {
                Ok((source, settler)) => {
                    let mut session = Session::new(&mut lane, settler);
                    let end = session.run(source, &mut drain).await;
                    if session.settled {
                        waits.reset();
                    }
                    lane.status.gave_back();
                    end
                }
                Err(e) => End::Lost(e),
            };
            let unsettled = matches!(end, End::Unsettled(_));
            match end {
                End::Drained => return lane.trouble.is_over(),
                End::Circuit | End::Paused | End::Configured => {
                    lane.trouble.is_over();
                    continue;
                }
                End::Lost(e) => lane.trouble.is(&e),
                End::Unsettled(why) => lane.trouble.is(&why),
                End::Unsent(why) => {
                    resources::report(&lane.subscriber.name, &why, clock::instant())
                }
            }
            let recover = async {
                tokio::time::sleep(waits.grow()).await;
                if unsettled {
                    // Attempts whose failure cannot be written down would only be made again.
                    lane.queue.writable().await;
                }
            };
            tokio::select! {
                () = recover => {}
                () = drained(&mut drain) => return,
            }
        }
    }
}
