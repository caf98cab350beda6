//! The receivers of a round, and the moods they have.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::{
    front::{Front, Manners},
    proxy::Proxy,
    support::{
        daemon::SECRET,
        receiver::{self, Answer, Receiver, Request, status},
    },
};

/// Where the queue knows tenants: the place of an event's, as a table.
pub(crate) const TENANT: &str = "{ pointer = \"/actor/id\" }";

/// The tenant of event `n`, one of three.
pub(crate) fn tenant_of(n: u64) -> u64 {
    783 + n % 3
}

pub(crate) fn event(n: u64) -> String {
    receiver::event(n).replacen("\"id\":783", &format!("\"id\":{}", tenant_of(n)), 1)
}

/// The behaviour of a receiver.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Mood {
    /// Shares of the requests.
    fails: f64,
    hangs: f64,
    /// Answers 410.
    leaves: f64,
    /// Failures have `Retry-After`.
    asks_to_wait: f64,
    /// More events than that are too many in one request.
    most: usize,
    /// Refuses batches with an event whose number leaves this remainder divided by 101.
    refuses: Option<u64>,
    /// Fails at batches with an event whose number leaves this remainder divided by [`POISON`], and
    /// at no other for that.
    poison: Option<u64>,
    /// The longest before an answer, in milliseconds.
    slow: u64,
}

const GOOD: Mood = Mood {
    fails: 0.0,
    hangs: 0.0,
    leaves: 0.0,
    asks_to_wait: 0.0,
    most: usize::MAX,
    refuses: None,
    poison: None,
    slow: 15,
};

/// One event of so many is poison: about one batch of seven.
const POISON: u64 = 61;

impl Mood {
    /// The requests of lines are under way side by side and end in another order than they began:
    /// what is open while others behind it are done must not be forgotten.
    fn good(kind: Kind) -> Self {
        match kind {
            Kind::Lines => Self { slow: 150, ..GOOD },
            Kind::Poisoned => Self { poison: Some(7), ..GOOD },
            Kind::Steady
            | Kind::Busy
            | Kind::Picky
            | Kind::Doomed
            | Kind::Leaving
            | Kind::Abrupt
            | Kind::Draining
            | Kind::Ordered => GOOD,
        }
    }

    /// One that a subscriber of this kind may have.
    fn bad(kind: Kind, rng: &mut StdRng) -> Self {
        let good = Self::good(kind);
        match kind {
            Kind::Steady | Kind::Abrupt | Kind::Draining => good,
            Kind::Busy => Self {
                fails: rng.random_range(0.0..0.5),
                slow: 120,
                asks_to_wait: 0.2,
                hangs: 0.03,
                ..good
            },
            Kind::Picky => Self {
                most: rng.random_range(3..20),
                refuses: Some(rng.random_range(0..101)),
                slow: 30,
                fails: 0.02,
                ..good
            },
            Kind::Lines => Self { fails: *pick(&[0.0, 0.2, 1.0], rng), hangs: 0.1, ..good },
            Kind::Doomed => Self { fails: rng.random_range(0.3..1.0), asks_to_wait: 0.1, ..good },
            Kind::Leaving => Self { leaves: 0.1, fails: 0.2, ..good },
            Kind::Poisoned => Self { fails: rng.random_range(0.0..0.2), ..good },
            Kind::Ordered => Self {
                most: rng.random_range(3..20),
                fails: rng.random_range(0.0..0.5),
                hangs: 0.01,
                leaves: 0.005,
                asks_to_wait: 0.1,
                refuses: rng.random_bool(0.2).then_some(rng.random_range(0..101)),
                ..good
            },
        }
    }

    /// Hangs can make the broker lose its patience with a consumer.
    pub(crate) fn hangs(&self) -> bool {
        self.hangs > 0.0
    }
}

pub(crate) fn pick<'a, T>(of: &'a [T], rng: &mut StdRng) -> &'a T {
    &of[rng.random_range(0..of.len())]
}

/// The purpose of a subscriber in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Accepts all: any failure with it is our own fault.
    Steady,
    /// Several requests at once, of which some fail.
    Busy,
    /// 413 and 400: batches are split.
    Picky,
    /// JSON Lines, over a network that fails.
    Lines,
    /// Gives up after two attempts; the breaker opens.
    Doomed,
    /// 410, and a pause when it has failed too often.
    Leaving,
    /// Fails at one kind of event as long as the round lasts, and accepts all others.
    Poisoned,
    /// Accepts all, by https; its connections do not end well.
    Abrupt,
    /// Accepts all that it processes, by HTTP/2; its connections end with requests unprocessed.
    Draining,
    /// Fails in all ways, and gets no event before an older one.
    Ordered,
}

impl Kind {
    /// Those of every queue. [`Ordered`](Self::Ordered) needs one that keeps the order.
    pub(crate) const ALL: [Self; 9] = [
        Self::Steady,
        Self::Busy,
        Self::Picky,
        Self::Lines,
        Self::Doomed,
        Self::Leaving,
        Self::Poisoned,
        Self::Abrupt,
        Self::Draining,
    ];

    pub(crate) fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// Whether all of its answers are successes and arrive: then no attempt of it fails, and
    /// nothing that it has accepted comes again.
    pub(crate) fn is_always_heard(self) -> bool {
        matches!(self, Self::Steady | Self::Abrupt | Self::Draining)
    }

    /// The tenant whose events alone it gets, where the queue knows tenants.
    pub(crate) fn tenant(self) -> Option<u64> {
        matches!(self, Self::Draining | Self::Doomed).then(|| tenant_of(0))
    }

    fn manners(self) -> Option<Manners> {
        match self {
            Self::Abrupt => Some(Manners::Abrupt),
            Self::Draining => Some(Manners::Draining),
            _ => None,
        }
    }

    /// The lines of its table that are its own.
    fn settings(self, concurrency: usize, max_events: usize) -> String {
        match self {
            Self::Steady => format!("{PATIENT}\nbatch = {{ max_events = 50 }}"),
            Self::Busy => format!("http = {{ concurrency = {concurrency} }}\nbatch = {{ max_events = {max_events} }}"),
            Self::Picky => "http = { concurrency = 2 }\nbatch = { max_events = 40 }".to_owned(),
            Self::Lines => {
                "format = \"jsonl\"\nhttp = { concurrency = 2, timeout = \"1s\" }\ncircuit_breaker = { failures = 3 }".to_owned()
            }
            Self::Doomed => "retry = { max_attempts = 2 }\ncircuit_breaker = { failures = 4 }".to_owned(),
            Self::Leaving => "retry = { max_attempts = 3, on_exhausted = \"pause\" }\nbatch = { max_wait = \"0s\" }".to_owned(),
            // So low that the batches that always fail would open it at once, if they alone
            // decided.
            Self::Poisoned => format!("{PATIENT}\nbatch = {{ max_events = 10 }}\ncircuit_breaker = {{ failures = 3 }}"),
            Self::Abrupt => PATIENT.to_owned(),
            Self::Ordered => "order = \"strict\"\nbatch = { max_events = 20 }".to_owned(),
            Self::Draining => format!("{PATIENT}\nbatch = {{ max_events = 10 }}").replace("http = {", "http = { concurrency = 4,"),
        }
    }
}

/// The timeout of a receiver that answers: long enough for a busy machine.
const PATIENT: &str = "http = { timeout = \"30s\", connect_timeout = \"20s\" }";

/// A subscriber's receiver, behind a network of its own.
pub(crate) struct Subscriber {
    pub(crate) kind: Kind,
    pub(crate) receiver: Receiver,
    pub(crate) network: Proxy,
    front: Option<Front>,
    mood: Arc<Mutex<Mood>>,
}

impl Subscriber {
    pub(crate) async fn start(kind: Kind, seed: u64) -> Self {
        let mood = Arc::new(Mutex::new(Mood::good(kind)));
        let (now, rng) = (mood.clone(), Mutex::new(StdRng::seed_from_u64(seed)));
        let receiver = Receiver::start(move |request, _| {
            answer(request, *now.lock().expect("a mood"), &mut rng.lock().expect("a die"))
        })
        .await;
        let address = receiver
            .url
            .trim_start_matches("http://")
            .split('/')
            .next()
            .expect("an address")
            .parse()
            .expect("an address");
        let front = match kind.manners() {
            Some(manners) => Some(Front::to(address, manners, seed).await),
            None => None,
        };
        let network = Proxy::to(vec![front.as_ref().map_or(address, |front| front.address)]).await;
        Self { kind, receiver, network, front, mood }
    }

    fn mood(&self, mood: Mood) {
        *self.mood.lock().expect("a mood") = mood;
    }

    pub(crate) fn good_mood(&self) {
        self.mood(Mood::good(self.kind));
    }

    /// Poison is accepted too.
    pub(crate) fn is_cured(&self) {
        self.mood(Mood { poison: None, ..Mood::good(self.kind) });
    }

    pub(crate) fn bad_mood(&self, rng: &mut StdRng) -> Mood {
        let mood = Mood::bad(self.kind, rng);
        self.mood(mood);
        mood
    }

    pub(crate) fn table(&self, concurrency: usize, max_events: usize, tenants: bool) -> String {
        let (name, port, settings) =
            (self.kind.name(), self.network.port, self.kind.settings(concurrency, max_events));
        let (scheme, tls) = match &self.front {
            Some(front) => {
                ("https", format!("tls = {{ ca_file = \"{}\" }}\n", front.ca_file().display()))
            }
            None => ("http", String::new()),
        };
        let tenant = self.kind.tenant().filter(|_| tenants);
        let tenant = tenant.map(|tenant| format!("tenant = \"{tenant}\"\n")).unwrap_or_default();
        format!(
            "{TABLE}\nname = \"{name}\"\n{tenant}url = \"{scheme}://127.0.0.1:{port}/hook\"\nsecrets = [\"{SECRET}\"]\n{tls}{settings}\n"
        )
    }
}

/// The begin of each subscriber's table.
pub(crate) const TABLE: &str = "\n[[subscriber]]";

fn answer(request: &Request, mood: Mood, rng: &mut StdRng) -> Answer {
    let after = Duration::from_millis(rng.random_range(0..=mood.slow));
    let numbers = request.numbers();
    let answer = if numbers.len() > mood.most {
        status(413)
    } else if mood.refuses.is_some_and(|r| numbers.iter().any(|n| n % 101 == r)) {
        status(*pick(&[400, 422], rng))
    } else if mood.poison.is_some_and(|r| numbers.iter().any(|n| n % POISON == r)) {
        status(500)
    } else if rng.random_bool(mood.hangs) {
        return status(200).after(Duration::from_secs(4));
    } else if rng.random_bool(mood.leaves) {
        status(410)
    } else if rng.random_bool(mood.fails) {
        let failed = status(*pick(&[500, 502, 503, 429, 404, 301], rng));
        if rng.random_bool(mood.asks_to_wait) {
            failed.header("retry-after", rng.random_range(1..4_u32).to_string())
        } else {
            failed
        }
    } else {
        status(200)
    };
    answer.after(after)
}
