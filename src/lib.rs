//! hooktrail takes audit events from a queue, RabbitMQ or one of its own, batches them for each subscriber, signs and POSTs the
//! batches, retries what fails on a durable schedule, and keeps what cannot be delivered.
//!
//! # The way of an event
//!
//! ```text
//! exchange ─► queue of a subscriber ─► lane: take ─ batch ─ splice ─ sign ─ POST ─► success: ack
//! (the broker fans out)                 ▲                                 ├─ failed: envelope, confirmed, then ack ─► delay ladder ─┐
//!                                       ├─ retry queue, read first ◄──────┼────────────────────────────────────────────────────────┘
//!                                       │                                 └─ given up: dead letter, confirmed, then ack
//!                                       └─ circuit open: the session ends, the backlog stays in the queue
//! ```
//!
//! Events that come over HTTP ([`admin`]) are published into the same queues, confirmed before the answer.
//!
//! A first attempt is made from memory. A failed batch becomes ONE message, the envelope: the exact
//! body, the batch id, the number of attempts. From then on bytes and id never change.
//!
//! # The files, by layer; each imports only from layers above it in this list
//!
//! | layer | files |
//! |---|---|
//! | pure | [`event`] what an event is, topic patterns · [`payload`] the request body · [`inflate`] bodies that come compressed · [`retry`] the schedule · [`circuit_breaker`] · [`answer`] what a status means, and when it is believed · [`turn`] what a free request slot gets · [`address`] which addresses may be connected to · [`secret`] values that cannot be printed · [`resources`] whether the system gives this process what it needs · [`clock`] the only one that asks the time · [`finding`] what a look found, and what mends it · [`failpoint`] where a test can end a debug build · [`wording`] numbers and their nouns |
//! | pure | [`delivery`] the nouns: batch, outcome, disposition, dead letter, pause · [`batch`] what goes into one POST · [`signature`] signing and verifying · [`handshake`] whether a command and a daemon know the same token · [`tls`] whom to trust |
//! | base | [`config`] raw TOML in, checked policies out, all mistakes at once · [`metrics`] every name, and the handles that count |
//! | edge | [`queue`] what delivery needs of a queue; [`queue::amqp`] is the only place that knows lapin, [`queue::embedded`] the only one that knows SQLite · [`webhook`] one attempt → [`delivery::Outcome`]; the only place that sends requests to receivers · [`endpoint`] a look at where they would go, without one · [`signal`] signals of the system, files that change · [`log`] what it looks like, and who writes it |
//! | edge | [`status`] what lanes and queue say of themselves · [`verdict`] what follows from an attempt's outcome |
//! | edge | [`rehearsal`] one test event |
//! | flow | [`lane`] the worker of one subscriber |
//! | process | [`supervisor`] wires lanes to a queue, gives them what is configured anew, restarts those that panic, drains them |
//! | process | [`reload`] reads the configuration again and hands it to the supervisor |
//! | surface | [`doctor`] the look at the queue when the daemon has started · [`admin`] the HTTP listener: health, readiness, metrics, the API and the intake of events · [`systemd`] tells the service manager how far the daemon is |
//! | entry | [`cli`] the commands and all printing; `main.rs` exit codes |
//! | tests | `fuzzing.rs` what must hold for bytes that strangers write: `fuzz/` and the unit tests run it, no program holds it |
//!
//! # Where to look
//!
//! - What do we say to the broker? [`queue::amqp`], one file a concern. To SQLite? [`queue::embedded`].
//! - Why was this dead-lettered? [`verdict::decide`]; of what was never attempted: `sort` in [`lane`].
//! - Which batch is sent next? [`turn::Turns::choose`].
//! - When is a batch tried again? [`retry::RetryPolicy::next`]; the broker holds it: `queue/amqp/ladder.rs`.
//! - What happens when the broker goes away? The source ends, the lane's session ends and opens
//!   another; publishing has its own loop in `queue/amqp/publisher.rs`.
//! - What can be wrong with a queue, and what mends it? `queue/amqp/doctor.rs` and `queue/embedded/doctor.rs`;
//!   with an endpoint: [`endpoint`].
//! - What happens on SIGHUP? [`reload::Reloader::reload`], then `Fleet::reconcile` in [`supervisor`]; each lane takes over what is
//!   new in `Lane::adopt`, the broker's bindings in `queue/amqp/state.rs`. The start goes the same way.
//! - What does a producer get for its POST? `admin/intake.rs`. An operator? `admin/control.rs`. How many may connect, and for how
//!   long? `admin/connections.rs`.
//! - What is counted, and what is it called? [`metrics`], all of it.
//! - What can a message do to a connection? Nothing: `queue/amqp/wire.rs`.
//! - Who may do what, and what keeps everybody else from it? SECURITY.md.
//!
//! # What always holds
//!
//! 1. A message is acked only after the next durable fact: a success answer, or a confirmed publish of
//!    its envelope or dead letter ([`queue::Settler::settle`]).
//! 2. What was taken from a source is settled at that source or not at all: when the channel is gone,
//!    the batch is forgotten and comes again. Nothing survives a reconnect by its tag; what was settled without its ack is
//!    known again by what it is, where that is sure: `queue/amqp/repeats.rs`.
//! 3. While a settlement waits for its confirm the lane begins nothing: a failure that cannot be
//!    written down must not be made again and again.
//! 4. Publishing is done by one task on one channel of a connection that does not consume.
//! 5. Policies take `now` and randomness as arguments.
//! 6. Everything is bounded: prefetch, requests in flight, time per attempt, bytes of an answer, names asked for at once, bodies taken
//!    in, connections of the admin listener.
//! 7. Secrets are of types that do not print themselves; no error quotes a URL or a secret.
//! 8. An event's bytes are never parsed and printed again.
//!
//! # What is not here, on purpose
//!
//! - No dispatcher: the broker fans out, by one queue and its bindings for each subscriber.
//! - No timers for retries: their times live in the broker.
//! - No automatic recovery of lapin: after a forced close it acks messages nobody has processed.
//! - No filter after the queue: what is in a subscriber's queue is delivered.
//! - No database beside the broker: the embedded queue is one or the other.

#![forbid(unsafe_code)]

pub mod address;
pub mod admin;
pub mod answer;
pub mod batch;
pub mod circuit_breaker;
pub mod cli;
pub mod clock;
pub mod config;
pub mod delivery;
pub mod doctor;
pub mod endpoint;
pub mod event;
pub mod failpoint;
pub mod finding;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod handshake;
pub mod inflate;
pub mod lane;
pub mod log;
pub mod metrics;
pub mod payload;
pub mod queue;
pub mod rehearsal;
pub mod reload;
pub mod resources;
pub mod retry;
pub mod secret;
pub mod signal;
pub mod signature;
pub mod status;
pub mod supervisor;
pub mod systemd;
pub mod tls;
pub mod turn;
pub mod verdict;
pub mod webhook;
pub mod wording;
