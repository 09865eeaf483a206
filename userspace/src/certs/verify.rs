//! Is this certificate a workload's, and whose? The rules of SPIFFE X.509-SVID on top of webpki's path check, as a pure
//! function of certificates and time. Not here: the TLS handshake that asks (`tls`).

use super::bundle::{CaFields, Root, Trust};
use crate::mesh::{SpiffeId, identity::IdentityError};
use rustls_pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, KeyPurposeIdIter, VerifiedPath};
use x509_parser::{
    certificate::X509Certificate,
    extensions::{ExtendedKeyUsage, GeneralName, KeyUsage, ParsedExtension},
    prelude::FromDer,
};

/// Why a peer is not believed. Every refusal has its own name; metrics and logs use [`PeerRejected::reason`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerRejected {
    #[error("the peer sent no certificate")]
    NoCertificate,
    #[error("the certificate cannot be read")]
    Malformed,
    #[error("a certificate expired at {} (Unix time)", not_after.as_secs())]
    Expired { not_after: UnixTime },
    #[error("a certificate is not valid before {} (Unix time)", not_before.as_secs())]
    NotYetValid { not_before: UnixTime },
    #[error("the root certificate that vouches for it is not valid at this time")]
    RootNotValid,
    #[error("no root of the trust bundle vouches for it, directly or through the intermediates it came with")]
    UnknownIssuer,
    #[error("it is self-signed")]
    SelfSigned,
    #[error("a signature in the chain is wrong")]
    BadSignature,
    #[error("a signature in the chain uses an algorithm that is not accepted")]
    SignatureAlgorithm,
    #[error("a certificate of the chain signed another without being a CA")]
    IssuerNotCa,
    #[error("a CA certificate of the chain lacks the key usage keyCertSign")]
    IssuerMayNotSign,
    #[error("the chain is longer than a CA certificate in it allows")]
    PathLength,
    #[error("the name constraints of a CA in the chain do not allow it")]
    NameConstraints,
    #[error("a certificate of the chain carries a critical extension that is not understood")]
    CriticalExtension,
    #[error("the chain is refused: {0}")]
    Path(webpki::Error),
    #[error("the leaf is a CA certificate")]
    LeafIsCa,
    #[error("the leaf has no key usage")]
    NoKeyUsage,
    #[error("the leaf's key usage lacks digitalSignature")]
    NoDigitalSignature,
    #[error("the leaf's key usage has keyCertSign")]
    LeafSignsCertificates,
    #[error("the leaf's key usage has cRLSign")]
    LeafSignsRevocationLists,
    #[error("the extended key usage is there and lacks serverAuth")]
    NoServerAuth,
    #[error("the extended key usage is there and lacks clientAuth")]
    NoClientAuth,
    #[error("it names no URI, so no SPIFFE ID")]
    NoUri,
    #[error("it names {0} URIs, and a SPIFFE ID must be alone")]
    SeveralUris(usize),
    #[error("its URI is no SPIFFE ID of a workload")]
    NotSpiffe(#[source] IdentityError),
    #[error("its trust domain {0} is not ours")]
    TrustDomain(String),
    #[error("it proves {actual}, not {expected}")]
    Unexpected { expected: SpiffeId, actual: SpiffeId },
}

impl PeerRejected {
    /// A short fixed name, for metric labels and tests.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Malformed => "malformed",
            Self::Expired { .. } => "expired",
            Self::NotYetValid { .. } => "not_yet_valid",
            Self::RootNotValid => "root_not_valid",
            Self::UnknownIssuer => "unknown_issuer",
            Self::SelfSigned => "self_signed",
            Self::BadSignature => "bad_signature",
            Self::SignatureAlgorithm => "signature_algorithm",
            Self::IssuerNotCa => "issuer_not_ca",
            Self::IssuerMayNotSign => "issuer_may_not_sign",
            Self::PathLength => "path_length",
            Self::NameConstraints => "name_constraints",
            Self::CriticalExtension => "critical_extension",
            Self::Path(_) => "path",
            Self::LeafIsCa => "leaf_is_ca",
            Self::NoKeyUsage => "no_key_usage",
            Self::NoDigitalSignature => "no_digital_signature",
            Self::LeafSignsCertificates => "leaf_signs_certificates",
            Self::LeafSignsRevocationLists => "leaf_signs_revocation_lists",
            Self::NoServerAuth => "no_server_auth",
            Self::NoClientAuth => "no_client_auth",
            Self::NoUri => "no_uri",
            Self::SeveralUris(_) => "several_uris",
            Self::NotSpiffe(_) => "not_spiffe",
            Self::TrustDomain(_) => "trust_domain",
            Self::Unexpected { .. } => "unexpected",
        }
    }
}

/// Checks a peer's chain, leaf first, and gives the identity it proves. Pure; `now` is the time of the check.
///
/// # Errors
/// The first rule that the chain breaks: path first, since what an unproven certificate says is worth nothing.
pub fn verify_peer(
    chain: &[CertificateDer<'_>],
    trust: &Trust,
    expected: Option<&SpiffeId>,
    now: UnixTime,
) -> Result<SpiffeId, PeerRejected> {
    let (leaf, intermediates) = chain.split_first().ok_or(PeerRejected::NoCertificate)?;
    verify_leaf(leaf, intermediates, trust, expected, now)
}

pub(super) fn verify_leaf(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    trust: &Trust,
    expected: Option<&SpiffeId>,
    now: UnixTime,
) -> Result<SpiffeId, PeerRejected> {
    verify_path(leaf, intermediates, trust, now)?;
    let facts = LeafFacts::read(leaf)?;
    facts.check_usage()?;
    let actual = facts.id?;
    if !trust.has_domain(actual.trust_domain()) {
        return Err(PeerRejected::TrustDomain(actual.trust_domain().to_owned()));
    }
    match expected {
        Some(expected) if *expected != actual => Err(PeerRejected::Unexpected {
            expected: expected.clone(),
            actual,
        }),
        Some(_) | None => Ok(actual),
    }
}

/// The identity a certificate names, for a peer whose handshake has already been accepted. Proves nothing by itself.
///
/// # Errors
/// Not exactly one URI, or one that is no workload's SPIFFE ID.
pub fn peer_id(leaf: &CertificateDer<'_>) -> Result<SpiffeId, PeerRejected> {
    LeafFacts::read(leaf)?.id
}

fn verify_path(
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    trust: &Trust,
    now: UnixTime,
) -> Result<(), PeerRejected> {
    let certificate = EndEntityCert::try_from(leaf).map_err(from_webpki)?;
    let algorithms = super::tls::signature_algorithms();
    let path = certificate
        .verify_for_usage(
            algorithms.all,
            &trust.bundle.anchors,
            intermediates,
            now,
            CaMayVouch,
            None,
            None,
        )
        .map_err(|error| {
            let rejected = from_webpki(error);
            let own = certificate.issuer() == certificate.subject();
            if own && rejected == PeerRejected::UnknownIssuer {
                PeerRejected::SelfSigned
            } else {
                rejected
            }
        })?;
    check_issuers(&path, trust, now)
}

/// What webpki leaves out: the key usage of CA certificates, and everything that only the root says.
fn check_issuers(path: &VerifiedPath<'_>, trust: &Trust, now: UnixTime) -> Result<(), PeerRejected> {
    let mut below_root = 0;
    for intermediate in path.intermediate_certificates() {
        below_root += 1;
        let der = intermediate.der();
        let (_, certificate) = X509Certificate::from_der(&der).map_err(|_| PeerRejected::Malformed)?;
        let authority = CaFields::of(&certificate).ok_or(PeerRejected::Malformed)?;
        if !authority.may_sign {
            return Err(PeerRejected::IssuerMayNotSign);
        }
    }
    let valid = |root: &Root| (root.not_before..=root.not_after).contains(&now);
    let roots = || trust.bundle.roots_of(path.anchor()).filter(|root| valid(root));
    if roots().next().is_none() {
        return Err(PeerRejected::RootNotValid);
    }
    if !roots().any(|root| root.path_length.is_none_or(|most| below_root <= most)) {
        return Err(PeerRejected::PathLength);
    }
    Ok(())
}

/// What the leaf says, read in one pass; an extension that is there twice is malformed.
struct LeafFacts {
    ca: bool,
    usage: Option<KeyUsage>,
    /// (serverAuth, clientAuth), if there is an extended key usage.
    purposes: Option<(bool, bool)>,
    id: Result<SpiffeId, PeerRejected>,
}

impl LeafFacts {
    fn read(leaf: &CertificateDer<'_>) -> Result<Self, PeerRejected> {
        let (rest, certificate) = X509Certificate::from_der(leaf).map_err(|_| PeerRejected::Malformed)?;
        if !rest.is_empty() {
            return Err(PeerRejected::Malformed);
        }
        let mut facts = Self {
            ca: false,
            usage: None,
            purposes: None,
            id: Err(PeerRejected::NoUri),
        };
        let mut seen = Vec::with_capacity(certificate.extensions().len());
        for extension in certificate.extensions() {
            if seen.contains(&&extension.oid) {
                return Err(PeerRejected::Malformed);
            }
            seen.push(&extension.oid);
            let parsed = extension.parsed_extension();
            if let ParsedExtension::BasicConstraints(constraints) = parsed {
                facts.ca = constraints.ca;
            } else if let ParsedExtension::KeyUsage(usage) = parsed {
                facts.usage = Some(*usage);
            } else if let ParsedExtension::ExtendedKeyUsage(ExtendedKeyUsage {
                server_auth,
                client_auth,
                ..
            }) = parsed
            {
                facts.purposes = Some((*server_auth, *client_auth));
            } else if let ParsedExtension::SubjectAlternativeName(names) = parsed {
                facts.id = id_of(&names.general_names);
            } else if parsed.error().is_some() {
                return Err(PeerRejected::Malformed);
            }
        }
        Ok(facts)
    }

    fn check_usage(&self) -> Result<(), PeerRejected> {
        if self.ca {
            return Err(PeerRejected::LeafIsCa);
        }
        let usage = self.usage.as_ref().ok_or(PeerRejected::NoKeyUsage)?;
        if usage.key_cert_sign() {
            return Err(PeerRejected::LeafSignsCertificates);
        }
        if usage.crl_sign() {
            return Err(PeerRejected::LeafSignsRevocationLists);
        }
        if !usage.digital_signature() {
            return Err(PeerRejected::NoDigitalSignature);
        }
        match self.purposes {
            Some((false, _)) => Err(PeerRejected::NoServerAuth),
            Some((true, false)) => Err(PeerRejected::NoClientAuth),
            Some((true, true)) | None => Ok(()),
        }
    }
}

fn id_of(names: &[GeneralName<'_>]) -> Result<SpiffeId, PeerRejected> {
    let mut uris = Vec::new();
    for name in names {
        if let GeneralName::URI(uri) = name {
            uris.push(*uri);
        } else if let GeneralName::Invalid(..) = name {
            return Err(PeerRejected::Malformed);
        }
    }
    match uris.as_slice() {
        [] => Err(PeerRejected::NoUri),
        [uri] => SpiffeId::parse(uri).map_err(PeerRejected::NotSpiffe),
        several => Err(PeerRejected::SeveralUris(several.len())),
    }
}

/// The extended key usage of every certificate on the path, by webpki's rule that a CA's narrows what it may vouch for.
/// A workload is client and server at once, so both purposes must survive; the leaf is looked at more closely later.
struct CaMayVouch;

impl webpki::ExtendedKeyUsageValidator for CaMayVouch {
    fn validate(&self, purposes: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        const ANY: &[usize] = &[2, 5, 29, 37, 0];
        let (mut none, mut server, mut client) = (true, false, false);
        for purpose in purposes {
            none = false;
            let oid = purpose?.to_decoded_oid();
            server |= oid == webpki::KeyUsage::SERVER_AUTH_REPR || oid == ANY;
            client |= oid == webpki::KeyUsage::CLIENT_AUTH_REPR || oid == ANY;
        }
        let lacking = |required, present: &[usize]| {
            Err(webpki::Error::RequiredEkuNotFoundContext(
                webpki::RequiredEkuNotFoundContext {
                    required,
                    present: vec![present.to_vec()],
                },
            ))
        };
        match (none, server, client) {
            (true, _, _) | (false, true, true) => Ok(()),
            (false, false, _) => lacking(webpki::KeyUsage::server_auth(), webpki::KeyUsage::CLIENT_AUTH_REPR),
            (false, true, false) => lacking(webpki::KeyUsage::client_auth(), webpki::KeyUsage::SERVER_AUTH_REPR),
        }
    }
}

#[allow(
    clippy::wildcard_enum_match_arm,
    reason = "webpki's errors are open-ended; the rest keeps webpki's own words"
)]
fn from_webpki(error: webpki::Error) -> PeerRejected {
    use webpki::Error as E;
    match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) | E::ExtensionValueInvalid | E::MalformedExtensions => {
            PeerRejected::Malformed
        }
        E::CertExpired { not_after, .. } => PeerRejected::Expired { not_after },
        E::CertNotValidYet { not_before, .. } => PeerRejected::NotYetValid { not_before },
        E::UnknownIssuer => PeerRejected::UnknownIssuer,
        E::InvalidSignatureForPublicKey => PeerRejected::BadSignature,
        E::UnsupportedSignatureAlgorithmContext(_)
        | E::UnsupportedSignatureAlgorithmForPublicKeyContext(_)
        | E::SignatureAlgorithmMismatch => PeerRejected::SignatureAlgorithm,
        E::CaUsedAsEndEntity => PeerRejected::LeafIsCa,
        E::EndEntityUsedAsCa => PeerRejected::IssuerNotCa,
        E::PathLenConstraintViolated | E::MaximumPathDepthExceeded => PeerRejected::PathLength,
        E::NameConstraintViolation | E::MalformedNameConstraint => PeerRejected::NameConstraints,
        E::UnsupportedCriticalExtension => PeerRejected::CriticalExtension,
        E::RequiredEkuNotFoundContext(context) => {
            if context.required == webpki::KeyUsage::client_auth() {
                PeerRejected::NoClientAuth
            } else {
                PeerRejected::NoServerAuth
            }
        }
        other => PeerRejected::Path(other),
    }
}
