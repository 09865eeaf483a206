//! What is wrong with an object or a file, in words for the person who wrote it: where, what, and what to do.

use super::objects::ObjectRef;
use std::{fmt, net::IpAddr, path::PathBuf, sync::Arc};

/// One flaw at one place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Problem {
    /// Where the text lies; `None` for the API server's objects.
    pub origin: Option<Origin>,
    /// `None` where the text does not even say which object it means.
    pub object: Option<ObjectRef>,
    pub finding: Finding,
}

/// A place in the directory of manifests.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    pub file: Arc<PathBuf>,
    /// Counted from 1; 0 for the file as a whole.
    pub document: usize,
    /// Counted from 1: of the flaw where the parser knows it, else where the document begins.
    pub line: Option<usize>,
}

/// A flaw and the field that has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Finding {
    /// `spec.rules[0].from[1].source.ipBlocks[0]`; empty for the object as a whole.
    pub field: String,
    pub flaw: Flaw,
}

/// What can be wrong. `name` is the metrics' label, the text is the reason, `advice` says what to do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum Flaw {
    #[error("is missing")]
    Missing,
    #[error("is empty")]
    Empty,
    #[error("is not {expected}")]
    WrongType { expected: &'static str },
    #[error("{value:?} is not {expected}")]
    WrongValue { value: String, expected: &'static str },
    #[error("is no field that Warren knows")]
    UnknownField,

    #[error("the file cannot be read: {0}")]
    FileUnreadable(String),
    #[error("the file is empty; the objects it held stay")]
    FileEmpty,
    #[error("the file has {bytes} bytes, more than {limit}")]
    FileTooLarge { bytes: u64, limit: u64 },
    #[error("the document is not valid: {0}")]
    Syntax(String),
    #[error("{api_version} {kind} is no kind that Warren knows")]
    UnknownKind { api_version: String, kind: String },
    #[error("the object is defined here and in {other}, which counts")]
    DefinedTwice { other: String },

    #[error("the pod has no address, so nobody can reach it through the mesh")]
    NoAddress,
    #[error("{address} is also an address of pod {winner}, which counts")]
    DuplicateAddress { address: IpAddr, winner: String },
    #[error("{uid} is also the UID of pod {holder}")]
    DuplicateUid { uid: String, holder: String },
    #[error("the network namespace {0:?} does not exist, so the pod counts as ended")]
    NetnsGone(PathBuf),
    #[error("there is no Namespace object of this name, so its labels count as absent")]
    NamespaceUnknown,
    #[error("{address} is also a VIP of service {winner}, which counts")]
    DuplicateVip { address: IpAddr, winner: String },

    #[error("is an HTTP field, which cannot be judged at L4: {consequence}")]
    HttpField { consequence: &'static str },
    #[error("has nothing but HTTP fields, so it denies every connection to what the policy selects")]
    DeniesEverything,
    #[error("has spiffe:// in front, which Istio does not take; read as if it were not there")]
    SchemeInPrincipal,
    #[error("the action {0} is not enforced at L4")]
    NotEnforced(&'static str),
    #[error("the policy cannot be understood: {consequence}")]
    FailsClosed { consequence: &'static str },
    #[error("counts only in a policy with a selector")]
    NeedsSelector,
}

impl Flaw {
    /// A label value: few, constant, without the text of the object.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Empty => "empty",
            Self::WrongType { .. } => "wrong_type",
            Self::WrongValue { .. } => "wrong_value",
            Self::UnknownField => "unknown_field",
            Self::FileUnreadable(_) => "file_unreadable",
            Self::FileEmpty => "file_empty",
            Self::FileTooLarge { .. } => "file_too_large",
            Self::Syntax(_) => "syntax",
            Self::UnknownKind { .. } => "unknown_kind",
            Self::DefinedTwice { .. } => "defined_twice",
            Self::NoAddress => "no_address",
            Self::DuplicateAddress { .. } => "duplicate_address",
            Self::DuplicateUid { .. } => "duplicate_uid",
            Self::NetnsGone(_) => "netns_gone",
            Self::NamespaceUnknown => "namespace_unknown",
            Self::DuplicateVip { .. } => "duplicate_vip",
            Self::HttpField { .. } => "http_field",
            Self::DeniesEverything => "denies_everything",
            Self::SchemeInPrincipal => "scheme_in_principal",
            Self::NotEnforced(_) => "not_enforced",
            Self::FailsClosed { .. } => "fails_closed",
            Self::NeedsSelector => "needs_selector",
        }
    }

    /// What to do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Missing | Self::Empty => "fill it in, or leave out what holds it",
            Self::WrongType { .. } | Self::WrongValue { .. } => "correct the value",
            Self::UnknownField => "check its spelling",
            Self::FileUnreadable(_) => "check that the file exists and may be read",
            Self::FileEmpty => "write its objects again, or delete the file to delete them",
            Self::FileTooLarge { .. } => "split the file",
            Self::Syntax(_) => "correct the document; what the file held before stays until then",
            Self::UnknownKind { .. } => "check apiVersion and kind; the document is skipped",
            Self::DefinedTwice { .. } => "delete one of the two",
            Self::NoAddress => "give status.podIP or status.podIPs",
            Self::DuplicateAddress { .. } => "give each pod an address of its own, or delete the pod that has ended",
            Self::DuplicateUid { .. } => "give each pod a UID of its own, or none",
            Self::NetnsGone(_) => "create the namespace, correct the annotation or delete the pod",
            Self::NamespaceUnknown => "add the Namespace, or label the pods themselves",
            Self::DuplicateVip { .. } => "give each service a clusterIP of its own",
            Self::HttpField { .. } => "move HTTP fields to a policy with targetRefs to a waypoint",
            Self::DeniesEverything => "move the policy to a waypoint with targetRefs, or add L4 fields",
            Self::SchemeInPrincipal => "write <trust domain>/ns/<namespace>/sa/<service account>",
            Self::NotEnforced(_) => "use ALLOW or DENY, or move the policy to a waypoint with targetRefs",
            Self::FailsClosed { .. } => "correct the policy",
            Self::NeedsSelector => "add spec.selector, or move the ports to a policy that has one",
        }
    }
}

impl Finding {
    pub fn new(field: impl Into<String>, flaw: Flaw) -> Self {
        Self {
            field: field.into(),
            flaw,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if self.document > 0 {
            write!(f, " document {}", self.document)?;
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            write!(f, "{}", self.flaw)
        } else {
            write!(f, "{}: {}", self.field, self.flaw)
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}: ")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        write!(f, "{} ({})", self.finding, self.finding.flaw.advice())
    }
}
