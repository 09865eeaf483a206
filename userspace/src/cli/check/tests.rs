//! A healthy cluster, and each fault planted into it alone.

use super::{
    diagnose,
    facts::{
        Authority, Calico, Cilium, Definition, Facts, Namespace, Node, Others, OwnNamespace, OwnPod, Pod, Report,
        Right, Root, Secret, Workload,
    },
    finding::{Problem, Severity},
};
use k8s_openapi::{api::networking::v1::NetworkPolicy, jiff::Timestamp};
use serde_json::json;

const IMAGE: &str = "warren.mesh/warren:0.1.0";
const NOW: &str = "2026-11-21T12:00:00Z";

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn node(name: &str) -> Node {
    Node {
        name: name.into(),
        kernel: "6.1.0-18-amd64".into(),
        system: "linux".into(),
        architecture: "amd64".into(),
        ..Node::default()
    }
}

fn daemon(node: &str) -> OwnPod {
    OwnPod {
        name: format!("warren-node-{node}"),
        is_daemon: true,
        node: Some(node.into()),
        ready: true,
        age_seconds: 600,
        image: IMAGE.into(),
        report: Some(Report {
            clock_ahead: Some(1),
            samples: vec![
                ("warren_cni_installed".into(), 1.0),
                ("warren_api_silent_seconds".into(), 2.0),
                ("warren_kernel_decisions_total{reason=\"drop-strict\"}".into(), 0.0),
            ],
            waits_for: Vec::new(),
        }),
        ..OwnPod::default()
    }
}

fn root() -> Root {
    Root {
        der: vec![1],
        not_before: at("2026-01-01T00:00:00Z"),
        not_after: at("2036-01-01T00:00:00Z"),
    }
}

fn pod(name: &str) -> Pod {
    Pod {
        namespace: "shop".into(),
        name: name.into(),
        labels: [("app".to_owned(), name.to_owned())].into(),
        node: Some("n1".into()),
        running: true,
        age_seconds: 300,
        wanted: true,
        captured: true,
        failure: None,
        odd_mode: None,
    }
}

fn healthy() -> Facts {
    let definition = |name: &str| Definition {
        name: format!("{name}.security.istio.io"),
        present: true,
        served: vec!["v1".into(), "v1beta1".into()],
    };
    let workload = Workload {
        wanted: 2,
        ready: 2,
        image: IMAGE.into(),
        version: "0.1.0".into(),
        audience: Some("warren-ca".into()),
        cannot_create: None,
    };
    Facts {
        now: at(NOW),
        version: "0.1.0".into(),
        kubernetes: Some((1, 36)),
        nodes: vec![node("n1"), node("n2")],
        others: Others {
            cilium: Some(Cilium {
                socket_lb: true,
                host_namespace_only: true,
                cni_exclusive: false,
            }),
            ..Others::default()
        },
        definitions: vec![definition("authorizationpolicies"), definition("peerauthentications")],
        namespace: Some(OwnNamespace {
            pod_security: Some("privileged".into()),
        }),
        controller: Some(workload.clone()),
        daemons: Some(workload),
        own_pods: vec![
            daemon("n1"),
            daemon("n2"),
            OwnPod {
                name: "warren-controller-x".into(),
                ready: true,
                age_seconds: 600,
                image: IMAGE.into(),
                ..OwnPod::default()
            },
        ],
        authority: Authority {
            external: false,
            secret: Some(Secret {
                name: "warren-ca".into(),
                roots: vec![root()],
            }),
            bundle: Some(vec![root()]),
        },
        namespaces: vec![Namespace {
            name: "shop".into(),
            labels: [("istio.io/dataplane-mode".to_owned(), "ambient".to_owned())].into(),
        }],
        pods: vec![pod("web"), pod("db")],
        strict: vec!["shop/default".into()],
        ..Facts::default()
    }
}

/// A policy for all pods of namespace shop.
fn network_policy(spec: serde_json::Value) -> NetworkPolicy {
    let mut spec = spec;
    spec["podSelector"] = json!({});
    serde_json::from_value(json!({"metadata": {"namespace": "shop", "name": "only-web"}, "spec": spec})).unwrap()
}

fn report(facts: &mut Facts) -> &mut Report {
    facts.own_pods[0].report.as_mut().unwrap()
}

type Plant = fn(&mut Facts);

/// Each fault, by the name under which it must be found, and what its finding must speak of.
const FAULTS: &[(&str, &str, Plant)] = &[
    ("api-away", "refused", |f| {
        f.api_away = Some("connection refused".into())
    }),
    ("not-checked", "Secret", |f| {
        f.unreadable = vec![("Secret warren-system/warren-ca".into(), "forbidden".into())];
    }),
    ("kubernetes-too-old", "1.25", |f| f.kubernetes = Some((1, 25))),
    ("kernel-too-old", "node n2", |f| {
        f.nodes[1].kernel = "5.15.0-1053-aws".into()
    }),
    ("node-unsupported", "riscv64", |f| {
        f.nodes[1].architecture = "riscv64".into()
    }),
    ("node-not-ready", "kubelet stopped posting", |f| {
        f.nodes[1].not_ready = Some("kubelet stopped posting node status".into());
    }),
    ("node-pressure", "free space", |f| {
        f.nodes[1].pressures = vec!["DiskPressure".into()]
    }),
    ("node-pressure", "describe node n2", |f| {
        f.nodes[1].pressures = vec!["MemoryPressure".into()]
    }),
    ("cilium-socket-lb", "socketLB.hostNamespaceOnly=true", |f| {
        f.others.cilium.as_mut().unwrap().host_namespace_only = false;
    }),
    ("cilium-cni-exclusive", "cni.exclusive=false", |f| {
        f.others.cilium.as_mut().unwrap().cni_exclusive = true;
    }),
    ("calico-connect-time-lb", "bpfConnectTimeLoadBalancing", |f| {
        f.others.calico = Some(Calico {
            bpf: true,
            connect_time_balancing: "TCP".into(),
        });
    }),
    ("strict-network-policy", "15008", |f| {
        f.others.aws_policy_mode = Some("strict".into())
    }),
    ("second-mesh", "istio-system/ztunnel", |f| {
        f.others.ambient = vec!["istio-system/ztunnel".into()]
    }),
    ("definition-missing", "peerauthentications", |f| {
        f.definitions[1].present = false
    }),
    ("definition-version", "v1alpha1", |f| {
        f.definitions[0].served = vec!["v1alpha1".into()]
    }),
    (
        "right-missing",
        "watch endpointslices.discovery.k8s.io in all namespaces",
        |f| {
            f.missing_rights = vec![Right {
                account: Some("warren-node".into()),
                verb: "watch".into(),
                resource: "endpointslices.discovery.k8s.io".into(),
                namespace: None,
            }];
        },
    ),
    ("pod-security", "enforce=privileged", |f| {
        f.namespace = Some(OwnNamespace {
            pod_security: Some("baseline".into()),
        });
    }),
    ("not-installed", "warren install", |f| f.daemons = None),
    ("version-skew", "0.9.0", |f| f.version = "0.9.0".into()),
    ("version-skew", "node n1", |f| {
        f.own_pods[0].image = "warren.mesh/warren:0.0.9".into()
    }),
    ("version-skew", "warren-controller", |f| {
        f.controller.as_mut().unwrap().image = "warren.mesh/warren:0.0.9".into();
    }),
    ("image-missing", "ImagePullBackOff", |f| {
        f.own_pods[0].ready = false;
        f.own_pods[0].waiting = Some(("ImagePullBackOff".into(), "no such host".into()));
    }),
    ("pods-refused", "quota", |f| {
        f.daemons.as_mut().unwrap().cannot_create = Some("insufficient quota to match these scopes".into());
    }),
    ("controller-not-ready", "no lease", |f| {
        f.controller.as_mut().unwrap().ready = 0;
        f.own_pods[2].ready = false;
        f.own_pods[2].last_words = Some("no lease".into());
    }),
    (
        "controller-not-ready",
        "untolerated taint(s). Taints: disk:NoSchedule (1 of 2 nodes) → give it a node",
        |f| {
            f.controller.as_mut().unwrap().ready = 0;
            f.own_pods[2].ready = false;
            f.own_pods[2].unschedulable = Some("0/2 nodes are available: 2 node(s) had untolerated taint(s).".into());
            f.nodes[0].taints = vec!["disk:NoSchedule".into()];
        },
    ),
    ("controller-not-ready", "not there", |f| f.controller = None),
    ("root-missing", "warren-ca", |f| f.authority.secret = None),
    ("root-expired", "2026-11-20", |f| expire(f, "2026-11-20T00:00:00Z")),
    ("root-expiring", "9 days", |f| expire(f, "2026-12-01T00:00:00Z")),
    ("root-not-yet-valid", "2027", |f| {
        let root = Root {
            not_before: at("2027-01-01T00:00:00Z"),
            ..root()
        };
        f.authority.bundle = Some(vec![root.clone()]);
        f.authority.secret.as_mut().unwrap().roots = vec![root];
    }),
    ("bundle-missing", "warren-ca-root", |f| f.authority.bundle = None),
    ("bundle-mismatch", "warren-ca", |f| {
        f.authority.bundle.as_mut().unwrap()[0].der = vec![2];
    }),
    ("token-audience", "istio-ca", |f| {
        f.daemons.as_mut().unwrap().audience = Some("istio-ca".into());
    }),
    ("daemon-missing", "node n2", |f| {
        f.own_pods.remove(1);
    }),
    ("daemon-not-ready", "the kernel lacks sk_lookup", |f| {
        f.own_pods[0].ready = false;
        f.own_pods[0].report = None;
        f.own_pods[0].last_words = Some("error: the kernel lacks sk_lookup".into());
    }),
    ("daemon-not-ready", "certificates: waiting", |f| {
        f.own_pods[0].ready = false;
        report(f).waits_for = vec!["certificates: waiting".into()];
    }),
    ("daemon-restarts", "5 times", |f| f.own_pods[0].restarts = 5),
    ("clock-skew", "90 s behind", |f| report(f).clock_ahead = Some(-90)),
    ("cni-plugin-missing", "node n1", |f| report(f).samples[0].1 = 0.0),
    ("stale-state", "240 s", |f| report(f).samples[1].1 = 240.0),
    ("kernel-map-full", "7 entries", |f| {
        report(f)
            .samples
            .push(("warren_kernel_map_full_total{map=\"WORKLOADS\"}".into(), 7.0));
    }),
    ("objects-not-understood", "2 objects", |f| {
        report(f)
            .samples
            .push(("warren_manifest_errors{flaw=\"unknown-field\"}".into(), 2.0));
    }),
    ("two-modes", "istio-injection=enabled", |f| {
        f.namespaces[0]
            .labels
            .insert("istio-injection".into(), "enabled".into());
    }),
    ("unknown-mode", "Ambient means nothing", |f| {
        f.namespaces[0]
            .labels
            .insert("istio.io/dataplane-mode".into(), "Ambient".into());
    }),
    ("unknown-mode", "pod shop/web", |f| {
        f.pods[0].odd_mode = Some("on".into())
    }),
    ("capture-failed", "kata", |f| {
        f.pods[0].captured = false;
        f.pods[0].failure = Some("its sockets are not this kernel's (kata)".into());
    }),
    ("not-captured", "web", |f| f.pods[0].captured = false),
    ("hbone-blocked", "only-web", |f| {
        f.network_policies = vec![network_policy(json!({"ingress": [{"ports": [{"port": 80}]}]}))];
    }),
    ("hbone-blocked", "out of pods", |f| {
        f.network_policies = vec![network_policy(json!({"policyTypes": ["Egress"], "egress": []}))];
    }),
    ("plaintext-refused", "shop/default", |f| report(f).samples[2].1 = 12.0),
];

fn expire(facts: &mut Facts, end: &str) {
    let root = Root {
        not_after: at(end),
        ..root()
    };
    facts.authority.bundle = Some(vec![root.clone()]);
    facts.authority.secret.as_mut().unwrap().roots = vec![root];
}

#[test]
fn nothing_is_wrong_with_a_healthy_cluster() {
    assert_eq!(diagnose(&healthy()), []);
}

#[test]
fn each_planted_fault_is_found_by_its_name_and_no_other() {
    for (name, speaks_of, plant) in FAULTS {
        let mut facts = healthy();
        plant(&mut facts);
        let findings = diagnose(&facts);
        let names: Vec<_> = findings.iter().map(|finding| finding.problem.name()).collect();
        assert_eq!(names, [*name], "{findings:#?}");
        let finding = &findings[0];
        let said = format!("{}: {} → {}", finding.subject, finding.what, finding.advice);
        assert!(said.contains(speaks_of), "{name} says nothing of {speaks_of:?}: {said}");
        assert!(!finding.advice.is_empty(), "{name}");
    }
}

#[test]
fn there_is_a_planted_fault_for_every_problem() {
    for problem in Problem::ALL {
        assert!(
            FAULTS.iter().any(|(name, _, _)| *name == problem.name()),
            "nobody plants {}",
            problem.name()
        );
    }
}

#[test]
fn what_is_not_installed_yet_is_no_fault_before_the_installation() {
    let facts = Facts {
        before_install: true,
        namespace: None,
        controller: None,
        daemons: None,
        own_pods: Vec::new(),
        authority: Authority::default(),
        definitions: vec![Definition {
            name: "authorizationpolicies.security.istio.io".into(),
            ..Definition::default()
        }],
        ..healthy()
    };
    assert_eq!(diagnose(&facts), []);
}

#[test]
fn a_policy_that_allows_15008_by_number_range_or_by_no_port_blocks_nothing() {
    let allowing = [
        json!({"ingress": [{"ports": [{"port": 15008}]}]}),
        json!({"ingress": [{"ports": [{"port": 15000, "endPort": 15010}]}]}),
        json!({"ingress": [{"from": [{"podSelector": {}}]}]}),
        json!({"ingress": [{"ports": [{"protocol": "TCP"}]}]}),
    ];
    for spec in allowing {
        let mut facts = healthy();
        facts.network_policies = vec![network_policy(spec.clone())];
        assert_eq!(diagnose(&facts), [], "{spec}");
    }
    let blocking = [
        json!({"ingress": [{"ports": [{"port": 15008, "protocol": "UDP"}]}]}),
        json!({"ingress": [{"ports": [{"port": "http"}]}]}),
        json!({"ingress": []}),
    ];
    for spec in blocking {
        let mut facts = healthy();
        facts.network_policies = vec![network_policy(spec.clone())];
        assert_eq!(diagnose(&facts).len(), 1, "{spec}");
    }
}

#[test]
fn one_policy_that_allows_15008_is_enough_among_several() {
    let mut facts = healthy();
    facts.network_policies = vec![
        network_policy(json!({"ingress": []})),
        network_policy(json!({"ingress": [{"ports": [{"port": 15008}]}]})),
    ];
    assert_eq!(diagnose(&facts), []);
}

#[test]
fn a_pod_that_has_just_started_is_not_late_and_a_daemon_only_warned_of() {
    let mut facts = healthy();
    facts.pods[0].captured = false;
    facts.pods[0].age_seconds = 3;
    assert_eq!(diagnose(&facts), []);
    facts.own_pods[0].ready = false;
    facts.own_pods[0].age_seconds = 3;
    let severities: Vec<_> = diagnose(&facts).iter().map(|finding| finding.severity).collect();
    assert_eq!(severities, [Severity::Warning]);
}

#[test]
fn errors_come_before_warnings_of_the_same_area() {
    let mut facts = healthy();
    facts.version = "0.9.0".into();
    facts.own_pods[0].waiting = Some(("ErrImagePull".into(), String::new()));
    let severities: Vec<_> = diagnose(&facts).iter().map(|finding| finding.severity).collect();
    assert_eq!(severities, [Severity::Error, Severity::Warning]);
}
