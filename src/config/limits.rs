//! The largest values that keys may have.

use std::time::Duration;

/// The longest `http.timeout` and `http.connect_timeout`: a slot sends at most two prefetched
/// batches, one after the other, and RabbitMQ closes the channel of a consumer that does not settle
/// a message within 30 minutes.
pub(super) const MAX_TIMEOUT: Duration = Duration::from_secs(5 * 60);
pub(super) const MAX_WAIT: Duration = Duration::from_secs(2 * 60);
pub(super) const MAX_CONCURRENCY: i64 = 100;
pub(super) const MAX_ATTEMPTS: i64 = 1_000_000;
pub(super) const MAX_FAILURES: i64 = 1_000_000;
pub(super) const MAX_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3600);
pub(super) const MAX_OPEN_FOR: Duration = Duration::from_secs(24 * 3600);
