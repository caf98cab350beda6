//! The daemon's reports: metrics, log, status, and findings of inspections.

pub mod finding;
pub mod lane_event;
pub mod log;
pub mod metrics;
pub mod outage;
pub mod resources;
pub mod status;
pub mod troubles;
