//! Resolves receivers' names into addresses that a request may go to.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use futures_util::future::BoxFuture;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::sync::Semaphore;

use super::EXCEPTIONS;
use crate::policy::address::AddressPolicy;

/// Resolves names and returns only permitted addresses. The client connects to the returned ones, so
/// nothing can change between the check and the connection.
#[derive(Debug)]
pub(super) struct GuardedResolver {
    policy: AddressPolicy,
    lookup: Lookup,
    /// The name that was resolved last has only IPv4 addresses, and at least one.
    pub(super) only_v4: Arc<AtomicBool>,
}

impl GuardedResolver {
    pub(super) fn new(policy: AddressPolicy, lookup: Lookup) -> Self {
        Self { policy, lookup, only_v4: Arc::default() }
    }
}

pub(super) type Found = BoxFuture<'static, std::io::Result<Vec<SocketAddr>>>;

/// A lookup of a name's addresses.
#[derive(Clone)]
pub(super) struct Lookup(pub(super) Arc<dyn Fn(String) -> Found + Send + Sync>);

/// Concurrent lookups for a subscriber. The system's resolver has a thread for each, also when its
/// answer is not awaited any more. All subscribers share 512 threads, and a name server that hangs
/// must not occupy them all.
const LOOKUPS: usize = 4;

impl Lookup {
    pub(super) fn of_system() -> Self {
        Self(Arc::new(|name| {
            Box::pin(async move { Ok(tokio::net::lookup_host((name, 0)).await?.collect()) })
        }))
        .at_a_time(LOOKUPS)
    }

    /// Each lookup counts until it has its answer, whether that is still awaited or not.
    pub(super) fn at_a_time(self, limit: usize) -> Self {
        let room = Arc::new(Semaphore::new(limit));
        Self(Arc::new(move |name| {
            let (room, lookup) = (room.clone(), self.0.clone());
            Box::pin(async move {
                let permit = room.acquire_owned().await;
                let found = tokio::spawn(async move {
                    let found = lookup(name).await;
                    drop(permit);
                    found
                });
                found.await.map_err(std::io::Error::other)?
            })
        }))
    }
}

impl fmt::Debug for Lookup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lookup")
    }
}

/// None of a name's addresses is permitted.
#[derive(Debug)]
pub(super) struct Blocked {
    address: std::net::IpAddr,
    what: &'static str,
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the name resolves to {}, which is not a public address ({}); {EXCEPTIONS}",
            self.address, self.what
        )
    }
}

impl std::error::Error for Blocked {}

/// A name has no address, or cannot be resolved now.
#[derive(Debug)]
pub(super) struct ResolveError(pub(super) std::io::Error);

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for ResolveError {}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (policy, only_v4) = (self.policy.clone(), self.only_v4.clone());
        let found = (self.lookup.0)(name.as_str().to_owned());
        Box::pin(async move {
            let found = found.await.map_err(ResolveError)?;
            only_v4.store(
                !found.is_empty() && found.iter().all(SocketAddr::is_ipv4),
                Ordering::Relaxed,
            );
            permitted(&policy, found.into_iter())
        })
    }
}

/// The permitted addresses.
pub(super) fn permitted(
    policy: &AddressPolicy,
    found: impl Iterator<Item = SocketAddr>,
) -> Result<Addrs, Box<dyn std::error::Error + Send + Sync>> {
    let mut blocked = None;
    let mut allowed = Vec::new();
    for address in found {
        match policy.check(address.ip()) {
            Ok(()) => allowed.push(address),
            Err(what) => blocked = Some(Blocked { address: address.ip(), what }),
        }
    }
    match (allowed.is_empty(), blocked) {
        (true, Some(blocked)) => Err(Box::new(blocked)),
        (true, None) => {
            Err(Box::new(ResolveError(std::io::Error::other("the name has no address"))))
        }
        (false, _) => Ok(Box::new(allowed.into_iter())),
    }
}
