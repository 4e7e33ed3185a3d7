//! The certificates: an authority of its own and a leaf for the loopback, new at each start.

use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use sha2::{Digest, Sha256};
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The library does not take it.
    #[error("cannot set up TLS: {0}")]
    Setup(#[from] tokio_rustls::rustls::Error),
}

/// What the server shows and what clients can check it by.
pub struct Identity {
    /// For the server.
    pub config: Arc<ServerConfig>,
    /// The authority's certificate in PEM.
    pub ca_pem: String,
    /// SHA-256 of the leaf, as Proxmox VE writes it: `AA:BB:…`.
    pub fingerprint: String,
}

/// Makes both certificates. `names` are the leaf's host names and addresses.
pub fn identity(names: &[&str]) -> Result<Identity, TlsError> {
    let ca_key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.distinguished_name.push(DnType::CommonName, "Proxmox Virtual Environment (simulated)");
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca = ca.self_signed(&ca_key)?;

    let key = KeyPair::generate()?;
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    let mut leaf = CertificateParams::new(names.clone())?;
    if let Some(name) = names.first() {
        leaf.distinguished_name.push(DnType::CommonName, name);
    }
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = leaf.signed_by(&key, &ca, &ca_key)?;

    let digest = Sha256::digest(leaf.der());
    let fingerprint: Vec<String> = digest.iter().map(|b| format!("{b:02X}")).collect();
    let private = PrivatePkcs8KeyDer::from(key.serialize_der());
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone(), ca.der().clone()], private.into())?;
    Ok(Identity { config: Arc::new(config), ca_pem: ca.pem(), fingerprint: fingerprint.join(":") })
}
