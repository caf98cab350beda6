//! Every metric: its name, its labels, its meaning, and the handles that count.

mod definitions;
mod exposition;
mod process;
mod registry;
mod subscriber;

pub use self::{
    definitions::{ALL, Definition, Kind, PREFIX, reference},
    exposition::Exposition,
    registry::{Metrics, OpenConnection},
    subscriber::SubscriberMetrics,
};
