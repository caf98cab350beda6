//! Certificates, and a receiver that speaks TLS.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
};

use axum::http::{HeaderMap, Response, Version};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::eventually;

/// An authority that signs what a test needs.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) pem: String,
}

/// A certificate and its key, as PEM.
pub(crate) struct Certificate {
    pub(crate) pem: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).expect("signs").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// One that signs itself as `openssl req -x509` does: it is an authority (CA:TRUE) of this
    /// name, and the server's own.
    pub(crate) fn of_itself(
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (Self, Certificate) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        change(&mut params);
        let pem = params.self_signed(&key).expect("signs").pem();
        let own = Certificate { pem: pem.clone(), key: key.serialize_pem() };
        (Self { issuer: Issuer::new(params, key), pem }, own)
    }

    pub(crate) fn sign(&self, name: &str) -> Certificate {
        self.sign_with(name, |_| {})
    }

    /// Signs a certificate of a name or address that is changed before.
    pub(crate) fn sign_with(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Certificate {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        change(&mut params);
        let pem = params.signed_by(&key, &self.issuer).expect("signs").pem();
        Certificate { pem, key: key.serialize_pem() }
    }

    /// The settings of a server that presents `certificate`, and asks for one of this authority if
    /// there is one.
    pub(crate) fn server(&self, certificate: &Certificate, asks: bool) -> ServerConfig {
        rustls::crypto::ring::default_provider().install_default().ok();
        let builder = ServerConfig::builder();
        let builder = if asks {
            let mut roots = RootCertStore::empty();
            roots
                .add(CertificateDer::from_pem_slice(self.pem.as_bytes()).expect("PEM"))
                .expect("an authority");
            builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder(Arc::new(roots)).build().expect("a verifier"),
            )
        } else {
            builder.with_no_client_auth()
        };
        let chain = vec![CertificateDer::from_pem_slice(certificate.pem.as_bytes()).expect("PEM")];
        let key = PrivateKeyDer::from_pem_slice(certificate.key.as_bytes()).expect("PEM");
        builder.with_single_cert(chain, key).expect("a certificate and its key")
    }
}

/// The bytes that came over TLS.
#[derive(Debug, Clone)]
pub(crate) struct TlsRequest {
    pub(crate) version: Version,
    pub(crate) headers: HeaderMap,
    pub(crate) path: String,
}

/// Accepts everything, and remembers it.
pub(crate) struct TlsReceiver {
    pub(crate) port: u16,
    requests: Arc<Mutex<Vec<TlsRequest>>>,
}

impl TlsReceiver {
    /// `protocols` is what ALPN chooses from, the first first.
    pub(crate) async fn start(mut config: ServerConfig, protocols: &[&str]) -> Self {
        config.alpn_protocols = protocols.iter().map(|p| p.as_bytes().to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let socket = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = socket.local_addr().expect("an address").port();
        let requests = Arc::new(Mutex::default());
        let seen = requests.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = socket.accept().await {
                let (acceptor, seen) = (acceptor.clone(), seen.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = service_fn(move |request| answer(seen.clone(), request));
                    auto::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await
                        .ok();
                });
            }
        });
        Self { port, requests }
    }

    pub(crate) fn requests(&self) -> Vec<TlsRequest> {
        self.requests.lock().expect("not poisoned").clone()
    }

    pub(crate) async fn wait_requests(&self, n: usize) -> Vec<TlsRequest> {
        eventually(&format!("{n} requests over TLS"), async || self.requests().len() >= n).await;
        self.requests()
    }
}

async fn answer(
    seen: Arc<Mutex<Vec<TlsRequest>>>,
    request: axum::http::Request<Incoming>,
) -> Result<Response<String>, Infallible> {
    let (parts, body) = request.into_parts();
    axum::body::to_bytes(axum::body::Body::new(body), 64 << 20).await.expect("a whole body");
    let request = TlsRequest {
        version: parts.version,
        headers: parts.headers,
        path: parts.uri.path().to_owned(),
    };
    seen.lock().expect("not poisoned").push(request);
    Ok(Response::new(String::new()))
}
