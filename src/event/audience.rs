//! Finds who gets an event: the owners of patterns that match it, of all tenants and of its own.

use std::{collections::HashMap, sync::Arc};

use super::{matcher::Matcher, pattern::Pattern, tenant::Tenant};

/// What a subscriber is to get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interest {
    pub patterns: Vec<Pattern>,
    /// The tenant whose events it gets; `None`: those of all.
    pub tenant: Option<Tenant>,
}

impl Interest {
    /// Whether an event of this type and tenant is for it.
    pub fn includes(&self, event_type: &str, tenant: Option<&Tenant>) -> bool {
        (self.tenant.is_none() || self.tenant.as_ref() == tenant)
            && self.patterns.iter().any(|pattern| pattern.matches(event_type))
    }
}

/// The patterns of subscribers, each with the number of its owner. Those of a tenant match no event
/// of another one, and none without a tenant.
#[derive(Debug, Default)]
pub struct Audience {
    /// Those of subscribers without a tenant, who get the events of all.
    of_all: Matcher,
    of_tenants: HashMap<Tenant, Matcher>,
}

impl Audience {
    pub fn new<'p>(
        patterns: impl IntoIterator<Item = (u32, Option<&'p Tenant>, &'p Pattern)>,
    ) -> Self {
        let (mut of_all, mut of_tenants) = (Vec::new(), HashMap::<_, Vec<_>>::new());
        for (owner, tenant, pattern) in patterns {
            match tenant {
                None => of_all.push((owner, pattern)),
                Some(tenant) => {
                    of_tenants.entry(tenant.clone()).or_default().push((owner, pattern))
                }
            }
        }
        let of_tenant = |(tenant, patterns)| (tenant, Matcher::of_few(patterns));
        Self {
            of_all: Matcher::new(of_all),
            of_tenants: of_tenants.into_iter().map(of_tenant).collect(),
        }
    }

    /// The owners of the patterns that match, each once, in their order.
    pub fn lookup(&self, tenant: Option<&str>, event_type: &str) -> Arc<[u32]> {
        let of_all = self.of_all.lookup(event_type);
        let of_tenant = tenant.and_then(|tenant| self.of_tenants.get(tenant));
        let Some(of_tenant) = of_tenant.map(|matcher| matcher.lookup(event_type)) else {
            return of_all;
        };
        if of_all.is_empty() || of_tenant.is_empty() {
            return if of_all.is_empty() { of_tenant } else { of_all };
        }
        let mut both: Vec<u32> = of_all.iter().chain(&*of_tenant).copied().collect();
        both.sort_unstable();
        both.dedup();
        both.into()
    }

    /// Whether a pattern matches.
    pub fn matches(&self, tenant: Option<&str>, event_type: &str) -> bool {
        !self.lookup(tenant, event_type).is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tenant() -> impl Strategy<Value = Option<&'static str>> {
        // Some that are easily taken for another.
        prop::sample::select(vec![None, Some("a"), Some("A"), Some("a "), Some("1"), Some("01")])
    }

    proptest! {
        #[test]
        fn an_event_goes_to_subscribers_of_its_tenant_and_of_all_and_to_no_other(
            owners in prop::collection::vec(
                (tenant(), prop::collection::vec(
                    prop::sample::select(vec!["#", "x", "x.*", "y.#"]), 1..3)),
                0..20,
            ),
            events in prop::collection::vec(
                (tenant(), prop::sample::select(vec!["x", "x.1", "y", "z", ""])), 1..30),
        ) {
            let owners: Vec<(Option<Tenant>, Vec<Pattern>)> = owners
                .into_iter()
                .map(|(tenant, patterns)| {
                    let patterns = patterns.into_iter().filter_map(|p| Pattern::try_new(p).ok());
                    (tenant.and_then(Tenant::try_new), patterns.collect())
                })
                .collect();
            let each = (0..).zip(&owners).flat_map(|(n, (tenant, patterns))| {
                patterns.iter().map(move |pattern| (n, tenant.as_ref(), pattern))
            });
            let audience = Audience::new(each);
            for (of, event_type) in events {
                let expected: Vec<u32> = (0..)
                    .zip(&owners)
                    .filter(|(_, (tenant, patterns))| {
                        tenant.as_ref().is_none_or(|tenant| Some(tenant.as_str()) == of)
                            && patterns.iter().any(|p| p.matches(event_type))
                    })
                    .map(|(n, _)| n)
                    .collect();
                prop_assert_eq!(&audience.lookup(of, event_type)[..], &expected[..]);
                prop_assert_eq!(audience.matches(of, event_type), !expected.is_empty());
            }
        }
    }
}
