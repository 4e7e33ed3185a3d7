//! TLS for the client: a pinned certificate, a CA file, or the system's roots.
//!
//! A complete rustls configuration with the ring provider is made here, so that no process-wide
//! default provider is needed. There is no insecure mode.

use std::path::Path;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore,
    SignatureScheme,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use sha2::{Digest, Sha256};
use tokio_rustls::TlsConnector;

use super::error::{Error, PinMismatch};
use crate::config::{Fingerprint, Trust};

/// Makes connections to servers that `trust` trusts. Reads the CA file or the system's roots: small,
/// blocking reads.
pub(super) fn connector(trust: &Trust) -> Result<TlsConnector, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let setup = |e: &dyn std::fmt::Display| Error::Setup { reason: e.to_string() };
    let verifier: Arc<dyn ServerCertVerifier> = match trust {
        Trust::Fingerprints(fingerprints) => {
            Arc::new(Pinned { fingerprints: fingerprints.clone(), provider: provider.clone() })
        }
        Trust::CaFile(path) => webpki(ca_file(path)?, &provider).map_err(|e| setup(&e))?,
        Trust::SystemRoots => webpki(system_roots()?, &provider).map_err(|e| setup(&e))?,
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| setup(&e))?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    // Proxmox closes many connections, so the next one should cost little: a resumed handshake has
    // no certificate to verify. Few servers need few tickets.
    config.resumption = Resumption::in_memory_sessions(8);
    Ok(Arc::new(config).into())
}

fn webpki(
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ServerCertVerifier>, rustls::client::VerifierBuilderError> {
    let verifier =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build()?;
    Ok(verifier)
}

fn ca_file(path: &Path) -> Result<RootCertStore, Error> {
    let error = |reason: String| Error::CaFile { path: path.to_owned(), reason };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|e| error(e.to_string()))? {
        let certificate = certificate.map_err(|e| error(e.to_string()))?;
        roots.add(certificate).map_err(|e| error(e.to_string()))?;
    }
    if roots.is_empty() { Err(error("it holds no PEM certificate".into())) } else { Ok(roots) }
}

fn system_roots() -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    // Single files that cannot be read or parsed do not matter while others can.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        let reason = "the system has no root certificates; set proxmox.ca_file or proxmox.fingerprint, or install \
                      the package ca-certificates";
        return Err(Error::Setup { reason: reason.into() });
    }
    Ok(roots)
}

/// The fingerprint of a certificate.
pub(super) fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    Fingerprint(Sha256::digest(certificate).into())
}

/// Accepts exactly these certificates, whatever their names, issuers and dates.
///
/// That the server holds the certificate's key is still proved: the signature checks go to the
/// provider.
#[derive(Debug)]
struct Pinned {
    fingerprints: Vec<Fingerprint>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let presented = fingerprint(end_entity);
        if self.fingerprints.contains(&presented) {
            return Ok(ServerCertVerified::assertion());
        }
        let mismatch = PinMismatch { presented, configured: self.fingerprints.clone() };
        Err(CertificateError::Other(OtherError(Arc::new(mismatch))).into())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
