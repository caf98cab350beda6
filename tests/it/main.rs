//! The program as its users meet it: real processes, a real broker, real receivers.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "tests look at the real clock, and show what they found and a failed daemon's log"
)]

mod bad_input;
mod commands;
mod delivery;
mod embedded;
mod faults;
mod hostile;
mod hostile_messages;
mod input;
mod layers;
mod support;
mod topology;
