//! An AuthorizationPolicy in its parsed form, and what it means for one connection. Not here: reading it from
//! Kubernetes objects (`kubernetes::policies`), and which workloads it selects (`scope`).

use super::{Facts, Scope};
use crate::mesh::SpiffeId;
use ipnet::IpNet;
use std::{fmt, sync::Arc};

/// One AuthorizationPolicy, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorization {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub action: Action,
    pub scope: Scope,
    /// Any of them; a policy without rules never matches.
    pub rules: Vec<Rule>,
    /// `istio.io/dry-run: "true"`: evaluated and reported, never enforced.
    pub dry_run: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Action {
    #[default]
    Allow,
    Deny,
    /// Not enforced at L4.
    Audit,
    /// Not enforced at L4.
    Custom,
}

/// The AND of its three lists. `from` and `to` are each satisfied by any one entry (an empty list by everything);
/// `when` by all of them together: "one source, one operation and all conditions" (Istio's reference, `Rule`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    pub from: Vec<Source>,
    pub to: Vec<Operation>,
    pub when: Vec<Condition>,
    /// It has fields that cannot be judged at L4: HTTP fields, or values nobody can read. They are left out above, so an
    /// ALLOW rule with them never matches and a DENY rule matches more: stricter both ways.
    pub beyond_l4: bool,
}

/// `from.source`: the AND of its fields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Source {
    pub principals: OneOf<Pattern>,
    pub namespaces: OneOf<Pattern>,
    pub service_accounts: OneOf<AccountPattern>,
    pub ip_blocks: OneOf<IpNet>,
}

/// `to.operation`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Operation {
    pub ports: OneOf<u16>,
}

/// One entry of `when`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    SourceIp(OneOf<IpNet>),
    SourceNamespace(OneOf<Pattern>),
    SourcePrincipal(OneOf<Pattern>),
    DestinationIp(OneOf<IpNet>),
    DestinationPort(OneOf<u16>),
}

/// A field and its `not…` form: any of `values` (none given: everything), and none of `not_values`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OneOf<T> {
    pub values: Vec<T>,
    pub not_values: Vec<T>,
}

/// How a text is compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pattern {
    Exact(Box<str>),
    Prefix(Box<str>),
    Suffix(Box<str>),
    /// `*`: there, and not empty.
    Present,
}

/// A service account of a namespace, in any trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccountPattern {
    pub namespace: Pattern,
    pub service_account: Pattern,
}

impl Authorization {
    /// What stands in for a policy that nobody can read: everything it might select is denied.
    pub fn unreadable(namespace: Arc<str>, name: Arc<str>) -> Self {
        Self {
            namespace,
            name,
            action: Action::Deny,
            scope: Scope::Namespace,
            rules: vec![Rule::default()],
            dry_run: false,
        }
    }

    /// True if any rule matches.
    pub fn matches(&self, facts: &Facts) -> bool {
        self.rules
            .iter()
            .any(|rule| !(rule.beyond_l4 && self.action == Action::Allow) && rule.matches(facts))
    }
}

impl Rule {
    /// True if everything in it that can be judged at L4 holds.
    fn matches(&self, facts: &Facts) -> bool {
        (self.from.is_empty() || self.from.iter().any(|source| source.matches(facts)))
            && (self.to.is_empty() || self.to.iter().any(|operation| operation.matches(facts)))
            && self.when.iter().all(|condition| condition.matches(facts))
    }

    /// True if it has no field left to judge: it matches every connection.
    pub fn matches_everything(&self) -> bool {
        self.when.iter().all(Condition::is_empty)
            && (self.from.is_empty() || self.from.contains(&Source::default()))
            && (self.to.is_empty() || self.to.contains(&Operation::default()))
    }
}

impl Source {
    fn matches(&self, facts: &Facts) -> bool {
        self.principals.text(facts.peer.as_ref().map(SpiffeId::principal))
            && self.namespaces.text(facts.peer.as_ref().map(SpiffeId::namespace))
            && self
                .service_accounts
                .any(|account| facts.peer.as_ref().is_some_and(|peer| account.matches(peer)))
            && self.ip_blocks.address(facts.source)
    }
}

impl Operation {
    fn matches(&self, facts: &Facts) -> bool {
        self.ports.any(|port| *port == facts.destination.port())
    }
}

impl Condition {
    fn matches(&self, facts: &Facts) -> bool {
        match self {
            Self::SourceIp(blocks) => blocks.address(facts.source),
            Self::SourceNamespace(patterns) => patterns.text(facts.peer.as_ref().map(SpiffeId::namespace)),
            Self::SourcePrincipal(patterns) => patterns.text(facts.peer.as_ref().map(SpiffeId::principal)),
            Self::DestinationIp(blocks) => blocks.address(facts.destination),
            Self::DestinationPort(ports) => ports.any(|port| *port == facts.destination.port()),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::SourceIp(values) | Self::DestinationIp(values) => values.is_empty(),
            Self::SourceNamespace(values) | Self::SourcePrincipal(values) => values.is_empty(),
            Self::DestinationPort(values) => values.is_empty(),
        }
    }
}

impl<T> OneOf<T> {
    pub fn is_empty(&self) -> bool {
        self.values.is_empty() && self.not_values.is_empty()
    }

    fn any(&self, holds: impl Fn(&T) -> bool) -> bool {
        (self.values.is_empty() || self.values.iter().any(&holds)) && !self.not_values.iter().any(&holds)
    }
}

impl OneOf<Pattern> {
    /// An absent text matches no pattern, and therefore every `not…` form.
    fn text(&self, text: Option<&str>) -> bool {
        self.any(|pattern| text.is_some_and(|text| pattern.matches(text)))
    }
}

impl OneOf<IpNet> {
    fn address(&self, address: std::net::SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        self.any(|block| block.contains(&ip))
    }
}

impl<T> Default for OneOf<T> {
    fn default() -> Self {
        Self {
            values: Vec::new(),
            not_values: Vec::new(),
        }
    }
}

impl Pattern {
    /// `*`, `*suffix`, `prefix*` or an exact text. A star elsewhere stands for itself, as in Istio.
    pub fn new(text: &str) -> Self {
        match (text.strip_prefix('*'), text.strip_suffix('*')) {
            (Some(""), _) => Self::Present,
            (Some(suffix), _) => Self::Suffix(suffix.into()),
            (None, Some(prefix)) => Self::Prefix(prefix.into()),
            (None, None) => Self::Exact(text.into()),
        }
    }

    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == &**exact,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Present => !text.is_empty(),
        }
    }
}

impl AccountPattern {
    /// `namespace/service-account`, or `service-account` of the policy's own namespace.
    pub fn new(text: &str, policy_namespace: &str) -> Self {
        match text.split_once('/') {
            Some((namespace, account)) => Self {
                namespace: Pattern::new(namespace),
                service_account: Pattern::new(account),
            },
            None => Self {
                namespace: Pattern::Exact(policy_namespace.into()),
                service_account: Pattern::new(text),
            },
        }
    }

    fn matches(&self, peer: &SpiffeId) -> bool {
        self.namespace.matches(peer.namespace()) && self.service_account.matches(peer.service_account())
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
            Self::Custom => "CUSTOM",
        })
    }
}
