//! The embedded CA: signs what its caller has decided to sign, from nothing of the request but its public key.
//! Not here: who may ask (`controller`), the files it lives in (`files`), the certificate's form (`leaf`).

pub mod files;
mod leaf;
#[cfg(test)]
mod tests;

use super::{
    bundle::{CaFields, Root, Trust, TrustBundle, unix_time},
    tls::signature_algorithms,
    verify::{PeerRejected, verify_peer},
};
use crate::mesh::{SpiffeId, TrustDomain};
use leaf::{Leaf, Name};
use rcgen::{CertificateParams, KeyPair, PublicKeyData, SigningKey};
use rustls_pki_types::{
    CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, SubjectPublicKeyInfoDer, UnixTime, pem::PemObject,
};
use std::{fmt, net::IpAddr, time::Duration};
use webpki::RawPublicKeyEntity;
use x509_parser::{
    certificate::X509Certificate,
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer,
};

/// A leaf is valid this long before it was signed, so that a node whose clock is behind can use it at once.
const BACKDATE: Duration = Duration::from_secs(120);

/// A CA certificate with its key and what is above it.
pub struct Authority {
    key: KeyPair,
    signature_algorithm: Vec<u8>,
    name: Vec<u8>,
    key_id: Option<Vec<u8>>,
    not_after: UnixTime,
    /// From this CA upwards, roots left out.
    intermediates: Vec<CertificateDer<'static>>,
    bundle: TrustBundle,
}

/// A certificate that was just signed.
#[derive(Debug, Clone)]
pub struct Signed {
    /// Leaf, intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    pub not_after: UnixTime,
    /// Colon-separated hexadecimal.
    pub serial: String,
}

/// Why certificates and a key make no CA.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("the CA certificate cannot be read")]
    Malformed,
    #[error("the CA key cannot be read")]
    Key(#[source] rcgen::Error),
    #[error("the CA key's algorithm is not supported")]
    KeyAlgorithm,
    #[error("the CA key is not the one that the CA certificate certifies")]
    KeyMismatch,
    #[error("the CA certificate is not one of a CA (basic constraints)")]
    NotCa,
    #[error("the CA certificate may not sign certificates: its key usage lacks keyCertSign")]
    MayNotSign,
    #[error("the CA certificate carries name constraints on URIs; no SPIFFE ID can be verified below such a CA")]
    UriNameConstraints,
    #[error("the CA certificate is not valid before {} (Unix time)", not_before.as_secs())]
    NotYetValid { not_before: UnixTime },
    #[error("the CA certificate expired at {} (Unix time)", not_after.as_secs())]
    Expired { not_after: UnixTime },
    #[error("what this CA signs would be refused by every node")]
    Useless(#[source] PeerRejected),
    #[error("a trial signature failed")]
    Trial(#[source] SignError),
    #[error("a new CA cannot be made")]
    Generate(#[source] rcgen::Error),
}

/// Why a request was not signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    #[error("the request is not a PEM certificate request")]
    Pem,
    #[error("the request cannot be read")]
    Malformed,
    #[error("the request's key is of a kind or size that is not accepted")]
    KeyAlgorithm,
    #[error("the request is not signed by the key it asks for")]
    BadSignature,
    #[error("the CA certificate has expired")]
    Expired,
    #[error("the CA key refused to sign")]
    Signing(#[source] rcgen::Error),
}

impl Authority {
    /// A new self-signed CA, in memory. Its certificate is valid for ten years.
    ///
    /// # Errors
    /// The cryptography library fails.
    pub fn generate(now: UnixTime) -> Result<Self, AuthorityError> {
        let made = files::Generated::new(now).map_err(AuthorityError::Generate)?;
        let bundle = TrustBundle::from_der(vec![made.certificate.clone()]).map_err(|_| AuthorityError::Malformed)?;
        Self::new(made.key, &made.certificate, Vec::new(), bundle, now)
    }

    /// A CA from its parts. `above` are the certificates between it and the roots; roots among them do no harm.
    ///
    /// # Errors
    /// Whatever would make its certificates useless: each by name, and what has none is found by a trial.
    pub fn new(
        key: KeyPair,
        certificate: &CertificateDer<'_>,
        above: Vec<CertificateDer<'static>>,
        bundle: TrustBundle,
        now: UnixTime,
    ) -> Result<Self, AuthorityError> {
        let (_, parsed) = X509Certificate::from_der(certificate).map_err(|_| AuthorityError::Malformed)?;
        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(AuthorityError::KeyMismatch);
        }
        let fields = CaFields::of(&parsed).ok_or(AuthorityError::Malformed)?;
        if !fields.ca {
            return Err(AuthorityError::NotCa);
        }
        if !fields.may_sign {
            return Err(AuthorityError::MayNotSign);
        }
        if fields.uri_constraints {
            return Err(AuthorityError::UriNameConstraints);
        }
        let (not_before, not_after) = (
            unix_time(parsed.validity().not_before.timestamp()),
            unix_time(parsed.validity().not_after.timestamp()),
        );
        if now < not_before {
            return Err(AuthorityError::NotYetValid { not_before });
        }
        if now > not_after {
            return Err(AuthorityError::Expired { not_after });
        }
        let mut intermediates = vec![certificate.clone().into_owned()];
        intermediates.extend(above);
        let mut seen = Vec::new();
        intermediates.retain(|der| {
            let fresh = !bundle.holds(der) && !seen.contains(der);
            seen.push(der.clone());
            fresh
        });
        let authority = Self {
            signature_algorithm: signature_algorithm(&key).ok_or(AuthorityError::KeyAlgorithm)?,
            key,
            name: parsed.subject().as_raw().to_vec(),
            key_id: key_id(&parsed),
            not_after,
            intermediates,
            bundle,
        };
        authority.try_out(now)?;
        Ok(authority)
    }

    /// The roots that vouch for what this CA signs.
    pub fn bundle(&self) -> &TrustBundle {
        &self.bundle
    }

    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }

    /// The roots of the bundle that vouch for what this CA signs; the others are there for the sake of other CAs.
    ///
    /// # Errors
    /// The CA cannot sign.
    pub fn vouching_roots(&self, now: UnixTime) -> Result<Vec<&Root>, AuthorityError> {
        let (signed, id, domain) = self.trial(now)?;
        let mut vouching = Vec::new();
        for root in self.bundle.roots() {
            let alone = TrustBundle::from_der(vec![root.der.clone()]).map_err(|_| AuthorityError::Malformed)?;
            let trust = Trust {
                bundle: alone,
                domains: vec![domain.clone()],
            };
            if verify_peer(&signed.chain, &trust, Some(&id), now).is_ok() {
                vouching.push(root);
            }
        }
        Ok(vouching)
    }

    /// Signs a leaf for `id` and the public key of `request` (PKCS #10, PEM), valid for `lifetime`, but not longer than
    /// the CA itself. Whatever else the request asks for is ignored.
    ///
    /// # Errors
    /// A request that cannot be read or does not prove that its sender has the key.
    pub fn sign(&self, request: &str, id: &SpiffeId, lifetime: Duration, now: UnixTime) -> Result<Signed, SignError> {
        let request = CertificateSigningRequestDer::from_pem_slice(request.as_bytes()).map_err(|_| SignError::Pem)?;
        let (rest, request) = X509CertificationRequest::from_der(&request).map_err(|_| SignError::Malformed)?;
        if !rest.is_empty() {
            return Err(SignError::Malformed);
        }
        let public_key = request.certification_request_info.subject_pki.raw;
        check_possession(
            public_key,
            request.certification_request_info.raw,
            &request.signature_value.data,
        )?;
        self.sign_leaf(&[Name::Uri(id.as_str())], public_key, lifetime, now)
    }

    /// The URIs that a request asks for in its subjectAltName, unproven.
    ///
    /// # Errors
    /// A request that cannot be read.
    pub fn requested_uris(request: &str) -> Result<Vec<String>, SignError> {
        let request = CertificateSigningRequestDer::from_pem_slice(request.as_bytes()).map_err(|_| SignError::Pem)?;
        let (_, request) = X509CertificationRequest::from_der(&request).map_err(|_| SignError::Malformed)?;
        let mut uris = Vec::new();
        for extension in request.requested_extensions().into_iter().flatten() {
            let ParsedExtension::SubjectAlternativeName(names) = extension else {
                continue;
            };
            for name in &names.general_names {
                if let GeneralName::URI(uri) = name {
                    uris.push((*uri).to_owned());
                }
            }
        }
        Ok(uris)
    }

    /// Signs a certificate for the CA's own TLS server, reached under these names and addresses.
    ///
    /// # Errors
    /// The CA has expired or its key does not sign.
    pub fn sign_server(
        &self,
        key: &KeyPair,
        names: &[String],
        addresses: &[IpAddr],
        lifetime: Duration,
        now: UnixTime,
    ) -> Result<Signed, SignError> {
        let names: Vec<_> = names
            .iter()
            .map(|name| Name::Dns(name))
            .chain(addresses.iter().copied().map(Name::Ip))
            .collect();
        self.sign_leaf(&names, &key.subject_public_key_info(), lifetime, now)
    }

    fn sign_leaf(
        &self,
        names: &[Name<'_>],
        public_key: &[u8],
        lifetime: Duration,
        now: UnixTime,
    ) -> Result<Signed, SignError> {
        if now >= self.not_after {
            return Err(SignError::Expired);
        }
        let not_after = now
            .as_secs()
            .saturating_add(lifetime.as_secs().max(1))
            .min(self.not_after.as_secs());
        let key = rcgen::SubjectPublicKeyInfo::from_der(public_key).map_err(|_| SignError::KeyAlgorithm)?;
        let leaf = Leaf {
            names,
            public_key,
            key_id: &CertificateParams::default().key_identifier(&key),
            rsa: key.algorithm() == &rcgen::PKCS_RSA_SHA256,
            not_before: now.as_secs().saturating_sub(BACKDATE.as_secs()),
            not_after,
            issuer: &self.name,
            issuer_key_id: self.key_id.as_deref(),
            signature_algorithm: &self.signature_algorithm,
        };
        let serial = leaf::random_serial();
        let to_be_signed = leaf.to_be_signed(&serial);
        let signature = self.key.sign(&to_be_signed).map_err(SignError::Signing)?;
        let mut chain = vec![leaf::certificate(&to_be_signed, &self.signature_algorithm, &signature).into()];
        chain.extend(self.intermediates.iter().cloned());
        let serial = serial.map(|byte| format!("{byte:02x}")).join(":");
        Ok(Signed {
            chain,
            not_after: UnixTime::since_unix_epoch(Duration::from_secs(not_after)),
            serial,
        })
    }

    /// Signs something and looks at it as a node would: finds a missing intermediate, a path length of 0 too many, an
    /// expired root and whatever else has no check of its own.
    fn try_out(&self, now: UnixTime) -> Result<(), AuthorityError> {
        let (signed, id, domain) = self.trial(now)?;
        let trust = Trust {
            bundle: self.bundle.clone(),
            domains: vec![domain],
        };
        verify_peer(&signed.chain, &trust, Some(&id), now).map_err(AuthorityError::Useless)?;
        Ok(())
    }

    fn trial(&self, now: UnixTime) -> Result<(Signed, SpiffeId, TrustDomain), AuthorityError> {
        let domain = TrustDomain::new("trial").map_err(|_| AuthorityError::Malformed)?;
        let id = SpiffeId::new(&domain, "trial", "trial").map_err(|_| AuthorityError::Malformed)?;
        let key = KeyPair::generate().map_err(AuthorityError::Generate)?;
        let signed = self
            .sign_leaf(
                &[Name::Uri(id.as_str())],
                &key.subject_public_key_info(),
                Duration::from_secs(60),
                now,
            )
            .map_err(AuthorityError::Trial)?;
        Ok((signed, id, domain))
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authority")
    }
}

impl Signed {
    /// As the CA's answer carries it: leaf, intermediates, roots, PEM each.
    pub fn pem_with_roots(&self, bundle: &TrustBundle) -> Vec<String> {
        let roots = bundle.roots().iter().map(|root| &root.der);
        self.chain
            .iter()
            .chain(roots)
            .map(|der| files::pem("CERTIFICATE", der))
            .collect()
    }
}

/// The signature on a request proves that its sender holds the key.
fn check_possession(public_key: &[u8], message: &[u8], signature: &[u8]) -> Result<(), SignError> {
    let public_key = SubjectPublicKeyInfoDer::from(public_key);
    let key = RawPublicKeyEntity::try_from(&public_key).map_err(|_| SignError::Malformed)?;
    let mut verdict = SignError::KeyAlgorithm;
    for algorithm in signature_algorithms().all {
        match key.verify_signature(*algorithm, message, signature) {
            Ok(()) => return Ok(()),
            Err(webpki::Error::InvalidSignatureForPublicKey) => verdict = SignError::BadSignature,
            Err(_) => {}
        }
    }
    Err(verdict)
}

fn key_id(certificate: &X509Certificate<'_>) -> Option<Vec<u8>> {
    certificate.extensions().iter().find_map(|extension| {
        if let ParsedExtension::SubjectKeyIdentifier(id) = extension.parsed_extension() {
            Some(id.0.to_vec())
        } else {
            None
        }
    })
}

fn signature_algorithm(key: &KeyPair) -> Option<Vec<u8>> {
    const ECDSA_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
    const ECDSA_SHA384: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03];
    const ECDSA_SHA512: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x04];
    const RSA_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0b];
    const ED25519: &[u8] = &[0x2b, 0x65, 0x70];
    [
        (&rcgen::PKCS_ECDSA_P256_SHA256, ECDSA_SHA256, false),
        (&rcgen::PKCS_ECDSA_P384_SHA384, ECDSA_SHA384, false),
        (&rcgen::PKCS_ECDSA_P521_SHA256, ECDSA_SHA256, false),
        (&rcgen::PKCS_ECDSA_P521_SHA384, ECDSA_SHA384, false),
        (&rcgen::PKCS_ECDSA_P521_SHA512, ECDSA_SHA512, false),
        (&rcgen::PKCS_RSA_SHA256, RSA_SHA256, true),
        (&rcgen::PKCS_ED25519, ED25519, false),
    ]
    .into_iter()
    .find_map(|(algorithm, oid, null)| (key.algorithm() == algorithm).then(|| leaf::algorithm(oid, null)))
}

/// A private key in any of the forms that CAs are kept in: PKCS #8, SEC 1, PKCS #1.
fn read_key(pem: &[u8]) -> Result<KeyPair, AuthorityError> {
    let der =
        PrivateKeyDer::from_pem_slice(pem).map_err(|_| AuthorityError::Key(rcgen::Error::CouldNotParseKeyPair))?;
    KeyPair::try_from(&der).map_err(AuthorityError::Key)
}
