//! The program as its users meet it: real processes, a real broker, real receivers.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests look at the real clock, tell what they measured and show a failed daemon's log"
)]

/// Tests of which each needs a broker.
mod amqp {
    mod hostile_messages;
    mod topology;
    mod upkeep;
}
mod answers;
mod bad_input;
mod commands;
mod dead_letters;
mod delivery;
mod demo;
mod doctor;
mod documents;
mod embedded;
mod endpoints;
mod faults;
mod hostile;
mod hostile_receivers;
mod input;
mod intake;
mod layers;
mod log;
mod monitoring;
mod operating;
mod packaging;
mod producers;
mod readme;
mod receivers;
mod reload;
mod removals;
mod retrying;
mod security;
mod setting_up;
mod support;
mod trying;
mod verifiers;
mod which_daemon;
