//! Every metric: its name, its labels, its meaning, and the handles that count.

mod definitions;
mod exposition;
mod families;
mod process;
mod registry;
mod subscriber;

pub use self::{
    definitions::{ALL, Definition, Kind, PREFIX, reference},
    exposition::Exposition,
    registry::{Metrics, OpenConnection},
    subscriber::SubscriberMetrics,
};

/// The memory that this process holds, in bytes; `None` where the system does not say.
pub fn resident_bytes() -> Option<u64> {
    process::Usage::now().resident_bytes.map(|bytes| bytes as u64)
}
