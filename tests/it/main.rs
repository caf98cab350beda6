//! The program as its users meet it: real processes, a real broker, real receivers.
#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests read the real clock, print measurements and show a failed daemon's log"
)]

/// The fate of an event: batches, retries, dead letters, crashes.
mod delivery {
    mod answers;
    mod dead_letters;
    mod events;
    mod faults;
    pub(crate) mod intake;
    mod order;
    mod retrying;
}

/// The documents, the packages and the structure of the code.
mod documents {
    mod layers;
    mod monitoring;
    pub(crate) mod packaging;
    mod producers;
    mod readme;
    pub(crate) mod references;
    mod security;
}

/// Hostile input and hostile answers.
mod hostile {
    mod bad_input;
    mod connections;
    mod input;
    mod messages;
    mod receivers;
}

/// Commands, configuration, log, status.
mod operators {
    mod api;
    mod audit_log;
    mod browser;
    mod commands;
    mod console;
    mod demo;
    mod doctor;
    mod documented;
    mod health_page;
    pub(crate) mod history;
    mod kept_forms;
    mod letters;
    mod log;
    mod newcomers;
    mod operating;
    mod previews;
    mod printed;
    mod reload;
    mod removals;
    mod replays;
    mod roles;
    mod setting_up;
    mod subscribers;
    mod subscribers_commands;
    mod webhook_form;
    mod which_daemon;
}

/// Promises of one kind of queue only.
mod queues {
    /// Each of these needs a broker: see `tests_that_need`.
    mod amqp {
        mod history;
        mod history_connection;
        mod history_gaps;
        mod scribe;
        mod topology;
        mod upkeep;
    }
    mod embedded;
    mod tenants;
}

/// The request that a receiver gets, and ways to try it.
mod receivers {
    mod endpoints;
    mod examples;
    mod presets;
    mod tokens;
    mod trying;
    pub(crate) mod verifiers;
}

mod support;
