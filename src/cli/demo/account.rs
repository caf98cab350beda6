//! What became of each event, and whether that is a loss.

use std::collections::{BTreeMap, BTreeSet};

use crate::{cli::failed::Failed, store::Store, wording::counted};

/// The operations after which events of a subscriber may be neither delivered nor in its dead
/// letters when the demo ends. Of the others, such as a test, none is the reason for that.
const LEAVE_EVENTS: [&str; 6] = [
    "pause",
    "replay_dead",
    "purge_dead",
    "change_subscriber",
    "delete_subscriber",
    "rotate_secret",
];

/// The subscribers whose events may be left behind, by what was done in the console or over the API.
pub(super) async fn acted_on(store: &impl Store) -> BTreeSet<String> {
    let (mut subjects, mut before) = (BTreeSet::new(), None);
    // Without the record nothing excuses a loss.
    while let Ok(page) = store.operations(before, 100).await {
        let leave = page.rows.into_iter().filter(|o| LEAVE_EVENTS.contains(&o.new.what));
        subjects.extend(leave.map(|o| o.new.subject));
        before = page.next;
        if before.is_none() {
            break;
        }
    }
    subjects
}

/// What became of the published events at one receiver. Each is counted once, and no other is:
/// replays and other producers may have added some.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) delivered: usize,
    /// Of the delivered ones, those that were accepted more than once.
    pub(super) repeated: usize,
    /// In the dead letters, and never accepted.
    pub(super) dead: usize,
    pub(super) lost: Vec<String>,
}

impl Account {
    /// `accepted`: how often each event was; `dead`: the events in the dead letters.
    pub(super) fn of(
        published: &BTreeSet<String>,
        accepted: &BTreeMap<String, usize>,
        dead: &BTreeSet<String>,
    ) -> Self {
        let mut account = Self { delivered: 0, repeated: 0, dead: 0, lost: Vec::new() };
        for id in published {
            match accepted.get(id) {
                Some(times) => {
                    account.delivered += 1;
                    account.repeated += usize::from(*times > 1);
                }
                None if dead.contains(id) => account.dead += 1,
                None => account.lost.push(id.clone()),
            }
        }
        account
    }
}

/// The last word on the subscribers that miss events, with how many each: `None` if there are none.
///
/// # Errors
/// Events are missing, and nothing was done that may have left them behind.
pub(super) fn ended(
    missing: &[(&str, usize)],
    acted_on: &BTreeSet<String>,
) -> Result<Option<String>, Failed> {
    let sum = |is_lost: bool| {
        let of = missing.iter().filter(|(name, _)| is_lost != acted_on.contains(*name));
        of.map(|(_, events)| events).sum::<usize>()
    };
    let said =
        |events: usize| format!("{} not accounted for", counted(events, "deliver(y is|ies are)"));
    match (sum(true), sum(false)) {
        (0, 0) => Ok(None),
        (0, left) => {
            let why = "after what was done in the console or over the API";
            Ok(Some(format!("{}, {why}.", said(left))))
        }
        (lost, _) => Err(Failed::Runtime(said(lost))),
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::store::{NewOperation, fake::FakeStore};

    fn ids(all: &[&str]) -> BTreeSet<String> {
        all.iter().map(|id| (*id).to_owned()).collect()
    }

    #[test]
    fn each_published_event_is_counted_once_and_no_other_is() {
        let accepted: BTreeMap<String, usize> = [("a", 1), ("b", 2), ("c", 1), ("another's", 1)]
            .map(|(id, n)| (id.to_owned(), n))
            .into();
        // `c` is both: its receiver accepted it, and the answer was lost.
        let dead = ids(&["c", "d", "another's too"]);
        let account = Account::of(&ids(&["a", "b", "c", "d", "e"]), &accepted, &dead);
        let expected = Account { delivered: 3, repeated: 1, dead: 1, lost: vec!["e".to_owned()] };
        assert_eq!(account, expected);
    }

    #[tokio::test]
    async fn only_what_may_leave_events_behind_excuses_those_of_its_subscriber() {
        let acted = async |what: &[(&'static str, &str)]| {
            let store = FakeStore::default();
            for (what, subject) in what {
                let operation = NewOperation {
                    at: SystemTime::UNIX_EPOCH,
                    by: "demo".to_owned(),
                    what,
                    subject: (*subject).to_owned(),
                    details: String::new(),
                };
                store.add_operation(operation).await.expect("it is open");
            }
            acted_on(&store).await
        };
        assert!(NewOperation::NAMES.iter().filter(|n| LEAVE_EVENTS.contains(n)).count() == 6);
        let tested = acted(&[("test", "crm"), ("retry", "crm"), ("replay", "crm")]).await;
        assert!(ended(&[("siem", 0), ("crm", 2)], &tested).is_err());
        assert_eq!(ended(&[("siem", 0), ("crm", 0)], &tested).expect("no loss"), None);

        let paused = acted(&[("pause", "crm"), ("test", "siem")]).await;
        let said = ended(&[("siem", 0), ("crm", 2)], &paused).expect("no loss").expect("said");
        assert!(said.starts_with("2 deliveries are not accounted for, after what"), "{said}");
        let lost = ended(&[("siem", 1), ("crm", 2)], &paused).expect_err("a loss at another");
        assert!(lost.to_string().contains("1 delivery is not accounted for"), "{lost}");
        // Many others after it do not hide it.
        let mut many = vec![("purge_dead", "siem")];
        many.extend([("test", "crm"); 150]);
        assert_eq!(acted(&many).await, ids(&["siem"]));
    }
}
