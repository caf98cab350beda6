//! Whom an https connection trusts, and as whom it presents itself.

use std::{path::PathBuf, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

/// What ALPN (RFC 7301) offers; the receiver chooses.
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Root certificates of the system, read once and shared by all subscribers.
#[derive(Debug, Clone)]
pub struct SystemRoots(Arc<RootCertStore>);

impl SystemRoots {
    /// # Errors
    /// The system has no usable root certificates.
    pub fn load() -> Result<Self, String> {
        let found = rustls_native_certs::load_native_certs();
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(found.certs);
        if added == 0 {
            let why = found.errors.first().map(|e| format!(": {e}")).unwrap_or_default();
            return Err(format!("the system has no root certificates for https{why}; install the package ca-certificates"));
        }
        Ok(Self(Arc::new(roots)))
    }
}

/// From `tls` of a subscriber.
#[derive(Debug, Clone, Default)]
pub struct TlsPolicy {
    /// Trusted instead of the system's.
    pub roots: Option<Arc<RootCertStore>>,
    pub identity: Option<Identity>,
    /// The keys that named files, and the files.
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
pub fn roots(pem: &[u8]) -> Result<Arc<RootCertStore>, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(|e| format!("holds a certificate that cannot be used: {e}"))?;
    }
    Ok(Arc::new(roots))
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    match found {
        Ok(found) if found.is_empty() => Err("holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)".to_owned()),
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
    /// From a chain of certificates, the client's own first, and its key.
    ///
    /// # Errors
    /// Says which of the two is wrong, and nothing of the key.
    pub fn try_new(chain: &[u8], key: &[u8]) -> Result<Self, BadIdentity> {
        let chain = certificates(chain).map_err(BadIdentity::Certificate)?;
        let no_key = "holds no private key in PEM form without a password (-----BEGIN PRIVATE KEY-----)";
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| BadIdentity::Key(no_key.to_owned()))?;
        let identity = Self(Arc::new(Certified { chain, key }));
        let alone = TlsPolicy { roots: Some(Arc::new(RootCertStore::empty())), identity: Some(identity.clone()), ..TlsPolicy::default() };
        match alone.checked(&RootCertStore::empty().into()) {
            Ok(_) => Ok(identity),
            Err(rustls::Error::InconsistentKeys(_)) => Err(BadIdentity::Key("is not the key of the certificate".to_owned())),
            Err(e @ rustls::Error::InvalidCertificate(_)) => Err(BadIdentity::Certificate(format!("cannot be used: {e}"))),
            Err(_) => Err(BadIdentity::Key("holds a key that cannot be used; make an RSA, ECDSA or Ed25519 key".to_owned())),
        }
    }
}

impl TlsPolicy {
    /// Whether both trust the same authorities and present the same identity, whatever files these came from.
    pub fn is_same(&self, other: &Self) -> bool {
        let subjects = |p: &Self| p.roots.as_ref().map(|r| r.roots.clone());
        let same_identity = match (&self.identity, &other.identity) {
            (None, None) => true,
            (Some(Identity(a)), Some(Identity(b))) => a.chain == b.chain && a.key.secret_der() == b.key.secret_der(),
            _ => false,
        };
        same_identity && subjects(self) == subjects(other)
    }

    /// # Errors
    /// The identity is of no use.
    pub fn client_config(&self, system: &SystemRoots) -> Result<ClientConfig, String> {
        self.checked(&system.0).map_err(|e| e.to_string())
    }

    fn checked(&self, system: &Arc<RootCertStore>) -> Result<ClientConfig, rustls::Error> {
        let builder = ClientConfig::builder().with_root_certificates(self.roots.as_ref().unwrap_or(system).clone());
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some(Identity(own)) => builder.with_client_auth_cert(own.chain.clone(), own.key.clone_key())?,
        };
        config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).into();
        Ok(config)
    }
}
