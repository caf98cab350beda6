//! Events that differ as those of an audit log do: 256 types, 10,000 actors, a million resources.

pub(crate) const ACTORS: u64 = 10_000;

pub(crate) const WORDS: [&str; 16] = [
    "updated", "deleted", "created", "the", "user", "profile", "invoice", "report", "settings",
    "password", "team", "project", "webhook", "exported", "archived", "shared",
];

/// Random numbers that are the same in every run (SplitMix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn word(&mut self) -> &'static str {
        WORDS[self.below(WORDS.len() as u64) as usize]
    }
}

/// About 400 bytes.
pub(crate) struct Varied {
    pub(crate) event_type: String,
    pub(crate) message_id: String,
    pub(crate) body: String,
}

/// The same for the same number.
pub(crate) fn event(n: u64) -> Varied {
    let mut random = Random(n);
    let (actor, resource) = (random.below(ACTORS), random.below(1_000_000));
    let event_type = format!("activity_log.{}.{}", random.word(), random.word());
    let body = format!(
        r#"{{"event":"{event_type}","description":"{} {} {} {}","actor":{{"id":{actor},"type":"user","name":"Jane Doe {actor}"}},"resource":{{"id":"{resource}","type":"{}","name":"Thing {resource}"}},"changes":{{"name":{{"to":"[FILTERED]","from":"[FILTERED]"}},"time_zone":{{"from":"Etc/UTC","to":"Europe/Kyiv"}},"request":{{"from":null,"to":"{:08x}"}}}},"ip":"10.{}.{}.{}","timestamp":{}}}"#,
        random.word(),
        random.word(),
        random.word(),
        random.word(),
        random.word(),
        random.next() as u32,
        random.below(256),
        random.below(256),
        random.below(256),
        1_733_739_084 + n / 1000,
    );
    let message_id =
        format!("{:032x}", u128::from(random.next()) << 64 | u128::from(random.next()));
    Varied { event_type, message_id, body }
}
