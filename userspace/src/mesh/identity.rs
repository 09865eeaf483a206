//! Names of workloads: trust domains and SPIFFE IDs, checked to the rules of the SPIFFE ID and X.509-SVID standards.
//! Not here: the certificates that prove them (`certs`).

use std::{fmt, sync::Arc};

const SCHEME: &str = "spiffe://";
/// Longest trust domain name, in bytes (SPIFFE ID standard, section 2.1).
const MAX_TRUST_DOMAIN: usize = 255;
/// Longest whole ID, in bytes (SPIFFE ID standard, section 2.3).
const MAX_ID: usize = 2048;

/// A trust domain name: lower case `[a-z0-9.-_]`, 1 to 255 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`, always valid.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId(Arc<str>);

/// Why a text is no SPIFFE ID of a Kubernetes workload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    #[error("the scheme is not spiffe://")]
    Scheme,
    #[error("the trust domain is empty")]
    TrustDomainEmpty,
    #[error("the trust domain has {0} bytes, more than {MAX_TRUST_DOMAIN}")]
    TrustDomainTooLong(usize),
    #[error("the trust domain has the character {0:?}; allowed are a-z, 0-9, '.', '-' and '_'")]
    TrustDomainCharacter(char),
    #[error("the path has an empty segment")]
    SegmentEmpty,
    #[error("the path has a segment {0:?}")]
    SegmentRelative(String),
    #[error("the path has the character {0:?}; allowed are a-z, A-Z, 0-9, '.', '-' and '_'")]
    SegmentCharacter(char),
    #[error("the path is not /ns/<namespace>/sa/<service account>")]
    PathForm,
    #[error("the ID has {0} bytes, more than {MAX_ID}")]
    TooLong(usize),
}

impl TrustDomain {
    /// # Errors
    /// Anything but 1 to 255 bytes of `[a-z0-9.-_]`.
    pub fn new(text: &str) -> Result<Self, IdentityError> {
        check_trust_domain(text)?;
        Ok(Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SpiffeId {
    /// # Errors
    /// A namespace or service account that cannot be a path segment.
    pub fn new(trust_domain: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, IdentityError> {
        Self::parse(&format!(
            "{SCHEME}{}/ns/{namespace}/sa/{service_account}",
            trust_domain.as_str()
        ))
    }

    /// # Errors
    /// Every departure from the standard, by name.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        if text.len() > MAX_ID {
            return Err(IdentityError::TooLong(text.len()));
        }
        let rest = text.strip_prefix(SCHEME).ok_or(IdentityError::Scheme)?;
        let (trust_domain, path) = rest.split_once('/').unwrap_or((rest, ""));
        check_trust_domain(trust_domain)?;
        let segments: Vec<&str> = path.split('/').collect();
        for segment in &segments {
            check_segment(segment)?;
        }
        match segments.as_slice() {
            ["ns", _, "sa", _] => Ok(Self(text.into())),
            _ => Err(IdentityError::PathForm),
        }
    }

    /// The whole ID, `spiffe://` included.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The ID as policies and metrics write it: without `spiffe://`.
    pub fn principal(&self) -> &str {
        &self.0[SCHEME.len()..]
    }

    pub fn trust_domain(&self) -> &str {
        self.part(0)
    }

    pub fn namespace(&self) -> &str {
        self.part(2)
    }

    pub fn service_account(&self) -> &str {
        self.part(4)
    }

    fn part(&self, index: usize) -> &str {
        self.principal().split('/').nth(index).unwrap_or_default()
    }
}

fn check_trust_domain(text: &str) -> Result<(), IdentityError> {
    if text.is_empty() {
        return Err(IdentityError::TrustDomainEmpty);
    }
    if text.len() > MAX_TRUST_DOMAIN {
        return Err(IdentityError::TrustDomainTooLong(text.len()));
    }
    match text
        .chars()
        .find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_'))
    {
        Some(c) => Err(IdentityError::TrustDomainCharacter(c)),
        None => Ok(()),
    }
}

fn check_segment(segment: &str) -> Result<(), IdentityError> {
    match segment {
        "" => return Err(IdentityError::SegmentEmpty),
        "." | ".." => return Err(IdentityError::SegmentRelative(segment.to_owned())),
        _ => {}
    }
    match segment
        .chars()
        .find(|c| !matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '-' | '_'))
    {
        Some(c) => Err(IdentityError::SegmentCharacter(c)),
        None => Ok(()),
    }
}

macro_rules! text {
    ($($name:ident)+) => { $(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )+ };
}
text!(TrustDomain SpiffeId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_gives_back_its_parts() {
        let id = SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").unwrap();
        assert_eq!(
            (id.trust_domain(), id.namespace(), id.service_account()),
            ("cluster.local", "shop", "web")
        );
        assert_eq!(id.principal(), "cluster.local/ns/shop/sa/web");
    }

    #[test]
    fn what_the_standard_forbids_is_refused_by_name() {
        for (text, why) in [
            ("http://cluster.local/ns/a/sa/b", IdentityError::Scheme),
            ("SPIFFE://cluster.local/ns/a/sa/b", IdentityError::Scheme),
            ("spiffe:///ns/a/sa/b", IdentityError::TrustDomainEmpty),
            (
                "spiffe://Cluster.local/ns/a/sa/b",
                IdentityError::TrustDomainCharacter('C'),
            ),
            (
                "spiffe://cluster.local:80/ns/a/sa/b",
                IdentityError::TrustDomainCharacter(':'),
            ),
            (
                "spiffe://me@cluster.local/ns/a/sa/b",
                IdentityError::TrustDomainCharacter('@'),
            ),
            (
                "spiffe://cluster.local/ns/../sa/b",
                IdentityError::SegmentRelative("..".into()),
            ),
            (
                "spiffe://cluster.local/ns/./sa/b",
                IdentityError::SegmentRelative(".".into()),
            ),
            ("spiffe://cluster.local/ns//sa/b", IdentityError::SegmentEmpty),
            ("spiffe://cluster.local/ns/a/sa/b/", IdentityError::SegmentEmpty),
            (
                "spiffe://cluster.local/ns/a%20/sa/b",
                IdentityError::SegmentCharacter('%'),
            ),
            (
                "spiffe://cluster.local/ns/a/sa/b?x",
                IdentityError::SegmentCharacter('?'),
            ),
            ("spiffe://cluster.local/ns/a", IdentityError::PathForm),
            ("spiffe://cluster.local", IdentityError::SegmentEmpty),
        ] {
            assert_eq!(SpiffeId::parse(text), Err(why), "{text}");
        }
        let long = format!("spiffe://{}/ns/a/sa/b", "a".repeat(256));
        assert_eq!(SpiffeId::parse(&long), Err(IdentityError::TrustDomainTooLong(256)));
        let long = format!("spiffe://a/ns/{}/sa/b", "a".repeat(2048));
        assert!(matches!(SpiffeId::parse(&long), Err(IdentityError::TooLong(_))));
    }
}
