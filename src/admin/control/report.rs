//! What is reported of subscribers: their state, their configuration, and where it comes from.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

use serde_json::Value;

use super::Control;
use crate::{
    admin::{
        answer::Refusal,
        guard::Caller,
        query::{FromQuery, Parameters},
        view::{
            self, Circuit, Lane, LastError, Overview, Paused, QueueState, Removed, State, Time,
        },
    },
    clock,
    config::{self, Subscriber, managed::Document},
    delivery::{Depth, PauseState},
    event::Tenant,
    queue::Queue,
    store::Store,
    supervisor::managed::Managed,
    telemetry::{
        lane_event,
        status::{self, Polled, View},
    },
};

/// The most subscribers that a query may ask for at once; without a limit it is all of them.
const MAX_SELECTED: usize = 10_000;

impl<Q: Queue, S: Store> Control<Q, S> {
    pub(in crate::admin) async fn overview(&self) -> Overview {
        self.selected(&Which::default()).await
    }

    /// The same with some of the subscribers alone.
    pub(in crate::admin) async fn selected(&self, which: &Which) -> Overview {
        let (polled, history) = tokio::join!(self.board.depths(clock::now()), self.history.read());
        let config = self.reloader.config();
        let managed = self.reloader.managed();
        let view = |s: &Arc<Subscriber>| self.subscriber_view(s, &managed, polled.as_ref());
        let named = config.subscribers.iter().filter(|s| which.may_be(&s.name, s.tenant.as_ref()));
        let mut named: Vec<_> = named.collect();
        // Views of very many take long.
        if let Some(limit) = which.limit.filter(|_| which.state.is_none()) {
            named.sort_by(|a, b| a.name.cmp(&b.name));
            named.truncate(limit + 1);
        }
        let mut subscribers: Vec<_> =
            named.into_iter().map(view).chain(self.inactive(&managed)).collect();
        let next = which.select(&mut subscribers);
        let depths = polled.as_ref().and_then(|l| l.depths.as_ref().ok());
        let removed = depths.iter().flat_map(|d| &d.removed);
        let removed = removed.filter(|(name, _)| managed.get(name).is_none());
        Overview {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            phase: self.phase.borrow().name().to_owned(),
            config: view::Configuration {
                file: config.path.display().to_string(),
                problem: self.reloader.problem(),
                held: self.reloader.held().map(view::HeldRemovals::from),
            },
            queue: QueueState {
                up: self.queue.is_reachable(),
                looked_at: polled.as_ref().map(|l| Time(l.at)),
                error: self.board.queue_error(),
                delayed_retries: depths.and_then(|d| d.delayed),
                orphans: depths.map(|d| d.orphans),
            },
            history: Some(history),
            subscribers,
            next,
            removed: removed.map(|(name, depth)| Removed::new(name, *depth)).collect(),
        }
    }

    /// The subscribers that were made over the API, and do not run.
    fn inactive(&self, managed: &Managed) -> Vec<view::Subscriber> {
        let of_files = self.reloader.of_files().names();
        let all = managed.iter().filter(|(name, _)| !of_files.contains(*name));
        let inactive = all.filter_map(|(name, entry)| {
            let why = entry.checked.as_ref().err()?.clone();
            Some(view::Subscriber {
                subscriber: name.to_string(),
                state: State::Inactive,
                origin: Some(view::Origin::of_store(&entry.kept)),
                tenant: entry.document.as_ref().and_then(tenant_of),
                why: Some(why),
                lane: None,
            })
        });
        inactive.collect()
    }

    /// A subscriber that runs.
    pub(in crate::admin) async fn one(&self, name: &str) -> Result<view::Subscriber, Refusal> {
        let subscriber = self.subscriber(name)?;
        let (managed, polled) = (self.reloader.managed(), self.board.depths(clock::now()).await);
        Ok(self.subscriber_view(&subscriber, &managed, polled.as_ref()))
    }

    /// A subscriber with its configuration, as far as the caller may see it.
    pub(in crate::admin) async fn details(
        &self,
        name: &str,
        caller: &Caller,
    ) -> Result<view::SubscriberDetails, Refusal> {
        let managed = self.reloader.managed();
        let entry = managed.get(name);
        let inactive = self.inactive(&managed).into_iter().find(|s| s.subscriber == name);
        let (status, settings) = match inactive {
            Some(status) => (status, None),
            None => {
                let mut settings = config::managed::settings(self.subscriber(name)?.as_ref());
                if let Some(keys) = settings.as_object_mut().filter(|_| !caller.sees_endpoints()) {
                    keys.retain(|key, _| key != "headers" && key != "auth" && key != "tls");
                }
                (self.one(name).await?, Some(settings))
            }
        };
        let is_of_file = matches!(status.origin, Some(view::Origin::File { .. }));
        let shadows = entry.filter(|_| is_of_file);
        let document = entry.filter(|_| caller.sees_endpoints());
        Ok(view::SubscriberDetails {
            status,
            settings,
            document: document.and_then(|e| Some(e.document.as_ref()?.redacted())),
            shadows: shadows.map(|entry| view::Origin::of_store(&entry.kept)),
        })
    }

    /// What a lane does. A pause counts from when it is recorded, and so does its end: the lane may not
    /// have noticed it yet.
    fn lane_view(&self, subscriber: &Subscriber) -> Option<View> {
        let mut view = self.board.view(&subscriber.name, clock::instant(), clock::now())?;
        let is_paused = matches!(view.state, status::State::Paused(_));
        let known = self.queue.pause_states();
        match known.borrow().as_ref().and_then(|all| all.get(&subscriber.name)) {
            Some(PauseState::Paused(pause)) if !is_paused => {
                view.state = status::State::Paused(pause.clone());
            }
            Some(PauseState::Resumed { .. }) if is_paused && !subscriber.paused => {
                view.state = status::State::Ok;
            }
            _ => {}
        }
        Some(view)
    }

    fn subscriber_view(
        &self,
        subscriber: &Subscriber,
        managed: &Managed,
        polled: Option<&Polled>,
    ) -> view::Subscriber {
        let name = &subscriber.name;
        let depths = polled.and_then(|l| l.depths.as_ref().ok());
        let depth = depths.and_then(|d| d.subscribers.get(name)).copied();
        // RabbitMQ counts the delayed retries of all subscribers together.
        let counted_per_subscriber = depths.is_some_and(|d| d.delayed.is_none());
        let view = self.lane_view(subscriber);
        view::Subscriber {
            subscriber: name.to_string(),
            state: view.as_ref().map_or(State::Starting, |view| State::from(&view.state)),
            origin: view::Origin::of_file(&subscriber.origin)
                .or_else(|| managed.get(name).map(|entry| view::Origin::of_store(&entry.kept))),
            tenant: subscriber.tenant.as_ref().map(Tenant::to_string),
            why: None,
            lane: view.map(|view| lane(view, depth, counted_per_subscriber)),
        }
    }

    /// Where the values of a subscriber that was made over the API come from, by their keys. Others
    /// are defaults. `None` if it is one of a file.
    pub(in crate::admin) fn origins_of_api(
        &self,
        configured: &Subscriber,
        found: &view::Subscriber,
    ) -> Option<BTreeMap<&'static str, String>> {
        let origin = found.origin.as_ref().filter(|o| matches!(o, view::Origin::Api { .. }))?;
        let managed = self.reloader.managed();
        let document = managed.get(&found.subscriber).and_then(|entry| entry.document.as_ref());
        let is_there = |key: &str| {
            let (group, rest) = key.split_once('.').unwrap_or((key, ""));
            let value = document.and_then(|document| document.get(group));
            value.is_some_and(|value| rest.is_empty() || value.get(rest).is_some())
        };
        let keys = config::subscriber_values(configured).map(|(key, _)| key);
        Some(keys.filter(|key| is_there(key)).map(|key| (key, origin.to_string())).collect())
    }
}

/// Selects subscribers. All that is set has to hold.
#[derive(Debug, Default)]
pub(in crate::admin) struct Which {
    tenant: Option<Tenant>,
    state: Option<State>,
    /// Those whose names come after this one, in the order of their names.
    after: Option<String>,
    limit: Option<usize>,
}

impl FromQuery for Which {
    fn from_query(given: &mut Parameters) -> Self {
        let state = |text: &str| {
            let found = State::KNOWN.into_iter().find(|state| state.name() == text);
            found.ok_or_else(|| {
                let names: Vec<_> = State::KNOWN.iter().map(|s| s.name().to_owned()).collect();
                format!("must be one of {}", names.join(", "))
            })
        };
        Self {
            tenant: given.take("tenant", str::parse),
            state: given.take("state", state),
            after: given.take("after", |text| Ok::<_, Infallible>(text.to_owned())),
            limit: given.number("limit", 1..=MAX_SELECTED),
        }
    }
}

impl Which {
    /// The same, with this limit where it has none.
    pub(in crate::admin) fn at_most(self, limit: usize) -> Self {
        Self { limit: self.limit.or(Some(limit)), ..self }
    }

    /// Whether one with this name and tenant may be among them.
    fn may_be(&self, name: &str, tenant: Option<&Tenant>) -> bool {
        (self.tenant.is_none() || self.tenant.as_ref() == tenant)
            && self.after.as_ref().is_none_or(|after| name > after.as_str())
    }

    /// Returns the name after which the list goes on.
    fn select(&self, all: &mut Vec<view::Subscriber>) -> Option<String> {
        all.retain(|s| {
            let tenant = s.tenant.as_deref().and_then(Tenant::try_new);
            self.may_be(&s.subscriber, tenant.as_ref())
                && self.state.as_ref().is_none_or(|state| s.state == *state)
        });
        if self.after.is_some() || self.limit.is_some() {
            all.sort_by(|a, b| a.subscriber.cmp(&b.subscriber));
        }
        let limit = self.limit.filter(|limit| all.len() > *limit)?;
        all.truncate(limit);
        all.last().map(|s| s.subscriber.clone())
    }
}

/// The tenant in a document.
fn tenant_of(document: &Document) -> Option<String> {
    document.get("tenant").and_then(Value::as_str).map(str::to_owned)
}

pub(super) fn paused(view: &View) -> Option<Paused> {
    match &view.state {
        status::State::Paused(pause) => Some(pause.clone().into()),
        _ => None,
    }
}

fn lane(view: View, depth: Option<Depth>, counted_per_subscriber: bool) -> Lane {
    let now = clock::now();
    let until = match view.circuit {
        lane_event::Circuit::Open { until } => Some(Time(until)),
        lane_event::Circuit::Closed | lane_event::Circuit::HalfOpen => None,
    };
    let last_error = view.last_error.as_ref().map(|e| LastError {
        at: Time(e.at),
        failure: e.failure.name().to_owned(),
        status: e.status,
        cause: e.cause.clone(),
    });
    let scheduled = view.retries_scheduled as u64;
    let in_retry =
        depth.map(|d| if counted_per_subscriber { d.batches() } else { d.retries + scheduled });
    let thousandths = |n: u64| n as f64 / 1000.0;
    Lane {
        paused: paused(&view),
        circuit: Circuit { state: view.circuit.state().name().to_owned(), until },
        held_until: match view.state {
            status::State::Held { until } => Some(Time(until)),
            _ => None,
        },
        waiting_since: match view.state {
            status::State::Waiting { since } => Some(Time(since)),
            _ => None,
        },
        backlog: depth.map(|d| d.events),
        in_hand: view.unsettled,
        in_retry,
        next_retry_at: view.next_retry_at.map(Time),
        dead: depth.map(|d| d.dead),
        delivered: view.delivered,
        delivered_per_s: thousandths(view.delivered_per_s_milli),
        success_rate: view.success_milli.map(thousandths),
        p50_s: view.p50.map(seconds),
        p99_s: view.p99.map(seconds),
        oldest_event_at: view.oldest_event_at.map(Time),
        oldest_event_age_s: view.oldest_event_at.map(|at| seconds(Time(at).ago(now))),
        last_delivered_at: view.last_delivered_at.map(Time),
        compression_refused: view.compression_refused,
        last_error,
        queue_error: match view.state {
            status::State::QueueFails(why) => Some(why),
            _ => None,
        },
    }
}

/// Seconds, to the millisecond.
fn seconds(d: Duration) -> f64 {
    d.as_millis() as f64 / 1000.0
}
