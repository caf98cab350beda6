//! Faults of receivers, and of the network between them and the daemons.

use rand::RngExt as _;

use crate::{
    fault::Heal,
    proxy::{Way, Weather},
    round::Round,
    subscribers::{Kind, pick},
};

impl Round<'_> {
    /// Faults that keep the queue from writing are inflicted while there is something to write.
    pub(crate) fn bad_moods(&mut self, kinds: &[Kind]) {
        for n in 0..self.world.subscribers.len() {
            if kinds.contains(&self.world.subscribers[n].kind) {
                self.bad_mood_of(n);
            }
        }
    }

    pub(crate) fn bad_mood(&mut self) {
        let n = self.rng.random_range(0..self.world.subscribers.len());
        self.bad_mood_of(n);
    }

    fn bad_mood_of(&mut self, n: usize) {
        let mood = self.world.subscribers[n].bad_mood(&mut self.rng);
        let what = format!("{:?}: {mood:?}", self.world.subscribers[n].kind);
        // The broker takes the consumer of a subscriber that holds up what it has for too long.
        let disturbs = mood.hangs() && self.world.network.is_some() && !self.calm;
        self.lasts(Heal::Mood(n), what, disturbs, 10_000);
    }

    pub(super) fn cut_a_receiver_off(&mut self) -> bool {
        let subscriber = pick(&self.world.subscribers, &mut self.rng);
        if subscriber.kind.is_always_heard() {
            return false;
        }
        subscriber.network.cut();
        let what = format!("connections to {:?} are cut", subscriber.kind);
        self.log(&what);
        true
    }

    pub(super) fn change_a_receivers_weather(&mut self) -> bool {
        let n = self.rng.random_range(0..self.world.subscribers.len());
        if self.world.subscribers[n].kind.is_always_heard()
            || self.lasting.iter().any(|l| l.heal == Heal::ReceiverWeather(n))
        {
            return false;
        }
        let weather = self.weather();
        self.world.subscribers[n].network.weather(weather);
        let what = format!("the network to {:?}: {weather:?}", self.world.subscribers[n].kind);
        // Attempts that hang, as a mood that does.
        let disturbs = self.world.network.is_some() && !self.calm;
        self.lasts(Heal::ReceiverWeather(n), what, disturbs, 4000);
        true
    }

    pub(super) fn weather(&mut self) -> Weather {
        let way = *pick(&[Way::Forth, Way::Back], &mut self.rng);
        *pick(
            &[
                Weather::Stalled,
                Weather::OneWay(way),
                Weather::Loses(way),
                Weather::Slow(20_000),
                Weather::Slow(300_000),
                Weather::Refuses,
            ],
            &mut self.rng,
        )
    }
}
