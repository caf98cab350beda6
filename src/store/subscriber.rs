//! Subscribers made over the API, as the store keeps them.

use std::time::SystemTime;

use crate::{crypto::secret::Secret, delivery::SubscriberName};

/// When something was done, and with whose token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    pub at: SystemTime,
    /// The name of the token.
    pub by: String,
}

/// A subscriber made over the API. It is sealed where it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredSubscriber {
    pub name: SubscriberName,
    /// Never used twice for a name, also not after it was deleted and made again. Below 2⁵³.
    pub version: u64,
    /// JSON: the keys of a `[[subscriber]]`.
    pub document: Secret,
    pub created: Stamp,
    pub changed: Stamp,
}

/// A subscriber that the store has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeptSubscriber {
    Open(StoredSubscriber),
    /// It cannot be opened: its key is not there, or it is damaged. It is not removed; a change that
    /// names its version replaces it.
    Locked {
        name: SubscriberName,
        version: u64,
        /// What is wrong, with the remedy.
        why: String,
    },
}

impl KeptSubscriber {
    pub const fn name(&self) -> &SubscriberName {
        match self {
            Self::Open(StoredSubscriber { name, .. }) | Self::Locked { name, .. } => name,
        }
    }

    pub const fn version(&self) -> u64 {
        match self {
            Self::Open(StoredSubscriber { version, .. }) | Self::Locked { version, .. } => *version,
        }
    }
}

/// The subscribers to go on with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeptSubscribers {
    /// In the order of their names.
    pub all: Vec<KeptSubscriber>,
    /// Those may be missing here that were not deleted: what is kept cannot be read whole. Nobody
    /// who is missing may be removed.
    pub may_lack: bool,
    /// What is wrong with them, each in a sentence with its remedy.
    pub problems: Vec<String>,
}

/// The result of a change of a subscriber.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    Stored(StoredSubscriber),
    /// Nothing has changed: its version is another one, or there is none.
    Differs(Option<u64>),
}

/// The result of a deletion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deleted {
    Yes,
    /// Nothing has changed: its version is another one, or there is none.
    Differs(Option<u64>),
}

/// The version after another one. A clock that goes on makes it one that no store has given before,
/// also if all that was kept is lost.
pub(super) fn next_version(before: Option<u64>, now: SystemTime) -> u64 {
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
    before.map_or(1, |before| before + 1).max(u64::try_from(now).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_version_is_later_than_the_one_before_also_if_the_clock_is_set_back() {
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        assert_eq!(next_version(None, at(1000)), 1000);
        assert_eq!(next_version(Some(1000), at(1000)), 1001);
        assert_eq!(next_version(Some(1001), at(5)), 1002);
        assert_eq!(next_version(None, at(0)), 1);
        assert_eq!(next_version(Some(1002), at(2000)), 2000);
    }
}
