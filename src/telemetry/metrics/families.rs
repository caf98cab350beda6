//! The families of metrics: each has a series for each set of its labels.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    time::SystemTime,
};

use prometheus_client::{
    encoding::{EncodeLabelSet, LabelSetEncoder},
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        gauge::Gauge,
        histogram::Histogram,
    },
    registry::Registry,
};

use super::definitions::{ALL, Kind};

/// A set of labels, which all series that have it share: with ten thousand subscribers there are
/// half a million series.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Labels(Arc<[(&'static str, String)]>);

impl Labels {
    fn of(labels: &[(&'static str, &str)]) -> Self {
        Self(labels.iter().map(|(label, value)| (*label, (*value).to_owned())).collect())
    }

    fn are(&self, labels: &[(&'static str, &str)]) -> bool {
        self.0.iter().map(|(label, value)| (*label, value.as_str())).eq(labels.iter().copied())
    }
}

impl EncodeLabelSet for Labels {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        (&*self.0).encode(encoder)
    }
}

pub(super) type Float = Gauge<f64, AtomicU64>;

/// The upper bounds of a histogram's buckets.
#[derive(Debug, Clone, Copy)]
struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

const SECONDS: Buckets =
    Buckets(&[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]);
/// A retry can be days later.
const LONG_SECONDS: Buckets = Buckets(&[
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 43_200.0, 259_200.0,
]);
const EVENTS: Buckets = Buckets(&[1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0]);
const BYTES: Buckets = Buckets(&[
    256.0,
    1024.0,
    4096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    12_582_912.0,
]);

impl Buckets {
    fn of(name: &str) -> Self {
        match name {
            "batch_events" => EVENTS,
            "batch_bytes" => BYTES,
            "attempt_duration_seconds" => SECONDS,
            _ => LONG_SECONDS,
        }
    }
}

/// The families of all metrics, by name.
#[derive(Debug, Default)]
pub(super) struct Families {
    counters: BTreeMap<&'static str, Family<Labels, Counter>>,
    gauges: BTreeMap<&'static str, Family<Labels, Float>>,
    histograms: BTreeMap<&'static str, Family<Labels, Histogram, Buckets>>,
    /// The series of each subscriber, which end with it.
    series: Mutex<BTreeMap<String, Vec<(&'static str, Labels)>>>,
}

impl Families {
    /// Those of all definitions but of one that has no labels and is no family.
    pub(super) fn registered(registry: &mut Registry, but: &str) -> Self {
        let mut families = Self::default();
        for d in ALL.iter().filter(|d| d.name != but) {
            match d.kind {
                Kind::Counter => {
                    let family = Family::default();
                    registry.register(d.name, d.help, family.clone());
                    families.counters.insert(d.name, family);
                }
                Kind::Gauge => {
                    let family = Family::default();
                    registry.register(d.name, d.help, family.clone());
                    families.gauges.insert(d.name, family);
                }
                Kind::Histogram => {
                    let family = Family::new_with_constructor(Buckets::of(d.name));
                    registry.register(d.name, d.help, family.clone());
                    families.histograms.insert(d.name, family);
                }
            }
        }
        families
    }

    /// Ends the series of a subscriber.
    pub(super) fn forget(&self, subscriber: &str) {
        for (name, labels) in self.series().remove(subscriber).unwrap_or_default() {
            // In the one map that has it.
            self.counters.get(name).map(|f| f.remove(&labels));
            self.gauges.get(name).map(|f| f.remove(&labels));
            self.histograms.get(name).map(|f| f.remove(&labels));
        }
    }

    /// The gauges of a family, in place of those before.
    pub(super) fn set_all<'a>(
        &self,
        name: &'static str,
        label: &'static str,
        values: impl IntoIterator<Item = (&'a str, f64)>,
    ) {
        let family = &self.gauges[name];
        family.clear();
        for (of, value) in values {
            family.get_or_create_owned(&Labels::of(&[(label, of)])).set(value);
        }
    }

    fn series(&self) -> MutexGuard<'_, BTreeMap<String, Vec<(&'static str, Labels)>>> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn labels(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Labels {
        debug_assert!(
            ALL.iter().any(|d| d.name == name && d.labels.iter().eq(labels.iter().map(|(l, _)| l))),
            "{name} is not defined with {labels:?}"
        );
        let [("subscriber", subscriber), ..] = labels else { return Labels::of(labels) };
        let mut series = self.series();
        let own = series.entry((*subscriber).to_owned()).or_default();
        let known = own.iter().find(|(_, set)| set.are(labels)).map(|(_, set)| set.clone());
        let set = known.unwrap_or_else(|| Labels::of(labels));
        if !own.iter().any(|(n, s)| *n == name && *s == set) {
            own.push((name, set.clone()));
        }
        set
    }

    pub(super) fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        self.counters[name].get_or_create_owned(&self.labels(name, labels))
    }

    pub(super) fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Float {
        self.gauges[name].get_or_create_owned(&self.labels(name, labels))
    }

    pub(super) fn histogram(
        &self,
        name: &'static str,
        labels: &[(&'static str, &str)],
    ) -> Histogram {
        self.histograms[name].get_or_create_owned(&self.labels(name, labels))
    }
}

/// Unix seconds.
pub(super) fn unix(time: SystemTime) -> f64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
