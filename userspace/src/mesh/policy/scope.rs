//! Which workloads a policy selects, and policies found by namespace.

use super::{Authorization, PeerAuth};
use crate::mesh::Workload;
use imbl::OrdMap;
use std::{collections::BTreeMap, sync::Arc};

/// What a policy selects. In the root namespace it reaches the whole mesh, elsewhere its own namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Scope {
    #[default]
    Namespace,
    /// The workloads that carry all of these labels.
    Selector(BTreeMap<String, String>),
    /// `targetRefs`: a waypoint's or gateway's business, nothing at L4.
    Waypoint,
}

/// Policies of one kind. The only copy: by namespace, since a workload is selected by its own namespace and the root's.
#[derive(Debug, Clone)]
pub struct Policies<T> {
    namespaces: OrdMap<Arc<str>, OrdMap<Arc<str>, Arc<T>>>,
}

/// What `Policies` needs to know of a policy.
pub trait Policy {
    fn namespace(&self) -> &Arc<str>;
    fn name(&self) -> &Arc<str>;
    fn scope(&self) -> &Scope;
}

impl Scope {
    /// `of` is the policy's namespace.
    pub fn selects(&self, of: &str, root_namespace: &str, workload: &Workload) -> bool {
        let reaches = of == root_namespace || *of == *workload.namespace;
        reaches
            && match self {
                Self::Namespace => true,
                Self::Selector(labels) => labels.iter().all(|(name, value)| workload.label(name) == Some(value)),
                Self::Waypoint => false,
            }
    }

    /// The word of the table `policies`.
    pub fn word(&self, of: &str, root_namespace: &str) -> &'static str {
        match self {
            Self::Namespace if of == root_namespace => "Global",
            Self::Namespace => "Namespace",
            Self::Selector(_) => "WorkloadSelector",
            Self::Waypoint => "Waypoint",
        }
    }
}

impl<T: Policy> Policies<T> {
    /// Takes the place of the policy of the same namespace and name.
    pub fn insert(&mut self, policy: impl Into<Arc<T>>) {
        let policy = policy.into();
        self.namespaces
            .entry(Arc::clone(policy.namespace()))
            .or_default()
            .insert(Arc::clone(policy.name()), Arc::clone(&policy));
    }

    pub fn remove(&mut self, namespace: &str, name: &str) -> Option<Arc<T>> {
        let of_namespace = self.namespaces.get_mut(namespace)?;
        let removed = of_namespace.remove(name);
        if of_namespace.is_empty() {
            self.namespaces.remove(namespace);
        }
        removed
    }

    pub fn get(&self, namespace: &str, name: &str) -> Option<&Arc<T>> {
        self.namespaces.get(namespace)?.get(name)
    }

    /// All of them, by namespace and name.
    pub fn values(&self) -> impl Iterator<Item = &Arc<T>> {
        self.namespaces.values().flat_map(OrdMap::values)
    }

    pub fn len(&self) -> usize {
        self.namespaces.values().map(OrdMap::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
    }

    /// Those that select `workload`: the root namespace's first, each namespace's by name.
    pub fn selecting<'a>(&'a self, root_namespace: &'a str, workload: &'a Workload) -> impl Iterator<Item = &'a T> {
        let own = &*workload.namespace;
        let other = (own != root_namespace).then_some(own);
        [Some(root_namespace), other]
            .into_iter()
            .flatten()
            .filter_map(|namespace| self.namespaces.get(namespace))
            .flat_map(OrdMap::values)
            .map(Arc::as_ref)
            .filter(move |policy| policy.scope().selects(policy.namespace(), root_namespace, workload))
    }

    /// True if nothing changed between the two for workloads of `namespace`. Costs no walk.
    pub(super) fn unchanged_for(&self, other: &Self, root_namespace: &str, namespace: &str) -> bool {
        [root_namespace, namespace].into_iter().all(|name| {
            match (self.namespaces.get(name), other.namespaces.get(name)) {
                (None, None) => true,
                (Some(one), Some(two)) => one.ptr_eq(two),
                (Some(_), None) | (None, Some(_)) => false,
            }
        })
    }
}

impl<T> Default for Policies<T> {
    fn default() -> Self {
        Self {
            namespaces: OrdMap::new(),
        }
    }
}

macro_rules! policy {
    ($($name:ident)+) => { $(
        impl Policy for $name {
            fn namespace(&self) -> &Arc<str> {
                &self.namespace
            }
            fn name(&self) -> &Arc<str> {
                &self.name
            }
            fn scope(&self) -> &Scope {
                &self.scope
            }
        }
    )+ };
}
policy!(Authorization PeerAuth);
