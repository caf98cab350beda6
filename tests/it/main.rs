//! The program as its users meet it: real processes, a real broker, real receivers.

mod bad_input;
mod commands;
mod delivery;
mod faults;
mod layers;
mod support;
mod topology;
