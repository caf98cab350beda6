//! The largest values that keys may have.

use std::time::Duration;

/// The longest `http.timeout` and `http.connect_timeout`. With full batches a lane then settles
/// each message within the 30 minutes after which RabbitMQ closes a consumer's channel. With
/// small batches it may not: `plan` and `check --connect` warn of that.
pub(super) const MAX_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// The longest `batch.max_wait`.
pub(super) const MAX_WAIT: Duration = Duration::from_secs(2 * 60);

/// The most requests in flight to a subscriber, `http.concurrency`.
pub(super) const MAX_CONCURRENCY: i64 = 100;

/// The most attempts, `retry.max_attempts`.
pub(super) const MAX_ATTEMPTS: i64 = 1_000_000;

/// The most failures before a circuit opens, `circuit_breaker.failures`.
pub(super) const MAX_FAILURES: i64 = 1_000_000;

/// The most subscribers, `admin.max_subscribers`.
pub(super) const MAX_SUBSCRIBERS: i64 = 100_000;

/// The longest `shutdown_timeout`.
pub(super) const MAX_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3600);

/// The longest `circuit_breaker.open_for` and `circuit_breaker.max_open_for`.
pub(super) const MAX_OPEN_FOR: Duration = Duration::from_secs(24 * 3600);
