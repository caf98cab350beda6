//! Whether history is kept, for status, health and metrics. Nothing of it takes the daemon out of
//! service: deliveries do not need history.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use tokio::time::timeout;

use super::view::{HistoryHealth, Time};
use crate::{
    store::{HistoryState, Reach, Store, StoreState},
    telemetry::status::Board,
};

/// The longest time for which a status waits for the store.
const READ_TIMEOUT: Duration = Duration::from_millis(500);

/// Reads it. Clones share it.
#[derive(Clone)]
pub(super) struct Health {
    board: Board,
    state: Arc<dyn Fn() -> StoreState + Send + Sync>,
    reach: Arc<dyn Fn() -> BoxFuture<'static, Option<Reach>> + Send + Sync>,
}

impl Health {
    pub(super) fn new<S: Store>(store: &S, board: Board) -> Self {
        let (state, reach) = (store.clone(), store.clone());
        Self {
            board,
            state: Arc::new(move || state.condition()),
            reach: Arc::new(move || {
                let store = reach.clone();
                Box::pin(async move { timeout(READ_TIMEOUT, store.reach()).await.ok()?.ok() })
            }),
        }
    }

    /// Whether history is kept, and how far it reaches if it can be read.
    pub(super) async fn read(&self) -> HistoryHealth {
        let reach = (self.reach)().await;
        let (state, why, warning) = self.state();
        let reach = reach.as_ref();
        HistoryHealth {
            state: state.to_owned(),
            why,
            warning,
            events_from: reach.and_then(|r| r.events_from).map(Time),
            deliveries_from: reach.and_then(|r| r.deliveries_from).map(Time),
            begins_there: reach.map(|r| r.why.clone()),
            last_event_at: reach.and_then(|r| r.last).map(|(_, at)| Time(at)),
            bytes: reach.map(|r| r.bytes),
        }
    }

    /// What is wrong with history now, in a sentence.
    pub(super) fn trouble(&self) -> Option<String> {
        let (state, why, warning) = self.state();
        match state {
            "off" => warning,
            _ => why.map(|why| format!("history is {state}: {why}")).or(warning),
        }
    }

    /// Sets the metrics of history; none where it is off.
    pub(super) async fn measure(&self) {
        let HistoryHealth { state, events_from, last_event_at, bytes, .. } = self.read().await;
        if state == "off" {
            return;
        }
        let metrics = self.board.metrics();
        metrics.set_history_up(state == "kept");
        if let Some(bytes) = bytes {
            let (first, last) = (events_from.map(|at| at.0), last_event_at.map(|at| at.0));
            metrics.set_history_extent(first, last, bytes);
        }
    }

    /// The state's name, why history is not kept whole, and what is wrong besides.
    fn state(&self) -> (&'static str, Option<String>, Option<String>) {
        let StoreState { history, warning } = (self.state)();
        let missing = self.board.history_error();
        let (state, why) = match history {
            HistoryState::Off(why) => ("off", Some(why)),
            HistoryState::Opening => ("opening", None),
            HistoryState::Closed => ("away", Some("it is closed".to_owned())),
            HistoryState::Away(why) => ("away", Some(why)),
            HistoryState::Stopped(why) => ("stopped", Some(why)),
            HistoryState::Open if missing.is_some() => ("incomplete", missing),
            HistoryState::Open => ("kept", None),
        };
        (state, why, warning)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock,
        store::{NewRow, StoreError, fake::FakeStore},
        telemetry::{
            metrics::Metrics,
            troubles::{Harms, Troubles},
        },
    };

    #[tokio::test]
    async fn each_state_has_its_name_its_reason_and_its_metric() {
        let (store, board) = (FakeStore::default(), Board::new(Metrics::new(clock::now())));
        let troubles = tokio::sync::watch::Sender::new(Troubles::default());
        board.follow(troubles.subscribe());
        let health = Health::new(&store, board.clone());
        let event = NewRow {
            number: None,
            at: std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(77),
            event_type: "a".to_owned(),
            message_id: None,
            body: "{}".into(),
            redelivered: false,
            tenant: None,
        };
        store.append(vec![event]).await.expect("appends");
        let why = || "a reason".to_owned();
        let off = HistoryState::Off(why());
        for (state, name, trouble) in [
            (off, "off", None),
            (HistoryState::Opening, "opening", None),
            (HistoryState::Open, "kept", None),
            (HistoryState::Stopped(why()), "stopped", Some("history is stopped: a reason")),
            (HistoryState::Away(why()), "away", Some("history is away: a reason")),
        ] {
            store.memory().state = StoreState { history: state, warning: None };
            let read = health.read().await;
            assert_eq!(read.state, name);
            assert_eq!(health.trouble().as_deref(), trouble, "{name}");
            health.measure().await;
            let text = board.metrics().expose();
            let up = text.lines().find_map(|l| l.strip_prefix("hooktrail_history_up "));
            let expected = match name {
                "off" => None,
                "kept" => Some("1.0"),
                _ => Some("0.0"),
            };
            assert_eq!(up, expected, "{name}");
        }
        let off = HistoryState::Off(why());
        store.memory().state = StoreState { history: off, warning: Some("damaged".to_owned()) };
        assert_eq!(health.trouble().as_deref(), Some("damaged"), "it has the subscribers");
        store.memory().state =
            StoreState { history: HistoryState::Open, warning: Some("damaged".to_owned()) };
        assert_eq!(health.trouble().as_deref(), Some("damaged"));
        let read = health.read().await;
        assert_eq!((read.state.as_str(), read.warning.as_deref()), ("kept", Some("damaged")));
        let at = Some("1970-01-01T00:01:17.000Z".to_owned());
        assert_eq!(read.events_from.map(|at| at.to_string()), at);
        let text = board.metrics().expose();
        for line in [
            "hooktrail_history_first_event_timestamp_seconds 77.0",
            "hooktrail_history_last_event_timestamp_seconds 77.0",
            "hooktrail_history_size_bytes 0.0",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        troubles.send_modify(|all| {
            all.begins("history", Harms::History, "unbound".to_owned());
        });
        let read = health.read().await;
        assert_eq!((read.state.as_str(), read.why.as_deref()), ("incomplete", Some("unbound")));
        store.memory().away = Some(StoreError::away("away"));
        let read = health.read().await;
        assert!(read.events_from.is_none() && read.bytes.is_none());
    }
}
