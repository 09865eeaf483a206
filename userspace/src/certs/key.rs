//! The daemon's own key: made at start, kept in memory, never written. All its SVIDs certify this one key.

use super::tls;
use crate::mesh::SpiffeId;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::sign::SigningKey;
use rustls_pki_types::PrivateKeyDer;
use std::{fmt, sync::Arc};

/// A private key with what is made from it: requests for certificates, and signatures in handshakes.
#[derive(Clone)]
pub struct DaemonKey {
    pair: Arc<KeyPair>,
    signing: Arc<dyn SigningKey>,
}

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("the key cannot be made")]
    Generate(#[source] rcgen::Error),
    #[error("the key cannot be used for TLS")]
    Unusable(#[source] rustls::Error),
    #[error("the certificate request cannot be made")]
    Request(#[source] rcgen::Error),
}

impl DaemonKey {
    /// A fresh ECDSA P-256 key: the cheapest to sign with of those that every peer accepts.
    ///
    /// # Errors
    /// The cryptography library fails.
    pub fn generate() -> Result<Self, KeyError> {
        Self::new(KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(KeyError::Generate)?)
    }

    /// # Errors
    /// A key that TLS cannot use.
    pub fn new(pair: KeyPair) -> Result<Self, KeyError> {
        let der = PrivateKeyDer::Pkcs8(pair.serialize_der().into());
        let signing = tls::provider()
            .key_provider
            .load_private_key(der)
            .map_err(KeyError::Unusable)?;
        Ok(Self {
            pair: Arc::new(pair),
            signing,
        })
    }

    pub fn signing(&self) -> Arc<dyn SigningKey> {
        self.signing.clone()
    }

    /// A PKCS #10 request for `id`, PEM.
    ///
    /// # Errors
    /// An identity that is no IA5 text (none is), or the cryptography library fails.
    pub fn request(&self, id: &SpiffeId) -> Result<String, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().map_err(KeyError::Request)?)];
        params
            .serialize_request(&*self.pair)
            .and_then(|request| request.pem())
            .map_err(KeyError::Request)
    }
}

impl fmt::Debug for DaemonKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DaemonKey")
    }
}
