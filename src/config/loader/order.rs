//! `order` of a subscriber, and what it implies.

use crate::{
    config::{
        document::{Layer, Layers, Section, Value},
        reader::Reader,
        settings::{Backend, QueueConfig},
        subscriber::HttpPolicy,
    },
    policy::retry::{Exhausted, RetryPolicy},
};

/// Why a queue keeps no strict order, and the remedy; `None` if it does, or could not be read, which
/// is reported already.
pub(in crate::config) fn no_order(queue: Option<&QueueConfig>) -> Option<&'static str> {
    match queue?.backend {
        Backend::Embedded => None,
        Backend::Amqp(_) => Some(
            "is not possible in the queues of RabbitMQ, where a retry waits apart from the events; use the embedded queue, \
             with `[queue.intake]` if producers publish to RabbitMQ, or leave `order` out",
        ),
    }
}

pub(super) struct Order<'r, 'd> {
    pub(super) reader: &'r Reader<'d>,
    pub(super) forbidden: Option<&'static str>,
}

impl Order<'_, '_> {
    /// Whether it is strict.
    pub(super) fn read(&self, section: &Section<'_>) -> Option<bool> {
        let Some(value) = section.get("order") else { return Some(false) };
        let found = self.reader.one_of(Some(value.clone()), &[("strict", true)]);
        if let Some(why) = self.forbidden {
            self.reader.report(&value, why);
            return None;
        }
        found
    }

    /// One request at a time, and none of history beside it.
    pub(super) fn http(
        &self,
        http: Option<HttpPolicy>,
        group: &Layers<'_>,
        start_from: Option<&Value<'_>>,
    ) -> Option<HttpPolicy> {
        if let Some(value) = start_from {
            let why = "cannot be combined with order = \"strict\": what history has would come beside new events; leave one of the two out";
            self.reader.report(value, why);
            return None;
        }
        let http = http?;
        if group.layer("concurrency") == Layer::Own && http.concurrency > 1 {
            if let Some(value) = group.get("concurrency") {
                let why = "must be 1 with order = \"strict\"; leave it out, or leave `order` out";
                self.reader.report(&value, why);
            }
            return None;
        }
        Some(HttpPolicy { concurrency: 1, ..http })
    }

    /// No batch is given up.
    pub(super) fn retry(
        &self,
        retry: Option<RetryPolicy>,
        group: &Layers<'_>,
    ) -> Option<RetryPolicy> {
        let retry = retry?;
        if group.layer("on_exhausted") == Layer::Own
            && retry.on_exhausted() == Exhausted::DeadLetter
        {
            if let Some(value) = group.get("on_exhausted") {
                let why = "must be \"pause\" with order = \"strict\": what follows a batch cannot pass it by; leave it out, or leave `order` out";
                self.reader.report(&value, why);
            }
            return None;
        }
        Some(retry.pausing())
    }
}
