//! What the daemon says of itself: metrics, log, status, and what was found wrong.

pub mod finding;
pub mod lane_event;
pub mod log;
pub mod metrics;
pub mod outage;
pub mod resources;
pub mod status;
pub mod troubles;
