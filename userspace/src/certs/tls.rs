//! How TLS is spoken in the mesh: suites and groups in HBONE's order, and the two verifiers that ask `verify`.

use super::{
    bundle::Trust,
    verify::{PeerRejected, verify_leaf},
};
use crate::mesh::SpiffeId;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms,
        aws_lc_rs::{self, cipher_suite, kx_group},
        verify_tls13_signature,
    },
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::{
    io,
    sync::{Arc, LazyLock},
};

/// What both sides offer (hbone.md, Transport): order is preference.
pub const ALPN: &[u8] = b"h2";

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1],
        ..aws_lc_rs::default_provider()
    })
});

/// The mesh's cryptography, for every TLS connection of the daemon.
pub fn provider() -> Arc<CryptoProvider> {
    PROVIDER.clone()
}

pub(super) fn signature_algorithms() -> WebPkiSupportedAlgorithms {
    PROVIDER.signature_verification_algorithms
}

/// A client's check of the server: it must prove to be exactly `expected`.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    pub(super) trust: Arc<Trust>,
    pub(super) expected: SpiffeId,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_leaf(end_entity, intermediates, &self.trust, Some(&self.expected), now)
            .map(|_| ServerCertVerified::assertion())
            .map_err(|rejected| tls_error(rejected, now))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &signature_algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        signature_algorithms().supported_schemes()
    }
}

/// A server's check of the client: any workload of our trust domains. What it may do is the policy's to say.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    pub(super) trust: Arc<Trust>,
}

impl ClientCertVerifier for ClientVerifier {
    /// Empty: a workload has one certificate, so a list of CAs would only make the handshake longer.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        verify_leaf(end_entity, intermediates, &self.trust, None, now)
            .map(|_| ClientCertVerified::assertion())
            .map_err(|rejected| tls_error(rejected, now))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &signature_algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        signature_algorithms().supported_schemes()
    }
}

/// The alert that rustls sends follows the error: times and unknown issuers have their own, the rest is
/// certificate_unknown.
fn tls_error(rejected: PeerRejected, now: UnixTime) -> Error {
    Error::InvalidCertificate(if let PeerRejected::Expired { not_after } = rejected {
        CertificateError::ExpiredContext { time: now, not_after }
    } else if let PeerRejected::NotYetValid { not_before } = rejected {
        CertificateError::NotValidYetContext { time: now, not_before }
    } else if rejected == PeerRejected::UnknownIssuer {
        CertificateError::UnknownIssuer
    } else {
        CertificateError::Other(OtherError(Arc::new(rejected)))
    })
}

/// Why our verifier ended a handshake, if it was our verifier.
pub fn rejection(error: &Error) -> Option<PeerRejected> {
    if matches!(error, Error::NoCertificatesPresented) {
        return Some(PeerRejected::NoCertificate);
    }
    let Error::InvalidCertificate(error) = error else {
        return None;
    };
    if let CertificateError::ExpiredContext { not_after, .. } = error {
        Some(PeerRejected::Expired { not_after: *not_after })
    } else if let CertificateError::NotValidYetContext { not_before, .. } = error {
        Some(PeerRejected::NotYetValid {
            not_before: *not_before,
        })
    } else if *error == CertificateError::UnknownIssuer {
        Some(PeerRejected::UnknownIssuer)
    } else if let CertificateError::Other(OtherError(cause)) = error {
        cause.downcast_ref::<PeerRejected>().cloned()
    } else {
        None
    }
}

/// The same for the error that an asynchronous handshake gives.
pub fn handshake_rejection(error: &io::Error) -> Option<PeerRejected> {
    error.get_ref()?.downcast_ref::<Error>().and_then(rejection)
}
