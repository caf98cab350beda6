//! The authorities that an https connection trusts, and the client certificate that it presents.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    server::ParsedCertificate,
};

/// The protocols offered by ALPN (RFC 7301); the receiver chooses.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Sessions that are kept to be resumed: those of one server, since each client has its own.
const SESSIONS: usize = 8;

/// Trusted certificates: as authorities, and each also as a server's own.
#[derive(Debug)]
pub struct Roots {
    authorities: Arc<RootCertStore>,
    /// The certificates as read. A server may present an authority's certificate only if it is one
    /// of these, byte for byte.
    certificates: Vec<CertificateDer<'static>>,
}

impl Roots {
    fn verifier(self: &Arc<Self>) -> Result<Verifier, rustls::Error> {
        let signed = WebPkiServerVerifier::builder(self.authorities.clone()).build();
        let signed = signed.map_err(|e| rustls::Error::General(e.to_string()))?;
        Ok(Verifier { signed, roots: self.clone() })
    }
}

/// Accepts certificates that an authority has signed, and a self-signed certificate that is trusted
/// itself. `openssl req -x509` marks those as authorities (CA:TRUE), and webpki refuses every
/// authority as a server.
#[derive(Debug)]
struct Verifier {
    signed: Arc<WebPkiServerVerifier>,
    roots: Arc<Roots>,
}

/// The text of webpki's error, which rustls passes on without a type to compare with. webpki
/// returns it after it checked the dates (`check_issuer_independent_properties` in its
/// `verify_cert.rs`), and before it checks the name.
fn is_authority(e: &rustls::Error) -> bool {
    matches!(e, rustls::Error::InvalidCertificate(CertificateError::Other(other)) if format!("{other:?}").contains("CaUsedAsEndEntity"))
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        own: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.signed.verify_server_cert(own, intermediates, server, ocsp, now) {
            Err(e) if is_authority(&e) && self.roots.certificates.contains(own) => {
                verify_server_name(&ParsedCertificate::try_from(own)?, server)
                    .map(|()| ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed.verify_tls12_signature(message, own, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signed.verify_tls13_signature(message, own, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signed.supported_verify_schemes()
    }
}

/// Root certificates of the system, read once and shared by all subscribers.
#[derive(Debug, Clone)]
pub struct SystemRoots(Arc<Roots>);

impl SystemRoots {
    /// # Errors
    /// The system has no usable root certificates.
    pub fn load() -> Result<Self, String> {
        let found = rustls_native_certs::load_native_certs();
        let mut authorities = RootCertStore::empty();
        let (added, _) = authorities.add_parsable_certificates(found.certs.iter().cloned());
        if added == 0 {
            let why = found.errors.first().map(|e| format!(": {e}")).unwrap_or_default();
            return Err(format!(
                "the system has no root certificates for https{why}; install the package ca-certificates"
            ));
        }
        Ok(Self(Arc::new(Roots { authorities: Arc::new(authorities), certificates: found.certs })))
    }
}

/// The key `tls` of a subscriber.
#[derive(Debug, Clone, Default)]
pub struct TlsPolicy {
    /// The roots that are trusted instead of the system's.
    pub roots: Option<Arc<Roots>>,
    pub identity: Option<Identity>,
    /// The keys that name files, with the files.
    pub files: Vec<(&'static str, PathBuf)>,
}

/// A client certificate and its key.
#[derive(Debug, Clone)]
pub struct Identity(Arc<Certified>);

struct Certified {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl std::fmt::Debug for Certified {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certified").field("certificates", &self.chain.len()).finish_non_exhaustive()
    }
}

/// The certificates of a PEM file (RFC 7468) as roots.
///
/// # Errors
/// Says what is wrong with the file.
pub fn roots(pem: &[u8]) -> Result<Arc<Roots>, String> {
    let certificates = certificates(pem)?;
    let mut authorities = RootCertStore::empty();
    for certificate in &certificates {
        authorities
            .add(certificate.clone())
            .map_err(|e| format!("holds a certificate that cannot be used: {e}"))?;
    }
    Ok(Arc::new(Roots { authorities: Arc::new(authorities), certificates }))
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    match found {
        Ok(found) if found.is_empty() => {
            Err("holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)".to_owned())
        }
        Ok(found) => Ok(found),
        Err(e) => Err(format!("is not valid PEM: {e}")),
    }
}

/// What is wrong with an identity.
#[derive(Debug, PartialEq, Eq)]
pub enum BadIdentity {
    Certificate(String),
    Key(String),
}

impl Identity {
    /// Reads a chain of certificates, the client's own first, and its key.
    ///
    /// # Errors
    /// Says which of the two is wrong, without the key.
    pub fn try_new(chain: &[u8], key: &[u8]) -> Result<Self, BadIdentity> {
        let chain = certificates(chain).map_err(BadIdentity::Certificate)?;
        let no_key =
            "holds no private key in PEM form without a password (-----BEGIN PRIVATE KEY-----)";
        let key =
            PrivateKeyDer::from_pem_slice(key).map_err(|_| BadIdentity::Key(no_key.to_owned()))?;
        let identity = Self(Arc::new(Certified { chain, key }));
        match identity.checked() {
            Ok(()) => Ok(identity),
            Err(rustls::Error::InconsistentKeys(_)) => {
                Err(BadIdentity::Key("is not the key of the certificate".to_owned()))
            }
            Err(rustls::Error::InvalidCertificate(e)) => {
                Err(BadIdentity::Certificate(unusable(&e)))
            }
            Err(_) => Err(BadIdentity::Key(
                "holds a key that cannot be used; make an RSA, ECDSA or Ed25519 key".to_owned(),
            )),
        }
    }

    /// Checks that a connection could present it.
    fn checked(&self) -> Result<(), rustls::Error> {
        let Self(own) = self;
        let config = ClientConfig::builder().with_root_certificates(RootCertStore::empty());
        config.with_client_auth_cert(own.chain.clone(), own.key.clone_key()).map(drop)
    }
}

/// The reason why a client's own certificate is unusable. rustls words its errors for a peer's
/// certificates.
fn unusable(e: &CertificateError) -> String {
    if format!("{e:?}").contains("UnsupportedCertVersion") {
        let remedy = "sign it as version 3: `openssl x509 -req` does so if an extension is given, for example with \
                      `-extfile <(echo extendedKeyUsage=clientAuth)`";
        return format!(
            "this client certificate is of X.509 version 1, which TLS here does not take; {remedy}"
        );
    }
    format!("this client certificate cannot be used: {e}")
}

impl TlsPolicy {
    /// Whether both trust the same authorities and present the same identity, whatever files these
    /// came from.
    pub fn is_same(&self, other: &Self) -> bool {
        let trusted = |p: &Self| p.roots.as_ref().map(|r| r.certificates.clone());
        let same_identity = match (&self.identity, &other.identity) {
            (None, None) => true,
            (Some(Identity(a)), Some(Identity(b))) => {
                a.chain == b.chain && a.key.secret_der() == b.key.secret_der()
            }
            _ => false,
        };
        same_identity && trusted(self) == trusted(other)
    }

    /// # Errors
    /// The identity is unusable.
    pub fn client_config(&self, system: &SystemRoots) -> Result<ClientConfig, String> {
        self.checked(&system.0).map_err(|e| e.to_string())
    }

    /// Verifies the chain that a server presents, its own certificate first, as of a point in time.
    ///
    /// # Errors
    /// The reason why the chain is refused.
    pub fn verify_at(
        &self,
        system: &SystemRoots,
        chain: &[CertificateDer<'_>],
        server: &ServerName<'_>,
        at: SystemTime,
    ) -> Result<(), rustls::Error> {
        let verifier = self.roots.as_ref().unwrap_or(&system.0).verifier()?;
        let (own, intermediates) =
            chain.split_first().ok_or(rustls::Error::NoCertificatesPresented)?;
        let at = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        verifier
            .verify_server_cert(own, intermediates, server, &[], UnixTime::since_unix_epoch(at))
            .map(drop)
    }

    fn checked(&self, system: &Arc<Roots>) -> Result<ClientConfig, rustls::Error> {
        let verifier = self.roots.as_ref().unwrap_or(system).verifier()?;
        // As strict as rustls' own verifier; the name warns of ones that are not.
        let builder = ClientConfig::builder()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier));
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some(Identity(own)) => {
                builder.with_client_auth_cert(own.chain.clone(), own.key.clone_key())?
            }
        };
        config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).into();
        config.resumption = Resumption::in_memory_sessions(SESSIONS);
        Ok(config)
    }
}
