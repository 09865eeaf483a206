//! AuthorizationPolicy and PeerAuthentication as Kubernetes holds them, read into their parsed forms. Whatever cannot be
//! judged makes the policy stricter, never weaker, and is reported. A null is no absence here: `action:` with nothing behind
//! it is half a policy, and the other half may be on its way.

mod rules;
#[cfg(test)]
mod tests;

use super::{
    field::{Field, Findings},
    objects::Meta,
    problem::Flaw,
};
use crate::mesh::policy::{Action, Authorization, MutualTls, PeerAuth, Scope};
use rules::RuleReader;
use std::{collections::BTreeMap, sync::Arc};

const DRY_RUN: &str = "istio.io/dry-run";

/// A policy as read, or what stands in for one that nobody can understand: it fails closed for what it selects.
#[derive(Debug)]
pub(super) enum Policy<T> {
    Read(T),
    StandIn(T),
}

/// Reads one AuthorizationPolicy. Never fails: see `Policy::StandIn`.
pub(super) fn authorization(meta: &Meta, object: &Field<'_>, findings: &mut Findings) -> Policy<Authorization> {
    let spec = object.get_even_null("spec");
    let (mut understood, action) = action(&spec, findings);
    let scope = scope(&spec, true, findings).unwrap_or_else(|()| {
        understood = false;
        Scope::Namespace
    });
    let rules = spec.get_even_null("rules");
    if (!spec.is_absent() && !spec.is_object()) || (!rules.is_absent() && !rules.is_list()) {
        findings.add(
            if spec.is_object() { &rules } else { &spec },
            Flaw::WrongType {
                expected: if spec.is_object() { "a list" } else { "an object" },
            },
        );
        understood = false;
    }
    for key in spec.keys() {
        if !["action", "selector", "targetRefs", "targetRef", "rules", "provider"].contains(&key) {
            findings.add(&spec.get_even_null(key), Flaw::UnknownField);
            understood = false;
        }
    }
    let (namespace, name) = (Arc::clone(&meta.namespace), Arc::clone(&meta.name));
    let dry_run = dry_run(meta, object, findings);
    if !understood {
        let stand_in = Authorization {
            scope,
            dry_run,
            ..Authorization::unreadable(namespace, name)
        };
        return Policy::StandIn(match action {
            Action::Deny => {
                findings.add(
                    object,
                    Flaw::FailsClosed {
                        consequence: "it denies everything that it may select",
                    },
                );
                stand_in
            }
            Action::Allow => {
                findings.add(
                    object,
                    Flaw::FailsClosed {
                        consequence: "it allows nothing",
                    },
                );
                Authorization {
                    action,
                    rules: Vec::new(),
                    ..stand_in
                }
            }
            Action::Audit | Action::Custom => Authorization {
                action,
                rules: Vec::new(),
                ..stand_in
            },
        });
    }
    match action {
        _ if scope == Scope::Waypoint => {}
        Action::Audit => findings.add(&spec.get("action"), Flaw::NotEnforced("AUDIT")),
        Action::Custom => findings.add(&spec.get("action"), Flaw::NotEnforced("CUSTOM")),
        Action::Allow | Action::Deny => {}
    }
    let mut reader = RuleReader {
        namespace: &meta.namespace,
        action,
        findings,
    };
    // What a waypoint enforces may well speak HTTP: nothing to report here.
    let mut unheard = Findings::default();
    if scope == Scope::Waypoint {
        reader.findings = &mut unheard;
    }
    let rules = rules
        .list(&mut Findings::default())
        .iter()
        .map(|rule| reader.rule(rule))
        .collect();
    Policy::Read(Authorization {
        namespace,
        name,
        action,
        scope,
        rules,
        dry_run,
    })
}

/// Reads one PeerAuthentication. Never fails: see `Policy::StandIn`.
pub(super) fn peer_authentication(meta: &Meta, object: &Field<'_>, findings: &mut Findings) -> Policy<PeerAuth> {
    let spec = object.get_even_null("spec");
    let before = findings.0.len();
    let scope = scope(&spec, false, findings);
    if !spec.is_absent() && !spec.is_object() {
        findings.add(&spec, Flaw::WrongType { expected: "an object" });
    }
    for key in spec
        .keys()
        .filter(|key| !["selector", "mtls", "portLevelMtls"].contains(key))
    {
        findings.add(&spec.get_even_null(key), Flaw::UnknownField);
    }
    let mode = mode(&spec.get_even_null("mtls"), findings);
    let port_level = spec.get_even_null("portLevelMtls");
    if !port_level.is_absent() && !port_level.is_object() {
        findings.add(
            &port_level,
            Flaw::WrongType {
                expected: "a map from port to mode",
            },
        );
    }
    let mut ports = BTreeMap::new();
    for key in port_level.keys() {
        let entry = port_level.get_even_null(key);
        match key.parse::<u16>() {
            Ok(port) if port > 0 => {
                ports.insert(port, self::mode(&entry, findings));
            }
            Ok(_) | Err(_) => {
                findings.add(
                    &entry,
                    Flaw::WrongValue {
                        value: key.to_owned(),
                        expected: "a port from 1 to 65535",
                    },
                );
            }
        }
    }
    let understood = findings.0.len() == before;
    let (namespace, name) = (Arc::clone(&meta.namespace), Arc::clone(&meta.name));
    let scope = match scope {
        Ok(scope) if understood => scope,
        scope => {
            findings.add(
                object,
                Flaw::FailsClosed {
                    consequence: "what it may select is STRICT",
                },
            );
            let stand_in = PeerAuth::unreadable(namespace, name);
            return Policy::StandIn(PeerAuth {
                scope: scope.unwrap_or_default(),
                created: meta.created,
                ..stand_in
            });
        }
    };
    if !ports.is_empty() && !matches!(scope, Scope::Selector(_)) {
        findings.add(&port_level, Flaw::NeedsSelector);
        ports.clear();
    }
    Policy::Read(PeerAuth {
        namespace,
        name,
        created: meta.created,
        scope,
        mode,
        ports,
        unreadable: false,
    })
}

/// False beside an action that nobody understands, which is then DENY.
fn action(spec: &Field<'_>, findings: &mut Findings) -> (bool, Action) {
    let field = spec.get_even_null("action");
    if field.is_absent() {
        return (true, Action::Allow);
    }
    match field.text(findings) {
        Some("ALLOW") => (true, Action::Allow),
        Some("DENY") => (true, Action::Deny),
        Some("AUDIT") => (true, Action::Audit),
        Some("CUSTOM") => (true, Action::Custom),
        Some(other) => {
            let flaw = Flaw::WrongValue {
                value: other.to_owned(),
                expected: "ALLOW, DENY, AUDIT or CUSTOM",
            };
            findings.add(&field, flaw);
            (false, Action::Deny)
        }
        None => (false, Action::Deny),
    }
}

fn scope(spec: &Field<'_>, may_target: bool, findings: &mut Findings) -> Result<Scope, ()> {
    let [selector, targets, target] = ["selector", "targetRefs", "targetRef"].map(|key| spec.get_even_null(key));
    if may_target {
        if !targets.is_absent() && !targets.is_list() {
            findings.add(&targets, Flaw::WrongType { expected: "a list" });
            return Err(());
        }
        if !target.is_absent() && !target.is_object() {
            findings.add(&target, Flaw::WrongType { expected: "an object" });
            return Err(());
        }
        // An empty list targets nothing in particular: as if it were not there.
        if !target.is_absent() || !targets.list(findings).is_empty() {
            if selector.is_absent() {
                return Ok(Scope::Waypoint);
            }
            findings.add(
                &selector,
                Flaw::WrongType {
                    expected: "allowed beside targetRefs",
                },
            );
            return Err(());
        }
    }
    if selector.is_absent() {
        return Ok(Scope::Namespace);
    }
    let before = findings.0.len();
    if !selector.is_object() {
        findings.add(&selector, Flaw::WrongType { expected: "an object" });
    }
    for key in selector.keys().filter(|key| *key != "matchLabels") {
        findings.add(&selector.get_even_null(key), Flaw::UnknownField);
    }
    let labels = selector.get_even_null("matchLabels").texts(findings);
    if findings.0.len() > before {
        return Err(());
    }
    Ok(if labels.is_empty() {
        Scope::Namespace
    } else {
        Scope::Selector(labels)
    })
}

fn dry_run(meta: &Meta, object: &Field<'_>, findings: &mut Findings) -> bool {
    match meta.annotations.get(DRY_RUN).map(String::as_str) {
        Some("true" | "True" | "TRUE" | "t" | "T" | "1") => true,
        None | Some("false" | "False" | "FALSE" | "f" | "F" | "0") => false,
        Some(other) => {
            let flaw = Flaw::WrongValue {
                value: other.to_owned(),
                expected: "\"true\" or \"false\"",
            };
            findings.add(&object.get("metadata").get("annotations").get(DRY_RUN), flaw);
            false
        }
    }
}

/// `None` is UNSET; what cannot be read is UNSET and reported.
fn mode(mtls: &Field<'_>, findings: &mut Findings) -> Option<MutualTls> {
    if !mtls.is_absent() && !mtls.is_object() {
        findings.add(
            mtls,
            Flaw::WrongType {
                expected: "an object with a mode",
            },
        );
    }
    for key in mtls.keys().filter(|key| *key != "mode") {
        findings.add(&mtls.get_even_null(key), Flaw::UnknownField);
    }
    let field = mtls.get_even_null("mode");
    match field.text(findings)? {
        "STRICT" => Some(MutualTls::Strict),
        "PERMISSIVE" | "DISABLE" => Some(MutualTls::Permissive),
        "UNSET" => None,
        other => {
            let flaw = Flaw::WrongValue {
                value: other.to_owned(),
                expected: "STRICT, PERMISSIVE, DISABLE or UNSET",
            };
            findings.add(&field, flaw);
            None
        }
    }
}
