//! The certificates: an authority of its own and a leaf for the loopback, new at each start.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

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
struct Leaf {
    config: Arc<ServerConfig>,
    fingerprint: String,
}

/// The certificate of the nodes, which can be replaced by another of the same authority.
pub struct Certificate {
    ca: rcgen::Certificate,
    ca_key: KeyPair,
    names: Vec<String>,
    leaf: RwLock<Leaf>,
}

impl Certificate {
    /// Makes an authority and a first certificate. `names` are its host names and addresses.
    pub fn new(names: &[&str]) -> Result<Self, TlsError> {
        let ca_key = KeyPair::generate()?;
        let mut ca = CertificateParams::default();
        ca.distinguished_name.push(DnType::CommonName, "Proxmox Virtual Environment (simulated)");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let ca = ca.self_signed(&ca_key)?;
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let leaf = RwLock::new(leaf(&names, &ca, &ca_key)?);
        Ok(Self { ca, ca_key, names, leaf })
    }

    /// Replaces the certificate; connections that exist keep theirs.
    pub fn rotate(&self) -> Result<(), TlsError> {
        let leaf = leaf(&self.names, &self.ca, &self.ca_key)?;
        *self.leaf.write().unwrap_or_else(PoisonError::into_inner) = leaf;
        Ok(())
    }

    fn leaf(&self) -> RwLockReadGuard<'_, Leaf> {
        self.leaf.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// For the next connection.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.leaf().config.clone()
    }

    /// The authority's certificate in PEM.
    pub fn ca_pem(&self) -> String {
        self.ca.pem()
    }

    /// SHA-256 of the certificate, as Proxmox VE writes it: `AA:BB:…`.
    pub fn fingerprint(&self) -> String {
        self.leaf().fingerprint.clone()
    }
}

fn leaf(names: &[String], ca: &rcgen::Certificate, ca_key: &KeyPair) -> Result<Leaf, TlsError> {
    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(names.to_vec())?;
    if let Some(name) = names.first() {
        leaf.distinguished_name.push(DnType::CommonName, name);
    }
    leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = leaf.signed_by(&key, ca, ca_key)?;

    let digest = Sha256::digest(leaf.der());
    let fingerprint: Vec<String> = digest.iter().map(|b| format!("{b:02X}")).collect();
    let private = PrivatePkcs8KeyDer::from(key.serialize_der());
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone(), ca.der().clone()], private.into())?;
    Ok(Leaf { config: Arc::new(config), fingerprint: fingerprint.join(":") })
}
