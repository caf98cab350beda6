//! An inspection of a subscriber's endpoint without a request to it: name, addresses, connection,
//! certificate; and a token, where requests need one.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{StreamExt as _, stream};
use rustls::{AlertDescription, CertificateError, PeerIncompatible, pki_types::ServerName};
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout, timeout_at},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use url::{Host, Url};

use super::webhook::{TokenError, Webhook};
use crate::{
    clock,
    config::{Auth, Subscriber},
    crypto::tls::SystemRoots,
    telemetry::finding::Finding,
    wording::span,
};

/// Endpoints inspected at the same time.
const MAX_CONCURRENT: usize = 16;

/// A certificate that expires sooner than this is a finding.
const EXPIRY_WARNING: Duration = Duration::from_secs(30 * 24 * 3600);

/// The wait for an answer after which the next address is tried as well (RFC 8305, section 8).
const STAGGER: Duration = Duration::from_millis(250);

const EXCEPTIONS: &str =
    "if that is where it shall go: http.allow_addresses or http.allow_private_addresses";
const FATE: &str = "each attempt fails, and its events become dead letters when [retry] ends";

/// Inspects all endpoints. Each takes at most three times its `http.connect_timeout`, and
/// `http.timeout` for a token; of those that have not ended `within` a time the finding says so.
pub async fn inspect(subscribers: &[Arc<Subscriber>], within: Duration) -> Vec<Finding> {
    let roots = SystemRoots::load();
    let roots = roots.as_ref().map_err(String::as_str);
    let deadline = (clock::instant() + within).into();
    // Owned: a request's handler awaits this, and could not with references in the stream.
    let subscribers = subscribers.to_vec();
    let inspections = subscribers.into_iter().map(|s| async move {
        let endpoint = Endpoint::of(&s);
        // One that is late hides nothing of the other.
        let (way, token) = tokio::join!(
            timeout_at(deadline, endpoint.way(roots)),
            timeout_at(deadline, endpoint.token(roots)),
        );
        let is_late = way.is_err() || token.is_err();
        let mut findings = way.unwrap_or_default();
        findings.extend(token.ok().flatten());
        findings.extend(is_late.then(|| endpoint.late(within)));
        findings
    });
    stream::iter(inspections).buffered(MAX_CONCURRENT).flat_map(stream::iter).collect().await
}

/// An endpoint during its inspection.
struct Endpoint<'s> {
    subscriber: &'s Subscriber,
    about: String,
    url: &'s Url,
    /// The longest that each step may take.
    limit: Duration,
}

impl<'s> Endpoint<'s> {
    fn of(subscriber: &'s Subscriber) -> Self {
        let about = format!("endpoint of `{}`", subscriber.name);
        Self {
            subscriber,
            about,
            url: subscriber.url.expose(),
            limit: subscriber.http.connect_timeout,
        }
    }

    fn late(&self, within: Duration) -> Finding {
        let remedy = format!("hooktrail check --connect {}", self.subscriber.name);
        let why = format!("the inspection of all endpoints took more than {} s", within.as_secs());
        Finding::unseen(&self.about, why, remedy)
    }

    /// Fetches a token, where requests need one.
    async fn token(&self, roots: Result<&SystemRoots, &str>) -> Option<Finding> {
        let Some(Auth::OAuth2(grant)) = &self.subscriber.auth else { return None };
        let webhook = roots.map_err(str::to_owned);
        let token = match webhook.and_then(|roots| Webhook::try_new(self.subscriber, roots)) {
            Ok(webhook) => webhook.token().await?,
            Err(why) => Err(TokenError { why, is_final: true }),
        };
        Some(match token {
            Ok(lifetime) => {
                let found = format!("{} gives a token for {}", grant.token_url, span(lifetime));
                Finding::ok(&self.about, found)
            }
            Err(TokenError { why, is_final: true }) => Finding::harmful(&self.about, why)
                .risking(FATE)
                .with_remedy("compare auth.oauth2 of this subscriber with what its owner gave"),
            Err(TokenError { why, is_final: false }) => Finding::warning(&self.about, why)
                .risking("attempts fail and are made again as [retry] says, until that ends")
                .with_remedy(
                    "check auth.oauth2.token_url of this subscriber, and that its server is up",
                ),
        })
    }

    /// The way to the receiver.
    async fn way(&self, roots: Result<&SystemRoots, &str>) -> Vec<Finding> {
        if let Some(proxy) = &self.subscriber.http.proxy {
            return self.through(proxy.expose(), &proxy.to_string()).await;
        }
        let mut findings = Vec::new();
        let last = self.steps(roots, &mut findings).await;
        findings.push(last.unwrap_or_else(|e| e));
        findings
    }

    /// Takes the steps until one finds something bad; returns the last finding.
    async fn steps(
        &self,
        roots: Result<&SystemRoots, &str>,
        findings: &mut Vec<Finding>,
    ) -> Result<Finding, Finding> {
        let found = self.addresses(self.url).await?;
        let allowed = self.allowed(&found, findings)?;
        let (stream, address) = self.connect(&allowed).await?;
        if self.url.scheme() == "http" {
            return Ok(Finding::ok(
                &self.about,
                format!("{address} takes connections, without TLS"),
            ));
        }
        let roots = roots.map_err(|e| Finding::harmful(&self.about, e).risking(FATE))?;
        let (stream, server) = self.handshake(stream, roots).await?;
        self.certificate(&stream, &server, roots)?;
        Ok(Finding::ok(
            &self.about,
            format!("{address} speaks TLS, its certificate is good for more than 30 days"),
        ))
    }

    /// Inspects the way to the proxy. The proxy decides about the rest, and only a request shows it.
    async fn through(&self, proxy: &Url, shown: &str) -> Vec<Finding> {
        let reached = async { self.connect(&self.addresses(proxy).await?).await };
        let reached = match reached.await {
            Ok((_, address)) => Finding::ok(
                &self.about,
                format!("its proxy {shown} takes connections at {address}"),
            ),
            Err(e) => e.with_remedy("see http.proxy of this subscriber"),
        };
        let rest = "what is behind the proxy: only a request would show it";
        vec![
            reached,
            Finding::unseen(&self.about, rest, "`hooktrail test SUBSCRIBER` sends a request"),
        ]
    }

    async fn addresses(&self, url: &Url) -> Result<Vec<SocketAddr>, Finding> {
        let port = url.port_or_known_default().unwrap_or_default();
        let name = match url.host() {
            Some(Host::Ipv4(ip)) => return Ok(vec![SocketAddr::new(ip.into(), port)]),
            Some(Host::Ipv6(ip)) => return Ok(vec![SocketAddr::new(ip.into(), port)]),
            Some(Host::Domain(name)) => name,
            None => "",
        };
        let unknown = |why: String| {
            // A resolver can be away for a time, as a receiver can.
            Finding::warning(&self.about, format!("the name `{name}` is not resolved: {why}"))
                .risking(FATE)
                .with_remedy(format!("correct the URL or the DNS: getent ahosts {name}"))
        };
        match timeout(self.limit, tokio::net::lookup_host((name, port))).await {
            Err(_) => {
                Err(unknown(format!("no answer within {}", humantime::format_duration(self.limit))))
            }
            Ok(Err(e)) => Err(unknown(e.to_string())),
            Ok(Ok(found)) => {
                let found: Vec<_> = found.collect();
                if found.is_empty() {
                    Err(unknown("it has no address".to_owned()))
                } else {
                    Ok(found)
                }
            }
        }
    }

    /// The addresses that requests may go to.
    fn allowed(
        &self,
        found: &[SocketAddr],
        findings: &mut Vec<Finding>,
    ) -> Result<Vec<SocketAddr>, Finding> {
        let policy = &self.subscriber.http.addresses;
        let blocked: Vec<(IpAddr, &str)> = found
            .iter()
            .filter_map(|a| policy.check(a.ip()).err().map(|what| (a.ip(), what)))
            .collect();
        let Some((ip, what)) = blocked.first() else { return Ok(found.to_vec()) };
        let allowed: Vec<SocketAddr> =
            found.iter().filter(|a| policy.check(a.ip()).is_ok()).copied().collect();
        if allowed.is_empty() {
            let found =
                format!("leads to {ip}, which is not a public address ({what}) and not allowed");
            return Err(Finding::harmful(&self.about, found).risking(FATE).with_remedy(EXCEPTIONS));
        }
        let found = format!(
            "leads to {ip} too, which is not a public address ({what}) and is never connected to"
        );
        findings.push(Finding::note(&self.about, found).with_remedy(EXCEPTIONS));
        Ok(allowed)
    }

    /// A receiver may be away for a time, so no connection is only a warning.
    async fn connect(&self, addresses: &[SocketAddr]) -> Result<(TcpStream, SocketAddr), Finding> {
        let no_answer =
            || format!("no connection within {}", humantime::format_duration(self.limit));
        let connected =
            timeout(self.limit, first_of(addresses)).await.unwrap_or_else(|_| Err(no_answer()));
        connected.map_err(|why| {
            Finding::warning(&self.about, why)
                .risking("attempts fail and are made again as [retry] says, until that ends")
                .with_remedy("check the receiver and the network between; `hooktrail test SUBSCRIBER` sends a request")
        })
    }

    async fn handshake(
        &self,
        stream: TcpStream,
        roots: &SystemRoots,
    ) -> Result<(TlsStream<TcpStream>, ServerName<'static>), Finding> {
        let bad = |why: String| Finding::harmful(&self.about, why).risking(FATE);
        let host = self
            .url
            .host_str()
            .unwrap_or_default()
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        let server = ServerName::try_from(host)
            .map_err(|e| bad(format!("its host cannot have a certificate: {e}")))?;
        let config = self.subscriber.tls.client_config(roots).map_err(bad)?;
        let connecting = TlsConnector::from(Arc::new(config)).connect(server.clone(), stream);
        match timeout(self.limit, connecting).await {
            Ok(Ok(stream)) => Ok((stream, server)),
            Ok(Err(e)) => {
                let tls = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
                Err(tls.map_or_else(|| self.broken(&e.to_string()), |e| self.refused(e)))
            }
            Err(_) => {
                Err(self
                    .broken(&format!("nothing within {}", humantime::format_duration(self.limit))))
            }
        }
    }

    fn broken(&self, why: &str) -> Finding {
        let remedy = "check that it speaks TLS at this port, and the receiver's log";
        Finding::warning(&self.about, format!("the TLS handshake broke: {why}"))
            .risking(FATE)
            .with_remedy(remedy)
    }

    /// Explains to an operator why a chain is not trusted, or a handshake not made.
    fn refused(&self, e: &rustls::Error) -> Finding {
        let (found, remedy) = match e {
            rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. }) => (
                format!("its certificate, or one that it hangs on, has expired, at {}", date(not_after.as_secs())),
                "the receiver must renew it",
            ),
            rustls::Error::InvalidCertificate(CertificateError::Expired) => {
                ("its certificate, or one that it hangs on, has expired".to_owned(), "the receiver must renew it")
            }
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => (
                "its certificate is not trusted: signed by no authority that is known here, or the receiver sends no chain".to_owned(),
                "name the authority's certificate in tls.ca_file of this subscriber, or have the receiver send its whole chain",
            ),
            rustls::Error::InvalidCertificate(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }) => (
                format!("its certificate is for another name: {e}"),
                "correct the URL, or have the receiver get a certificate for this name",
            ),
            rustls::Error::InvalidCertificate(e) if format!("{e:?}").contains("CaUsedAsEndEntity") => (
                "its certificate is self-signed, or an authority's own (CA:TRUE), and not one that is trusted by itself".to_owned(),
                "put exactly this certificate into tls.ca_file of this subscriber, or have the receiver get one that an authority signs",
            ),
            rustls::Error::InvalidCertificate(_) => (format!("its certificate is not accepted: {e}"), "the receiver must renew it"),
            _ => (format!("the TLS handshake failed: {e}"), handshake_remedy(e, self.subscriber.tls.identity.is_some())),
        };
        Finding::harmful(&self.about, found).risking(FATE).with_remedy(remedy)
    }

    /// The handshake has shown that the certificate is valid now; checks it for a month from now.
    fn certificate(
        &self,
        stream: &TlsStream<TcpStream>,
        server: &ServerName<'_>,
        roots: &SystemRoots,
    ) -> Result<(), Finding> {
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let now = clock::now();
        let expires =
            match self.subscriber.tls.verify_at(roots, chain, server, now + EXPIRY_WARNING) {
                Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext {
                    not_after,
                    ..
                })) => not_after.as_secs(),
                _ => return Ok(()),
            };
        let days = expires.saturating_sub(clock::unix_seconds(now)) / (24 * 3600);
        let found = format!(
            "its certificate, or one that it hangs on, expires in {days} days, at {}",
            date(expires)
        );
        Err(Finding::warning(&self.about, found)
            .risking(format!("from then on {FATE}"))
            .with_remedy("the receiver must renew it"))
    }
}

/// The remedy for a handshake that failed for another reason than the receiver's certificate.
const fn handshake_remedy(e: &rustls::Error, has_identity: bool) -> &'static str {
    match e {
        // In TLS 1.2 some servers say the same when a client certificate is missing.
        rustls::Error::AlertReceived(
            AlertDescription::HandshakeFailure | AlertDescription::InsufficientSecurity,
        ) if !has_identity => {
            "the receiver takes none of the ciphers that are offered: it must allow AES-GCM or ChaCha20 with an ECDHE key exchange; \
             or it wants a client certificate: tls.client_cert_file"
        }
        rustls::Error::AlertReceived(
            AlertDescription::HandshakeFailure | AlertDescription::InsufficientSecurity,
        )
        | rustls::Error::PeerIncompatible(
            PeerIncompatible::NoCipherSuitesInCommon | PeerIncompatible::NoKxGroupsInCommon,
        ) => {
            "the receiver takes none of the ciphers that are offered: it must allow AES-GCM or ChaCha20 with an ECDHE key exchange"
        }
        rustls::Error::AlertReceived(AlertDescription::ProtocolVersion)
        | rustls::Error::PeerIncompatible(
            PeerIncompatible::ServerDoesNotSupportTls12Or13
            | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
            | PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::Tls13RequiredForQuic,
        ) => "the receiver must speak TLS 1.2 or 1.3",
        rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnknownCA
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::AccessDenied,
        ) => {
            "the receiver wants a client certificate that it accepts: tls.client_cert_file and tls.client_key_file"
        }
        rustls::Error::AlertReceived(AlertDescription::UnrecognisedName) => {
            "the receiver knows no such name: correct the URL's host"
        }
        _ => "does it speak TLS 1.2 or 1.3 at this port?",
    }
}

/// Connects to the first address that takes a connection. One that does not answer does not keep
/// the others waiting, as it does not for requests.
async fn first_of(addresses: &[SocketAddr]) -> Result<(TcpStream, SocketAddr), String> {
    let mut left = addresses.iter().copied();
    let (mut trying, mut why) = (JoinSet::new(), "it has no address".to_owned());
    let mut next = left.next();
    loop {
        if let Some(address) = next.take() {
            trying.spawn(async move { (TcpStream::connect(address).await, address) });
        }
        tokio::select! {
            Some(tried) = trying.join_next() => match tried {
                Ok((Ok(stream), address)) => return Ok((stream, address)),
                Ok((Err(e), address)) => {
                    why = format!("{address} takes no connection: {e}");
                    next = left.next();
                }
                Err(e) => why = e.to_string(),
            },
            () = sleep(STAGGER), if left.len() > 0 => next = left.next(),
            else => return Err(why),
        }
    }
}

fn date(unix_seconds: u64) -> String {
    let at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(unix_seconds));
    at.map_or_else(|| "the end of time".to_owned(), clock::rfc3339_seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_about_a_handshake_that_failed_is_what_it_failed_for() {
        let alert = |alert| rustls::Error::AlertReceived(alert);
        for (e, has_identity, part, not) in [
            (alert(AlertDescription::HandshakeFailure), true, "ciphers", "client"),
            (alert(AlertDescription::HandshakeFailure), false, "ciphers", "1.3"),
            (
                rustls::Error::PeerIncompatible(PeerIncompatible::NoCipherSuitesInCommon),
                false,
                "ciphers",
                "client",
            ),
            (alert(AlertDescription::ProtocolVersion), false, "TLS 1.2 or 1.3", "client"),
            (alert(AlertDescription::CertificateRequired), false, "tls.client_cert_file", "cipher"),
        ] {
            let remedy = handshake_remedy(&e, has_identity);
            assert!(remedy.contains(part) && !remedy.contains(not), "{e}: {remedy}");
        }
    }

    #[tokio::test]
    async fn an_address_that_does_not_answer_does_not_hide_one_that_does() {
        // A queue of connections that is full: the system answers no further one.
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind("127.0.0.1:0".parse().expect("an address")).expect("binds");
        let silent = socket.listen(1).expect("listens");
        let swallows = silent.local_addr().expect("an address");
        let mut held = Vec::new();
        while let Ok(Ok(stream)) =
            timeout(Duration::from_millis(300), TcpStream::connect(swallows)).await
        {
            held.push(stream);
        }
        let good = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr();
        let refuses = good.expect("an address");
        let takes = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let good = takes.local_addr().expect("an address");
        for addresses in [
            &[swallows, good][..],
            &[swallows, refuses, good],
            &[refuses, swallows, good],
            &[good, swallows],
        ] {
            let first =
                timeout(Duration::from_secs(60), first_of(addresses)).await.expect("in time");
            assert_eq!(first.map(|(_, address)| address), Ok(good), "{addresses:?}");
        }
        let why = first_of(&[refuses]).await.expect_err("no process listens there");
        assert!(why.contains(&refuses.to_string()), "{why}");
    }
}
