//! Where the API server keeps each kind: group, versions from the one preferred to the oldest that is understood.

use super::object::Object;
use crate::kubernetes::objects::Kind;
use kube::{Resource, core::ApiResource};

/// A kind and where to look for it.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) kind: Kind,
    /// In this order; never empty.
    pub(super) versions: Vec<ApiResource>,
    /// A server that does not know the kind has no objects of it, which is no error.
    pub(super) may_be_missing: bool,
}

/// Every kind that the index reads.
pub(super) fn all() -> Vec<Place> {
    const ISTIO: &[&str] = &["v1", "v1beta1"];
    [
        (Kind::Namespace, "", "namespaces", &["v1"][..], false),
        (Kind::Node, "", "nodes", &["v1"], false),
        (Kind::Pod, "", "pods", &["v1"], false),
        (Kind::Service, "", "services", &["v1"], false),
        (
            Kind::EndpointSlice,
            "discovery.k8s.io",
            "endpointslices",
            &["v1"],
            false,
        ),
        // Since 1.33, and in beta since 1.31; older servers say their service range by flag alone.
        (
            Kind::ServiceCidr,
            "networking.k8s.io",
            "servicecidrs",
            &["v1", "v1beta1"],
            true,
        ),
        (
            Kind::AuthorizationPolicy,
            "security.istio.io",
            "authorizationpolicies",
            ISTIO,
            true,
        ),
        (
            Kind::PeerAuthentication,
            "security.istio.io",
            "peerauthentications",
            ISTIO,
            true,
        ),
    ]
    .into_iter()
    .map(|(kind, group, plural, versions, may_be_missing)| Place {
        kind,
        versions: versions
            .iter()
            .map(|version| resource(kind, group, version, plural))
            .collect(),
        may_be_missing,
    })
    .collect()
}

/// Whose lists and watches a request to this path is.
pub(in crate::kubernetes) fn kind_at(path: &str) -> Option<Kind> {
    let is_here = |place: &Place| place.versions.iter().any(|v| Object::url_path(v, None) == path);
    all().into_iter().find(is_here).map(|place| place.kind)
}

fn resource(kind: Kind, group: &str, version: &str, plural: &str) -> ApiResource {
    let api_version = if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    };
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version,
        kind: kind.word().to_owned(),
        plural: plural.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_about_the_kind_it_lists_or_watches_and_one_for_a_single_object_is_about_none() {
        for (path, kind) in [
            ("/api/v1/pods", Some(Kind::Pod)),
            ("/apis/discovery.k8s.io/v1/endpointslices", Some(Kind::EndpointSlice)),
            (
                "/apis/security.istio.io/v1beta1/peerauthentications",
                Some(Kind::PeerAuthentication),
            ),
            ("/api/v1/namespaces/shop/pods/services", None),
            ("/api/v1/namespaces/shop", None),
            ("/apis/security.istio.io/v1", None),
        ] {
            assert_eq!(kind_at(path), kind, "{path}");
        }
    }
}
