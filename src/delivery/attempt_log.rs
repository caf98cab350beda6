//! The failed attempts of a batch, which are stored with it.

use std::{
    fmt,
    time::{Duration, SystemTime},
};

use super::outcome::Failure;

/// The failed attempts of a batch: the first and the last of them, a bounded number.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttemptLog {
    attempts: Vec<FailedAttempt>,
    left_out: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FailedAttempt {
    /// The number in the request; it starts from 1 again after a replay or a resume, and for the
    /// parts of a split batch.
    pub number: u32,
    /// The time when it ended.
    pub at: SystemTime,
    pub result: AttemptResult,
}

/// The result of a failed attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttemptResult {
    Status(u16),
    /// The stable name of a failure without an answer, such as `timeout`.
    Failure(String),
}

impl From<&Failure> for AttemptResult {
    fn from(failure: &Failure) -> Self {
        failure.status().map_or_else(|| Self::Failure(failure.name().to_owned()), Self::Status)
    }
}

impl fmt::Display for AttemptResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "{status}"),
            Self::Failure(name) => f.write_str(name),
        }
    }
}

impl AttemptLog {
    /// The number of attempts that are kept from the beginning.
    pub const FIRST: usize = 5;
    /// The number of attempts that are kept from the end.
    pub const LAST: usize = 45;

    /// The longest name of a failure, in bytes.
    const MAX_NAME: usize = 32;

    pub fn add(&mut self, attempt: FailedAttempt) {
        if self.attempts.len() == Self::FIRST + Self::LAST {
            self.attempts.remove(Self::FIRST);
            self.left_out = self.left_out.saturating_add(1);
        }
        self.attempts.push(attempt);
    }

    /// The first attempts, the number of those left out, and the last attempts.
    pub fn parts(&self) -> (&[FailedAttempt], u32, &[FailedAttempt]) {
        let (first, last) = self.attempts.split_at(self.attempts.len().min(Self::FIRST));
        (first, self.left_out, last)
    }

    pub fn is_empty(&self) -> bool {
        self.attempts.is_empty()
    }

    /// The last attempt that failed.
    pub fn last(&self) -> Option<&FailedAttempt> {
        self.attempts.last()
    }

    /// The text that both queues store, at most 3 KiB:
    /// `1@1735830138123=503,2@1735830143127=timeout`, with times in Unix milliseconds, and `+7`
    /// where seven attempts are left out.
    pub(crate) fn to_text(&self) -> String {
        let (first, left_out, last) = self.parts();
        let one = |a: &FailedAttempt| {
            let at = a.at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
            format!("{}@{at}={}", a.number, a.result)
        };
        let gap = (left_out > 0).then(|| format!("+{left_out}"));
        first.iter().map(one).chain(gap).chain(last.iter().map(one)).collect::<Vec<_>>().join(",")
    }

    /// Reads the stored text and skips what it cannot read: the log is for people, and must not
    /// keep its batch from being sent.
    pub(crate) fn from_text(text: &str) -> Self {
        let mut log = Self::default();
        for part in text.split(',') {
            if let Some(left_out) = part.strip_prefix('+').and_then(|n| n.parse::<u32>().ok()) {
                log.left_out = log.left_out.saturating_add(left_out);
            } else if let Some(attempt) = Self::attempt(part) {
                log.add(attempt);
            }
        }
        // Without attempts, none can be left out.
        if log.is_empty() { Self::default() } else { log }
    }

    fn attempt(text: &str) -> Option<FailedAttempt> {
        let (number, rest) = text.split_once('@')?;
        let (at, result) = rest.split_once('=')?;
        // Times that RFC 3339 can write: a later one could not be shown.
        let at = at.parse().ok().filter(|ms| *ms < 253_402_300_800_000)?;
        let is_name = !result.is_empty()
            && result.len() <= Self::MAX_NAME
            && result.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
        let result = match result.parse() {
            Ok(status) => AttemptResult::Status(status),
            Err(_) => AttemptResult::Failure(is_name.then(|| result.to_owned())?),
        };
        Some(FailedAttempt {
            number: number.parse().ok()?,
            at: SystemTime::UNIX_EPOCH + Duration::from_millis(at),
            result,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(number: u32, result: AttemptResult) -> FailedAttempt {
        FailedAttempt {
            number,
            at: SystemTime::UNIX_EPOCH
                + Duration::from_millis(u64::from(number) + 1_735_830_138_000),
            result,
        }
    }

    #[test]
    fn the_first_and_the_last_attempts_are_kept_however_many_there_are() {
        let mut log = AttemptLog::default();
        for n in 1..=50 {
            log.add(attempt(n, AttemptResult::Status(503)));
        }
        assert_eq!((log.parts().1, log.parts().2.len()), (0, 45));
        for n in 51..=u32::from(u16::MAX) {
            log.add(attempt(n, AttemptResult::Failure("address_blocked".to_owned())));
        }
        let (first, left_out, last) = log.parts();
        let numbers =
            |attempts: &[FailedAttempt]| attempts.iter().map(|a| a.number).collect::<Vec<_>>();
        assert_eq!(numbers(first), [1, 2, 3, 4, 5]);
        assert_eq!(left_out, 65_535 - 50);
        assert_eq!(numbers(last), (65_491..=65_535).collect::<Vec<_>>());
        assert!(log.to_text().len() < 3 * 1024, "{} bytes", log.to_text().len());
        assert_eq!(AttemptLog::from_text(&log.to_text()), log);
    }

    #[test]
    fn unreadable_parts_of_a_foreign_attempt_log_are_skipped() {
        let text = "1@1735830138001=503,,2@x=503,3@1735830138003=timeout,4@5=\u{1b}[2J,5@5,+x,6@5=A,7@253402300800000=500,+4294967295,+9,-1@5=503";
        let log = AttemptLog::from_text(text);
        let expected = [
            attempt(1, AttemptResult::Status(503)),
            attempt(3, AttemptResult::Failure("timeout".to_owned())),
        ];
        assert_eq!(log.parts(), (&expected[..], u32::MAX, &[][..]));
        assert_eq!(AttemptLog::from_text(""), AttemptLog::default());
        assert_eq!(AttemptLog::from_text("+7,x"), AttemptLog::default());
        let many: String = (1..100_000).map(|n| format!("{n}@1=500,")).collect();
        assert_eq!(
            AttemptLog::from_text(&many).attempts.len(),
            AttemptLog::FIRST + AttemptLog::LAST
        );
    }
}
