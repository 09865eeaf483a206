//! Whom the mesh trusts: root certificates and the trust domains they vouch for. Not here: the check itself (`verify`).

use super::authority::files::pem;
use crate::mesh::TrustDomain;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime, pem::PemObject};
use std::{sync::Arc, time::Duration};
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, NameConstraints, ParsedExtension},
    prelude::FromDer,
};

/// More roots than any rotation needs; a larger file is a mistake, and every peer would pay for it.
const MAX_ROOTS: usize = 64;

/// What peers are checked against. One value per state of the trust bundle; nothing derived from it may outlive it.
#[derive(Debug)]
pub struct Trust {
    pub bundle: TrustBundle,
    /// The own trust domain first, then its aliases.
    pub domains: Vec<TrustDomain>,
}

impl Trust {
    pub fn has_domain(&self, name: &str) -> bool {
        self.domains.iter().any(|domain| domain.as_str() == name)
    }
}

/// One or more root certificates, each found fit to be one.
#[derive(Debug, Clone)]
pub struct TrustBundle {
    pub(super) anchors: Arc<[TrustAnchor<'static>]>,
    roots: Arc<[Root]>,
}

/// A root certificate and what webpki does not keep of it.
#[derive(Debug, Clone)]
pub struct Root {
    pub der: CertificateDer<'static>,
    pub subject: String,
    pub serial: String,
    pub not_before: UnixTime,
    pub not_after: UnixTime,
    pub(super) path_length: Option<u32>,
}

/// Why a text is no trust bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("it holds no certificate")]
    Empty,
    #[error("it holds more than {MAX_ROOTS} certificates")]
    TooMany,
    #[error("it is not PEM: {0}")]
    Pem(String),
    #[error("certificate {index} cannot be read")]
    Malformed { index: usize },
    #[error("certificate {index} ({subject}) is no CA certificate")]
    NotCa { index: usize, subject: String },
    #[error("certificate {index} ({subject}) may not sign certificates: its key usage lacks keyCertSign")]
    MayNotSign { index: usize, subject: String },
    #[error(
        "certificate {index} ({subject}) carries name constraints on URIs; no SPIFFE ID can be verified below such a CA"
    )]
    UriNameConstraints { index: usize, subject: String },
}

impl TrustBundle {
    /// All certificates of a PEM text are roots; other PEM sections are passed over.
    ///
    /// # Errors
    /// No certificate, or one that cannot be a root.
    pub fn from_pem(pem: &[u8]) -> Result<Self, BundleError> {
        let certificates = CertificateDer::pem_slice_iter(pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| BundleError::Pem(e.to_string()))?;
        Self::from_der(certificates)
    }

    /// # Errors
    /// No certificate, or one that cannot be a root.
    pub fn from_der(certificates: Vec<CertificateDer<'static>>) -> Result<Self, BundleError> {
        match certificates.len() {
            0 => return Err(BundleError::Empty),
            1..=MAX_ROOTS => {}
            _ => return Err(BundleError::TooMany),
        }
        let mut anchors = Vec::with_capacity(certificates.len());
        let mut roots = Vec::with_capacity(certificates.len());
        for (index, der) in certificates.into_iter().enumerate() {
            let root = read_root(index, &der)?;
            let anchor = webpki::anchor_from_trusted_cert(&der)
                .map_err(|_| BundleError::Malformed { index })?
                .to_owned();
            anchors.push(anchor);
            roots.push(Root { der, ..root });
        }
        Ok(Self {
            anchors: anchors.into(),
            roots: roots.into(),
        })
    }

    pub fn roots(&self) -> &[Root] {
        &self.roots
    }

    /// All roots as PEM, one after the other.
    pub fn to_pem(&self) -> String {
        self.roots.iter().map(|root| pem("CERTIFICATE", &root.der)).collect()
    }

    pub fn holds(&self, der: &CertificateDer<'_>) -> bool {
        self.roots.iter().any(|root| root.der == *der)
    }

    /// The roots that an anchor may stand for: a root that was renewed with the same key and name is there twice.
    pub(super) fn roots_of<'a>(&'a self, anchor: &'a TrustAnchor<'_>) -> impl Iterator<Item = &'a Root> {
        self.anchors
            .iter()
            .zip(self.roots.iter())
            .filter_map(move |(candidate, root)| {
                (candidate.subject == anchor.subject
                    && candidate.subject_public_key_info == anchor.subject_public_key_info)
                    .then_some(root)
            })
    }
}

fn read_root(index: usize, der: &CertificateDer<'static>) -> Result<Root, BundleError> {
    let malformed = || BundleError::Malformed { index };
    let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| malformed())?;
    if !rest.is_empty() {
        return Err(malformed());
    }
    let subject = certificate.subject().to_string();
    let authority = CaFields::of(&certificate).ok_or_else(malformed)?;
    if !authority.ca {
        return Err(BundleError::NotCa { index, subject });
    }
    if !authority.may_sign {
        return Err(BundleError::MayNotSign { index, subject });
    }
    if authority.uri_constraints {
        return Err(BundleError::UriNameConstraints { index, subject });
    }
    let validity = certificate.validity();
    Ok(Root {
        der: CertificateDer::from(Vec::new()),
        subject,
        serial: certificate.raw_serial_as_string(),
        not_before: unix_time(validity.not_before.timestamp()),
        not_after: unix_time(validity.not_after.timestamp()),
        path_length: authority.path_length,
    })
}

/// What makes a certificate a CA's, as far as it says.
#[derive(Debug, Default)]
pub(super) struct CaFields {
    pub(super) ca: bool,
    pub(super) path_length: Option<u32>,
    /// keyCertSign, or no key usage at all (old roots have none).
    pub(super) may_sign: bool,
    pub(super) uri_constraints: bool,
}

impl CaFields {
    /// `None` if one of the extensions cannot be read.
    pub(super) fn of(certificate: &X509Certificate<'_>) -> Option<Self> {
        let mut fields = Self {
            may_sign: true,
            ..Self::default()
        };
        for extension in certificate.extensions() {
            let parsed = extension.parsed_extension();
            if let ParsedExtension::BasicConstraints(constraints) = parsed {
                fields.ca = constraints.ca;
                fields.path_length = constraints.path_len_constraint;
            } else if let ParsedExtension::KeyUsage(usage) = parsed {
                fields.may_sign = usage.key_cert_sign();
            } else if let ParsedExtension::NameConstraints(constraints) = parsed {
                fields.uri_constraints = constrains_uris(constraints);
            } else if parsed.error().is_some() {
                return None;
            }
        }
        Some(fields)
    }
}

fn constrains_uris(constraints: &NameConstraints<'_>) -> bool {
    [&constraints.permitted_subtrees, &constraints.excluded_subtrees]
        .into_iter()
        .flatten()
        .flatten()
        .any(|subtree| matches!(subtree.base, GeneralName::URI(_)))
}

/// Seconds since 1970; what lies before is taken for 1970.
pub(super) fn unix_time(seconds: i64) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
}
