//! hooktrail takes audit events from a queue, RabbitMQ or one of its own, batches them for each
//! subscriber, signs and POSTs the batches, retries what fails on a durable schedule, and keeps
//! what cannot be delivered.
//!
//! # The way of an event
//!
//! ```text
//! exchange ─► queue of a subscriber ─► lane: take ─ batch ─ splice ─ sign ─ POST
//! (the broker fans out)                 ▲                                    │
//!                                       │                                    ├─ success: ack
//!      retry queue, read first ─────────┘                                    │
//!        ▲                                                                   │
//!        └── delay ladder ◄── envelope, confirmed, then ack ◄────────────────┼─ failed
//!                           dead letter, confirmed, then ack ◄───────────────┼─ given up
//!                        session ends, backlog stays in the queue ◄──────────┴─ circuit open
//! ```
//!
//! Events that come over HTTP ([`admin`]) are published into the same queues, confirmed before the
//! answer.
//!
//! A first attempt is made from memory. A failed batch becomes ONE message, the envelope: the exact
//! body, the batch id, the number of attempts. From then on bytes and id never change, unless the
//! batch is split: each half is a batch with an id of its own.
//!
//! # The rooms
//!
//! A room imports only from rooms above it. Inside a room, or a folder that is drawn here, a file
//! imports only from files to its left. `tests/it/documents/layers.rs` holds the code to that.
//!
//! ```text
//! clock.rs                  time, randomness, ids
//! failpoint.rs              where a debug build can be killed
//! wording.rs                text for people: numbers and their nouns, what strangers wrote
//! zone.rs                   points in time as people write them
//! csv.rs                    comma-separated values without formulas
//! page.rs                   pages of long lists, and the cursors between them
//! crypto/                   values that cannot be printed; sealing; signing; whom to trust
//!              · secret · seal · signature · tls · handshake
//! sqlite/                   a SQLite file: opened, migrated, written in groups, read
//!              · error · schema · threads · sqlite
//! event/                    what an event is, topic patterns; the request body
//!              · check · details · inflate · payload · key · fields · scan · entry · pattern · pointer · redaction
//!              · condition · tenant · matcher · audience · event
//! delivery/                 the nouns, each defined once
//!              · subscriber_name · outcome · attempt_log · print · trace · batch · dead_letter
//!              · disposition · depth · pause · delivery
//! policy/                   decisions without I/O
//!              · address · retry · batching · circuit_breaker · rate · answer · turn · verdict
//! config/                   raw TOML in, checked values out, all mistakes at once; one row a key
//!              · limits · model · subscriber · fitting · settings · keys · spelling · variables · document · reader
//!              · optional · include · loader · listing · managed · changes · schema · config
//!              keys/ · key · show
//!              managed/ · body
//!              loader/ · files · origins · queue · tokens · signing · policies · daemon
//!              · endpoint · start_from · tenant · format · values · order
//! telemetry/                what the daemon reports: findings, outages, events, metrics, log
//!              · finding · troubles · outage · resources · lane_event · metrics · status · log
//!              metrics/ · definitions · exposition · process · families · subscriber · registry
//!              status/ · view · scheduled · hour · lane
//! store/                    what hooktrail remembers of events and deliveries, behind one trait
//!              · words · row · filter · delivery · replay · subscriber · state · store
//!              · fake · sqlite
//!              sqlite/ · fault · schema · tokens · chunk · hours · source · append · search
//!              · deliveries · around · pack · replays · sealed · merge · copy · keyring · open · kept
//!              · reseal · upkeep
//! queue/                    what delivery needs of a queue; `amqp` alone knows lapin, `embedded`
//!                           alone SQL
//!              · removals · waiting · queue · history · fake · embedded · amqp
//!              amqp/ · broker_error · wire · ladder · prefetch · connection · pool · message
//!              · topology · requests · declarations · publisher · redelivery · management
//!              · record · matching · snapshot · history_mark · history_state · shared · state_stream
//!              · unusable · restore · walk · consumer · ownership · upkeep · follow
//!              · history_queue · history_feed · relay · orphans · intake · waiting · dead
//!              · depths · doctor · line · scribe · repair · prune · fuzzing
//! endpoint/                 one attempt, the only place that sends requests to receivers
//!              · webhook · inspect · test_event
//! lane/                     the worker of one subscriber
//!              · signals · in_flight · sorting · state · session · lane
//! history/                  what fills the store, and what answers from it
//!              · events · changes · losses · deliveries · whereabouts · replay · newcomers · resend
//!              · history
//!              replay/ · filling
//! supervisor/               start, reload, restart after a panic, drain
//!              · signal · fleet · systemd · managed · reload · startup_check
//! letters/                  dead letters as operators work on them: chosen, replayed, purged
//!              · key · choice · group · walk · purge · replay · letters
//! admin/                    the HTTP listener: health, metrics, the API, the intake of events
//!              · view · answer · ending · query · body · guard · versions · connections
//!              · introduction · intake · history · history_health · export · operations · replays
//!              · control · dead · subscribers · console · admin
//!              console/ · session · assets · page · table · chart · form · notices · sign_in · entry
//!              · action · actions · sending · dead_actions · webhook_form · overview · replays
//!              · events · deliveries · dead_letters · webhooks · health
//! cli/                      the commands, and all printing; `main.rs` has the exit codes
//!              · text · failed · arguments · terminal · secret · complete · open · keeping · daemon
//!              · remembered · moment · check · dead · demo · history · whereabouts · deliveries
//!              · init · listen · man · pause · plan · prune · publish · repair · replay · retry
//!              · run · status · store · subscribers · test · cli
//!              dead/ · choice · walk · summary · list · show · report · purge · replay
//!              demo/ · sample · stage · receiver · home · narrator · account · play
//!              plan/ · forecast · print · json
//!              status/ · table · story
//!              subscribers/ · keys · print
//! fuzzing/                  properties that must hold for untrusted bytes; not part of the program
//!              · json · events · intake · broker · receiver · configuration · fuzzing
//! ```
//!
//! # Questions, and where the answer is
//!
//! - Why was this dead-lettered? [`delivery::Reason`] lists the reasons. After an attempt
//!   [`policy::verdict::decide`] chooses one, and [`policy::answer`] says which status is a
//!   refusal. Without an attempt: `Sorted` in `lane/sorting.rs`; by the broker:
//!   `queue/amqp/message.rs`. An operator sees it in `hooktrail dead list`: docs/operations.md,
//!   *Dead letters*.
//! - Which batch is sent next? [`policy::turn::Turns::choose`].
//! - When is a batch retried? [`policy::retry::RetryPolicy::next`] chooses the delay. RabbitMQ
//!   keeps the batch for that long (`queue/amqp/ladder.rs`), the embedded queue its due time.
//! - What may a lane touch? The [`queue::Queue`]: it opens its [`queue::Source`] and
//!   [`queue::Settler`], reads who is paused, and records its own pause. Besides, one
//!   [`endpoint::webhook`] with its connections, and the [`telemetry::lane_event`]s that it
//!   reports. No other lane, and no file.
//! - How does a delivery get from the broker's socket to its lane? `queue/amqp/wire/reader.rs` reads,
//!   `filter.rs` takes the frames apart, `content.rs` has the inbox that the lane waits on. Everything
//!   but deliveries goes on to lapin.
//! - What do we say to the broker? Names and arguments are in `queue/amqp/topology.rs`,
//!   declarations in `declarations.rs`, all requests that can be refused in `requests.rs`, messages
//!   in `message.rs`, publishes in `publisher.rs`, acks in `consumer.rs`. Reference:
//!   docs/rabbitmq.md. To SQLite? [`queue::embedded`]; how its file is opened and written:
//!   [`sqlite`].
//! - What happens when the broker goes away? The source ends, so the lane's session ends, and the
//!   lane opens another. Publishing reconnects by itself in `queue/amqp/publisher.rs`.
//! - What can be wrong with a queue, and what fixes it? `queue/amqp/doctor.rs` and
//!   `queue/embedded/doctor.rs`; with an endpoint: [`endpoint::inspect`].
//! - What happens on SIGHUP? `cli/run.rs` asks [`supervisor::reload::Reloader::reload`], which
//!   reads and compares, and [`supervisor::fleet`] prepares the queue (new patterns are bound),
//!   then starts, changes and stops lanes. A lane takes its new configuration in `lane/state.rs`.
//!   Former patterns are unbound afterwards: `queue/amqp/ownership.rs` decides, `follow.rs` does
//!   it. As an operator's request it also makes removals that a changed file alone may not.
//! - What happens on SIGTERM? [`supervisor`] drains: no lane takes more, requests in flight end, to
//!   a deadline.
//! - Where is a pause recorded? In the state stream of the queue: `queue/amqp/state_stream.rs`.
//! - How does a command reach the daemon? `cli/daemon.rs`, over the listener of [`admin`].
//! - How do I add a configuration key? A row in `config/keys.rs`; CONTRIBUTING.md has the steps,
//!   and those for a test and a metric.
//! - What does a producer get for its POST? `admin/intake.rs`. An operator? `admin/control.rs`, in
//!   the types of [`admin::view`]. How many may connect, and for how long? `admin/connections.rs`.
//! - How do I add a request to the API? A route in [`admin`], behind `guard::with_token` if it is not
//!   open on loopback; its role follows from method and path. `admin/query.rs` shows how parameters
//!   are read, `admin/body.rs` how a body is. Refusals are made in `admin/answer.rs`. Then
//!   docs/admin.yaml, to which `operators::api` in tests/it holds the running daemon.
//! - How do I add a page? A file in `admin/console/` that renders an answer of the API, and a route in
//!   `admin/console.rs`; docs/console.md. An action? A handler in `admin/console/actions.rs` that takes
//!   `Posted`, and calls what the API calls.
//! - What is counted, and under which name? [`telemetry::metrics`]. What does a lane log?
//!   [`telemetry::lane_event`].
//! - What can a message do to a connection? Nothing: `queue/amqp/wire/filter.rs`.
//! - Who may do what, and what prevents everything else? SECURITY.md.
//!
//! # What always holds
//!
//! 1. A message is acked only after the next durable fact: a success answer, or a confirmed publish
//!    of its envelope or dead letter ([`queue::Settler::settle`]).
//! 2. A message is settled at the source that it was taken from, or not at all: when the channel is
//!    lost, its batch is forgotten and the broker redelivers it. No receipt outlives a reconnect. A
//!    redelivery of a settled message is recognised by its content, where that is certain:
//!    `queue/amqp/redelivery.rs`.
//! 3. While a settlement waits for its confirm the lane begins no attempt: a failure that cannot be
//!    recorded must not be repeated.
//! 4. One task publishes, on one channel of a connection that does not consume. (The relay of a
//!    source queue has a second one: retries must not wait behind its events.)
//! 5. Policies take `now` and randomness as arguments.
//! 6. Everything is bounded: prefetch, requests in flight, the time of an attempt, the bytes of an
//!    answer, concurrent name lookups, request bodies and connections of the admin listener.
//! 7. Secrets have types that do not print themselves; no error quotes a full URL or a secret.
//! 8. The bytes of an event are never parsed and printed again.
//!
//! # What is not here, on purpose
//!
//! - No dispatcher on RabbitMQ: the broker fans out, with a queue and its bindings for each
//!   subscriber.
//! - No retry in a daemon's memory: due times are in the queue, and outlive the daemon.
//! - No automatic recovery of lapin: after a forced close it acks messages that were not processed.
//! - No filter behind the queue: everything in a subscriber's queue is delivered.
//! - No database next to the broker: a daemon has either RabbitMQ or the embedded queue.

#![forbid(unsafe_code)]

pub mod admin;
pub mod cli;
pub mod clock;
pub mod config;
pub mod crypto;
pub mod csv;
pub mod delivery;
pub mod endpoint;
pub mod event;
pub mod failpoint;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod history;
pub mod lane;
pub mod letters;
pub mod page;
pub mod policy;
pub mod queue;
pub mod sqlite;
pub mod store;
pub mod supervisor;
pub mod telemetry;
pub mod wording;
pub mod zone;
