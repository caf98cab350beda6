//! What can fail inside a query, and the times that the files store.

use std::time::{Duration, SystemTime};

use crate::store::StoreError;

/// A failure of a query.
#[derive(Debug)]
pub(super) enum Fault {
    Sqlite(rusqlite::Error),
    /// Of the events' own log, or of the request.
    Other(StoreError),
}

impl From<rusqlite::Error> for Fault {
    fn from(e: rusqlite::Error) -> Self {
        Self::Sqlite(e)
    }
}

impl From<StoreError> for Fault {
    fn from(e: StoreError) -> Self {
        Self::Other(e)
    }
}

impl Fault {
    /// Keeps SQLite's own failures apart, which the database explains.
    pub(super) fn apart<T>(result: Result<T, Self>) -> rusqlite::Result<Result<T, StoreError>> {
        match result {
            Ok(value) => Ok(Ok(value)),
            Err(Self::Other(e)) => Ok(Err(e)),
            Err(Self::Sqlite(e)) => Err(e),
        }
    }
}

/// Unix milliseconds; the nearest that there are of a time that has none.
pub(super) fn millis(at: SystemTime) -> i64 {
    match at.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        Err(e) => i64::try_from(e.duration().as_millis()).map_or(i64::MIN, |ms| -ms),
    }
}

/// The time of stored Unix milliseconds; 1970 of a number that is none.
pub(super) fn time(millis: i64) -> SystemTime {
    let since = Duration::from_millis(u64::try_from(millis).unwrap_or(0));
    SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// A duration in milliseconds.
pub(super) fn span(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
