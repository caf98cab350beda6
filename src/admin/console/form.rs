//! The state of a page, which is in its URL.

use maud::{Markup, html};
use url::form_urlencoded;

use super::page::{query, short};
use crate::{
    admin::{
        answer::Refusal,
        query::{FromQuery, Parameters},
    },
    clock,
    zone::Zone,
};

/// What a time may be, beside a field that has none.
const NO_TIME: &str = "is no time: write one such as 2026-01-31 12:00, 2026-01-31, yesterday, or 2h for two hours ago";

/// The query of a page. Fields of its form that were left empty are not there.
#[derive(Debug, Default, Clone)]
pub(super) struct Form(Vec<(String, String)>);

impl Form {
    pub(super) fn of(query: &str) -> Self {
        Self::whole(query).filled()
    }

    /// The same with the fields that are blank: an id may be.
    pub(super) fn whole(query: &str) -> Self {
        Self(form_urlencoded::parse(query.as_bytes()).into_owned().collect())
    }

    /// The form without the fields that are blank.
    pub(super) fn filled(self) -> Self {
        Self(self.0.into_iter().filter(|(_, v)| !v.trim().is_empty()).collect())
    }

    /// The form without one of its fields.
    pub(super) fn without(self, name: &str) -> Self {
        Self(self.0.into_iter().filter(|(given, _)| given != name).collect())
    }

    /// The form with another value of one of its fields.
    pub(super) fn with(self, name: &str, value: String) -> Self {
        let Self(mut pairs) = self.without(name);
        pairs.push((name.to_owned(), value));
        Self(pairs)
    }

    /// The fields in their order.
    pub(super) fn fields(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The fields whose names begin with a prefix, without it.
    pub(super) fn below(&self, prefix: &str) -> Self {
        let below = |(name, value): (&str, &str)| {
            Some((name.strip_prefix(prefix)?.to_owned(), value.to_owned()))
        };
        Self(self.fields().filter_map(below).collect())
    }

    /// A field as it was typed; empty if it was not.
    pub(super) fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(given, _)| given == name).map_or("", |(_, value)| value)
    }

    /// Whether anything but the place in the list was chosen.
    pub(super) fn is_filled(&self) -> bool {
        self.0.iter().any(|(name, _)| name != "cursor")
    }

    /// The same page at another place in the list.
    pub(super) fn link(&self, path: &str, cursor: Option<&str>) -> String {
        let kept = self.0.iter().filter(|(name, _)| name != "cursor");
        let kept = kept.map(|(name, value)| (name.as_str(), value.as_str()));
        query(path, &kept.chain(cursor.map(|c| ("cursor", c))).collect::<Vec<_>>())
    }

    /// The filters that have no field of the form, shown, and kept when it is sent.
    pub(super) fn others(&self, shown: &[&str]) -> Markup {
        let others = self.0.iter();
        let others = others.filter(|(name, _)| name != "cursor" && !shown.contains(&name.as_str()));
        html! {
            @for (name, value) in others {
                p.small {
                    input type="hidden" name=(name) value=(value);
                    "And " code { (short(name)) } " is " code { (short(value)) } "."
                }
            }
        }
    }

    /// The query of the API that selects the same. Times are as people write them, in UTC.
    ///
    /// # Errors
    /// The fields with a mistake; a time that ends before it begins.
    pub(super) fn read<F: FromQuery>(&self) -> Result<F, Refusal> {
        let (utc, now) = (Zone::new(false), clock::now());
        let mut times = Vec::new();
        let pair = |(name, value): &(String, String)| {
            let value = match name.as_str() {
                "since" | "until" => {
                    let time = utc.read(value, now);
                    let read =
                        time.as_ref().map_or_else(|_| value.clone(), |at| clock::rfc3339(*at));
                    times.push((name.clone(), time));
                    read
                }
                "text" | "type" | "status" | "events" | "rate" => value.trim().to_owned(),
                _ => value.clone(),
            };
            (name.clone(), value)
        };
        let pairs = self.0.iter().map(pair).collect();
        let read = Parameters::of(pairs).read().map_err(|mut refusal: Refusal| {
            // The API says what a program is to write.
            for e in &mut refusal.fields {
                if times.iter().any(|(name, time)| *name == e.field && time.is_err()) {
                    NO_TIME.clone_into(&mut e.detail);
                }
            }
            if refusal.fields.is_empty() { refusal } else { Refusal::fields(refusal.fields) }
        })?;
        let time = |name: &str| {
            times.iter().find_map(|(n, time)| time.as_ref().ok().filter(|_| n == name))
        };
        if time("since").zip(time("until")).is_some_and(|(since, until)| since > until) {
            return Err(Refusal::field("until", "is before the time from which on it selects"));
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::history;

    #[test]
    fn a_form_keeps_what_was_typed_and_leaves_out_what_was_not() {
        let form = Form::of("text=a+b&type=&actor=+&since=2026-01-31&cursor=x");
        assert_eq!((form.get("text"), form.get("type"), form.get("actor")), ("a b", "", ""));
        assert!(form.is_filled() && !Form::of("cursor=x&text=").is_filled());
        assert_eq!(form.link("/p", Some("y")), "/p?text=a+b&since=2026-01-31&cursor=y");
        assert_eq!(form.link("/p", None), "/p?text=a+b&since=2026-01-31");
    }

    /// What a list is asked for, as text.
    struct Asked(Option<String>, Option<String>);

    impl FromQuery for Asked {
        fn from_query(given: &mut Parameters) -> Self {
            let mut time =
                |name| given.take(name, |text| history::time(text).map(clock::rfc3339_seconds));
            Self(time("since"), time("until"))
        }
    }

    #[test]
    fn times_are_read_as_people_write_them_in_utc() {
        let read = |query: &str| Form::of(query).read::<Asked>();
        for (typed, expected) in [
            ("2026-01-31", "2026-01-31T00:00:00Z"),
            ("2026-01-31 12:00", "2026-01-31T12:00:00Z"),
            ("2026-01-31T12:00:05", "2026-01-31T12:00:05Z"),
            ("2026-01-31T12:00:05Z", "2026-01-31T12:00:05Z"),
            ("2026-01-31 12:00:05 UTC", "2026-01-31T12:00:05Z"),
            (" 2026-01-31T12:00:05%2B02:00 ", "2026-01-31T10:00:05Z"),
        ] {
            let Asked(since, until) = read(&format!("since={typed}")).expect("a time");
            assert_eq!((since.as_deref(), until), (Some(expected), None), "{typed}");
        }
        for words in ["yesterday", "2h", "today"] {
            assert!(read(&format!("since={words}&until=now")).is_ok(), "{words}");
        }
        for (query, field, part) in [
            ("since=last+tuesday", "since", "such as 2026-01-31"),
            ("until=12:00", "until", "yesterday"),
            ("since=2026-01-31&until=2026-01-30", "until", "is before"),
        ] {
            let refusal = read(query).err().expect("is refused");
            let [wrong] = &refusal.fields[..] else { panic!("{refusal:?}") };
            assert_eq!(wrong.field, field);
            assert!(wrong.detail.contains(part) && !wrong.detail.contains("%2B"), "{wrong:?}");
        }
        assert!(read("since=2026-01-31&until=2026-01-31").is_ok());
    }
}
